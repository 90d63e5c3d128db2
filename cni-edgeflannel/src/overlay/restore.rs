//! Bringing the overlay back from the node's own disk, with nobody to ask: by the first pod's ADD after a reboot, or
//! by the daemon, whoever comes first.
//!
//! The overlay counts as up when the mark in /run names its devices as they are now. The mark is written last, so a
//! restore that was killed half-way is done again; /run is empty after a reboot. A lock makes a hundred ADDs at once
//! restore once.

use super::{
    Kind, device_name,
    kernel::{Error as KernelError, Failure, Kernel},
    reconcile::{Outcome, find_underlay, reconcile},
};
use crate::record::{Family, Loaded, NodeRecord, PerFamily, Record, RecordStore, StoreError};
use fs2::FileExt;
use log::{info, warn};
use nix::{net::if_::if_nametoindex, unistd::gethostname};
use std::{
    fmt,
    fmt::Write as _,
    fs::{self, File, OpenOptions},
    io::{self, ErrorKind},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

/// Where the mark and the lock are.
pub const RUN_DIR: &str = "/run/edgeflannel";

/// How long a pod waits for another one's restore. 5,000 peers take a fraction of a second.
const LOCK_LIMIT: Duration = Duration::from_secs(20);

/// What became of it.
#[derive(Debug)]
pub enum Restored {
    /// It was up.
    Up,
    /// It is as the record says, as far as it could be; what could not is in the outcome.
    Done(Box<Outcome>),
    /// There is nothing to restore from: a new node, or one whose record is damaged.
    NoRecord,
    /// The record was written under another host name: a cloned disk.
    OtherHost(String),
}

/// Why nothing was restored.
#[derive(Debug)]
pub enum Error {
    /// The record is of a later version, or the disk refuses.
    Record(StoreError),
    /// Another process restores and does not get done.
    Busy,
    /// The directory in /run refuses.
    Run(PathBuf, io::Error),
    /// The kernel refuses to say what it has.
    Kernel(KernelError),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Record(e) => write!(f, "{e}"),
            Self::Busy => {
                write!(f, "another process has been restoring the overlay for {} s", LOCK_LIMIT.as_secs())
            }
            Self::Run(path, e) => write!(f, "{}: {e}", path.display()),
            Self::Kernel(e) => write!(f, "{e}"),
        }
    }
}

impl std::error::Error for Error {}

impl From<KernelError> for Error {
    fn from(error: KernelError) -> Self {
        Self::Kernel(error)
    }
}

/// The mark that says the overlay is up.
#[derive(Debug, Clone)]
pub struct Mark {
    dir: PathBuf,
}

impl Mark {
    /// In a directory, usually [`RUN_DIR`].
    #[must_use]
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.into() }
    }

    /// Whether the mark names the devices as they are now.
    #[must_use]
    pub fn holds(&self) -> bool {
        let Ok(text) = fs::read_to_string(self.dir.join("restored")) else { return false };
        let mut devices = 0;
        let holds = text.lines().all(|line| match line.split_once(' ') {
            // Namespaces share /run more easily than they share devices.
            Some(("netns", netns)) => netns == this_netns(),
            Some((name, index)) => {
                devices += 1;
                if_nametoindex(name).is_ok_and(|now| index.parse() == Ok(now))
            }
            None => false,
        });
        holds && devices > 0
    }

    /// Says that the overlay is up, with these devices.
    ///
    /// # Errors
    /// When the directory refuses.
    pub fn set(&self, vni: u32, indexes: &PerFamily<u32>) -> io::Result<()> {
        let mut text = format!("netns {}\n", this_netns());
        for (family, index) in indexes.iter() {
            let _ = writeln!(text, "{} {index}", device_name(family, vni));
        }
        fs::create_dir_all(&self.dir)?;
        let new = self.dir.join(format!("restored.{}", std::process::id()));
        fs::write(&new, text)?;
        fs::rename(&new, self.dir.join("restored"))
    }

    /// Takes it back: whoever comes next restores.
    ///
    /// # Errors
    /// When the directory refuses.
    pub fn clear(&self) -> io::Result<()> {
        match fs::remove_file(self.dir.join("restored")) {
            Err(e) if e.kind() != ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }

    /// The lock around a restore. Waits for whoever has it.
    ///
    /// # Errors
    /// When it stays taken, or the directory refuses.
    pub fn lock(&self) -> Result<File, Error> {
        let path = self.dir.join("restore.lock");
        let file = fs::create_dir_all(&self.dir)
            .and_then(|()| OpenOptions::new().create(true).truncate(false).write(true).open(&path));
        let file = file.map_err(|e| Error::Run(path.clone(), e))?;
        let started = Instant::now();
        let mut pause = Duration::from_millis(1);
        loop {
            match file.try_lock_exclusive() {
                Ok(()) => return Ok(file),
                Err(e) if e.kind() != ErrorKind::WouldBlock => return Err(Error::Run(path, e)),
                Err(_) if started.elapsed() >= LOCK_LIMIT => return Err(Error::Busy),
                Err(_) => thread::sleep(pause),
            }
            pause = (pause * 2).min(Duration::from_millis(10));
        }
    }
}

