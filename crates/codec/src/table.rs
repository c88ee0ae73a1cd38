//! Which exponents of a block have a code of their own, and with what probability.
//!
//! Probabilities are multiples of 1/256 and there are at most 32 symbols, so that every table of the decoder fits a few
//! vector registers. Exponents too rare for a symbol share one, the escape, and are stored in a list.

use crate::Format;

/// The sum of all frequencies: one step of a coder looks at this many slots.
pub(crate) const SLOTS: usize = 256;
/// Most symbols of a block, the escape included.
pub(crate) const MAX_SYMBOLS: usize = 32;
/// An exponent gets a symbol from this share of a block on. A slot costs all other exponents log2(256/255) bits an
/// element, the escape costs about seven bits more than a code of eight; where the two are equal is near 1/1250.
const MIN_SHARE: usize = 1024;

/// One symbol.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Symbol {
    /// The exponent; 0 for the escape.
    pub(crate) exponent: u8,
    /// Slots: 1..=256.
    pub(crate) frequency: u16,
    /// First slot.
    pub(crate) start: u8,
}

/// The symbols of a block. The escape, if there is one, is the last.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Table {
    symbols: [Symbol; MAX_SYMBOLS],
    count: usize,
    escape: bool,
}

impl Table {
    /// The table for a block with these numbers of exponents; `None` for an empty one. The most frequent exponent has
    /// the first symbol.
    pub(crate) fn of_counts(counts: &[u32; 256]) -> Option<Table> {
        let total: usize = counts.iter().map(|&count| count as usize).sum();
        let mut common: Vec<(u8, u32)> = (0..=255u8)
            .zip(counts.iter().copied())
            .filter(|&(_, count)| count as usize * MIN_SHARE >= total && count > 0)
            .collect();
        common.sort_by_key(|&(exponent, count)| (std::cmp::Reverse(count), exponent));
        common.truncate(MAX_SYMBOLS - 1);
        let in_symbols: usize = common.iter().map(|&(_, count)| count as usize).sum();
        let escape = in_symbols < total;
        let mut weights: Vec<usize> = common.iter().map(|&(_, count)| count as usize).collect();
        if escape {
            weights.push(total - in_symbols);
        }
        let frequencies = frequencies(&weights, total);
        let exponents = common.iter().map(|&(exponent, _)| exponent).chain(escape.then_some(0));
        let pairs: Vec<(u8, u16)> = exponents.zip(frequencies).collect();
        Table::from_pairs(&pairs, escape)
    }

    /// A table of exponents and frequencies; `None` if they are not 1 to 32 whose frequencies add up to 256.
    pub(crate) fn from_pairs(pairs: &[(u8, u16)], escape: bool) -> Option<Table> {
        let mut symbols = [Symbol::default(); MAX_SYMBOLS];
        let mut start = 0;
        if pairs.is_empty() || pairs.len() > MAX_SYMBOLS {
            return None;
        }
        for (symbol, &(exponent, frequency)) in symbols.iter_mut().zip(pairs) {
            if frequency == 0 || start + usize::from(frequency) > SLOTS {
                return None;
            }
            *symbol = Symbol { exponent, frequency, start: start as u8 };
            start += usize::from(frequency);
        }
        (start == SLOTS).then_some(Table { symbols, count: pairs.len(), escape })
    }

    /// The symbols in the order of their slots.
    pub(crate) fn symbols(&self) -> &[Symbol] {
        self.symbols.get(..self.count).unwrap_or(&self.symbols)
    }

    /// Index of the escape.
    pub(crate) fn escape(&self) -> Option<usize> {
        self.escape.then_some(self.count - 1)
    }

    /// What decoders look up.
    pub(crate) fn lookups(&self, format: Format) -> Lookups {
        let mut lookups = Lookups::default();
        for (index, symbol) in self.symbols().iter().enumerate() {
            let escape = self.escape() == Some(index);
            let start = usize::from(symbol.start);
            let value = if escape { 0 } else { u16::from(symbol.exponent) << format.raw_bits() };
            for slot in start..start + usize::from(symbol.frequency) {
                lookups.symbol[slot] = index as u8;
                lookups.slot[slot] = u32::from(symbol.frequency)
                    | ((slot - start) as u32) << SLOT_OFFSET
                    | u32::from(value >> format.raw_bits()) << SLOT_EXPONENT
                    | u32::from(escape) << SLOT_ESCAPE;
            }
            lookups.frequency[index] = symbol.frequency;
            lookups.start[index] = u16::from(symbol.start);
            lookups.value[index] = value | u16::from(escape);
        }
        lookups
    }
}

