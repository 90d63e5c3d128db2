//! libcni's records of pods that a power cut left unreadable.
//!
//! libcni keeps what a pod's ADD returned in `results/NETWORK-CONTAINER-INTERFACE` and does not sync it (libcni
//! `api.go`, `cacheAdd`). When the power goes in a pod's first seconds the file comes back empty. The runtime's DEL
//! then fails before any plugin is called (`getCachedResult`: "decoding version from network config: unexpected end of
//! JSON input"), and containerd 1.6 keeps the dead sandbox, and the pod down, for ever. A file that is missing is
//! nothing unusual to libcni: DEL is called without prevResult. So what is no JSON is removed, and named in the log.
//!
//! A file that a runtime is just writing is empty for a moment, too: what was touched just now is looked at again.

use serde::de::IgnoredAny;
use std::{
    fs::{self, DirEntry},
    io::ErrorKind,
    path::{Path, PathBuf},
    thread,
    time::{Duration, SystemTime},
};

/// Files that are looked at, at most. A node has some hundred pods.
const MOST: usize = 20_000;
/// A result is a few hundred bytes. What is larger than this is nothing that libcni wrote, and left alone.
const LARGEST: u64 = 1 << 20;
/// What was touched so lately may be in the middle of being written. By the same clock that dates files, which need
/// not be right: a file from a further future is an old one.
const JUST_NOW: Duration = Duration::from_secs(10);
/// Nobody needs so long to write a result.
const WRITTEN_WITHIN: Duration = Duration::from_secs(1);

/// A file that is no JSON.
#[derive(Debug)]
struct Unreadable {
    path: PathBuf,
    bytes: u64,
    modified: Option<SystemTime>,
    /// Touched less than [`JUST_NOW`] before it was read, or dated as little after.
    young: bool,
    why: String,
}

/// By a clock that may run backwards.
fn just_now(then: SystemTime) -> bool {
    let now = SystemTime::now();
    now.duration_since(then).unwrap_or_else(|ahead| ahead.duration()) < JUST_NOW
}

/// Removes the records below libcni's cache directory that are no JSON; gives their paths. No directory, nothing to
/// do. Never fails: what cannot be removed is said, and the node works as well as before.
pub fn clear(cache_dir: &Path) -> Vec<PathBuf> {
    let dir = cache_dir.join("results");
    let (young, old): (Vec<_>, Vec<_>) = unreadable(&dir).into_iter().partition(|file| file.young);
    let mut removed: Vec<PathBuf> = old.iter().filter_map(remove).collect();
    if !young.is_empty() {
        thread::sleep(WRITTEN_WITHIN);
        removed.extend(young.iter().filter_map(remove));
    }
    removed
}

impl Unreadable {
    /// Nobody has written to it since it was read.
    fn stands(&self) -> bool {
        fs::symlink_metadata(&self.path)
            .is_ok_and(|now| now.len() == self.bytes && now.modified().ok() == self.modified)
    }
}

/// Unless it is being written, or was since it was read.
fn remove(file: &Unreadable) -> Option<PathBuf> {
    if !file.stands() {
        return None;
    }
    let Unreadable { path, bytes, why, .. } = file;
    match fs::remove_file(path) {
        Ok(()) => {
            let shown = path.display();
            log::warn!("removed libcni's record {shown}, which no runtime gets past ({bytes} bytes: {why})");
            Some(path.clone())
        }
        Err(e) => {
            log::warn!("remove libcni's unreadable record {} ({why}): {e}", path.display());
            None
        }
    }
}

fn unreadable(dir: &Path) -> Vec<Unreadable> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) => {
            if e.kind() != ErrorKind::NotFound {
                log::warn!("look for libcni's unreadable records in {}: {e}", dir.display());
            }
            return Vec::new();
        }
    };
    entries.flatten().take(MOST).filter_map(|entry| read(&entry)).collect()
}

/// What is wrong with one, if it is a file at all and can be read.
fn read(entry: &DirEntry) -> Option<Unreadable> {
    let path = entry.path();
    // Of the entry, not of what a link leads to.
    let metadata =
        entry.metadata().ok().filter(|metadata| metadata.is_file() && metadata.len() <= LARGEST)?;
    let why = serde_json::from_slice::<IgnoredAny>(&fs::read(&path).ok()?).err()?.to_string();
    let modified = metadata.modified().ok();
    Some(Unreadable { path, bytes: metadata.len(), modified, young: modified.is_none_or(just_now), why })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs::File, time::Instant};

    fn cache() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let results = dir.path().join("results");
        fs::create_dir(&results).unwrap();
        (dir, results)
    }

    fn put(results: &Path, name: &str, bytes: &[u8], age: i64) {
        let path = results.join(name);
        fs::write(&path, bytes).unwrap();
        let (now, by) = (SystemTime::now(), Duration::from_secs(age.unsigned_abs()));
        File::options()
            .write(true)
            .open(path)
            .unwrap()
            .set_modified(if age < 0 { now + by } else { now - by })
            .unwrap();
    }

    fn names(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }

    #[test]
    fn what_is_no_json_goes_and_nothing_else() {
        let (dir, results) = cache();
        for (name, bytes) in [
            ("gone-empty", &b""[..]),
            ("gone-zeros", &[0; 512]),
            ("gone-torn", br#"{"kind":"cniCacheV1","containerId":"x"#),
            ("kept-whole", br#"{"kind":"cniCacheV1","containerId":"x"}"#),
            ("kept-of-another-network", br#"{"cniVersion":"0.3.1","ips":[]}"#),
            ("kept-too-large", &vec![0; 2 << 20]),
        ] {
            put(&results, name, bytes, 3600);
        }
        // Written when the clock was ahead: before this boot, then.
        put(&results, "gone-future", b"", -3600);
        fs::create_dir(results.join("kept-directory")).unwrap();
        fs::write(dir.path().join("elsewhere"), "").unwrap();
        std::os::unix::fs::symlink(dir.path().join("elsewhere"), results.join("kept-link")).unwrap();
        let start = Instant::now();
        assert_eq!(clear(dir.path()).len(), 4);
        assert!(start.elapsed() < WRITTEN_WITHIN, "nothing to wait for");
        assert!(names(&results).iter().all(|name| name.starts_with("kept-")), "{:?}", names(&results));
        assert_eq!(names(&results).len(), 5);
        assert!(dir.path().join("elsewhere").exists());
    }

    #[test]
    fn what_is_being_written_stays() {
        let (dir, results) = cache();
        put(&results, "written", b"", 0);
        put(&results, "abandoned", b"", 0);
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(WRITTEN_WITHIN / 2);
                fs::write(results.join("written"), "{}").unwrap();
            });
            assert_eq!(clear(dir.path()), [results.join("abandoned")]);
        });
        assert_eq!(names(&results), ["written"]);
    }

    #[test]
    fn no_directory_no_harm() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(clear(&dir.path().join("absent")), [""; 0].map(PathBuf::from));
    }
}
