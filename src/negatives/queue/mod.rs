//! A queue of past candidates as further negatives: a memory bank that later steps score against. Its rows receive no
//! gradient.

pub(crate) mod ring;
mod saved;
#[cfg(test)]
mod tests;

use std::ops::Range;

use half::{bf16, f16};

use crate::error::{Result, does_not_apply, missing, shape, value};
use crate::memory::zeroed;
use crate::problem::arrays::check_len;
use crate::problem::embeddings::{DType, Elements, Embeddings};
use crate::problem::pool::Pool;
use ring::Ring;

/// What a [`NegativeQueue`] holds. [`NegativeQueue::new`] checks it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub struct QueueOptions {
    pub(crate) capacity: usize,
    pub(crate) dim: usize,
    pub(crate) dtype: DType,
    pub(crate) ids: bool,
    pub(crate) log_q: bool,
    pub(crate) max_age: Option<u64>,
}

impl QueueOptions {
    /// `capacity` embeddings of `dim` elements, of any age, with neither ids nor log_q.
    pub fn new(capacity: usize, dim: usize, dtype: DType) -> Self {
        QueueOptions { capacity, dim, dtype, ids: false, log_q: false, max_age: None }
    }

    /// Each row has an item id, so accidental hits in the queue are masked. Either all pools of a batch have ids or
    /// none.
    pub fn with_ids(mut self) -> Self {
        self.ids = true;
        self
    }

    /// Each row has a log_q. Either all pools of a batch have log_q or none.
    pub fn with_log_q(mut self) -> Self {
        self.log_q = true;
        self
    }

    /// Rows are used for `max_age` steps, at least 1. Rows have age 1 in the step after their enqueue, and each further
    /// enqueue adds 1. If you enqueue twice in each optimiser step, a row therefore ages by 2 in each step.
    pub fn with_max_age(mut self, max_age: u64) -> Self {
        self.max_age = Some(max_age);
        self
    }

    /// Rows that the queue can hold.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// D, the width of the embeddings.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// The element type of the embeddings.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Whether the queue keeps an id for each row.
    pub fn keeps_ids(&self) -> bool {
        self.ids
    }

    /// Whether the queue keeps a log_q for each row.
    pub fn keeps_log_q(&self) -> bool {
        self.log_q
    }

    /// For how many steps rows are used; `None` if there is no bound.
    pub fn max_age(&self) -> Option<u64> {
        self.max_age
    }

    /// Bytes of a row in each array: embeddings, ids, log_q; 0 for what the queue does not keep.
    pub(crate) fn row_bytes(&self) -> [usize; 3] {
        let kept = |kept: bool, bytes: usize| if kept { bytes } else { 0 };
        [self.dim * self.dtype.size(), kept(self.ids, size_of::<u64>()), kept(self.log_q, size_of::<f32>())]
    }

    pub(crate) fn check(&self) -> Result<()> {
        let &QueueOptions { capacity, dim, max_age, .. } = self;
        if capacity == 0 || dim == 0 {
            return Err(shape("queue", format!("shape ({capacity}, {dim})"), "capacity >= 1 and dim >= 1"));
        }
        let bytes = dim.checked_mul(self.dtype.size()).and_then(|row| row.checked_mul(capacity));
        let addressable = bytes.is_some_and(|bytes| isize::try_from(bytes).is_ok());
        if u32::try_from(capacity).is_err() || u32::try_from(dim).is_err() || !addressable {
            let rule = "capacity and dim below 2^32, and bytes that can be addressed";
            return Err(shape("queue", format!("shape ({capacity}, {dim})"), rule));
        }
        if max_age == Some(0) {
            return Err(value(
                "max_age",
                0,
                ">= 1: the rows of the latest enqueue have age 1 when they are first used",
            ));
        }
        Ok(())
    }

    /// Whether rows of this shape and with these arrays can be enqueued.
    pub(crate) fn check_rows(&self, dim: usize, dtype: DType, ids: bool, log_q: bool) -> Result<()> {
        if dim != self.dim {
            return Err(shape(
                "candidates",
                format!("dim {dim}"),
                format!("the dim of the queue, which is {}", self.dim),
            ));
        }
        if dtype != self.dtype {
            let rule = format!("the element type of the queue, which is {:?}", self.dtype);
            return Err(shape("candidates", format!("elements of type {dtype:?}"), rule));
        }
        for (argument, given, stored) in [("candidate_ids", ids, self.ids), ("log_q", log_q, self.log_q)] {
            if stored && !given {
                return Err(missing(argument, "the queue was made to keep them for each row"));
            }
        }
        Ok(())
    }
}

