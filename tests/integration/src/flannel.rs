//! Stock flannel on a node, for comparison and for mixed clusters: flanneld with the VXLAN backend.

use crate::node::Node;
use crate::tools;
use crate::topology::POD_CIDR;
use anyhow::Result;
use serde_json::{Value, json};

/// Where flanneld and edgeflanneld look for the network's configuration.
pub const NET_CONF: &str = "/etc/kube-flannel/net-conf.json";

/// net-conf.json of the rig's network, with more keys.
pub fn net_conf(more: Value) -> Value {
    let mut conf = json!({"Network": POD_CIDR, "Backend": {"Type": "vxlan"}});
    if let (Some(conf), Value::Object(more)) = (conf.as_object_mut(), more) {
        conf.extend(more);
    }
    conf
}

/// Starts flanneld; it writes /run/flannel/subnet.env once the API knows the node's pod addresses.
pub fn start(node: &mut Node) -> Result<()> {
    node.host.write(NET_CONF, net_conf(json!({"EnableNFTables": false})).to_string())?;
    let mut command = node.host.command(tools::flanneld()?)?;
    command.args(["--kube-subnet-mgr", "--ip-masq", "--iface=eth0"]);
    command.args(["--kubeconfig-file=/etc/kubernetes/admin.kubeconfig"]);
    command.arg(format!("--net-config-path={NET_CONF}"));
    command.env("NODE_NAME", node.host.name());
    node.daemons.start("flanneld", command)
}
