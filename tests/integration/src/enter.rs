//! `rig enter`: runs a program inside a host's namespaces and cgroups, like `nsenter`, which forgets the cgroups.

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};
use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;

/// Joins what process `pid` lives in and runs `command`, giving its exit code.
pub fn enter(pid: i32, cgroup: Option<&str>, command: &[String]) -> Result<i32> {
    let [program, arguments @ ..] = command else { bail!("enter: no command given") };
    if let Some(id) = cgroup {
        // First: afterwards the machine's cgroup files are out of sight, and containers would land outside.
        crate::host_init::join_cgroups(id)?;
    }
    let kinds = [
        ("net", CloneFlags::CLONE_NEWNET),
        ("uts", CloneFlags::CLONE_NEWUTS),
        ("ipc", CloneFlags::CLONE_NEWIPC),
        ("cgroup", CloneFlags::CLONE_NEWCGROUP),
        ("pid", CloneFlags::CLONE_NEWPID),
        ("mnt", CloneFlags::CLONE_NEWNS),
    ];
    let open = |kind| {
        let path = format!("/proc/{pid}/ns/{kind}");
        File::open(&path).with_context(|| format!("cannot open {path}: has the host lost its power?"))
    };
    let files = kinds.map(|(kind, flag)| open(kind).map(|file| (kind, file, flag)));
    for entry in files {
        let (kind, file, flag) = entry?;
        setns(file, flag).with_context(|| format!("cannot enter the {kind} namespace of process {pid}"))?;
    }
    std::env::set_current_dir("/")?;
    // A child, since only children live in the entered pid namespace. It must not outlive us: whoever started us
    // knows only our process id.
    let status = Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "--"])
        .arg(program)
        .args(arguments)
        .status()
        .context("cannot start setpriv (Debian's util-linux)")?;
    Ok(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)))
}
