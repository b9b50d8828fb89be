//! A queue of past candidates in device memory.

use std::ops::Range;

use half::{bf16, f16};

use super::Cuda;
use super::device_search::{DeviceCandidates, DevicePool};
use super::driver::{Driver, Grid};
use super::kernels::{ENQUEUE_ROWS, Variant};
use super::memory::{Arena, Layout, Part};
use super::params::EnqueueParams;
use super::problem::Rows;
use super::uses::Uses;
use super::view::{DeviceElement, DeviceEmbeddings, DeviceSlice};
use crate::error::{Result, does_not_apply};
use crate::negatives::queue::ring::{CopiedRows, Ring};
use crate::negatives::queue::{NegativeQueue, QueueOptions};
use crate::problem::embeddings::DType;

/// The last candidates of past steps, in device memory. [`NegativeQueue`] is the same in host memory; its documentation
/// says what a queue is for, and why to enqueue after the loss.
///
/// A queue allocates its memory when it is made. The memory belongs to the stream of the backend that the queue is made
/// with, as a cudarc slice belongs to its stream, and is freed in the order of that stream.
/// [`enqueue`](DeviceQueue::enqueue) launches one or two kernels that copy. It does not wait for them and allocates
/// nothing. Other backends of the same context may use the queue, too; their streams and the queue's then wait for each
/// other, as [`DeviceSlice`] says.
///
/// A full queue is one pool, at the same address in every step, so a captured step ([`Cuda::capture`]) stays valid. An
/// enqueue cannot be replayed, since each one writes other rows. Before the queue is full, its pools grow from step to
/// step, and so does the memory of a step: reserve it with [`whole`](DeviceQueue::whole).
///
/// ```no_run
/// use catalog_softmax::cuda::{Cuda, DeviceBatch, DevicePool, DeviceQueue};
/// # use catalog_softmax::cuda::{DeviceEmbeddings, DeviceOutput, DeviceSlice};
/// use catalog_softmax::negatives::QueueOptions;
/// use catalog_softmax::{DType, Loss, Request, Similarity};
/// # fn training(
/// #     own: DevicePool<'_>, queries: DeviceEmbeddings<'_>, positives: DeviceSlice<'_, u32>, mut output: DeviceOutput<'_>,
/// # ) -> Result<(), catalog_softmax::Error> {
/// let mut cuda = Cuda::new(0)?;
/// let mut queue = DeviceQueue::new(&cuda, QueueOptions::new(65_536, 128, DType::Bf16).with_ids())?;
/// // `own` has the batch's candidates with their ids. Reserve once what a step with a full queue needs:
/// let loss = Loss::softmax(Similarity::Cosine, 0.05);
/// let largest = DeviceBatch::new(queries, own).positives(positives).pool(queue.whole());
/// cuda.reserve(&largest, &loss, Request::value_and_grad())?;
/// for _step in 0..1000 {
///     let batch = DeviceBatch::new(queries, own).positives(positives).pools(queue.pools());
///     cuda.compute_on_device(&batch, &loss, &mut output)?;
///     queue.enqueue(&cuda, &own)?;
/// }
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct DeviceQueue {
    driver: Driver,
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
        let driver = cuda.driver.clone();
        driver.bind()?;
        let mut arena = Arena::default();
        arena.reserve(&driver, layout)?;
        // Views of `whole` are of initialised elements.
        driver.fill(arena.address(arrays[0]), 0, layout.bytes())?;
        Ok(DeviceQueue { driver, options, ring, arena, arrays })
    }

    /// A queue with the options, rows and ages of one in host memory, such as one [from bytes](NegativeQueue::from_bytes).
    ///
    /// # Errors
    /// As [`new`](DeviceQueue::new).
    pub fn from_host(cuda: &Cuda, host: &NegativeQueue) -> Result<Self> {
        let _settled = cuda.driver.settled()?;
        let queue = Self::with_ring(cuda, host.options, host.ring.clone())?;
        for ((&part, row_bytes), bytes) in queue.arrays.iter().zip(queue.options.row_bytes()).zip(host.arrays()) {
            for slots in queue.ring.live().into_iter().filter(|slots| row_bytes > 0 && !slots.is_empty()) {
                let (start, end) = (slots.start * row_bytes, slots.end * row_bytes);
                cuda.driver.upload(queue.arena.address(part) + start as u64, &bytes[start..end])?;
            }
        }
        Ok(queue)
    }

    /// The same queue in host memory, to look at or to [keep as bytes](NegativeQueue::to_bytes). Waits for the queue's
    /// stream.
    ///
    /// # Errors
    /// If the host has too little memory for the queue; [`Error::Driver`](crate::Error::Driver) where the device
    /// failed.
    pub fn to_host(&self) -> Result<NegativeQueue> {
        self.driver.bind()?;
        let mut host = NegativeQueue::with_ring(self.options, self.ring.clone())?;
        for ((&part, row_bytes), bytes) in self.arrays.iter().zip(self.options.row_bytes()).zip(host.arrays_mut()) {
            for slots in self.ring.live().into_iter().filter(|slots| row_bytes > 0 && !slots.is_empty()) {
                let (start, end) = (slots.start * row_bytes, slots.end * row_bytes);
                self.driver.download(&mut bytes[start..end], self.arena.address(part) + start as u64)?;
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

    /// The rows as no, one or two pools without gradient, as in [`NegativeQueue::pools`].
    pub fn pools(&self) -> impl Iterator<Item = DevicePool<'_>> {
        self.ring.live().into_iter().filter(|slots| !slots.is_empty()).map(|slots| self.pool(slots))
    }

    /// Ids of the rows in host memory, in the order of [`pools`](DeviceQueue::pools). Empty if the queue keeps no ids.
    /// To give the pools a log_q, compute it from these ids by a
    /// [`FrequencyEstimator`](crate::negatives::FrequencyEstimator) and copy it to the device. Waits for the queue's
    /// stream.
    ///
    /// # Errors
    /// [`Error::Driver`](crate::Error::Driver) where the device failed.
    pub fn ids_to_host(&self) -> Result<Vec<u64>> {
        self.driver.bind()?;
        let mut ids = Vec::new();
        for slots in self.ring.live().into_iter().filter(|slots| self.options.ids && !slots.is_empty()) {
            let (start, from) = (ids.len(), self.arena.address(self.arrays[1]));
            ids.resize(start + slots.len(), 0u64);
            let address = from + (slots.start * size_of::<u64>()) as u64;
            self.driver.download(bytemuck::cast_slice_mut(&mut ids[start..]), address)?;
        }
        Ok(ids)
    }

    /// All of the queue's memory as one pool, with zeros where no row has been yet. Use it to plan and reserve a step
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
        // SAFETY: slots are below the capacity, for which the part was laid out, and were filled when it was made. The
        // view borrows the queue, so that its memory is neither written nor freed before the last use of the view is
        // queued; both come after that in the order of the queue's stream.
        unsafe { DeviceSlice::owned(address, slots.len() * width, self.driver.stream()) }
    }

    /// Queues a copy of a pool's rows over the oldest ones, with their ids and log_q if the queue keeps these.
    /// [`NegativeQueue::enqueue`] says what is ignored and what is not checked. Returns before the device has done the
    /// copy; other streams are ordered with it as [`DeviceSlice`] says. A log_q that is not finite is reported by the
    /// step that uses it ([`Cuda::fault`]).
    ///
    /// # Errors
    /// Shapes that disagree with the queue's or with each other, another element type or device, ids or log_q missing where
    /// the queue keeps them: the queue is then as it was. [`Error::Driver`](crate::Error::Driver)
    /// where the driver refuses: the queue is then empty.
    pub fn enqueue(&mut self, cuda: &Cuda, rows: &DevicePool<'_>) -> Result<()> {
        let DeviceCandidates::Embeddings(candidates) = rows.candidates else {
            return Err(does_not_apply("candidates", "a queue holds copies: enqueue embeddings, not rows of a table"));
        };
        let options = self.options;
        let mut uses = Uses::new(&cuda.driver)?;
        uses.admit("the queue", self.driver.stream())?;
        candidates.check("candidates")?;
        let from = candidates.address("candidates", &mut uses)?;
        options.check_rows(candidates.dim(), candidates.dtype(), rows.ids.is_some(), rows.log_q.is_some())?;
        let (ids, log_q) = (rows.ids.filter(|_| options.ids), rows.log_q.filter(|_| options.log_q));
        let ids = ids.map_or(Ok(0), |ids| ids.checked("candidate_ids", from.rows, &mut uses))?;
        let log_q = log_q.map_or(Ok(0), |log_q| log_q.checked("log_q", from.rows, &mut uses))?;
        uses.start()?;
        let copies = self.ring.push(from.rows).into_iter().filter(|copy| copy.rows > 0);
        let submitted = copies.map(|copy| self.copy(from, [ids, log_q], copy)).try_for_each(|params| {
            cuda.driver.launch(ENQUEUE_ROWS, Variant::ONLY, Grid::warps(params.rows as usize), &params)
        });
        let queued = uses.finish(submitted);
        if queued.is_err() {
            // Some rows are there and some are not.
            self.ring.clear();
        }
        queued
    }

    /// The kernel's arguments of one copy.
    fn copy(&self, from: Rows, [ids, log_q]: [u64; 2], copy: CopiedRows) -> EnqueueParams {
        let [row_bytes, _, _] = self.options.row_bytes();
        let stride = from.stride * self.options.dtype.size();
        let source = |array: u64, bytes: usize| if array == 0 { 0 } else { array + (copy.from * bytes) as u64 };
        let place = |array: usize, bytes: usize| match self.arena.address(self.arrays[array]) {
            0 => 0,
            address => address + (copy.to * bytes) as u64,
        };
        let (from, to) = (source(from.address, stride), place(0, row_bytes));
        let (stride, row_bytes) = (stride as u64, row_bytes as u64);
        let divides = |unit: &u64| (from | to | stride | row_bytes).is_multiple_of(*unit);
        EnqueueParams {
            from,
            to,
            ids: source(ids, size_of::<u64>()),
            to_ids: place(1, size_of::<u64>()),
            log_q: source(log_q, size_of::<f32>()),
            to_log_q: place(2, size_of::<f32>()),
            rows: copy.rows as u64,
            stride,
            row_bytes,
            unit: [16, 4].into_iter().find(divides).unwrap_or(2),
        }
    }
}
