//! Changes of owner that could not be written to the state, because the disk is full or read-only: kept in /run
//! until the next write succeeds, which merges them.
//!
//! Losing them with the power loses nothing that matters: the addresses stay bound in the state, and an owner
//! from before the power cut counts as gone anyway. That is why only changes of owner are noted, never an
//! address that a binding did not have.

use crate::{identity::Key, lock::make_directory, record::Binding, view::Changes};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

/// What is noted about a network.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Notes {
    /// Grows with each note within a boot; the state remembers which was merged last.
    pub id: u128,
    /// All of them, the last word on each binding.
    pub changes: Changes,
}

#[derive(Serialize, Deserialize)]
struct Written {
    id: String,
    sequence: Option<u64>,
    bindings: BTreeMap<String, Option<Vec<u8>>>,
}

/// The file of a network.
#[must_use]
pub fn path(run_dir: &Path, network: &str) -> PathBuf {
    run_dir.join(format!("{network}.notes"))
}

/// The half of the id that tells this boot from others.
fn boot_half(boot: &str) -> u128 {
    let hash = boot
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |sum, byte| (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    u128::from(hash) << 64
}

impl Notes {
    /// The notes of this boot that the state does not have yet.
    ///
    /// A file that cannot be read is worth a warning and no more: see above.
    #[must_use]
    pub fn load(path: &Path, boot: &str, merged: Option<u128>) -> Option<Self> {
        let bytes = match fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(error) => {
                log::warn!("the notes in {} cannot be read: {error}", path.display());
                return None;
            }
        };
        let notes = Self::decode(&bytes);
        if notes.is_none() {
            log::warn!("the notes in {} make no sense and are ignored", path.display());
        }
        let this_boot = |notes: &Self| notes.id & (u128::MAX << 64) == boot_half(boot);
        notes.filter(this_boot).filter(|notes| merged != Some(notes.id))
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let written: Written = serde_json::from_slice(bytes).ok()?;
        let mut changes = Changes { sequence: written.sequence, ..Changes::default() };
        for (key, record) in written.bindings {
            let key = Key::parse(&key)?;
            let binding = match record {
                Some(record) => Some(Binding::decode(&key, &record)?),
                None => None,
            };
            changes.bindings.insert(key, binding);
        }
        Some(Self { id: written.id.parse().ok()?, changes })
    }

    /// These notes and one more.
    #[must_use]
    pub fn and(mut self, changes: Changes, boot: &str, merged: Option<u128>) -> Self {
        let half = boot_half(boot);
        let last =
            [self.id, merged.unwrap_or_default()].into_iter().filter(|id| id & (u128::MAX << 64) == half);
        self.id = last.max().unwrap_or(half) + 1;
        self.changes.bindings.extend(changes.bindings);
        self.changes.sequence = self.changes.sequence.max(changes.sequence);
        self
    }

    /// Writes them down: all or nothing.
    ///
    /// # Errors
    /// The kernel's.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        let record = |(key, binding): (&Key, &Option<Binding>)| {
            (key.as_str().to_owned(), binding.as_ref().map(|binding| binding.encode(key)))
        };
        let written = Written {
            id: self.id.to_string(),
            sequence: self.changes.sequence,
            bindings: self.changes.bindings.iter().map(record).collect(),
        };
        path.parent().map_or(Ok(()), make_directory)?;
        let new = path.with_extension("notes.new");
        fs::write(&new, serde_json::to_vec(&written)?)?;
        fs::rename(&new, path)
    }
}

/// Forgets notes that the state has now.
pub fn remove(path: &Path) {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            // Harmless: the state remembers that it has them.
            log::warn!("the notes in {} cannot be removed: {error}", path.display());
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_noted_is_found_by_this_boot_until_it_is_merged() {
        let dir = tempfile::tempdir().unwrap();
        let path = path(&dir.path().join("run"), "net");
        assert_eq!(Notes::load(&path, "boot", None), None);
        let key = Key::parse("ns/pod/eth0").unwrap();
        let mut changes = Changes { sequence: Some(9), ..Changes::default() };
        changes.bindings.insert(key.clone(), Some(Binding { sequence: 9, ..Binding::default() }));
        let notes = Notes::default().and(changes, "boot", None);
        notes.save(&path).unwrap();
        assert_eq!(Notes::load(&path, "boot", None), Some(notes.clone()));
        assert_eq!(Notes::load(&path, "another boot", None), None);
        assert_eq!(Notes::load(&path, "boot", Some(notes.id)), None);
        let gone = Changes { bindings: [(key.clone(), None)].into(), ..Changes::default() };
        let more = notes.clone().and(gone, "boot", Some(notes.id));
        assert!(more.id > notes.id);
        assert_eq!(more.changes.bindings[&key], None);
        assert_eq!(more.changes.sequence, Some(9));
        fs::write(&path, "garbage").unwrap();
        assert_eq!(Notes::load(&path, "boot", None), None);
        remove(&path);
        remove(&path);
        assert!(!path.exists());
    }
}
