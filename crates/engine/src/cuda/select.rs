//! What sampling wants to know of the rows of a pass's output, found out where they are: the most likely tokens, the weight
//! of all, and the token on which a random number falls. Rows that do not leave the GPU cost no transfer and no host time.
//!
//! Chooses nothing: that is `crate::sampling`'s.

use super::executor::ExecuteError;
use super::forward::Step;
use super::plan::{Offset, Tables};
use super::{CandidatesArguments, launch};
use crate::sampling::{CANDIDATES, Candidate, Drawn, Shortlist, Wish};

/// Bytes of a total, of a drawn token with its sums, and of a candidate.
const TOTAL_BYTES: usize = 8;
const DRAWN_BYTES: usize = 24;
const CANDIDATE_BYTES: usize = 8;

/// What is found out about every row of a pass's output.
pub(crate) struct Selection {
    /// Candidates of a row.
    pub(crate) wanted: usize,
    temperatures: Offset,
    randoms: Offset,
}

impl Selection {
    /// For rows with these wishes, over a vocabulary that is not empty. Rows without one are treated alike, for nothing.
    pub(crate) fn new(
        tables: &mut Tables,
        wishes: impl Iterator<Item = Option<Wish>> + Clone,
        vocab: usize,
    ) -> Selection {
        let several = wishes.clone().flatten().any(|wish| wish.several);
        Selection {
            wanted: if several { CANDIDATES.min(vocab) } else { 1 },
            temperatures: tables.push(wishes.clone().map(|wish| wish.map_or(1.0, |wish| wish.temperature))),
            randoms: tables.push(wishes.map(|wish| wish.map_or(0.0, |wish| wish.random))),
        }
    }

    /// Bytes of the results for so many rows: totals, drawn tokens, candidates.
    pub(crate) fn bytes(&self, rows: usize) -> usize {
        rows * (TOTAL_BYTES + DRAWN_BYTES + self.wanted * CANDIDATE_BYTES)
    }

    /// The results for the first rows of `rows`, of the bytes that [`Selection::bytes`] counts.
    pub(crate) fn shortlists(&self, bytes: &[u8], rows: usize) -> Vec<Shortlist> {
        let (totals, rest) = bytes.split_at(rows * TOTAL_BYTES);
        let (drawn, candidates) = rest.split_at(rows * DRAWN_BYTES);
        let number = |bytes: &[u8]| f64::from_le_bytes(*bytes.as_array().unwrap_or(&[0xff; 8]));
        let word = |bytes: &[u8]| u32::from_le_bytes(*bytes.as_array().unwrap_or(&[0; 4]));
        let of_row = candidates.chunks_exact(self.wanted * CANDIDATE_BYTES);
        totals
            .chunks_exact(TOTAL_BYTES)
            .zip(drawn.chunks_exact(DRAWN_BYTES))
            .zip(of_row)
            .map(|((total, drawn), candidates)| Shortlist {
                candidates: candidates
                    .chunks_exact(CANDIDATE_BYTES)
                    .map(|bytes| Candidate {
                        token: word(&bytes[..4]),
                        logit: f32::from_bits(word(&bytes[4..])),
                    })
                    .collect(),
                total: number(total),
                drawn: Drawn {
                    token: word(&drawn[..4]),
                    below: number(&drawn[8..16]),
                    upto: number(&drawn[16..]),
                },
            })
            .collect()
    }
}

impl Step<'_> {
    /// Finds out what is wanted of the rows of logits, `[output rows, vocab]`.
    pub(super) fn select(&mut self, logits: u64, vocab: usize) -> Result<(), ExecuteError> {
        let Some(selection) = &self.pass.selection else { return Ok(()) };
        let rows = self.pass.output_rows;
        let totals = self.pass.memory.selection.reserve(selection.bytes(rows))?;
        let drawn = totals + (rows * TOTAL_BYTES) as u64;
        let arguments = CandidatesArguments {
            logits,
            candidates: drawn + (rows * DRAWN_BYTES) as u64,
            totals,
            temperatures: self.table(selection.temperatures),
            randoms: self.table(selection.randoms),
            drawn,
            vocab: vocab as u32,
            wanted: selection.wanted as u32,
        };
        // SAFETY: every row has its logits, a temperature and a random number, and room for its results; there are at
        // least as many tokens as are wanted.
        unsafe { self.kernels.candidates(launch::candidates(rows), &arguments) }?;
        Ok(())
    }
}
