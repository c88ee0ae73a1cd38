//! NVIDIA's driver library, loaded when it is there: its functions, types and error codes as far as we use them.
//!
//! Bound by hand rather than through a crate: a missing library or symbol must be an answer and not a panic, the
//! library must be replaceable per device by the stand-in of the tests, and these four dozen functions have not
//! changed since CUDA 12.0. Nothing here keeps state or knows what it is called for.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The driver's answer to a call, 0 for success.
pub(crate) type Code = c_int;
pub(crate) type DeviceHandle = c_int;
pub(crate) type Context = *mut c_void;
pub(crate) type StreamHandle = *mut c_void;
pub(crate) type EventHandle = *mut c_void;
pub(crate) type ModuleHandle = *mut c_void;
pub(crate) type FunctionHandle = *mut c_void;
pub(crate) type GraphHandle = *mut c_void;
pub(crate) type GraphExecHandle = *mut c_void;
pub(crate) type NodeHandle = *mut c_void;
pub(crate) type MemoryHandle = u64;
pub(crate) type Address = u64;

pub(crate) const SUCCESS: Code = 0;
pub(crate) const OUT_OF_MEMORY: Code = 2;
const NO_DEVICE: Code = 100;

/// Errors after which the context answers every call with the same error: the device has to be set up again.
pub(crate) fn ends_context(code: Code) -> bool {
    // Deinitialized, device unavailable, uncorrectable memory or link error; illegal address, timeout, context
    // destroyed, assertion, and the faults of running code up to launch failure; unknown.
    matches!(code, 4 | 46 | 214 | 220 | 226 | 700 | 702 | 709 | 710 | 714..=719 | 999)
}

/// `CU_DEVICE_ATTRIBUTE_*`.
pub(crate) mod attribute {
    pub(crate) const MULTIPROCESSORS: i32 = 16;
    pub(crate) const CAPABILITY_MAJOR: i32 = 75;
    pub(crate) const CAPABILITY_MINOR: i32 = 76;
    pub(crate) const VIRTUAL_MEMORY: i32 = 102;
    pub(crate) const FILE_DESCRIPTORS: i32 = 103;
    pub(crate) const HOST_NUMA_NODE: i32 = 134;
}

/// `CU_STREAM_NON_BLOCKING`: the stream does not wait for the null stream, which libraries may use.
pub(crate) const STREAM_NON_BLOCKING: c_uint = 1;
/// `CU_EVENT_BLOCKING_SYNC | CU_EVENT_DISABLE_TIMING`: who waits sleeps.
pub(crate) const EVENT_FLAGS: c_uint = 3;
/// `CU_MEMHOSTALLOC_PORTABLE`: pinned for every context.
pub(crate) const HOST_PORTABLE: c_uint = 1;
/// `CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR`.
pub(crate) const FILE_DESCRIPTOR: c_int = 1;
/// `CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES`.
pub(crate) const MOST_SHARED_BYTES: c_int = 8;
/// `CU_MEM_ALLOC_GRANULARITY_MINIMUM`.
pub(crate) const GRANULARITY_MINIMUM: c_int = 0;

/// `CUmemLocation`: `CU_MEM_LOCATION_TYPE_DEVICE` and an ordinal.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Location {
    kind: c_int,
    id: c_int,
}

/// `CUmemAllocationProp`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct AllocationProp {
    kind: c_int,
    handle_types: c_int,
    location: Location,
    win32_metadata: *mut c_void,
    compression: u8,
    gpu_direct_rdma: u8,
    usage: u16,
    reserved: [u8; 4],
}

impl AllocationProp {
    /// Device memory, exportable as file descriptors if `exportable`.
    pub(crate) fn new(device: DeviceHandle, exportable: bool) -> AllocationProp {
        const PINNED: c_int = 1;
        AllocationProp {
            kind: PINNED,
            handle_types: if exportable { FILE_DESCRIPTOR } else { 0 },
            location: Location { kind: 1, id: device },
            win32_metadata: std::ptr::null_mut(),
            compression: 0,
            gpu_direct_rdma: 0,
            usage: 0,
            reserved: [0; 4],
        }
    }
}

