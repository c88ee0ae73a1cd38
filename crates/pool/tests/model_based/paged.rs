//! What holds of the paged backend only: every extent has a fixed place in the arena of its checkpoint or its KV
//! identity, exactly the pages under live extents are mapped, and room is counted in pages.

use std::collections::BTreeSet;
use std::ops::Range;

use crate::program::Program;
use crate::reference::Stage;

/// Page `.1` of arena `.0`: checkpoints first, then KV.
type Page = (usize, usize);

const KV: usize = 1000;

fn pages(arena: usize, bytes: Range<usize>, page_bytes: usize) -> impl Iterator<Item = Page> {
    (bytes.start / page_bytes..bytes.end.div_ceil(page_bytes)).map(move |page| (arena, page))
}

/// What the plain model says about pages.
struct Pages {
    /// Certainly under a live extent.
    mapped: BTreeSet<Page>,
    /// In the range of something that cannot be evicted, although it may not be there any more.
    pinned: BTreeSet<Page>,
    /// Under blocks that are cached unless they have been evicted.
    cached: BTreeSet<Page>,
}

fn count(program: &Program) -> Pages {
    let page_bytes = program.universe.page_bytes;
    let mut sets = Pages { mapped: BTreeSet::new(), pinned: BTreeSet::new(), cached: BTreeSet::new() };
    for slot in program.reference.slots.values() {
        let Some(resident) = &slot.resident else { continue };
        let (file, offset) = slot.home;
        let whole = offset..offset + slot.len;
        match resident.stage {
            Stage::Ready => sets.mapped.extend(pages(file, whole.clone(), page_bytes)),
            Stage::Arriving | Stage::Failed(_) => {
                for (part, _) in resident.parts.iter().filter(|(_, live)| *live) {
                    sets.mapped.extend(pages(file, offset + part.start..offset + part.end, page_bytes));
                }
            }
        }
        if !slot.is_idle() {
            sets.pinned.extend(pages(file, whole, page_bytes));
        }
    }
    for sequence in &program.sequences {
        for (block, _) in &sequence.own {
            let bytes = block.offset()..block.offset() + block.len();
            sets.pinned.extend(pages(KV + sequence.identity, bytes, page_bytes));
        }
    }
    for (identity, kv) in program.reference.kv.iter().enumerate() {
        for block in kv.published.values() {
            let bytes = block.offset..block.offset + program.universe.block_bytes[identity];
            let set = if block.leases > 0 { &mut sets.pinned } else { &mut sets.cached };
            set.extend(pages(KV + identity, bytes, page_bytes));
        }
    }
    let kv_in_use: Vec<Page> = sets.pinned.range((KV, 0)..).copied().collect();
    sets.mapped.extend(kv_in_use);
    sets
}

/// Pages that the pool sets aside for these blocks.
fn reserved(program: &Program, reserve: &[(usize, usize)]) -> usize {
    let bytes = |&(identity, blocks): &(usize, usize)| blocks * program.universe.block_bytes[identity];
    reserve.iter().map(|blocks| bytes(blocks).div_ceil(program.universe.page_bytes)).sum()
}

/// Whether there is room for these tensors and for further blocks (identity, how many) when everything else that is idle
/// goes.
pub fn fits(program: &Program, contents: &[usize], reserve: &[(usize, usize)]) -> bool {
    let Pages { mapped, pinned, .. } = count(program);
    let mut staying: BTreeSet<Page> = mapped.intersection(&pinned).copied().collect();
    for content in contents {
        let slot = &program.reference.slots[content];
        if slot.resident.is_none() || slot.is_idle() {
            let (file, offset) = slot.home;
            staying.extend(pages(file, offset..offset + slot.len, program.universe.page_bytes));
        }
    }
    staying.len() + reserved(program, reserve) <= program.universe.pages
}

/// Whether there are free pages for any of these tensors on its own.
pub fn is_free(program: &Program, contents: &[usize]) -> bool {
    let page_bytes = program.universe.page_bytes;
    let pages = |content: &usize| program.reference.slots[content].len.div_ceil(page_bytes) + 1;
    contents.iter().map(pages).max().unwrap_or(0) <= program.pool.memory().free_pages()
}

/// Pages add up: none is lost, none is counted twice, and what is said to be available is.
pub fn check(program: &mut Program) {
    let Pages { mapped, pinned, cached } = count(program);
    let (all, free) = (program.universe.pages, program.pool.memory().free_pages());
    let available = all - mapped.intersection(&pinned).count();
    // Blocks of the probe have a page each.
    assert!(
        program.can_probe(available) && !program.can_probe(available + 1),
        "{available} pages are available"
    );
    assert!(program.has_probe(free) && !program.has_probe(free + 1), "{free} pages are free");
    let cached_bytes = program.reference.cached_bytes;
    if cached_bytes == 0 {
        assert_eq!(free, all - mapped.len(), "free pages");
    } else if cached_bytes == program.reference.cached_at_most(&program.universe.block_bytes) {
        assert_eq!(free, all - mapped.union(&cached).count(), "free pages, with all cached blocks there");
    }
    assert!(free <= all - mapped.len(), "{free} pages are free, at most {} can be", all - mapped.len());
    assert_eq!(program.pool.free_bytes(), (free * program.universe.page_bytes) as u64);
}
