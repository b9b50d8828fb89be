//! A queue of past candidates in device memory.

use std::ops::Range;

use half::{bf16, f16};

use super::Cuda;
use super::device_search::DevicePool;
use super::memory::{Arena, Layout, Part};
use super::view::{DeviceElement, DeviceEmbeddings, DeviceSlice};
use crate::embeddings::DType;
use crate::error::{Result, value};
use crate::queue::ring::Ring;
use crate::queue::{NegativeQueue, QueueOptions};

/// The last candidates of past steps, as [`NegativeQueue`] in host memory, whose docs say what it is for and why to enqueue
/// after the loss.
///
/// Its memory is allocated when it is made; [`enqueue`](DeviceQueue::enqueue) copies on the backend's stream, waits for nothing
/// and allocates nothing. The backend that it is made with runs its steps, in the order of its stream: another one's stream
/// has to be made to wait.
///
/// A full queue is one pool, at the same place in every step, so that a captured graph of a step stays right; the graph of an
/// enqueue does not, since each enqueue writes other rows. Before it is full, pools grow from step to step, and so does what
/// a step needs: reserve it with [`whole`](DeviceQueue::whole).
///
/// ```no_run
/// use catalog_softmax::cuda::{Cuda, DeviceBatch, DevicePool, DeviceQueue};
/// # use catalog_softmax::cuda::{DeviceEmbeddings, DeviceOutput, DeviceSlice};
/// use catalog_softmax::{DType, Loss, QueueOptions, Request, Similarity};
/// # fn training(
/// #     own: DevicePool<'_>, queries: DeviceEmbeddings<'_>, positives: DeviceSlice<'_, u32>, mut output: DeviceOutput<'_>,
/// # ) -> Result<(), catalog_softmax::Error> {
/// let mut cuda = Cuda::new(0)?;
/// let mut queue = DeviceQueue::new(&cuda, QueueOptions::new(65_536, 128, DType::Bf16).with_ids())?;
/// // `own`: the batch's candidates with their ids. What a step with a full queue needs, once:
/// let loss = Loss::softmax(Similarity::Cosine, 0.05);
/// let largest = DeviceBatch::new(queries, own, positives).pool(queue.whole());
/// cuda.reserve(&largest, &loss, Request::value_and_grad())?;
/// for _step in 0..1000 {
///     let batch = queue.pools().fold(DeviceBatch::new(queries, own, positives), DeviceBatch::pool);
///     cuda.step(&batch, &loss, &mut output)?;
///     queue.enqueue(&cuda, &own)?;
/// }
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct DeviceQueue {
    options: QueueOptions,
    ring: Ring,
    arena: Arena,
    /// Embeddings, ids and log_q.
    arrays: [Part; 3],
}

impl DeviceQueue {
    /// An empty queue on the device of `cuda`.
    ///
    /// # Errors
    /// As [`NegativeQueue::new`]; [`Error::DeviceMemory`](crate::Error::DeviceMemory) where it does not fit;
    /// [`Error::Driver`](crate::Error::Driver) where the driver refuses.
    pub fn new(cuda: &Cuda, options: QueueOptions) -> Result<Self> {
        options.check()?;
        Self::with_ring(cuda, options, Ring::new(options.capacity, options.max_age))
    }

    fn with_ring(cuda: &Cuda, options: QueueOptions, ring: Ring) -> Result<Self> {
        let (capacity, mut layout) = (options.capacity, Layout::default());
        let arrays = options.row_bytes().map(|row_bytes| layout.part(capacity, row_bytes));
        cuda.driver.bind()?;
        let mut arena = Arena::new(cuda.driver.context.clone());
        arena.reserve(&cuda.driver, layout)?;
        // Views of `whole` are of initialised elements.
        cuda.driver.fill(arena.address(arrays[0]), 0, layout.bytes())?;
        Ok(DeviceQueue { options, ring, arena, arrays })
    }

    /// A queue with the options, rows and ages of one in host memory, such as one [from bytes](NegativeQueue::from_bytes).
    ///
    /// # Errors
    /// As [`new`](DeviceQueue::new).
    pub fn from_host(cuda: &Cuda, host: &NegativeQueue) -> Result<Self> {
        let queue = Self::with_ring(cuda, host.options, host.ring.clone())?;
        for ((&part, row_bytes), bytes) in queue.arrays.iter().zip(queue.options.row_bytes()).zip(host.arrays()) {
            for slots in queue.ring.live().into_iter().filter(|slots| row_bytes > 0 && !slots.is_empty()) {
                let (start, end) = (slots.start * row_bytes, slots.end * row_bytes);
                cuda.driver.upload(queue.arena.address(part) + start as u64, &bytes[start..end])?;
            }
        }
        Ok(queue)
    }

    /// The same queue in host memory, to look at or to [keep as bytes](NegativeQueue::to_bytes). Waits for the stream of `cuda`.
    ///
    /// # Errors
    /// Where `cuda` is on another device, and where the host's memory does not hold the queue;
    /// [`Error::Driver`](crate::Error::Driver) where the device failed.
    pub fn to_host(&self, cuda: &Cuda) -> Result<NegativeQueue> {
        self.check_device(cuda)?;
        cuda.driver.bind()?;
        let mut host = NegativeQueue::with_ring(self.options, self.ring.clone())?;
        for ((&part, row_bytes), bytes) in self.arrays.iter().zip(self.options.row_bytes()).zip(host.arrays_mut()) {
            for slots in self.ring.live().into_iter().filter(|slots| row_bytes > 0 && !slots.is_empty()) {
                let (start, end) = (slots.start * row_bytes, slots.end * row_bytes);
                cuda.driver.download(&mut bytes[start..end], self.arena.address(part) + start as u64)?;
            }
        }
        Ok(host)
    }

