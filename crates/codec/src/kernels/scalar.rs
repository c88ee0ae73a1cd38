//! Plain code: what vectors cannot do because a load of theirs would leave the block, and all of it where there are none.

use crate::block::{Coded, Cursor};
use crate::table::{SLOT_ESCAPE, SLOT_EXPONENT, SLOT_OFFSET};
use crate::{Corrupt, LANES};

/// Decodes from a round on to the end.
pub(super) fn from_round(
    first: usize,
    coded: &Coded<'_>,
    cursor: &mut Cursor,
    out: &mut [u8],
) -> Result<(), Corrupt> {
    let (raw_bits, planes) = (coded.format.raw_bits(), coded.format.planes());
    let data = coded.data;
    let done = first * LANES;
    let low = data.get(coded.low_at + done..).ok_or(Corrupt::Length)?;
    let mut bits = data.get(coded.planes_at..coded.low_at).ok_or(Corrupt::Length)?.chunks(LANES / 8);
    let (outs, _) = out.get_mut(2 * done..).ok_or(Corrupt::Length)?.as_chunks_mut::<2>();
    let mut rounds_low = low.chunks(LANES);
    let mut rounds_out = outs.chunks_mut(LANES);
    if first * planes > 0 {
        bits.nth(first * planes - 1);
    }
    for _ in first..coded.elements.div_ceil(LANES) {
        let mut words = [0u16; LANES];
        for (state, word) in cursor.states.iter_mut().zip(&mut words) {
            let slot = coded.lookups.slot[usize::from(*state & 255)];
            let frequency = slot & ((1 << SLOT_OFFSET) - 1);
            let mut next = frequency * u32::from(*state >> 8) + (slot >> SLOT_OFFSET & 255);
            if next < 256 {
                next = next << 8 | u32::from(*data.get(cursor.code).ok_or(Corrupt::Codes)?);
                cursor.code += 1;
            }
            *state = next as u16;
            let mut exponent = slot >> SLOT_EXPONENT & 255;
            if slot >> SLOT_ESCAPE != 0 {
                exponent = u32::from(*data.get(cursor.literal).ok_or(Corrupt::Codes)?);
                cursor.literal += 1;
            }
            *word = (exponent << raw_bits) as u16;
        }
        for plane in 0..planes {
            let bits = bits.next().unwrap_or_default();
            for (word, lane) in words.iter_mut().zip(0..) {
                let byte = bits.get(lane / 8).copied().unwrap_or_default();
                *word |= u16::from(byte >> (lane % 8) & 1) << (8 + plane);
            }
        }
        let (low, out) = (rounds_low.next().unwrap_or_default(), rounds_out.next().unwrap_or_default());
        for ((word, &low), out) in words.iter().zip(low).zip(out) {
            *out = (word | u16::from(low)).rotate_right(1).to_le_bytes();
        }
    }
    Ok(())
}
