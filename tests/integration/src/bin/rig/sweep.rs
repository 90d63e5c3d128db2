//! `rig down --all`: every rig that has a record, and then whatever a broken one left: hosts that were to stay, cgroups, folders.
//! Hosts of running tests are not touched: they do not stay.

use anyhow::{Context, Result};
use integration::cluster::Cluster;
use integration::exec::wait_until;
use integration::proc::{self, Process};
use nix::sys::signal::Signal;
use std::fs;
use std::path::Path;
use std::time::Duration;

/// Removes everything; each step is tried, the first error is given.
pub fn all(rigs: &Path) -> Result<()> {
    let mut results = Vec::new();
    let entries = fs::read_dir(rigs).into_iter().flatten().flatten();
    for name in entries.filter_map(|entry| entry.file_name().into_string().ok()) {
        let down = Cluster::load(&name).and_then(Cluster::down);
        results.push(down.with_context(|| format!("rig {name}")));
    }
    results.push(stray_hosts());
    remove_cgroups("/sys/fs/cgroup");
    if rigs.exists() {
        fs::remove_dir_all(rigs).with_context(|| format!("cannot remove {rigs:?}"))?;
    }
    // A rig whose record could not be read is gone all the same: only what is still there is an error.
    let left = integration::leaks::named("edgeflannel-rig-");
    anyhow::ensure!(left.is_empty(), "still there: {}", left.join("; "));
    results.into_iter().filter(|result| result.is_err()).for_each(|result| {
        if let Err(error) = result {
            eprintln!("rig: {error:#}");
        }
    });
    Ok(())
}

/// PID 1s of hosts that were to stay, and those who wait for them.
fn stray_hosts() -> Result<()> {
    let is_host = |process: &Process| {
        let line = proc::command_line(process.pid);
        (line.contains(" host-init {") || line.contains(" host-run {")) && line.contains("\"stay\":true")
    };
    let strays: Vec<Process> = proc::all().into_iter().filter(is_host).collect();
    strays.iter().for_each(|process| process.signal(Signal::SIGKILL));
    wait_until("the end of stray hosts", Duration::from_secs(20), || strays.iter().all(|p| !p.alive()))
}

fn remove_cgroups(root: &str) {
    for hierarchy in fs::read_dir(root).into_iter().flatten().flatten() {
        for cgroup in fs::read_dir(hierarchy.path()).into_iter().flatten().flatten() {
            if cgroup.file_name().to_string_lossy().starts_with("edgeflannel-rig-") {
                remove_tree(&cgroup.path());
            }
        }
    }
}

/// Depth first; one that is in use stays, and is reported by the caller.
fn remove_tree(dir: &Path) {
    for child in fs::read_dir(dir).into_iter().flatten().flatten() {
        if child.path().is_dir() {
            remove_tree(&child.path());
        }
    }
    let _ = fs::remove_dir(dir);
}
