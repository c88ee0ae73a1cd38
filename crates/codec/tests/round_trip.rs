//! Every instruction set gives back the bytes that were encoded, whatever they are, and damage never does harm.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use proptest::prelude::*;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use tangram_codec::{BLOCK_ELEMENTS, Corrupt, Format, Isa, decode, decode_with, encode};

/// Elements with the distribution of trained weights: normal, with one scale for every 1000.
fn weights(format: Format, elements: usize, seed: u64) -> Vec<u8> {
    let mut random = SmallRng::seed_from_u64(seed);
    let mut scale = 0.02;
    let mut next = |index: usize| {
        if index.is_multiple_of(1000) {
            scale = 0.01 + 0.03 * random.random::<f32>();
        }
        let sum: f32 = (0..12).map(|_| random.random::<f32>()).sum();
        (sum - 6.0) * scale
    };
    let bits = |value: f32| match format {
        Format::Bf16 => half::bf16::from_f32(value).to_bits(),
        Format::F16 => half::f16::from_f32(value).to_bits(),
    };
    (0..elements).flat_map(|index| bits(next(index)).to_le_bytes()).collect()
}

fn noise(bytes: usize, seed: u64) -> Vec<u8> {
    let mut random = SmallRng::seed_from_u64(seed);
    (0..bytes).map(|_| random.random()).collect()
}

/// Decodes with every instruction set and compares.
fn assert_round_trip(format: Format, plain: &[u8]) -> usize {
    let frame = encode(format, plain).expect("must be worth compressing");
    for isa in Isa::available() {
        let mut decoded = vec![0xa5; plain.len()];
        decode_with(isa, format, &frame, &mut decoded).unwrap();
        assert!(decoded == plain, "{format:?} by {}", isa.name());
    }
    frame.len()
}

#[test]
fn weights_come_back_smaller_and_exact_at_every_length() {
    for (format, most) in [(Format::Bf16, 0.72), (Format::F16, 0.90)] {
        let lengths =
            [2 * BLOCK_ELEMENTS + 1, BLOCK_ELEMENTS, BLOCK_ELEMENTS - 1, 130_000, 4096, 4097, 4223, 20_001];
        for elements in lengths {
            let plain = weights(format, elements, elements as u64);
            let ratio = assert_round_trip(format, &plain) as f64 / plain.len() as f64;
            assert!(elements < 20_000 || ratio < most, "{format:?} {elements}: {ratio}");
        }
    }
}

#[test]
fn special_values_come_back() {
    for format in Format::ALL {
        // All 65536 bit patterns between many zeros, and nothing but one value.
        let every: Vec<u8> =
            (0..=u16::MAX).flat_map(|bits| [[0, 0], [0, 0], bits.to_le_bytes()]).flatten().collect();
        assert_round_trip(format, &every);
        let one: Vec<u8> = [0x80, 0x3f].repeat(5000);
        let len = assert_round_trip(format, &one);
        assert!(len < 7600, "an exponent that is certain costs nothing: {len}");
    }
}

#[test]
fn what_would_gain_nothing_is_left_alone() {
    for format in Format::ALL {
        assert_eq!(encode(format, &noise(1 << 20, 1)), None);
        assert_eq!(encode(format, &weights(format, 100, 1)), None, "the header costs more");
        assert_eq!(encode(format, &[]), None);
        assert_eq!(encode(format, &weights(format, 10_000, 1)[1..]), None, "not whole elements");
    }
}

#[test]
fn a_block_of_noise_among_weights_is_stored_as_it_is() {
    for format in Format::ALL {
        let mut plain = weights(format, 3 * BLOCK_ELEMENTS, 3);
        plain[2 * BLOCK_ELEMENTS..4 * BLOCK_ELEMENTS].copy_from_slice(&noise(2 * BLOCK_ELEMENTS, 4));
        let len = assert_round_trip(format, &plain);
        assert!(len < plain.len());
    }
}

