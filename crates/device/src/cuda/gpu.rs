//! One GPU: its primary context, what the driver was asked to hold for us, and whether it still works.
//!
//! A GPU is *lost* when an error ends its context (an uncorrectable memory error, an illegal address in a kernel) or
//! leaves unknown what was done. From then on nothing calls the driver any more and everything answers
//! [`DeviceError::Lost`]; when its last user is gone the context is reset and every mapping, handle and reservation
//! given back, so that the GPU can be opened anew. The process goes on.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::driver::{
    self, AccessDesc, AllocationProp, Code, Context, DeviceHandle, Driver, FILE_DESCRIPTOR,
    GRANULARITY_MINIMUM, MemoryHandle, OUT_OF_MEMORY, SUCCESS, attribute, ends_context,
};
use crate::DeviceError;

/// What the driver holds for us and a dead context would leave behind.
#[derive(Default)]
struct Held {
    handles: BTreeSet<MemoryHandle>,
    /// Address and bytes.
    reservations: BTreeMap<usize, usize>,
    /// Address and bytes.
    mappings: BTreeMap<usize, usize>,
}

/// One GPU in use by this process.
pub struct Gpu {
    driver: Arc<Driver>,
    ordinal: i32,
    device: DeviceHandle,
    context: Context,
    /// With its number, for people.
    name: String,
    exportable: bool,
    lost: OnceLock<String>,
    held: Mutex<Held>,
}

// SAFETY: the driver's functions may be called from any thread; the context is a name that every thread makes current
// before it uses it. All else is synchronised by itself.
unsafe impl Send for Gpu {}
// SAFETY: as above.
unsafe impl Sync for Gpu {}

impl std::fmt::Debug for Gpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Gpu({})", self.name)
    }
}

/// Memory of a GPU, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryInfo {
    /// Used by nobody, this process or another.
    pub free: usize,
    /// All of it.
    pub total: usize,
}

impl Gpu {
    /// Takes a share in the GPU's primary context, which the libraries of CUDA use too.
    ///
    /// # Errors
    /// [`DeviceError::NoGpu`] when there is no such GPU or it cannot map memory; [`DeviceError::Cuda`] when the driver
    /// refuses; [`DeviceError::Lost`] when it was lost and something is left of it.
    pub fn open(driver: &Arc<Driver>, ordinal: i32) -> Result<Arc<Gpu>, DeviceError> {
        let name = format!("cuda:{ordinal} ({})", driver.gpu_name(ordinal)?);
        if driver.has_remains(ordinal) {
            // A context made now would end with the reset of the lost one.
            let reason = "something still uses what is left of it".to_owned();
            return Err(DeviceError::Lost { device: name, reason });
        }
        let functions = &driver.functions;
        let refused = |operation| {
            let device = name.clone();
            move |code| DeviceError::Cuda { operation, device, error: driver.error_name(code) }
        };
        let mut device = 0;
        // SAFETY: the pointer is to a live variable.
        answer(unsafe { (functions.cuDeviceGet)(&mut device, ordinal) })
            .map_err(refused("finding the GPU"))?;
        if read_attribute(driver, device, attribute::VIRTUAL_MEMORY) != Some(1) {
            let text = format!("{name} cannot map memory at addresses of our choice");
            return Err(DeviceError::NoGpu(super::NoGpu(text)));
        }
        let exportable = read_attribute(driver, device, attribute::FILE_DESCRIPTORS) == Some(1);
        let mut context = std::ptr::null_mut();
        // SAFETY: the pointer is to a live variable; the share is given back in `drop`.
        let retained = unsafe { (functions.cuDevicePrimaryCtxRetain)(&mut context, device) };
        answer(retained).map_err(refused("setting up the GPU"))?;
        let driver = driver.clone();
        let (lost, held) = (OnceLock::new(), Mutex::default());
        Ok(Arc::new(Gpu { driver, ordinal, device, context, name, exportable, lost, held }))
    }

    /// Its name for people, e.g. `cuda:0 (NVIDIA H100 80GB HBM3)`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Compute capability, e.g. (9, 0).
    pub fn capability(&self) -> (i32, i32) {
        let read = |which| self.attribute(which).unwrap_or(0);
        (read(attribute::CAPABILITY_MAJOR), read(attribute::CAPABILITY_MINOR))
    }

    /// The node of host memory that is nearest to it, where the driver knows.
    pub fn numa_node(&self) -> Option<u32> {
        self.attribute(attribute::HOST_NUMA_NODE)?.try_into().ok()
    }

    pub(super) fn attribute(&self, which: i32) -> Option<i32> {
        read_attribute(&self.driver, self.device, which)
    }

