//! The machine's own limits, in the same run as what is held against them: a plain pinned copy to the GPU, and a copy
//! within its memory.

use std::error::Error;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Instant;

use tangram_device::cuda::{CudaConfig, CudaDevice, Driver};
use tangram_device::{Arena, Claim, Contents, Piece};

/// Of each limit, the best of so many.
const ROUNDS: usize = 5;

/// Bytes per second.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// From one large pinned buffer.
    pub(crate) upload: f64,
    /// Of device memory, read and written together, by the copy of the driver.
    pub(crate) memory: f64,
}

/// Measures them with two pieces of `bytes` bytes, a whole number of MiB.
pub(crate) fn measure(driver: &Arc<Driver>, bytes: usize) -> Result<Limits, Box<dyn Error>> {
    let config = CudaConfig {
        pool_bytes: Some(2 * bytes + (8 << 20)),
        reserve_bytes: Some(0),
        buffers: 1,
        buffer_bytes: bytes,
        ..CudaConfig::new(0)
    };
    let memory = CudaDevice::open(driver, &config)?.into_memory();
    let staging = memory.staging().ok_or("there is no ring of buffers")?;
    let arena = Arena::segment(memory.clone())?;
    let mut upload = 0.0f64;
    for _ in 0..ROUNDS {
        let extent = arena
            .claim_all(&[Claim { offset: 0, len: bytes }], Contents::Overwritten)?
            .pop()
            .ok_or("no extent")?;
        let buffer = staging.take()?;
        let (sender, ended) = mpsc::channel();
        let started = Instant::now();
        memory.upload(buffer, vec![Piece { from: 0, extent }], move |extents, result| {
            drop(extents);
            // The receiver waits for it.
            let _ = sender.send(result);
        });
        ended.recv()??;
        upload = upload.max(bytes as f64 / started.elapsed().as_secs_f64());
    }
    let mut extent = arena.claim(0, bytes)?;
    let mut copied = 0.0f64;
    for place in [bytes, 0, bytes, 0, bytes] {
        let started = Instant::now();
        extent.move_to(place)?;
        copied = copied.max(2.0 * bytes as f64 / started.elapsed().as_secs_f64());
    }
    Ok(Limits { upload, memory: copied })
}
