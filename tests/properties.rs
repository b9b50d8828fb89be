//! The properties of every backend, held by the CPU's.

use catalog_softmax::{Backend, Cpu, DType};
use catalog_softmax_testing::properties::lengths_do_not_matter;
use catalog_softmax_testing::properties::{test_each, with_properties, with_table_properties};

fn cpu() -> Box<dyn Backend<Real = f32>> {
    Box::new(Cpu::new())
}

with_properties!(test_each!(cpu(), |_| DType::F32));
with_table_properties!(test_each!(cpu(), |_| DType::F32));

/// The CUDA backend's rows end at 2^63.
#[test]
fn rows_as_long_as_f32_has_them_change_nothing_under_cosine() {
    for dtype in [DType::F32, DType::Bf16] {
        for longest in [2f32.powi(64), 2f32.powi(100), 2f32.powi(124)] {
            lengths_do_not_matter(&mut Cpu::new(), |_| DType::F32, dtype, longest);
        }
    }
}
