//! The lock file of a network: one process at a time, and nobody waits for ever.

use fs2::FileExt;
use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

/// Held until dropped, or until the process ends, however it ends.
#[derive(Debug)]
pub struct Lock {
    _file: File,
    /// When waiting for anything else must end.
    pub deadline: Instant,
}

/// Why there is no lock.
#[derive(Debug)]
pub enum Locked {
    /// Somebody has had it for the whole time.
    Busy(PathBuf, Duration),
    /// The file cannot be opened or locked.
    Io(PathBuf, io::Error),
}

impl Lock {
    /// Takes the lock, waiting for those who came before.
    ///
    /// # Errors
    /// [`Locked::Busy`] after `timeout`.
    pub fn take(path: &Path, fallback: &Path, timeout: Duration) -> Result<Self, Locked> {
        let deadline = Instant::now() + timeout;
        let file = open(path, fallback).map_err(|error| Locked::Io(path.into(), error))?;
        if file.try_lock_exclusive().is_ok() {
            return Ok(Self { _file: file, deadline });
        }
        // The kernel queues those who block, which polling would not. The thread of one who gave up ends with
        // the process, or drops the lock as soon as it gets it.
        let (sender, receiver) = mpsc::channel();
        thread::spawn(move || {
            let locked = file.lock_exclusive().map(|()| file);
            let _ = sender.send(locked);
        });
        match receiver.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(Ok(file)) => Ok(Self { _file: file, deadline }),
            Ok(Err(error)) => Err(Locked::Io(path.into(), error)),
            Err(_) => Err(Locked::Busy(path.into(), timeout)),
        }
    }
}

/// On a disk that cannot be written an existing lock file still can be locked; when there is none, nobody can
/// make one there, and one in /run does as well.
fn open(path: &Path, fallback: &Path) -> io::Result<File> {
    let create = |path: &Path| {
        path.parent().map_or(Ok(()), make_directory)?;
        OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path)
    };
    create(path).or_else(|error| File::open(path).or_else(|_| create(fallback)).map_err(|_| error))
}

/// Makes a directory for our eyes only; its parents, if they are missing too, are everybody's.
///
/// # Errors
/// The kernel's.
pub fn make_directory(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    path.parent().map_or(Ok(()), fs::create_dir_all)?;
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time_and_a_bounded_wait() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/er/net.lock");
        let take =
            |timeout| Lock::take(&path, &dir.path().join("run/net.lock"), Duration::from_millis(timeout));
        let first = take(0).unwrap();
        let began = Instant::now();
        let error = take(50).unwrap_err();
        assert!(matches!(&error, Locked::Busy(busy, _) if *busy == path), "{error:?}");
        assert!(began.elapsed() < Duration::from_secs(5));
        let releaser = thread::spawn(move || {
            thread::sleep(Duration::from_millis(50));
            drop(first);
        });
        take(10_000).unwrap();
        releaser.join().unwrap();
        // The thread that waited in vain above has let go by now or will at once.
        take(10_000).unwrap();
    }
}
