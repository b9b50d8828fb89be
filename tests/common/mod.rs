//! What tests share: owned problems, generators, and the honest baseline whose error sets the tolerance.
#![allow(dead_code, missing_docs, unused_imports, unused_macros)]

pub mod generate;
pub mod naive;
pub mod problem;
pub mod suite;
pub mod tolerance;
