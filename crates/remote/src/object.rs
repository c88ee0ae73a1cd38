//! One remote object: what is known of it before it is read, how its bytes are asked for, how that fails.

use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use md5::Md5;
use sha2::{Digest as _, Sha256};

use crate::RemoteError;
use crate::grid::Grid;

/// Tells one version of an object from another.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Version {
    /// The entity tag as sent, quotes included.
    pub(crate) etag: Option<String>,
    /// `Last-Modified` as sent, where there is no entity tag.
    pub(crate) modified: Option<String>,
}

impl Version {
    /// Whether an object with these marks is surely the one that is meant. Without marks nothing is sure.
    pub(crate) fn is_same(&self, other: &Version) -> bool {
        match (&self.etag, &other.etag) {
            (Some(ours), Some(theirs)) => ours == theirs,
            (None, None) => self.modified.is_some() && self.modified == other.modified,
            _ => false,
        }
    }

    /// Whether an answer with these marks is surely of another version. An answer may leave marks out.
    pub(crate) fn contradicts(&self, answer: &Version) -> bool {
        match (&self.etag, &answer.etag) {
            (Some(ours), Some(theirs)) => ours != theirs,
            _ => matches!((&self.modified, &answer.modified), (Some(ours), Some(theirs)) if ours != theirs),
        }
    }

    /// The tag for `If-Match`, which compares strongly: weak tags are of no use there.
    pub(crate) fn strong_etag(&self) -> Option<&str> {
        self.etag.as_deref().filter(|etag| !etag.starts_with("W/"))
    }
}

/// A hash of the whole object that its source states.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Digest {
    Sha256([u8; 32]),
    Md5([u8; 16]),
    Crc32c(u32),
}

impl Digest {
    /// What it is called in an error.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Digest::Sha256(_) => "SHA-256",
            Digest::Md5(_) => "MD5",
            Digest::Crc32c(_) => "CRC-32C",
        }
    }

    /// Parses hexadecimal digits of the right number.
    pub(crate) fn sha256_from_hex(text: &str) -> Option<Digest> {
        bytes_from_hex(text).map(Digest::Sha256)
    }

    /// An entity tag that is the MD5 of the object, as S3 gives it to objects that came in one piece.
    pub(crate) fn md5_from_etag(etag: &str) -> Option<Digest> {
        bytes_from_hex(etag.trim_matches('"')).map(Digest::Md5)
    }

    /// Starts to compute the same kind.
    pub(crate) fn hasher(&self) -> DigestHasher {
        match self {
            Digest::Sha256(_) => DigestHasher::Sha256(Sha256::new()),
            Digest::Md5(_) => DigestHasher::Md5(Md5::new()),
            Digest::Crc32c(_) => {
                DigestHasher::Crc32c(crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi))
            }
        }
    }
}

fn bytes_from_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.as_bytes();
    if digits.len() != 2 * N {
        return None;
    }
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        let [high, low] = [pair.first()?, pair.last()?].map(|&digit| char::from(digit).to_digit(16));
        *byte = (high? * 16 + low?) as u8;
    }
    Some(bytes)
}

/// A [`Digest`] under way.
pub(crate) enum DigestHasher {
    Sha256(Sha256),
    Md5(Md5),
    Crc32c(crc_fast::Digest),
}

impl DigestHasher {
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        match self {
            DigestHasher::Sha256(hasher) => hasher.update(bytes),
            DigestHasher::Md5(hasher) => hasher.update(bytes),
            DigestHasher::Crc32c(hasher) => hasher.update(bytes),
        }
    }

    pub(crate) fn finish(self) -> Digest {
        match self {
            DigestHasher::Sha256(hasher) => Digest::Sha256(hasher.finalize().into()),
            DigestHasher::Md5(hasher) => Digest::Md5(hasher.finalize().into()),
            DigestHasher::Crc32c(hasher) => Digest::Crc32c(hasher.finalize() as u32),
        }
    }
}

