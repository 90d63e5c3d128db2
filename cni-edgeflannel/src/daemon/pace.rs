//! How often one thing is put right when somebody keeps undoing it.
//!
//! Five times in ten seconds, then once after each of growing waits, so that two programs that disagree about a
//! route do not keep the kernel and the log busy for ever. An object that is left alone for a while has its five
//! times again. Time is uptime, given by the caller. Pure.

use std::{
    collections::{HashMap, VecDeque},
    time::{Duration, Instant},
};

const TIMES: usize = 5;
const WITHIN: Duration = Duration::from_secs(10);
const FIRST_WAIT: Duration = Duration::from_secs(2);
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// What was put right lately, by object.
#[derive(Debug, Default)]
pub struct Pace {
    objects: HashMap<String, Track>,
}

#[derive(Debug, Default)]
struct Track {
    repairs: VecDeque<Instant>,
    waits: u32,
    until: Option<Instant>,
    told: bool,
}

/// Whether an object may be put right now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// Yes.
    Now,
    /// Not before then; `first` when that wait has not been reported.
    Later {
        /// When.
        at: Instant,
        /// How long the wait is in all.
        wait: Duration,
        /// It has not been reported yet.
        first: bool,
    },
}

impl Pace {
    /// Asks for an object that is wrong, and takes the turn when there is one.
    pub fn turn(&mut self, object: &str, now: Instant) -> Turn {
        let track = match self.objects.get_mut(object) {
            Some(track) => track,
            None => self.objects.entry(object.to_owned()).or_default(),
        };
        if let Some(at) = track.until.filter(|until| now < *until) {
            let first = !std::mem::replace(&mut track.told, true);
            return Turn::Later { at, wait: wait(track.waits), first };
        }
        if track.waits > 0 {
            // Its wait is over: one more time, and then a longer wait.
            if track.is_calm(now) {
                *track = Track::default();
            } else {
                track.waits += 1;
                track.until = Some(now + wait(track.waits));
                track.told = false;
            }
        }
        track.repairs.retain(|repair| now.duration_since(*repair) < WITHIN);
        if track.waits == 0 && track.repairs.len() >= TIMES {
            track.waits = 1;
            let at = now + wait(1);
            (track.until, track.told) = (Some(at), true);
            return Turn::Later { at, wait: wait(1), first: true };
        }
        track.repairs.push_back(now);
        Turn::Now
    }

    /// Forgets what has been left alone.
    pub fn forget(&mut self, now: Instant) {
        self.objects.retain(|_, track| !track.is_calm(now));
        if self.objects.is_empty() {
            self.objects.shrink_to_fit();
        }
    }
}

impl Track {
    /// Nobody has undone it for as long again as it last had to wait.
    fn is_calm(&self, now: Instant) -> bool {
        let since = self.until.max(self.repairs.back().copied());
        since.is_none_or(|since| now.saturating_duration_since(since) > wait(self.waits).max(WITHIN))
    }
}

fn wait(number: u32) -> Duration {
    FIRST_WAIT.saturating_mul(1 << number.saturating_sub(1).min(8)).min(LONGEST_WAIT)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Undone every `every` ms for `seconds`: the times, in ms, at which it was put right.
    fn fought(every: u64, seconds: u64) -> Vec<u64> {
        let (mut pace, start) = (Pace::default(), Instant::now());
        (0..seconds * 1000)
            .step_by(usize::try_from(every).unwrap())
            .filter(|ms| pace.turn("route", start + Duration::from_millis(*ms)) == Turn::Now)
            .collect()
    }

    #[test]
    fn five_times_then_growing_waits() {
        let times = fought(100, 200);
        assert_eq!(times[..5], [0, 100, 200, 300, 400]);
        let gaps: Vec<u64> = times[4..].windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert_eq!(gaps, [2100, 4000, 8000, 16000, 32000, 60000, 60000]);
    }

    #[test]
    fn rarely_undone_is_always_put_right_at_once() {
        assert_eq!(fought(2500, 100).len(), 40);
    }

    #[test]
    fn each_wait_is_told_once() {
        let (mut pace, start) = (Pace::default(), Instant::now());
        let told = (0..600u64)
            .filter(|tenth| {
                let turn = pace.turn("route", start + Duration::from_millis(tenth * 100));
                matches!(turn, Turn::Later { first: true, .. })
            })
            .count();
        // After 0.5 s, and after the waits of 2, 4, 8 and 16 s within the minute.
        assert_eq!(told, 5);
    }

    #[test]
    fn objects_do_not_share_a_bound_and_are_forgotten() {
        let (mut pace, start) = (Pace::default(), Instant::now());
        for i in 0..100 {
            assert_eq!(pace.turn(&format!("route {i}"), start), Turn::Now);
        }
        pace.forget(start + Duration::from_secs(5));
        assert_eq!(pace.objects.len(), 100);
        pace.forget(start + Duration::from_secs(11));
        assert!(pace.objects.is_empty());
    }

    #[test]
    fn left_alone_it_has_its_five_times_again() {
        let (mut pace, start) = (Pace::default(), Instant::now());
        for ms in 0..6 {
            pace.turn("route", start + Duration::from_millis(ms));
        }
        let later = start + Duration::from_secs(30);
        for ms in 0..5 {
            assert_eq!(pace.turn("route", later + Duration::from_millis(ms)), Turn::Now);
        }
        assert!(matches!(pace.turn("route", later), Turn::Later { .. }));
    }
}