#[test]
fn other_formats_lengths_and_versions_are_refused() {
    let plain = weights(Format::Bf16, 10_000, 1);
    let frame = encode(Format::Bf16, &plain).unwrap();
    let mut out = vec![0; plain.len()];
    assert_eq!(decode(Format::F16, &frame, &mut out), Err(Corrupt::Header));
    assert_eq!(decode(Format::Bf16, &frame, &mut out[2..]), Err(Corrupt::Length));
    assert_eq!(decode(Format::Bf16, &frame[..frame.len() - 1], &mut out), Err(Corrupt::Length));
    assert_eq!(decode(Format::Bf16, &[frame.as_slice(), &[0]].concat(), &mut out), Err(Corrupt::Length));
    let mut newer = frame.clone();
    newer[0] += 1;
    assert_eq!(decode(Format::Bf16, &newer, &mut out), Err(Corrupt::Header));
    assert_eq!(decode(Format::Bf16, &[], &mut out), Err(Corrupt::Length));
}

/// Decodes damaged bytes with every instruction set: they must agree on whether it fails, and on the values if not.
fn assert_harmless(format: Format, frame: &[u8], bytes: usize) {
    let mut first: Option<(Result<(), Corrupt>, Vec<u8>)> = None;
    for isa in Isa::available() {
        // Bytes around the output must stay as they are.
        let mut out = vec![0x5a; bytes + 128];
        let result = decode_with(isa, format, frame, &mut out[64..64 + bytes]);
        assert!(out[..64].iter().chain(&out[64 + bytes..]).all(|&byte| byte == 0x5a));
        match &first {
            None => first = Some((result, out)),
            Some((expected, values)) => {
                assert_eq!(&result, expected, "{}", isa.name());
                assert!(result.is_err() || values == &out, "{}", isa.name());
            }
        }
    }
}

/// Cases of random damage; `TANGRAM_CODEC_CASES` asks for more.
fn damage_cases() -> u32 {
    std::env::var("TANGRAM_CODEC_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(300)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: damage_cases(), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_elements_come_back(
        exponents in prop::collection::vec(any::<u8>(), 1..40),
        elements in 1500usize..9000,
        spread in 0u32..20,
        seed in any::<u64>(),
    ) {
        // A choice of exponents with falling probabilities, down to ones that need the escape.
        let mut random = SmallRng::seed_from_u64(seed);
        let plain: Vec<u8> = (0..elements).flat_map(|_| {
            let skewed = random.random::<f64>().powi(1 + spread as i32);
            let exponent = exponents[(skewed * exponents.len() as f64) as usize];
            (u16::from(exponent) << 7 | random.random::<u16>() & 0x807f).to_le_bytes()
        }).collect();
        for format in Format::ALL {
            if encode(format, &plain).is_some() {
                assert_round_trip(format, &plain);
            }
        }
    }

    #[test]
    fn damaged_frames_do_no_harm(
        f16 in any::<bool>(),
        elements in prop_oneof![3 => 1000usize..6000, 1 => 60_000usize..140_000],
        hits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        in_front in any::<bool>(),
        cut in prop::option::weighted(0.2, any::<prop::sample::Index>()),
        seed in any::<u64>(),
    ) {
        let format = if f16 { Format::F16 } else { Format::Bf16 };
        let plain = weights(format, elements, seed);
        let Some(mut frame) = encode(format, &plain) else { return Ok(()) };
        for (at, byte) in &hits {
            // Lengths and tables are in front, where damage reaches furthest.
            let len = if in_front { frame.len().min(120) } else { frame.len() };
            frame[at.index(len)] = *byte;
        }
        if let Some(cut) = cut {
            frame.truncate(cut.index(frame.len()));
        }
        assert_harmless(format, &frame, plain.len());
    }

    #[test]
    fn bytes_of_any_origin_do_no_harm(
        f16 in any::<bool>(),
        elements in 0u32..3000,
        body in prop::collection::vec(any::<u8>(), 0..5000),
    ) {
        // A sound frame header in front, or hardly anything would get past it.
        let format = if f16 { Format::F16 } else { Format::Bf16 };
        let mut frame = vec![1, if f16 { 2 } else { 1 }, 0, 0];
        frame.extend(elements.to_le_bytes());
        frame.extend((body.len() as u32).to_le_bytes());
        frame.extend(body);
        assert_harmless(format, &frame, 2 * elements as usize);
    }
}
