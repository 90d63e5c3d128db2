//! What `rig status` and `rig logs` print.

use anyhow::{Result, bail};
use integration::cluster::Cluster;
use integration::edgeflanneld;
use integration::node::Node;
use serde_json::Value;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Prints a line. A reader that has seen enough (`rig status | head`) ends us quietly.
pub fn say(text: impl std::fmt::Display) {
    if writeln!(std::io::stdout(), "{text}").is_err() {
        std::process::exit(0);
    }
}

/// Hosts, daemons, cuts; nodes and pods as far as the API answers.
pub fn status(name: &str, cluster: &Cluster) -> Result<()> {
    say(format!("rig {name} in {}", cluster.dir().display()));
    let nodes = cluster.nodes().values();
    let hosts = nodes.clone().map(|node| &node.host).chain(cluster.network().hosts());
    for host in hosts {
        say(format!("  {:<20} {}", host.name(), if host.is_on() { "on" } else { "OFF" }));
    }
    let dead = nodes.clone().map(|n| (n.host.name(), n.daemons.dead()));
    for (host, dead) in dead.chain([("cloud", cluster.control_plane().daemons.dead())]) {
        for daemon in dead {
            say(format!("  {daemon} on {host} has ENDED: see `rig logs {host}`"));
        }
    }
    for cut in cluster.network().cuts() {
        say(format!("  {cut} is CUT"));
    }
    for node in cluster.nodes().values().filter(|node| node.wants_edgeflanneld() && node.host.is_on()) {
        say(format!("  {:<20} {}", format!("{}'s overlay", node.host.name()), overlay(node)));
    }
    nodes_and_pods(cluster)
}

/// What its node says of the overlay, in a line.
fn overlay(node: &Node) -> String {
    let Ok(status) = edgeflanneld::status(node) else {
        return "unknown: see `edgeflanneld status` there".to_owned();
    };
    let all = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let peers = all(&status["peers"]);
    let reached = peers.iter().filter(|peer| peer["inKernel"] == true).count();
    let api = if status["api"]["reachable"] == true { "the API is there" } else { "the API is AWAY" };
    let cidrs: Vec<String> =
        all(&status["podCIDRs"]).iter().filter_map(|c| c.as_str().map(str::to_owned)).collect();
    let drift = match all(&status["drift"]).len() {
        0 => String::new(),
        count => format!(", {count} things are NOT as they should be"),
    };
    format!("{}, {reached} of {} peers, {api}{drift}", cidrs.join(" "), peers.len())
}

fn nodes_and_pods(cluster: &Cluster) -> Result<()> {
    nodes(cluster)?;
    say(cluster.kubectl(&["get", "pods", "--all-namespaces", "-o", "wide"])?.trim_end());
    Ok(())
}

/// The nodes as the API server sees them.
pub fn nodes(cluster: &Cluster) -> Result<()> {
    say(cluster.kubectl(&["get", "nodes", "-o", "wide"])?.trim_end());
    Ok(())
}

/// Where each log is and its last lines: a node's, or all.
pub fn logs(cluster: &Cluster, node: Option<&str>) -> Result<()> {
    let dirs = match node {
        None | Some("cloud") => vec![cluster.dir().join("logs")],
        Some(node) => vec![cluster.dir().join("nodes").join(node).join("logs")],
    };
    let all = cluster.nodes().values().map(|node| node.dir().join("logs"));
    let dirs: Vec<PathBuf> = if node.is_none() { dirs.into_iter().chain(all).collect() } else { dirs };
    for dir in dirs {
        let Ok(entries) = fs::read_dir(&dir) else { bail!("there are no logs in {}", dir.display()) };
        let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        files.sort();
        for file in files {
            say(format!("==> {} <==\n{}", file.display(), end(&file)));
        }
    }
    Ok(())
}

fn end(file: &Path) -> String {
    let text = fs::read_to_string(file).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(10)..].join("\n")
}
