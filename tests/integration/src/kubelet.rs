//! The kubelet on a node: its configuration, alone (standalone mode: static pods only) or as part of a cluster.

use crate::exec::wait_for;
use crate::node::Node;
use crate::tools;
use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use std::time::Duration;

/// Where static pods' manifests lie.
pub const MANIFESTS: &str = "/etc/kubernetes/manifests";

/// To whom the kubelet listens.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub enum Mode {
    /// Nobody: no API server, static pods only.
    Standalone,
    /// An API server; certificates lie in the node's /etc/kubernetes/pki.
    Cluster,
}

fn config(mode: &Mode) -> Value {
    let mut config = json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        // cgroup v1 is what this machine has; containerd 1.6 cannot say which driver it uses.
        "cgroupDriver": "cgroupfs", "failCgroupV1": false, "failSwapOn": false, "oomScoreAdj": 0,
        "staticPodPath": MANIFESTS, "fileCheckFrequency": "1s",
        "resolvConf": "/etc/resolv.conf", "clusterDNS": ["10.96.0.10"], "clusterDomain": "cluster.local",
        // The disk is the whole machine's: a full one must not evict the pods of a test.
        "imageGCHighThresholdPercent": 100,
        "evictionHard": {"memory.available": "50Mi", "nodefs.available": "0%", "nodefs.inodesFree": "0%", "imagefs.available": "0%"},
        "serializeImagePulls": false,
        // For looking at pods without certificates; the node's network is its own.
        "readOnlyPort": 10255,
    });
    let more = match mode {
        Mode::Standalone => json!({
            "address": "127.0.0.1",
            "authentication": {"anonymous": {"enabled": true}, "webhook": {"enabled": false}},
            "authorization": {"mode": "AlwaysAllow"},
        }),
        Mode::Cluster => json!({
            "authentication": {"anonymous": {"enabled": false}, "webhook": {"enabled": true},
                "x509": {"clientCAFile": "/etc/kubernetes/pki/ca.crt"}},
            "authorization": {"mode": "Webhook"},
            "tlsCertFile": "/etc/kubernetes/pki/serving.crt", "tlsPrivateKeyFile": "/etc/kubernetes/pki/serving.key",
            "nodeStatusUpdateFrequency": "1s", "nodeLeaseDurationSeconds": 20,
        }),
    };
    if let (Some(config), Some(more)) = (config.as_object_mut(), more.as_object()) {
        config.extend(more.clone());
    }
    config
}

/// Starts the kubelet and waits until it is healthy.
pub fn start(node: &mut Node) -> Result<()> {
    let mode = node.mode().clone();
    node.host.sh(&format!("mkdir -p {MANIFESTS}"))?;
    node.host.write("/etc/kubernetes/kubelet.json", config(&mode).to_string())?;
    let mut command = node.host.command(tools::kubelet()?)?;
    command.args(["--config=/etc/kubernetes/kubelet.json", "--v=2"]);
    command.arg(format!("--hostname-override={}", node.host.name()));
    if let Some(address) = node.address() {
        command.arg(format!("--node-ip={address}"));
    }
    if matches!(mode, Mode::Cluster) {
        command.arg("--kubeconfig=/etc/kubernetes/kubelet.kubeconfig");
    }
    node.daemons.start("kubelet", command)
}

/// Waits until the kubelet says that it is healthy.
pub fn wait_healthy(node: &mut Node) -> Result<()> {
    wait_for("the kubelet to be healthy", Duration::from_secs(60), || {
        node.daemons.check_alive("kubelet")?;
        let answer = http_get(node, "http://127.0.0.1:10248/healthz")?;
        Ok((answer == "ok").then_some(()))
    })
}

/// The pods that the kubelet of this node knows, as Kubernetes' PodList items.
pub fn pods(node: &Node) -> Result<Vec<Value>> {
    let text = http_get(node, "http://127.0.0.1:10255/pods")?;
    let list: Value = serde_json::from_str(&text).context("the kubelet's /pods is no JSON")?;
    // No pods: "items" is null.
    Ok(list["items"].as_array().cloned().unwrap_or_default())
}

/// What a URL says, asked from inside the node's network.
pub fn http_get(node: &Node, url: &str) -> Result<String> {
    // Debian's busybox dies of its own -T option: timeout(1) bounds the wait.
    let out = node.host.run(["timeout", "5", "busybox", "wget", "-qO-", url])?;
    if !out.status.success() {
        bail!("no answer from {url} in node {}: {}", node.host.name(), out.stderr.trim_end());
    }
    Ok(out.stdout)
}
