//! What runs inside a host's new namespaces: `rig host-run` makes them, `rig host-init` is their PID 1.
//!
//! PID 1 mounts the host's own view (proc, sys, run, etc, var, opt), says "ready", and then only reaps orphans.
//! When it dies the kernel kills everything in the host at once, which is what a power loss looks like.

use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

/// What a host is to be.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HostSpec {
    /// Its hostname.
    pub name: String,
    /// Unique on the machine; cgroups are called so.
    pub id: String,
    /// The folder that is its disk: kept over a reboot.
    pub disk: PathBuf,
    /// An ext4 image to mount there, inside the host only.
    pub image: Option<PathBuf>,
    /// With cgroups of its own: what a kubelet needs.
    pub cgroups: bool,
    /// Outlives the program that made it (`rig up`); otherwise it dies with its maker, however that one ends.
    pub stay: bool,
    /// More lines for /etc/hosts.
    pub hosts: Vec<(String, String)>,
}

/// The v1 hierarchies of this machine, as names of folders below /sys/fs/cgroup.
pub fn cgroup_hierarchies() -> Result<Vec<String>> {
    let text = fs::read_to_string("/proc/cgroups").context("cannot read /proc/cgroups")?;
    let mut names: Vec<String> = text
        .lines()
        .skip(1)
        .filter_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            (fields.get(1) != Some(&"0")).then(|| fields.first().map(|name| (*name).to_owned())).flatten()
        })
        .collect();
    if !names.iter().any(|name| name == "memory") {
        bail!(
            "the memory controller is not in cgroup v1 here: nodes of the rig need cgroup v1 (docs/rig.md)"
        );
    }
    names.push("systemd".to_owned());
    Ok(names)
}

/// `rig host-run SPEC`: joins the cgroups, makes the namespaces, starts PID 1 in them, says its outer pid, waits for its end.
pub fn run(spec_json: &str) -> Result<()> {
    let spec: HostSpec = serde_json::from_str(spec_json).context("bad host specification")?;
    let mut flags = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC;
    if spec.cgroups {
        join_cgroups(&spec.id)?;
        // Taken after joining: the new namespace's root is the cgroup we are in.
        flags |= CloneFlags::CLONE_NEWCGROUP;
    }
    // Asked for now: in the new mount namespace the kernel may show another path.
    let rig = std::env::current_exe()?;
    unshare(flags).context("cannot make namespaces: the rig needs root")?;
    let mut init = Command::new(rig)
        .args(["host-init", spec_json])
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start PID 1")?;
    let mut line = String::new();
    BufReader::new(init.stdout.take().context("no pipe to PID 1")?).read_line(&mut line)?;
    if line != "ready\n" {
        let status = init.wait()?;
        bail!("PID 1 of {} ended before it was ready: {status}", spec.name);
    }
    println!("{}", init.id());
    std::io::stdout().flush()?;
    init.wait()?;
    Ok(())
}

/// Puts this process into the host's cgroup of every hierarchy.
pub fn join_cgroups(id: &str) -> Result<()> {
    for hierarchy in cgroup_hierarchies()? {
        let file = format!("/sys/fs/cgroup/{hierarchy}/{id}/cgroup.procs");
        fs::write(&file, "0").with_context(|| format!("cannot join {file}"))?;
    }
    Ok(())
}

/// `rig host-init SPEC`: PID 1.
pub fn init(spec_json: &str) -> Result<()> {
    let spec: HostSpec = serde_json::from_str(spec_json).context("bad host specification")?;
    // Blocked before anything is started, so that no child's end is missed.
    let mut child_ended = SigSet::empty();
    child_ended.add(Signal::SIGCHLD);
    child_ended.thread_block()?;

    mount_view(&spec).with_context(|| format!("cannot mount the view of host {}", spec.name))?;
    nix::unistd::sethostname(&spec.name)?;
    let status = Command::new("ip").args(["link", "set", "lo", "up"]).status().context("cannot start ip")?;
    if !status.success() {
        bail!("ip link set lo up: {status}");
    }
    println!("ready");
    std::io::stdout().flush()?;

    if !spec.stay {
        // Our maker holds the other end of this pipe: its end, however sudden, is ours.
        thread::spawn(|| {
            let mut nothing = [0; 1];
            while matches!(std::io::stdin().read(&mut nothing), Ok(n) if n > 0) {}
            std::process::exit(0);
        });
    }
    loop {
        child_ended.wait()?;
        while !matches!(waitpid(None, Some(WaitPidFlag::WNOHANG)), Ok(WaitStatus::StillAlive) | Err(_)) {}
    }
}

