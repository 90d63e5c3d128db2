//! Files that are followed: read at the start, looked at every two seconds, and in force when they have stood still
//! for one look.
//!
//! Looking is by content and not by inotify, so in place, renamed over, or Kubernetes' `..data` symlink swap are all
//! the same. Standing still for one look keeps a half-written pair of certificate and key from being judged.

use arc_swap::ArcSwap;
use std::{
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::sync::watch;

/// Time between two looks. A change is in force after two to four seconds.
const LOOK: Duration = Duration::from_secs(2);

/// The largest file that is read.
const LIMIT: u64 = 16 << 20;

type Contents = Vec<Vec<u8>>;
type Load<T> = dyn Fn(&[Vec<u8>]) -> Result<T, String> + Send + Sync;

/// A value made from files, and remade when they change.
pub struct Followed<T> {
    paths: Vec<PathBuf>,
    load: Box<Load<T>>,
    now: ArcSwap<T>,
    first: Contents,
    changes: watch::Sender<u64>,
}

impl<T: Send + Sync + 'static> Followed<T> {
    /// Reads the files, in the order of `paths`, and makes the first value.
    ///
    /// # Errors
    /// Every file that cannot be read, or what `load` says: at the start a broken file is an error.
    pub fn new(
        paths: Vec<PathBuf>,
        load: impl Fn(&[Vec<u8>]) -> Result<T, String> + Send + Sync + 'static,
    ) -> Result<Self, String> {
        let first = read(&paths)?;
        let now = ArcSwap::from_pointee(load(&first)?);
        Ok(Self { paths, load: Box::new(load), now, first, changes: watch::Sender::new(0) })
    }

    /// The value in force.
    pub fn get(&self) -> Arc<T> {
        self.now.load_full()
    }

    /// Tells of every change from now on.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Follows the files for as long as it is polled. `failed` is told of every broken change, once.
    pub async fn follow(&self, mut failed: impl FnMut(&str)) {
        let mut in_force = Ok(self.first.clone());
        let mut last = in_force.clone();
        loop {
            tokio::time::sleep(LOOK).await;
            let seen = read(&self.paths);
            let stood_still = seen == last;
            last.clone_from(&seen);
            if !stood_still || seen == in_force {
                continue;
            }
            let made = seen.as_ref().map_err(String::clone).and_then(|contents| (self.load)(contents));
            in_force = seen;
            match made {
                Ok(value) => {
                    self.now.store(Arc::new(value));
                    self.changes.send_modify(|count| *count += 1);
                    log::info!("{}: read again", self.names());
                }
                Err(why) => {
                    log::error!("{why}; what was there before stays in force");
                    failed(&why);
                }
            }
        }
    }

    fn names(&self) -> String {
        let names: Vec<_> = self.paths.iter().map(|path| path.display().to_string()).collect();
        names.join(", ")
    }
}

fn read(paths: &[PathBuf]) -> Result<Contents, String> {
    let mut contents = Vec::new();
    let mut wrong = Vec::new();
    for path in paths {
        match read_one(path) {
            Ok(bytes) => contents.push(bytes),
            Err(error) => wrong.push(format!("{}: {error}", path.display())),
        }
    }
    if wrong.is_empty() { Ok(contents) } else { Err(wrong.join("; ")) }
}

fn read_one(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(LIMIT + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > LIMIT {
        return Err(io::Error::other("larger than 16 MiB"));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{fs, os::unix::fs::symlink, sync::Mutex};

    fn number(files: &[Vec<u8>]) -> Result<u32, String> {
        str::from_utf8(&files[0]).unwrap().trim().parse().map_err(|_| "no number".into())
    }

    #[tokio::test(start_paused = true)]
    async fn every_way_of_changing_a_file_is_seen_within_ten_seconds() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("n");
        fs::create_dir(dir.path().join("v1")).unwrap();
        fs::create_dir(dir.path().join("v2")).unwrap();
        fs::write(dir.path().join("v1/n"), "1").unwrap();
        fs::write(dir.path().join("v2/n"), "2").unwrap();
        symlink("v1", dir.path().join("..data")).unwrap();
        symlink("..data/n", &path).unwrap();
        let followed = Arc::new(Followed::new(vec![path.clone()], number).unwrap());
        let failures = Arc::new(Mutex::new(0));
        let task = tokio::spawn({
            let (followed, failures) = (followed.clone(), failures.clone());
            async move { followed.follow(|_| *failures.lock().unwrap() += 1).await }
        });
        let wait = || tokio::time::sleep(Duration::from_secs(10));
        assert_eq!(*followed.get(), 1);
        // Kubernetes: ..data is renamed over.
        symlink("v2", dir.path().join("..tmp")).unwrap();
        fs::rename(dir.path().join("..tmp"), dir.path().join("..data")).unwrap();
        wait().await;
        assert_eq!(*followed.get(), 2);
        // In place.
        fs::write(dir.path().join("v2/n"), "3").unwrap();
        wait().await;
        assert_eq!(*followed.get(), 3);
        // Renamed over, the link replaced by a file.
        fs::write(dir.path().join("new"), "4").unwrap();
        fs::rename(dir.path().join("new"), &path).unwrap();
        wait().await;
        assert_eq!(*followed.get(), 4);
        // Broken, gone: the last good one stays, and each is told once.
        fs::write(&path, "nonsense").unwrap();
        wait().await;
        wait().await;
        assert_eq!((*followed.get(), *failures.lock().unwrap()), (4, 1));
        fs::remove_file(&path).unwrap();
        wait().await;
        assert_eq!((*followed.get(), *failures.lock().unwrap()), (4, 2));
        fs::write(&path, "5").unwrap();
        wait().await;
        assert_eq!(*followed.get(), 5);
        task.abort();
    }

    #[test]
    fn at_the_start_every_missing_file_is_named() {
        let paths = vec![PathBuf::from("/nonexistent/a"), PathBuf::from("/nonexistent/b")];
        let error = Followed::new(paths, number).err().unwrap();
        assert!(error.contains("/nonexistent/a") && error.contains("/nonexistent/b"), "{error}");
    }
}
