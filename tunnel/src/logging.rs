//! The log: on stderr, a line an event, as text for people or as JSON objects. What is logged follows `RUST_LOG`.

use crate::config::LogFormat;
use env_logger::{Builder, Env};
use std::io::Write;

/// Starts it; a second start changes nothing.
pub fn start(format: LogFormat) {
    let mut builder = Builder::from_env(Env::default().default_filter_or("info"));
    builder.format(move |out, record| {
        let now = jiff::Timestamp::now();
        let (level, target) = (record.level(), record.target());
        match format {
            LogFormat::Text => writeln!(out, "{now:.3} {level:5} {target}: {}", record.args()),
            LogFormat::Json => {
                let line = serde_json::json!({
                    "time": format!("{now:.3}"),
                    "level": level.as_str(),
                    "target": target,
                    "message": record.args().to_string(),
                });
                writeln!(out, "{line}")
            }
        }
    });
    let _ = builder.try_init();
}
