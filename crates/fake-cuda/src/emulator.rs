//! Kernels, where somebody says where there are any: a shared library that computes what a GPU would.
//!
//! The library (`crates/engine/kernels/emulator`) is made of the kernels' own sources by the C++ compiler of this machine,
//! when a test asks for it. Without one kernels do nothing.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

const FLAGS: [&str; 8] =
    ["-std=c++17", "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"];

type Find = unsafe extern "C" fn(*const c_char, *mut u32, *mut u32) -> *const c_void;
type Run = unsafe extern "C" fn(*const c_void, u32, u32, u32, u32, *const c_void) -> c_int;
type Order = unsafe extern "C" fn(u64);

/// The functions of the loaded library.
pub(crate) struct Emulator {
    find: Find,
    run: Run,
    order: Order,
    /// It runs one kernel at a time.
    turn: Mutex<()>,
}

/// A kernel that can be run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kernel {
    handle: usize,
    /// Threads of a block.
    pub(crate) threads: u32,
    /// Bytes of its argument structure.
    pub(crate) argument_bytes: u32,
}

static EMULATOR: OnceLock<Option<Emulator>> = OnceLock::new();

/// The library that this process was given, or that `FAKE_CUDA_KERNELS` names.
pub(crate) fn get() -> Option<&'static Emulator> {
    let named = || std::env::var_os("FAKE_CUDA_KERNELS").and_then(|path| load(Path::new(&path)));
    EMULATOR.get_or_init(named).as_ref()
}

/// Lets the stand-ins of this process run kernels, from a library made by [`build_emulator`]. To be called before any
/// kernel is looked for.
///
/// # Panics
/// When it is not such a library, or it is too late.
pub fn run_kernels(library: &Path) {
    let loaded = load(library);
    assert!(loaded.is_some(), "{} is no emulator", library.display());
    let emulator = EMULATOR.get_or_init(|| loaded);
    assert!(emulator.is_some(), "kernels were looked for before there was an emulator");
}

/// Chooses the order in which threads and blocks run from now on: 0 ascending, 1 descending, else random. Odd orders carry
/// out asynchronous copies at once, even ones as late as they may.
pub fn order_threads(order: u64) {
    if let Some(emulator) = get() {
        let _turn = emulator.turn();
        // SAFETY: this is the function's signature in `emulator.cpp`, and nobody else is in the library.
        unsafe { (emulator.order)(order) }
    }
}

fn load(path: &Path) -> Option<Emulator> {
    // SAFETY: the library registers its kernels when it is loaded, and does nothing else.
    let library = unsafe { libloading::Library::new(path) }.ok()?;
    // SAFETY: these are the signatures in `emulator.cpp`.
    let emulator = unsafe {
        Emulator {
            find: *library.get::<Find>(b"emulator_find").ok()?,
            run: *library.get::<Run>(b"emulator_launch").ok()?,
            order: *library.get::<Order>(b"emulator_order").ok()?,
            turn: Mutex::new(()),
        }
    };
    // Its functions are called until the process ends.
    std::mem::forget(library);
    Some(emulator)
}

impl Emulator {
    fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn find(&self, name: &CStr) -> Option<Kernel> {
        let (mut threads, mut argument_bytes) = (0, 0);
        // SAFETY: the pointers are to a string that ends with 0 and to live variables.
        let handle = unsafe { (self.find)(name.as_ptr(), &mut threads, &mut argument_bytes) };
        (!handle.is_null()).then_some(Kernel { handle: handle as usize, threads, argument_bytes })
    }

    /// Runs a kernel to its end; `false` if it did what no kernel may do.
    ///
    /// # Safety
    /// `arguments` must be the kernel's structure, and what it points to accessible. (What is not faults, and the process
    /// ends with the kernel's name.)
    pub(crate) unsafe fn run(
        &self,
        kernel: Kernel,
        [x, y, z]: [u32; 3],
        shared_bytes: u32,
        arguments: &[u8],
    ) -> bool {
        // As aligned as the structure wants to be.
        let mut aligned = vec![0u64; arguments.len().div_ceil(8)];
        // SAFETY: there is room for them, and the two are apart.
        unsafe {
            std::ptr::copy_nonoverlapping(arguments.as_ptr(), aligned.as_mut_ptr().cast(), arguments.len());
        }
        let _turn = self.turn();
        // SAFETY: the handle is one that `find` gave; the rest is as the caller says.
        unsafe {
            (self.run)(kernel.handle as *const c_void, x, y, z, shared_bytes, aligned.as_ptr().cast()) == 0
        }
    }
}

/// Compiles the kernels for the processor and gives the library, which is kept in `folder` until a source changes. `None`
/// where that cannot be: it takes x86-64 and a C++ compiler (`CXX`, or `c++`) that knows `_Float16`.
///
/// # Panics
/// When a compiler that is good enough refuses the kernels.
pub fn build_emulator(folder: &Path) -> Option<PathBuf> {
    static BUILT: OnceLock<Option<PathBuf>> = OnceLock::new();
    BUILT.get_or_init(|| if cfg!(target_arch = "x86_64") { build(folder) } else { None }).clone()
}

fn build(folder: &Path) -> Option<PathBuf> {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("../engine/kernels");
    let library = folder.join(format!("libtangram-emulator-{:016x}.so", identity(&kernels, &compiler)));
    if library.exists() {
        return Some(library);
    }
    // Under its final name only when it is whole: other processes may want it too.
    let unfinished = library.with_extension(std::process::id().to_string());
    let source = kernels.join("emulator/emulator.cpp");
    let run = Command::new(&compiler).args(FLAGS).arg(&source).arg("-o").arg(&unfinished).output();
    match run {
        Ok(run) if run.status.success() => std::fs::rename(&unfinished, &library).ok().map(|()| library),
        // A compiler that is there must be able to compile the kernels.
        Ok(run) if compiles_half_floats(&compiler) => {
            panic!("{compiler}: {}", String::from_utf8_lossy(&run.stderr))
        }
        _ => None,
    }
}

/// A number that is different for other sources, another compiler or other flags.
fn identity(kernels: &Path, compiler: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    (compiler, FLAGS).hash(&mut hasher);
    for folder in ["cuda", "emulator"] {
        let files = kernels.join(folder).read_dir().into_iter().flatten().flatten();
        let mut paths: Vec<PathBuf> = files.map(|file| file.path()).collect();
        paths.sort();
        for path in paths {
            (path.file_name(), std::fs::read(&path).ok()).hash(&mut hasher);
        }
    }
    hasher.finish()
}

fn compiles_half_floats(compiler: &str) -> bool {
    let arguments = ["-std=c++17", "-fsyntax-only", "-x", "c++", "-"];
    let run = Command::new(compiler).args(arguments).stdin(Stdio::piped()).stderr(Stdio::null()).spawn();
    run.is_ok_and(|mut run| {
        let source = b"_Float16 half(float x) { return static_cast<_Float16>(x); }";
        let written = run.stdin.take().is_some_and(|mut input| input.write_all(source).is_ok());
        written && run.wait().is_ok_and(|status| status.success())
    })
}
