//! A host: a machine made of namespaces, with a disk folder that outlives its power.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! let mut host = integration::host::Host::new("edge1")?;
//! host.sh("ip link add dummy0 type dummy && ip addr add 192.0.2.1/24 dev dummy0")?;
//! let pod = host.add_netns("pod1")?; // "/run/netns/pod1", known only inside the host
//! host.reboot()?; // every process, link, netns and /run gone at once; /var, /etc, /opt kept; a new boot id
//! # Ok(()) }
//! ```
//! Dropping it removes all of it, and panics if anything is left.

use crate::daemons::Daemon;
use crate::exec::{COMMAND_LIMIT, Output, run, wait_for, wait_until};
use crate::host_init::{HostSpec, cgroup_hierarchies};
use crate::leaks;
use crate::proc::{Namespaces, Process};
use crate::tools;
use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// How long a host may take to come up or to die.
pub(crate) const POWER_LIMIT: Duration = Duration::from_secs(20);

/// A running (or powered-off) host.
#[derive(Debug)]
pub struct Host {
    spec: HostSpec,
    power: Option<Power>,
    /// The maker's handle on `rig host-run`; none when the host was found again by `rig`.
    maker: Option<Child>,
    /// Present when the disk is a temporary one.
    temporary: Option<tempfile::TempDir>,
}

/// What is known about a host with its power on.
#[derive(Debug)]
struct Power {
    init: Process,
    namespaces: Namespaces,
    /// Held so that the kernel cannot give the namespaces' numbers to others while we look who lives there.
    held: Vec<File>,
}

impl Power {
    fn of(init: Process) -> Result<Self> {
        let open = |kind: &str| {
            let path = format!("/proc/{}/ns/{kind}", init.pid);
            File::open(&path).with_context(|| format!("cannot open {path}"))
        };
        let held = ["net", "pid", "mnt"].into_iter().map(open).collect::<Result<_>>()?;
        Ok(Self { init, namespaces: Namespaces::of(init.pid)?, held })
    }
}

/// What `rig` writes down to find a host again.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HostRecord {
    spec: HostSpec,
    init: Option<Process>,
}

