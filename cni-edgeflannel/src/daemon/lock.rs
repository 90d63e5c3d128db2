//! One daemon per state directory: `daemon.lock`, held for life, with the holder's pid in it.
//!
//! The kernel lets go of it when the process ends, however it ends, so a pid that is read here is only for the
//! message. On a read-only disk the lock moves to /run, since two daemons are worse than a lock in another place.

use fs2::FileExt;
use std::{
    fs::{self, File, OpenOptions},
    io::{self, ErrorKind, Read, Write},
    path::{Path, PathBuf},
};

/// The lock, until dropped.
#[derive(Debug)]
pub struct DaemonLock {
    _file: File,
}

/// Takes the lock of a state directory.
///
/// # Errors
/// A sentence that names the holder, or says why the lock cannot be taken at all.
pub fn take(state_dir: &Path, run_dir: &Path) -> Result<DaemonLock, String> {
    let path = state_dir.join("daemon.lock");
    match open(&path) {
        Ok(file) => lock(file, &path),
        Err(e) if matches!(e.kind(), ErrorKind::ReadOnlyFilesystem | ErrorKind::StorageFull) => {
            let name = state_dir.to_string_lossy().replace('/', "-");
            let other = run_dir.join(format!("daemon{name}.lock"));
            log::warn!("{}: {e}; locking {} instead", path.display(), other.display());
            let file = open(&other).map_err(|e| format!("open {}: {e}", other.display()))?;
            lock(file, &other)
        }
        Err(e) => Err(format!("open {}: {e}", path.display())),
    }
}

/// The pid of the daemon that holds a state directory's lock.
#[must_use]
pub fn holder(state_dir: &Path) -> Option<u32> {
    let path = state_dir.join("daemon.lock");
    let file = File::open(&path).ok()?;
    match FileExt::try_lock_shared(&file) {
        Err(e) if e.kind() == ErrorKind::WouldBlock => pid_in(&path),
        _ => None,
    }
}

fn open(path: &PathBuf) -> io::Result<File> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    OpenOptions::new().create(true).truncate(false).read(true).write(true).open(path)
}

fn lock(mut file: File, path: &Path) -> Result<DaemonLock, String> {
    match FileExt::try_lock_exclusive(&file) {
        Ok(()) => {
            // Only a message for the next one to come; a full disk must not stop this one.
            let written = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
            if let Err(e) = written {
                log::warn!("write our pid to {}: {e}", path.display());
            }
            Ok(DaemonLock { _file: file })
        }
        Err(e) if e.kind() == ErrorKind::WouldBlock => {
            let who =
                pid_in(path).map_or_else(|| "another process".to_owned(), |pid| format!("process {pid}"));
            Err(format!("another edgeflanneld runs on this state directory: {who} holds {}", path.display()))
        }
        Err(e) => Err(format!("lock {}: {e}", path.display())),
    }
}

fn pid_in(path: &Path) -> Option<u32> {
    let mut text = String::new();
    File::open(path).ok()?.take(32).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        assert_eq!(holder(&state), None);
        let held = take(&state, dir.path()).unwrap();
        assert_eq!(holder(&state), Some(std::process::id()));
        let refused = take(&state, dir.path()).unwrap_err();
        assert!(refused.contains(&format!("process {}", std::process::id())), "{refused}");
        drop(held);
        assert_eq!(holder(&state), None);
        take(&state, dir.path()).unwrap();
    }
}
