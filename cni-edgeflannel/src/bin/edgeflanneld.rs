//! The node daemon `edgeflanneld`, and what a person may ask of it.

use cni_edgeflannel::{
    daemon,
    flags::{self, Command, Parsed},
    oneshot,
    overlay::restore::RUN_DIR,
    status,
};
use std::{
    env,
    future::Future,
    io::{self, Write},
    path::Path,
    process::ExitCode,
};

fn main() -> ExitCode {
    let args: Vec<String> = env::args_os().skip(1).map(|arg| arg.to_string_lossy().into_owned()).collect();
    let Parsed { command, flags, warnings } = match flags::parse(&args, |key| env::var(key).ok()) {
        Ok(parsed) => parsed,
        Err(mistakes) => return complain(&mistakes.join("\n"), ExitCode::from(2)),
    };
    daemon::logging::init(flags.log_level);
    for warning in warnings {
        log::warn!("{warning}");
    }
    let run_dir = Path::new(RUN_DIR);
    match command {
        Command::Run => {
            log::info!("edgeflanneld {}", env!("CARGO_PKG_VERSION"));
            finish(block_on(daemon::run(flags, run_dir)).map(|()| String::new()))
        }
        Command::Restore => finish(oneshot::restore(&flags, run_dir)),
        Command::Remove => finish(oneshot::remove(&flags, run_dir)),
        Command::Status { json } => match status::look(&flags, run_dir) {
            Ok(report) => {
                let text = if json {
                    serde_json::to_string(&report).map(|json| json + "\n")
                } else {
                    Ok(report.to_string())
                };
                let code = if report.drift.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
                say(&text.unwrap_or_else(|e| format!("{e}\n")), code)
            }
            Err(why) => complain(&why, ExitCode::FAILURE),
        },
        Command::Version => say(concat!("edgeflanneld ", env!("CARGO_PKG_VERSION"), "\n"), ExitCode::SUCCESS),
        Command::Help => say(&flags::usage(), ExitCode::SUCCESS),
    }
}

/// One thread does: a node has better uses for the others.
fn block_on<T>(work: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(4).build();
    let result = runtime.map_err(|e| format!("start the runtime: {e}"))?;
    let done = result.block_on(work);
    // What hangs on a dead disk or network shall not hold up the exit.
    result.shutdown_background();
    done
}

fn finish(done: Result<String, String>) -> ExitCode {
    match done {
        Ok(said) if said.is_empty() => ExitCode::SUCCESS,
        Ok(said) => say(&(said + "\n"), ExitCode::SUCCESS),
        Err(why) => complain(&why, ExitCode::FAILURE),
    }
}

fn say(text: &str, code: ExitCode) -> ExitCode {
    // A reader that has gone away is no reason to say anything.
    let _ = io::stdout().write_all(text.as_bytes());
    code
}

fn complain(why: &str, code: ExitCode) -> ExitCode {
    let _ = writeln!(io::stderr(), "edgeflanneld: {why}");
    code
}
