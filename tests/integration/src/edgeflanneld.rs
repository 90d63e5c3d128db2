//! Our node daemon on a node, started as `conf/systemd/edgeflanneld.service` says: from the node's own disk, outside containers,
//! with the kubelet's credential, before the kubelet.

use crate::exec::{wait_for, wait_until};
use crate::kubelet::http_get;
use crate::node::{Node, install_program};
use crate::{flannel, tools};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::fs;
use std::time::Duration;

/// Where it lies on a node: /usr/local, where a person would put it, is the real machine's.
pub const PROGRAM: &str = "/opt/bin/edgeflanneld";
/// Lets kubelets read all Nodes.
pub const RBAC: &str = include_str!("../../../conf/rbac/edgeflanneld-kubelet.yaml");
const UNIT: &str = include_str!("../../../conf/systemd/edgeflanneld.service");
/// Where an init system listens for its word that it is ready.
const NOTIFY: &str = "/run/rig/notify";
/// The unit's TimeoutStartSec.
const START_LIMIT: Duration = Duration::from_secs(60);
/// How long it may take to hear of the node's subnet on a busy machine.
const READY_LIMIT: Duration = Duration::from_secs(60);

/// Puts the program and net-conf.json where they lie on a node.
pub fn install(node: &Node) -> Result<()> {
    let program = node.host.path(PROGRAM)?;
    fs::create_dir_all(program.parent().context("it is in a folder")?)?;
    install_program(&tools::ours()?.join("edgeflanneld"), &program)?;
    node.host.write(flannel::NET_CONF, flannel::net_conf(json!({})).to_string())
}

/// Starts it and waits for READY, as the unit's `Type=notify` and `Before=kubelet.service` do.
pub fn start(node: &mut Node) -> Result<()> {
    if !node.daemons.has("notify") {
        // What systemd does: it listens, and what it hears is in the log.
        let mut listen = node.host.command("socat")?;
        listen.args(["-u", &format!("UNIX-RECV:{NOTIFY},unlink-early"), "STDOUT"]);
        node.daemons.start("notify", listen)?;
        wait_until(&format!("{NOTIFY} on {}", node.host.name()), START_LIMIT, || {
            node.host.path(NOTIFY).is_ok_and(|path| path.exists())
        })?;
    }
    let log = node.dir().join("logs/notify.log");
    let heard = || fs::read_to_string(&log).unwrap_or_default();
    let before = heard().len();
    let mut command = node.host.command(PROGRAM)?;
    command.args(flags()?).env("NOTIFY_SOCKET", NOTIFY);
    node.daemons.start("edgeflanneld", command)?;
    wait_for(&format!("READY of edgeflanneld on {}", node.host.name()), START_LIMIT, || {
        node.daemons.check_alive("edgeflanneld")?;
        Ok(heard()[before..].contains("READY=1").then_some(()))
    })
}

/// Waits until the kernel is as its record says, and it has one.
pub fn wait_ready(node: &Node) -> Result<()> {
    wait_for(&format!("edgeflanneld on {} to be ready", node.host.name()), READY_LIMIT, || {
        node.daemons.check_alive("edgeflanneld")?;
        http_get(node, "http://127.0.0.1:8081/readyz").map(Some)
    })
    .map(drop)
}

/// `edgeflanneld status -o json`.
pub fn status(node: &Node) -> Result<Value> {
    // It ends with 1 when there is drift, and says which all the same.
    let said = node.host.run([PROGRAM, "status", "-o", "json"])?;
    ensure!(
        !said.stdout.is_empty(),
        "edgeflanneld status on {}: {}",
        node.host.name(),
        said.stderr.trim_end()
    );
    serde_json::from_str(&said.stdout).context("edgeflanneld status -o json gave no JSON")
}

/// What the kernel has of the overlay: the device's MAC; routes, neighbours and FDB entries through it, in order.
pub fn in_kernel(node: &Node) -> Result<Vec<String>> {
    let shown = node.host.sh(
        "cat /sys/class/net/flannel.1/address
         (ip route show dev flannel.1; ip neigh show dev flannel.1 nud permanent; bridge fdb show dev flannel.1) | sort",
    )?;
    Ok(shown.lines().map(|line| line.trim().to_owned()).collect())
}

/// The unit's command line, with the rig's name of the kubelet's kubeconfig: the last one counts.
fn flags() -> Result<Vec<String>> {
    let line =
        UNIT.lines().find_map(|line| line.strip_prefix("ExecStart=")).context("the unit starts nothing")?;
    let words =
        line.split_whitespace().skip(1).chain(["--kubeconfig-file=/etc/kubernetes/kubelet.kubeconfig"]);
    Ok(words.map(str::to_owned).collect())
}
