//! What tests, examples and benches share: problems in owned memory, generators, the golden batches and their judge, the properties of
//! every backend, and the honest baseline whose error sets the tolerance.
#![allow(missing_docs, clippy::new_without_default, clippy::len_without_is_empty)]

pub mod bits;
pub mod forge;
pub mod formulas;
pub mod generate;
pub mod generate_tables;
pub mod golden;
pub mod golden_check;
pub mod golden_files;
pub mod gradient_bias;
pub mod lowering;
pub mod naive;
#[cfg(feature = "cuda")]
pub mod on_device;
pub mod problem;
pub mod properties;
pub mod samplers;
pub mod scales;
pub mod seeded;
pub mod shards;
pub mod statistics;
pub mod step;
pub mod tolerance;
pub mod topk;
pub mod updates;
