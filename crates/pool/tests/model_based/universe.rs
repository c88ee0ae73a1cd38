//! What a random program draws from: tensors with known bytes in a few checkpoint files, models that share some of
//! them, and the pool under test. Decides nothing about what happens to them.

use rand::rngs::Xoshiro256PlusPlus;
use rand::{Rng, RngExt};
use tangram_checkpoint::{ContentId, Hash};
use tangram_device::cuda::stand_in;
use tangram_pool::{Backend, CatalogueEntry, Part, Pool};

/// Host memory beside a device that the host cannot address: room for a third of the contents or so.
const HOST_BYTES: usize = 1 << 20;

/// Bytes of the device's pages: a GPU has none of less than 2 MiB.
fn device_page(page_bytes: usize) -> usize {
    if stand_in::page_scale() > 1 { page_bytes.max(2 << 20) } else { page_bytes }
}

/// The pool under test, over `pages` pages of `page_bytes`.
pub fn pool(backend: Backend, page_bytes: usize, pages: usize) -> Pool {
    let page = device_page(page_bytes);
    let memory = stand_in::memory_under_test((pages * page_bytes).next_multiple_of(page), page);
    let mut pool = Pool::new(memory.clone(), backend).unwrap();
    if let Some(host) = memory.host_pool() {
        host.grow(HOST_BYTES).unwrap();
        pool.keep_in_host(host);
    }
    pool
}

/// Fills a part from host memory. Gives whether that settled the tensor.
pub fn copy(part: Part) -> bool {
    let (sender, settled) = std::sync::mpsc::channel();
    part.copy_from_host(move |whole| sender.send(whole).unwrap());
    settled.recv().unwrap()
}

/// Fills a part as a loader does, from host memory if the bytes are there, else with the `content` of the tensor. Gives
/// whether that settled the tensor.
pub fn fill(mut part: Part, content: &[u8], part_bytes: usize) -> bool {
    if part.is_in_host() {
        return copy(part);
    }
    let from = part.index() * part_bytes;
    part.stage(from).unwrap();
    let bytes = part.bytes_mut().unwrap();
    bytes.copy_from_slice(&content[from..from + bytes.len()]);
    part.finish(Ok(()))
}

/// A tensor: what is in it, and in which files it can be found.
pub struct Content {
    pub id: ContentId,
    pub bytes: Vec<u8>,
    /// (checkpoint, offset in its file)
    pub places: Vec<(usize, usize)>,
}

/// A model that can be deployed, any number of times.
pub struct Model {
    pub contents: Vec<usize>,
    /// Which KV blocks it uses; models of equal identity share them.
    pub identity: usize,
}

/// Everything that exists before the program starts.
pub struct Universe {
    pub backend: Backend,
    pub page_bytes: usize,
    pub pages: usize,
    pub contents: Vec<Content>,
    /// Bytes of each checkpoint's file.
    pub files: Vec<usize>,
    pub models: Vec<Model>,
    /// Bytes of a KV block, per identity. What they lack to a multiple of the alignment is so little that all blocks
    /// that there is room for together lack less than one unit of it.
    pub block_bytes: [usize; 3],
}

const CHECKPOINTS: usize = 3;
const CONTENTS: usize = 26;
const MODELS: usize = 8;

impl Universe {
    pub fn random(backend: Backend, page_bytes: usize, random: &mut Xoshiro256PlusPlus) -> Universe {
        let mut files = vec![0usize; CHECKPOINTS];
        let contents: Vec<Content> = (0..CONTENTS)
            .map(|number| {
                let mut bytes = vec![0; random_size(page_bytes, random)];
                random.fill_bytes(&mut bytes);
                let first = random.random_range(0..CHECKPOINTS);
                let mut homes = vec![first];
                if random.random_bool(0.3) {
                    homes.push((first + 1) % CHECKPOINTS);
                }
                let places = homes.into_iter().map(|file| {
                    let offset = files[file].next_multiple_of(256);
                    files[file] = offset + bytes.len();
                    (file, offset)
                });
                let places = places.collect();
                Content { id: Hash([number as u8 + 1; 32]), bytes, places }
            })
            .collect();
        let models = (0..MODELS).map(|number| {
            let mut all: Vec<usize> = (0..CONTENTS).collect();
            let size = random.random_range(1..9);
            let contents = (0..size).map(|_| all.swap_remove(random.random_range(0..all.len()))).collect();
            Model { contents, identity: number % 3 }
        });
        let models = models.collect();
        let block_bytes = [page_bytes * 3 / 8 - 1, page_bytes, page_bytes * 5 / 4 - 2];
        let pages: usize = random.random_range(12..40);
        let pages = (pages * page_bytes).next_multiple_of(device_page(page_bytes)) / page_bytes;
        Universe { backend, page_bytes, pages, contents, files, models, block_bytes }
    }

    /// Bytes of the device.
    pub fn bytes(&self) -> usize {
        self.pages * self.page_bytes
    }

    pub fn checkpoint_name(file: usize) -> String {
        format!("checkpoint-{file}")
    }

    /// Content `number` as found at its place `place`.
    pub fn entry(&self, number: usize, place: usize) -> CatalogueEntry {
        let content = &self.contents[number];
        let (file, offset) = content.places[place % content.places.len()];
        CatalogueEntry {
            id: content.id,
            checkpoint: Self::checkpoint_name(file),
            offset: offset as u64,
            bytes: content.bytes.len() as u64,
            depth: number as f64 / CONTENTS as f64,
        }
    }

    /// Size of a checkpoint's file by its name.
    pub fn file_bytes(&self, name: &str) -> u64 {
        let file = (0..self.files.len()).find(|&file| Self::checkpoint_name(file) == name);
        self.files[file.unwrap()] as u64
    }
}

/// Sizes at which mistakes show: a byte, a few hundred, just around a page, several pages.
fn random_size(page_bytes: usize, random: &mut Xoshiro256PlusPlus) -> usize {
    match random.random_range(0..8) {
        0 => random.random_range(1..300),
        1 | 2 => random.random_range(1..page_bytes),
        3 => page_bytes - 1 + random.random_range(0..3),
        4 => 2 * page_bytes - 1 + random.random_range(0..3),
        5 | 6 => random.random_range(page_bytes / 2..2 * page_bytes),
        _ => random.random_range(2 * page_bytes..5 * page_bytes),
    }
}
