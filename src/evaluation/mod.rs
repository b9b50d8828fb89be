//! How good a model is: metrics of retrieval, and how embeddings lie on the sphere.
//!
//! [`Ranking`] holds the place of each relevant item and gives Recall@K, NDCG@K, MRR and others. It is made from the exact
//! ranks that a loss's pass returns ([`Request::with_rank`](crate::Request::with_rank)) or from the lists of a
//! [`Search`](crate::Search). [`Recommended`] counts which items are recommended at all. [`alignment`] and
//! [`uniformity`] describe the embeddings themselves.
//!
//! Equal scores are put in the order that is worst for the metric, so that a model that gives every item the same score
//! does not look good (McSherry and Najork, "Computing Information Retrieval Performance Measures Efficiently in the
//! Presence of Tied Scores", ECIR 2008, on what ties do).
//!
//! ```
//! use catalog_softmax::evaluation::{Ranking, Recommended};
//! use catalog_softmax::{Backend, Cpu, Embeddings, Search, Similarity};
//! let users = [1.0f32, 0.0, 0.0, 1.0];
//! let items = [0.9f32, 0.1, 0.5, 0.5, 0.1, 0.8];
//! let search = Search::builder(Embeddings::new(&users, 2, 2), Embeddings::new(&items, 3, 2)).build()?;
//! let top = Cpu::new().top_k(&search, Similarity::Dot, 2)?;
//!
//! // Relevant are item 0 to the first user, items 0 and 1 to the second.
//! let ranking = Ranking::in_lists(&top, &[0, 1, 3], &[0, 0, 1])?;
//! assert_eq!(ranking.recall_at(2)?, (1.0 + 0.5) / 2.0);
//! // The lists do not show what is in third place.
//! assert!(ranking.recall_at(3).is_err());
//! assert_eq!(ranking.mrr(), (1.0 + 0.5) / 2.0);
//!
//! let mut recommended = Recommended::new(3)?;
//! recommended.add(&top)?;
//! assert_eq!(recommended.coverage(), 1.0);
//! assert_eq!(recommended.mean_popularity(&[8.0, 2.0, 4.0])?, (8.0 + 2.0 + 4.0 + 2.0) / 4.0);
//! # Ok::<(), catalog_softmax::Error>(())
//! ```

mod geometry;
mod metrics;

pub use geometry::{alignment, uniformity};
pub use metrics::{Ranking, Recommended};
