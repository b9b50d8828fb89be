//! The one error type. Each variant names the argument, its value and the rule that it breaks.

use std::borrow::Cow;

/// Everything that can go wrong. Input is checked before anything runs, so an error leaves outputs untouched.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A shape, length, stride or offset that disagrees with another argument.
    #[error("{argument} has {found}; rule: {rule}")]
    Shape {
        /// The argument's name, as in the documentation of the method that takes it. Examples are `candidates`, or
        /// `pools[1].candidates` if there are several pools; `candidate_ids` for [`Pool::ids`](crate::Pool::ids);
        /// `exclude_offsets` and `exclude_ids` for [`excluded_ids`](crate::BatchBuilder::excluded_ids). Some errors
        /// describe the argument in words instead.
        argument: String,
        /// What was found, with its numbers.
        found: String,
        /// What would have been right, with its numbers.
        rule: String,
    },
    /// A value outside the range that the formulas allow.
    #[error("{argument} is {value}; rule: {rule}")]
    Value {
        /// The argument, named as in [`Error::Shape`], with the position of the first bad element where it is a slice.
        argument: String,
        /// The value as given.
        value: String,
        /// The values that are allowed, with their numbers.
        rule: String,
    },
    /// An argument that this combination of batch and loss needs.
    #[error("{argument} is missing; rule: {rule}")]
    Missing {
        /// The argument to give.
        argument: String,
        /// Why it is needed.
        rule: &'static str,
    },
    /// An argument that was given and that this combination of batch and loss would have to ignore.
    #[error("{argument} is given but does not apply; rule: {rule}")]
    DoesNotApply {
        /// The argument to leave out.
        argument: String,
        /// When it would apply.
        rule: &'static str,
    },
    /// A device that cannot be used, and why.
    #[error("device {device} cannot be used: {reason}")]
    DeviceUnavailable {
        /// The device as asked for, e.g. `cuda:0`.
        device: String,
        /// The reason.
        reason: Unavailable,
    },
    /// The device has too little memory for the step's plan. Before it returns this error, the backend waits for all
    /// work in its context, makes the device's memory pool return unused memory, and frees the workspace of earlier
    /// steps. Smaller steps still run.
    #[error("device memory is {free} bytes free; rule: {needed} bytes, as the plan says")]
    DeviceMemory {
        /// Bytes that the step needs.
        needed: usize,
        /// Bytes that the device has left.
        free: usize,
    },
    /// A call of the CUDA driver that failed during a step.
    #[error("the CUDA driver's {call} returned error {code}")]
    Driver {
        /// The driver's function.
        call: &'static str,
        /// Its `CUresult`.
        code: i32,
    },
    /// A [`Collective`](crate::sharded::Collective) that failed. It fails on all ranks.
    #[error("{collective} failed on rank {rank}: {reason}")]
    Collective {
        /// The operation, such as `all_gather`.
        collective: &'static str,
        /// The rank on which this error is returned.
        rank: usize,
        /// What happened, and which ranks are at fault where that is known.
        reason: String,
    },
    /// Another rank returned an error, so this rank has no result either.
    #[error("rank {rank} returned an error: {error}")]
    OtherRank {
        /// The first rank that returned an error.
        rank: usize,
        /// Its error, as text.
        error: String,
    },
}

/// Why a device cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unavailable {
    /// The crate was built without its `cuda` feature.
    #[error("the crate was built without the feature `cuda`")]
    FeatureDisabled,
    /// This build holds no CUDA kernels.
    #[error(
        "this build holds no CUDA kernels: {0}. Ways out: put the CUDA toolkit's nvcc on PATH, or name it by NVCC or \
         CUDA_HOME, and build again; CATALOG_SOFTMAX_CUDA_ARCHS limits the architectures, and \
         CATALOG_SOFTMAX_REQUIRE_NVCC=1 makes a build without kernels fail"
    )]
    KernelsNotBuilt(NotBuilt),
    /// The CUDA driver library could not be opened.
    #[error("no CUDA driver: {0}")]
    NoDriver(String),
    /// The driver is older than the kernels need; versions as 1000 major + 10 minor.
    #[error("the CUDA driver supports version {found}, the kernels need {needed}")]
    DriverTooOld {
        /// What the driver reports.
        found: i32,
        /// The lowest version that works.
        needed: i32,
    },
    /// The driver refused a call.
    #[error("the CUDA driver's {call} returned error {code}")]
    Driver {
        /// The driver's function.
        call: &'static str,
        /// Its `CUresult`.
        code: i32,
    },
    /// The device is older than the kernels need.
    #[error("the device has compute capability {major}.{minor}, the kernels need 8.0")]
    ComputeCapability {
        /// Major version.
        major: i32,
        /// Minor version.
        minor: i32,
    },
    /// There are fewer devices than the ordinal asks for.
    #[error("there are {count} CUDA devices")]
    NoSuchDevice {
        /// Devices that the driver counts.
        count: i32,
    },
}