    /// Why it can no longer be used, if that is so.
    pub fn lost(&self) -> Option<DeviceError> {
        self.lost.get().map(|reason| DeviceError::Lost { device: self.name.clone(), reason: reason.clone() })
    }

    /// Its memory now.
    ///
    /// # Errors
    /// [`DeviceError::Cuda`], [`DeviceError::Lost`].
    pub fn memory(&self) -> Result<MemoryInfo, DeviceError> {
        let (mut free, mut total) = (0, 0);
        self.call("reading how much memory is free", |driver| {
            // SAFETY: both pointers are to live variables.
            unsafe { (driver.cuMemGetInfo_v2)(&mut free, &mut total) }
        })?;
        Ok(MemoryInfo { free, total })
    }

    /// Declares the GPU lost.
    pub(super) fn lose(&self, operation: &str, code: Code) -> DeviceError {
        let reason = format!("{operation}: {}", self.driver.error_name(code));
        let lose = || {
            self.driver.remains().push(self.ordinal);
            reason
        };
        let reason = self.lost.get_or_init(lose).clone();
        DeviceError::Lost { device: self.name.clone(), reason }
    }

    /// Calls the driver with this GPU's context current. An error that ends the context loses the GPU.
    pub(super) fn call(
        &self,
        operation: &'static str,
        call: impl FnOnce(&driver::Functions) -> Code,
    ) -> Result<(), DeviceError> {
        match self.try_call(call)? {
            SUCCESS => Ok(()),
            code if ends_context(code) => Err(self.lose(operation, code)),
            code => Err(DeviceError::Cuda {
                operation,
                device: self.name.clone(),
                error: self.driver.error_name(code),
            }),
        }
    }

    /// Like [`Gpu::call`], for what must not fail half-way: any error loses the GPU.
    pub(super) fn must(
        &self,
        operation: &'static str,
        call: impl FnOnce(&driver::Functions) -> Code,
    ) -> Result<(), DeviceError> {
        match self.try_call(call)? {
            SUCCESS => Ok(()),
            code => Err(self.lose(operation, code)),
        }
    }

    fn try_call(&self, call: impl FnOnce(&driver::Functions) -> Code) -> Result<Code, DeviceError> {
        if let Some(lost) = self.lost() {
            return Err(lost);
        }
        let functions = &self.driver.functions;
        // SAFETY: the context is held by `self`.
        match unsafe { (functions.cuCtxSetCurrent)(self.context) } {
            SUCCESS => Ok(call(functions)),
            code => Err(self.lose("making the GPU's context current", code)),
        }
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        // Every change to it is one insertion or removal.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn properties(&self) -> AllocationProp {
        AllocationProp::new(self.device, self.exportable)
    }

    /// What sizes of physical pages must be multiples of, bytes.
    pub(super) fn granularity(&self) -> Result<usize, DeviceError> {
        let (mut granularity, properties) = (0, self.properties());
        self.call("asking for the page size", |driver| {
            // SAFETY: both pointers are to live variables.
            unsafe {
                (driver.cuMemGetAllocationGranularity)(&mut granularity, &properties, GRANULARITY_MINIMUM)
            }
        })?;
        Ok(granularity)
    }

    /// Takes `bytes` of physical memory. `None` if there is not so much.
    pub(super) fn create(&self, bytes: usize) -> Result<Option<MemoryHandle>, DeviceError> {
        let (mut handle, properties, mut exhausted) = (0, self.properties(), false);
        self.call("taking device memory", |driver| {
            // SAFETY: both pointers are to live variables.
            let code = unsafe { (driver.cuMemCreate)(&mut handle, bytes, &properties, 0) };
            exhausted = code == OUT_OF_MEMORY;
            if exhausted { SUCCESS } else { code }
        })?;
        if exhausted {
            return Ok(None);
        }
        self.held().handles.insert(handle);
        Ok(Some(handle))
    }

    /// Gives physical memory back.
    pub(super) fn release(&self, handle: MemoryHandle) -> Result<(), DeviceError> {
        // SAFETY: only handles that `create` gave are in `held`, and none is released twice.
        self.must("giving device memory back", |driver| unsafe { (driver.cuMemRelease)(handle) })?;
        self.held().handles.remove(&handle);
        Ok(())
    }

    /// A file descriptor by which another process can map the same physical memory.
    pub(super) fn export(&self, handle: MemoryHandle) -> Result<OwnedFd, DeviceError> {
        let mut file: i32 = -1;
        self.call("exporting device memory", |driver| {
            // SAFETY: for this kind of handle the driver writes an int, for which there is room.
            unsafe {
                (driver.cuMemExportToShareableHandle)((&raw mut file).cast(), handle, FILE_DESCRIPTOR, 0)
            }
        })?;
        // SAFETY: the driver opened this descriptor for us.
        Ok(unsafe { OwnedFd::from_raw_fd(file) })
    }

