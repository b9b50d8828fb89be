//! How a problem is cut into tiles and splits, and what memory that takes: a pure function of the problem's size.

/// Tiles, splits and workspace of a step. Made before anything is allocated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Plan {
    /// Queries per tile.
    pub block_b: usize,
    /// Candidates per tile.
    pub block_n: usize,
    /// Parts into which each pool's candidates are cut; their partial statistics are merged in order.
    pub splits: usize,
    /// Bytes that the backend allocates. On the CPU beside inputs and outputs, and independent of N; on a CUDA device up to
    /// some 50 bytes for each candidate, and from host slices inputs and outputs as well.
    pub workspace_bytes: usize,
}
