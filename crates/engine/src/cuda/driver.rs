//! A GPU through the installed driver's library, loaded when it is there: modules, launches, plain allocations.
//!
//! Bound by hand: a missing library or symbol must be an answer and not a panic, and these functions have not changed
//! for years. Pool memory is the device crate's; what is allocated here is a pass's own working memory.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::path::Path;
use std::sync::Arc;

use super::{Function, Gpu, GpuError, Launch};

/// Names under which the driver's package installs the library.
const LIBRARIES: [&str; 2] = ["libcuda.so.1", "libcuda.so"];
/// `CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES`.
const MOST_SHARED: c_int = 8;
/// `CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT`.
const MULTIPROCESSORS: c_int = 16;
/// `CU_STREAM_NON_BLOCKING`.
const NON_BLOCKING: c_uint = 1;

type Code = c_int;

macro_rules! functions {
    ($($name:ident($($type:ty),*);)*) => {
        #[allow(non_snake_case)]
        struct Functions { $($name: unsafe extern "C" fn($($type),*) -> Code,)* }

        impl Functions {
            /// Finds all of them, or says which is missing.
            ///
            /// # Safety
            /// The library must be the driver's, or one whose functions of these names do the same.
            unsafe fn find(library: &libloading::Library) -> Result<Functions, &'static str> {
                Ok(Functions { $($name: {
                    // SAFETY: these are the parameters that CUDA's header gives the function of this name.
                    let symbol = unsafe {
                        library.get::<unsafe extern "C" fn($($type),*) -> Code>(stringify!($name).as_bytes())
                    };
                    *symbol.map_err(|_| stringify!($name))?
                },)* })
            }
        }
    };
}

functions! {
    cuInit(c_uint);
    cuGetErrorName(Code, *mut *const c_char);
    cuDeviceGetCount(*mut c_int);
    cuDeviceGet(*mut c_int, c_int);
    cuDeviceGetName(*mut c_char, c_int, c_int);
    cuDeviceGetAttribute(*mut c_int, c_int, c_int);
    cuDevicePrimaryCtxRetain(*mut *mut c_void, c_int);
    cuDevicePrimaryCtxRelease_v2(c_int);
    cuCtxSetCurrent(*mut c_void);
    cuModuleLoadData(*mut *mut c_void, *const c_void);
    cuModuleUnload(*mut c_void);
    cuModuleGetFunction(*mut *mut c_void, *mut c_void, *const c_char);
    cuFuncSetAttribute(*mut c_void, c_int, c_int);
    cuLaunchKernel(
        *mut c_void, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, *mut c_void, *mut *const c_void,
        *mut *mut c_void
    );
    cuMemAlloc_v2(*mut u64, usize);
    cuMemFree_v2(u64);
    cuMemcpyHtoDAsync_v2(u64, *const c_void, usize, *mut c_void);
    cuMemcpyDtoHAsync_v2(*mut c_void, u64, usize, *mut c_void);
    cuStreamCreate(*mut *mut c_void, c_uint);
    cuStreamDestroy_v2(*mut c_void);
    cuStreamSynchronize(*mut c_void);
}

