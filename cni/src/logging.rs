//! The log of a short-lived plugin: stderr, or a file, since runtimes drop a successful plugin's stderr.

use log::LevelFilter;
use std::{fs, io::Write, path::Path, str::FromStr};

/// Starts logging. `level` is one of `error`, `warn`, `info`, `debug`, `trace`, `off`; the default is `warn`.
///
/// A log is never a reason to fail: what cannot be opened or understood falls back to the default, and the
/// log says so. Lines start with the time since boot, as the kernel's do: edge boards have no clock to trust.
pub fn init(file: Option<&Path>, level: Option<&str>) {
    let parsed = level.map(LevelFilter::from_str);
    let filter = parsed.as_ref().and_then(|parsed| parsed.as_ref().ok()).copied();
    let filter = filter.unwrap_or(LevelFilter::Warn);
    let opened = file.map(|file| fs::File::options().append(true).create(true).open(file));
    let mut builder = env_logger::Builder::new();
    builder.filter_level(filter).format(|line, record| {
        let uptime = fs::read_to_string("/proc/uptime").unwrap_or_default();
        let uptime = uptime.split(' ').next().unwrap_or_default();
        let (pid, level) = (std::process::id(), record.level());
        writeln!(line, "[{uptime:>12}] {level:5} {}[{pid}]: {}", record.target(), record.args())
    });
    let failed = match opened {
        Some(Ok(opened)) => {
            builder.target(env_logger::Target::Pipe(Box::new(opened)));
            None
        }
        Some(Err(error)) => Some(error),
        None => None,
    };
    // A second call, as in tests, keeps the first logger.
    let _ = builder.try_init();
    if let (Some(error), Some(file)) = (failed, file) {
        log::warn!("the log file {} cannot be opened ({error}): logging to stderr", file.display());
    }
    if let (Some(Err(_)), Some(level)) = (parsed, level) {
        log::warn!("logLevel {level:?} is not one of error, warn, info, debug, trace, off: using warn");
    }
}
