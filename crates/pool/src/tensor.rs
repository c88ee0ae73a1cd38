//! A resident, or arriving, tensor: who waits for it, how its parts are filled, when it may be read.
//!
//! A tensor's bytes can be read only after all of them have arrived and been verified, and from then on never change.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, mpsc};

use tangram_device::{DeviceError, Extent, HostBytes, Piece, Pinned, cuda};
use tangram_policy::TensorKey;

use crate::host::{HostCopy, Supply};

/// Why a tensor did not arrive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LoadFailure {
    /// Nobody waited for it any more before it was complete.
    Abandoned,
    /// Reading or verifying failed; the text is for the user.
    Failed(String),
}

/// `interest` of a tensor that was given up; nobody can join it any more.
const ABANDONED: u32 = u32::MAX;

/// The bytes of one tensor on the device, shared by all leases on it. Holding the `Arc` keeps the bytes in place.
#[derive(Debug)]
pub struct Tensor {
    key: TensorKey,
    len: usize,
    /// Leases that want it; lets the loader see that nobody waits.
    interest: AtomicU32,
    outcome: OnceLock<Result<Extent, LoadFailure>>,
}

impl Tensor {
    fn new(key: TensorKey, len: usize) -> Arc<Tensor> {
        Arc::new(Tensor { key, len, interest: AtomicU32::new(1), outcome: OnceLock::new() })
    }

    /// The catalogue key.
    pub fn key(&self) -> TensorKey {
        self.key
    }

    /// Size in bytes.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.len
    }

    /// The bytes, once they have arrived, on a device that the host can address.
    pub fn bytes(&self) -> Option<&[u8]> {
        self.extent()?.host_bytes()
    }

    /// Where the bytes are, once they have arrived.
    pub fn extent(&self) -> Option<&Extent> {
        self.outcome.get()?.as_ref().ok()
    }

    /// Whether all bytes have arrived.
    pub fn is_ready(&self) -> bool {
        matches!(self.outcome.get(), Some(Ok(_)))
    }

    /// Why it will never arrive, if that is so.
    pub fn failure(&self) -> Option<&LoadFailure> {
        self.outcome.get()?.as_ref().err()
    }

    /// Counts a lease; `false` if the tensor has been given up and must be loaded anew.
    pub(crate) fn join(&self) -> bool {
        if self.failure().is_some() {
            return false;
        }
        self.interest
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |interest| {
                (interest != ABANDONED).then(|| interest + 1)
            })
            .is_ok()
    }

    /// Ends a lease.
    pub(crate) fn leave(&self) {
        let _ = self.interest.fetch_update(Ordering::AcqRel, Ordering::Acquire, |interest| {
            (interest != ABANDONED).then(|| interest.saturating_sub(1))
        });
    }

    /// Gives the tensor up if no lease wants it.
    fn abandon_if_unwanted(&self) -> bool {
        match self.interest.compare_exchange(0, ABANDONED, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => true,
            Err(interest) => interest == ABANDONED,
        }
    }

    /// Where the bytes are, of a tensor that has arrived and that nobody else holds.
    pub(crate) fn extent_mut(&mut self) -> Option<&mut Extent> {
        self.outcome.get_mut()?.as_mut().ok()
    }

    /// Makes known how the load ended.
    fn settle(&self, outcome: Result<Extent, LoadFailure>) {
        let published = self.outcome.set(outcome);
        debug_assert!(published.is_ok(), "a tensor is filled once");
    }

    /// Whether the loader was told that nobody wants it.
    fn is_given_up(&self) -> bool {
        self.interest.load(Ordering::Acquire) == ABANDONED
    }

    /// The extent of a tensor that nobody else holds.
    pub(crate) fn into_extent(self) -> Option<Extent> {
        self.outcome.into_inner()?.ok()
    }
}

/// Room for a tensor that has to be brought in: exclusive ownership of its bytes until they have all arrived.
/// Dropping it fails the tensor, so that nobody waits for ever.
#[derive(Debug)]
pub struct Vacancy {
    tensor: Arc<Tensor>,
    /// Until it is cut into parts.
    extent: Option<Extent>,
    pub(crate) supply: Supply,
}

impl Vacancy {
    pub(crate) fn new(key: TensorKey, extent: Extent) -> Vacancy {
        Vacancy { tensor: Tensor::new(key, extent.len()), extent: Some(extent), supply: Supply::Disk }
    }

