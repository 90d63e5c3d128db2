//! Nothing of a test may outlive it: neither a process, a namespace, a link, a mount, a cgroup nor a loop device.
//!
//! Every [`crate::host::Host`] checks itself when it is dropped. [`Watch`] looks at the machine as a whole; put it first in a
//! test (so that it is dropped last) that does more than use hosts.

use crate::proc::{Namespaces, Process, command_line};
use anyhow::{Result, bail};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

/// Fails the test; or only says so, when it fails already (a second panic would hide the first).
pub fn complain(what: &str) {
    if std::thread::panicking() {
        eprintln!("leak: {what}");
    } else {
        panic!("leak: {what}");
    }
}

/// Processes for a message.
pub fn list(processes: &[Process]) -> String {
    processes.iter().map(|p| format!("{} {}", p.pid, command_line(p.pid))).collect::<Vec<_>>().join("; ")
}

/// Fails when something on the machine keeps a dead host's network namespace alive.
pub fn check_pins(namespaces: &Namespaces) -> Result<()> {
    let pinned = format!("net:[{}]", namespaces.net);
    let left: Vec<String> = mounts().into_iter().filter(|line| line.contains(&pinned)).collect();
    if left.is_empty() { Ok(()) } else { bail!("netns mount left behind: {}", left.join("; ")) }
}

/// Fails when anything on the machine still carries a removed host's id.
pub fn check_named(id: &str) -> Result<()> {
    let left = named(id);
    if left.is_empty() { Ok(()) } else { bail!("left behind by {id}: {}", left.join("; ")) }
}

/// Everything on the machine whose name carries `id`: cgroups, mounts, loop devices.
pub fn named(id: &str) -> Vec<String> {
    let has = |text: &String| text.contains(id);
    let mut left: Vec<String> = mounts().into_iter().filter(has).map(|m| format!("mount: {m}")).collect();
    left.extend(cgroups().into_iter().filter(has).map(|c| format!("cgroup: {c}")));
    left.extend(loops().into_iter().filter(has).map(|l| format!("loop device: {l}")));
    left
}

fn mounts() -> Vec<String> {
    fs::read_to_string("/proc/self/mountinfo").unwrap_or_default().lines().map(str::to_owned).collect()
}

fn cgroups() -> Vec<String> {
    let hierarchies = fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten();
    hierarchies.flat_map(|hierarchy| names_in(&hierarchy.path())).collect()
}

/// The /sys/block folder of the loop device that shows `image`.
pub fn loop_device(image: &Path) -> Option<String> {
    let shows = |device: &String| {
        fs::read_to_string(format!("{device}/loop/backing_file"))
            .is_ok_and(|file| Path::new(file.trim_end()) == image)
    };
    names_in(Path::new("/sys/block")).into_iter().find(shows)
}

fn loops() -> Vec<String> {
    names_in(Path::new("/sys/block"))
        .into_iter()
        .filter_map(|device| {
            let file = fs::read_to_string(format!("{device}/loop/backing_file")).ok()?;
            Some(format!("{device} on {}", file.trim_end()))
        })
        .collect()
}

fn names_in(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.path().to_string_lossy().into_owned()).collect()
}

/// What the machine has of everything that could leak.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Machine(BTreeSet<String>);

impl Machine {
    fn look() -> Self {
        let mut all: BTreeSet<String> = names_in(Path::new("/sys/class/net")).into_iter().collect();
        all.extend(names_in(Path::new("/run/netns")));
        // The mount's id and parent id may change; root, mount point and source tell it apart.
        all.extend(mounts().iter().map(|line| line.split(' ').skip(3).collect::<Vec<_>>().join(" ")));
        all.extend(loops());
        Self(all)
    }
}

/// Compares the machine now with the machine when this is dropped: links, named namespaces, mounts, loop devices.
#[derive(Debug)]
#[must_use = "it compares when it is dropped"]
pub struct Watch(Machine);

impl Watch {
    /// Looks at the machine.
    pub fn start() -> Self {
        Self(Machine::look())
    }

    /// What is there now and was not at the start.
    pub fn new_things(&self) -> Vec<String> {
        Machine::look().0.difference(&self.0.0).cloned().collect()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // A namespace dies a moment after its last user, and others may be at work on this machine for a moment too.
        let gone = crate::exec::wait_until("nothing new on the machine", Duration::from_secs(5), || {
            self.new_things().is_empty()
        });
        if gone.is_err() {
            complain(&format!("new on the machine since the test began: {}", self.new_things().join(", ")));
        }
    }
}
