//! The driver's entry points, under their names.
//!
//! Safety of all of them: the caller passes pointers as the driver's documentation demands, valid for what it says is
//! read or written through them.

#![allow(non_snake_case)]

use std::cell::Cell;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::os::fd::IntoRawFd;
use std::sync::PoisonError;

use crate::gpu::{Gpu, INVALID_CONTEXT, INVALID_DEVICE, INVALID_HANDLE, INVALID_VALUE, Outcome, SUCCESS};
use crate::streams::Work;
use crate::{device, devices};

thread_local! {
    /// Ordinal of the device whose context is current.
    static CURRENT: Cell<Option<i32>> = const { Cell::new(None) };
}

/// Opaque pointers are small numbers above this.
const OPAQUE: usize = 0x1000;

fn opaque(number: usize) -> *mut c_void {
    (OPAQUE + number) as *mut c_void
}

fn number(opaque: *mut c_void) -> usize {
    (opaque as usize).wrapping_sub(OPAQUE)
}

fn code(outcome: Outcome) -> c_int {
    outcome.err().unwrap_or(SUCCESS)
}

/// A call that names its device.
fn on(ordinal: c_int, call: &str, run: impl FnOnce(&mut Gpu) -> Outcome) -> c_int {
    let Some(gpu) = device(ordinal) else { return INVALID_DEVICE };
    let mut gpu = gpu.lock().unwrap_or_else(PoisonError::into_inner);
    code(gpu.enter(call).and_then(|()| run(&mut gpu)))
}

/// A call in the current context.
fn here(call: &str, run: impl FnOnce(&mut Gpu) -> Outcome) -> c_int {
    let Some(ordinal) = CURRENT.get() else { return INVALID_CONTEXT };
    on(ordinal, call, |gpu| if gpu.has_context() { run(gpu) } else { Err(INVALID_CONTEXT) })
}

/// Writes an answer to where the caller wants it.
///
/// # Safety
/// `to` must be null or valid for writing a `T`.
unsafe fn put<T>(to: *mut T, value: T) -> Outcome {
    if to.is_null() {
        return Err(INVALID_VALUE);
    }
    // SAFETY: not null, and valid as the caller says.
    unsafe { to.write(value) };
    Ok(())
}

/// What `cuMemCreate` is told of the memory; the beginning of `CUmemAllocationProp`.
#[repr(C)]
struct AllocationProp {
    kind: c_int,
    handle_types: c_int,
    location_kind: c_int,
    location: c_int,
}

/// `CUDA_KERNEL_NODE_PARAMS_v2`.
#[repr(C)]
struct KernelNodeParams {
    function: *mut c_void,
    grid: [c_uint; 3],
    block: [c_uint; 3],
    shared_bytes: c_uint,
    parameters: *mut *const c_void,
    extra: *mut *mut c_void,
    kernel: *mut c_void,
    context: *mut c_void,
}

/// `CUmemAccessDesc`.
#[repr(C)]
struct AccessDesc {
    location_kind: c_int,
    location: c_int,
    flags: c_int,
}

