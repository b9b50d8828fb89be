//! How a problem is cut into tiles and splits, and what memory that takes: a pure function of the problem's size.

/// Tiles, splits and workspace of a step. Made before anything is allocated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Plan {
    /// Queries per tile.
    pub block_b: usize,
    /// Candidates per tile.
    pub block_n: usize,
    /// Parts into which the candidates of all pools are cut; their partial statistics are merged in order.
    pub splits: usize,
    /// An upper bound of the bytes that a step allocates.
    ///
    /// On the CPU it counts what a step needs beside inputs and outputs. It does not grow with N. It grows with the number of
    /// threads, because each has buffers. On a CUDA device it grows by up to 50 bytes for each candidate, and a step from host slices also counts
    /// inputs and outputs.
    pub workspace_bytes: usize,
}
