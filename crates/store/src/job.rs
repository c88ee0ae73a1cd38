//! One part of a tensor on its way: how the bytes that were read become the bytes of the part, checked while they are hot.
//!
//! This is the seam for everything that lies between a file's bytes and a tensor's. That is nothing (they were read to
//! their place), or a copy out of an aligned buffer or the page cache, with the chunk's checksum computed while its bytes are
//! in the processor's cache. Of a compressed chunk the stored bytes stay in the buffer, are verified there and decoded to their place.
//! Nobody can read a part before [`Job::finish`].

use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use tangram_checkpoint::Checksum;
use tangram_codec::Format;
use tangram_pool::{LoadFailure, Part};

use crate::buffer::Buffer;
use crate::file::DataFile;
use crate::schedule::{LoadId, Urgency};
use crate::trust::Trust;
use crate::{Arrived, Notify, Observe, Wake};

/// Bytes that are read from the page cache before they are verified: they fit a core's own cache.
const HOT_BYTES: usize = 256 << 10;

/// Stored bytes that do not match their checksum.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// The file.
    pub file: PathBuf,
    /// The tensor, as errors call it.
    pub tensor: String,
    /// First byte of the tensor in the file.
    pub offset: u64,
}

/// What is stored instead of a part's bytes.
#[derive(Clone, Copy)]
pub(crate) struct Frame {
    /// What it decodes to.
    pub(crate) format: Format,
    /// Where it begins in the buffer.
    pub(crate) at: usize,
}

/// A part and all that is needed to fill it.
pub(crate) struct Job {
    pub(crate) part: Part,
    pub(crate) load: LoadId,
    pub(crate) urgency: Urgency,
    pub(crate) file: Arc<DataFile>,
    /// First byte of the tensor in the file.
    pub(crate) tensor_offset: u64,
    /// First byte of the part in the file.
    pub(crate) offset: u64,
    pub(crate) len: usize,
    /// Of a part that is stored compressed.
    pub(crate) frame: Option<Frame>,
    /// What its bytes are compared with; `None` if they are not.
    pub(crate) sum: Option<Checksum>,
    pub(crate) name: Arc<str>,
    pub(crate) wake: Wake,
    pub(crate) damaged: Notify,
    pub(crate) observe: Option<Observe>,
    pub(crate) trust: Arc<Trust>,
    /// The page cache was found not to have it.
    pub(crate) uncached: bool,
    /// What was not read straight to its place, and where in the part that belongs.
    pub(crate) buffer: Option<Buffer>,
    pub(crate) copies: Vec<(Range<usize>, usize)>,
}

/// How a job's bytes come.
pub(crate) enum Arrival {
    /// They are to be copied from the page cache.
    Cached,
    /// They were read from the disk, or could not be.
    Read(io::Result<()>),
}

/// Where a job stands after it has landed.
pub(crate) enum Landed {
    /// It is over. Its buffer can be used again.
    Over(Option<Buffer>),
    /// The page cache has lost it: it has to be read from the disk.
    Again(Box<Job>),
}

impl Job {
    /// Ends the part and tells who waits.
    pub(crate) fn finish(self, result: Result<(), String>) -> Option<Buffer> {
        let failure = |problem| {
            let path = self.file.path().display();
            let text = format!(
                "tensor {}: {problem} (file {path}); deploy the model again from its source",
                self.name
            );
            LoadFailure::Failed(text)
        };
        let result = result.map_err(failure);
        self.settle(result)
    }

    /// Ends the part of a tensor that nobody waits for any more.
    pub(crate) fn abandon(self) {
        self.settle(Err(LoadFailure::Abandoned));
    }

    fn settle(self, result: Result<(), LoadFailure>) -> Option<Buffer> {
        let Job { part, wake, buffer, observe, file, tensor_offset, .. } = self;
        let observe = observe.filter(|_| result.is_ok());
        let bytes = part.len();
        // On a device that the host cannot address the bytes are still on their way there.
        part.finish_then(result, move |whole| {
            if let Some(observe) = observe {
                let arrived = Arrived { file: file.path(), tensor: tensor_offset, bytes };
                let _ = catch_unwind(AssertUnwindSafe(|| observe(arrived)));
            }
            if whole {
                // A thread that works for everybody must survive what a caller does.
                let _ = catch_unwind(AssertUnwindSafe(|| wake()));
            }
        });
        buffer
    }

    /// Whether landing takes far less time than reading did: the bytes are where they belong and only have to be compared
    /// with a checksum that is computed as fast as memory is read.
    pub(crate) fn is_light(&self, arrival: &Arrival) -> bool {
        let is_read = matches!(arrival, Arrival::Read(_)) && self.frame.is_none();
        is_read && !matches!(self.sum, Some(Checksum::Blake3(_)))
    }

    /// Takes in the bytes and verifies them.
    pub(crate) fn land(mut self, arrival: Arrival) -> Landed {
        let right = match arrival {
            Arrival::Cached => match self.take_from_cache() {
                Some(right) => right,
                None => {
                    self.uncached = true;
                    self.file.is_not_cached();
                    return Landed::Again(Box::new(self));
                }
            },
            Arrival::Read(Ok(())) => self.take_from_buffer(),
            Arrival::Read(Err(error)) => {
                let problem = describe(&error);
                return Landed::Over(self.finish(Err(problem)));
            }
        };
        let result = if right || self.read_again() {
            self.decode()
        } else {
            let file = self.file.path().to_owned();
            let damage = Damage { file, tensor: self.name.to_string(), offset: self.tensor_offset };
            let _ = catch_unwind(AssertUnwindSafe(|| (self.damaged)(&damage)));
            Err(format!(
                "the stored bytes at offset {} do not match their checksum: the file is damaged",
                self.offset
            ))
        };
        Landed::Over(self.finish(result))
    }