/// The last candidates of past steps, at most `capacity` of them: a first-in first-out memory bank in host memory.
///
/// Embeddings change slowly, so those of the last steps can serve as negatives again. They cost only their memory and
/// their scores: He et al., "Momentum Contrast" (MoCo), CVPR 2020, section 3.2; Wang et al., "Cross-Batch Negative
/// Sampling for Training Two-Tower Recommenders", SIGIR 2021, section 3, whose queue holds items with their sampling
/// probabilities. Both papers train the model for a while before they use a queue: begin to enqueue when embeddings
/// have settled.
///
/// A step takes the queue's rows as further pools of its batch, without a copy. They receive no gradient.
///
/// **Enqueue after the loss.** If you enqueue a batch's candidates before its loss, they are there twice, and each
/// row's own positive comes back as a negative. With ids it is masked; without ids it is not. A batch borrows the queue
/// that it uses, so the compiler rejects an enqueue before the last use of the batch.
///
/// The same id may be in the queue several times. log_q accounts for that as an expected number of copies, and
/// [`union_log_q`](crate::negatives::union_log_q) computes one log_q for queue, batch and sampled pools together. Rows
/// keep the log_q with which they were enqueued. A symmetric loss takes one pool, so it cannot take a queue.
///
/// ```
/// use catalog_softmax::negatives::{NegativeQueue, QueueOptions};
/// use catalog_softmax::{Backend, Batch, Cpu, DType, Embeddings, Loss, Pool, Similarity};
/// # let step_inputs = |step: u64| {
/// #     let rows = |phase: u64| (0..4 * 8).map(|i| ((i + 31 * phase) as f32).sin()).collect::<Vec<f32>>();
/// #     (rows(2 * step), rows(2 * step + 1), (0..4).map(|i| (3 * i + step) % 7).collect::<Vec<u64>>())
/// # };
/// let (b, d) = (4, 8);
/// let mut queue = NegativeQueue::new(QueueOptions::new(10, d, DType::F32).with_ids().with_max_age(3))?;
/// let (mut cpu, loss) = (Cpu::new(), Loss::softmax(Similarity::Cosine, 0.1));
/// for step in 0..5 {
///     let (queries, items, ids) = step_inputs(step);
///     let own = Pool::new(Embeddings::new(&items, b, d)).ids(&ids);
///     let queries = Embeddings::new(&queries, b, d);
///     let batch = Batch::in_batch(queries, own.clone()).pools(queue.pools()).build()?;
///     let (output, gradients) = cpu.value_and_grad(&batch, &loss)?;
///     // Here an optimiser takes its step.
///     assert_eq!(batch.num_candidates(), b + queue.len());
///     queue.enqueue(&own)?;
/// }
/// assert_eq!(queue.len(), 10);
/// # Ok::<(), catalog_softmax::Error>(())
/// ```
///
/// With a correction, compute one log_q for the candidates of the batch and of the queue, anew in each step, from their
/// ids. The queue then keeps no log_q, and ignores that of the pool that you enqueue. The queue's rows stand for a
/// share of each item's gradient but receive none, so multiply the gradients of the other rows by
/// [`union_gradient_weight`](crate::negatives::union_gradient_weight). Without these weights, a queue much longer than
/// the batch leaves popular items with little of the push away from queries, and retrieval suffers (docs/results.md).
/// Gradients of positives are not multiplied, so the positives are separate embeddings:
///
/// ```
/// use catalog_softmax::negatives::{
///     ExactCounts, FrequencyEstimator, NegativeQueue, QueueOptions, union_gradient_weight, union_log_q,
/// };
/// use catalog_softmax::{
///     Backend, Batch, Correction, Cpu, DType, Embeddings, Loss, Pool, Result, Similarity,
/// };
/// # let step_inputs = |step: u64| {
/// #     let rows = |phase: u64| (0..4 * 8).map(|i| ((i + 31 * phase) as f32).sin()).collect::<Vec<f32>>();
/// #     (rows(2 * step), rows(2 * step + 1), (0..4).map(|i| (3 * i + step) % 7).collect::<Vec<u64>>())
/// # };
/// let (b, d) = (4, 8);
/// let mut queue = NegativeQueue::new(QueueOptions::new(10, d, DType::F32).with_ids())?;
/// let mut frequency = ExactCounts::new();
/// let loss = Loss::softmax(Similarity::Cosine, 0.1).correction(Correction::LogQ);
/// for step in 0..5 {
///     let (queries, items, ids) = step_inputs(step);
///     frequency.observe(&ids);
///     // Draws from one popularity: the B − 1 other rows' items, and the queue's.
///     let log_q = |ids: &[u64]| -> Result<Vec<f32>> {
///         let popularity = frequency.log_q(ids);
///         let mut log_q = vec![0.0; ids.len()];
///         union_log_q(&[((b - 1) as f64, &popularity), (queue.len() as f64, &popularity)], &mut log_q)?;
///         Ok(log_q)
///     };
///     let (own_log_q, queue_log_q) = (log_q(&ids)?, queue.ids().map(log_q).collect::<Result<Vec<_>>>()?);
///     let own = Pool::new(Embeddings::new(&items, b, d)).ids(&ids).log_q(&own_log_q);
///     let queued = queue.pools().zip(&queue_log_q).map(|(pool, log_q)| pool.log_q(log_q));
///     let batch = Batch::builder(Embeddings::new(&queries, b, d), own.clone())
///         .pools(queued)
///         .positive_embeddings(Embeddings::new(&items, b, d))
///         .positive_ids(&ids)
///         .positive_log_q(&own_log_q)
///         .build()?;
///     let (_, mut gradients) = Cpu::new().value_and_grad(&batch, &loss)?;
///
///     let (popularity, mut weight) = (frequency.log_q(&ids), vec![0.0; b]);
///     let draws = [((b - 1) as f64, &popularity[..], true), (queue.len() as f64, &popularity, false)];
///     union_gradient_weight(&draws, &mut weight)?;
///     for (d_item, weight) in gradients.d_candidates[0].values.chunks_mut(d).zip(weight) {
///         d_item.iter_mut().for_each(|x| *x *= weight);
///     }
///     // Item ids[i] gets row i of d_candidates[0] and row i of d_positive_embeddings.
///     queue.enqueue(&own)?;
/// }
/// # assert_eq!(queue.len(), 10);
/// # Ok::<(), catalog_softmax::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct NegativeQueue {
    pub(crate) options: QueueOptions,
    pub(crate) ring: Ring,
    /// (capacity, dim) elements as bytes, in words so that they are aligned for every type.
    embeddings: Vec<u32>,
    ids: Vec<u64>,
    log_q: Vec<f32>,
}

