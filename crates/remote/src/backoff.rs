//! When to try again: exponential backoff with full jitter. Pure: the caller brings the randomness and does the waiting.
//!
//! After "Exponential Backoff And Jitter" (M. Brooker, AWS Architecture Blog, 2015): a wait is drawn evenly between
//! nothing and a bound that doubles, so that clients which failed together do not come back together.

use std::time::Duration;

/// Limits on trying again.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Backoff {
    /// Bound of the first wait; it doubles with every failure.
    pub base: Duration,
    /// The bound grows no further than this.
    pub cap: Duration,
    /// A server's wish (`Retry-After`) is honoured up to this.
    pub longest_wish: Duration,
    /// Failures in a row, without a byte between them, after which it is given up.
    pub attempts: u32,
}

impl Default for Backoff {
    fn default() -> Backoff {
        Backoff {
            base: Duration::from_millis(200),
            cap: Duration::from_secs(20),
            longest_wish: Duration::from_secs(120),
            attempts: 8,
        }
    }
}

impl Backoff {
    /// How long to wait after the `failures`-th failure in a row (from 1) before trying again; `None` is to give up.
    /// `wish` is what the server asked for; `random` is even in `[0, 1)`. A wish is a lower bound, so the jitter comes
    /// on top of it.
    pub fn wait(&self, failures: u32, wish: Option<Duration>, random: f64) -> Option<Duration> {
        if failures >= self.attempts {
            return None;
        }
        let doublings = failures.saturating_sub(1).min(31);
        let bound = self.base.saturating_mul(1 << doublings).min(self.cap);
        Some(wish.unwrap_or_default().min(self.longest_wish) + bound.mul_f64(random.clamp(0.0, 1.0)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_bound_doubles_up_to_its_cap() {
        let backoff = Backoff { attempts: 100, ..Backoff::default() };
        let longest = |failures| backoff.wait(failures, None, 1.0).unwrap().as_millis();
        assert_eq!([1, 2, 3, 7, 8, 9, 90].map(longest), [200, 400, 800, 12_800, 20_000, 20_000, 20_000]);
        assert_eq!(backoff.wait(90, None, 0.0), Some(Duration::ZERO));
    }

    #[test]
    fn a_wish_is_kept_but_not_for_ever() {
        let backoff = Backoff::default();
        let wait = |wish| backoff.wait(1, Some(Duration::from_secs(wish)), 0.5).unwrap();
        assert_eq!(wait(7), Duration::from_millis(7100));
        assert_eq!(wait(86_400), Duration::from_millis(120_100));
    }

    proptest! {
        #[test]
        fn it_ends_and_stays_within_bounds(failures in 0u32..1000, wish in 0u64..10_000, random in 0.0..1.0f64) {
            let backoff = Backoff::default();
            let wish = Duration::from_secs(wish);
            match backoff.wait(failures, Some(wish), random) {
                None => prop_assert!(failures >= backoff.attempts),
                Some(wait) => {
                    let least = wish.min(backoff.longest_wish);
                    prop_assert!(failures < backoff.attempts && wait >= least && wait <= least + backoff.cap);
                }
            }
        }
    }
}
