//! The kernels, loaded into the context of a backend's stream.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Arc;

use cudarc::driver::{CudaStream, result, sys};

use super::driver::Name;
use super::stream::{Event, bind, checked, synchronize};
use crate::error::Result;

/// What is loaded into a context once, and unloaded after the last use of it.
#[derive(Debug)]
pub(super) struct Loaded {
    /// Orders the backend's stream and others. Before the stream, whose context it is dropped in.
    pub(super) event: Event,
    pub(super) stream: Arc<CudaStream>,
    pub(super) functions: HashMap<&'static str, sys::CUfunction>,
    modules: Vec<sys::CUmodule>,
}

// SAFETY: modules and functions are handles that any thread may use with the context bound.
unsafe impl Send for Loaded {}
// SAFETY: as above; the driver's calls are thread-safe.
unsafe impl Sync for Loaded {}

impl Loaded {
    pub(super) fn new(stream: Arc<CudaStream>) -> Result<Self> {
        bind(stream.context())?;
        let event = Event::new()?;
        Ok(Loaded { event, stream, functions: HashMap::new(), modules: Vec::new() })
    }

    pub(super) fn load_kernels(&mut self, image: &'static [u8], names: &[Name], shared_bytes: usize) -> Result<()> {
        // SAFETY: a fat binary that nvcc made, aligned, and in the executable for ever.
        let loaded = unsafe { result::module::load_data(image.as_ptr().cast::<c_void>()) };
        let module = checked("cuModuleLoadData", loaded)?;
        self.modules.push(module);
        for &(name, c_name) in names {
            // SAFETY: the module was just loaded and stays so as long as `self`.
            let found = unsafe { result::module::get_function(module, c_name.to_owned()) };
            let function = checked("cuModuleGetFunction", found)?;
            if name.starts_with("stream_") {
                let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                // SAFETY: the function is valid, and the value is what the device reports as its limit.
                let set = unsafe { result::function::set_function_attribute(function, attribute, shared_bytes as i32) };
                checked("cuFuncSetAttribute", set)?;
            }
            self.functions.insert(name, function);
        }
        Ok(())
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        // What is left where the device has failed goes with its context.
        if bind(self.stream.context()).is_err() || synchronize(&self.stream).is_err() {
            return;
        }
        for module in self.modules.drain(..) {
            // SAFETY: the module is unloaded once, and the stream that ran its kernels is idle.
            let _ = unsafe { result::module::unload(module) };
        }
    }
}
