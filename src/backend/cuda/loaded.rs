//! The kernels, loaded into the context of a backend's stream.

use std::ffi::{CString, c_void};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use cudarc::driver::{CudaStream, result, sys};

use super::kernels::{ELEMENTS, ENTRIES, Kernel, Variant, WIDTHS};
use super::stream::{Event, bind, checked, synchronize};
use crate::error::Result;

/// What is loaded into a context once, and unloaded after the last use of it.
#[derive(Debug)]
pub(super) struct Loaded {
    /// Orders the backend's stream and others. Before the stream, whose context it is dropped in.
    pub(super) event: Event,
    pub(super) stream: Arc<CudaStream>,
    /// By place in `ENTRIES`: a kernel's variants, null where there is none.
    functions: Vec<[[sys::CUfunction; ELEMENTS.len()]; WIDTHS.len()]>,
    /// Whether those for compute capability 9.0 are among them.
    pub(super) hopper: bool,
    /// How often kernels were launched.
    pub(super) launches: AtomicU64,
    modules: Vec<sys::CUmodule>,
}

// SAFETY: modules and functions are handles that any thread may use with the context bound.
unsafe impl Send for Loaded {}
// SAFETY: as above; the driver's calls are thread-safe.
unsafe impl Sync for Loaded {}

impl Loaded {
    /// Loads all kernels, those for compute capability 9.0 where `hopper`.
    pub(super) fn new(stream: Arc<CudaStream>, shared_bytes: usize, hopper: bool) -> Result<Self> {
        bind(stream.context())?;
        let (event, launches) = (Event::new()?, AtomicU64::new(0));
        let mut loaded = Loaded { event, stream, functions: Vec::new(), hopper, launches, modules: Vec::new() };
        let mut image: &[u8] = &[];
        for entry in ENTRIES {
            let mut variants = [[std::ptr::null_mut(); ELEMENTS.len()]; WIDTHS.len()];
            if hopper || !entry.is_hopper() {
                if !std::ptr::eq(image, entry.image) {
                    image = entry.image;
                    loaded.load(image)?;
                }
                for (variant, name) in entry.variants() {
                    variants[variant.width][variant.element] = loaded.find(name, shared_bytes)?;
                }
            }
            loaded.functions.push(variants);
        }
        Ok(loaded)
    }

    /// A kernel's variant, and the threads of its blocks.
    pub(super) fn function<P>(&self, kernel: Kernel<P>, variant: Variant) -> (sys::CUfunction, u32) {
        let function = self.functions[kernel.place][variant.width][variant.element];
        let entry = &ENTRIES[kernel.place];
        assert!(!function.is_null(), "{} has no {variant:?} here", entry.name);
        (function, entry.threads(variant))
    }

    fn load(&mut self, image: &'static [u8]) -> Result<()> {
        // SAFETY: a fat binary that nvcc made, aligned, and in the executable for ever.
        let loaded = unsafe { result::module::load_data(image.as_ptr().cast::<c_void>()) };
        self.modules.push(checked("cuModuleLoadData", loaded)?);
        Ok(())
    }

    /// A kernel of the module that was loaded last.
    fn find(&self, name: String, shared_bytes: usize) -> Result<sys::CUfunction> {
        let Some(&module) = self.modules.last() else { unreachable!("an image comes before its kernels") };
        let streams = name.starts_with("stream_");
        let name = CString::new(name).unwrap_or_default();
        // SAFETY: the module was just loaded and stays so as long as `self`.
        let found = unsafe { result::module::get_function(module, name) };
        let function = checked("cuModuleGetFunction", found)?;
        if streams {
            use sys::CUfunction_attribute as Attribute;
            let of_its_own = Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
            // SAFETY: the function is valid.
            let taken = unsafe { result::function::get_function_attribute(function, of_its_own) };
            let left = shared_bytes as i32 - checked("cuFuncGetAttribute", taken)?;
            let attribute = Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: as above, and the value is what the device reports as its limit, less what the kernel declares.
            let set = unsafe { result::function::set_function_attribute(function, attribute, left) };
            checked("cuFuncSetAttribute", set)?;
        }
        Ok(function)
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
