//! The problem that one call solves: what it is given, what it asks for, and what it returns.
//!
//! ```text
//! embeddings.rs                matrices of embeddings, borrowed and owned
//! pages.rs                     huge pages for large matrices
//! arrays.rs                    ids, indices, offsets, and the rules about their lengths
//! shape.rs                     the rules about shapes, for host and device memory alike
//! pool.rs, table.rs            candidates: matrices of their own, or rows of a table; negatives of a row's own
//! positives.rs                 each row's positives: where they are, and which row has which
//! score_matrix.rs              which scores there are: queries against candidates, less what rows exclude
//! batch.rs, batch_builder.rs   a score matrix with each row's positives and weight: what a loss takes
//! search.rs                    a score matrix alone: what a search takes, and its lists
//! hardest.rs                   the search among a batch's negatives
//! loss.rs, filter.rs           the options of a loss
//! epilogue.rs                  from a row's statistics to its loss
//! statistics.rs                what a call asks for, and each row's statistics with their one merge
//! merge.rs                     statistics of several sets of candidates as those of all
//! output.rs, plan.rs           losses and gradients; tiles and bytes
//! ```
//!
//! Scores are computed in [`crate::backend`].

pub(crate) mod arrays;
pub(crate) mod batch;
pub(crate) mod batch_builder;
pub(crate) mod embeddings;
pub(crate) mod epilogue;
pub(crate) mod filter;
pub(crate) mod hardest;
pub(crate) mod loss;
pub(crate) mod merge;
pub(crate) mod output;
pub(crate) mod pages;
pub(crate) mod plan;
pub(crate) mod pool;
pub(crate) mod positives;
pub(crate) mod score_matrix;
pub(crate) mod search;
pub(crate) mod shape;
pub(crate) mod statistics;
pub(crate) mod table;