/// What the system says of a library that cannot be loaded.
fn cause(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

/// A GPU of the installed driver, with the embedded kernels loaded.
pub struct Driver {
    functions: Functions,
    device: c_int,
    name: String,
    multiprocessors: u32,
    context: *mut c_void,
    module: *mut c_void,
    stream: *mut c_void,
}

// SAFETY: the driver's functions may be called from any thread; handles are only passed to them.
unsafe impl Send for Driver {}
// SAFETY: as above.
unsafe impl Sync for Driver {}

impl Driver {
    /// Opens GPU number `ordinal` of the installed driver and loads `image` (see [`super::bundle`]).
    ///
    /// # Errors
    /// [`GpuError::Missing`] when there is no driver or no such GPU; [`GpuError::Driver`] when the driver cannot load
    /// the image or set up the GPU.
    pub fn open(ordinal: i32, image: &[u8]) -> Result<Arc<Driver>, GpuError> {
        let mut problem = String::new();
        for name in LIBRARIES {
            // SAFETY: this is the system's driver library, whose initialisation code is made for being loaded so.
            match unsafe { libloading::Library::new(name) } {
                Ok(library) => {
                    // SAFETY: this is the driver's library.
                    return unsafe { Driver::from_library(library, ordinal, image) };
                }
                Err(error) if problem.is_empty() => problem = cause(&error),
                Err(_) => {}
            }
        }
        Err(GpuError::Missing(format!("no NVIDIA driver is installed here ({problem})")))
    }

    /// [`Driver::open`] with another library in the driver's place.
    ///
    /// # Errors
    /// As [`Driver::open`].
    ///
    /// # Safety
    /// The library's functions must do what the driver's of the same names do.
    pub unsafe fn open_library(library: &Path, ordinal: i32, image: &[u8]) -> Result<Arc<Driver>, GpuError> {
        // SAFETY: as the caller says.
        let library = unsafe { libloading::Library::new(library) };
        let library = library.map_err(|error| GpuError::Missing(cause(&error)))?;
        // SAFETY: as the caller says.
        unsafe { Driver::from_library(library, ordinal, image) }
    }

    /// # Safety
    /// See [`Functions::find`].
    unsafe fn from_library(
        library: libloading::Library,
        ordinal: i32,
        image: &[u8],
    ) -> Result<Arc<Driver>, GpuError> {
        // SAFETY: as the caller says.
        let functions = unsafe { Functions::find(&library) };
        let functions = functions.map_err(|missing| {
            GpuError::Missing(format!("the NVIDIA driver is too old: its library lacks {missing}"))
        })?;
        // The driver runs threads of its own, so it is never unloaded.
        std::mem::forget(library);
        let null = std::ptr::null_mut;
        let mut driver = Driver {
            functions,
            device: -1,
            name: String::new(),
            multiprocessors: 0,
            context: null(),
            module: null(),
            stream: null(),
        };
        let mut count = 0;
        let mut device = 0;
        let mut multiprocessors = 0;
        let mut name = [0; 256];
        // SAFETY: pointers are to live variables of the type that each function writes; the image is read as a whole
        // by `cuModuleLoadData`, which finds its end in its header.
        unsafe {
            let f = &driver.functions;
            driver.check("starting the driver", (f.cuInit)(0))?;
            driver.check("counting GPUs", (f.cuDeviceGetCount)(&mut count))?;
            if ordinal < 0 || ordinal >= count {
                return Err(GpuError::Missing(format!("GPU {ordinal} of {count}")));
            }
            driver.check("finding the GPU", (f.cuDeviceGet)(&mut device, ordinal))?;
            driver.check("naming the GPU", (f.cuDeviceGetName)(name.as_mut_ptr(), 255, device))?;
            let code = (f.cuDeviceGetAttribute)(&mut multiprocessors, MULTIPROCESSORS, device);
            driver.check("describing the GPU", code)?;
            let mut context = null();
            driver.check("taking the context", (f.cuDevicePrimaryCtxRetain)(&mut context, device))?;
            (driver.context, driver.device) = (context, device);
            driver.enter()?;
            let f = &driver.functions;
            let mut module = null();
            driver.check("loading the kernels", (f.cuModuleLoadData)(&mut module, image.as_ptr().cast()))?;
            driver.module = module;
            let mut stream = null();
            driver.check("making a stream", (driver.functions.cuStreamCreate)(&mut stream, NON_BLOCKING))?;
            driver.stream = stream;
            driver.name = CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned();
        }
        driver.multiprocessors = multiprocessors.max(1) as u32;
        Ok(Arc::new(driver))
    }

    /// What the driver calls the GPU.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn check(&self, operation: &'static str, code: Code) -> Result<(), GpuError> {
        if code == 0 {
            return Ok(());
        }
        let mut name = std::ptr::null();
        // SAFETY: the pointer is to a live variable.
        let known = unsafe { (self.functions.cuGetErrorName)(code, &mut name) } == 0 && !name.is_null();
        let error = if known {
            // SAFETY: the driver gave a string that ends with 0 and lives as long as the library.
            unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
        } else {
            format!("CUDA error {code}")
        };
        Err(GpuError::Driver { operation, error })
    }

    /// Makes the context that of this thread.
    fn enter(&self) -> Result<(), GpuError> {
        // SAFETY: the context is retained until this is dropped.
        self.check("entering the context", unsafe { (self.functions.cuCtxSetCurrent)(self.context) })
    }

    fn synchronise(&self) -> Result<(), GpuError> {
        // SAFETY: the stream lives until this is dropped.
        self.check("waiting for the GPU", unsafe { (self.functions.cuStreamSynchronize)(self.stream) })
    }
}

