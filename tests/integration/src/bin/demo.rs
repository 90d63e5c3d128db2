//! `demo`: two pods, their addresses, a power loss, the same addresses. Called by `scripts/demo.sh`.
//!
//! The node is a host of namespaces; its pods are made by the real cnitool, as a container runtime would.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "it is there to be read")]

use anyhow::{Context, Result, ensure};
use integration::{
    cnitool::{CniTool, Pod},
    host::Host,
    tools,
};
use std::process::ExitCode;

fn main() -> ExitCode {
    match demo() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The conflist that an operator installs.
const CONFLIST: &str = include_str!("../../../../conf/10-edgeflannel.conflist");

fn demo() -> Result<()> {
    let conflist = serde_json::from_str(CONFLIST)?;
    say("A node comes up: a network namespace with a disk of its own, and our plugins.");
    let mut node = Host::new("demo")?;
    let before = pods(&node, &conflist, &["web-0", "db-0"])?;
    show("Two pods, made by the real cnitool:", &before);
    ping(&node, &before[0], &before[1])?;
    println!();
    println!("$ ipam-sticky list");
    let list = node.run([tools::ours()?.join("ipam-sticky").to_string_lossy().as_ref(), "list"])?.ok()?;
    print!("{}", list.lines().map(|line| format!("  {line}\n")).collect::<String>());

    say(
        "Power loss. Every process, link and namespace is gone at once; the disk is kept. No DEL was ever called.",
    );
    node.reboot()?;
    let links = node.sh("ls /sys/class/net")?;
    ensure!(!links.contains("cni0"), "the bridge survived the power loss: {links}");
    say("The node is back, and nothing else is: no API server, no daemon. The pods start in another order.");
    let mut after = pods(&node, &conflist, &["db-0", "web-0"])?;
    after.reverse();
    show("After the reboot:", &after);
    ping(&node, &after[1], &after[0])?;

    for (old, new) in before.iter().zip(&after) {
        ensure!(old.address == new.address, "{} had {} and now has {}", old.name, old.address, new.address);
        ensure!(old.mac == new.mac, "{} had {} and now has {}", old.name, old.mac, new.mac);
    }
    say("Same names, same addresses, same MACs.");
    Ok(())
}

fn say(text: &str) {
    println!("\n==> {text}");
}

/// A pod as the runtime was told.
struct Row {
    name: String,
    pod: Pod,
    address: String,
    mac: String,
    container: String,
}

fn pods(node: &Host, conflist: &serde_json::Value, names: &[&str]) -> Result<Vec<Row>> {
    let cni = CniTool::new(node, conflist)?;
    let row = |name: &&str| -> Result<Row> {
        let pod = cni.pod("shop", name)?;
        let added = cni.add(&pod)?;
        let inside = &added.0["interfaces"][2];
        Ok(Row {
            name: format!("shop/{name}"),
            address: added.address()?,
            mac: inside["mac"].as_str().context("no MAC in the result")?.to_owned(),
            container: pod.netns.clone(),
            pod,
        })
    };
    names.iter().map(row).collect()
}

fn show(title: &str, rows: &[Row]) {
    println!("\n{title}\n");
    println!("  {:12} {:12} {:16} {:18}", "POD", "SANDBOX", "ADDRESS", "MAC");
    for row in rows {
        println!("  {:12} {:12} {:16} {:18}", row.name, row.container, row.address, row.mac);
    }
}

fn ping(node: &Host, from: &Row, to: &Row) -> Result<()> {
    let answer = node.sh_in(&from.pod.netns, &format!("ping -c1 -W2 {}", to.address))?;
    let time = answer.lines().find(|line| line.contains("time=")).context("no answer")?;
    println!("\n  {} pings {}: {time}", from.name, to.name);
    Ok(())
}