    /// The tensor that waits for these bytes.
    pub fn tensor(&self) -> &Arc<Tensor> {
        &self.tensor
    }

    /// Whether filling it would be for nothing, because no lease wants the tensor; from then on it cannot be joined.
    pub fn is_unwanted(&self) -> bool {
        self.tensor.abandon_if_unwanted()
    }

    /// Whether host memory has the bytes: parts are then filled by [`Part::copy_from_host`], and nothing has to be read or
    /// verified.
    pub fn is_in_host(&self) -> bool {
        matches!(self.supply, Supply::Host(_))
    }

    /// Gives the room back and makes known why the tensor will not arrive.
    pub fn fail(mut self, failure: LoadFailure) {
        // Whoever sees the failure may ask for this room again at once, so it is free before that.
        drop(self.extent.take());
        self.tensor.settle(Err(failure));
    }

    /// Cuts the room into parts of `part_bytes` (the last may be shorter) that can be filled in any order on any
    /// thread. The tensor becomes readable when the last one has been finished without an error.
    pub fn into_parts(mut self, part_bytes: usize) -> Vec<Part> {
        assert!(part_bytes > 0, "parts must have a size");
        let mut extents = Vec::new();
        let Some(mut rest) = self.extent.take() else { return Vec::new() };
        while rest.len() > part_bytes {
            let tail = rest.split_off(part_bytes);
            extents.push(std::mem::replace(&mut rest, tail));
        }
        extents.push(rest);
        let (mut room, copy, source) = match std::mem::take(&mut self.supply) {
            Supply::Disk => (None, None, None),
            Supply::Kept(room, copy) => (Some(room), Some(copy), None),
            Supply::Host(source) => (None, None, Some(source)),
        };
        let filled = std::iter::repeat_with(|| None).take(extents.len()).collect();
        let copied = std::iter::repeat_with(|| None).take(extents.len()).collect();
        let filling = Arc::new(Filling {
            tensor: self.tensor.clone(),
            copy,
            state: Mutex::new(FillingState {
                filled,
                copied,
                uncopied: false,
                missing: extents.len(),
                failure: None,
            }),
        });
        let mut take_room = |bytes: usize| {
            let rest = room.as_mut()?.split_off(bytes);
            room.replace(rest)
        };
        extents
            .into_iter()
            .enumerate()
            .map(|(index, extent)| Part {
                filling: Some(filling.clone()),
                index,
                room: take_room(extent.len()).map(|room| (room, false)),
                filled_in_room: false,
                source: source.as_ref().map(|source| (source.clone(), index * part_bytes)),
                extent: Some(extent),
                staged: None,
                prepared: false,
            })
            .collect()
    }
}

impl Drop for Vacancy {
    fn drop(&mut self) {
        if let Some(extent) = self.extent.take() {
            drop(extent);
            self.tensor.settle(Err(interrupted()));
        }
    }
}

fn interrupted() -> LoadFailure {
    LoadFailure::Failed("loading was interrupted".to_owned())
}

#[derive(Debug)]
struct Filling {
    tensor: Arc<Tensor>,
    /// What the parts leave in host memory.
    copy: Option<Arc<HostCopy>>,
    state: Mutex<FillingState>,
}

#[derive(Debug)]
struct FillingState {
    filled: Vec<Option<Extent>>,
    /// The parts' copies in host memory. Kept until the end whatever comes of them: then their memory is free at once.
    copied: Vec<Option<HostBytes>>,
    /// A part came without leaving its copy.
    uncopied: bool,
    missing: usize,
    failure: Option<LoadFailure>,
}

/// A part of a tensor under way. Dropping it unfinished fails the tensor, so that nobody waits for ever.
///
/// [`Part::stage`], [`Part::bytes_mut`], [`Part::finish`] are how it is filled on every device.
#[derive(Debug)]
pub struct Part {
    filling: Option<Arc<Filling>>,
    index: usize,
    extent: Option<Extent>,
    /// On a device that the host cannot address, the buffer with the bytes, which begin this far into it.
    staged: Option<(Pinned, usize)>,
    /// Where its copy in host memory goes, and whether the copy is there.
    room: Option<(HostBytes, bool)>,
    /// Whether it is filled there, and goes to the device from there.
    filled_in_room: bool,
    /// Where host memory has its bytes.
    source: Option<(Arc<HostBytes>, usize)>,
    /// Whether the bytes have been prepared for writing, which takes as long as a copy does even where it finds nothing
    /// to do.
    prepared: bool,
}

