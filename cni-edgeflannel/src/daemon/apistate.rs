//! `/run/edgeflannel/daemon.json`: what the running daemon knows of the API server, for `edgeflanneld status`.
//!
//! In /run, because it is worth nothing after a reboot and changes too often for an SD card. The time is the
//! wall clock's and only shown.

use crate::daemon::lock;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::{
    fs,
    path::{Path, PathBuf},
    time::SystemTime,
};

/// What is told.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Told {
    pid: u32,
    /// The last try to reach it worked.
    pub reachable: bool,
    /// When it last said anything (RFC 3339).
    pub last_contact: Option<String>,
}

/// The daemon's side.
#[derive(Debug)]
pub struct ApiState {
    path: PathBuf,
    reachable: bool,
    tried: bool,
    last: Option<SystemTime>,
    /// Why it was not heard when it last was not.
    why: String,
    written: Option<Told>,
}

impl ApiState {
    /// Nothing known yet.
    #[must_use]
    pub fn new(run_dir: &Path) -> Self {
        Self {
            path: file(run_dir),
            reachable: false,
            tried: false,
            last: None,
            why: String::new(),
            written: None,
        }
    }

    /// The server was heard. True when that is news.
    pub fn heard(&mut self) -> bool {
        self.last = Some(SystemTime::now());
        self.change(true)
    }

    /// The server was not heard, and why. True when that is news: it was there until now, or it was for another reason.
    pub fn lost(&mut self, why: &str) -> bool {
        let another = self.why != why;
        if another {
            why.clone_into(&mut self.why);
        }
        self.change(false) || another
    }

    fn change(&mut self, reachable: bool) -> bool {
        let news = self.reachable != reachable || !self.tried;
        (self.reachable, self.tried) = (reachable, true);
        if news {
            self.write();
        }
        news
    }

    /// Writes it down, if it is other than what was written.
    pub fn write(&mut self) {
        let last_contact = self.last.and_then(|at| Timestamp::try_from(at).ok());
        let told = Told {
            pid: std::process::id(),
            reachable: self.reachable,
            last_contact: last_contact.map(|at| at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()),
        };
        if self.written.as_ref() == Some(&told) {
            return;
        }
        let new = self.path.with_extension("new");
        let text = serde_json::to_string(&told).unwrap_or_default();
        let dir = self.path.parent().map_or(Ok(()), fs::create_dir_all);
        match dir.and_then(|()| fs::write(&new, text)).and_then(|()| fs::rename(&new, &self.path)) {
            Ok(()) => self.written = Some(told),
            Err(e) => log::debug!("write {}: {e}", self.path.display()),
        }
    }
}

/// What the daemon of a state directory has told; nothing when none runs.
#[must_use]
pub fn read(run_dir: &Path, state_dir: &Path) -> Told {
    let told = || serde_json::from_str::<Told>(&fs::read_to_string(file(run_dir)).ok()?).ok();
    let running = lock::holder(state_dir);
    told().filter(|told| Some(told.pid) == running).unwrap_or_else(|| {
        // When it last was there is still true.
        Told { last_contact: told().and_then(|told| told.last_contact), ..Told::default() }
    })
}

fn file(run_dir: &Path) -> PathBuf {
    run_dir.join("daemon.json")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn told_while_the_daemon_runs() {
        let dir = tempfile::tempdir().unwrap();
        let (run, state) = (dir.path().join("run"), dir.path().join("state"));
        assert_eq!(read(&run, &state), Told::default());
        let lock = lock::take(&state, &run).unwrap();
        let mut api = ApiState::new(&run);
        assert!(api.lost("refused") && !api.lost("refused") && api.lost("silent"));
        assert_eq!(read(&run, &state).last_contact, None);
        assert!(api.heard() && !api.heard());
        let told = read(&run, &state);
        assert!(told.reachable && told.last_contact.as_ref().is_some_and(|at| at.ends_with('Z')), "{told:?}");
        drop(lock);
        let told = read(&run, &state);
        assert!(!told.reachable && told.last_contact.is_some());
    }
}
