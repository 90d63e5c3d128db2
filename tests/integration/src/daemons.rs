//! Programs that run until they are stopped: one, and a named set of them with a log each.

use crate::exec::{wait_for, wait_until};
use crate::host::POWER_LIMIT;
use crate::proc::Process;
use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// A program that runs until it is stopped. Dropping the handle stops nothing: the host's end does.
#[derive(Debug)]
pub struct Daemon {
    /// The waiting `rig enter-pid`; the daemon itself is its only child, and has asked to die with it.
    process: Process,
    /// Present when this run of the program started it.
    child: Option<Child>,
    line: String,
    log: PathBuf,
}

impl Daemon {
    /// Starts `command` (see [`crate::host::Host::command`]), appending its output to `log`.
    pub fn spawn(command: &mut Command, log: &Path) -> Result<Self> {
        let line = crate::exec::shown(command);
        let file = File::options()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("cannot write the log {log:?}"))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("cannot start `{line}`"))?;
        let process = Process::find(child.id().cast_signed())?;
        Ok(Self { process, child: Some(child), line, log: log.to_owned() })
    }

    /// A daemon that another run of `rig` started.
    pub fn found(process: Process, log: PathBuf) -> Self {
        Self { line: crate::proc::command_line(process.pid), process, child: None, log }
    }

    /// What to write down to find it again.
    pub fn process(&self) -> Process {
        self.process
    }

    /// Where its output goes.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Fails, with the end of its log, when the daemon has ended.
    pub fn check_alive(&self) -> Result<()> {
        if self.process.alive() {
            return Ok(());
        }
        bail!("`{}` has ended; its log ends:\n{}", self.line, self.log_end())
    }

    /// The last lines that it said.
    pub fn log_end(&self) -> String {
        log_end(&self.log)
    }

    /// SIGKILL, and wait for the end.
    pub fn kill(&mut self) -> Result<()> {
        self.end(Signal::SIGKILL)
    }

    /// SIGTERM, and wait for the end.
    pub fn terminate(&mut self) -> Result<()> {
        self.end(Signal::SIGTERM)
    }

    fn end(&mut self, signal: Signal) -> Result<()> {
        let daemons = self.process.children();
        for daemon in &daemons {
            daemon.signal(signal);
        }
        wait_until(&format!("the end of `{}` after {signal}", self.line), POWER_LIMIT, || {
            daemons.iter().all(|daemon| !daemon.alive()) && !self.process.alive()
        })?;
        self.reap()
    }

    /// Takes note of the end of a daemon that something else ended.
    pub fn reap(&mut self) -> Result<()> {
        let Some(mut child) = self.child.take() else { return Ok(()) };
        wait_for(&format!("the end of `{}`", self.line), POWER_LIMIT, || Ok(child.try_wait()?)).map(drop)
    }
}

/// The last 20 lines of a log file.
fn log_end(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

/// Daemons by name, each with `NAME.log` in one folder.
#[derive(Debug)]
pub struct Daemons {
    logs: PathBuf,
    running: BTreeMap<String, Daemon>,
}

/// What `rig` writes down to find them again.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DaemonsRecord {
    logs: PathBuf,
    running: BTreeMap<String, Process>,
}

impl Daemons {
    /// None yet; their logs will lie in `logs`.
    pub fn new(logs: &Path) -> Result<Self> {
        fs::create_dir_all(logs).with_context(|| format!("cannot make {logs:?}"))?;
        Ok(Self { logs: logs.to_owned(), running: BTreeMap::new() })
    }

    /// Those of another run of `rig`.
    pub fn found(record: DaemonsRecord) -> Self {
        let logs = record.logs;
        let running = record.running.into_iter();
        let running = running.map(|(name, process)| {
            let daemon = Daemon::found(process, logs.join(format!("{name}.log")));
            (name, daemon)
        });
        Self { running: running.collect(), logs }
    }

    /// What to write down so that [`Daemons::found`] finds them.
    pub fn record(&self) -> DaemonsRecord {
        let running = self.running.iter().map(|(name, daemon)| (name.clone(), daemon.process()));
        DaemonsRecord { logs: self.logs.clone(), running: running.collect() }
    }

    /// Starts one.
    pub fn start(&mut self, name: &str, mut command: Command) -> Result<()> {
        let daemon = Daemon::spawn(&mut command, &self.logs.join(format!("{name}.log")))?;
        self.running.insert(name.to_owned(), daemon);
        Ok(())
    }

    /// Was it started and not stopped?
    pub fn has(&self, name: &str) -> bool {
        self.running.contains_key(name)
    }

    /// Their names.
    pub fn names(&self) -> Vec<String> {
        self.running.keys().cloned().collect()
    }

    /// Names of those that ended though nobody stopped them.
    pub fn dead(&self) -> Vec<String> {
        self.running.iter().filter(|(_, d)| d.check_alive().is_err()).map(|(name, _)| name.clone()).collect()
    }

    /// Fails, with the end of its log, when it has ended.
    pub fn check_alive(&self, name: &str) -> Result<()> {
        self.running.get(name).with_context(|| format!("{name} was not started"))?.check_alive()
    }

    /// Stops one with SIGTERM.
    pub fn stop(&mut self, name: &str) -> Result<()> {
        self.running.get_mut(name).with_context(|| format!("{name} was not started"))?.terminate()?;
        self.running.remove(name);
        Ok(())
    }

    /// Kills one with SIGKILL.
    pub fn kill(&mut self, name: &str) -> Result<()> {
        self.running.get_mut(name).with_context(|| format!("{name} was not started"))?.kill()?;
        self.running.remove(name);
        Ok(())
    }

    /// Takes note that all of them ended with their host.
    pub fn reap(&mut self) -> Result<()> {
        std::mem::take(&mut self.running).values_mut().try_for_each(Daemon::reap)
    }

    /// The end of each log.
    pub fn log_ends(&self) -> String {
        self.running.iter().map(|(name, daemon)| format!("--- {name}\n{}\n", daemon.log_end())).collect()
    }
}
