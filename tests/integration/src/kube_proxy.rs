//! kube-proxy on a node, in nftables mode: Services' addresses.

use crate::node::Node;
use crate::tools;
use crate::topology::POD_CIDR;
use anyhow::Result;
use serde_json::json;

/// Starts it.
pub fn start(node: &mut Node) -> Result<()> {
    let config = json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration",
        "mode": "nftables", "hostnameOverride": node.host.name(), "clusterCIDR": POD_CIDR,
        "clientConnection": {"kubeconfig": "/etc/kubernetes/kube-proxy.kubeconfig"},
        // 0: the machine's conntrack limits are left alone.
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
    });
    node.host.write("/etc/kubernetes/kube-proxy.json", config.to_string())?;
    let mut command = node.host.command(tools::kube_proxy()?)?;
    command.arg("--config=/etc/kubernetes/kube-proxy.json");
    node.daemons.start("kube-proxy", command)
}