/// Why a build holds no CUDA kernels, as its build script found.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NotBuilt {
    /// No nvcc was found. The text says where the build script looked.
    #[error("no nvcc was found when the crate was built ({0})")]
    NoCompiler(Cow<'static, str>),
    /// The nvcc that was found knows none of the architectures. The text names them.
    #[error("{0}")]
    NoArchitecture(Cow<'static, str>),
    /// nvcc failed. The text says on what, and has the first lines that nvcc printed.
    #[error("{0}")]
    CompilerFailed(Cow<'static, str>),
}

/// Shorthand for results of this crate. The second type may be named, as that of [`std::result::Result`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An argument's name in errors. It becomes text only when there is an error, so a step without errors allocates
/// nothing.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Argument {
    Named(&'static str),
    /// A field of a pool: `candidates` if there is one pool, `pools[1].candidates` if there are several.
    OfPool {
        pool: usize,
        pools: usize,
        field: &'static str,
    },
    /// `NAME[INDEX]`
    #[cfg(feature = "cuda")]
    Element(&'static str, usize),
}

impl From<&'static str> for Argument {
    fn from(name: &'static str) -> Self {
        Argument::Named(name)
    }
}

impl From<Argument> for String {
    fn from(argument: Argument) -> Self {
        argument.to_string()
    }
}

impl std::fmt::Display for Argument {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Argument::Named(name) | Argument::OfPool { pools: 1, field: name, .. } => f.write_str(name),
            Argument::OfPool { pool, field, .. } => write!(f, "pools[{pool}].{field}"),
            #[cfg(feature = "cuda")]
            Argument::Element(name, index) => write!(f, "{name}[{index}]"),
        }
    }
}

pub(crate) fn shape(argument: impl Into<String>, found: impl Into<String>, rule: impl Into<String>) -> Error {
    Error::Shape { argument: argument.into(), found: found.into(), rule: rule.into() }
}

pub(crate) fn value(argument: impl Into<String>, value: impl Shown, rule: impl Into<String>) -> Error {
    Error::Value { argument: argument.into(), value: value.shown(), rule: rule.into() }
}

/// How a value is written in an error: by `Display`, except for floating-point numbers, because `Display` writes 1e-300
/// with 300 zeros. [`value`] takes only this trait, so it cannot write such a number.
pub(crate) trait Shown {
    fn shown(&self) -> String;
}

macro_rules! shown {
    ($($type:ty),* => $show:expr) => {
        $(impl Shown for $type {
            fn shown(&self) -> String {
                $show(self)
            }
        })*
    };
}

shown!(i32, i64, u32, u64, usize, str, String, Error => ToString::to_string);
shown!(f32, f64 => number);

/// The shortest digits that are read back as the same number, with an exponent where the number is very small or large.
pub(crate) fn number(number: impl std::fmt::Debug) -> String {
    let mut digits = format!("{number:?}");
    if digits.ends_with(".0") {
        digits.truncate(digits.len() - ".0".len());
    }
    digits
}

impl<T: Shown + ?Sized> Shown for &T {
    fn shown(&self) -> String {
        (**self).shown()
    }
}

pub(crate) fn missing(argument: impl Into<String>, rule: &'static str) -> Error {
    Error::Missing { argument: argument.into(), rule }
}

pub(crate) fn does_not_apply(argument: impl Into<String>, rule: &'static str) -> Error {
    Error::DoesNotApply { argument: argument.into(), rule }
}

#[cfg(test)]
mod tests {
    use super::value;

    #[test]
    fn numbers_are_short_and_are_read_back_as_they_were() {
        for number in [0.0, -0.0, 1.0, -2.5, 0.1, 1e-4, 1.0 / 3.0, 1e16, 1e-300, -5e-324, f64::MAX, f64::MIN_POSITIVE] {
            let error = value("x", number, "another").to_string();
            let digits = error.strip_prefix("x is ").and_then(|rest| rest.strip_suffix("; rule: another"));
            let digits = digits.unwrap_or_else(|| panic!("{error}"));
            // A sign, 17 digits, a point and an exponent of three digits with its sign.
            assert!(digits.len() <= 24, "{digits}");
            assert_eq!(digits.parse(), Ok(number), "{digits}");
        }
        assert_eq!(value("x", -1f32, "y").to_string(), "x is -1; rule: y");
        assert_eq!(value("x", 0.1f32, "y").to_string(), "x is 0.1; rule: y");
    }
}
