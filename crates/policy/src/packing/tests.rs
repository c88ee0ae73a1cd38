use proptest::collection::vec;
use proptest::strategy::Strategy as Generator;
use proptest::test_runner::{Config, TestCaseError};
use proptest::{prop_assert, prop_assert_eq, prop_oneof, proptest};

use super::*;

const STRATEGIES: [Strategy; 5] = [
    Strategy::PartitionedGain,
    Strategy::Published,
    Strategy::MoveEverything,
    Strategy::GreedyWindow,
    Strategy::BestFitThenGreedy,
];

const ALIGNMENT: u64 = 4;

fn extent(offset: u64, len: u64) -> Extent {
    Extent { offset, len, movable: true }
}

fn wall(offset: u64, len: u64) -> Extent {
    Extent { offset, len, movable: false }
}

fn moved(len: u64, strategy: Strategy, residents: &[Extent], sizes: &[u64]) -> Option<u64> {
    let mut packer = Packer::new(len, ALIGNMENT);
    let packing = packer.pack(strategy, residents, sizes)?;
    check(len, residents, sizes, packing).unwrap();
    Some(packing.moved_bytes)
}

/// Carries out a packing on an array of bytes and holds the outcome against what is promised.
fn check(len: u64, residents: &[Extent], sizes: &[u64], packing: &Packing) -> Result<(), String> {
    const FREE: u32 = u32::MAX;
    // Every byte of a resident is a number of its own, so a byte that got lost or swapped is seen.
    let mut memory = vec![FREE; len as usize];
    let mut number = 0..;
    for resident in residents {
        for byte in resident.offset..resident.offset + resident.len {
            memory[byte as usize] = number.next().unwrap();
        }
    }
    let before = memory.clone();
    let mut now = residents.to_vec();
    let mut moved_bytes = 0;
    for &Move { from, to, len } in &packing.moves {
        let resident = now.iter_mut().find(|extent| extent.offset == from && extent.len == len);
        let resident = resident.ok_or(format!("{from} is no resident"))?;
        if !resident.movable || to == from || to % ALIGNMENT != 0 || (to > from && to < from + len) {
            return Err(format!("{resident:?} must not move to {to}"));
        }
        resident.offset = to;
        let (from, to, len) = (from as usize, to as usize, len as usize);
        let bytes = memory[from..from + len].to_vec();
        memory[from..from + len].fill(FREE);
        if memory[to..to + len].iter().any(|&byte| byte != FREE) {
            return Err(format!("{from} is moved to {to}, which is taken"));
        }
        memory[to..to + len].copy_from_slice(&bytes);
        moved_bytes += len as u64;
    }
    if moved_bytes != packing.moved_bytes {
        return Err(format!("{moved_bytes} moved, {} said", packing.moved_bytes));
    }
    let mut taken: Vec<(u64, u64)> = now.iter().map(|extent| (extent.offset, extent.len)).collect();
    let mut placed = vec![0; sizes.len()];
    for &(index, offset) in &packing.placements {
        placed[index] += 1;
        if offset % ALIGNMENT != 0 {
            return Err(format!("{offset} is not aligned"));
        }
        taken.push((offset, sizes[index]));
    }
    if placed.iter().any(|&times| times != 1) {
        return Err(format!("placed {placed:?} times"));
    }
    taken.sort_unstable();
    if taken.windows(2).any(|pair| pair[0].0 + pair[0].1 > pair[1].0)
        || taken.last().is_some_and(|last| last.0 + last.1 > len)
    {
        return Err(format!("overlap in {taken:?}"));
    }
    for (old, new) in residents.iter().zip(&now) {
        let bytes = |memory: &[u32], extent: &Extent| {
            memory[extent.offset as usize..][..extent.len as usize].to_vec()
        };
        if bytes(&before, old) != bytes(&memory, new) {
            return Err(format!("{old:?} was damaged on its way to {}", new.offset));
        }
    }
    Ok(())
}

#[test]
fn what_fits_needs_no_move() {
    // First fit would put the 8 into the hole of 12 and then have to move for the 12.
    let residents = [extent(12, 100), extent(120, 20)];
    assert_eq!(moved(140, Strategy::PartitionedGain, &residents, &[8, 12]), Some(0));
}

#[test]
fn the_cheapest_hole_to_hole_span_is_merged() {
    // Holes of 8 at 0, 108 and 120, with 100 and 4 bytes between them.
    let residents = [extent(8, 100), extent(116, 4), extent(128, 40)];
    for strategy in [Strategy::PartitionedGain, Strategy::Published, Strategy::GreedyWindow] {
        assert_eq!(moved(168, strategy, &residents, &[16]), Some(4), "{strategy:?}");
    }
    // 100 and 4 slide because holes follow, 40 because everything does.
    assert_eq!(moved(168, Strategy::MoveEverything, &residents, &[16]), Some(144));
}