/// `CUmemAccessDesc`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct AccessDesc {
    location: Location,
    flags: c_int,
}

impl AccessDesc {
    /// Reading and writing by this device.
    pub(crate) fn read_write(device: DeviceHandle) -> AccessDesc {
        AccessDesc { location: Location { kind: 1, id: device }, flags: 3 }
    }
}

/// `CUDA_KERNEL_NODE_PARAMS_v2`.
#[repr(C)]
pub(crate) struct KernelNodeParams {
    pub(crate) function: FunctionHandle,
    pub(crate) grid_x: c_uint,
    pub(crate) grid_y: c_uint,
    pub(crate) grid_z: c_uint,
    pub(crate) block_x: c_uint,
    pub(crate) block_y: c_uint,
    pub(crate) block_z: c_uint,
    pub(crate) shared_bytes: c_uint,
    pub(crate) parameters: *mut *const c_void,
    pub(crate) extra: *mut *mut c_void,
    /// Instead of a function.
    pub(crate) kernel: *mut c_void,
    /// Without a function.
    pub(crate) context: Context,
}

// The driver reads these by their C layout.
const _: () = assert!(size_of::<AllocationProp>() == 32 && size_of::<AccessDesc>() == 12);
const _: () = assert!(size_of::<KernelNodeParams>() == 72);

macro_rules! functions {
    ($($name:ident($($type:ty),*);)*) => {
        #[allow(non_snake_case)]
        pub(crate) struct Functions { $(pub(crate) $name: unsafe extern "C" fn($($type),*) -> Code,)* }

        impl Functions {
            /// Finds all of them, or says which is missing.
            ///
            /// # Safety
            /// `symbol` must give the driver's function of that name, or nothing.
            unsafe fn resolve(
                symbol: &dyn Fn(&CStr) -> Option<*const c_void>,
            ) -> Result<Functions, &'static str> {
                $(
                    const _: () = assert!(size_of::<unsafe extern "C" fn($($type),*) -> Code>() == size_of::<usize>());
                )*
                Ok(Functions { $($name: {
                    const NAME: &str = stringify!($name);
                    const C_NAME: &str = concat!(stringify!($name), "\0");
                    let name = CStr::from_bytes_with_nul(C_NAME.as_bytes()).map_err(|_| NAME)?;
                    let found = symbol(name).filter(|found| !found.is_null()).ok_or(NAME)?;
                    // SAFETY: the caller says that this is the driver's function of this name, whose parameters
                    // are those that CUDA's header gives it.
                    unsafe {
                        std::mem::transmute::<*const c_void, unsafe extern "C" fn($($type),*) -> Code>(found)
                    }
                },)* })
            }
        }
    };
}

