//! What is read off a node and its daemon, from outside and without disturbing them: /proc says most of it.

use anyhow::{Context, Result, ensure};
use integration::host::Host;
use std::{
    fs,
    net::Ipv4Addr,
    thread::sleep,
    time::{Duration, Instant},
};

/// The IPv4 routes through flannel.1: their subnets.
fn routes(host: &Host) -> Vec<Ipv4Addr> {
    let table = host.init_pid().map(|pid| fs::read_to_string(format!("/proc/{pid}/net/route")));
    let text = table.ok().and_then(Result::ok).unwrap_or_default();
    let subnet = |line: &str| {
        let hex = line.strip_prefix("flannel.1\t")?.split('\t').next()?;
        // As the bytes lie in memory.
        Some(Ipv4Addr::from(u32::from_str_radix(hex, 16).ok()?.to_ne_bytes()))
    };
    text.lines().filter_map(subnet).collect()
}

/// Is this subnet routed through flannel.1?
pub fn routed(host: &Host, subnet: Ipv4Addr) -> bool {
    routes(host).contains(&subnet)
}

/// Waits until so many peers are routed; the time since `started`, or nothing when that took too long.
/// Both daemons write a peer's route after its neighbour and its forwarding entry.
pub fn peers(host: &Host, count: usize, started: Instant, limit: Duration) -> Result<Option<Duration>> {
    while started.elapsed() < limit {
        if routes(host).len() >= count {
            return Ok(Some(started.elapsed()));
        }
        ensure!(host.is_on(), "{} has no power", host.name());
        sleep(Duration::from_millis(5));
    }
    Ok(None)
}

/// Fails unless neighbours and forwarding entries are there, too.
pub fn complete(host: &Host, count: usize) -> Result<()> {
    for what in ["bridge fdb show dev flannel.1", "ip -4 neigh show dev flannel.1 nud permanent"] {
        let found = host.sh(what)?.lines().count();
        ensure!(found >= count, "{what} on {}: {found} of {count}", host.name());
    }
    Ok(())
}

/// Fails unless something is forwarded to each of these addresses.
pub fn forwards_to(host: &Host, addresses: &[Ipv4Addr]) -> Result<()> {
    let table = host.sh("bridge fdb show dev flannel.1")?;
    let missing = addresses.iter().find(|address| !table.contains(&format!("dst {address} ")));
    ensure!(missing.is_none(), "{} does not forward to {missing:?}", host.name());
    Ok(())
}

/// CPU time of a process so far: of its threads that are still there, and a daemon's stay.
pub fn cpu(process: i32) -> Duration {
    let threads = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    let on_cpu = threads.filter_map(|thread| {
        let text = fs::read_to_string(thread.path().join("schedstat")).ok()?;
        text.split(' ').next()?.parse::<u64>().ok()
    });
    Duration::from_nanos(on_cpu.sum())
}

/// Waits until a process has nothing to do any more, a minute at most.
pub fn quiet(process: i32) {
    for _ in 0..60 {
        let before = cpu(process);
        sleep(Duration::from_secs(1));
        if cpu(process).saturating_sub(before) < Duration::from_millis(10) {
            return;
        }
    }
}

/// A field of a process's status, in MiB: `VmRSS:` is its memory now, `VmHWM:` its peak.
pub fn memory(process: i32, field: &str) -> Result<f64> {
    let text = fs::read_to_string(format!("/proc/{process}/status"))?;
    let value =
        text.lines().find_map(|line| line.strip_prefix(field)).with_context(|| format!("no {field}"))?;
    let kib: f64 = value.trim().trim_end_matches(" kB").parse()?;
    Ok(kib / 1024.0)
}