fn mount_view(spec: &HostSpec) -> Result<()> {
    let none = None::<&str>;
    let fs_mount = |kind: &str, target: &str, options: Option<&str>| {
        mount(Some(kind), target, Some(kind), MsFlags::empty(), options)
            .with_context(|| format!("mount {kind} on {target}"))
    };
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("make / private")?;
    fs_mount("proc", "/proc", None)?;
    fs_mount("tmpfs", "/run", Some("mode=755"))?;
    for dir in ["/run/lock", "/run/netns", "/run/rig"] {
        fs::create_dir_all(dir)?;
    }
    fake_kernel_files()?;

    // The machine's own cgroup mounts must go, or runc and the kubelet find them in mountinfo.
    umount2("/sys", MntFlags::MNT_DETACH).context("umount /sys")?;
    fs_mount("sysfs", "/sys", None)?;
    if spec.cgroups {
        fs_mount("tmpfs", "/sys/fs/cgroup", Some("mode=755"))?;
        for hierarchy in cgroup_hierarchies()? {
            let target = format!("/sys/fs/cgroup/{hierarchy}");
            fs::create_dir(&target)?;
            let options = if hierarchy == "systemd" { "none,name=systemd" } else { &hierarchy };
            fs_mount("cgroup", &target, Some(options))?;
        }
    }

    if let Some(image) = &spec.image {
        crate::disk::mount_image(image, &spec.disk)?;
    }
    let disk = |path: &str| spec.disk.join(path);
    for dir in
        ["var/lib/cni", "var/log", "var/cache", "var/tmp", "opt/cni/bin", "etc", ".etc-work", "etc-cni/net.d"]
    {
        fs::create_dir_all(disk(dir))
            .with_context(|| format!("cannot make {dir} on the disk {:?}", spec.disk))?;
    }
    for (link, target) in [("var/run", "/run"), ("var/lock", "/run/lock")] {
        if fs::symlink_metadata(disk(link)).is_err() {
            symlink(target, disk(link))?;
        }
    }
    // /etc is the machine's, with the host's own files over it.
    let options =
        format!("lowerdir=/etc,upperdir={},workdir={}", disk("etc").display(), disk(".etc-work").display());
    mount(Some("overlay"), "/etc", Some("overlay"), MsFlags::empty(), Some(options.as_str()))
        .context("mount overlay on /etc")?;
    write_etc(spec)?;
    // Not merely laid over the machine's: a conflist installed there would become the host's.
    fs::create_dir_all("/etc/cni")?;
    bind(&disk("etc-cni"), Path::new("/etc/cni"))?;
    bind(&disk("opt"), Path::new("/opt"))?;
    bind(&disk("var"), Path::new("/var"))?;
    // Shared, as systemd leaves it: kubelet's bidirectional mounts and `ip netns` rely on it.
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SHARED, none).context("make / shared")?;
    Ok(())
}

fn write_etc(spec: &HostSpec) -> Result<()> {
    let mut hosts = format!("127.0.0.1 localhost\n::1 localhost\n127.0.1.1 {}\n", spec.name);
    if !spec.hosts.is_empty() {
        hosts = "127.0.0.1 localhost\n::1 localhost\n".to_owned();
    }
    for (address, name) in &spec.hosts {
        hosts.push_str(&format!("{address} {name}\n"));
    }
    for (file, text) in [("/etc/hosts", hosts.as_str()), ("/etc/resolv.conf", "nameserver 127.0.0.1\n")] {
        // Removed first: it may be a link to somewhere else on the machine.
        let _ = fs::remove_file(file);
        fs::write(file, text).with_context(|| format!("cannot write {file}"))?;
    }
    Ok(())
}

/// A boot id of this boot, and the four sysctls that a kubelet insists on: private files over the kernel's, so that
/// the machine's own values stay untouched.
fn fake_kernel_files() -> Result<()> {
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/uuid").context("cannot make a boot id")?;
    for (path, value) in [
        ("kernel/random/boot_id", boot_id.as_str()),
        ("vm/overcommit_memory", "1\n"),
        ("vm/panic_on_oom", "0\n"),
        ("kernel/panic", "10\n"),
        ("kernel/panic_on_oops", "1\n"),
    ] {
        let fake = PathBuf::from("/run/rig").join(path.replace('/', "."));
        fs::write(&fake, value)?;
        bind(&fake, &Path::new("/proc/sys").join(path))?;
    }
    Ok(())
}

fn bind(from: &Path, to: &Path) -> Result<()> {
    mount(Some(from), to, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .with_context(|| format!("bind {} over {}", from.display(), to.display()))
}
