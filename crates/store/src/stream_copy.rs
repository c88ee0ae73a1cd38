//! Copies that go past the caches: of what is far larger than these and is not used right away.
//!
//! An ordinary copy reads each line of its destination before it overwrites it, which is a third of its traffic, and pushes
//! what others use out of the caches. Where the processor has no such stores this is an ordinary copy.

#![allow(unsafe_code)]

/// Copies `from` to `to`, which must be as long, and brings `next`, which is read after it, into the caches on the way:
/// loads have little to do while the stores wait for the memory.
pub(crate) fn stream_copy(from: &[u8], to: &mut [u8], next: &[u8]) {
    assert_eq!(from.len(), to.len(), "a copy is as long as what is copied");
    #[cfg(target_arch = "x86_64")]
    {
        if std::arch::is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has AVX-512F.
            return unsafe { x86::copy_512(from, to, next) };
        }
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has AVX2, so AVX too.
            return unsafe { x86::copy_256(from, to, next) };
        }
    }
    to.copy_from_slice(from);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m256i, __m512i, _MM_HINT_T0, _mm_prefetch, _mm_sfence, _mm256_loadu_si256, _mm256_stream_si256,
        _mm512_loadu_si512, _mm512_stream_si512,
    };

    /// Bytes that caches hold together.
    const LINE: usize = 64;
    /// Vectors per turn.
    const TURN: usize = 4;

    macro_rules! copy {
        ($name:ident, $feature:literal, $vector:ty, $load:ident, $store:ident) => {
            /// As [`super::stream_copy`].
            ///
            /// # Safety
            /// The processor must have the feature. Both slices are as long.
            #[target_feature(enable = $feature)]
            pub(super) unsafe fn $name(from: &[u8], to: &mut [u8], next: &[u8]) {
                const VECTOR: usize = size_of::<$vector>();
                let head = to.as_ptr().align_offset(VECTOR).min(to.len());
                let turns = (to.len() - head) / (TURN * VECTOR);
                let (middle, tail) = (head, head + turns * TURN * VECTOR);
                to[..head].copy_from_slice(&from[..head]);
                for turn in 0..turns {
                    let at = middle + turn * TURN * VECTOR;
                    for line in next.get(at..).unwrap_or_default().chunks(LINE).take(TURN * VECTOR / LINE) {
                        _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().cast());
                    }
                    // SAFETY: `at` and the next TURN vectors lie before `tail`, so within both slices, which do not
                    // overlap; the destination is aligned, `head` saw to it.
                    unsafe {
                        let from = from.as_ptr().add(at).cast::<$vector>();
                        let to = to.as_mut_ptr().add(at).cast::<$vector>();
                        let vectors: [$vector; TURN] =
                            [$load(from), $load(from.add(1)), $load(from.add(2)), $load(from.add(3))];
                        for (i, vector) in vectors.into_iter().enumerate() {
                            $store(to.add(i), vector);
                        }
                    }
                }
                // These stores are not ordered with others: whoever is told that the copy is there must see it.
                _mm_sfence();
                to[tail..].copy_from_slice(&from[tail..]);
            }
        };
    }

    copy!(copy_512, "avx512f", __m512i, _mm512_loadu_si512, _mm512_stream_si512);
    copy!(copy_256, "avx2", __m256i, _mm256_loadu_si256, _mm256_stream_si256);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(copy: impl Fn(&[u8], &mut [u8]), from: &[u8], skew: usize) -> bool {
        let mut to = vec![7; from.len() + skew + 3];
        copy(from, &mut to[skew..skew + from.len()]);
        let around = to[..skew].iter().chain(&to[skew + from.len()..]).all(|&byte| byte == 7);
        around && to[skew..skew + from.len()] == *from
    }

    proptest! {
        #[test]
        fn every_length_and_alignment_is_copied(
            bytes in prop::collection::vec(any::<u8>(), 0..2000), from in 0usize..70, skew in 0usize..70,
        ) {
            let from = &bytes[from.min(bytes.len())..];
            prop_assert!(check(|from, to| stream_copy(from, to, &bytes), from, skew));
            #[cfg(target_arch = "x86_64")]
            if std::arch::is_x86_feature_detected!("avx2") {
                // SAFETY: the processor has AVX2, so AVX too.
                let copied = check(|from, to| unsafe { x86::copy_256(from, to, from) }, from, skew);
                prop_assert!(copied);
            }
        }
    }
}
