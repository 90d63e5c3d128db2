//! Stock flannel on a node, for comparison and for mixed clusters: flanneld with the VXLAN backend.

use crate::node::Node;
use crate::tools;
use crate::topology::POD_CIDR;
use anyhow::Result;
use serde_json::json;

/// Starts flanneld; it writes /run/flannel/subnet.env once the API knows the node's pod addresses.
pub fn start(node: &mut Node) -> Result<()> {
    let network = json!({"Network": POD_CIDR, "EnableNFTables": false, "Backend": {"Type": "vxlan"}});
    node.host.write("/etc/kube-flannel/net-conf.json", network.to_string())?;
    let mut command = node.host.command(tools::flanneld()?)?;
    command.args(["--kube-subnet-mgr", "--ip-masq", "--iface=eth0"]);
    command.args(["--kubeconfig-file=/etc/kubernetes/admin.kubeconfig"]);
    command.arg("--net-config-path=/etc/kube-flannel/net-conf.json");
    command.env("NODE_NAME", node.host.name());
    node.daemons.start("flanneld", command)
}
