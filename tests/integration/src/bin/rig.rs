//! `rig`: the test rig's command. See docs/rig.md.
#![allow(clippy::print_stderr, clippy::print_stdout, reason = "a person's command: it talks to the terminal")]

use anyhow::{Context, Result, bail};
use integration::host::Host;
use integration::{host_init, tools};
use std::io::Read;
use std::process::ExitCode;

const USAGE: &str = "usage: rig build";

fn main() -> ExitCode {
    match run(std::env::args().skip(1).collect()) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("rig: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Vec<String>) -> Result<u8> {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["build"] => tools::build_all()?,
        // What the rig calls itself with, inside or on the way into a host.
        ["host-run", spec] => host_init::run(spec)?,
        ["host-init", spec] => host_init::init(spec)?,
        ["enter-pid", pid, cgroup, ..] => {
            let pid = pid.parse().with_context(|| format!("{pid} is no process id"))?;
            let cgroup = Some(*cgroup).filter(|id| *id != "-");
            let code = integration::enter::enter(pid, cgroup, &arguments[3..])?;
            return Ok(u8::try_from(code).unwrap_or(u8::MAX));
        }
        // For the test that kills the maker of a host.
        ["hold-host"] => {
            let host = Host::new("held")?;
            println!("{}", host.init_pid()?);
            std::io::stdin().read_to_end(&mut Vec::new())?;
        }
        _ => bail!("{USAGE}"),
    }
    Ok(0)
}
