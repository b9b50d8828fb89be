//! Arrays of Python as the crate's views: addresses and sizes in, borrowed slices out.
//!
//! Whoever calls from Python (`catalog_softmax/_arrays.py`, `catalog_softmax/torch/_ops.py`) has checked what array each address
//! belongs to, its type and its strides. Nothing is copied.

use catalog_softmax::{Batch, BatchBuilder, Elements, Embeddings, Pool, Search};
use half::{bf16, f16};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// (address, rows, dim, elements between rows, element type)
#[derive(FromPyObject)]
pub struct RawMatrix(pub usize, pub usize, pub usize, pub usize, pub String);

/// (address, length) of contiguous elements; the type follows from the argument.
#[derive(FromPyObject)]
pub struct RawSlice(pub usize, pub usize);

/// (candidates, candidate_ids int64, log_q float32, whether a gradient is wanted)
#[derive(FromPyObject)]
pub struct RawPool(pub RawMatrix, pub Option<RawSlice>, pub Option<RawSlice>, pub bool);

/// A batch: queries, pools, positives (int64), positive_embeddings, positive_ids (int64), positive_log_q (float32), excluded
/// offsets and ids (int64), row_weight (float32). With neither kind of positives it is in-batch.
#[derive(FromPyObject)]
pub struct RawBatch(
    pub RawMatrix,
    pub Vec<RawPool>,
    pub Option<RawSlice>,
    pub Option<RawMatrix>,
    pub Option<RawSlice>,
    pub Option<RawSlice>,
    pub Option<(RawSlice, RawSlice)>,
    pub Option<RawSlice>,
);

/// The elements at an address. The only place where an address becomes a reference.
///
/// # Safety
/// For as long as the slice is used, `len` elements of `T` lie at `address`, allocated and initialised, and nobody writes to
/// them. The caller has this from Python: each address comes from an array or tensor that the calling Python function holds a
/// reference to until the call returns, and its length from the same object's shape and strides. That no other thread writes
/// to a tensor while an operator reads it is the rule of every operator that releases the GIL, PyTorch's own included.
pub unsafe fn slice<'a, T>(RawSlice(address, len): &RawSlice, argument: &str) -> PyResult<&'a [T]> {
    if *len == 0 {
        return Ok(&[]);
    }
    let bytes = len.checked_mul(size_of::<T>()).filter(|&bytes| isize::try_from(bytes).is_ok());
    if *address == 0 || address % align_of::<T>() != 0 || bytes.is_none() {
        let rule = format!("not null, and a multiple of {}", align_of::<T>());
        return Err(PyValueError::new_err(format!(
            "{argument} has {len} elements at address {address:#x}; rule: {rule}"
        )));
    }
    // SAFETY: not null, aligned, and no larger than memory, as was just checked; the rest is what the caller promises.
    Ok(unsafe { std::slice::from_raw_parts(*address as *const T, *len) })
}

/// # Safety
/// As [`slice`], of all that the batch names.
pub unsafe fn matrix<'a>(raw: &RawMatrix, argument: &str) -> PyResult<Embeddings<'a>> {
    let RawMatrix(address, rows, dim, stride, dtype) = raw;
    let span = rows.checked_sub(1).map_or(Some(0), |full| full.checked_mul(*stride)?.checked_add(*dim));
    let span = RawSlice(*address, span.unwrap_or(usize::MAX));
    // SAFETY: the caller's promise, of the type that it named.
    let elements: Elements<'a> = unsafe {
        match dtype.as_str() {
            "float32" => slice::<f32>(&span, argument)?.into(),
            "float16" => slice::<f16>(&span, argument)?.into(),
            "bfloat16" => slice::<bf16>(&span, argument)?.into(),
            other => {
                let rule = "float32, float16 or bfloat16";
                return Err(PyValueError::new_err(format!("{argument} has elements of type {other}; rule: {rule}")));
            }
        }
    };
    Ok(Embeddings::new(elements, *rows, *dim).with_stride(*stride))
}

/// What a batch and a search begin with.
struct Parts<'a> {
    queries: Embeddings<'a>,
    first: Pool<'a>,
    others: Vec<Pool<'a>>,
}

impl RawBatch {
    /// The crate's builder of a loss's batch, which checks everything else.
    ///
    /// # Safety
    /// As [`slice`], of all that the batch names, for the lifetime that the caller chooses.
    pub unsafe fn batch<'a>(&self) -> PyResult<Batch<'a>> {
        // SAFETY: handed on.
        unsafe {
            self.with_columns(self.builder(self.2.is_none() && self.3.is_none())?)?
                .build()
                .map_err(crate::errors::raise)
        }
    }

