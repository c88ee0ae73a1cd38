//! The same tests on every device: the processor's memory, and the stand-in of a GPU, which the host reaches by copies.

use proptest::prelude::*;

use super::*;
use crate::cpu::CpuDevice;
use crate::cuda::stand_in;

const PAGE: usize = 4096;

/// A memory of so many pages, of each kind of device.
fn machines(pages: usize) -> [Arc<Memory>; 2] {
    [CpuDevice::open(pages * PAGE, PAGE).unwrap(), stand_in::memory(pages * PAGE, PAGE)]
}

fn bytes(extent: &Extent) -> Vec<u8> {
    let mut bytes = vec![0x11; extent.len()];
    extent.read(0, &mut bytes).unwrap();
    if let Some(host) = extent.host_bytes() {
        assert!(host == bytes, "two ways to read");
    }
    bytes
}

fn fill(extent: &mut Extent, value: u8) {
    extent.write(0, &vec![value; extent.len()]).unwrap();
}

fn all_are(extent: &Extent, value: u8) -> bool {
    bytes(extent).iter().all(|&byte| byte == value)
}

#[test]
fn neighbours_share_the_page_on_their_border() {
    for memory in machines(4) {
        let arena = Arena::reserve(memory.clone(), 4 * PAGE).unwrap();
        let first = arena.claim(0, PAGE + 100).unwrap();
        assert_eq!(memory.free_pages(), 2);
        let second = arena.claim(PAGE + 100, 50).unwrap();
        assert_eq!(memory.free_pages(), 2, "the second extent lies on a page that is already there");
        drop(first);
        assert_eq!(memory.free_pages(), 3, "the shared page stays for the second extent");
        drop(second);
        assert_eq!(memory.free_pages(), 4);
    }
}

#[test]
fn overlap_overrun_and_empty_claims_are_refused_and_change_nothing() {
    for memory in machines(4) {
        let arena = Arena::reserve(memory.clone(), 4 * PAGE).unwrap();
        let _held = arena.claim(100, 100).unwrap();
        for (offset, len) in [(150, 10), (0, 101), (199, 1), (0, 0), (4 * PAGE, 1), (usize::MAX, 2)] {
            assert!(matches!(arena.claim(offset, len), Err(DeviceError::BadClaim { .. })), "{offset}+{len}");
        }
        let both = [Claim { offset: 300, len: 10 }, Claim { offset: 305, len: 10 }];
        assert!(arena.claim_all(&both, Contents::Zeroed).is_err());
        assert!(arena.claim(300, 10).is_ok(), "a failed batch leaves no claim behind");
        assert!(arena.claim(200, 1).is_ok());
    }
}

#[test]
fn too_much_is_refused_whole() {
    for memory in machines(2) {
        let arena = Arena::reserve(memory.clone(), 8 * PAGE).unwrap();
        let _one = arena.claim(0, PAGE).unwrap();
        let error = arena.claim(2 * PAGE, 2 * PAGE).unwrap_err();
        assert!(matches!(error, DeviceError::OutOfPages { needed: 2, free: 1, .. }));
        assert_eq!(memory.free_pages(), 1);
    }
}

#[test]
fn an_address_survives_eviction_and_leftovers_are_scrubbed() {
    for memory in machines(1) {
        let arena = Arena::reserve(memory.clone(), PAGE).unwrap();
        let other = Arena::reserve(memory.clone(), PAGE).unwrap();
        let mut secret = arena.claim(0, PAGE).unwrap();
        let address = secret.address();
        fill(&mut secret, 0x5e);
        drop(secret);
        // The same physical page, for a tensor of another tenant that covers only a part of it.
        let claim = Claim { offset: 1000, len: 1000 };
        let loaded = other.claim_all(&[claim], Contents::Overwritten).unwrap();
        let rest: Vec<_> = [other.claim(0, 1000).unwrap(), other.claim(2000, PAGE - 2000).unwrap()].into();
        assert!(rest.iter().all(|extent| all_are(extent, 0)));
        drop((loaded, rest));
        assert_eq!(arena.claim(0, PAGE).unwrap().address(), address);
    }
}

#[test]
fn a_split_extent_frees_its_parts_separately() {
    for memory in machines(4) {
        let arena = Arena::reserve(memory.clone(), 4 * PAGE).unwrap();
        let mut head = arena.claim(0, 3 * PAGE).unwrap();
        let mut tail = head.split_off(PAGE + 10);
        let last = tail.split_off(PAGE);
        tail.join(last);
        drop(head);
        assert_eq!(memory.free_pages(), 2);
        drop(tail);
        assert_eq!(memory.free_pages(), 4);
    }
}

