//! Reading /proc: who is alive, who is whose child, who lives in which namespace.

use anyhow::{Context, Result};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

/// A process id together with its start time, so that a reused number is not mistaken for the old process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Process {
    /// The process id as seen from the real machine.
    pub pid: i32,
    started: u64,
}

impl Process {
    /// The process that has this id now.
    pub fn find(pid: i32) -> Result<Self> {
        let (_, started) = stat(pid).with_context(|| format!("there is no process {pid}"))?;
        Ok(Self { pid, started })
    }

    /// Is it still running? A zombie is not: this machine's init may take seconds to reap one.
    pub fn alive(&self) -> bool {
        stat(self.pid).is_some_and(|(state, started)| state != 'Z' && started == self.started)
    }

    /// Sends a signal; a process that is gone already is no error.
    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        if self.alive() {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.pid), signal);
        }
    }

    /// Its living children.
    pub fn children(&self) -> Vec<Process> {
        all().into_iter().filter(|p| parent(p.pid) == Some(self.pid)).collect()
    }
}

/// State letter and start time from /proc/PID/stat.
fn stat(pid: i32) -> Option<(char, u64)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may hold spaces and brackets: fields start after the last ')'.
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    Some((fields.first()?.chars().next()?, fields.get(19)?.parse().ok()?))
}

fn parent(pid: i32) -> Option<i32> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    text.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

/// Every process on the machine that is not a zombie.
pub fn all() -> Vec<Process> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter_map(|pid| Process::find(pid).ok())
        .filter(Process::alive)
        .collect()
}

/// The command line, or the name in brackets where there is none.
pub fn command_line(pid: i32) -> String {
    let raw = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let line = String::from_utf8_lossy(&raw).replace('\0', " ").trim_end().to_owned();
    if !line.is_empty() {
        return line;
    }
    format!("[{}]", fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim_end())
}

/// The inode numbers that name a process's namespaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Namespaces {
    /// The network namespace.
    pub net: u64,
    /// The process id namespace.
    pub pid: u64,
    /// The mount namespace.
    pub mnt: u64,
}

impl Namespaces {
    /// Those of a living process.
    pub fn of(pid: i32) -> Result<Self> {
        let inode = |kind: &str| {
            let path = PathBuf::from(format!("/proc/{pid}/ns/{kind}"));
            Ok::<_, anyhow::Error>(
                fs::metadata(&path).with_context(|| format!("cannot look at {path:?}"))?.ino(),
            )
        };
        Ok(Self { net: inode("net")?, pid: inode("pid")?, mnt: inode("mnt")? })
    }

    /// Living processes that share at least one of these namespaces.
    pub fn inhabitants(&self) -> Vec<Process> {
        all()
            .into_iter()
            .filter(|p| {
                Self::of(p.pid).is_ok_and(|ns| ns.net == self.net || ns.pid == self.pid || ns.mnt == self.mnt)
            })
            .collect()
    }
}