/// Where a slot's word holds its distance from the symbol's first slot (8 bits).
pub(crate) const SLOT_OFFSET: u32 = 9;
/// Where it holds the exponent (8 bits).
pub(crate) const SLOT_EXPONENT: u32 = 17;
/// The bit that marks the escape. The frequency is in the lowest nine bits.
pub(crate) const SLOT_ESCAPE: u32 = 25;

/// A block's tables as decoders look them up, by slot and by symbol.
#[derive(Clone, Debug)]
pub(crate) struct Lookups {
    /// Symbol of each slot.
    pub(crate) symbol: [u8; SLOTS],
    /// All that is to be known of each slot, in one word.
    pub(crate) slot: [u32; SLOTS],
    /// Slots of each symbol.
    pub(crate) frequency: [u16; MAX_SYMBOLS],
    /// First slot of each symbol.
    pub(crate) start: [u16; MAX_SYMBOLS],
    /// Exponent of each symbol above the raw bits; 1 for the escape.
    pub(crate) value: [u16; MAX_SYMBOLS],
}

impl Default for Lookups {
    fn default() -> Lookups {
        Lookups {
            symbol: [0; SLOTS],
            slot: [0; SLOTS],
            frequency: [0; MAX_SYMBOLS],
            start: [0; MAX_SYMBOLS],
            value: [0; MAX_SYMBOLS],
        }
    }
}

/// Frequencies that add up to 256, each at least 1, with the fewest bits for these weights: rounded, then changed one
/// by one where that costs least. In integers, so that equal input gives equal output everywhere.
fn frequencies(weights: &[usize], total: usize) -> Vec<u16> {
    let rounded = |weight: usize| ((weight * SLOTS + total / 2) / total.max(1)).clamp(1, SLOTS);
    let mut frequencies: Vec<usize> = weights.iter().map(|&weight| rounded(weight)).collect();
    let mut sum: usize = frequencies.iter().sum();
    // A symbol of weight w that goes from frequency f to f + 1 saves w·log2(1 + 1/f) bits, which is close to
    // w / (f + 1/2) times a constant.
    let saving = |weight: usize, frequency: usize| (weight * 4096) / (2 * frequency + 1);
    while sum != SLOTS {
        let all = frequencies.iter_mut().zip(weights);
        if sum < SLOTS {
            let Some((frequency, _)) = all.max_by_key(|(f, w)| saving(**w, **f)) else { break };
            *frequency += 1;
            sum += 1;
        } else {
            let candidates = all.filter(|(f, _)| **f > 1);
            let Some((frequency, _)) = candidates.min_by_key(|(f, w)| saving(**w, **f - 1)) else { break };
            *frequency -= 1;
            sum -= 1;
        }
    }
    frequencies.into_iter().map(|frequency| frequency as u16).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_counts_make_a_sound_table(
            counts in prop::collection::vec((any::<u8>(), prop_oneof![0u32..4, 0u32..70_000]), 1..300),
        ) {
            let mut all = [0u32; 256];
            counts.iter().for_each(|&(exponent, count)| all[usize::from(exponent)] += count);
            prop_assume!(all.iter().any(|&count| count > 0));
            let table = Table::of_counts(&all).unwrap();
            let slots: usize = table.symbols().iter().map(|symbol| usize::from(symbol.frequency)).sum();
            prop_assert_eq!(slots, SLOTS);
            prop_assert!(table.symbols().iter().all(|symbol| symbol.frequency > 0));
            let own: Vec<u8> = table.symbols().iter().enumerate()
                .filter(|&(index, _)| table.escape() != Some(index)).map(|(_, symbol)| symbol.exponent).collect();
            let missing = (0..=255u8).any(|e| all[usize::from(e)] > 0 && !own.contains(&e));
            prop_assert_eq!(missing, table.escape().is_some());
        }
    }

    #[test]
    fn probabilities_follow_the_counts() {
        let mut counts = [0u32; 256];
        (counts[100], counts[101], counts[7]) = (3000, 1000, 2);
        let table = Table::of_counts(&counts).unwrap();
        let frequencies: Vec<_> = table.symbols().iter().map(|s| (s.exponent, s.frequency)).collect();
        assert_eq!(frequencies, [(100, 191), (101, 64), (0, 1)], "7 is too rare for a symbol");
        assert_eq!(table.escape(), Some(2));
    }

    #[test]
    fn pairs_that_do_not_add_up_are_refused() {
        assert!(Table::from_pairs(&[(1, 256)], false).is_some());
        assert!(Table::from_pairs(&[(1, 255)], false).is_none());
        assert!(Table::from_pairs(&[(1, 255), (2, 2)], false).is_none());
        assert!(Table::from_pairs(&[(1, 256), (2, 0)], false).is_none());
        assert!(Table::from_pairs(&[], false).is_none());
        assert!(Table::from_pairs(&[(1, 8); 33], false).is_none());
    }
}
