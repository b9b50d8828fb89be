//! Errors: bad input with the name of the argument, or what candle says.

use catalog_softmax::Error as Core;

/// What can go wrong. It converts into [`candle_core::Error`], so `?` works in functions that return candle's result.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Input that breaks a rule: argument, value and rule. Or a device that the loss cannot be computed on. Nothing was
    /// computed.
    #[error(transparent)]
    Loss(#[from] Core),
    /// An error of candle's.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Loss(error) => candle_core::Error::wrap(error),
            Error::Candle(error) => error,
        }
    }
}

pub(crate) fn value(argument: &str, value: impl Into<String>, rule: &str) -> Error {
    Core::Value { argument: argument.into(), value: value.into(), rule: rule.into() }.into()
}

pub(crate) fn shape(argument: &str, found: &candle_core::Shape, rule: &str) -> Error {
    Core::Shape { argument: argument.into(), found: format!("shape {:?}", found.dims()), rule: rule.into() }.into()
}
