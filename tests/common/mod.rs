//! What tests share: owned problems, generators, and the honest baseline whose error sets the tolerance.
#![allow(dead_code, missing_docs, unused_imports, unused_macros)]

pub mod bits;
pub mod ends;
pub mod forge;
pub mod formulas;
pub mod generate;
pub mod golden;
pub mod golden_check;
pub mod golden_files;
pub mod gradient_bias;
pub mod naive;
#[cfg(feature = "cuda")]
pub mod on_device;
pub mod problem;
pub mod samplers;
pub mod scales;
pub mod statistics;
pub mod suite;
pub mod tolerance;
pub mod topk;
