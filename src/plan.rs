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
    /// Bytes that the backend allocates beside inputs and outputs. Independent of N.
    pub workspace_bytes: usize,
}