/// `net:[4026531840]`, the same for as long as the namespace lives.
fn this_netns() -> String {
    let link = fs::read_link("/proc/thread-self/ns/net");
    link.map_or_else(|_| "unknown".into(), |link| link.to_string_lossy().into_owned())
}

/// Whether there is nothing to restore: the mark holds, and so does `else_wise`, which is what else the caller
/// needs.
#[must_use]
pub fn is_up(run_dir: &Path, else_wise: impl Fn() -> bool) -> bool {
    Mark::new(run_dir).holds() && else_wise()
}

/// Restores the overlay from the record in `state_dir`, unless it [is up](is_up).
///
/// # Errors
/// Each of [`Error`]; then nothing was done.
pub fn restore(state_dir: &Path, run_dir: &Path, else_wise: impl Fn() -> bool) -> Result<Restored, Error> {
    let mark = Mark::new(run_dir);
    if is_up(run_dir, &else_wise) {
        return Ok(Restored::Up);
    }
    let mut store = RecordStore::new(state_dir);
    // A node that never had an overlay needs no lock, and no directory in /run.
    if !store.path().exists() {
        return Ok(Restored::NoRecord);
    }
    let _lock = mark.lock()?;
    if is_up(run_dir, &else_wise) {
        return Ok(Restored::Up);
    }
    let record = match store.load().map_err(Error::Record)? {
        Loaded::Record(record) => record,
        Loaded::Nothing => return Ok(Restored::NoRecord),
        Loaded::Damaged { reason, set_aside } => {
            let place =
                set_aside.map_or_else(|| "left where it is".into(), |path| format!("now {}", path.display()));
            warn!("the node record {} is damaged ({reason}); {place}", store.path().display());
            return Ok(Restored::NoRecord);
        }
    };
    if !record.node.is_of_host(&host_name()) {
        return Ok(Restored::OtherHost(record.node.host_name.clone()));
    }
    let kernel = Kernel::open()?;
    Ok(Restored::Done(Box::new(restore_from(&record, &kernel, &mark)?)))
}

/// Restores the overlay from a record, and sets the mark if all of it is there. The caller holds the lock.
///
/// # Errors
/// When the kernel refuses to say what it has.
pub fn restore_from(record: &Record, kernel: &Kernel, mark: &Mark) -> Result<Outcome, Error> {
    let started = Instant::now();
    let underlay = match find_underlay(kernel, &record.node)? {
        Ok(underlay) => Some(underlay),
        Err(absent) => {
            warn!("the overlay has to wait: {absent}");
            None
        }
    };
    let outcome = reconcile(kernel, record, underlay.as_ref(), |_| true)?;
    for failure in outcome.failures.iter().take(5) {
        warn!("restoring the overlay: {}", failure.error);
    }
    if is_whole(&record.node, &outcome) {
        if let Err(e) = mark.set(record.node.backend.vni, &outcome.indexes) {
            warn!("{}: {e}; every pod will look at the overlay again", mark.dir.display());
        }
        info!("restored the overlay with {} peers in {:?}", record.peers.len(), started.elapsed());
    }
    Ok(outcome)
}

/// Every family in use has its device, as it should be. A route that the kernel refuses is for the daemon to
/// report and to try again; were it to keep the mark from being set, every pod would wait for a restore.
fn is_whole(node: &NodeRecord, outcome: &Outcome) -> bool {
    let device =
        |failure: &Failure| matches!(failure.step.kind(), Kind::Link | Kind::Mac | Kind::Mtu | Kind::Address);
    let used = |family: &Family| node.subnets.get(*family).is_some() && node.networks.get(*family).is_some();
    let mut used = Family::ALL.into_iter().filter(used).peekable();
    used.peek().is_some()
        && used.all(|family| outcome.indexes.get(family).is_some())
        && !outcome.failures.iter().any(device)
}

/// The kernel's host name; empty when it cannot be had.
#[must_use]
pub fn host_name() -> String {
    gethostname().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mark_names_devices_as_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let mark = Mark::new(&dir.path().join("edgeflannel"));
        assert!(!mark.holds());
        let write = |text: &str| fs::write(dir.path().join("edgeflannel/restored"), text).unwrap();
        fs::create_dir_all(dir.path().join("edgeflannel")).unwrap();
        let lo = if_nametoindex("lo").unwrap();
        let netns = this_netns();
        write(&format!("netns {netns}\nlo {lo}\n"));
        assert!(mark.holds());
        for bad in [
            String::new(),
            format!("netns {netns}\n"),
            format!("netns net:[1]\nlo {lo}\n"),
            format!("netns {netns}\nlo {}\n", lo + 1),
            format!("netns {netns}\nlo {lo}\nflannel.4095 7\n"),
            format!("lo{lo}"),
        ] {
            write(&bad);
            assert!(!mark.holds(), "{bad:?}");
        }
        mark.set(4095, &PerFamily { v4: Some(7), v6: None }).unwrap();
        assert!(!mark.holds());
        mark.clear().unwrap();
        mark.clear().unwrap();
        assert!(!dir.path().join("edgeflannel/restored").exists());
    }
}
