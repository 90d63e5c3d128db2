//! Our tunnel in the rig: `edge-tunnel server` beside kube-apiserver, as `conf/tunnel` installs it, and an agent on every node behind a NAT.

use crate::control_plane::{API, ControlPlane};
use crate::exec::{COMMAND_LIMIT, run};
use crate::host::Host;
use crate::node::Node;
use crate::pki::{Authority, Subject, Usage, kubeconfig};
use crate::tools;
use crate::topology::{CLOUD, Options, POD_CIDR, plan};
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;

/// The server, and each agent, among their host's daemons.
pub const DAEMON: &str = "edge-tunnel";

const EGRESS_UDS: &str = include_str!("../../../conf/tunnel/egress-uds.yaml");
const EGRESS_TCP: &str = include_str!("../../../conf/tunnel/egress-tcp.yaml");
const SERVER: &str = include_str!("../../../conf/tunnel/server.yaml");

/// How kube-apiserver calls the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Egress {
    /// By a unix socket.
    Socket,
    /// By TCP and mTLS.
    Tcp,
    /// The same, and whoever brings the cluster up starts the servers there: several of [`server`], behind a load balancer.
    Several,
}

impl FromStr for Egress {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "uds" => Ok(Self::Socket),
            "tcp" => Ok(Self::Tcp),
            _ => bail!("{text} is no way from kube-apiserver to edge-tunnel: uds or tcp"),
        }
    }
}

/// The shipped EgressSelectorConfiguration with this cluster's paths in the sample's place; a line that has changed its wording is an error.
fn egress_configuration(egress: Egress, dir: &Path) -> Result<String> {
    let pki = |file: &str| dir.join("pki").join(file).display().to_string();
    let (mut text, places) = match egress {
        Egress::Socket => (EGRESS_UDS.to_owned(), vec![("/run/edge-tunnel/egress.sock", socket(dir))]),
        Egress::Tcp | Egress::Several => (
            EGRESS_TCP.to_owned(),
            vec![
                ("https://edge-tunnel.example.com:8131", format!("https://{CLOUD}:8131")),
                ("/etc/kubernetes/pki/edge-tunnel/server-ca.crt", pki("ca.crt")),
                ("/etc/kubernetes/pki/edge-tunnel/egress.crt", pki("edge-tunnel-caller.crt")),
                ("/etc/kubernetes/pki/edge-tunnel/egress.key", pki("edge-tunnel-caller.key")),
            ],
        ),
    };
    for (sample, ours) in places {
        if !text.contains(sample) {
            bail!("the shipped EgressSelectorConfiguration names no {sample} any more");
        }
        text = text.replace(sample, &ours);
    }
    Ok(text)
}

fn socket(dir: &Path) -> String {
    dir.join("edge-tunnel.sock").display().to_string()
}

/// Makes what the server needs and, unless there will be several, starts it; gives the configuration that sends the API server's connections to nodes through it. The API need not be there yet.
pub fn start_server(
    cloud: &Host,
    dir: &Path,
    options: &Options,
    egress: Egress,
    control_plane: &mut ControlPlane,
) -> Result<PathBuf> {
    let pki = dir.join("pki");
    let ca = Authority::open(&pki, "ca");
    let own = CLOUD.to_string();
    ca.leaf(&pki, "edge-tunnel-server", Subject::new("edge-tunnel", None), Usage::Both, &[&own])?;
    ca.leaf(&pki, "edge-tunnel-caller", Subject::new("edge-tunnel-caller", None), Usage::Client, &[])?;
    ca.leaf(&pki, "edge-tunnel", Subject::new("edge-tunnel", None), Usage::Client, &[])?;
    let user = pki.join("edge-tunnel.kubeconfig");
    fs::write(&user, kubeconfig(API, &pki.to_string_lossy(), "edge-tunnel"))?;
    // The node proxy subresource looks the name up before it asks for it by name; any address will do (docs/tunnel.md).
    for node in plan(options)?.iter().flat_map(|site| &site.nodes) {
        cloud.sh(&format!("echo '192.0.2.1 {node}' >>/etc/hosts"))?;
    }

    let listen = match egress {
        Egress::Socket => Some(format!("--egress-socket={}", socket(dir))),
        Egress::Tcp => Some("--egress-listen=:8131".to_owned()),
        Egress::Several => None,
    };
    if let Some(listen) = listen {
        let mut server = server(cloud, dir, egress)?;
        server.args(["--listen=:8443", &listen]);
        control_plane.daemons.start(DAEMON, server)?;
    }
    let config = dir.join("egress.yaml");
    fs::write(&config, egress_configuration(egress, dir)?)
        .with_context(|| format!("cannot write {config:?}"))?;
    Ok(config)
}

/// A server in the cloud, with all but where it listens.
pub fn server(cloud: &Host, dir: &Path, egress: Egress) -> Result<Command> {
    let file = |name: &str| dir.join("pki").join(name).display().to_string();
    let mut server = cloud.command(tools::edge_tunnel()?)?;
    server.args(["server", "--direct-nodes=node-role.kubernetes.io/cloud", "--direct-cidr=10.10.0.0/24"]);
    server.arg(format!("--tls-cert={}", file("edge-tunnel-server.crt")));
    server.arg(format!("--tls-key={}", file("edge-tunnel-server.key")));
    server.arg(format!("--agent-ca={}", file("ca.crt")));
    server.arg(format!("--kubeconfig={}", file("edge-tunnel.kubeconfig")));
    if egress != Egress::Socket {
        server.arg("--caller-name=edge-tunnel-caller").arg(format!("--caller-ca={}", file("ca.crt")));
    }
    Ok(server)
}

/// Lets the server see Nodes, by the shipped ClusterRole.
pub fn authorize(cloud: &Host, control_plane: &ControlPlane) -> Result<()> {
    let role = SERVER.split("\n---\n").find(|object| object.contains("\nkind: ClusterRole\n"));
    let role = role.context("conf/tunnel/server.yaml has no ClusterRole")?;
    let mut apply = control_plane.kubectl_command(cloud)?;
    run(apply.args(["apply", "-f", "-"]), role.as_bytes(), COMMAND_LIMIT)?.ok()?;
    let bind = [
        "create",
        "clusterrolebinding",
        "edge-tunnel",
        "--clusterrole=edge-tunnel-server",
        "--user=edge-tunnel",
    ];
    control_plane.kubectl(cloud, &bind).map(drop)
}

/// Is this node behind a NAT, so that only its agent leads there?
pub fn is_edge(options: &Options, node: &str) -> Result<bool> {
    Ok(plan(options)?.iter().any(|site| site.nat && site.nodes.iter().any(|name| name == node)))
}

/// What `kubectl label` says of a node: the server dials the cloud's itself.
pub fn label(options: &Options, node: &str) -> Result<&'static str> {
    Ok(if is_edge(options, node)? {
        "node-role.kubernetes.io/edge="
    } else {
        "node-role.kubernetes.io/cloud="
    })
}

/// Starts the agent of a node; it shows the kubelet's certificate, and lets in port 80 of the pods beside the kubelet.
pub fn start_agent(node: &mut Node) -> Result<()> {
    let mut agent = node.host.command(tools::edge_tunnel()?)?;
    agent.arg("agent").arg(format!("--server={CLOUD}:8443")).arg(format!("--allow={POD_CIDR}:80"));
    agent.args(["--server-ca=/etc/kubernetes/pki/ca.crt", "--cert=/etc/kubernetes/pki/kubelet.crt"]);
    agent.arg("--key=/etc/kubernetes/pki/kubelet.key");
    node.daemons.start(DAEMON, agent)
}
