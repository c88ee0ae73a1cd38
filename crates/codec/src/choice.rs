//! Whether compressed bytes arrive sooner than plain ones. Arithmetic only.

/// By how much compressed bytes must be ahead: a forecast that is closer than this is a guess.
const MARGIN: f64 = 0.97;

/// How fast bytes come and are decoded, in bytes per second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Speeds {
    /// The link that bytes come over: stored bytes.
    pub link: f64,
    /// All cores together that decode while bytes come: plain bytes.
    pub decode: f64,
}

impl Speeds {
    /// Whether `plain` bytes are there sooner when they come as `stored` compressed ones. Decoding goes on while the
    /// next bytes come, so the slower of the two decides. Speeds that are no positive numbers say no.
    pub fn favour_compressed(self, plain: u64, stored: u64) -> bool {
        let as_plain = plain as f64 / self.link;
        let as_compressed = (stored as f64 / self.link).max(plain as f64 / self.decode);
        self.link > 0.0 && self.decode > 0.0 && as_compressed < as_plain * MARGIN
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_slower_of_link_and_decoder_decides() {
        let speeds = |link, decode| Speeds { link, decode };
        assert!(speeds(2e9, 8e9).favour_compressed(1000, 660));
        assert!(speeds(2e9, 2.1e9).favour_compressed(1000, 660), "slower than the link allows, still ahead");
        assert!(!speeds(2e9, 2.05e9).favour_compressed(1000, 660), "too close to tell");
        assert!(!speeds(2e9, 1e9).favour_compressed(1000, 660), "decoding would hold the link up");
        assert!(!speeds(14e9, 8e9).favour_compressed(1000, 660));
        assert!(!speeds(2e9, 8e9).favour_compressed(1000, 980), "hardly smaller");
        assert!(!speeds(2e9, 8e9).favour_compressed(0, 0));
    }

    #[test]
    fn speeds_that_are_not_known_choose_plain() {
        for nothing in [0.0, -1.0, f64::NAN] {
            assert!(!Speeds { link: nothing, decode: 8e9 }.favour_compressed(1000, 660));
            assert!(!Speeds { link: 2e9, decode: nothing }.favour_compressed(1000, 660));
        }
    }
}
