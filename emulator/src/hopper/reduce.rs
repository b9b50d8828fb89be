//! The reductions of cp.reduce.async.bulk(.tensor): memory becomes memory OP source, element by element.
use super::numbers::*;
use super::tensor_map::ElementType;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    Add,
    Min,
    Max,
    Inc,
    Dec,
    And,
    Or,
    Xor,
}

impl Operation {
    pub fn from_name(name: &str) -> Option<Operation> {
        use Operation::*;
        Some(match name {
            "add" => Add,
            "min" => Min,
            "max" => Max,
            "inc" => Inc,
            "dec" => Dec,
            "and" => And,
            "or" => Or,
            "xor" => Xor,
            _ => return None,
        })
    }
}

/// The new value of one element, both operands as raw bits.
pub fn combine(op: Operation, kind: ElementType, old: u64, new: u64) -> Result<u64, String> {
    use ElementType::*;
    use Operation::*;
    let float = |a: f32, b: f32| -> Result<f32, String> {
        Ok(match op {
            Add => a + b,
            Min => a.min(b),
            Max => a.max(b),
            _ => return Err(format!("{op:?} is no reduction of {kind:?}")),
        })
    };
    let mask = if kind.bytes() == 8 { u64::MAX } else { (1 << (8 * kind.bytes())) - 1 };
    Ok(match kind {
        F16 => f32_to_f16(float(f16_to_f32(old as u16), f16_to_f32(new as u16))?) as u64,
        Bf16 => f32_to_bf16(float(bf16_to_f32(old as u16), bf16_to_f32(new as u16))?) as u64,
        F32 | F32Ftz | Tf32 | Tf32Ftz => {
            float(f32::from_bits(old as u32), f32::from_bits(new as u32))?.to_bits() as u64
        }
        F64 if op == Add => (f64::from_bits(old) + f64::from_bits(new)).to_bits(),
        F64 => return Err(format!("{op:?} is no reduction of F64")),
        _ => {
            let value = match (op, kind) {
                (Add, _) => old.wrapping_add(new),
                (And, _) => old & new,
                (Or, _) => old | new,
                (Xor, _) => old ^ new,
                (Min, S32) => (old as i32).min(new as i32) as u32 as u64,
                (Max, S32) => (old as i32).max(new as i32) as u32 as u64,
                (Min, S64) => (old as i64).min(new as i64) as u64,
                (Max, S64) => (old as i64).max(new as i64) as u64,
                (Min, _) => old.min(new),
                (Max, _) => old.max(new),
                (Inc, _) => {
                    if old >= new {
                        0
                    } else {
                        old + 1
                    }
                }
                (Dec, _) => {
                    if old == 0 || old > new {
                        new
                    } else {
                        old - 1
                    }
                }
            };
            value & mask
        }
    })
}

/// Applies the reduction to global memory atomically per element.
///
/// # Safety
/// `address` must be the host address of `source.len()` live bytes aligned to the element size.
pub unsafe fn apply(op: Operation, kind: ElementType, address: u64, source: &[u8]) -> Result<(), String> {
    macro_rules! each {
        ($atomic:ty, $word:ty) => {{
            const SIZE: usize = std::mem::size_of::<$word>();
            for (i, chunk) in source.chunks_exact(SIZE).enumerate() {
                let new = <$word>::from_le_bytes(chunk.try_into().unwrap()) as u64;
                // SAFETY: the caller's promise.
                let cell = unsafe { <$atomic>::from_ptr((address as usize + i * SIZE) as *mut $word) };
                let mut old = cell.load(Ordering::Relaxed);
                loop {
                    let next = combine(op, kind, old as u64, new)? as $word;
                    match cell.compare_exchange_weak(old, next, Ordering::AcqRel, Ordering::Relaxed) {
                        Ok(_) => break,
                        Err(seen) => old = seen,
                    }
                }
            }
        }};
    }
    match kind.bytes() {
        1 => each!(AtomicU8, u8),
        2 => each!(AtomicU16, u16),
        4 => each!(AtomicU32, u32),
        _ => each!(AtomicU64, u64),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reductions_act_by_element_type() {
        let pair = |x: f32, y: f32| (f32_to_bf16(x) as u64, f32_to_bf16(y) as u64);
        let (a, b) = pair(1.5, -2.0);
        assert_eq!(combine(Operation::Add, ElementType::Bf16, a, b).unwrap(), f32_to_bf16(-0.5) as u64);
        assert_eq!(combine(Operation::Max, ElementType::Bf16, a, b).unwrap(), a);
        assert_eq!(combine(Operation::Min, ElementType::S32, 0xffff_ffff, 1).unwrap(), 0xffff_ffff);
        assert_eq!(combine(Operation::Min, ElementType::U32, 0xffff_ffff, 1).unwrap(), 1);
        assert_eq!(combine(Operation::Add, ElementType::U8, 255, 2).unwrap(), 1);
        assert!(combine(Operation::Xor, ElementType::F32, 0, 0).is_err());
        let mut memory = [1.0f32, 2.0, 3.0];
        let source: Vec<u8> = [0.5f32, 0.25, -3.0].iter().flat_map(|v| v.to_le_bytes()).collect();
        // SAFETY: four floats of this test.
        unsafe { apply(Operation::Add, ElementType::F32, memory.as_mut_ptr() as u64, &source).unwrap() };
        assert_eq!(memory, [1.5, 2.25, 0.0]);
    }
}
