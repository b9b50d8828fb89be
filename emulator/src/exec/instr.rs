//! Decoded instructions: operands are row numbers of the warp's register file.
//!
//! Every operand is a row: immediates and constant special registers (%tid.x, ...) get rows that are filled once
//! when a warp starts, so the interpreter never asks what kind an operand is.
use super::decode::Address;

/// A row of the register file: 32 lanes x 32 bits. 64-bit values take this row and the next (as `[u64; 32]`, so
/// that lane i is element i), 128-bit values four rows (as `[u128; 32]`). 16-bit values are zero-extended.
pub type Row = u32;

/// Predicate register number * 2, plus 1 when negated. Number 0 is always true (and the sink `_`), 1 is the carry.
pub type Pred = u32;
pub const ALWAYS: Pred = 0;
pub const CARRY: Pred = 2;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ty {
    U8,
    S8,
    U16,
    S16,
    U32,
    S32,
    U64,
    S64,
    B128,
    F16,
    F16x2,
    BF16,
    BF16x2,
    F32,
    F64,
    Tf32,
    E4m3x2,
    E5m2x2,
    F32x2,
    Pred,
}

impl Ty {
    /// Untyped bits count as unsigned.
    pub fn parse(name: &str) -> Option<Ty> {
        Some(match name {
            "b8" | "u8" => Ty::U8,
            "s8" => Ty::S8,
            "b16" | "u16" => Ty::U16,
            "s16" => Ty::S16,
            "b32" | "u32" => Ty::U32,
            "s32" => Ty::S32,
            "b64" | "u64" => Ty::U64,
            "s64" => Ty::S64,
            "b128" => Ty::B128,
            "f16" => Ty::F16,
            "f16x2" => Ty::F16x2,
            "bf16" => Ty::BF16,
            "bf16x2" => Ty::BF16x2,
            "f32" => Ty::F32,
            "f64" => Ty::F64,
            "tf32" => Ty::Tf32,
            "e4m3x2" => Ty::E4m3x2,
            "e5m2x2" => Ty::E5m2x2,
            "f32x2" => Ty::F32x2,
            "pred" => Ty::Pred,
            _ => return None,
        })
    }

    pub fn bits(self) -> u32 {
        match self {
            Ty::U8 | Ty::S8 => 8,
            Ty::U16 | Ty::S16 | Ty::F16 | Ty::BF16 | Ty::E4m3x2 | Ty::E5m2x2 => 16,
            Ty::U32 | Ty::S32 | Ty::F16x2 | Ty::BF16x2 | Ty::F32 | Ty::Tf32 => 32,
            Ty::U64 | Ty::S64 | Ty::F64 | Ty::F32x2 => 64,
            Ty::B128 => 128,
            Ty::Pred => 1,
        }
    }

    pub fn is_float(self) -> bool {
        matches!(self, Ty::F16 | Ty::F16x2 | Ty::BF16 | Ty::BF16x2 | Ty::F32 | Ty::F64 | Ty::Tf32)
    }

    pub fn is_signed(self) -> bool {
        matches!(self, Ty::S8 | Ty::S16 | Ty::S32 | Ty::S64)
    }
}

