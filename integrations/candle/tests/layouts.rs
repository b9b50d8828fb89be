//! Tensors as candle's operators leave them: narrowed, transposed, broadcast. Each has bitwise the loss and gradients
//! of its contiguous copy.

mod common;

use candle_core::{DType, Device, Result, Tensor, Var};
use catalog_softmax_candle::{Options, softmax_loss};
use common::{numbers, random};

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

fn var(rows: usize, columns: usize, dtype: DType) -> Result<Var> {
    let values = numbers(&mut random((rows * 100 + columns) as u64), rows * columns, -1.0, 1.0);
    Var::from_tensor(&Tensor::from_vec(values, (rows, columns), &Device::Cpu)?.to_dtype(dtype)?)
}

fn flat(tensor: &Tensor) -> Result<Vec<f32>> {
    tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
}

/// The loss, and the gradients of two variables, of views of these.
fn step(
    (queries, candidates): (&Var, &Var),
    views: impl Fn(&Tensor, &Tensor) -> Result<(Tensor, Tensor)>,
) -> Result<[Vec<f32>; 3]> {
    let (q, c) = views(queries, candidates)?;
    let options = Options { positives: Some(Tensor::new(&[4u32, 0, 2, 2, 1], &Device::Cpu)?), ..Options::default() };
    let loss = softmax_loss(&q, &c, &options)?;
    let gradients = loss.backward()?;
    let of = |var: &Var| flat(gradients.get(var).expect("a gradient of both"));
    Ok([flat(&loss)?, of(queries)?, of(candidates)?])
}

fn check(variables: (&Var, &Var), views: impl Fn(&Tensor, &Tensor) -> Result<(Tensor, Tensor)>) -> Result<()> {
    let copied = |q: &Tensor, c: &Tensor| {
        let (q, c) = views(q, c)?;
        Ok((q.force_contiguous()?, c.force_contiguous()?))
    };
    let (viewed, contiguous) = (step(variables, &views)?, step(variables, copied)?);
    assert_eq!(viewed, contiguous);
    assert!(viewed[1].iter().any(|&d| d != 0.0) && viewed[2].iter().any(|&d| d != 0.0));
    Ok(())
}

#[test]
fn transposed() -> Result<()> {
    for dtype in DTYPES {
        check((&var(12, 5, dtype)?, &var(12, 7, dtype)?), |q, c| Ok((q.t()?, c.t()?)))?;
    }
    Ok(())
}

#[test]
fn narrowed_rows_and_columns() -> Result<()> {
    for dtype in DTYPES {
        check((&var(9, 20, dtype)?, &var(11, 13, dtype)?), |q, c| {
            Ok((q.narrow(0, 2, 5)?.narrow(1, 3, 12)?, c.narrow(0, 4, 7)?.narrow(1, 1, 12)?))
        })?;
    }
    Ok(())
}

#[test]
fn one_part_of_a_larger_tensor() -> Result<()> {
    check((&var(5, 24, DType::F32)?, &var(14, 12, DType::F32)?), |q, c| {
        // Heads of a projection, and every second row.
        Ok((q.reshape((5, 2, 12))?.get_on_dim(1, 1)?, c.reshape((7, 2, 12))?.get_on_dim(1, 0)?))
    })
}

#[test]
fn broadcast_rows() -> Result<()> {
    check((&var(1, 12, DType::F32)?, &var(7, 12, DType::F32)?), |q, c| Ok((q.broadcast_as((5, 12))?, c.clone())))
}

#[test]
fn one_row_of_many() -> Result<()> {
    let (queries, candidates) = (var(3, 12, DType::F32)?, var(7, 12, DType::F32)?);
    let options = Options { positives: Some(Tensor::new(&[6u32], &Device::Cpu)?), ..Options::default() };
    let row = queries.narrow(0, 1, 1)?;
    let gradients = softmax_loss(&row, &candidates, &options)?.backward()?;
    let found = flat(gradients.get(&queries).expect("a gradient"))?;
    assert!(found[..12].iter().chain(&found[24..]).all(|&d| d == 0.0) && found[12..24].iter().any(|&d| d != 0.0));
    Ok(())
}

/// The constants may be views, too, and of any type of their kind.
#[test]
fn vectors() -> Result<()> {
    let (queries, candidates) = (var(5, 12, DType::F32)?, var(7, 12, DType::F32)?);
    let device = &Device::Cpu;
    let loss = |positives: Tensor, log_q: Tensor, ids: Tensor| {
        let correction = catalog_softmax_candle::Correction::LogQ;
        let (positives, log_q, candidate_ids) = (Some(positives), Some(log_q), Some(ids));
        let options = Options { positives, log_q, candidate_ids, correction, ..Options::default() };
        softmax_loss(&queries, &candidates, &options)?.to_scalar::<f32>()
    };
    let log_q = [-1.0f32, -2.0, -1.5, -3.0, -2.5, -1.0, -2.0];
    let positives = Tensor::new(&[4u32, 0, 2, 2, 1], device)?;
    let ids = Tensor::new(&[1i64, 2, -3, 4, 1, 5, 6], device)?;
    let expected = loss(positives.clone(), Tensor::new(&log_q, device)?, ids.clone())?;
    let spread = Tensor::new(&log_q, device)?.unsqueeze(1)?.repeat((1, 2))?.get_on_dim(1, 1)?;
    let wide = Tensor::cat(&[&ids, &ids], 0)?.narrow(0, 7, 7)?;
    assert_eq!(loss(positives.to_dtype(DType::I64)?, spread.to_dtype(DType::F64)?, wide)?, expected);
    let other = Tensor::new(&[1i64, 2, -3, 4, 7, 5, 6], device)?;
    assert_ne!(loss(positives, Tensor::new(&log_q, device)?, other)?, expected);
    Ok(())
}
