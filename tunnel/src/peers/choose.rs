//! Which of a node's sessions gets a dial, wherever they are, and how old a new one is. Pure.
//!
//! A node has one agent, as a rule with sessions on two replicas. After a restart, or with a cloned disk, there are two
//! agents (instances) for a while: the one with the higher epoch counts, on every replica, and ties are broken by the
//! replicas' names. No clock decides. Of the sessions of the agent that counts, our own comes first.

use super::news::Hold;
use crate::hello::Id;
use std::cmp::Reverse;

/// What is known of a session's chances.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fitness {
    /// Nothing speaks against it.
    Good,
    /// Its replica is going away, and still serves.
    Draining,
    /// Its agent takes no new streams, or its replica has not been heard of for some seconds.
    Doubtful,
}

/// A session that could take a dial.
#[derive(Debug, Clone, Copy)]
pub struct Candidate<'a> {
    /// Its agent's age.
    pub epoch: u64,
    /// Its agent.
    pub instance: &'a Id,
    /// The replica it is with.
    pub replica: &'a Id,
    /// That is this one.
    pub here: bool,
    /// Its chances.
    pub fitness: Fitness,
}

/// In which order to try them, as indexes. Among equals chance decides, so that dials spread.
pub fn order(candidates: &[Candidate<'_>], random: &mut fastrand::Rng) -> Vec<usize> {
    // Of one agent the highest epoch counts that anybody gave it.
    let rank = |instance: &Id| {
        let own = || candidates.iter().filter(|other| other.instance == instance);
        let doubtful = own().all(|other| other.fitness == Fitness::Doubtful);
        let age = own().map(|other| (other.epoch, other.replica.as_str())).max();
        (doubtful, Reverse(age))
    };
    let mut keyed: Vec<_> = candidates
        .iter()
        .enumerate()
        .map(|(at, one)| ((rank(one.instance), one.fitness, !one.here, random.u32(..)), at))
        .collect();
    keyed.sort_unstable();
    keyed.into_iter().map(|(_, at)| at).collect()
}

/// The epoch of an agent that begins a session, from what has been seen of its node's agents here and elsewhere: its own
/// if it has one, else higher than any.
pub fn epoch(instance: &Id, seen: &[Hold]) -> u64 {
    let own = seen.iter().find(|hold| hold.instance == *instance);
    let highest = seen.iter().map(|hold| hold.epoch).max().unwrap_or_default();
    own.map_or_else(|| highest.saturating_add(1), |hold| hold.epoch)
}

#[cfg(test)]
mod tests {
    use super::*;
    use Fitness::{Doubtful, Draining, Good};

    /// Candidates as (epoch, instance, replica, fitness), seen from replica `here`; the order as "instance@replica".
    fn ordered(here: &str, sessions: &[(u64, &str, &str, Fitness)]) -> Vec<String> {
        let ids: Vec<_> = sessions
            .iter()
            .map(|&(epoch, instance, replica, fitness)| {
                (epoch, Id::parse(instance).unwrap(), Id::parse(replica).unwrap(), fitness)
            })
            .collect();
        let candidates: Vec<_> = ids
            .iter()
            .map(|(epoch, instance, replica, fitness)| Candidate {
                epoch: *epoch,
                instance,
                replica,
                here: replica.as_str() == here,
                fitness: *fitness,
            })
            .collect();
        let order = order(&candidates, &mut fastrand::Rng::with_seed(1));
        assert_eq!(order.len(), sessions.len());
        order.into_iter().map(|at| format!("{}@{}", ids[at].1, ids[at].2)).collect()
    }

    #[test]
    fn our_own_session_of_the_newest_agent_comes_first() {
        let one_agent = [(1, "x", "a", Good), (1, "x", "b", Good)];
        assert_eq!(ordered("a", &one_agent)[0], "x@a");
        assert_eq!(ordered("b", &one_agent)[0], "x@b");
        // A newer agent on another replica beats the older one here.
        assert_eq!(ordered("a", &[(1, "x", "a", Good), (2, "y", "b", Good)]), ["y@b", "x@a"]);
        // What has said that it goes comes later, and still before another agent.
        let going = [(2, "y", "b", Draining), (2, "y", "c", Good), (1, "x", "a", Good)];
        assert_eq!(ordered("a", &going), ["y@c", "y@b", "x@a"]);
        assert_eq!(ordered("a", &[(2, "y", "b", Draining), (1, "x", "a", Good)])[0], "y@b");
        // An agent none of whose sessions is heard of does not.
        assert_eq!(ordered("a", &[(2, "y", "b", Doubtful), (1, "x", "a", Good)])[0], "x@a");
        assert_eq!(ordered("a", &[(1, "x", "a", Doubtful), (1, "x", "b", Good)])[0], "x@b");
    }

    /// Two clones that began at once on replicas that did not know of each other.
    #[test]
    fn every_replica_decides_alike() {
        let tie = [(1, "x", "a", Good), (1, "y", "b", Good)];
        for here in ["a", "b", "c"] {
            assert_eq!(ordered(here, &tie)[0], "y@b", "at {here}");
        }
        // x was given a higher epoch where more was known: that counts for it everywhere.
        let learned = [(1, "x", "a", Good), (1, "y", "b", Good), (2, "x", "c", Good)];
        for (here, first) in [("a", "x@a"), ("c", "x@c")] {
            assert_eq!(ordered(here, &learned)[0], first);
        }
        assert!(ordered("b", &learned)[0].starts_with("x@"));
    }

    #[test]
    fn a_new_agent_is_the_newest_and_a_known_one_stays_what_it_is() {
        let hold = |epoch, instance: &str| Hold { epoch, instance: Id::parse(instance).unwrap() };
        let x = Id::parse("x").unwrap();
        for (known, expected) in [
            (vec![], 1),
            (vec![hold(4, "y")], 5),
            (vec![hold(2, "x"), hold(4, "y")], 2),
            (vec![hold(u64::MAX, "y")], u64::MAX),
        ] {
            assert_eq!(epoch(&x, &known), expected, "{known:?}");
        }
    }
}
