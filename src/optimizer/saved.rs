//! An optimiser as bytes, for checkpoints: in the format of [`crate::saved`], whose contents are
//!
//! ```text
//! u64: rule, rounding seed, steps
//! f64: learning rate, weight decay, eps, beta1, beta2
//! u64: rows and dim of the state, rows and dim of the master copy
//! f32: the state (G; or m, then v), the master copy
//! ```
//!
//! with 0 for what there is not.

use super::Optimizer;
use super::check::{check_beta, check_decay, check_eps, check_rate, check_shape};
use super::rule::Rule;
use crate::error::{Error, Result, value};
use crate::problem::arrays::check_all;
use crate::problem::embeddings::Matrix;
use crate::saved::{ARGUMENT, Format, Reader, finish};

/// The magic is "catoptim" as a little-endian number.
const FORMAT: Format = Format { magic: u64::from_le_bytes(*b"catoptim"), version: 1, name: "Optimizer" };
const SGD: u64 = 0;
const ROW_ADAGRAD: u64 = 1;
const ADAM: u64 = 2;

impl Optimizer {
    /// Options, number of steps, state and master copy as bytes, in the machine's byte order. An optimiser that
    /// [`from_bytes`](Optimizer::from_bytes) makes from them goes on bitwise as this one does. The table is not among
    /// them.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut arrays = self.state();
        arrays.extend(self.master.as_ref().map(|master| &master.values[..]));
        let mut bytes = FORMAT.start();
        // Once, and not as it grows: these may be gigabytes.
        bytes.reserve_exact(8 * (WORDS + 1) + arrays.iter().map(|array| size_of_val(*array)).sum::<usize>());
        bytes.extend_from_slice(bytemuck::cast_slice(&self.header()));
        arrays.iter().for_each(|array| bytes.extend_from_slice(bytemuck::cast_slice(array)));
        finish(bytes)
    }

    /// An optimiser from its bytes.
    ///
    /// # Errors
    /// [`Error::Value`] or [`Error::Shape`] if the bytes are not what
    /// `to_bytes` of an optimiser returned, are of another version or byte order, cut off, or damaged.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let mut reader = FORMAT.open(bytes)?;
        let mut header = [0; WORDS];
        for word in &mut header {
            *word = reader.number()?;
        }
        let optimizer = read(&header, &mut reader)?;
        reader.end()?;
        // What one rule has no use for is 0.
        if optimizer.header() != header { Err(impossible("options of another rule")) } else { Ok(optimizer) }
    }

    fn state(&self) -> Vec<&[f32]> {
        match &self.rule {
            Rule::Sgd => vec![],
            Rule::RowAdagrad { accumulator, .. } => vec![accumulator],
            Rule::Adam { m, v, .. } => vec![m, v],
        }
    }

    fn header(&self) -> [u64; WORDS] {
        let (rule, [eps, beta1, beta2], [rows, dim]) = match &self.rule {
            Rule::Sgd => (SGD, [0.0; 3], [0; 2]),
            Rule::RowAdagrad { eps, accumulator } => (ROW_ADAGRAD, [*eps, 0.0, 0.0], [accumulator.len(), 1]),
            Rule::Adam { betas, eps, dim, m, .. } => (ADAM, [*eps, betas[0], betas[1]], [m.len() / dim, *dim]),
        };
        let [master_rows, master_dim] = self.master.as_ref().map_or([0; 2], |master| [master.rows, master.dim]);
        let [learning_rate, weight_decay] = [self.learning_rate, self.weight_decay].map(f64::to_bits);
        let [eps, beta1, beta2] = [eps, beta1, beta2].map(f64::to_bits);
        let [rows, dim, master_rows, master_dim] = [rows, dim, master_rows, master_dim].map(|size| size as u64);
        let numbers = [rule, self.rounding_seed, self.steps, learning_rate, weight_decay, eps, beta1, beta2];
        let sizes = [rows, dim, master_rows, master_dim];
        std::array::from_fn(|i| if i < numbers.len() { numbers[i] } else { sizes[i - numbers.len()] })
    }
}

/// Numbers of the header.
const WORDS: usize = 12;

/// An optimiser of this header. Memory is taken for arrays that are there.
fn read(header: &[u64; WORDS], reader: &mut Reader<'_>) -> Result<Optimizer> {
    let &[rule, rounding_seed, steps, learning_rate, weight_decay, eps, beta1, beta2, rows, dim, ref master @ ..] =
        header;
    let [learning_rate, weight_decay, eps, beta1, beta2] =
        [learning_rate, weight_decay, eps, beta1, beta2].map(f64::from_bits);
    check_rate(learning_rate).and_then(|()| check_decay(weight_decay)).map_err(impossible)?;
    if rule != SGD {
        check_eps(eps).map_err(impossible)?;
    }
    let rule = match rule {
        SGD => Rule::Sgd,
        ROW_ADAGRAD => Rule::RowAdagrad { eps, accumulator: read_squares(reader, [rows, dim])? },
        ADAM => {
            check_beta("beta1", beta1).and_then(|()| check_beta("beta2", beta2)).map_err(impossible)?;
            let m = read_array(reader, [rows, dim])?;
            Rule::Adam { betas: [beta1, beta2], eps, dim: dim as usize, m, v: read_squares(reader, [rows, dim])? }
        }
        _ => return Err(impossible(format!("rule {rule}"))),
    };
    let mut optimizer = Optimizer { rule, learning_rate, weight_decay, rounding_seed, steps, master: None };
    if *master != [0, 0] {
        let (values, [rows, dim]) = (read_array(reader, *master)?, master.map(|size| size as usize));
        optimizer.check_state(rows, dim).map_err(impossible)?;
        optimizer.master = Some(Matrix { values, rows, dim });
    }
    Ok(optimizer)
}

/// G or v. They are NaN after gradients of NaN, and never below 0.
fn read_squares(reader: &mut Reader<'_>, shape: [u64; 2]) -> Result<Vec<f32>> {
    let squares = read_array(reader, shape)?;
    check_all("state", &squares, ">= 0 or NaN", |square| square >= 0.0 || square.is_nan()).map_err(impossible)?;
    Ok(squares)
}

fn read_array(reader: &mut Reader<'_>, [rows, dim]: [u64; 2]) -> Result<Vec<f32>> {
    let size = |number| usize::try_from(number).unwrap_or(usize::MAX);
    let (rows, dim) = (size(rows), size(dim));
    check_shape(rows, dim).map_err(impossible)?;
    // Bytes past the address space are more than there are.
    let bytes = rows.saturating_mul(dim).saturating_mul(size_of::<f32>());
    Ok(bytemuck::pod_collect_to_vec(reader.take(bytes)?))
}

fn impossible(found: impl std::fmt::Display) -> Error {
    value(ARGUMENT, format!("a state that no optimiser has ({found})"), "what Optimizer::to_bytes returned")
}
