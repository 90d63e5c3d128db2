//! Kubernetes' own tunnel, for clusters whose nodes the API server cannot reach: a server in the cloud, an agent on each node that dials out.

use crate::daemons::Daemons;
use crate::host::Host;
use crate::node::Node;
use crate::tools;
use crate::topology::CLOUD;
use anyhow::{Context, Result};
use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};

/// Starts the server; gives the configuration that sends the API server's connections to nodes through it.
pub fn start_server(cloud: &Host, dir: &Path, daemons: &mut Daemons) -> Result<PathBuf> {
    let socket = dir.join("konnectivity.sock").display().to_string();
    let egress = dir.join("egress.json");
    let config = json!({
        "apiVersion": "apiserver.k8s.io/v1beta1", "kind": "EgressSelectorConfiguration",
        "egressSelections": [{"name": "cluster", "connection": {
            "proxyProtocol": "HTTPConnect", "transport": {"uds": {"udsName": socket}}}}],
    });
    fs::write(&egress, config.to_string()).with_context(|| format!("cannot write {egress:?}"))?;
    let pki = |file: &str| dir.join("pki").join(file).display().to_string();
    let mut command = cloud.command(tools::konnectivity_dir()?.join("konnectivity-server"))?;
    command.args([
        "--mode=http-connect",
        "--server-port=0",
        "--delete-existing-uds-file",
        "--agent-port=8132",
    ]);
    command.args(["--admin-port=8133", "--health-port=8134", "--server-id=cloud", "--server-count=1"]);
    command.args(["--proxy-strategies=destHost,default", "--keepalive-time=30s"]);
    command.arg(format!("--uds-name={socket}"));
    command.arg(format!("--cluster-cert={}", pki("konnectivity.crt")));
    command.arg(format!("--cluster-key={}", pki("konnectivity.key")));
    command.arg(format!("--cluster-ca-cert={}", pki("ca.crt")));
    daemons.start("konnectivity-server", command)?;
    Ok(egress)
}

/// Starts the agent of a node; it shows the kubelet's certificate.
pub fn start_agent(node: &mut Node) -> Result<()> {
    let name = node.host.name().to_owned();
    let mut command = node.host.command(tools::konnectivity_dir()?.join("konnectivity-agent"))?;
    command.arg(format!("--proxy-server-host={CLOUD}"));
    command.args(["--proxy-server-port=8132", "--admin-server-port=8094", "--health-server-port=8093"]);
    command.args(["--ca-cert=/etc/kubernetes/pki/ca.crt", "--agent-cert=/etc/kubernetes/pki/kubelet.crt"]);
    command.args(["--agent-key=/etc/kubernetes/pki/kubelet.key", "--keepalive-time=30s"]);
    command.args(["--sync-interval=1s", "--sync-interval-cap=5s"]);
    // Addresses may be the same at several sites: the name alone says which node it is.
    command.arg(format!("--agent-id={name}")).arg(format!("--agent-identifiers=host={name}"));
    node.daemons.start("konnectivity-agent", command)
}