/// Bits of `flags`.
pub mod flag {
    pub const FTZ: u16 = 1;
    pub const SAT: u16 = 2;
    /// min/max give NaN when an operand is NaN.
    pub const NAN: u16 = 4;
    pub const RELU: u16 = 8;
    pub const XORSIGN_ABS: u16 = 16;
    /// Rounding in bits 5 and 6: nearest even, to zero, down, up.
    pub const RN: u16 = 0;
    pub const RZ: u16 = 1 << 5;
    pub const RM: u16 = 2 << 5;
    pub const RP: u16 = 3 << 5;
    pub const ROUND: u16 = 3 << 5;
    /// Round to nearest, ties away (cvt to tf32).
    pub const RNA: u16 = 1 << 7;
    /// cvt between floats of the same type that rounds to an integral value.
    pub const INTEGRAL: u16 = 1 << 8;
    /// shf: clamp instead of wrap.
    pub const CLAMP: u16 = 1 << 9;
    pub const SATFINITE: u16 = 1 << 10;
    /// fma.oob and the like are not supported; this marks approximations (division).
    pub const APPROX: u16 = 1 << 11;
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AluOp {
    Add,
    Sub,
    /// Low half for integers.
    Mul,
    MulHi,
    MulWide,
    /// fma for floats.
    Mad,
    MadHi,
    MadWide,
    Mul24,
    Mad24,
    Div,
    Rem,
    Abs,
    Neg,
    Min,
    Max,
    /// Three inputs.
    Min3,
    Max3,
    And,
    Or,
    Xor,
    Not,
    Cnot,
    Shl,
    Shr,
    Sad,
    Popc,
    Clz,
    Brev,
    Bfind,
    BfindShift,
    Bfe,
    /// d = a with the bit field (position and length packed in `c`'s row as pos | len << 8) ...
    Bfi,
    Lop3,
    ShfL,
    ShfR,
    Prmt,
    Dp4a,
    Rcp,
    Sqrt,
    Rsqrt,
    Sin,
    Cos,
    Lg2,
    Ex2,
    Tanh,
    Copysign,
    Fns,
    Szext,
}

/// An operation on lanes with up to three sources.
#[derive(Clone, Copy, Debug)]
pub struct Alu {
    pub op: AluOp,
    pub ty: Ty,
    pub flags: u16,
    /// lop3's table, prmt's mode, dp4a's signs, bfi's fourth row.
    pub imm: u32,
    pub d: Row,
    pub a: Row,
    pub b: Row,
    pub c: Row,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cmp {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    /// True also for NaN operands.
    Equ,
    Neu,
    Ltu,
    Leu,
    Gtu,
    Geu,
    /// Neither is NaN; either is.
    Num,
    Nan,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Logic {
    And,
    Or,
    Xor,
    /// The first operand alone.
    First,
}

#[derive(Clone, Copy, Debug)]
pub struct Compare {
    pub cmp: Cmp,
    pub ty: Ty,
    pub flags: u16,
    pub a: Row,
    pub b: Row,
    pub logic: Logic,
    pub c: Pred,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Where {
    Generic,
    Global,
    Shared,
    Local,
    /// Parameters of the kernel.
    Param,
}

/// What a memory instruction orders beside its own access.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Order {
    /// An ordinary access.
    Weak,
    /// Of what nobody writes: the kernel's parameters.
    Constant,
    /// Atomic, or volatile; it orders something only together with a fence.
    Relaxed,
    Acquire,
    Release,
    AcquireRelease,
}

impl Order {
    /// Whether threads may meet there at the same time.
    pub fn is_strong(self) -> bool {
        !matches!(self, Order::Weak | Order::Constant)
    }

    pub fn acquires(self) -> bool {
        matches!(self, Order::Acquire | Order::AcquireRelease)
    }

    pub fn releases(self) -> bool {
        matches!(self, Order::Release | Order::AcquireRelease)
    }
}

/// A load or store.
pub struct Access {
    pub place: Where,
    pub order: Order,
    /// Bytes of one element.
    pub width: u32,
    pub signed: bool,
    /// Bits of each data register.
    pub reg_bits: u32,
    pub data: Vec<Row>,
    pub address: Address,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AtomOp {
    Add,
    And,
    Or,
    Xor,
    Exch,
    Cas,
    Min,
    Max,
    Inc,
    Dec,
}

pub struct Atom {
    pub place: Where,
    pub order: Order,
    pub op: AtomOp,
    pub ty: Ty,
    pub ftz: bool,
    /// Empty for red.
    pub dst: Vec<Row>,
    pub src: Vec<Row>,
    /// cas
    pub new: Row,
    pub address: Address,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ShflMode {
    Up,
    Down,
    Bfly,
    Idx,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum VoteMode {
    All,
    Any,
    Uni,
    Ballot,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BarKind {
    Sync,
    Arrive,
    RedPopc,
    RedAnd,
    RedOr,
}

pub struct Bar {
    pub kind: BarKind,
    pub id: Row,
    /// None: all threads of the CTA.
    pub count: Option<Row>,
    /// Input of a reduction, its destination (a row for popc, else a predicate).
    pub input: Pred,
    pub output: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MmaType {
    F16,
    Bf16,
    Tf32,
    S8,
    U8,
    E4m3,
    E5m2,
    F64,
}

pub struct Mma {
    pub k: u32,
    pub a_type: MmaType,
    pub b_type: MmaType,
    /// F32, F16, S32 or F64.
    pub acc: Ty,
    pub saturate: bool,
    pub d: Vec<Row>,
    pub a: Vec<Row>,
    pub b: Vec<Row>,
    pub c: Vec<Row>,
}

pub struct MatrixMove {
    pub trans: bool,
    pub data: Vec<Row>,
    pub address: Address,
}

pub struct CpAsync {
    pub bytes: u32,
    /// Row of the number of bytes to read; the rest is zero.
    pub source_bytes: Option<Row>,
    /// Lanes in which the source is ignored (all zero).
    pub ignore: Option<Pred>,
    pub dst: Address,
    pub src: Address,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ClockKind {
    Low,
    High,
    Full,
    Nanoseconds,
    NanosecondsLow,
    NanosecondsHigh,
}

/// What `mov` from a symbol or a space conversion does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Window {
    Shared,
    Local,
    Global,
}

pub enum Op {
    Alu(Alu),
    Mov32 {
        d: Row,
        a: Row,
    },
    Mov64 {
        d: Row,
        a: Row,
    },
    Mov128 {
        d: Row,
        a: Row,
    },
    /// Parts (low first) of `bits` bits each to or from one register.
    Pack {
        d: Row,
        parts: Box<[Row]>,
        bits: u32,
    },
    Unpack {
        a: Row,
        parts: Box<[Row]>,
        bits: u32,
    },
    Cvt {
        d: Row,
        a: Row,
        from: Ty,
        to: Ty,
        flags: u16,
    },
    /// Two floats (a to the high half) to one packed register.
    CvtPack {
        d: Row,
        a: Row,
        b: Row,
        to: Ty,
        flags: u16,
    },
    Setp {
        how: Compare,
        d: Pred,
        d2: Pred,
    },
    /// `set`: `one` where the comparison holds (in each half for packed types), else zero.
    Set {
        how: Compare,
        d: Row,
        one: u32,
    },
    Selp {
        bits: u32,
        d: Row,
        a: Row,
        b: Row,
        p: Pred,
    },
    /// d = c >= 0 ? a : b
    Slct {
        bits: u32,
        d: Row,
        a: Row,
        b: Row,
        c: Row,
        float: bool,
    },
    PredLogic {
        logic: Logic,
        d: Pred,
        a: Pred,
        b: Pred,
    },
    Testp {
        d: Pred,
        a: Row,
        ty: Ty,
        what: u8,
    },
    /// Add or subtract or multiply-add with the carry.
    Carry {
        sub: bool,
        ty: Ty,
        carry_in: bool,
        carry_out: bool,
        d: Row,
        a: Row,
        b: Row,
    },
    MadCarry {
        high: bool,
        ty: Ty,
        carry_in: bool,
        carry_out: bool,
        d: Row,
        a: Row,
        b: Row,
        c: Row,
    },
    Ld(Box<Access>),
    St(Box<Access>),
    Atom(Box<Atom>),
    /// Generic to or from a window; both registers 64-bit.
    Cvta {
        window: Window,
        to_generic: bool,
        d: Row,
        a: Row,
        wide: bool,
    },
    Isspacep {
        window: Window,
        d: Pred,
        a: Row,
    },
    Bra {
        target: u32,
    },
    Brx {
        index: Row,
        targets: Box<[u32]>,
    },
    Exit,
    Trap,
    Nop,
    /// `wide`: it orders for other CTAs, too.
    Fence {
        wide: bool,
    },
    Clock {
        d: Row,
        kind: ClockKind,
    },
    Bar(Box<Bar>),
    WarpSync {
        members: Row,
    },
    Vote {
        mode: VoteMode,
        d: u32,
        p: Pred,
        members: Row,
    },
    Match {
        all: bool,
        wide: bool,
        d: Row,
        p: Pred,
        a: Row,
        members: Row,
    },
    Redux {
        op: AtomOp,
        ty: Ty,
        d: Row,
        a: Row,
        members: Row,
    },
    Shfl {
        mode: ShflMode,
        d: Row,
        p: Pred,
        a: Row,
        b: Row,
        c: Row,
        members: Row,
    },
    ActiveMask {
        d: Row,
    },
    Elect {
        d: Row,
        p: Pred,
        members: Row,
    },
    Mma(Box<Mma>),
    LdMatrix(Box<MatrixMove>),
    StMatrix(Box<MatrixMove>),
    MovMatrix {
        d: Row,
        a: Row,
    },
    CpAsync(Box<CpAsync>),
    CpAsyncCommit,
    /// All but the last `keep` groups; None: everything, committed or not.
    CpAsyncWait {
        keep: Option<u32>,
    },
    /// Format string and arguments lie in local memory at these offsets (as pointers).
    Printf {
        format: u32,
        arguments: u32,
        result: Option<u32>,
    },
    /// Local offsets of the parameters of __assertfail.
    AssertFail {
        parameters: Box<[u32]>,
    },
    /// Everything that `exec::hopper` decodes and executes.
    Hopper(Box<super::hopper::Instr>),
}

pub struct Inst {
    pub op: Op,
    pub guard: Pred,
    /// Line in the PTX text.
    pub line: u32,
}

/// What a constant row holds.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Fill {
    Bits32(u32),
    Bits64(u64),
    Special(Special),
}

/// Special registers that do not change while a warp runs; `u8` is the axis.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Special {
    Tid(u8),
    Ntid(u8),
    Ctaid(u8),
    Nctaid(u8),
    LaneId,
    WarpId,
    NwarpId,
    SmId,
    NsmId,
    GridId,
    MaskEq,
    MaskLe,
    MaskLt,
    MaskGe,
    MaskGt,
    ClusterId(u8),
    NclusterId(u8),
    ClusterCtaid(u8),
    ClusterNctaid(u8),
    ClusterRank,
    ClusterSize,
    DynamicShared,
    TotalShared,
    ParamBase,
}

/// A kernel ready to run.
pub struct Program {
    pub name: String,
    pub code: Vec<Inst>,
    /// Size of the register file.
    pub rows: usize,
    pub preds: usize,
    /// Rows that are filled when a warp starts.
    pub constants: Vec<(Row, Fill)>,
    pub local_bytes: usize,
    pub static_shared: u32,
    pub param_bytes: usize,
    pub max_threads: Option<[u32; 3]>,
    pub exact_threads: bool,
    pub cluster: Option<[u32; 3]>,
}
