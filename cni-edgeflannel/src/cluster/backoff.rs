//! How long to wait between tries: longer each time, never long, and never all nodes at once. Pure.

use std::{
    collections::hash_map::RandomState,
    hash::{BuildHasher, Hasher},
    time::Duration,
};

/// The longest wait. With the time that one try takes it keeps the first change after an outage within 30 s.
pub const LONGEST: Duration = Duration::from_secs(15);
const FIRST: Duration = Duration::from_millis(500);

/// Tries in a row that failed.
#[derive(Debug, Default, Clone, Copy)]
pub struct Backoff {
    failed: u32,
}

impl Backoff {
    /// The wait before the next try, with a random number between 0 and 1: half of it is certain, the other half
    /// spreads the nodes of a cluster over time.
    pub fn next(&mut self, random: f64) -> Duration {
        let wait = FIRST.saturating_mul(1 << self.failed.min(10)).min(LONGEST);
        self.failed = self.failed.saturating_add(1);
        wait.mul_f64(0.5 + 0.5 * random.clamp(0.0, 1.0))
    }

    /// It worked.
    pub fn reset(&mut self) {
        self.failed = 0;
    }
}

/// A number between 0 and 1, good enough to spread nodes: from the keys that the standard library draws.
#[must_use]
pub fn random() -> f64 {
    let bits = RandomState::new().build_hasher().finish() >> 40;
    f64::from(u32::try_from(bits).unwrap_or_default()) / f64::from(1u32 << 24)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_and_stops_growing() {
        let mut backoff = Backoff::default();
        let waits: Vec<u128> = (0..8).map(|_| backoff.next(1.0).as_millis()).collect();
        assert_eq!(waits, [500, 1000, 2000, 4000, 8000, 15000, 15000, 15000]);
        assert_eq!(backoff.next(0.0).as_millis(), 7500);
        backoff.reset();
        assert_eq!(backoff.next(0.0).as_millis(), 250);
        let mut backoff = Backoff { failed: u32::MAX };
        assert_eq!(backoff.next(7.0), LONGEST);
    }

    #[test]
    fn random_numbers_differ() {
        let numbers: Vec<f64> = (0..32).map(|_| random()).collect();
        assert!(numbers.iter().all(|n| (0.0..1.0).contains(n)));
        assert!(numbers.iter().any(|n| *n < 0.5) && numbers.iter().any(|n| *n >= 0.5));
    }
}
