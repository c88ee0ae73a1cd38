//! How the chunks of a tensor are stored: as they are, or as frames of `tangram-codec`.
//!
//! A frame is written only after it has given back the bytes that it was made of.

use tangram_codec::{Format, Speeds};

use crate::DType;
use crate::manifest::{CHUNK_BYTES, TensorEntry};

/// How an import stores tensors that can be compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Layout {
    /// As they are.
    #[default]
    Plain,
    /// In fewer bytes wherever that saves some.
    Compressed,
    /// In fewer bytes where they are loaded sooner that way.
    Fastest(Speeds),
}

/// What the codec calls a type that it can compress.
pub fn codec_format(dtype: DType) -> Option<Format> {
    match dtype {
        DType::BF16 => Some(Format::Bf16),
        DType::F16 => Some(Format::F16),
        _ => None,
    }
}

/// Bytes that the file has of a chunk of a tensor of `bytes`, whose compressed lengths are `stored` (none if it is not
/// compressed); 0 behind its end.
pub fn stored_chunk_bytes(stored: &[u32], bytes: u64, index: usize) -> u64 {
    let plain = bytes.saturating_sub(index as u64 * CHUNK_BYTES).min(CHUNK_BYTES);
    stored.get(index).map_or(plain, |&stored| u64::from(stored))
}

/// Refuses lengths that chunks cannot have; the error goes on from the tensor's name.
pub(crate) fn check(entry: &TensorEntry) -> Result<(), String> {
    if entry.stored.is_empty() {
        return Ok(());
    }
    if codec_format(entry.dtype).is_none() || entry.in_place.is_some() {
        return Err(format!("of type {} cannot be compressed here", entry.dtype));
    }
    let plain = (0..entry.chunks.len()).map(|index| stored_chunk_bytes(&[], entry.bytes, index));
    let lengths = entry.stored.iter().map(|&stored| u64::from(stored));
    if entry.stored.len() != entry.chunks.len() || !lengths.zip(plain).all(|(stored, plain)| stored <= plain)
    {
        return Err(format!("of {} bytes cannot have the stored lengths {:?}", entry.bytes, entry.stored));
    }
    Ok(())
}

/// Makes what is stored of chunks.
pub(crate) struct Compressor {
    layout: Layout,
    again: Vec<u8>,
}

impl Compressor {
    pub(crate) fn new(layout: Layout) -> Compressor {
        Compressor { layout, again: Vec::new() }
    }

    /// The frame that is to be stored instead of a chunk, if any.
    pub(crate) fn frame(&mut self, dtype: DType, chunk: &[u8]) -> Option<Vec<u8>> {
        let format = codec_format(dtype).filter(|_| self.layout != Layout::Plain)?;
        let frame = tangram_codec::encode(format, chunk)?;
        if let Layout::Fastest(speeds) = self.layout
            && !speeds.favour_compressed(chunk.len() as u64, frame.len() as u64)
        {
            return None;
        }
        self.again.resize(chunk.len(), 0);
        let sound = tangram_codec::decode(format, &frame, &mut self.again).is_ok() && self.again == chunk;
        sound.then_some(frame)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Elements whose exponents are all but certain.
    fn chunk() -> Vec<u8> {
        (0..100_000u32).flat_map(|i| [(i * 37) as u8, 0x3f]).collect()
    }

    #[test]
    fn only_what_is_asked_for_and_can_be_is_compressed() {
        let frame = |layout, dtype| Compressor::new(layout).frame(dtype, &chunk());
        let speeds = |link, decode| Layout::Fastest(Speeds { link, decode });
        assert!(frame(Layout::Plain, DType::BF16).is_none());
        assert!(frame(Layout::Compressed, DType::BF16).is_some());
        assert!(frame(Layout::Compressed, DType::F16).is_some());
        assert!(frame(Layout::Compressed, DType::F32).is_none());
        assert!(frame(speeds(1e9, 4e9), DType::BF16).is_some());
        assert!(frame(speeds(4e9, 4e9), DType::BF16).is_none(), "decoding would be no faster than the link");
    }

    #[test]
    fn lengths_of_chunks() {
        let bytes = CHUNK_BYTES + 100;
        assert_eq!([0, 1, 2].map(|index| stored_chunk_bytes(&[], bytes, index)), [CHUNK_BYTES, 100, 0]);
        assert_eq!([0, 1].map(|index| stored_chunk_bytes(&[9, 100], bytes, index)), [9, 100]);
    }
}
