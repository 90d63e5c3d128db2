//! Removing what nobody else will: hosts of a rig without a record (it was killed while it came up, or its record cannot be read), and
//! cgroups and folders of tests that were killed. What belongs to running tests and other rigs is never touched.

use crate::exec::wait_until;
use crate::leaks;
use crate::proc::{self, Process};
use anyhow::{Context, Result, ensure};
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
        remove_cgroups(|name| name.starts_with(prefix));
        leaks::named(prefix).iter().all(|thing| !thing.starts_with("cgroup"))
    })?;
    let left = leaks::named(prefix);
    ensure!(left.is_empty(), "still there: {}", left.join("; "));
    Ok(())
}

/// Removes cgroups and disk folders of tests that were killed: their hosts died with them, these could not.
pub fn sweep_killed_tests() -> Result<()> {
    let orphaned = |name: &str| maker(name).is_some_and(|pid| Process::find(pid).is_err());
    remove_cgroups(orphaned);
    for entry in fs::read_dir(std::env::temp_dir())?.flatten() {
        if orphaned(&entry.file_name().to_string_lossy()) {
            fs::remove_dir_all(entry.path()).with_context(|| format!("cannot remove {:?}", entry.path()))?;
        }
    }
    Ok(())
}

/// The process that made what is called so, if it is called as [`crate::host::unique_id`] calls things.
fn maker(name: &str) -> Option<i32> {
    name.strip_prefix("edgeflannel-")?.split_once('-')?.0.parse().ok()
}

fn remove_cgroups(is_ours: impl Fn(&str) -> bool) {
    for hierarchy in fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
        for cgroup in fs::read_dir(hierarchy.path()).into_iter().flatten().flatten() {
            if is_ours(&cgroup.file_name().to_string_lossy()) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::unique_id;

    #[test]
    fn makers() {
        assert_eq!(maker(&unique_id("node1")), i32::try_from(std::process::id()).ok());
        assert_eq!(maker("edgeflannel-rig-default.node1"), None, "a rig that stays has no maker");
        assert_eq!(maker("edgeflannel-7"), None);
        assert_eq!(maker("something-7-0-x"), None);
    }

    #[test]
    fn only_what_a_dead_test_left_is_removed() {
        let mut dead = std::process::Command::new("true").spawn().unwrap();
        dead.wait().unwrap();
        let dir = |pid: u32| std::env::temp_dir().join(format!("edgeflannel-{pid}-0-sweep-test"));
        let (orphan, mine) = (dir(dead.id()), dir(std::process::id()));
        for dir in [&orphan, &mine] {
            fs::create_dir_all(dir.join("disk")).unwrap();
        }
        sweep_killed_tests().unwrap();
        assert!(!orphan.exists() && mine.exists());
        fs::remove_dir_all(mine).unwrap();
    }
}