impl NegativeQueue {
    /// An empty queue. All of its memory is reserved here; the system provides it as rows first come in.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) for a capacity or dim that is 0 or not below 2^32, and if there is not
    /// enough memory; [`Error::Value`](crate::Error::Value) for a `max_age` of 0.
    pub fn new(options: QueueOptions) -> Result<Self> {
        options.check()?;
        Self::with_ring(options, Ring::new(options.capacity, options.max_age))
    }

    pub(crate) fn with_ring(options: QueueOptions, ring: Ring) -> Result<Self> {
        let capacity = options.capacity;
        let words = (capacity * options.row_bytes()[0]).div_ceil(size_of::<u32>());
        let kept = |kept: bool| if kept { capacity } else { 0 };
        let arrays = || Some((zeroed(words)?, zeroed(kept(options.ids))?, zeroed(kept(options.log_q))?));
        let (embeddings, ids, log_q) = arrays().ok_or_else(|| {
            let row_bytes: usize = options.row_bytes().iter().sum();
            let rule = format!("what memory holds, at {row_bytes} bytes for each row");
            shape("queue", format!("shape ({capacity}, {})", options.dim), rule)
        })?;
        Ok(NegativeQueue { options, ring, embeddings, ids, log_q })
    }

    /// What the queue was made to hold. After [`from_bytes`](NegativeQueue::from_bytes), compare it with what you need.
    pub fn options(&self) -> QueueOptions {
        self.options
    }

    /// Rows that the queue can hold.
    pub fn capacity(&self) -> usize {
        self.options.capacity
    }

    /// Rows that the next step uses: enqueued, not overwritten, not too old.
    pub fn len(&self) -> usize {
        self.ring.len()
    }

    /// Whether the next step has no rows to use.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Age of each row in the next step, in the order of [`pools`](NegativeQueue::pools).
    pub fn ages(&self) -> impl Iterator<Item = u64> {
        self.ring.ages()
    }