/// A name that no other test, thread or session on this machine uses.
pub fn unique_id(name: &str) -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("edgeflannel-{}-{}-{name}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

impl Host {
    /// A host with a temporary disk and no cgroups of its own: enough for links, routes and CNI plugins.
    pub fn new(name: &str) -> Result<Self> {
        Self::temporary(name, |_| {})
    }

    /// The same with a disk that is an image, and what it takes to cut its power: see [`Host::power_cut`].
    pub fn with_disk_image(name: &str) -> Result<Self> {
        Self::temporary(name, |spec| {
            spec.image = Some(spec.disk.join("disk.img"));
            spec.disk.push("disk");
            // The freezer stops those who write while the disk is copied.
            spec.cgroups = true;
        })
    }

    fn temporary(name: &str, change: impl FnOnce(&mut HostSpec)) -> Result<Self> {
        let id = unique_id(name);
        let dir = tempfile::Builder::new().prefix(&format!("{id}-")).tempdir();
        let dir = dir.context("cannot make a disk folder")?;
        let mut spec = HostSpec {
            name: name.to_owned(),
            id,
            disk: dir.path().to_owned(),
            image: None,
            cgroups: false,
            stay: false,
            hosts: Vec::new(),
        };
        change(&mut spec);
        if let Some(image) = &spec.image {
            crate::disk::make_image(image)?;
        }
        let mut host = Self { spec, power: None, maker: None, temporary: Some(dir) };
        host.power_on()?;
        Ok(host)
    }

    /// A host as specified, with its power on.
    pub fn boot(spec: HostSpec) -> Result<Self> {
        let mut host = Self { spec, power: None, maker: None, temporary: None };
        host.power_on()?;
        Ok(host)
    }

    /// A host that another run of `rig` made. It is left alone by `Drop`.
    pub fn found(record: HostRecord) -> Self {
        let power = record.init.filter(Process::alive).and_then(|init| Power::of(init).ok());
        Self { spec: record.spec, power, maker: None, temporary: None }
    }

    /// What to write down so that [`Host::found`] finds it.
    pub fn record(&self) -> HostRecord {
        HostRecord { spec: self.spec.clone(), init: self.power.as_ref().map(|power| power.init) }
    }

    /// Its hostname.
    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// What it was made from.
    pub fn spec(&self) -> &HostSpec {
        &self.spec
    }

    /// Is it on?
    pub fn is_on(&self) -> bool {
        self.power.as_ref().is_some_and(|power| power.init.alive())
    }

    fn power(&self) -> Result<&Power> {
        self.power.as_ref().with_context(|| format!("host {} has no power", self.spec.name))
    }

    /// The process id, on the real machine, of its PID 1.
    pub fn init_pid(&self) -> Result<i32> {
        Ok(self.power()?.init.pid)
    }

    /// Where a path of the host lies on the real machine. Valid until the power is lost.
    pub fn path(&self, path: impl AsRef<Path>) -> Result<PathBuf> {
        let path = path.as_ref();
        let inside = path.strip_prefix("/").with_context(|| format!("{path:?} is not absolute"))?;
        Ok(PathBuf::from(format!("/proc/{}/root", self.init_pid()?)).join(inside))
    }

    /// Writes a file inside the host, with its folders, and syncs it: what a person installs outlives a power cut.
    pub fn write(&self, path: &str, text: impl AsRef<[u8]>) -> Result<()> {
        let outer = self.path(path)?;
        if let Some(parent) = outer.parent() {
            fs::create_dir_all(parent).with_context(|| format!("cannot make the folder of {path}"))?;
        }
        let written =
            File::create(&outer).and_then(|mut file| file.write_all(text.as_ref()).and(file.sync_all()));
        written.with_context(|| format!("cannot write {path} in host {}", self.spec.name))
    }

    /// Reads a file inside the host.
    pub fn read(&self, path: &str) -> Result<String> {
        fs::read_to_string(self.path(path)?)
            .with_context(|| format!("cannot read {path} in host {}", self.spec.name))
    }

    /// The boot id that programs inside see; another one after each reboot.
    pub fn boot_id(&self) -> Result<String> {
        Ok(self.sh("cat /proc/sys/kernel/random/boot_id")?.trim().to_owned())
    }

    /// A command that will run inside the host; for own environment, stdin, or spawning.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Result<Command> {
        let mut command = Command::new(tools::rig()?);
        command.args(["enter-pid", &self.init_pid()?.to_string()]);
        command.arg(if self.spec.cgroups { &self.spec.id } else { "-" });
        command.arg(program);
        Ok(command)
    }

    /// Runs a program to its end inside the host.
    pub fn run<S: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = S>) -> Result<Output> {
        let mut words = words.into_iter();
        let Some(program) = words.next() else { bail!("no command given") };
        run(self.command(program)?.args(words), b"", COMMAND_LIMIT)
    }

    /// Runs a line of shell inside the host; gives stdout, fails when it fails.
    pub fn sh(&self, line: &str) -> Result<String> {
        self.run(["sh", "-ec", line])?.ok()
    }

    /// Makes a named network namespace inside the host, as a container runtime does for a pod, with `lo` up.
    pub fn add_netns(&self, name: &str) -> Result<String> {
        self.sh(&format!("ip netns add {name} && ip -n {name} link set lo up"))?;
        Ok(format!("/run/netns/{name}"))
    }

    /// Removes a named network namespace of the host.
    pub fn del_netns(&self, name: &str) -> Result<()> {
        self.sh(&format!("ip netns del {name}")).map(drop)
    }

    /// Runs a line of shell in one of the host's network namespaces.
    pub fn sh_in(&self, netns: &str, line: &str) -> Result<String> {
        self.run(["nsenter", &format!("--net=/run/netns/{netns}"), "--", "sh", "-ec", line])?.ok()
    }

    /// Starts a daemon in the host. Its output goes to `log`; it ends with the host at the latest.
    pub fn spawn(&self, command: &mut Command, log: &Path) -> Result<Daemon> {
        Daemon::spawn(command, log)
    }

    /// Power loss: every process of the host dies at once, /run and all links are gone, the disk folder stays.
    pub fn power_off(&mut self) -> Result<()> {
        let Some(power) = self.power.take() else { return Ok(()) };
        power.init.signal(Signal::SIGKILL);
        wait_until(&format!("the end of PID 1 of {}", self.spec.name), POWER_LIMIT, || !power.init.alive())?;
        if let Some(mut maker) = self.maker.take() {
            drop(maker.stdin.take());
            wait_for("the end of rig host-run", POWER_LIMIT, || Ok(maker.try_wait()?))?;
        }
        wait_until(&format!("the last process of {}", self.spec.name), POWER_LIMIT, || {
            power.namespaces.inhabitants().is_empty()
        })
        .with_context(|| format!("still there: {}", leaks::list(&power.namespaces.inhabitants())))?;
        leaks::check_pins(&power.namespaces)?;
        drop(power.held);
        if let Some(image) = &self.spec.image {
            // The kernel lets go of the loop device a moment after the last mount.
            wait_until(&format!("the release of {image:?}"), POWER_LIMIT, || {
                leaks::loop_device(image).is_none()
            })?;
        }
        self.remove_cgroups()
    }

    /// Power on: new namespaces over the same disk.
    pub fn power_on(&mut self) -> Result<()> {
        if self.is_on() {
            bail!("host {} is on already", self.spec.name);
        }
        fs::create_dir_all(&self.spec.disk)?;
        self.make_cgroups()?;
        let log = self.spec.disk.join("host.log");
        let mut maker = Command::new(tools::rig()?);
        if self.spec.stay {
            // ^C at the terminal is not meant for it.
            maker.process_group(0);
        }
        let mut maker = maker
            .arg("host-run")
            .arg(serde_json::to_string(&self.spec)?)
            .stdin(if self.spec.stay { Stdio::null() } else { Stdio::piped() })
            .stdout(Stdio::piped())
            .stderr(File::create(&log).with_context(|| format!("cannot write {log:?}"))?)
            .spawn()
            .context("cannot start rig host-run")?;
        let mut line = String::new();
        BufReader::new(maker.stdout.take().context("no pipe")?).read_line(&mut line)?;
        let Ok(pid) = line.trim().parse() else {
            let _ = maker.wait();
            bail!("host {} did not come up: {}", self.spec.name, fs::read_to_string(&log).unwrap_or_default())
        };
        self.power = Some(Power::of(Process::find(pid)?)?);
        self.maker = Some(maker);
        Ok(())
    }

    /// Power loss and a fresh start over the same disk.
    pub fn reboot(&mut self) -> Result<()> {
        self.power_off()?;
        self.power_on()
    }

    /// Power loss as the disk sees it: only what had reached the disk image is there afterwards. Power is off then.
    pub fn power_cut(&mut self) -> Result<()> {
        let image = self.spec.image.clone().with_context(|| {
            format!(
                "the disk of {} is a folder, which keeps everything: it needs a disk image",
                self.spec.name
            )
        })?;
        let copy = image.with_extension("cut");
        let freezer = format!("/sys/fs/cgroup/freezer/{}/freezer.state", self.spec.id);
        fs::write(&freezer, "FROZEN").with_context(|| format!("cannot freeze by {freezer}"))?;
        let frozen = wait_until("all processes to be frozen", POWER_LIMIT, || {
            fs::read_to_string(&freezer).is_ok_and(|state| state.trim() == "FROZEN")
        });
        let copied = frozen.and_then(|()| crate::disk::copy_unsynced(&image, &copy));
        if let Some(power) = &self.power {
            // Pending while it is frozen: it dies before it runs again.
            power.init.signal(Signal::SIGKILL);
        }
        fs::write(&freezer, "THAWED").with_context(|| format!("cannot thaw by {freezer}"))?;
        self.power_off()?;
        copied?;
        fs::rename(&copy, &image).with_context(|| format!("cannot put {copy:?} in the image's place"))
    }

    /// Power off, then everything of it removed but a disk folder that the caller named; says what could not be.
    pub fn remove(&mut self) -> Result<()> {
        self.power_off()?;
        if let Some(dir) = self.temporary.take() {
            let path = dir.path().to_owned();
            dir.close().with_context(|| format!("cannot remove {path:?}"))?;
        }
        leaks::check_named(&self.spec.id)
    }

    fn make_cgroups(&self) -> Result<()> {
        if !self.spec.cgroups {
            return Ok(());
        }
        for hierarchy in cgroup_hierarchies()? {
            let dir = PathBuf::from(format!("/sys/fs/cgroup/{hierarchy}/{}", self.spec.id));
            fs::create_dir_all(&dir).with_context(|| format!("cannot make {dir:?}"))?;
            if hierarchy == "cpuset" {
                // An empty cpuset takes no process.
                for file in ["cpuset.cpus", "cpuset.mems"] {
                    fs::write(dir.join(file), fs::read(Path::new("/sys/fs/cgroup/cpuset").join(file))?)?;
                }
            }
        }
        Ok(())
    }

    fn remove_cgroups(&self) -> Result<()> {
        if !self.spec.cgroups {
            return Ok(());
        }
        for hierarchy in cgroup_hierarchies()? {
            let dir = PathBuf::from(format!("/sys/fs/cgroup/{hierarchy}/{}", self.spec.id));
            wait_for(&format!("cgroup {} to be empty", dir.display()), POWER_LIMIT, || {
                remove_cgroup(&dir)?;
                Ok(Some(()))
            })?;
        }
        Ok(())
    }
}

fn remove_cgroup(dir: &Path) -> std::io::Result<()> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    for entry in entries.flatten() {
        if entry.file_type()?.is_dir() {
            remove_cgroup(&entry.path())?;
        }
    }
    fs::remove_dir(dir)
}

impl Drop for Host {
    fn drop(&mut self) {
        // A host of `rig up`, or one found again, lives on.
        if self.spec.stay {
            return;
        }
        if let Err(error) = self.remove() {
            leaks::complain(&format!("host {} could not be removed: {error:#}", self.spec.name));
        }
    }
}