functions! {
    cuInit(c_uint);
    cuDriverGetVersion(*mut c_int);
    cuGetErrorName(Code, *mut *const c_char);
    cuDeviceGetCount(*mut c_int);
    cuDeviceGet(*mut DeviceHandle, c_int);
    cuDeviceGetName(*mut c_char, c_int, DeviceHandle);
    cuDeviceGetAttribute(*mut c_int, c_int, DeviceHandle);
    cuDevicePrimaryCtxRetain(*mut Context, DeviceHandle);
    cuDevicePrimaryCtxRelease_v2(DeviceHandle);
    cuDevicePrimaryCtxReset_v2(DeviceHandle);
    cuCtxSetCurrent(Context);
    cuMemGetInfo_v2(*mut usize, *mut usize);
    cuMemGetAllocationGranularity(*mut usize, *const AllocationProp, c_int);
    cuMemAddressReserve(*mut Address, usize, usize, Address, u64);
    cuMemAddressFree(Address, usize);
    cuMemCreate(*mut MemoryHandle, usize, *const AllocationProp, u64);
    cuMemRelease(MemoryHandle);
    cuMemMap(Address, usize, usize, MemoryHandle, u64);
    cuMemSetAccess(Address, usize, *const AccessDesc, usize);
    cuMemUnmap(Address, usize);
    cuMemExportToShareableHandle(*mut c_void, MemoryHandle, c_int, u64);
    cuMemHostAlloc(*mut *mut c_void, usize, c_uint);
    cuMemFreeHost(*mut c_void);
    cuStreamCreate(*mut StreamHandle, c_uint);
    cuStreamDestroy_v2(StreamHandle);
    cuStreamSynchronize(StreamHandle);
    cuEventCreate(*mut EventHandle, c_uint);
    cuEventDestroy_v2(EventHandle);
    cuEventRecord(EventHandle, StreamHandle);
    cuEventSynchronize(EventHandle);
    cuMemcpyHtoDAsync_v2(Address, *const c_void, usize, StreamHandle);
    cuMemcpyDtoHAsync_v2(*mut c_void, Address, usize, StreamHandle);
    cuMemcpyDtoDAsync_v2(Address, Address, usize, StreamHandle);
    cuMemsetD8Async(Address, u8, usize, StreamHandle);
    cuMemAlloc_v2(*mut Address, usize);
    cuMemFree_v2(Address);
    cuModuleLoadData(*mut ModuleHandle, *const c_void);
    cuModuleUnload(ModuleHandle);
    cuModuleGetFunction(*mut FunctionHandle, ModuleHandle, *const c_char);
    cuFuncSetAttribute(FunctionHandle, c_int, c_int);
    cuLaunchKernel(
        FunctionHandle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, StreamHandle,
        *mut *const c_void, *mut *mut c_void
    );
    cuGraphCreate(*mut GraphHandle, c_uint);
    cuGraphAddKernelNode_v2(*mut NodeHandle, GraphHandle, *const NodeHandle, usize, *const KernelNodeParams);
    cuGraphInstantiateWithFlags(*mut GraphExecHandle, GraphHandle, u64);
    cuGraphDestroy(GraphHandle);
    cuGraphUpload(GraphExecHandle, StreamHandle);
    cuGraphLaunch(GraphExecHandle, StreamHandle);
    cuGraphExecDestroy(GraphExecHandle);
}

/// Why no GPU can be used; the text is for the user.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct NoGpu(pub(crate) String);

/// The driver, ready for use.
pub struct Driver {
    pub(crate) functions: Functions,
    /// GPUs, by ordinal, that were lost and of which something is left.
    remains: Mutex<Vec<i32>>,
}

impl std::fmt::Debug for Driver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Driver")
    }
}

/// Names under which the driver's package installs the library.
const LIBRARIES: [&str; 2] = ["libcuda.so.1", "libcuda.so"];

impl Driver {
    /// Loads the installed driver.
    ///
    /// # Errors
    /// When there is none, it is too old, or it finds no GPU.
    pub fn load() -> Result<Arc<Driver>, NoGpu> {
        let mut problem = String::new();
        for name in LIBRARIES {
            // SAFETY: this is the system's driver library, whose initialisation code is made for being loaded so.
            match unsafe { libloading::Library::new(name) } {
                Ok(library) => return Driver::from_library(library),
                Err(error) if problem.is_empty() => {
                    // The system's words are one level down.
                    let source = std::error::Error::source(&error).map(ToString::to_string);
                    problem = source.unwrap_or_else(|| error.to_string());
                }
                Err(_) => {}
            }
        }
        Err(NoGpu(format!("no NVIDIA driver is installed here ({problem})")))
    }

    fn from_library(library: libloading::Library) -> Result<Arc<Driver>, NoGpu> {
        let symbol = |name: &CStr| {
            // SAFETY: a pointer is what a symbol is; `resolve` gives it its type.
            unsafe { library.get::<*const c_void>(name) }.ok().map(|found| *found)
        };
        // SAFETY: these are the library's symbols of these names.
        let functions = unsafe { Functions::resolve(&symbol) };
        // The driver runs threads of its own, so it is never unloaded.
        std::mem::forget(library);
        Driver::start(functions)
    }

