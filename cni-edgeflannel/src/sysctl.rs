//! Kernel settings under /proc/sys/net, written only when they differ.
//!
//! /proc/sys/net shows the network namespace of the calling thread, so a pod's settings are written from
//! inside its namespace (see `netns`).

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
    sync::OnceLock,
};

/// Where a pod has the host's /proc/sys/net: its own is read-only unless it is privileged.
const HOSTS: &str = "/host/proc/sys";

/// The file of a setting.
#[must_use]
pub fn file(key: &str) -> PathBuf {
    static ROOT: OnceLock<&str> = OnceLock::new();
    let hosts_is_there = || Path::new(HOSTS).join("net/ipv4/ip_forward").exists();
    let root = ROOT.get_or_init(|| if hosts_is_there() { HOSTS } else { "/proc/sys" });
    Path::new(root).join(key)
}

/// A setting and the value it shall have.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Sysctl {
    /// Below /proc/sys, with `/`: `net/ipv4/ip_forward`. Device names may contain dots.
    pub key: String,
    /// As it is written.
    pub value: &'static str,
    /// A kernel without the setting (IPv6 switched off at boot) is fine.
    pub optional: bool,
}

impl Sysctl {
    /// A setting that must take.
    pub fn new(key: impl Into<String>, value: &'static str) -> Self {
        Self { key: key.into(), value, optional: false }
    }

    /// A setting that need not exist.
    pub fn optional(key: impl Into<String>, value: &'static str) -> Self {
        Self { optional: true, ..Self::new(key, value) }
    }

    fn path(&self) -> PathBuf {
        file(&self.key)
    }

    /// Whether it has the value, in this thread's network namespace.
    ///
    /// # Errors
    /// When it cannot be read, with its name.
    pub fn holds(&self) -> io::Result<bool> {
        match fs::read_to_string(self.path()) {
            Ok(current) => Ok(current.trim() == self.value),
            Err(e) if self.optional && e.kind() == io::ErrorKind::NotFound => Ok(true),
            Err(e) => Err(io::Error::new(e.kind(), format!("read sysctl {}: {e}", self.key))),
        }
    }

    /// Sets it in this thread's network namespace. True when that changed something.
    ///
    /// # Errors
    /// When it cannot be read or written, with its name and value.
    pub fn ensure(&self) -> io::Result<bool> {
        if self.holds()? {
            return Ok(false);
        }
        fs::write(self.path(), self.value)
            .map_err(|e| io::Error::new(e.kind(), format!("set sysctl {self}: {e}")))?;
        Ok(true)
    }
}

impl fmt::Display for Sysctl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.key, self.value)
    }
}
