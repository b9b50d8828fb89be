//! Choosing where to run.

use crate::backend::Backend;
use crate::backend::cpu::Cpu;
use crate::error::{Error, Result, Unavailable, value};

/// Where to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Device {
    /// The host's processor.
    Cpu,
    /// The CUDA device of that ordinal.
    Cuda(usize),
}

/// From `cpu`, `cuda` (the first device) or `cuda:1`, as [`Display`](std::fmt::Display) writes them.
///
/// ```
/// use catalog_softmax::Device;
/// assert_eq!("cuda:1".parse(), Ok(Device::Cuda(1)));
/// assert!("gpu".parse::<Device>().is_err());
/// ```
impl std::str::FromStr for Device {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text.split_once(':') {
            None if text == "cpu" => Ok(Device::Cpu),
            None if text == "cuda" => Ok(Device::Cuda(0)),
            Some(("cuda", ordinal)) if ordinal.bytes().all(|b| b.is_ascii_digit()) => {
                ordinal.parse().map(Device::Cuda).map_err(|_| unknown(text))
            }
            _ => Err(unknown(text)),
        }
    }
}

fn unknown(device: &str) -> Error {
    value("device", device, "cpu, cuda or cuda:N")
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Device::Cpu => write!(f, "cpu"),
            Device::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

/// What [`Device::auto`] chose.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Selected {
    /// The device to use.
    pub device: Device,
    /// Why no GPU was chosen; `None` if one was.
    pub no_gpu: Option<Error>,
}

impl Device {
    /// The first CUDA device where one can be used, else the CPU with the reason.
    ///
    /// ```
    /// use catalog_softmax::Device;
    /// let selected = Device::auto();
    /// if let Some(reason) = &selected.no_gpu {
    ///     println!("using {}: {reason}", selected.device);
    /// }
    /// let backend = selected.device.open()?;
    /// # Ok::<(), catalog_softmax::Error>(())
    /// ```
    pub fn auto() -> Selected {
        match Device::Cuda(0).check() {
            Ok(()) => Selected { device: Device::Cuda(0), no_gpu: None },
            Err(reason) => Selected { device: Device::Cpu, no_gpu: Some(reason) },
        }
    }

    /// A backend on this device.
    ///
    /// # Errors
    /// [`Error::DeviceUnavailable`] with the reason.
    pub fn open(self) -> Result<Box<dyn Backend<Real = f32>>> {
        self.check()?;
        match self {
            Device::Cpu => Ok(Box::new(Cpu::new())),
            #[cfg(feature = "cuda")]
            Device::Cuda(ordinal) => Ok(Box::new(crate::backend::cuda::Cuda::new(ordinal)?)),
            #[cfg(not(feature = "cuda"))]
            Device::Cuda(_) => Err(self.unavailable(Unavailable::FeatureDisabled)),
        }
    }

    fn check(self) -> Result<()> {
        match self {
            Device::Cpu => Ok(()),
            #[cfg(feature = "cuda")]
            Device::Cuda(ordinal) => crate::backend::cuda::check(ordinal).map_err(|reason| self.unavailable(reason)),
            #[cfg(not(feature = "cuda"))]
            Device::Cuda(_) => Err(self.unavailable(Unavailable::FeatureDisabled)),
        }
    }

    fn unavailable(self, reason: Unavailable) -> Error {
        Error::DeviceUnavailable { device: self.to_string(), reason }
    }
}
