//! Checksums of stored chunks: what the bytes of a chunk are compared with each time they are read.
//!
//! They find damage, by a disk or on the way; they are not identities, for which [`crate::Hash`] is. So CRC-64 suffices,
//! which a core computes several times as fast as BLAKE3, at about the speed at which it copies.

use crc_fast::{CrcAlgorithm, Digest};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::Hash;

/// The polynomial of NVMe, and of S3's checksums.
const CRC: CrcAlgorithm = CrcAlgorithm::Crc64Nvme;

/// The checksum of some bytes, written as hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checksum {
    /// CRC-64/NVME, 16 digits.
    Crc64(u64),
    /// BLAKE3, 64 digits: of manifests before version 3.
    Blake3(Hash),
}

impl Checksum {
    /// The checksum of some bytes, as it is written today.
    pub fn of(bytes: &[u8]) -> Checksum {
        Checksum::Crc64(crc_fast::checksum(CRC, bytes))
    }

    /// Whether bytes have this checksum.
    pub fn matches(&self, bytes: &[u8]) -> bool {
        let mut run = self.run();
        run.update(bytes);
        run.finish() == *self
    }

    /// Starts computing a checksum of this kind from bytes that come piece by piece.
    pub fn run(&self) -> ChecksumRun {
        match self {
            Checksum::Crc64(_) => ChecksumRun::Crc64(Box::new(Digest::new(CRC))),
            Checksum::Blake3(_) => ChecksumRun::Blake3(Box::default()),
        }
    }
}

/// A checksum that is being computed.
pub enum ChecksumRun {
    /// As [`Checksum::Crc64`].
    Crc64(Box<Digest>),
    /// As [`Checksum::Blake3`].
    Blake3(Box<blake3::Hasher>),
}

impl ChecksumRun {
    /// The next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        match self {
            ChecksumRun::Crc64(digest) => digest.update(bytes),
            ChecksumRun::Blake3(hasher) => _ = hasher.update(bytes),
        }
    }

    /// The checksum of all bytes.
    pub fn finish(self) -> Checksum {
        match self {
            ChecksumRun::Crc64(digest) => Checksum::Crc64(digest.finalize()),
            ChecksumRun::Blake3(hasher) => Checksum::Blake3(Hash(*hasher.finalize().as_bytes())),
        }
    }
}

impl Serialize for Checksum {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Checksum::Crc64(crc) => serializer.collect_str(&format_args!("{crc:016x}")),
            Checksum::Blake3(hash) => hash.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Checksum {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let crc = (text.len() == 16 && text.bytes().all(|digit| digit.is_ascii_hexdigit()))
            .then(|| u64::from_str_radix(&text, 16).ok())
            .flatten();
        match crc {
            Some(crc) => Ok(Checksum::Crc64(crc)),
            None => Hash::from_hex(&text).map(Checksum::Blake3).map_err(serde::de::Error::custom),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_checksum_that_its_name_says() {
        // The check value of the catalogue of CRCs.
        assert_eq!(Checksum::of(b"123456789"), Checksum::Crc64(0xae8b_1486_0a79_9888));
        assert_eq!(Checksum::of(b""), Checksum::Crc64(0));
    }

    #[test]
    fn both_kinds_are_read_written_and_compared() {
        let bytes: Vec<u8> = (0..100_000u32).map(|i| (i * 7 + i / 251) as u8).collect();
        for sum in [Checksum::of(&bytes), Checksum::Blake3(Hash::of(&bytes))] {
            let text = serde_json::to_string(&sum).unwrap();
            assert_eq!(serde_json::from_str::<Checksum>(&text).unwrap(), sum, "{text}");
            assert!(sum.matches(&bytes));
            let mut run = sum.run();
            bytes.chunks(777).for_each(|piece| run.update(piece));
            assert_eq!(run.finish(), sum);
            let mut changed = bytes.clone();
            changed[50_000] ^= 1;
            assert!(!sum.matches(&changed));
            assert!(!sum.matches(&bytes[1..]));
        }
        let text = serde_json::to_string(&Checksum::Crc64(0xab)).unwrap();
        assert_eq!(text, "\"00000000000000ab\"");
        for wrong in ["", "+0000000000000ab", "00000000000000ag", "00000000000000abc"] {
            assert!(serde_json::from_str::<Checksum>(&format!("{wrong:?}")).is_err(), "{wrong}");
        }
    }
}
