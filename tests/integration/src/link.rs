//! A cable between two hosts: a veth pair, made directly in their namespaces, never in the machine's own.

use crate::exec::{COMMAND_LIMIT, run};
use crate::host::Host;
use anyhow::{Context, Result};
use std::process::Command;

/// Joins interface `a.1` of one host and `b.1` of another, both up, without addresses.
pub fn connect(a: (&Host, &str), b: (&Host, &str)) -> Result<()> {
    let (host_a, if_a) = a;
    let (host_b, if_b) = b;
    let (pid_a, pid_b) = (host_a.init_pid()?.to_string(), host_b.init_pid()?.to_string());
    // Only the network namespace is entered: the process ids are the machine's.
    let mut command = Command::new("nsenter");
    command.args(["-t", &pid_a, "-n", "ip", "link", "add", if_a, "type", "veth"]);
    command.args(["peer", "name", if_b, "netns", &pid_b]);
    run(&mut command, b"", COMMAND_LIMIT)?
        .ok()
        .with_context(|| format!("cannot join {}:{if_a} and {}:{if_b}", host_a.name(), host_b.name()))?;
    host_a.sh(&format!("ip link set {if_a} up"))?;
    host_b.sh(&format!("ip link set {if_b} up"))?;
    Ok(())
}
