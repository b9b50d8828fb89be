//! The properties of every backend, held by the CPU's.

mod common;

use catalog_softmax::{Backend, Cpu, DType};
use common::suite::{test_each, with_properties};

fn cpu() -> Box<dyn Backend<Real = f32>> {
    Box::new(Cpu::new())
}

with_properties!(test_each!(cpu(), |_| DType::F32));
