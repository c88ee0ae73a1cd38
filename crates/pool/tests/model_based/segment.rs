//! What holds of the segment only: everything lies in one range, aligned, and the bytes of it that nothing lies in are
//! free; what is leased, arriving or written by a sequence is a wall that stays where it is, whatever moves around it;
//! room is what lies between the walls.

use tangram_pool::{ALIGNMENT, Shortage};

use crate::program::Program;

pub fn footprint(bytes: usize) -> usize {
    bytes.next_multiple_of(ALIGNMENT)
}

/// What cannot be moved or evicted: where it is, if anybody was told, and its footprint.
fn walls(program: &Program) -> Vec<(Option<usize>, usize)> {
    let mut walls = Vec::new();
    for slot in program.reference.slots.values().filter(|slot| !slot.is_idle()) {
        if let Some(resident) = &slot.resident {
            walls.push((resident.address, footprint(slot.len)));
        }
    }
    for sequence in &program.sequences {
        let own = sequence.own.iter().map(|(block, _)| (Some(block.address()), footprint(block.len())));
        walls.extend(own);
    }
    for (kv, &bytes) in program.reference.kv.iter().zip(&program.universe.block_bytes) {
        let leased = kv.published.values().filter(|block| block.leases > 0);
        walls.extend(leased.map(|block| (Some(program.base + block.offset), footprint(bytes))));
    }
    walls.sort_unstable();
    walls
}

/// Bytes between neighbouring walls, in address order; `None` if it is not known where all of them are.
fn compartments(program: &Program) -> Option<Vec<usize>> {
    let (mut compartments, mut from) = (Vec::new(), program.base);
    for (address, bytes) in walls(program) {
        compartments.push(address?.checked_sub(from).expect("walls do not overlap"));
        from = address? + bytes;
    }
    compartments
        .push((program.base + program.universe.bytes()).checked_sub(from).expect("inside the segment"));
    Some(compartments)
}

/// Footprints of what of these tensors is missing and of these blocks (identity, how many).
fn wanted(program: &Program, contents: &[usize], reserve: &[(usize, usize)]) -> Vec<usize> {
    let slots = contents.iter().map(|content| &program.reference.slots[content]);
    let missing = slots.filter(|slot| slot.resident.is_none()).map(|slot| footprint(slot.len));
    let blocks = reserve.iter().flat_map(|&(identity, count)| {
        std::iter::repeat_n(footprint(program.universe.block_bytes[identity]), count)
    });
    missing.chain(blocks).collect()
}

/// What the pool says when it refuses these.
pub fn shortage(program: &Program, contents: &[usize], reserve: &[(usize, usize)]) -> Shortage {
    let walled: usize = walls(program).iter().map(|&(_, bytes)| bytes).sum();
    let needed = wanted(program, contents, reserve).iter().sum::<usize>() as u64;
    Shortage { needed, available: (program.universe.bytes() - walled) as u64 }
}

/// Whether there is room for these tensors and for further blocks (identity, how many) when everything else that is idle
/// goes; `None` where that is a puzzle, or depends on where idle tensors of the request lie.
///
/// The pool tries first fit by falling size over the compartments among other things, so where nothing has to stay but
/// the walls and first fit succeeds, the pool must.
pub fn fits(program: &Program, contents: &[usize], reserve: &[(usize, usize)]) -> Option<bool> {
    let slots = contents.iter().map(|content| &program.reference.slots[content]);
    let staying: usize = slots.filter(|slot| slot.is_idle()).map(|slot| footprint(slot.len)).sum();
    let mut sizes = wanted(program, contents, reserve);
    sizes.sort_unstable_by(|a, b| b.cmp(a));
    let walled: usize = walls(program).iter().map(|&(_, bytes)| bytes).sum();
    let total: usize = sizes.iter().sum();
    if walled + staying + total > program.universe.bytes() {
        return Some(false);
    }
    let mut compartments = compartments(program)?;
    let widest = compartments.iter().copied().max().unwrap_or(0);
    if sizes.first().is_some_and(|&size| size > widest) {
        return Some(false);
    }
    if staying + total <= widest {
        return Some(true);
    }
    let first_fit = sizes.iter().all(|&size| match compartments.iter_mut().find(|left| **left >= size) {
        Some(left) => {
            *left -= size;
            true
        }
        None => false,
    });
    (staying == 0 && first_fit).then_some(true)
}

/// How many blocks of `bytes` find room when everything idle goes.
pub fn blocks_that_fit(program: &Program, bytes: usize) -> Option<usize> {
    Some(compartments(program)?.iter().map(|compartment| compartment / footprint(bytes)).sum())
}

/// Whether any of these tensors on its own certainly finds room without evicting anything.
pub fn is_free(program: &Program, contents: &[usize]) -> bool {
    let bytes = |content: &usize| footprint(program.reference.slots[content].len);
    let largest = contents.iter().map(bytes).max().unwrap_or(0);
    // What is idle can be moved together, but only between two walls.
    walls(program).is_empty() && largest as u64 <= program.pool.free_bytes()
}

/// Free bytes add up; everything is aligned, inside the segment and on its own; room is counted between the walls.
pub fn check(program: &mut Program) {
    let placed: usize = {
        let reference = &program.reference;
        let resident = reference.slots.values().filter(|slot| slot.is_idle()).map(|slot| footprint(slot.len));
        resident.sum::<usize>() + footprint(reference.cached_bytes as usize)
    };
    let walls = walls(program);
    let walled: usize = walls.iter().map(|&(_, bytes)| bytes).sum();
    let mut from = program.base;
    for &(address, bytes) in &walls {
        let Some(address) = address else { continue };
        assert!(address >= from, "{address:#x} is in what lies before it");
        assert_eq!((address - program.base) % ALIGNMENT, 0, "not aligned");
        from = address + bytes;
    }
    let all = program.universe.bytes();
    assert!(from <= program.base + all, "beyond the segment");
    let free = all - walled - placed;
    assert_eq!(program.pool.free_bytes(), free as u64, "free bytes");
    // Blocks of the probe have the size of the alignment, so every byte counts.
    let (free, available) = (free / ALIGNMENT, (all - walled) / ALIGNMENT);
    assert!(program.has_probe(free) && !program.has_probe(free + 1), "{free} units are free");
    assert!(program.can_probe(available) && !program.can_probe(available + 1), "{available} are available");
    assert_eq!(program.pool.memory().free_pages(), 0, "the segment has all pages");
}