#[test]
fn a_segment_moves_its_extents_and_gives_all_pages_back() {
    for memory in machines(4) {
        let segment = Arena::segment(memory.clone()).unwrap();
        assert_eq!(memory.free_pages(), 0);
        let mut extent = segment.claim(2 * PAGE + 100, PAGE).unwrap();
        let content: Vec<u8> = (0..PAGE).map(|i| i as u8 ^ (i >> 8) as u8).collect();
        extent.write(0, &content).unwrap();
        let wall = segment.claim(256, 64).unwrap();
        for offset in [2 * PAGE, 2 * PAGE + 7, 3 * PAGE, 320] {
            extent.move_to(offset).unwrap();
            assert_eq!(extent.offset(), offset);
            assert!(bytes(&extent) == content);
        }
        for offset in [256, 319, 3 * PAGE + 1, usize::MAX] {
            assert!(extent.move_to(offset).is_err(), "{offset}");
            assert!(bytes(&extent) == content);
        }
        assert!(segment.claim(320, 1).is_err(), "the extent is where it was moved to");
        assert!(segment.claim(2 * PAGE + 100, 1).is_ok(), "and no longer where it was");
        drop((extent, wall, segment));
        assert_eq!(memory.free_pages(), 4);
        let arena = Arena::reserve(memory, PAGE).unwrap();
        assert!(arena.claim(0, 100).unwrap().move_to(200).is_err(), "only a segment's extents move");
    }
}

#[test]
fn parts_of_an_extent_are_read_and_written() {
    for memory in machines(2) {
        let arena = Arena::reserve(memory, 2 * PAGE).unwrap();
        let mut extent = arena.claim(300, PAGE).unwrap();
        extent.write(PAGE - 3, &[1, 2, 3]).unwrap();
        let mut read = [0; 4];
        extent.read(PAGE - 4, &mut read).unwrap();
        assert_eq!(read, [0, 1, 2, 3]);
        for (at, len) in [(PAGE - 3, 4), (PAGE + 1, 0), (usize::MAX, 2)] {
            let beyond = std::panic::AssertUnwindSafe(|| extent.read(at, &mut vec![0; len]));
            assert!(std::panic::catch_unwind(beyond).is_err(), "{at}+{len}");
        }
    }
}

proptest! {
    /// Random moves in a segment, near and far, over themselves and not, of what spans pages.
    #[test]
    fn a_move_keeps_the_bytes(
        len in 1usize..3 * PAGE, places in proptest::collection::vec(0usize..8 * PAGE, 1..8)
    ) {
        for memory in machines(8) {
            let segment = Arena::segment(memory).unwrap();
            let mut extent = segment.claim(4 * PAGE, len).unwrap();
            let content: Vec<u8> = (0..len).map(|i| (i * 7 + i / 251) as u8).collect();
            extent.write(0, &content).unwrap();
            for &place in &places {
                let fits = place + len <= 8 * PAGE;
                prop_assert_eq!(extent.move_to(place).is_ok(), fits);
                prop_assert!(bytes(&extent) == content);
            }
        }
    }

    /// Random claims and releases over two arenas against a plain model: contents stay, fresh bytes are zero,
    /// the page count is what the live extents cover.
    #[test]
    fn arenas_agree_with_a_model(
        steps in proptest::collection::vec((0usize..2, 0usize..16 * PAGE, 1usize..3 * PAGE, any::<u8>()), 1..60)
    ) {
        for memory in machines(12) {
            let arenas = [0, 1].map(|_| Arena::reserve(memory.clone(), 16 * PAGE).unwrap());
            let mut live: Vec<(usize, Extent, u8)> = Vec::new();
            for &(arena, offset, len, value) in &steps {
                if value % 3 == 0 && !live.is_empty() {
                    let at = offset % live.len();
                    if value % 2 == 0 { drop(live.swap_remove(at)); } else {
                        let many = live.split_off(at).into_iter().map(|(_, extent, _)| extent).collect();
                        Extent::release_all(many);
                    }
                } else if let Ok(mut extent) = arenas[arena].claim(offset, len) {
                    prop_assert!(all_are(&extent, 0));
                    fill(&mut extent, value | 1);
                    live.push((arena, extent, value | 1));
                }
                let mut pages = std::collections::BTreeSet::new();
                for (arena, extent, value) in &live {
                    prop_assert!(all_are(extent, *value));
                    let span = extent.offset() / PAGE..(extent.offset() + extent.len()).div_ceil(PAGE);
                    pages.extend(span.map(|page| (*arena, page)));
                }
                prop_assert_eq!(memory.free_pages(), 12 - pages.len());
            }
        }
    }
}
