//! Removing what a rig left that has no record of it: it was killed while it came up, or its record cannot be read.
//! Hosts of running tests are never touched: only hosts that were to stay are.

use crate::exec::wait_until;
use crate::leaks;
use crate::proc::{self, Process};
use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use std::fs;
use std::path::Path;
use std::time::Duration;

/// What the ids of all hosts of all rigs begin with.
pub const RIGS: &str = "edgeflannel-rig-";

/// Ends every host that was to stay and whose id begins with `prefix`, and removes their cgroups.
pub fn sweep(prefix: &str) -> Result<()> {
    let id = format!("\"id\":\"{prefix}");
    let is_stray = |process: &Process| {
        let line = proc::command_line(process.pid);
        (line.contains(" host-init {") || line.contains(" host-run {"))
            && line.contains("\"stay\":true")
            && line.contains(&id)
    };
    let strays: Vec<Process> = proc::all().into_iter().filter(is_stray).collect();
    strays.iter().for_each(|process| process.signal(Signal::SIGKILL));
    wait_until("the end of stray hosts", Duration::from_secs(20), || strays.iter().all(|p| !p.alive()))?;
    wait_until("the end of their cgroups", Duration::from_secs(20), || {
        remove_cgroups(prefix);
        leaks::named(prefix).iter().all(|thing| !thing.starts_with("cgroup"))
    })?;
    let left = leaks::named(prefix);
    ensure!(left.is_empty(), "still there: {}", left.join("; "));
    Ok(())
}

fn remove_cgroups(prefix: &str) {
    for hierarchy in fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
        for cgroup in fs::read_dir(hierarchy.path()).into_iter().flatten().flatten() {
            if cgroup.file_name().to_string_lossy().starts_with(prefix) {
                remove_tree(&cgroup.path());
            }
        }
    }
}

/// Depth first; one that is in use stays, and is tried again by the caller.
fn remove_tree(dir: &Path) {
    for child in fs::read_dir(dir).into_iter().flatten().flatten() {
        if child.path().is_dir() {
            remove_tree(&child.path());
        }
    }
    let _ = fs::remove_dir(dir);
}