    /// A builder with positives, weights and exclusions.
    ///
    /// # Safety
    /// As [`slice`].
    pub unsafe fn with_columns<'a>(&self, mut builder: BatchBuilder<'a>) -> PyResult<BatchBuilder<'a>> {
        // SAFETY: handed on.
        unsafe {
            if let Some(positives) = &self.2 {
                builder = builder.positives(slice::<i64>(positives, "positives")?);
            }
            if let Some(embeddings) = &self.3 {
                builder = builder.positive_embeddings(matrix(embeddings, "positive_embeddings")?);
            }
            if let Some(ids) = &self.4 {
                builder = builder.positive_ids(slice::<i64>(ids, "positive_ids")?);
            }
            if let Some(log_q) = &self.5 {
                builder = builder.positive_log_q(slice(log_q, "positive_log_q")?);
            }
            if let Some(weight) = &self.7 {
                builder = builder.row_weight(slice(weight, "row_weight")?);
            }
        }
        // SAFETY: handed on.
        Ok(match unsafe { self.excluded()? } {
            Some((offsets, ids)) => builder.excluded_ids(offsets, ids),
            None => builder,
        })
    }

    /// The crate's search, of the same queries, pools and exclusions.
    ///
    /// # Safety
    /// As [`slice`].
    pub unsafe fn search<'a>(&self) -> PyResult<Search<'a>> {
        // SAFETY: handed on.
        let (Parts { queries, first, others }, excluded) = unsafe { (self.parts()?, self.excluded()?) };
        let builder = Search::builder(queries, first).pools(others);
        let builder = match excluded {
            Some((offsets, ids)) => builder.excluded_ids(offsets, ids),
            None => builder,
        };
        builder.build().map_err(crate::errors::raise)
    }

    /// # Safety
    /// As [`slice`].
    pub unsafe fn builder<'a>(&self, in_batch: bool) -> PyResult<BatchBuilder<'a>> {
        // SAFETY: handed on.
        let Parts { queries, first, others } = unsafe { self.parts()? };
        let builder = if in_batch { Batch::in_batch(queries, first) } else { Batch::builder(queries, first) };
        Ok(builder.pools(others))
    }

    /// # Safety
    /// As [`slice`].
    unsafe fn excluded<'a>(&self) -> PyResult<Option<(&'a [i64], &'a [i64])>> {
        let Some((offsets, ids)) = &self.6 else { return Ok(None) };
        // SAFETY: handed on.
        Ok(Some(unsafe { (slice(offsets, "excluded[0]")?, slice(ids, "excluded[1]")?) }))
    }

    /// # Safety
    /// As [`slice`].
    unsafe fn parts<'a>(&self) -> PyResult<Parts<'a>> {
        // SAFETY: handed on.
        let (queries, mut pools) = unsafe {
            let pools = self.1.iter().enumerate().map(|(p, raw)| pool(raw, p));
            (matrix(&self.0, "queries")?, pools.collect::<PyResult<Vec<_>>>()?)
        };
        if pools.is_empty() {
            return Err(PyValueError::new_err("candidates is a list of no pools; rule: one pool at least"));
        }
        let first = pools.remove(0);
        Ok(Parts { queries, first, others: pools })
    }

    /// The weights of rows, where there are any.
    ///
    /// # Safety
    /// As [`slice`].
    pub unsafe fn row_weight<'a>(&self) -> PyResult<Option<&'a [f32]>> {
        // SAFETY: handed on.
        self.7.as_ref().map(|weight| unsafe { slice(weight, "row_weight") }).transpose()
    }
}

/// # Safety
/// As [`slice`].
pub unsafe fn pool<'a>(RawPool(candidates, ids, log_q, gradient): &RawPool, p: usize) -> PyResult<Pool<'a>> {
    // SAFETY: handed on.
    unsafe {
        let mut pool = Pool::new(matrix(candidates, &format!("candidates[{p}]"))?);
        if let Some(ids) = ids {
            pool = pool.ids(slice::<i64>(ids, &format!("candidate_ids[{p}]"))?);
        }
        if let Some(log_q) = log_q {
            pool = pool.log_q(slice(log_q, &format!("log_q[{p}]"))?);
        }
        Ok(if *gradient { pool } else { pool.without_gradient() })
    }
}
