//! How long to wait between tries: decorrelated jitter, so that thousands of agents that lost one server do not come
//! back in step. Pure: takes its random source as an argument.

use std::time::Duration;

/// The least wait after a failed try.
const LEAST: Duration = Duration::from_millis(500);

/// The most while the outage is young: a server that restarts is found again within ten seconds.
pub const MOST_SHORT: Duration = Duration::from_secs(5);

/// The most after a long outage.
const MOST: Duration = Duration::from_secs(30);

/// An outage is young for this long.
const SHORT: Duration = Duration::from_secs(60);

/// The wait after a session that stood is lost: its server may be gone for thousands at once.
pub fn first(random: &mut fastrand::Rng) -> Duration {
    Duration::from_secs(1).mul_f64(random.f64())
}

/// The wait after a failed try, when the one before was `last` and there has been no session for `outage`.
pub fn next(last: Duration, outage: Duration, random: &mut fastrand::Rng) -> Duration {
    let most = if outage < SHORT { MOST_SHORT } else { MOST };
    let upper = (last * 3).clamp(LEAST, most);
    LEAST + (upper - LEAST).mul_f64(random.f64())
}

/// The wait before a connection that may come out on another replica, after `tries` that came out where we are already.
/// The first come quickly: a load balancer that spreads needs a few. One with source affinity, or the only replica there
/// is, is asked ever more rarely; `several`: there is reason to believe that there is another.
pub fn elsewhere(tries: u32, several: bool, random: &mut fastrand::Rng) -> Duration {
    const FIRST: f64 = 0.15;
    const MOST: f64 = 600.0;
    let seconds = if several { (FIRST * 1.6_f64.powi(tries.min(64) as i32)).min(MOST) } else { MOST };
    Duration::from_secs_f64(seconds * (0.5 + random.f64()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn waits_grow_and_stay_within_bounds(seed in any::<u64>()) {
            let mut random = fastrand::Rng::with_seed(seed);
            let (mut outage, mut last) = (Duration::ZERO, first(&mut random));
            prop_assert!(last <= Duration::from_secs(1));
            for _ in 0..200 {
                last = next(last, outage, &mut random);
                prop_assert!(last >= LEAST && last <= MOST);
                prop_assert!(outage >= SHORT || last <= MOST_SHORT);
                outage += last;
            }
        }
    }

    /// Of two replicas behind a load balancer that throws a coin, one agent in 500 has not found the other after half
    /// a minute; behind one that never sends us elsewhere we come a few times an hour.
    #[test]
    fn another_replica_is_looked_for_quickly_and_then_rarely() {
        for seed in 0..100 {
            let mut random = fastrand::Rng::with_seed(seed);
            let (mut time, mut tries) = (Duration::ZERO, 0);
            while time < Duration::from_secs(30) {
                time += elsewhere(tries, true, &mut random);
                tries += 1;
            }
            assert!((8..16).contains(&tries), "{tries}");
            while time < Duration::from_secs(3600) {
                time += elsewhere(tries, true, &mut random);
                tries += 1;
            }
            assert!(tries < 40, "{tries}");
            assert!(elsewhere(0, false, &mut random) >= Duration::from_secs(300));
        }
    }

    /// A link that is cut for an hour: never given up, never a storm.
    #[test]
    fn an_hour_without_the_cloud_is_some_hundred_tries() {
        for seed in 0..100 {
            let mut random = fastrand::Rng::with_seed(seed);
            let (mut outage, mut last, mut tries) = (Duration::ZERO, first(&mut random), 0);
            while outage < Duration::from_secs(3600) {
                outage += last;
                last = next(last, outage, &mut random);
                tries += 1;
            }
            assert!((120..600).contains(&tries), "{tries} with seed {seed}");
        }
    }

    #[test]
    fn two_thousand_agents_do_not_come_in_step() {
        let mut random = fastrand::Rng::with_seed(1);
        let mut per_100_ms = [0; 10];
        for _ in 0..2000 {
            per_100_ms[(first(&mut random).as_millis() / 100) as usize] += 1;
        }
        assert!(per_100_ms.iter().all(|&count| (120..280).contains(&count)), "{per_100_ms:?}");
    }
}
