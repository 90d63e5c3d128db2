//! The daemon's log: stderr, for journald or the kubelet to keep, who add the time.

use log::LevelFilter;
use std::{fs, io::Write};

/// Starts logging at a level (`--log-level`). Lines start with the time since boot, as the kernel's do: edge
/// boards have no clock to trust.
pub fn init(level: LevelFilter) {
    // What the libraries have to say at info and below is about their own affairs.
    let others = level.min(if level > LevelFilter::Info { LevelFilter::Info } else { LevelFilter::Error });
    let _ = env_logger::Builder::new()
        .filter_level(others)
        .filter_module("cni_edgeflannel", level)
        .filter_module("edgeflanneld", level)
        .format(|line, record| {
            let uptime = fs::read_to_string("/proc/uptime").unwrap_or_default();
            let uptime = uptime.split(' ').next().unwrap_or_default();
            writeln!(line, "[{uptime:>12}] {:5} {}", record.level(), record.args())
        })
        .try_init();
}