    /// Where the stored bytes are, or belong: the part, or the buffer.
    fn stored(&mut self) -> Option<&mut [u8]> {
        match self.frame {
            None => self.part.bytes_mut(),
            Some(Frame { at, .. }) => self.buffer.as_mut()?.bytes().get_mut(at..at + self.len),
        }
    }

    /// Makes the part's bytes of those that are stored.
    fn decode(&mut self) -> Result<(), String> {
        let Some(Frame { format, at }) = self.frame else { return Ok(()) };
        let stored = self.buffer.as_mut().and_then(|buffer| buffer.bytes().get(at..at + self.len));
        let (stored, bytes) = stored.zip(self.part.bytes_mut()).ok_or("it was not read")?;
        tangram_codec::decode(format, stored, bytes)
            .map_err(|error| format!("the stored bytes at offset {} are of no use: {error}", self.offset))
    }

    /// Copies from the page cache; says whether the bytes are right, which is not asked again if they were not long ago.
    /// `None` if not all of it is there.
    fn take_from_cache(&mut self) -> Option<bool> {
        let Some(sum) = self.sum else { return self.copy_mapped(None).or_else(|| self.copy_read(None)) };
        let (file, now) = (self.file.cached().clone(), Instant::now());
        // Of a file that could change unseen only what has been copied is verified.
        let Some(stamp) = self.trust.stamp(&file) else { return self.copy_read(Some(sum)) };
        let known = self.trust.holds(stamp, self.offset, sum, now);
        let unknown = Some(sum).filter(|_| !known);
        let right = self.copy_mapped(unknown).or_else(|| self.copy_read(unknown))?;
        // What was there may have changed while it was copied.
        if self.trust.stamp(&file) != Some(stamp) {
            return Some(self.is_right());
        }
        if right && !known {
            self.trust.note(stamp, self.offset, sum, now);
        }
        Some(right)
    }

    /// Copies from the page cache through the file's mapping; says whether the bytes there had the checksum, if one is
    /// given. `None` if that cannot be, or not all of it is there.
    fn copy_mapped(&mut self, sum: Option<Checksum>) -> Option<bool> {
        let mapping = self.file.mapping()?.clone();
        mapping.is_ready(self.file.cached(), self.offset, self.len).filter(|&ready| ready)?;
        let mut run = sum.map(|sum| sum.run());
        // What is stored compressed is decoded next.
        let (offset, soon) = (self.offset, self.frame.is_some());
        mapping.copy(offset, self.stored()?, soon, run.as_mut()).then(|| run.map(|run| run.finish()) == sum)
    }

    /// Copies from the page cache by reads that never wait for the disk; says whether the copied bytes have the checksum,
    /// if one is given. `None` if not all of it is there.
    fn copy_read(&mut self, sum: Option<Checksum>) -> Option<bool> {
        let mut run = sum.map(|sum| sum.run());
        let step = if run.is_some() { HOT_BYTES } else { self.len };
        let (file, mut offset) = (self.file.clone(), self.offset);
        for piece in self.stored()?.chunks_mut(step) {
            if !file.read_cached(offset, piece) {
                return None;
            }
            offset += piece.len() as u64;
            if let Some(run) = &mut run {
                run.update(piece);
            }
        }
        Some(run.map(|run| run.finish()) == sum)
    }

    /// Copies what came through the buffer, and says whether the bytes are right.
    fn take_from_buffer(&mut self) -> bool {
        if let Some(frame) = &mut self.frame {
            frame.at = self.copies.drain(..).next().map_or(0, |(from, _)| from.start);
            return self.is_right();
        }
        if let (Some(bytes), Some(buffer)) = (self.part.bytes_mut(), &mut self.buffer) {
            for (from, to) in self.copies.drain(..) {
                let len = from.len();
                if let Some((from, to)) = buffer.bytes().get(from).zip(bytes.get_mut(to..to + len)) {
                    to.copy_from_slice(from);
                }
            }
        }
        self.is_right()
    }

    /// Whether the stored bytes have the checksum that they should have, if they should have one.
    fn is_right(&mut self) -> bool {
        let Some(sum) = self.sum else { return true };
        self.stored().is_some_and(|stored| sum.matches(stored))
    }

    /// Whether the bytes are right when the disk is asked once more: a file is called damaged for what is on the disk
    /// and not for what happened on the way.
    fn read_again(&mut self) -> bool {
        self.file.drop_from_cache(self.offset, self.len);
        let (file, offset) = (self.file.cached().clone(), self.offset);
        let Some(bytes) = self.stored() else { return false };
        file.read_exact_at(bytes, offset).is_ok() && self.is_right()
    }
}

/// What went wrong with a read, for the user.
fn describe(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => "its data file is truncated".to_owned(),
        _ => format!("its data file cannot be read: {error}"),
    }
}