#[test]
fn residents_leave_for_holes_elsewhere() {
    // For 28, merging the holes at 0 and 112 would move the 4 and the 100; but the 4 has a place at 120, and 20 + 4
    // are not enough, so the published plan moves both.
    let residents = [extent(24, 4), extent(28, 80), extent(112, 8)];
    // Holes: 24 at 0, 4 at 108, 20 at 120.
    assert_eq!(moved(140, Strategy::PartitionedGain, &residents, &[28]), Some(4));
    assert_eq!(moved(140, Strategy::Published, &residents, &[28]), Some(84));
}

#[test]
fn residents_leave_across_walls() {
    // Holes of 24 and 8, apart by a movable 4 and a wall: room for 28 only if the 4 goes beyond the wall.
    let residents = [extent(24, 4), wall(28, 4)];
    assert_eq!(moved(40, Strategy::PartitionedGain, &residents, &[28]), Some(4));
    assert_eq!(moved(40, Strategy::MoveEverything, &residents, &[28]), None);
}

#[test]
fn full_and_empty_segments() {
    for strategy in STRATEGIES {
        assert_eq!(moved(64, strategy, &[], &[40, 24]), Some(0));
        assert_eq!(moved(64, strategy, &[], &[40, 25]), None);
        assert_eq!(moved(64, strategy, &[extent(0, 64)], &[]), Some(0));
        assert_eq!(moved(64, strategy, &[extent(0, 64)], &[1]), None);
        assert_eq!(moved(0, strategy, &[], &[]), Some(0));
        assert_eq!(moved(64, strategy, &[], &[u64::MAX]), None);
        assert_eq!(moved(64, strategy, &[], &[0, 0]), Some(0));
    }
}

#[test]
fn leased_extents_are_walls() {
    // Two holes of 8 with a wall between them: room for two tensors of 8, not for one of 16.
    let residents = [wall(8, 4), extent(20, 4)];
    for strategy in STRATEGIES {
        assert_eq!(moved(24, strategy, &residents, &[16]), None, "{strategy:?}");
        let expected = if strategy == Strategy::MoveEverything { 4 } else { 0 };
        assert_eq!(moved(24, strategy, &residents, &[8, 8]), Some(expected), "{strategy:?}");
    }
}

#[test]
fn the_padding_of_a_resident_is_not_free() {
    for strategy in STRATEGIES {
        assert_eq!(
            moved(16, strategy, &[extent(4, 5)], &[4, 4]),
            Some(if strategy == Strategy::MoveEverything { 5 } else { 0 })
        );
        assert_eq!(moved(16, strategy, &[extent(4, 5)], &[4, 5]), None);
    }
}

#[test]
#[cfg(debug_assertions)]
#[should_panic(expected = "residents overlap")]
fn overlapping_residents_are_refused() {
    moved(64, Strategy::PartitionedGain, &[extent(0, 8), extent(4, 8)], &[4]);
}

/// The published descent as it is described, tensor by tensor and cut by cut; moved bytes.
fn published_literally(len: u64, residents: &[Extent], sizes: &[u64]) -> Option<u64> {
    let mut layout = Layout::default();
    assert!(layout.read(len / ALIGNMENT * ALIGNMENT, ALIGNMENT, residents));
    let free: Vec<u64> = layout.holes.iter().map(|hole| hole.len).collect();
    let mut sizes: Vec<u64> = sizes.iter().map(|size| size.max(&1).next_multiple_of(ALIGNMENT)).collect();
    sizes.sort_unstable_by_key(|&size| std::cmp::Reverse(size));
    if sizes.iter().sum::<u64>() > free.iter().sum() {
        return None;
    }
    let mut groups = vec![(0, free.len(), sizes)];
    let mut total = 0;
    'groups: while let Some((first, end, sizes)) = groups.pop() {
        if sizes.is_empty() {
            continue;
        }
        let mut cuts: Vec<usize> = (first..end - 1).collect();
        cuts.sort_by_key(|&cut| std::cmp::Reverse(layout.gaps[cut]));
        if cuts.first().is_some_and(|&cut| layout.gaps[cut] == layout::WALL) {
            cuts.retain(|&cut| layout.gaps[cut] == layout::WALL);
        }
        'cuts: for &cut in &cuts {
            let mut left: u64 = free[first..=cut].iter().sum();
            let mut right: u64 = free[cut + 1..end].iter().sum();
            let (mut to_left, mut to_right) = (Vec::new(), Vec::new());
            for &size in &sizes {
                if left >= right && left >= size {
                    left -= size;
                    to_left.push(size);
                } else if right > left && right >= size {
                    right -= size;
                    to_right.push(size);
                } else {
                    continue 'cuts;
                }
            }
            groups.push((first, cut + 1, to_left));
            groups.push((cut + 1, end, to_right));
            continue 'groups;
        }
        for cut in cuts {
            if layout.gaps[cut] == layout::WALL {
                return None;
            }
            total += layout.gaps[cut];
        }
    }
    Some(total)
}