    /// The rows as pools without gradient: no pool while the queue is empty, two if the rows wrap around the end of its
    /// memory, otherwise one. A full queue is always one pool, in the order of its memory. With a `max_age`, make the
    /// capacity the number of rows that so many enqueues bring. Pools have the ids and log_q with which their rows were
    /// enqueued; [`Pool::log_q`] replaces the log_q.
    pub fn pools(&self) -> impl Iterator<Item = Pool<'_>> {
        self.live().map(|slots| {
            let pool = Pool::new(self.embeddings(slots.clone())).without_gradient();
            let pool = if self.options.ids { pool.ids(&self.ids[slots.clone()]) } else { pool };
            if self.options.log_q { pool.log_q(&self.log_q[slots]) } else { pool }
        })
    }

    /// Ids of the rows of each of [`pools`](NegativeQueue::pools), where the queue keeps ids.
    pub fn ids(&self) -> impl Iterator<Item = &[u64]> {
        self.live().filter(|_| self.options.ids).map(|slots| &self.ids[slots])
    }

    /// log_q of the rows of each of [`pools`](NegativeQueue::pools), where the queue keeps log_q.
    pub fn log_q(&self) -> impl Iterator<Item = &[f32]> {
        self.live().filter(|_| self.options.log_q).map(|slots| &self.log_q[slots])
    }

    /// Copies a pool's rows over the oldest ones, with their ids and log_q if the queue keeps these. The age of all
    /// earlier rows grows by 1. If there are more than `capacity` new rows, the last `capacity` of them stay.
    ///
    /// Arrays that the queue does not keep are ignored, so you can give the batch's own pool as it is.
    ///
    /// Elements are not checked. If a queued row has a NaN or an infinity, the lse and the loss are NaN for every query
    /// that has it as a negative, in every step until the row is overwritten, too old, or
    /// [cleared](NegativeQueue::clear). If your training skips a step whose loss is not finite, skip the enqueue, too.
    ///
    /// # Errors
    /// Shapes that disagree with the queue's or with each other, another element type, ids or log_q missing where the queue
    /// keeps them, log_q that is not finite. The queue is then as it was.
    pub fn enqueue(&mut self, rows: &Pool<'_>) -> Result<()> {
        let ids = rows.ids_slice().filter(|_| self.options.ids);
        let Some(candidates) = rows.candidates() else {
            return Err(does_not_apply("candidate_rows", "a queue copies embeddings: give them by Pool::new"));
        };
        let log_q = rows.log_q.filter(|_| self.options.log_q);
        candidates.check("candidates")?;
        self.options.check_rows(candidates.dim(), candidates.dtype(), ids.is_some(), log_q.is_some())?;
        let lengths = [("candidate_ids", ids.map(<[u64]>::len)), ("log_q", log_q.map(<[f32]>::len))];
        for (argument, len) in lengths.into_iter().filter_map(|(argument, len)| Some((argument, len?))) {
            check_len(argument, len, candidates.rows(), "the number of candidates")?;
        }
        if let Some((at, found)) = log_q.into_iter().flatten().enumerate().find(|(_, log_q)| !log_q.is_finite()) {
            return Err(value(format!("log_q[{at}]"), found, "finite"));
        }
        let (bytes, row_bytes) = (candidates.bytes(), self.options.row_bytes()[0]);
        let stride = candidates.stride() * self.options.dtype.size();
        for copy in self.ring.push(candidates.rows()) {
            let to: &mut [u8] = &mut bytemuck::cast_slice_mut(&mut self.embeddings)[copy.to * row_bytes..];
            for (row, to) in to.chunks_exact_mut(row_bytes).take(copy.rows).enumerate() {
                to.copy_from_slice(&bytes[(copy.from + row) * stride..][..row_bytes]);
            }
            let (from, to) = (copy.from..copy.from + copy.rows, copy.to..copy.to + copy.rows);
            if let Some(ids) = ids {
                self.ids[to.clone()].copy_from_slice(&ids[from.clone()]);
            }
            if let Some(log_q) = log_q {
                self.log_q[to].copy_from_slice(&log_q[from]);
            }
        }
        Ok(())
    }

    /// Embeddings, ids and log_q as bytes, of all slots.
    pub(crate) fn arrays(&self) -> [&[u8]; 3] {
        let (ids, log_q) = (bytemuck::cast_slice(&self.ids), bytemuck::cast_slice(&self.log_q));
        [bytemuck::cast_slice(&self.embeddings), ids, log_q]
    }

    pub(crate) fn arrays_mut(&mut self) -> [&mut [u8]; 3] {
        let (ids, log_q) = (bytemuck::cast_slice_mut(&mut self.ids), bytemuck::cast_slice_mut(&mut self.log_q));
        [bytemuck::cast_slice_mut(&mut self.embeddings), ids, log_q]
    }

    /// Forgets all rows.
    pub fn clear(&mut self) {
        self.ring.clear();
    }

    fn live(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        self.ring.live().into_iter().filter(|slots| !slots.is_empty())
    }

    fn embeddings(&self, slots: Range<usize>) -> Embeddings<'_> {
        let (dim, rows) = (self.options.dim, slots.len());
        let elements = slots.start * dim..slots.end * dim;
        let elements = match self.options.dtype {
            DType::F32 => Elements::F32(&bytemuck::cast_slice(&self.embeddings)[elements]),
            DType::F16 => Elements::F16(&bytemuck::cast_slice::<u32, f16>(&self.embeddings)[elements]),
            DType::Bf16 => Elements::Bf16(&bytemuck::cast_slice::<u32, bf16>(&self.embeddings)[elements]),
        };
        Embeddings::new(elements, rows, dim)
    }
}
