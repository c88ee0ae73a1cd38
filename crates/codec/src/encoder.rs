//! Writes a block.

use crate::block::{CODED, HEADER_BYTES, PLAIN, REST};
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
    let words = plain.as_chunks().0.iter().map(|&bytes| u16::from_le_bytes(bytes).rotate_left(1));
    let words: Vec<u16> = words.collect();
    let exponents: Vec<u8> = words.iter().map(|word| (word >> raw_bits) as u8).collect();
    let table = Table::of_counts(&counts(&exponents))?;
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
    let (states, code) = run(&exponents, &steps, Step::new(table.symbols().first()?));

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
    planes(format, &words, out);
    out.extend(words.iter().map(|&word| word as u8));
    Some(())
}

/// How often each exponent occurs.
fn counts(exponents: &[u8]) -> [u32; 256] {
    // Neighbours are often equal; counters of their own keep one from waiting for the other.
    let mut counts = [[0u32; 256]; 4];
    let (quads, rest) = exponents.as_chunks::<4>();
    for quad in quads {
        for (counts, &exponent) in counts.iter_mut().zip(quad) {
            counts[usize::from(exponent)] += 1;
        }
    }
    let [mut sum, others @ ..] = counts;
    rest.iter().for_each(|&exponent| sum[usize::from(exponent)] += 1);
    others.iter().for_each(|counts| sum.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count));
    sum
}

/// Runs the coders, backwards: gives their last states, which are a decoder's first ones, and the bytes for it. The last
/// round is filled up with the symbol `filler`.
fn run(exponents: &[u8], steps: &[Step; 256], filler: Step) -> ([u32; LANES], Vec<u8>) {
    let mut states = [u32::from(REST); LANES];
    // At most one byte per element, because a state loses eight of its sixteen bits by each; and one in front that is
    // overwritten until it is kept.
    let mut code = vec![0; exponents.len().next_multiple_of(LANES) + 1];
    let mut free = code.len();
    for round in exponents.chunks(LANES).rev() {
        for (lane, state) in states.iter_mut().enumerate().rev() {
            let step = round.get(lane).map_or(&filler, |&exponent| &steps[usize::from(exponent)]);
            // Whether a byte goes cannot be foretold, so there is no branch.
            let full = *state >= step.frequency << 8;
            if let Some(byte) = code.get_mut(free - 1) {
                *byte = *state as u8;
            }
            free -= usize::from(full);
            let kept = *state >> (8 * u32::from(full));
            let quotient = ((u64::from(kept) * step.inverse) >> 24) as u32;
            *state = (quotient << 8) + step.start + (kept - quotient * step.frequency);
        }
    }
    code.drain(..free);
    (states, code)
}

/// The raw bits above the low byte. For each round of 128 elements its planes follow each other.
fn planes(format: Format, words: &[u16], out: &mut Vec<u8>) {
    for round in words.chunks(LANES) {
        for plane in 0..format.planes() {
            let end = out.len() + LANES / 8;
            out.extend(round.chunks(8).map(|words| {
                let bits = words.iter().zip(0..).map(|(word, lane)| (word >> (8 + plane) & 1) << lane);
                bits.fold(0, |byte, bit| byte | bit) as u8
            }));
            out.resize(end, 0);
        }
    }
}
