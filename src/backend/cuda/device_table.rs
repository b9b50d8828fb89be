//! A table in the caller's device memory, and what names rows of it.

use super::view::{DeviceEmbeddings, DeviceSlice, DeviceSliceMut};

/// All items' embeddings in device memory, as [`Table`](crate::Table) in host memory.
#[derive(Debug, Clone, Copy)]
#[must_use]
pub struct DeviceTable<'a> {
    pub(super) embeddings: DeviceEmbeddings<'a>,
    pub(super) ids: Option<DeviceSlice<'a, u64>>,
    pub(super) gradient: bool,
}

impl<'a> DeviceTable<'a> {
    /// (M, D), whose items are identified by their rows, and that receives a gradient.
    pub fn new(embeddings: DeviceEmbeddings<'a>) -> Self {
        DeviceTable { embeddings, ids: None, gradient: true }
    }

    /// (M): ids of the items, where an item is not its row.
    pub fn ids(mut self, ids: DeviceSlice<'a, u64>) -> Self {
        self.ids = Some(ids);
        self
    }

    /// The table is constant: no gradient is computed for it.
    pub fn without_gradient(mut self) -> Self {
        self.gradient = false;
        self
    }
}

/// Negatives of each row's own in device memory, as [`RowNegatives`](crate::RowNegatives) in host memory.
#[derive(Debug, Clone, Copy)]
#[must_use]
pub struct DeviceRowNegatives<'a> {
    pub(super) rows: DeviceSlice<'a, u32>,
    pub(super) per_row: usize,
    pub(super) log_q: Option<DeviceSlice<'a, f32>>,
}

impl<'a> DeviceRowNegatives<'a> {
    /// `rows` (B, K), one query's K after the other's; `per_row` is K. [`RowNegatives::NONE`](crate::RowNegatives::NONE)
    /// stands for no negative.
    pub fn new(rows: DeviceSlice<'a, u32>, per_row: usize) -> Self {
        DeviceRowNegatives { rows, per_row, log_q: None }
    }

    /// (B, K): log of each draw's sampling probability.
    pub fn log_q(mut self, log_q: DeviceSlice<'a, f32>) -> Self {
        self.log_q = Some(log_q);
        self
    }
}

/// Where a step writes the gradient of a table.
#[derive(Debug)]
pub enum DeviceTableGradient<'a> {
    /// (M, D).
    Dense(DeviceSliceMut<'a, f32>),
    /// The rows that the batch names. There is room for U of them, which is the number of uses (candidates of pools by
    /// reference that have a gradient, negatives of rows' own, positives) or of the table's rows, if that is smaller. Where the
    /// whole table is a pool, it names every row, and U is the number of rows.
    RowSparse {
        /// (U): which rows, ascending. Those from `num_rows` on are not written.
        rows: DeviceSliceMut<'a, u32>,
        /// (U, D): their gradients.
        values: DeviceSliceMut<'a, f32>,
        /// (1): how many there are.
        num_rows: DeviceSliceMut<'a, u64>,
    },
}
