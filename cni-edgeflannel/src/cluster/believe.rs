//! What a list's silence about a peer means.
//!
//! A deletion that the API server states is believed at once. A list that merely lacks a peer may be the word of
//! a server that has lost its memory (restored from an empty backup, pointed at another cluster), and believing
//! it would cut this node off from every other. So a list that lacks all peers, or most of them, must be said
//! twice, a minute apart, before anything is removed; and one that lacks even this node is no news of anybody.
//! Time is uptime, given by the caller. Pure.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

/// How long after a suspicious list a second one must say the same.
pub const CONFIRM_AFTER: Duration = Duration::from_secs(60);

/// What was heard and not believed yet.
#[derive(Debug, Default)]
pub struct Belief {
    pending: Option<Pending>,
}

#[derive(Debug)]
struct Pending {
    missing: BTreeSet<String>,
    since: Instant,
}

/// What follows from a complete list.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Peers that are gone.
    pub remove: Vec<String>,
    /// Peers that the list lacks and that stay for now.
    pub doubted: usize,
    /// When to ask for a complete list again.
    pub ask_again: Option<Instant>,
}

impl Belief {
    /// A complete list has been read. `known` are the peers, `listed` tells whether the list had a name,
    /// `had_own` whether it had this node.
    pub fn complete_list<'a>(
        &mut self,
        known: impl Iterator<Item = &'a str>,
        listed: impl Fn(&str) -> bool,
        had_own: bool,
        now: Instant,
    ) -> Verdict {
        let (mut all, mut missing) = (0, BTreeSet::new());
        for name in known {
            all += 1;
            if !listed(name) {
                missing.insert(name.to_owned());
            }
        }
        let lacks = missing.len();
        if !had_own {
            // Not even a second such list says anything about others.
            self.pending = None;
            return Verdict { doubted: lacks, ..Verdict::default() };
        }
        let suspicious = (lacks == all && all >= 2) || (lacks * 2 > all && lacks > 3);
        if !suspicious {
            self.pending = None;
            return Verdict { remove: missing.into_iter().collect(), ..Verdict::default() };
        }
        match self.pending.take() {
            Some(earlier) if now.duration_since(earlier.since) >= CONFIRM_AFTER => {
                // Who was in either of the two lists stays; the rest was missed twice.
                let (remove, still): (Vec<_>, Vec<_>) =
                    missing.into_iter().partition(|name| earlier.missing.contains(name));
                let doubted = still.len();
                if doubted > 0 {
                    self.pending = Some(Pending { missing: still.into_iter().collect(), since: now });
                }
                Verdict { remove, doubted, ask_again: (doubted > 0).then(|| now + CONFIRM_AFTER) }
            }
            earlier => {
                // A second list too soon: the first one's time counts, for what both lack.
                let pending = match earlier {
                    Some(earlier) if missing.is_subset(&earlier.missing) => Pending { missing, ..earlier },
                    _ => Pending { missing, since: now },
                };
                let ask_again = Some(pending.since + CONFIRM_AFTER);
                self.pending = Some(pending);
                Verdict { remove: Vec::new(), doubted: lacks, ask_again }
            }
        }
    }

    /// A node has been seen alive since.
    pub fn seen(&mut self, name: &str) {
        if let Some(pending) = &mut self.pending {
            pending.missing.remove(name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(start: Instant, seconds: u64) -> Instant {
        start + Duration::from_secs(seconds)
    }

    fn names(count: usize) -> Vec<String> {
        (0..count).map(|i| format!("n{i}")).collect()
    }

    /// A list that has the first `listed` of `known` peers.
    fn hear(belief: &mut Belief, known: &[String], listed: usize, now: Instant) -> Verdict {
        let list: BTreeSet<&str> = known.iter().take(listed).map(String::as_str).collect();
        belief.complete_list(known.iter().map(String::as_str), |name| list.contains(name), true, now)
    }

    #[test]
    fn which_lists_are_believed_at_once() {
        let now = Instant::now();
        // (known, listed, believed)
        for (known, listed, believed) in [
            (0, 0, true),
            (1, 0, true),
            (1, 1, true),
            (2, 0, false),
            (2, 1, true),
            (3, 0, false),
            (5, 2, true), // more than half, but only three
            (7, 3, false),
            (8, 4, true), // exactly half
            (9, 4, false),
            (100, 50, true),
            (100, 49, false),
            (100, 0, false),
        ] {
            let verdict = hear(&mut Belief::default(), &names(known), listed, now);
            let expected = if believed { known - listed } else { 0 };
            assert_eq!(verdict.remove.len(), expected, "{known} known, {listed} listed");
            assert_eq!(verdict.ask_again.is_some(), !believed, "{known} known, {listed} listed");
            assert_eq!(verdict.doubted, known - listed - expected);
        }
    }

    #[test]
    fn a_suspicious_list_is_believed_when_said_again_a_minute_later() {
        let (mut belief, known, start) = (Belief::default(), names(10), Instant::now());
        assert_eq!(hear(&mut belief, &known, 0, start).ask_again, Some(at(start, 60)));
        // Reconnecting in between does not count, and does not put the minute off.
        assert_eq!(hear(&mut belief, &known, 0, at(start, 30)).ask_again, Some(at(start, 60)));
        assert!(hear(&mut belief, &known, 0, at(start, 59)).remove.is_empty());
        assert_eq!(hear(&mut belief, &known, 0, at(start, 60)).remove.len(), 10);
    }

    #[test]
    fn a_full_list_in_between_ends_the_suspicion() {
        let (mut belief, known, start) = (Belief::default(), names(10), Instant::now());
        hear(&mut belief, &known, 0, start);
        assert_eq!(hear(&mut belief, &known, 10, at(start, 30)), Verdict::default());
        assert!(hear(&mut belief, &known, 0, at(start, 61)).remove.is_empty());
    }

    #[test]
    fn only_what_both_lists_lack_is_gone() {
        let (mut belief, known, start) = (Belief::default(), names(10), Instant::now());
        hear(&mut belief, &known, 4, start);
        let verdict = hear(&mut belief, &known, 2, at(start, 60));
        assert_eq!(verdict.remove, ["n4", "n5", "n6", "n7", "n8", "n9"]);
        assert_eq!((verdict.doubted, verdict.ask_again), (2, Some(at(start, 120))));
        let (mut belief, known) = (Belief::default(), names(10));
        hear(&mut belief, &known, 0, start);
        belief.seen("n3");
        let verdict = hear(&mut belief, &known, 0, at(start, 61));
        assert!(verdict.remove.len() == 9 && !verdict.remove.contains(&"n3".to_owned()));
    }

    #[test]
    fn a_list_without_ourselves_removes_nobody_however_often() {
        let (mut belief, known, start) = (Belief::default(), names(1), Instant::now());
        for seconds in [0, 60, 120, 3600] {
            let none = |_: &str| false;
            let verdict =
                belief.complete_list(known.iter().map(String::as_str), none, false, at(start, seconds));
            assert_eq!(verdict, Verdict { doubted: 1, ..Verdict::default() });
        }
    }

    proptest! {
        /// Whatever lists come: who was in the latest list is never removed, and a removal of most of
        /// the peers needs two lists sixty seconds apart.
        #[test]
        fn nobody_listed_is_removed(lists in proptest::collection::vec((0u64..100, proptest::collection::vec(any::<bool>(), 12)), 1..12)) {
            let (mut belief, start, mut now) = (Belief::default(), Instant::now(), 0);
            let mut known: BTreeSet<String> = names(12).into_iter().collect();
            let mut first_doubt = None;
            for (wait, has) in lists {
                now += wait;
                let listed: BTreeSet<String> =
                    names(12).into_iter().zip(&has).filter(|(_, has)| **has).map(|(name, _)| name).collect();
                let verdict = belief.complete_list(
                    known.iter().map(String::as_str), |name| listed.contains(name), true, at(start, now));
                for name in &verdict.remove {
                    prop_assert!(!listed.contains(name));
                }
                if verdict.remove.len() * 2 > known.len() && verdict.remove.len() > 3 {
                    prop_assert!(first_doubt.is_some_and(|first| now - first >= 60));
                }
                for name in &verdict.remove {
                    known.remove(name);
                }
                first_doubt = if verdict.doubted > 0 { first_doubt.or(Some(now)) } else { None };
            }
        }
    }
}