    /// What the queue was made to hold.
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

    /// Age of each row in the next step, in the order of [`pools`](DeviceQueue::pools).
    pub fn ages(&self) -> impl Iterator<Item = u64> {
        self.ring.ages()
    }

    /// Bytes of device memory that the queue holds.
    pub fn device_bytes(&self) -> usize {
        self.arena.bytes()
    }

    /// Forgets all rows.
    pub fn clear(&mut self) {
        self.ring.clear();
    }

    /// The rows as pools without gradient, as [`NegativeQueue::pools`]: none, one or two.
    pub fn pools(&self) -> impl Iterator<Item = DevicePool<'_>> {
        self.ring.live().into_iter().filter(|slots| !slots.is_empty()).map(|slots| self.pool(slots))
    }

    /// All of the queue's memory as a pool, whatever is in it (zeros where nothing was): for planning and reserving a step
    /// with a full queue.
    pub fn whole(&self) -> DevicePool<'_> {
        self.pool(0..self.options.capacity)
    }

    fn pool(&self, slots: Range<usize>) -> DevicePool<'_> {
        let candidates = match self.options.dtype {
            DType::F32 => self.embeddings::<f32>(&slots),
            DType::F16 => self.embeddings::<f16>(&slots),
            DType::Bf16 => self.embeddings::<bf16>(&slots),
        };
        let mut pool = DevicePool::new(candidates).without_gradient();
        if self.options.ids {
            pool = pool.ids(self.slice(self.arrays[1], &slots, 1));
        }
        if self.options.log_q {
            pool = pool.log_q(self.slice(self.arrays[2], &slots, 1));
        }
        pool
    }

    fn embeddings<'a, T: DeviceElement + 'a>(&'a self, slots: &Range<usize>) -> DeviceEmbeddings<'a> {
        let dim = self.options.dim;
        DeviceEmbeddings::new(self.slice::<T>(self.arrays[0], slots, dim), slots.len(), dim)
    }

    /// `width` elements for each slot.
    fn slice<T>(&self, part: Part, slots: &Range<usize>, width: usize) -> DeviceSlice<'_, T> {
        let address = self.arena.address(part) + (slots.start * width * size_of::<T>()) as u64;
        // SAFETY: slots are below the capacity, for which the part was laid out, and were filled when it was made. The view
        // borrows the queue, so that neither `enqueue` nor `drop` comes before the last use of it is submitted: the former
        // writes behind that in the stream, the latter's cuMemFree waits for the device.
        unsafe { DeviceSlice::from_raw_on(address, slots.len() * width, self.arena.ordinal()) }
    }

    /// Submits copies of a pool's rows, with its ids and log_q where the queue keeps them, over the oldest ones; as
    /// [`NegativeQueue::enqueue`], which says what is not looked at. Does not wait. What is copied must stay as it is until the stream has come there. log_q
    /// that is not finite is found by the step that uses it ([`Cuda::fault`]).
    ///
    /// # Errors
    /// Shapes that disagree with the queue's or with each other, another element type or device, ids or log_q missing where
    /// the queue keeps them: the queue is then as it was. [`Error::Driver`](crate::Error::Driver)
    /// where the driver refuses: the queue is then empty.
    pub fn enqueue(&mut self, cuda: &Cuda, rows: &DevicePool<'_>) -> Result<()> {
        let ordinal = self.check_device(cuda)?;
        let (candidates, options) = (rows.candidates, self.options);
        let from = candidates.checked("candidates", ordinal)?;
        options.check_rows(candidates.dim(), candidates.dtype(), rows.ids.is_some(), rows.log_q.is_some())?;
        let (ids, log_q) = (rows.ids.filter(|_| options.ids), rows.log_q.filter(|_| options.log_q));
        let ids = ids.map_or(Ok(0), |ids| ids.checked("candidate_ids", from.rows, ordinal))?;
        let log_q = log_q.map_or(Ok(0), |log_q| log_q.checked("log_q", from.rows, ordinal))?;
        cuda.driver.bind()?;
        let sources =
            [(from.address, from.stride * options.dtype.size()), (ids, size_of::<u64>()), (log_q, size_of::<f32>())];
        let submitted = self.ring.push(from.rows).into_iter().filter(|rows| rows.rows > 0).try_for_each(|rows| {
            let arrays = self.arrays.iter().zip(options.row_bytes()).zip(sources).filter(|((_, bytes), _)| *bytes > 0);
            arrays.into_iter().try_for_each(|((&part, row_bytes), (from, stride))| {
                let to = self.arena.address(part) + (rows.to * row_bytes) as u64;
                cuda.driver.copy_rows(to, from + (rows.from * stride) as u64, rows.rows, row_bytes, stride)
            })
        });
        if submitted.is_err() {
            // Some rows are there and some are not.
            self.ring.clear();
        }
        submitted
    }

    fn check_device(&self, cuda: &Cuda) -> Result<usize> {
        let (ordinal, found) = (self.arena.ordinal(), cuda.driver.context.ordinal());
        if ordinal == found {
            return Ok(ordinal);
        }
        Err(value("the device of the backend", format!("cuda:{found}"), "the device that the queue was made on"))
    }
}