    /// Reserves addresses.
    pub(super) fn reserve(&self, bytes: usize, alignment: usize) -> Result<usize, DeviceError> {
        let mut address = 0;
        self.call("reserving addresses", |driver| {
            // SAFETY: the pointer is to a live variable.
            unsafe { (driver.cuMemAddressReserve)(&mut address, bytes, alignment, 0, 0) }
        })?;
        self.held().reservations.insert(address as usize, bytes);
        Ok(address as usize)
    }

    /// Gives a reservation back.
    pub(super) fn unreserve(&self, address: usize, bytes: usize) -> Result<(), DeviceError> {
        // SAFETY: `reserve` gave this range, and nothing is mapped in it, as the caller of `Device::unreserve` says.
        self.must("giving addresses back", |driver| unsafe {
            (driver.cuMemAddressFree)(address as u64, bytes)
        })?;
        self.held().reservations.remove(&address);
        Ok(())
    }

    /// Maps a handle of `bytes` at a reserved address. Nobody can access it yet.
    pub(super) fn map(&self, address: usize, bytes: usize, handle: MemoryHandle) -> Result<(), DeviceError> {
        self.call("mapping device memory", |driver| {
            // SAFETY: numbers only; that the range is reserved and unmapped is the caller's to know.
            unsafe { (driver.cuMemMap)(address as u64, bytes, 0, handle, 0) }
        })?;
        self.held().mappings.insert(address, bytes);
        Ok(())
    }

    /// Lets the GPU read and write a range of whole mappings.
    pub(super) fn allow_access(&self, address: usize, bytes: usize) -> Result<(), DeviceError> {
        let access = AccessDesc::read_write(self.device);
        self.call("making device memory accessible", |driver| {
            // SAFETY: the pointer is to one live description.
            unsafe { (driver.cuMemSetAccess)(address as u64, bytes, &access, 1) }
        })
    }

    /// Unmaps one mapping, given with its size.
    pub(super) fn unmap(&self, address: usize, bytes: usize) -> Result<(), DeviceError> {
        // SAFETY: numbers only; that nothing uses the range any more is the caller's to know.
        self.must("unmapping device memory", |driver| unsafe { (driver.cuMemUnmap)(address as u64, bytes) })?;
        self.held().mappings.remove(&address);
        Ok(())
    }

    /// Ends a dead context and gives back what it leaves behind. Errors are of no use to anybody here.
    fn clean_up(&mut self) {
        let functions = &self.driver.functions;
        let held = std::mem::take(self.held.get_mut().unwrap_or_else(PoisonError::into_inner));
        let mut context = std::ptr::null_mut();
        // SAFETY: whoever used the context, or memory under it, held this `Gpu`; so nobody does any more. The fresh
        // context is given back below. Every range and handle was given by the driver and is given back once.
        unsafe {
            let _ = (functions.cuDevicePrimaryCtxReset_v2)(self.device);
            if (functions.cuDevicePrimaryCtxRetain)(&mut context, self.device) != SUCCESS {
                return;
            }
            let _ = (functions.cuCtxSetCurrent)(context);
            for (address, bytes) in held.mappings {
                let _ = (functions.cuMemUnmap)(address as u64, bytes);
            }
            for handle in held.handles {
                let _ = (functions.cuMemRelease)(handle);
            }
            for (address, bytes) in held.reservations {
                let _ = (functions.cuMemAddressFree)(address as u64, bytes);
            }
            let _ = (functions.cuCtxSetCurrent)(std::ptr::null_mut());
            let _ = (functions.cuDevicePrimaryCtxRelease_v2)(self.device);
        }
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        let lost = self.lost.get().is_some();
        if lost {
            self.clean_up();
        }
        // SAFETY: this gives back the share that `open` took.
        let _ = unsafe { (self.driver.functions.cuDevicePrimaryCtxRelease_v2)(self.device) };
        if lost {
            let mut remains = self.driver.remains();
            if let Some(place) = remains.iter().position(|&ordinal| ordinal == self.ordinal) {
                remains.swap_remove(place);
            }
        }
    }
}

fn answer(code: Code) -> Result<(), Code> {
    if code == SUCCESS { Ok(()) } else { Err(code) }
}

fn read_attribute(driver: &Driver, device: DeviceHandle, which: i32) -> Option<i32> {
    let mut value = 0;
    // SAFETY: the pointer is to a live variable.
    let code = unsafe { (driver.functions.cuDeviceGetAttribute)(&mut value, which, device) };
    (code == SUCCESS).then_some(value)
}
