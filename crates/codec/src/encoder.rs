//! Writes a block.

use crate::block::{CODED, HEADER_BYTES, PLAIN, REST, plane_bytes};
use crate::table::{Symbol, Table};
use crate::{Format, LANES};

/// Appends the block of these elements to `out`: coded if that is smaller, else plain.
pub(crate) fn block(format: Format, plain: &[u8], out: &mut Vec<u8>) {
    let start = out.len();
    if coded(format, plain, out).is_none() || out.len() - start >= HEADER_BYTES + plain.len() {
        out.truncate(start);
        out.extend([PLAIN, 0, 0, 0]);
        out.resize(start + HEADER_BYTES, 0);
        out.extend(plain);
    }
}

/// A symbol made ready for encoding.
#[derive(Clone, Copy, Default)]
struct Step {
    frequency: u32,
    start: u32,
    /// 2²⁴ / frequency, rounded up: exact for the quotient of a state below 2¹⁶, because the error of the product is
    /// below 2¹⁶/2²⁴ and so below 1/frequency.
    inverse: u64,
}

impl Step {
    fn new(symbol: &Symbol) -> Step {
        let frequency = u32::from(symbol.frequency);
        let inverse = (1u64 << 24).div_ceil(u64::from(frequency.max(1)));
        Step { frequency, start: u32::from(symbol.start), inverse }
    }
}

fn coded(format: Format, plain: &[u8], out: &mut Vec<u8>) -> Option<()> {
    let raw_bits = format.raw_bits();
    // The sign rotates to the lowest bit, so that the exponent is at the top.
    let words = || plain.as_chunks().0.iter().map(|&bytes| u16::from_le_bytes(bytes).rotate_left(1));
    let exponents: Vec<u8> = words().map(|word| (word >> raw_bits) as u8).collect();
    let mut counts = [0u32; 256];
    exponents.iter().for_each(|&exponent| counts[usize::from(exponent)] += 1);
    let table = Table::of_counts(&counts)?;
    // Exponents without a symbol take the escape's.
    let mut symbol_of = [table.escape().unwrap_or(0); 256];
    for (index, symbol) in table.symbols().iter().enumerate() {
        if table.escape() != Some(index) {
            symbol_of[usize::from(symbol.exponent)] = index;
        }
    }
    let literals: Vec<u8> = match table.escape() {
        Some(escape) => {
            exponents.iter().copied().filter(|&exponent| symbol_of[usize::from(exponent)] == escape).collect()
        }
        None => Vec::new(),
    };
    let mut steps = [Step::default(); 256];
    for (step, &symbol) in steps.iter_mut().zip(&symbol_of) {
        *step = Step::new(table.symbols().get(symbol)?);
    }

    // Coding runs backwards. The last round is filled up with the most frequent symbol, which is never the escape.
    let filler = Step::new(table.symbols().first()?);
    let padded = exponents.len().next_multiple_of(LANES);
    let mut states = [u32::from(REST); LANES];
    // At most one byte per element, because a state loses eight of its sixteen bits by each.
    let mut code = vec![0; padded];
    let mut free = padded;
    let fill = std::iter::repeat_n(&filler, padded - exponents.len());
    let steps = fill.chain(exponents.iter().rev().map(|&exponent| &steps[usize::from(exponent)]));
    for (index, step) in (0..padded).rev().zip(steps) {
        let state = &mut states[index % LANES];
        if *state >= step.frequency << 8 {
            free -= 1;
            *code.get_mut(free)? = *state as u8;
            *state >>= 8;
        }
        let quotient = ((u64::from(*state) * step.inverse) >> 24) as u32;
        *state = (quotient << 8) + step.start + (*state - quotient * step.frequency);
    }
    let code = code.get(free..)?;

    let escape = u8::from(table.escape().is_some());
    out.extend([CODED, table.symbols().len() as u8, escape, 0]);
    out.extend((literals.len() as u32).to_le_bytes());
    out.extend((code.len() as u32).to_le_bytes());
    for symbol in table.symbols() {
        out.extend([symbol.exponent, (symbol.frequency - 1) as u8]);
    }
    for state in states {
        out.extend((state as u16).to_le_bytes());
    }
    out.extend(literals);
    out.extend(code);
    planes(format, words(), exponents.len(), out);
    out.extend(words().map(|word| word as u8));
    Some(())
}

/// The raw bits above the low byte. For each round of 128 elements its planes follow each other.
fn planes(format: Format, words: impl Iterator<Item = u16>, elements: usize, out: &mut Vec<u8>) {
    const PLANE: usize = LANES / 8;
    let start = out.len();
    out.resize(start + format.planes() * plane_bytes(elements), 0);
    let Some(planes) = out.get_mut(start..) else { return };
    if planes.is_empty() {
        return;
    }
    for (index, word) in words.enumerate() {
        let (round, lane) = (index / LANES, index % LANES);
        for plane in 0..format.planes() {
            let bit = (word >> (8 + plane) & 1) as u8;
            planes[(round * format.planes() + plane) * PLANE + lane / 8] |= bit << (lane % 8);
        }
    }
}
