//! Which nodes' sessions have changed since when, for those who tell other replicas. Pure and bounded.
//!
//! Every change has a number. Whoever has fallen so far behind that its changes are not kept any more is told everything
//! anew.

use crate::target::Name;
use std::collections::{HashSet, VecDeque};

/// Changes that are kept.
const LIMIT: usize = 16 * 1024;

/// The last changes.
#[derive(Debug, Default)]
pub struct Journal {
    version: u64,
    changed: VecDeque<Name>,
}

impl Journal {
    /// Notes a change; its number.
    pub fn note(&mut self, node: &Name) -> u64 {
        self.version += 1;
        self.changed.push_back(node.clone());
        if self.changed.len() > LIMIT {
            self.changed.pop_front();
        }
        self.version
    }

    /// The number of the last change.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The nodes that have changed after this change, each once; none when that is not known any more.
    pub fn since(&self, version: u64) -> Option<HashSet<Name>> {
        let behind = usize::try_from(self.version.checked_sub(version)?).ok()?;
        let first = self.changed.len().checked_sub(behind)?;
        Some(self.changed.range(first..).cloned().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_told_once_until_they_are_forgotten() {
        let name = |number: usize| format!("n{number}").parse::<Name>().unwrap();
        let mut journal = Journal::default();
        assert_eq!(journal.since(0), Some(HashSet::new()));
        journal.note(&name(1));
        let version = journal.note(&name(2));
        journal.note(&name(1));
        assert_eq!(journal.since(0), Some(HashSet::from([name(1), name(2)])));
        assert_eq!(journal.since(version), Some(HashSet::from([name(1)])));
        assert_eq!(journal.since(journal.version()), Some(HashSet::new()));
        assert_eq!(journal.since(journal.version() + 1), None, "of another run");
        for number in 0..LIMIT {
            journal.note(&name(number));
        }
        assert_eq!(journal.since(version), None);
        assert_eq!(journal.since(journal.version() - LIMIT as u64).map(|nodes| nodes.len()), Some(LIMIT));
    }
}