    /// A driver of these functions.
    ///
    /// # Errors
    /// As [`Driver::load`].
    ///
    /// # Safety
    /// `symbol` must give functions that do what the driver's functions of these names are documented to do.
    #[cfg(any(test, feature = "stand-in"))]
    pub(crate) unsafe fn from_symbols(
        symbol: &dyn Fn(&CStr) -> Option<*const c_void>,
    ) -> Result<Arc<Driver>, NoGpu> {
        // SAFETY: as the caller says.
        Driver::start(unsafe { Functions::resolve(symbol) })
    }

    fn start(functions: Result<Functions, &'static str>) -> Result<Arc<Driver>, NoGpu> {
        let functions = functions.map_err(|missing| {
            NoGpu(format!(
                "the NVIDIA driver is too old: its library lacks {missing} (CUDA 12.0 or later has it)"
            ))
        })?;
        let driver = Driver { functions, remains: Mutex::default() };
        // SAFETY: initialising takes no pointers and may be repeated.
        match unsafe { (driver.functions.cuInit)(0) } {
            SUCCESS => Ok(Arc::new(driver)),
            NO_DEVICE => Err(NoGpu("an NVIDIA driver is installed, but it finds no GPU".to_owned())),
            code => Err(NoGpu(format!("the NVIDIA driver cannot start: {}", driver.error_name(code)))),
        }
    }

    /// Whether something is left of a GPU that was lost; it cannot be opened before that has gone.
    pub fn has_remains(&self, ordinal: i32) -> bool {
        self.remains().contains(&ordinal)
    }

    /// The ordinals of lost GPUs, one for each time that it was lost.
    pub(crate) fn remains(&self) -> MutexGuard<'_, Vec<i32>> {
        // Every change to it is one insertion or removal.
        self.remains.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Number of GPUs; their ordinals count from 0.
    pub fn gpus(&self) -> i32 {
        let mut count = 0;
        // SAFETY: the pointer is to a live variable.
        match unsafe { (self.functions.cuDeviceGetCount)(&mut count) } {
            SUCCESS => count,
            _ => 0,
        }
    }

    /// The name of a GPU for people, e.g. `NVIDIA H100 80GB HBM3`.
    ///
    /// # Errors
    /// When there is no such GPU.
    pub fn gpu_name(&self, ordinal: i32) -> Result<String, NoGpu> {
        let gpus = self.gpus();
        if !(0..gpus).contains(&ordinal) {
            return Err(NoGpu(format!(
                "there is no GPU {ordinal}: the driver shows {gpus}, which count from 0 (CUDA_VISIBLE_DEVICES hides some)"
            )));
        }
        let (mut device, mut name) = (0, [0 as c_char; 128]);
        // SAFETY: the pointers are to live variables, and the buffer is longer than is said, so its last byte stays 0
        // whatever is written before it.
        let code = unsafe {
            match (self.functions.cuDeviceGet)(&mut device, ordinal) {
                SUCCESS => {
                    (self.functions.cuDeviceGetName)(name.as_mut_ptr(), name.len() as c_int - 1, device)
                }
                code => code,
            }
        };
        if code != SUCCESS {
            return Err(NoGpu(format!("GPU {ordinal} cannot be used: {}", self.error_name(code))));
        }
        // SAFETY: the buffer ends with a 0.
        Ok(unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned())
    }

    /// The newest CUDA version that the driver serves, as (major, minor).
    pub fn cuda_version(&self) -> (i32, i32) {
        let mut version = 0;
        // SAFETY: the pointer is to a live variable. On an error the version stays 0.
        let _ = unsafe { (self.functions.cuDriverGetVersion)(&mut version) };
        (version / 1000, version % 1000 / 10)
    }

    /// The driver's name for an error.
    pub(crate) fn error_name(&self, code: Code) -> String {
        let mut name: *const c_char = std::ptr::null();
        // SAFETY: the pointer is to a live variable.
        let known = unsafe { (self.functions.cuGetErrorName)(code, &mut name) };
        if known != SUCCESS || name.is_null() {
            return format!("CUDA error {code}");
        }
        // SAFETY: the driver gave a string that ends with 0 and lives as long as the library.
        unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
    }
}
