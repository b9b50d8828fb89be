//! The matrix unit itself, by assembly: Rust has no stable functions for it.

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::ops::Range;

use super::{BLOCK, Product, Steps, TILE};

/// The processor's feature bits, and Linux's permission for the tiles' state, which a process must ask for
/// (Documentation/arch/x86/xstate.rst).
pub(super) fn usable() -> bool {
    const AMX_BF16: u32 = 1 << 22;
    const AMX_TILE: u32 = 1 << 24;
    const ARCH_REQ_XCOMP_PERM: libc::c_ulong = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_ulong = 18;
    #[allow(unused_unsafe, reason = "not unsafe in newer versions of Rust")]
    // SAFETY: every x86-64 processor has the instruction.
    let (leaves, features) = unsafe { (__cpuid_count(0, 0).eax, __cpuid_count(7, 0).edx) };
    if leaves < 7 || features & (AMX_BF16 | AMX_TILE) != AMX_BF16 | AMX_TILE {
        return false;
    }
    // SAFETY: the call takes two numbers and changes no memory.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

/// What `ldtilecfg` reads: all eight tiles have 16 rows of 64 bytes.
#[repr(C, align(64))]
struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static CONFIG: TileConfig = {
    let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
    let mut tile = 0;
    while tile < 8 {
        (row_bytes[tile], rows[tile]) = (4 * TILE as u16, TILE as u8);
        tile += 1;
    }
    TileConfig { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows }
};

/// Sets the shape of this thread's tiles. No function is compiled with the feature, so nothing uses or changes them but the
/// assembly below. The system keeps them when it switches threads.
///
/// # Safety
/// The process may use the unit.
pub(super) unsafe fn start() {
    // SAFETY: the caller's contract, and the configuration is as the unit wants it.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &CONFIG, options(nostack, readonly)) };
}

/// Tells the processor that the tiles hold nothing.
///
/// # Safety
/// The process may use the unit.
pub(super) unsafe fn stop() {
    // SAFETY: the caller's contract.
    unsafe { asm!("tilerelease", options(nomem, nostack)) };
}

/// # Safety
/// The thread has called [`start`], and all tiles lie within the operands.
pub(super) unsafe fn product(product: Product<'_>) {
    let Product { m, n, a, a_stride, b, b_panel, steps, to, to_stride, add } = product;
    for panel in 0..n / BLOCK {
        for row in (0..m).step_by(BLOCK) {
            // SAFETY: the caller's contract.
            unsafe {
                let a = a.as_ptr().add(row * a_stride);
                let b = b.as_ptr().add(panel * b_panel);
                let to = to.as_mut_ptr().add(row * to_stride + panel * BLOCK);
                block(a, a_stride, b, steps, to, to_stride, add);
            }
        }
    }
}

/// Two by two tiles of `to`, which stay in the unit's registers through all steps.
///
/// # Safety
/// The thread has called [`start`], and the tiles lie within the operands.
unsafe fn block(
    a: *const u32,
    a_stride: usize,
    b: *const u32,
    steps: &Steps,
    to: *mut f32,
    to_stride: usize,
    add: bool,
) {
    // The first step is compared with `Steps::NONE`, which lies before it.
    let Range { start, end } = steps.0.as_ptr_range();
    // SAFETY: the caller's contract. Strides are in bytes here, offsets of steps in words.
    unsafe {
        asm!(
            "test {add}, {add}",
            "jnz 2f",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "jmp 3f",
            "2:",
            "tileloadd tmm0, [{to} + {to_stride}]",
            "tileloadd tmm1, [{to} + {to_stride} + 64]",
            "tileloadd tmm2, [{to2} + {to_stride}]",
            "tileloadd tmm3, [{to2} + {to_stride} + 64]",
            "3:",
            "cmp {step}, {end}",
            "je 5f",
            "4:",
            "mov {tile}, [{step}]",
            "cmp {tile}, [{step} - 16]",
            "je 6f",
            "lea {tile}, [{a} + 4 * {tile}]",
            "tileloadd tmm4, [{tile} + {a_stride}]",
            "add {tile}, {a_half}",
            "tileloadd tmm5, [{tile} + {a_stride}]",
            "6:",
            "mov {tile}, [{step} + 8]",
            "cmp {tile}, [{step} - 8]",
            "je 7f",
            "lea {tile}, [{b} + 4 * {tile}]",
            "tileloadd tmm6, [{tile} + {b_stride}]",
            "tileloadd tmm7, [{tile} + {b_stride} + 64]",
            "7:",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {step}, 16",
            "cmp {step}, {end}",
            "jne 4b",
            "5:",
            "tilestored [{to} + {to_stride}], tmm0",
            "tilestored [{to} + {to_stride} + 64], tmm1",
            "tilestored [{to2} + {to_stride}], tmm2",
            "tilestored [{to2} + {to_stride} + 64], tmm3",
            a = in(reg) a,
            a_stride = in(reg) 4 * a_stride,
            a_half = in(reg) 4 * TILE * a_stride,
            b = in(reg) b,
            b_stride = in(reg) 4 * BLOCK,
            step = inout(reg) start.wrapping_add(1) => _,
            end = in(reg) end,
            to = in(reg) to,
            to_stride = in(reg) 4 * to_stride,
            to2 = in(reg) to.wrapping_add(TILE * to_stride),
            add = in(reg) usize::from(add),
            tile = out(reg) _,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        );
    }
}
