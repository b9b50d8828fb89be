//! The properties of every backend, held by the CPU's.

mod common;

use catalog_softmax::{Backend, Cpu, DType};

fn cpu() -> Option<Box<dyn Backend<Real = f32>>> {
    Some(Box::new(Cpu::new()))
}

common::suite::property_suite!(cpu(), |_| DType::F32);