macro_rules! entry_points {
    ($($(#[$meta:meta])* fn $name:ident($($argument:ident: $type:ty),* $(,)?) $body:block)*) => {
        $(
            $(#[$meta])*
            #[unsafe(no_mangle)]
            unsafe extern "C" fn $name($($argument: $type),*) -> c_int {
                // SAFETY: as the file's first lines say.
                #[allow(unused_unsafe)]
                unsafe { $body }
            }
        )*

        pub(crate) fn symbol(name: &str) -> Option<*const c_void> {
            match name {
                $(stringify!($name) => Some($name as *const c_void),)*
                _ => None,
            }
        }
    };
}

entry_points! {
    fn cuInit(_flags: c_uint) {
        const NO_DEVICE: c_int = 100;
        if devices().is_empty() { NO_DEVICE } else { SUCCESS }
    }

    fn cuDriverGetVersion(version: *mut c_int) {
        code(put(version, 13_000))
    }

    fn cuGetErrorName(error: c_int, name: *mut *const c_char) {
        let text: &CStr = match error {
            1 => c"CUDA_ERROR_INVALID_VALUE",
            2 => c"CUDA_ERROR_OUT_OF_MEMORY",
            100 => c"CUDA_ERROR_NO_DEVICE",
            101 => c"CUDA_ERROR_INVALID_DEVICE",
            201 => c"CUDA_ERROR_INVALID_CONTEXT",
            214 => c"CUDA_ERROR_ECC_UNCORRECTABLE",
            400 => c"CUDA_ERROR_INVALID_HANDLE",
            500 => c"CUDA_ERROR_NOT_FOUND",
            700 => c"CUDA_ERROR_ILLEGAL_ADDRESS",
            719 => c"CUDA_ERROR_LAUNCH_FAILED",
            _ => return INVALID_VALUE,
        };
        code(put(name, text.as_ptr()))
    }

    fn cuDeviceGetCount(count: *mut c_int) {
        code(put(count, devices().len() as c_int))
    }

    fn cuDeviceGet(found: *mut c_int, ordinal: c_int) {
        on(ordinal, "cuDeviceGet", |_| put(found, ordinal))
    }

    fn cuDeviceGetName(name: *mut c_char, len: c_int, ordinal: c_int) {
        on(ordinal, "cuDeviceGetName", |_| {
            let text = c"stand-in without a GPU".to_bytes_with_nul();
            if name.is_null() || (len as usize) < text.len() {
                return Err(INVALID_VALUE);
            }
            std::ptr::copy_nonoverlapping(text.as_ptr().cast(), name, text.len());
            Ok(())
        })
    }

    fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, ordinal: c_int) {
        on(ordinal, "cuDeviceGetAttribute", |_| {
            let answer = match attribute {
                // Multiprocessors.
                16 => 4,
                // Compute capability.
                75 => 9,
                76 => 0,
                // Virtual memory management, export as file descriptors.
                102 | 103 => 1,
                _ => return Err(INVALID_VALUE),
            };
            put(value, answer)
        })
    }

    fn cuDevicePrimaryCtxRetain(context: *mut *mut c_void, ordinal: c_int) {
        on(ordinal, "cuDevicePrimaryCtxRetain", |gpu| {
            put(context, opaque(ordinal as usize))?;
            gpu.retain();
            Ok(())
        })
    }

    fn cuDevicePrimaryCtxRelease_v2(ordinal: c_int) {
        on(ordinal, "cuDevicePrimaryCtxRelease_v2", Gpu::release)
    }

    fn cuDevicePrimaryCtxReset_v2(ordinal: c_int) {
        // Not refused to a dead context: this is what brings it back.
        let Some(gpu) = device(ordinal) else { return INVALID_DEVICE };
        gpu.lock().unwrap_or_else(PoisonError::into_inner).reset();
        SUCCESS
    }

    fn cuCtxSetCurrent(context: *mut c_void) {
        if context.is_null() {
            CURRENT.set(None);
            return SUCCESS;
        }
        let ordinal = number(context) as c_int;
        if device(ordinal).is_none() {
            return INVALID_CONTEXT;
        }
        CURRENT.set(Some(ordinal));
        SUCCESS
    }

    fn cuMemGetInfo_v2(free: *mut usize, total: *mut usize) {
        here("cuMemGetInfo_v2", |gpu| {
            put(free, gpu.free())?;
            put(total, gpu.total())
        })
    }

    fn cuMemGetAllocationGranularity(granularity: *mut usize, prop: *const AllocationProp, _option: c_int) {
        here("cuMemGetAllocationGranularity", |gpu| {
            if prop.is_null() {
                return Err(INVALID_VALUE);
            }
            put(granularity, gpu.granularity())
        })
    }

    fn cuMemAddressReserve(address: *mut u64, bytes: usize, alignment: usize, _wish: u64, flags: u64) {
        here("cuMemAddressReserve", |gpu| {
            if flags != 0 {
                return Err(INVALID_VALUE);
            }
            let reserved = gpu.reserve(bytes, alignment)?;
            put(address, reserved as u64)
        })
    }

    fn cuMemAddressFree(address: u64, bytes: usize) {
        here("cuMemAddressFree", |gpu| gpu.unreserve(address as usize, bytes))
    }

    fn cuMemCreate(handle: *mut u64, bytes: usize, prop: *const AllocationProp, flags: u64) {
        here("cuMemCreate", |gpu| {
            let Some(prop) = prop.as_ref() else { return Err(INVALID_VALUE) };
            // Pinned memory on a device, exportable as a file descriptor.
            if flags != 0 || (prop.kind, prop.handle_types, prop.location_kind) != (1, 1, 1) {
                return Err(INVALID_VALUE);
            }
            if Some(prop.location) != CURRENT.get() {
                return gpu.violation(format!("memory of device {} is created in another's context", prop.location));
            }
            let created = gpu.create(bytes)?;
            put(handle, created)
        })
    }

    fn cuMemRelease(handle: u64) {
        here("cuMemRelease", |gpu| gpu.release_handle(handle))
    }

    fn cuMemMap(address: u64, bytes: usize, offset: usize, handle: u64, flags: u64) {
        here("cuMemMap", |gpu| match flags {
            0 => gpu.map(address as usize, bytes, offset, handle),
            _ => Err(INVALID_VALUE),
        })
    }

    fn cuMemSetAccess(address: u64, bytes: usize, desc: *const AccessDesc, count: usize) {
        here("cuMemSetAccess", |gpu| {
            let Some(desc) = desc.as_ref() else { return Err(INVALID_VALUE) };
            if count != 1 || (desc.location_kind, desc.flags) != (1, 3) || Some(desc.location) != CURRENT.get() {
                return gpu.violation("access by another than the memory's own device".to_owned());
            }
            gpu.set_access(address as usize, bytes)
        })
    }

    fn cuMemUnmap(address: u64, bytes: usize) {
        here("cuMemUnmap", |gpu| gpu.unmap(address as usize, bytes))
    }

    fn cuMemExportToShareableHandle(shareable: *mut c_void, handle: u64, kind: c_int, flags: u64) {
        here("cuMemExportToShareableHandle", |gpu| {
            if kind != 1 || flags != 0 || shareable.is_null() {
                return Err(INVALID_VALUE);
            }
            let file = gpu.export(handle)?;
            put(shareable.cast::<c_int>(), file.into_raw_fd())
        })
    }

    fn cuMemHostAlloc(address: *mut *mut c_void, bytes: usize, _flags: c_uint) {
        here("cuMemHostAlloc", |gpu| {
            let pinned = gpu.pin(bytes)?;
            put(address, pinned as *mut c_void)
        })
    }

    fn cuMemFreeHost(address: *mut c_void) {
        here("cuMemFreeHost", |gpu| gpu.unpin(address as usize))
    }

    fn cuStreamCreate(stream: *mut *mut c_void, _flags: c_uint) {
        here("cuStreamCreate", |gpu| {
            let created = gpu.streams.create();
            put(stream, opaque(created))
        })
    }

    fn cuStreamDestroy_v2(stream: *mut c_void) {
        here("cuStreamDestroy_v2", |gpu| {
            // The driver lets the stream's work end first.
            let stream = number(stream);
            gpu.run_until(stream, gpu.streams.submitted(stream))?;
            if gpu.streams.destroy(stream) { Ok(()) } else { Err(INVALID_HANDLE) }
        })
    }

    fn cuStreamSynchronize(stream: *mut c_void) {
        here("cuStreamSynchronize", |gpu| {
            let stream = number(stream);
            if !gpu.streams.exists(stream) {
                return Err(INVALID_HANDLE);
            }
            gpu.run_until(stream, gpu.streams.submitted(stream))
        })
    }

    fn cuEventCreate(event: *mut *mut c_void, _flags: c_uint) {
        here("cuEventCreate", |gpu| {
            let created = gpu.streams.create_event();
            put(event, opaque(created))
        })
    }

    fn cuEventDestroy_v2(event: *mut c_void) {
        here("cuEventDestroy_v2", |gpu| {
            if gpu.streams.destroy_event(number(event)) { Ok(()) } else { Err(INVALID_HANDLE) }
        })
    }

    fn cuEventRecord(event: *mut c_void, stream: *mut c_void) {
        here("cuEventRecord", |gpu| {
            if gpu.streams.record(number(event), number(stream)) { Ok(()) } else { Err(INVALID_HANDLE) }
        })
    }

    fn cuEventSynchronize(event: *mut c_void) {
        here("cuEventSynchronize", |gpu| match gpu.streams.awaited(number(event)) {
            None => Err(INVALID_HANDLE),
            // An event that was never recorded is over.
            Some(None) => Ok(()),
            Some(Some((stream, until))) => gpu.run_until(stream, until),
        })
    }

    fn cuMemcpyHtoDAsync_v2(to: u64, from: *const c_void, bytes: usize, stream: *mut c_void) {
        here("cuMemcpyHtoDAsync_v2", |gpu| {
            let (from, to) = (from as usize, to as usize);
            let work = if gpu.is_pinned(from, bytes) {
                Work::ToDevice { from, to, bytes }
            } else {
                // The driver copies pageable memory aside before it returns.
                Work::Write { from: std::slice::from_raw_parts(from as *const u8, bytes).to_vec(), to }
            };
            gpu.submit(number(stream), work)
        })
    }

    fn cuMemcpyDtoHAsync_v2(to: *mut c_void, from: u64, bytes: usize, stream: *mut c_void) {
        here("cuMemcpyDtoHAsync_v2", |gpu| {
            let (stream, from, to) = (number(stream), from as usize, to as usize);
            if gpu.is_pinned(to, bytes) {
                return gpu.submit(stream, Work::ToHost { from, to, bytes });
            }
            // To pageable memory the driver copies before it returns.
            gpu.run_until(stream, gpu.streams.submitted(stream))?;
            if !gpu.is_accessible(from, bytes) {
                return gpu.violation(format!("{from:#x}+{bytes} is read, which is not accessible"));
            }
            std::ptr::copy_nonoverlapping(from as *const u8, to as *mut u8, bytes);
            Ok(())
        })
    }

    fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: *mut c_void) {
        here("cuMemcpyDtoDAsync_v2", |gpu| {
            gpu.submit(number(stream), Work::Within { from: from as usize, to: to as usize, bytes })
        })
    }

    fn cuMemsetD8Async(to: u64, value: u8, bytes: usize, stream: *mut c_void) {
        here("cuMemsetD8Async", |gpu| {
            gpu.submit(number(stream), Work::Fill { to: to as usize, bytes, value })
        })
    }

    fn cuMemAlloc_v2(address: *mut u64, bytes: usize) {
        here("cuMemAlloc_v2", |gpu| {
            let allocated = gpu.allocate(bytes)?;
            put(address, allocated as u64)
        })
    }

    fn cuMemFree_v2(address: u64) {
        here("cuMemFree_v2", |gpu| gpu.free_plain(address as usize))
    }

    fn cuModuleLoadData(module: *mut *mut c_void, image: *const c_void) {
        here("cuModuleLoadData", |gpu| {
            if image.is_null() {
                return Err(INVALID_VALUE);
            }
            gpu.modules += 1;
            put(module, opaque(gpu.modules))
        })
    }

    fn cuModuleUnload(_module: *mut c_void) {
        here("cuModuleUnload", |gpu| match gpu.modules {
            0 => Err(INVALID_HANDLE),
            _ => {
                gpu.modules -= 1;
                Ok(())
            }
        })
    }

    fn cuModuleGetFunction(function: *mut *mut c_void, _module: *mut c_void, name: *const c_char) {
        here("cuModuleGetFunction", |gpu| {
            if name.is_null() {
                return Err(INVALID_VALUE);
            }
            let found = gpu.function(CStr::from_ptr(name))?;
            put(function, opaque(found))
        })
    }

    fn cuFuncSetAttribute(function: *mut c_void, attribute: c_int, value: c_int) {
        here("cuFuncSetAttribute", |gpu| match (attribute, u32::try_from(value)) {
            // The most dynamic shared memory.
            (8, Ok(bytes)) => gpu.allow_shared(number(function), bytes),
            _ => Err(INVALID_VALUE),
        })
    }

    fn cuLaunchKernel(
        function: *mut c_void,
        x: c_uint,
        y: c_uint,
        z: c_uint,
        threads: c_uint,
        threads_y: c_uint,
        threads_z: c_uint,
        shared_bytes: c_uint,
        stream: *mut c_void,
        parameters: *mut *const c_void,
        _extra: *mut *mut c_void,
    ) {
        here("cuLaunchKernel", |gpu| {
            // Blocks here have one dimension, and kernels one parameter.
            if threads_y != 1 || threads_z != 1 || parameters.is_null() {
                return Err(INVALID_VALUE);
            }
            let work = gpu.launch(number(function), [x, y, z], threads, shared_bytes, *parameters)?;
            gpu.submit(number(stream), work)
        })
    }

    fn cuGraphCreate(graph: *mut *mut c_void, flags: c_uint) {
        here("cuGraphCreate", |gpu| match flags {
            0 => put(graph, opaque(gpu.graphs.create())),
            _ => Err(INVALID_VALUE),
        })
    }

    fn cuGraphAddKernelNode_v2(
        node: *mut *mut c_void,
        graph: *mut c_void,
        dependencies: *const *mut c_void,
        count: usize,
        params: *const KernelNodeParams,
    ) {
        here("cuGraphAddKernelNode_v2", |gpu| {
            let Some(params) = params.as_ref() else { return Err(INVALID_VALUE) };
            let [threads, 1, 1] = params.block else { return Err(INVALID_VALUE) };
            if params.parameters.is_null() || !params.extra.is_null() || (count > 0 && dependencies.is_null()) {
                return Err(INVALID_VALUE);
            }
            let before: Vec<usize> = (0..count).map(|index| number(*dependencies.add(index))).collect();
            let function = number(params.function);
            let work = gpu.launch(function, params.grid, threads, params.shared_bytes, *params.parameters)?;
            match gpu.graphs.add(number(graph), &before, work) {
                Ok(added) => put(node, opaque(added)),
                Err(problem) => gpu.violation(problem),
            }
        })
    }

    fn cuGraphInstantiateWithFlags(exec: *mut *mut c_void, graph: *mut c_void, flags: u64) {
        here("cuGraphInstantiateWithFlags", |gpu| {
            let made = gpu.graphs.instantiate(number(graph)).filter(|_| flags == 0).ok_or(INVALID_VALUE)?;
            put(exec, opaque(made))
        })
    }

    fn cuGraphDestroy(graph: *mut c_void) {
        here("cuGraphDestroy", |gpu| match gpu.graphs.destroy(number(graph)) {
            true => Ok(()),
            false => gpu.violation("a graph is destroyed that there is not".to_owned()),
        })
    }

    fn cuGraphUpload(exec: *mut c_void, stream: *mut c_void) {
        here("cuGraphUpload", |gpu| {
            let known = gpu.graphs.launches(number(exec)).is_some() && gpu.streams.exists(number(stream));
            if known { Ok(()) } else { Err(INVALID_HANDLE) }
        })
    }

    fn cuGraphLaunch(exec: *mut c_void, stream: *mut c_void) {
        here("cuGraphLaunch", |gpu| {
            let Some(launches) = gpu.graphs.launches(number(exec)) else {
                return gpu.violation("a graph is launched that there is not".to_owned());
            };
            launches.into_iter().try_for_each(|work| gpu.submit(number(stream), work))
        })
    }

    fn cuGraphExecDestroy(exec: *mut c_void) {
        here("cuGraphExecDestroy", |gpu| {
            let exec = number(exec);
            if gpu.streams.runs(exec) {
                // The driver would let it end; whoever does this does not know what his memory is used for.
                return gpu.violation("a graph is destroyed whose work has not been done".to_owned());
            }
            match gpu.graphs.destroy_exec(exec) {
                true => Ok(()),
                false => gpu.violation("a graph is destroyed that there is not".to_owned()),
            }
        })
    }
}
