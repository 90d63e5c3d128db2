//! `bench`: how fast our plugins and our daemon are beside the reference ones, in one run on this machine.
//!
//! Contestants take turns (A B A B …), so that a noisy minute hits all of them; figures are medians. No figure decides
//! anything: the goals are printed beside them. Called by `scripts/bench.sh`.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a person's command")]

mod contest;
// The world that the daemon's tests live in.
#[path = "../../../tests/edge/mod.rs"]
mod edge;
mod ipam;
mod measure;
mod overlay;
mod pods;
mod table;

use anyhow::{Result, bail};
use integration::host::Host;
use std::{env, process::ExitCode};

const USAGE: &str = "usage: bench [pods] [ipam]    (default: both)
       bench overlay [--nodes=100,1000,5000] [--rounds=3] [--updates=1000]";

fn main() -> ExitCode {
    match run(&env::args().skip(1).collect::<Vec<_>>()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[String]) -> Result<()> {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        // Inside a host, where the plugins are started without anything in between.
        ["inside", "pods", dirs] => return pods::inside(&serde_json::from_str(dirs)?),
        ["inside", "ipam", dirs] => return ipam::inside(&serde_json::from_str(dirs)?),
        ["overlay", sizes @ ..] => return overlay::run(&overlay::Sizes::parse(sizes)?),
        _ => {}
    }
    let all = ["pods", "ipam"];
    let chosen = if words.is_empty() { all.to_vec() } else { words };
    if let Some(unknown) = chosen.iter().find(|name| !all.contains(name)) {
        bail!("there is no bench {unknown:?}; {USAGE}");
    }
    let dirs = serde_json::to_string(&contest::Dirs::find()?)?;
    for name in chosen {
        let host = Host::new(&format!("bench-{name}"))?;
        let status = host.command(env::current_exe()?)?.args(["inside", name, &dirs]).status()?;
        if !status.success() {
            bail!("the bench {name} failed");
        }
    }
    Ok(())
}
