//! The one error type. Each variant names the argument, its value and the rule that it breaks.

/// Everything that can go wrong. Input is checked before anything runs, so an error leaves outputs untouched.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A shape, length, stride or offset that disagrees with another argument.
    #[error("{argument} has {found}; rule: {rule}")]
    Shape {
        /// The argument, by the name that the docs of what took it use: `candidates`, or `pools[1].candidates` of several
        /// pools; [`Pool::ids`](crate::Pool::ids) takes `candidate_ids`,
        /// [`excluded_ids`](crate::BatchBuilder::excluded_ids) `exclude_offsets` and `exclude_ids`. What has no
        /// name is said in words.
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
        /// What stands in the way.
        reason: Unavailable,
    },
    /// The device has too little memory for the step's plan. The backend has then waited for all work in its context,
    /// made the device's memory pool return what it kept, and given up the workspace of earlier steps; smaller steps
    /// still run.
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
}

/// Why a device cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unavailable {
    /// The crate was built without its `cuda` feature.
    #[error("the crate was built without the feature `cuda`")]
    FeatureDisabled,
    /// This build holds no CUDA kernels.
    #[error("this build holds no CUDA kernels")]
    KernelsNotBuilt,
    /// The CUDA driver library could not be opened.
    #[error("no CUDA driver: {0}")]
    NoDriver(String),
    /// The driver is older than the kernels need; versions as 1000 major + 10 minor.
    #[error("the CUDA driver supports version {found}, the kernels need {needed}")]
    DriverTooOld {
        /// What the driver reports.
        found: i32,
        /// The lowest version that serves.
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

/// Shorthand for results of this crate.
pub type Result<T> = std::result::Result<T, Error>;

pub(crate) fn shape(argument: impl Into<String>, found: impl Into<String>, rule: impl Into<String>) -> Error {
    Error::Shape { argument: argument.into(), found: found.into(), rule: rule.into() }
}

pub(crate) fn value(argument: impl Into<String>, value: impl ToString, rule: impl Into<String>) -> Error {
    Error::Value { argument: argument.into(), value: value.to_string(), rule: rule.into() }
}

pub(crate) fn missing(argument: impl Into<String>, rule: &'static str) -> Error {
    Error::Missing { argument: argument.into(), rule }
}

pub(crate) fn does_not_apply(argument: impl Into<String>, rule: &'static str) -> Error {
    Error::DoesNotApply { argument: argument.into(), rule }
}
