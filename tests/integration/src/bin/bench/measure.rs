//! What a process costs, seen from outside: wall time of start to end, CPU time of it and all it waited for.

use anyhow::{Context, Result};
use nix::sys::{
    resource::{UsageWho, getrusage},
    time::TimeValLike,
};
use std::{
    io::Write,
    ops::AddAssign,
    path::Path,
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

/// What one call cost.
#[derive(Debug, Clone, Copy, Default)]
pub struct Cost {
    /// From before the start to after the end.
    pub wall: Duration,
    /// User and system time of the process and its children.
    pub cpu: Duration,
}

impl AddAssign for Cost {
    fn add_assign(&mut self, other: Self) {
        self.wall += other.wall;
        self.cpu += other.cpu;
    }
}

/// CPU time of all children waited for so far. Only one thread of this program starts processes while it measures.
fn children_cpu() -> Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let micros = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    Ok(Duration::from_micros(u64::try_from(micros)?))
}

/// Runs a plugin and measures it.
pub fn measure(plugin: &Path, env: &[(String, String)], stdin: &[u8]) -> Result<(Cost, Output)> {
    let cpu = children_cpu()?;
    let started = Instant::now();
    let output = call(plugin, env, stdin)?;
    let wall = started.elapsed();
    Ok((Cost { wall, cpu: children_cpu()? - cpu }, output))
}

/// Runs a plugin.
pub fn call(plugin: &Path, env: &[(String, String)], stdin: &[u8]) -> Result<Output> {
    let mut child = Command::new(plugin)
        .env_clear()
        .envs(env.iter().map(|(key, value)| (key, value)))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {}", plugin.display()))?;
    // Configurations are smaller than a pipe: this cannot block. A plugin that does not read is no error here.
    let _ = child.stdin.take().context("no stdin")?.write_all(stdin);
    Ok(child.wait_with_output()?)
}

/// Peak memory of a call, in MiB, by GNU time, whose own memory is small.
pub fn peak_memory(plugin: &Path, env: &[(String, String)], stdin: &[u8]) -> Result<f64> {
    let mut child = Command::new("/usr/bin/time")
        .args(["-q", "-f", "%M", "-o", "/run/peak"])
        .arg(plugin)
        .env_clear()
        .envs(env.iter().map(|(key, value)| (key, value)))
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot start /usr/bin/time: scripts/setup.sh installs it")?;
    let _ = child.stdin.take().context("no stdin")?.write_all(stdin);
    child.wait()?;
    let kib: f64 = std::fs::read_to_string("/run/peak")?.trim().parse()?;
    Ok(kib / 1024.0)
}

/// The value in the middle, and the one that 99 % are below.
pub fn median(values: &[Duration]) -> f64 {
    percentile(values, 50)
}

/// In milliseconds.
pub fn percentile(values: &[Duration], percent: usize) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    let at = (sorted.len() * percent / 100).min(sorted.len().saturating_sub(1));
    sorted.get(at).map_or(f64::NAN, |value| value.as_secs_f64() * 1000.0)
}