impl Part {
    /// The part's place among the tensor's parts, from 0.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Where the part lies on the device.
    pub fn address(&self) -> Option<usize> {
        self.extent.as_ref().map(Extent::address)
    }

    /// Size in bytes.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.extent.as_ref().map_or(0, Extent::len)
    }

    /// Whether [`Part::copy_from_host`] fills it.
    pub fn is_in_host(&self) -> bool {
        self.source.is_some()
    }

    /// Makes [`Part::bytes_mut`] give the bytes: at once where the host can address the device, otherwise with a pinned
    /// buffer, for which this waits. They then begin `skew` bytes behind a multiple of [`cuda::ALIGNMENT`], so that a
    /// file can be read past the page cache. Who has staged parts must finish one before it waits here for another.
    ///
    /// # Errors
    /// When the device is lost, or the part is larger than a buffer.
    pub fn stage(&mut self, skew: usize) -> Result<(), DeviceError> {
        self.stage_with(skew, |staging| staging.take().map(Some)).map(drop)
    }

    /// Like [`Part::stage`], but does not wait: `false` if there is no buffer now.
    ///
    /// # Errors
    /// As [`Part::stage`].
    pub fn try_stage(&mut self, skew: usize) -> Result<bool, DeviceError> {
        self.stage_with(skew, cuda::Staging::try_take)
    }

    fn stage_with(
        &mut self,
        skew: usize,
        take: impl FnOnce(&cuda::Staging) -> Result<Option<Pinned>, DeviceError>,
    ) -> Result<bool, DeviceError> {
        let Some(extent) = self.extent.as_ref().filter(|_| self.staged.is_none()) else { return Ok(true) };
        let Some(staging) = extent.memory().staging() else { return Ok(true) };
        let (skew, len) = (skew % cuda::ALIGNMENT, extent.len());
        // Where the copy lies as the file wants it, the bytes are read there, and not copied.
        let suits = |(room, _): &mut (HostBytes, bool)| {
            room.whole().is_some_and(|bytes| (bytes.as_ptr() as usize).is_multiple_of(cuda::ALIGNMENT))
        };
        if skew == 0 && self.room.as_mut().is_some_and(suits) {
            self.filled_in_room = true;
            return Ok(true);
        }
        if skew + len > staging.buffer_bytes() {
            return Err(DeviceError::BadConfig(format!(
                "a part of {len} bytes does not fit into a staging buffer of {}",
                staging.buffer_bytes()
            )));
        }
        self.staged = take(staging)?.map(|buffer| (buffer, skew));
        Ok(self.staged.is_some())
    }

    /// Gives the buffer back that [`Part::stage`] took, and what was written to it up: for a part that has to wait before
    /// it can be filled.
    pub fn unstage(&mut self) {
        self.staged = None;
        self.filled_in_room = false;
    }

    /// Where the bytes go, if the part has been staged or the host can address the device.
    pub fn bytes_mut(&mut self) -> Option<&mut [u8]> {
        let extent = self.extent.as_mut()?;
        if self.filled_in_room {
            return self.room.as_mut()?.0.whole();
        }
        if let Some((buffer, skew)) = &mut self.staged {
            return buffer.get_mut(*skew..*skew + extent.len());
        }
        if !std::mem::replace(&mut self.prepared, true) {
            extent.prepare_write();
        }
        extent.host_bytes_mut()
    }

    /// Whether filling this part would be for nothing: no lease wants the tensor, or another part has failed.
    pub fn is_unwanted(&self) -> bool {
        self.filling.as_ref().is_none_or(|filling| {
            filling.tensor.abandon_if_unwanted()
                || filling.state.lock().unwrap_or_else(PoisonError::into_inner).failure.is_some()
        })
    }

    /// Reports the part as filled and verified, or as failed. Gives `true` if the whole tensor was settled by this. If
    /// the part is staged, waits until its bytes are on the device.
    pub fn finish(mut self, result: Result<(), LoadFailure>) -> bool {
        if self.staged.is_none() && !self.filled_in_room {
            return self.settle(result);
        }
        let (sender, settled) = mpsc::channel();
        self.finish_then(result, move |whole| {
            let _ = sender.send(whole);
        });
        // The other end is gone without an answer only if nothing was settled.
        settled.recv().unwrap_or(false)
    }

    /// Like [`Part::finish`], but does not wait: `then` gets the answer, on a thread that other copies wait for, when the
    /// bytes are on the device.
    pub fn finish_then(mut self, result: Result<(), LoadFailure>, then: impl FnOnce(bool) + Send + 'static) {
        if result.is_ok()
            && std::mem::take(&mut self.filled_in_room)
            && let Some(((room, _), extent)) = self.room.take().zip(self.extent.take())
        {
            let (memory, room) = (extent.memory().clone(), Arc::new(room));
            return memory.upload_kept(room.clone(), 0, extent, move |extent, copied| {
                self.extent = Some(extent);
                // The copy to the device has let go of it.
                self.room = Arc::into_inner(room).map(|room| (room, true));
                then(self.settle(copied.map_err(|error| LoadFailure::Failed(error.to_string()))));
            });
        }
        match (result, self.staged.take(), self.extent.take()) {
            (Ok(()), Some((buffer, skew)), Some(extent)) => {
                let bytes = buffer.get(skew..skew + extent.len());
                if let Some(((room, copied), bytes)) = self.room.as_mut().zip(bytes) {
                    room.write(0, bytes);
                    *copied = true;
                }
                let memory = extent.memory().clone();
                memory.upload(buffer, vec![Piece { from: skew, extent }], move |mut extents, copied| {
                    self.extent = extents.pop();
                    then(self.settle(copied.map_err(|error| LoadFailure::Failed(error.to_string()))));
                });
            }
            (result, staged, extent) => {
                drop(staged);
                self.extent = extent;
                then(self.settle(result));
            }
        }
    }

    /// Fills the part with the copy that host memory has of it. `then` is as in [`Part::finish_then`]. Waits while many such
    /// copies are under way.
    pub fn copy_from_host(mut self, then: impl FnOnce(bool) + Send + 'static) {
        let (Some((source, at)), Some(extent)) = (self.source.take(), self.extent.take()) else {
            let missing = LoadFailure::Failed("host memory does not have it".to_owned());
            return then(self.settle(Err(missing)));
        };
        let memory = extent.memory().clone();
        memory.upload_kept(source, at, extent, move |extent, copied| {
            self.extent = Some(extent);
            then(self.settle(copied.map_err(|error| LoadFailure::Failed(error.to_string()))));
        });
    }

    fn settle(&mut self, result: Result<(), LoadFailure>) -> bool {
        let Some(filling) = self.filling.take() else { return false };
        let result = result.and_then(|()| self.extent.take().ok_or_else(interrupted));
        let extent = self.extent.take();
        let mut state = filling.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.missing -= 1;
        let (room, copied) = self.room.take().unzip();
        state.uncopied |= copied != Some(true);
        state.copied[self.index] = room;
        self.source = None;
        match result {
            Ok(extent) => state.filled[self.index] = Some(extent),
            Err(failure) => {
                // A real failure tells the user more than the abandonment that may follow from it.
                if !matches!(state.failure, Some(LoadFailure::Failed(_))) {
                    state.failure = Some(failure);
                }
                drop(extent);
            }
        }
        if state.missing > 0 {
            return false;
        }
        let copied: Option<Vec<HostBytes>> = std::mem::take(&mut state.copied).into_iter().collect();
        let copied = copied.filter(|_| !state.uncopied).and_then(|copied| {
            copied.into_iter().reduce(|mut whole, part| {
                whole.join(part);
                whole
            })
        });
        let mut parts = std::mem::take(&mut state.filled).into_iter().flatten();
        // A tensor that was given up cannot be joined, so it is of no use even if its loader went on.
        let given_up = filling.tensor.is_given_up().then_some(LoadFailure::Abandoned);
        let outcome = match (state.failure.take().or(given_up), parts.next()) {
            (None, Some(mut whole)) => {
                parts.for_each(|part| whole.join(part));
                if let Some((copy, copied)) = filling.copy.as_ref().zip(copied) {
                    copy.complete(copied);
                }
                Ok(whole)
            }
            (failure, first) => {
                // Whoever sees the failure may ask for this room again at once, so it is free before that.
                drop((first, copied));
                parts.for_each(drop);
                Err(failure.unwrap_or(LoadFailure::Abandoned))
            }
        };
        filling.tensor.settle(outcome);
        true
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        self.settle(Err(interrupted()));
    }
}
