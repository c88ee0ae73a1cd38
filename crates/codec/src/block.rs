//! One block of a frame as it lies on disk: its parts, checked, and decoded.
//!
//! All lengths are checked against the block's slice before anything is read, and nothing is allocated.

use crate::kernels::{self, Isa};
use crate::table::{Lookups, MAX_SYMBOLS, Table};
use crate::{Corrupt, Format, LANES};

/// Bytes in front of the symbols.
pub(crate) const HEADER_BYTES: usize = 12;
/// A block whose elements are stored as they are.
pub(crate) const PLAIN: u8 = 0;
/// A block with coded exponents.
pub(crate) const CODED: u8 = 1;

/// Bytes of one plane: a bit per element, for whole rounds.
pub(crate) const fn plane_bytes(elements: usize) -> usize {
    elements.div_ceil(LANES) * (LANES / 8)
}

/// A block with coded exponents. Positions are in `data`.
pub(crate) struct Coded<'a> {
    pub(crate) format: Format,
    pub(crate) lookups: Lookups,
    /// Elements: half as many as the output has bytes.
    pub(crate) elements: usize,
    /// Exponents of escaped elements, then the coders' bytes, then planes, then low bytes.
    pub(crate) data: &'a [u8],
    /// End of the escaped exponents and start of the coders' bytes.
    pub(crate) code_at: usize,
    /// End of the coders' bytes and start of the planes.
    pub(crate) planes_at: usize,
    /// Start of the low bytes, one per element, which end with `data`.
    pub(crate) low_at: usize,
}

/// Where decoding is.
pub(crate) struct Cursor {
    /// Of each lane's coder.
    pub(crate) states: [u16; LANES],
    /// Next escaped exponent.
    pub(crate) literal: usize,
    /// Next byte for a coder.
    pub(crate) code: usize,
}

/// Takes bytes off the front.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], Corrupt> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or(Corrupt::Length)?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Corrupt> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(Corrupt::Length)?;
        self.0 = rest;
        Ok(*taken)
    }
}

/// Decodes a block into `out`, which is as long as its elements and ends at an element.
pub(crate) fn decode(isa: Isa, format: Format, block: &[u8], out: &mut [u8]) -> Result<(), Corrupt> {
    let mut reader = Reader(block);
    let [kind, count, escape, zero] = reader.array()?;
    let literals = u32::from_le_bytes(reader.array()?) as usize;
    let code = u32::from_le_bytes(reader.array()?) as usize;
    if zero != 0 {
        return Err(Corrupt::Header);
    }
    if kind == PLAIN && (count, escape, literals, code) == (0, 0, 0, 0) {
        if reader.0.len() != out.len() {
            return Err(Corrupt::Length);
        }
        out.copy_from_slice(reader.0);
        return Ok(());
    }
    if kind != CODED || escape > 1 || usize::from(count) > MAX_SYMBOLS {
        return Err(Corrupt::Header);
    }
    let mut pairs = [(0, 0); MAX_SYMBOLS];
    let stored = reader.take(2 * usize::from(count))?;
    for (pair, stored) in pairs.iter_mut().zip(stored.as_chunks().0) {
        let &[exponent, frequency] = stored;
        *pair = (exponent, u16::from(frequency) + 1);
    }
    let pairs = pairs.get(..usize::from(count)).ok_or(Corrupt::Header)?;
    let table = Table::from_pairs(pairs, escape == 1).ok_or(Corrupt::Symbols)?;
    let mut states = [0; LANES];
    for (state, stored) in states.iter_mut().zip(reader.take(2 * LANES)?.as_chunks().0) {
        *state = u16::from_le_bytes(*stored);
    }
    let elements = out.len() / 2;
    let data = reader.0;
    let planes_at = literals.checked_add(code).ok_or(Corrupt::Length)?;
    let rest = format.planes() * plane_bytes(elements) + elements;
    if planes_at.checked_add(rest) != Some(data.len()) {
        return Err(Corrupt::Length);
    }
    let low_at = data.len() - elements;
    let coded = Coded {
        format,
        lookups: table.lookups(format),
        elements,
        data,
        code_at: literals,
        planes_at,
        low_at,
    };
    let mut cursor = Cursor { states, literal: 0, code: literals };
    kernels::decode(isa, &coded, &mut cursor, out);
    // A sound block ends where it began: all coders at rest, all bytes used.
    let used = cursor.literal == coded.code_at && cursor.code == coded.planes_at;
    if used && cursor.states.iter().all(|&state| state == REST) { Ok(()) } else { Err(Corrupt::Codes) }
}

/// The state of a coder before the first element is encoded, and after the last one is decoded. States are in
/// 256..65536.
pub(crate) const REST: u16 = 256;