/// What is known of an object before it is read.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Stat {
    /// Size in bytes.
    pub(crate) size: u64,
    pub(crate) version: Version,
    pub(crate) digest: Option<Digest>,
    /// Whether ranges of it can be asked for.
    pub(crate) ranges: bool,
}

impl Stat {
    /// Nothing of it is here; it is fetched in chunks of `chunk_bytes`, or all at once where ranges cannot be asked for.
    pub(crate) fn grid(&self, chunk_bytes: u64) -> Grid {
        Grid::new(self.size, if self.ranges { chunk_bytes } else { self.size })
    }
}

/// How a request failed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// It may work later.
    Retry {
        /// What happened, for the user.
        problem: String,
        /// How long the server wants to be left alone.
        wish: Option<Duration>,
    },
    /// The object is not there.
    Missing,
    /// The object is another one than it was.
    Changed,
    /// A range was asked for and the whole object came.
    NoRanges,
    /// It will not work.
    Fatal(RemoteError),
}

impl Failure {
    pub(crate) fn retry(problem: impl Into<String>) -> Failure {
        Failure::Retry { problem: problem.into(), wish: None }
    }
}

/// The bytes of an answer as they come.
pub(crate) type Body = BoxStream<'static, Result<Bytes, Failure>>;

/// One object at its source.
pub(crate) trait Object: Send + Sync {
    /// What to call it in an error; holds no credentials.
    fn name(&self) -> &str;

    /// Whether its bytes cannot be changed on their way here.
    fn is_guarded(&self) -> bool;

    /// Asks what it is.
    fn stat(&self) -> BoxFuture<'_, Result<Stat, Failure>>;

    /// Asks for the bytes of a range that is neither empty nor beyond the end, or for all of them where `range` is `None`. Exactly the
    /// range that was asked for is answered, of the version that is meant, or it is a failure; how many bytes really
    /// come is for the reader to count.
    fn read(&self, range: Option<Range<u64>>, stat: Stat) -> BoxFuture<'_, Result<Body, Failure>>;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(etag: Option<&str>, modified: Option<&str>) -> Version {
        Version { etag: etag.map(str::to_owned), modified: modified.map(str::to_owned) }
    }

    #[test]
    fn only_equal_marks_are_the_same_version() {
        let tagged = version(Some("\"a\""), Some("now"));
        assert!(tagged.is_same(&version(Some("\"a\""), None)));
        assert!(!tagged.is_same(&version(Some("\"b\""), Some("now"))));
        assert!(!tagged.is_same(&version(None, Some("now"))));
        assert!(version(None, Some("now")).is_same(&version(None, Some("now"))));
        assert!(!version(None, None).is_same(&version(None, None)), "no marks prove nothing");
        assert!(tagged.contradicts(&version(Some("\"b\""), Some("now"))));
        assert!(!tagged.contradicts(&version(None, None)));
        assert_eq!(version(Some("W/\"a\""), None).strong_etag(), None);
    }

    #[test]
    fn digests_are_those_of_the_standards() {
        let check = |digest: Digest, text: &[u8]| {
            let mut hasher = digest.hasher();
            text.chunks(2).for_each(|part| hasher.update(part));
            assert_eq!(hasher.finish(), digest);
        };
        let hex = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        check(Digest::sha256_from_hex(hex).unwrap(), b"abc");
        check(Digest::md5_from_etag("\"900150983cd24fb0d6963f7d28e17f72\"").unwrap(), b"abc");
        // RFC 3720, B.4: 32 bytes of zeros.
        check(Digest::Crc32c(0x8a91_36aa), &[0; 32]);
        assert_eq!(Digest::md5_from_etag("\"900150983cd24fb0d6963f7d28e17f72-3\""), None);
        assert_eq!(Digest::sha256_from_hex(&hex.replace('b', "x")), None);
    }
}