/// Segments with `holes` holes and residents between them, some of them leased, and tensors that may or may not fit.
fn segments(walls: bool, pieces: usize) -> impl Generator<Value = (u64, Vec<Extent>, Vec<u64>)> {
    let piece = (0u64..12, 0u64..30, 0u8..10);
    let tensors = pieces / 4 * 3 + 1;
    let pieces = vec(piece, 0..pieces);
    let sizes = prop_oneof![
        vec(0u64..60, 0..tensors),
        // Many of equal size, as in a model.
        vec((1u64..60, 1..tensors), 0..5)
            .prop_map(|runs| runs.into_iter().flat_map(|(size, count)| vec![size; count]).collect()),
    ];
    (pieces, sizes, 0u64..40).prop_map(move |(pieces, mut sizes, slack)| {
        let mut residents = Vec::new();
        let (mut end, mut free) = (0, 0);
        for (hole, len, kind) in pieces {
            // Half of the residents have no hole before them.
            let hole = hole.saturating_sub(6) * ALIGNMENT;
            free += hole;
            residents.push(Extent { offset: end + hole, len, movable: !walls || kind > 0 });
            end += hole + len.max(1).next_multiple_of(ALIGNMENT);
        }
        // Most of the time, ask for about as much as there is: that is the hard case, and the usual one.
        while sizes.iter().map(|size| size.max(&1).next_multiple_of(ALIGNMENT)).sum::<u64>() > free + slack {
            sizes.pop();
        }
        (end + slack, residents, sizes)
    })
}

/// Holds every strategy against what is promised, and ours against theirs.
fn compare(len: u64, residents: &[Extent], sizes: &[u64]) -> Result<(), TestCaseError> {
    let mut packer = Packer::new(len, ALIGNMENT);
    let mut bytes = [None; STRATEGIES.len()];
    for (bytes, strategy) in bytes.iter_mut().zip(STRATEGIES) {
        if let Some(packing) = packer.pack(strategy, residents, sizes) {
            if let Err(fault) = check(len, residents, sizes, packing) {
                return Err(TestCaseError::fail(format!("{strategy:?}: {fault}")));
            }
            *bytes = Some(packing.moved_bytes);
        }
    }
    let [ours, published, everything, ..] = bytes;
    for theirs in [published, everything].into_iter().flatten() {
        prop_assert!(ours.is_some_and(|ours| ours <= theirs), "{:?}", bytes);
    }
    Ok(())
}

proptest! {
    #![proptest_config(Config::with_cases(60))]

    /// The same where the searches run out of steps.
    #[test]
    fn large_plans_are_safe_and_ours_is_best((len, residents, sizes) in segments(true, 1500)) {
        compare(len, &residents, &sizes)?;
    }

    /// The same without walls, so that there always is a plan.
    #[test]
    fn large_plans_without_walls((len, residents, sizes) in segments(false, 1500)) {
        compare(len, &residents, &sizes)?;
    }
}

proptest! {
    #![proptest_config(Config::with_cases(2000))]

    /// Whatever a strategy plans can be carried out; ours moves least and finds room wherever another does.
    #[test]
    fn plans_are_safe_and_ours_is_best((len, residents, sizes) in segments(true, 40)) {
        compare(len, &residents, &sizes)?;
    }

    /// Without leased extents, room is found exactly if there are enough free bytes.
    #[test]
    fn without_walls_free_bytes_are_enough((len, residents, sizes) in segments(false, 40)) {
        let taken = |bytes: u64| bytes.max(1).next_multiple_of(ALIGNMENT);
        let needed: u64 = sizes.iter().map(|&size| taken(size)).sum();
        let free = len / ALIGNMENT * ALIGNMENT - residents.iter().map(|extent| taken(extent.len)).sum::<u64>();
        for strategy in STRATEGIES {
            prop_assert_eq!(moved(len, strategy, &residents, &sizes).is_some(), needed <= free, "{:?}", strategy);
        }
    }

    /// The shortcuts (runs of equal tensors, the tree of cuts) change nothing in what is published.
    #[test]
    fn published_is_what_is_described((len, residents, sizes) in segments(true, 40)) {
        let literally = published_literally(len, &residents, &sizes);
        prop_assert_eq!(moved(len, Strategy::Published, &residents, &sizes), literally);
    }

    /// A packer carries nothing over from one plan to the next.
    #[test]
    fn plans_do_not_depend_on_earlier_ones(cases in vec(segments(true, 40), 1..5)) {
        let len = cases.iter().map(|case| case.0).max().unwrap_or_default();
        let mut packer = Packer::new(len, ALIGNMENT);
        for (_, residents, sizes) in &cases {
            for strategy in STRATEGIES {
                let fresh = Packer::new(len, ALIGNMENT).pack(strategy, residents, sizes).cloned();
                prop_assert_eq!(packer.pack(strategy, residents, sizes).cloned(), fresh);
            }
        }
    }
}
