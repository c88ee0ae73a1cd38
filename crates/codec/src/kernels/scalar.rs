//! Plain code: what vectors cannot do because a load of theirs would leave the block, and all of it where there are none.

use crate::LANES;
use crate::block::{Coded, Cursor};
use crate::table::{SLOT_ESCAPE, SLOT_EXPONENT, SLOT_OFFSET};

/// Decodes from a round on to the end.
pub(super) fn from_round(first: usize, coded: &Coded<'_>, cursor: &mut Cursor, out: &mut [u8]) {
    let (raw_bits, planes) = (coded.format.raw_bits(), coded.format.planes());
    let low = coded.data.get(coded.low_at..).unwrap_or_default();
    let bits = coded.data.get(coded.planes_at..coded.low_at).unwrap_or_default();
    let rounds = out.chunks_mut(2 * LANES).zip(low.chunks(LANES)).enumerate().skip(first);
    for (round, (out, low)) in rounds {
        let mut words = [0u16; LANES];
        let (fresh, literals) = (window(coded.data, cursor.code), window(coded.data, cursor.literal));
        let (mut taken, mut escaped) = (0, 0);
        for (state, word) in cursor.states.iter_mut().zip(&mut words) {
            let slot = coded.lookups.slot[usize::from(*state & 255)];
            let frequency = slot & ((1 << SLOT_OFFSET) - 1);
            let next = frequency * u32::from(*state >> 8) + (slot >> SLOT_OFFSET & 255);
            // Whether a byte is taken cannot be foretold, so there is no branch. Before the last lane fewer than 128
            // are taken, so that the remainder changes nothing.
            let hungry = next < 256;
            let longer = next << 8 | u32::from(fresh[taken % LANES]);
            *state = if hungry { longer } else { next } as u16;
            taken += usize::from(hungry);
            let mut exponent = slot >> SLOT_EXPONENT & 255;
            if slot >> SLOT_ESCAPE != 0 {
                exponent = u32::from(literals[escaped % LANES]);
                escaped += 1;
            }
            *word = (exponent << raw_bits) as u16;
        }
        cursor.code += taken;
        cursor.literal += escaped;
        for (bits, plane) in bits.chunks(LANES / 8).skip(round * planes).zip(0..planes) {
            for (words, bits) in words.chunks_mut(8).zip(bits) {
                words
                    .iter_mut()
                    .zip(0..8)
                    .for_each(|(word, lane)| *word |= u16::from(bits >> lane & 1) << (8 + plane));
            }
        }
        for ((word, &low), out) in words.iter().zip(low).zip(out.as_chunks_mut().0) {
            *out = (word | u16::from(low)).rotate_right(1).to_le_bytes();
        }
    }
}

/// The bytes for one round: 128 from a position on, zeros where the data has none. Nothing that is sound takes those, and
/// what takes them does not end where it must.
fn window(data: &[u8], at: usize) -> [u8; LANES] {
    let mut window = [0; LANES];
    let rest = data.get(at..).unwrap_or_default();
    match rest.first_chunk() {
        Some(whole) => window = *whole,
        None => window.iter_mut().zip(rest).for_each(|(to, from)| *to = *from),
    }
    window
}
