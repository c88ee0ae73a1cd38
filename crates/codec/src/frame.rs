//! A frame: the compressed form of a run of elements, in blocks that can be decoded in any order.

use crate::kernels::Isa;
use crate::{BLOCK_ELEMENTS, Format, block, encoder};

/// Version of the layout that this build writes and reads.
const VERSION: u8 = 1;
/// Bytes in front of the blocks' lengths.
const HEADER_BYTES: usize = 8;
/// Compressed bytes must be at most this share of the plain ones, in percent: less of a gain is not worth decoding.
const MOST_PERCENT: usize = 97;

/// Why bytes are not a frame of the wanted elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Corrupt {
    /// A field has a value that this build does not know.
    #[error("the compressed data has an unknown header")]
    Header,
    /// Lengths contradict each other, the bytes there are, or the wanted elements.
    #[error("the compressed data has contradicting lengths")]
    Length,
    /// Symbols and frequencies are not a code.
    #[error("the compressed data has an impossible code table")]
    Symbols,
    /// Coded exponents do not end where they must.
    #[error("the compressed data does not decode")]
    Codes,
}

/// Compresses elements (little-endian, as they lie in a tensor). `None` where less than 3 % would be gained: random
/// bits, quantised data under a false name, an odd number of bytes, fewer than some hundred elements. At most 2³² - 1
/// elements.
pub fn encode(format: Format, plain: &[u8]) -> Option<Vec<u8>> {
    let elements = u32::try_from(plain.len() / 2).ok().filter(|_| plain.len().is_multiple_of(2))?;
    let blocks = (elements as usize).div_ceil(BLOCK_ELEMENTS);
    let mut frame = vec![VERSION, format.code(), 0, 0];
    frame.extend(elements.to_le_bytes());
    frame.resize(HEADER_BYTES + 4 * blocks, 0);
    for (index, plain) in plain.chunks(2 * BLOCK_ELEMENTS).enumerate() {
        let start = frame.len();
        encoder::block(format, plain, &mut frame);
        let length = (frame.len() - start) as u32;
        frame.get_mut(HEADER_BYTES + 4 * index..)?.first_chunk_mut().map(|at| *at = length.to_le_bytes())?;
    }
    (frame.len() as u64 * 100 <= plain.len() as u64 * MOST_PERCENT as u64).then_some(frame)
}

/// Decodes a frame into `plain`, whose length says how many elements are wanted, with the best instructions of this
/// processor.
///
/// Each of 128 lanes is a coder of its own with a state of 16 bits and probabilities of 8 bits (range asymmetric
/// numeral systems: Duda, 2013, arXiv:1311.2540; interleaved as in Giesen, 2014, arXiv:1402.3392). All of them take
/// their bytes from one sequence, in the order of the elements.
///
/// After an error `plain` holds anything.
pub fn decode(format: Format, frame: &[u8], plain: &mut [u8]) -> Result<(), Corrupt> {
    decode_with(Isa::detect(), format, frame, plain)
}

/// [`decode`] with instructions of choice. The result does not depend on them.
pub fn decode_with(isa: Isa, format: Format, frame: &[u8], plain: &mut [u8]) -> Result<(), Corrupt> {
    let (header, rest) = frame.split_first_chunk::<HEADER_BYTES>().ok_or(Corrupt::Length)?;
    let &[version, code, zero, other_zero, e0, e1, e2, e3] = header;
    if (version, code, zero, other_zero) != (VERSION, format.code(), 0, 0) {
        return Err(Corrupt::Header);
    }
    let elements = u32::from_le_bytes([e0, e1, e2, e3]) as usize;
    if elements.checked_mul(2) != Some(plain.len()) {
        return Err(Corrupt::Length);
    }
    let blocks = elements.div_ceil(BLOCK_ELEMENTS);
    let (lengths, mut rest) = rest.split_at_checked(4 * blocks).ok_or(Corrupt::Length)?;
    for (length, out) in lengths.as_chunks().0.iter().zip(plain.chunks_mut(2 * BLOCK_ELEMENTS)) {
        let (stored, behind) =
            rest.split_at_checked(u32::from_le_bytes(*length) as usize).ok_or(Corrupt::Length)?;
        block::decode(isa, format, stored, out)?;
        rest = behind;
    }
    if rest.is_empty() { Ok(()) } else { Err(Corrupt::Length) }
}