// SAFETY: `cuMemAlloc` gives memory of its own until `cuMemFree`.
unsafe impl Gpu for Driver {
    fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    fn function(&self, name: &CStr, shared_bytes: u32) -> Result<Function, GpuError> {
        self.enter()?;
        let mut function = std::ptr::null_mut();
        // SAFETY: the pointers are to a live variable and a string that ends with 0; the module is loaded.
        let code = unsafe { (self.functions.cuModuleGetFunction)(&mut function, self.module, name.as_ptr()) };
        self.check("finding a kernel", code)?;
        // SAFETY: the function was just found.
        let code =
            unsafe { (self.functions.cuFuncSetAttribute)(function, MOST_SHARED, shared_bytes as c_int) };
        self.check("giving a kernel shared memory", code)?;
        Ok(Function(function as usize))
    }

    unsafe fn launch(
        &self,
        function: Function,
        launch: Launch,
        arguments: *const c_void,
    ) -> Result<(), GpuError> {
        self.enter()?;
        let [x, y, z] = launch.grid;
        let mut parameters = [arguments];
        // SAFETY: the kernel has one parameter, to which `arguments` points; the rest is the caller's promise.
        let code = unsafe {
            (self.functions.cuLaunchKernel)(
                function.0 as *mut c_void,
                x,
                y,
                z,
                launch.threads,
                1,
                1,
                launch.shared_bytes,
                self.stream,
                parameters.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        self.check("launching a kernel", code)
    }

    fn allocate(&self, bytes: usize) -> Result<u64, GpuError> {
        self.enter()?;
        let mut address = 0;
        // SAFETY: the pointer is to a live variable.
        self.check("allocating", unsafe { (self.functions.cuMemAlloc_v2)(&mut address, bytes) })?;
        Ok(address)
    }

    unsafe fn free(&self, address: u64) {
        // An error can only be an earlier launch's, which whoever looks at results will see.
        let _ = self.enter().and_then(|()| self.synchronise());
        // SAFETY: allocated and unused by contract.
        let _ = unsafe { (self.functions.cuMemFree_v2)(address) };
    }

    unsafe fn upload(&self, to: u64, bytes: &[u8]) -> Result<(), GpuError> {
        self.enter()?;
        let from = bytes.as_ptr().cast();
        // SAFETY: the destination is allocated by contract. Pageable memory is copied aside before the call returns.
        let code = unsafe { (self.functions.cuMemcpyHtoDAsync_v2)(to, from, bytes.len(), self.stream) };
        self.check("copying to the GPU", code)
    }

    unsafe fn download(&self, from: u64, bytes: &mut [u8]) -> Result<(), GpuError> {
        self.enter()?;
        let to = bytes.as_mut_ptr().cast();
        // SAFETY: the source is allocated by contract; the destination lives until the copy is done (next line).
        let code = unsafe { (self.functions.cuMemcpyDtoHAsync_v2)(to, from, bytes.len(), self.stream) };
        let waited = self.synchronise();
        self.check("copying from the GPU", code).and(waited)
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        if self.device < 0 || self.enter().is_err() {
            return;
        }
        // SAFETY: nobody else has these handles; what is null was never made.
        unsafe {
            if !self.stream.is_null() {
                let _ = (self.functions.cuStreamSynchronize)(self.stream);
                let _ = (self.functions.cuStreamDestroy_v2)(self.stream);
            }
            if !self.module.is_null() {
                let _ = (self.functions.cuModuleUnload)(self.module);
            }
            let _ = (self.functions.cuDevicePrimaryCtxRelease_v2)(self.device);
        }
    }
}
