//! Flannel's annotations on Node objects, read and written byte for byte as flanneld does.
//!
//! flanneld: `pkg/subnet/kube/annotations.go` (the names), `kube.go` `AcquireLease` (what is written on the own
//! node) and `nodeToLease` (what is read from the others), `pkg/backend/vxlan/vxlan.go` (`backend-data`). Where
//! flanneld gives a whole peer up because one family is broken, the families are read apart here. Pure.

use crate::{
    mac::Mac,
    record::{Family, NodeRecord, PeerEnd, PerFamily},
    subnet_env::without_host,
};
use cni::golike;
use ipnetwork::IpNetwork;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::{collections::BTreeMap, net::IpAddr};

/// A Node as far as it matters here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Node {
    /// `metadata.name`
    pub name: String,
    /// The annotations that may be flannel's, whatever the prefix ([`may_matter`]).
    pub annotations: BTreeMap<String, String>,
    /// `spec.podCIDRs`, else `spec.podCIDR`
    pub pod_cidrs: Vec<String>,
    /// The status of the condition NetworkUnavailable: "True", "False", "Unknown".
    pub network_unavailable: Option<String>,
}

/// What follows the prefix in the names of all annotations that flannel knows.
const NAMES: [&str; 10] = [
    "kube-subnet-manager",
    "backend-type",
    "backend-data",
    "backend-v6-data",
    "public-ip",
    "public-ipv6",
    "public-ip-overwrite",
    "public-ipv6-overwrite",
    "node-public-ip",
    "node-public-ipv6",
];

/// Whether an annotation could be one of flannel's under some prefix: the others are dropped while reading.
#[must_use]
pub fn may_matter(key: &str) -> bool {
    NAMES.iter().any(|name| key.strip_suffix(name).is_some_and(|prefix| prefix.ends_with(['/', '-'])))
}

/// The names of the annotations under one prefix (`--kube-annotation-prefix`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keys {
    prefix: String,
}

impl Keys {
    /// The prefix may hold one slash (`example.com/edge` gives `example.com/edge-public-ip`), else one is put
    /// behind it.
    ///
    /// # Errors
    /// When no annotation may be called so.
    pub fn new(prefix: &str) -> Result<Self, String> {
        let mut prefix = prefix.to_owned();
        match prefix.matches('/').count() {
            0 => prefix.push('/'),
            1 => {}
            _ => return Err("a prefix holds at most one slash".into()),
        }
        if !prefix.ends_with(['/', '-']) {
            prefix.push('-');
        }
        let chars = |part: &str, more: &str| {
            !part.is_empty()
                && part.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || more.contains(c))
        };
        let (domain, rest) = prefix.split_once('/').unwrap_or((&prefix, ""));
        let is_domain = domain.contains('.') && domain.split('.').all(|label| chars(label, "_-"));
        if is_domain && (rest.is_empty() || chars(rest, "_-")) {
            Ok(Self { prefix })
        } else {
            Err("a prefix is a domain name in lower case, with or without a slash and a word behind it"
                .into())
        }
    }

    fn key(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    fn read<'a>(&self, node: &'a Node, name: &str) -> Option<&'a str> {
        node.annotations.get(&self.key(name)).map(String::as_str)
    }

    fn backend_data(family: Family) -> &'static str {
        match family {
            Family::V4 => "backend-data",
            Family::V6 => "backend-v6-data",
        }
    }

    fn public_ip(family: Family) -> &'static str {
        match family {
            Family::V4 => "public-ip",
            Family::V6 => "public-ipv6",
        }
    }
}

/// What a Node says about itself as a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Claim {
    /// It takes part.
    Peer {
        /// What is known for certain; an absent family that is not in `unclear` does not exist.
        ends: PerFamily<PeerEnd>,
        /// Families that it ought to say more about: what was known before stays. With the reason, for people.
        unclear: PerFamily<String>,
    },
    /// It says that it does not take part, or by another backend.
    NotOurs(String),
    /// It says nothing (yet).
    Silent,
}

/// Reads what another node says about itself, in the families that the cluster has a network of. Whether its
/// subnet is its to claim is settled elsewhere (`overlay::claims`).
#[must_use]
pub fn read_peer(keys: &Keys, node: &Node, networks: &PerFamily<IpNetwork>) -> Claim {
    match keys.read(node, "kube-subnet-manager") {
        Some("true") => {}
        Some(other) => return Claim::NotOurs(format!("kube-subnet-manager is {other:?}")),
        None => return Claim::Silent,
    }
    match keys.read(node, "backend-type") {
        Some("vxlan") => {}
        Some(other) => return Claim::NotOurs(format!("its backend is {other:?}, not vxlan")),
        None => return Claim::Silent,
    }
    let (mut ends, mut unclear) = (PerFamily::default(), PerFamily::default());
    for (family, _) in networks.iter() {
        match read_end(keys, node, family) {
            Ok(end) => *ends.slot(family) = end,
            Err(why) => *unclear.slot(family) = Some(why),
        }
    }
    Claim::Peer { ends, unclear }
}

/// `Ok(None)`: the node has no subnet of this family, so there is nothing to reach.
fn read_end(keys: &Keys, node: &Node, family: Family) -> Result<Option<PeerEnd>, String> {
    let subnets = pod_cidrs(node)?;
    let Some(subnet) = subnets.get(family).copied() else {
        return if subnets.is_empty() { Err("it has no podCIDR yet".into()) } else { Ok(None) };
    };
    let read =
        |name: &str| keys.read(node, name).ok_or_else(|| format!("it has no annotation {}", keys.key(name)));
    let name = Keys::public_ip(family);
    let text = read(name)?;
    let public_ip =
        address(text, family).ok_or_else(|| format!("{name} {text:?} is not an {family} address"))?;
    let name = Keys::backend_data(family);
    let text = read(name)?;
    let vtep_mac = vtep_mac(text).map_err(|why| format!("{name} {text:?}: {why}"))?;
    Ok(Some(PeerEnd { subnet, public_ip, vtep_mac, since: 0 }))
}

/// The MAC in `backend-data`. Go's names match without regard to case, and what else stands there is ignored.
fn vtep_mac(text: &str) -> Result<Mac, String> {
    #[derive(Deserialize)]
    struct BackendData {
        #[serde(rename = "VtepMAC")]
        vtep_mac: String,
    }
    let value: Value = serde_json::from_str(text).map_err(|why| why.to_string())?;
    let data: BackendData = golike::from_value(&value).map_err(|why| why.to_string())?;
    data.vtep_mac.parse().map_err(|why| format!("{}: {why}", data.vtep_mac))
}

fn address(text: &str, family: Family) -> Option<IpAddr> {
    let usable = |address: &IpAddr| {
        Family::of(*address) == family
            && !address.is_unspecified()
            && !address.is_loopback()
            && !address.is_multicast()
    };
    text.parse().ok().filter(usable)
}

/// Whether all of `inner` lies in `outer`.
fn contains(outer: IpNetwork, inner: IpNetwork) -> bool {
    outer.prefix() <= inner.prefix() && outer.is_ipv4() == inner.is_ipv4() && outer.contains(inner.network())
}

/// A node's subnets, one per family.
fn pod_cidrs(node: &Node) -> Result<PerFamily<IpNetwork>, String> {
    let mut subnets = PerFamily::default();
    for text in &node.pod_cidrs {
        let cidr = text.parse::<IpNetwork>().ok().filter(|_| text.contains('/'));
        let cidr = without_host(cidr.ok_or_else(|| format!("podCIDR {text:?} is not a subnet"))?);
        let slot = subnets.slot(Family::of_subnet(cidr));
        if slot.replace(cidr).is_some() {
            return Err(format!("it has several podCIDRs of one family: {}", node.pod_cidrs.join(", ")));
        }
    }
    Ok(subnets)
}

/// What our own Node says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Own {
    /// Our subnets (`spec.podCIDRs`), those that lie in the cluster's networks.
    pub subnets: PerFamily<IpNetwork>,
    /// `public-ip-overwrite`: published instead of the interface's address.
    pub overwrite: PerFamily<IpAddr>,
    /// `node-public-ip`: as `--public-ip`, which it wins over.
    pub node_public_ips: PerFamily<IpAddr>,
    /// The MACs that were published for us before (`backend-data`).
    pub vtep_macs: PerFamily<Mac>,
    /// What could not be understood.
    pub problems: Vec<String>,
}

/// Reads our own Node.
#[must_use]
pub fn read_own(keys: &Keys, node: &Node, networks: &PerFamily<IpNetwork>) -> Own {
    let mut own = Own::default();
    let subnets = pod_cidrs(node).unwrap_or_else(|why| {
        own.problems.push(why);
        PerFamily::default()
    });
    for (family, network) in networks.iter() {
        match subnets.get(family) {
            Some(subnet) if contains(*network, *subnet) => *own.subnets.slot(family) = Some(*subnet),
            Some(subnet) => {
                own.problems.push(format!("our podCIDR {subnet} is not in the cluster's network {network}"))
            }
            None => {}
        }
    }
    for family in Family::ALL {
        let mut read_address = |name: String| {
            let text = keys.read(node, &name).filter(|text| !text.is_empty())?;
            let address = address(text, family);
            if address.is_none() {
                own.problems.push(format!("annotation {name} {text:?} is not an {family} address"));
            }
            address
        };
        let public_ip = Keys::public_ip(family);
        *own.overwrite.slot(family) = read_address(format!("{public_ip}-overwrite"));
        *own.node_public_ips.slot(family) = read_address(format!("node-{public_ip}"));
        let published = keys.read(node, Keys::backend_data(family)).and_then(|text| vtep_mac(text).ok());
        *own.vtep_macs.slot(family) = published;
    }
    own
}

/// What our own Node shall say. A family without address or MAC is left out, as flanneld leaves it out.
#[must_use]
pub fn written(keys: &Keys, record: &NodeRecord) -> BTreeMap<String, String> {
    let mut annotations = BTreeMap::new();
    for (family, subnet) in record.subnets.iter() {
        let (Some(mac), Some(public_ip)) = (record.vtep_macs.get(family), record.public_ips.get(family))
        else {
            continue;
        };
        debug_assert_eq!(Family::of_subnet(*subnet), family);
        let data = format!(r#"{{"VNI":{},"VtepMAC":"{mac}"}}"#, record.backend.vni);
        annotations.insert(keys.key(Keys::backend_data(family)), data);
        annotations.insert(keys.key(Keys::public_ip(family)), public_ip.to_string());
    }
    if !annotations.is_empty() {
        annotations.insert(keys.key("kube-subnet-manager"), "true".into());
        annotations.insert(keys.key("backend-type"), "vxlan".into());
    }
    annotations
}

/// The patch of `nodes/NAME/status` (strategic merge) that makes our Node say what it shall; `None` when it
/// does already. `now` (RFC 3339) marks the condition when that is part of it.
#[must_use]
pub fn patch(node: &Node, written: &BTreeMap<String, String>, condition: bool, now: &str) -> Option<Value> {
    let differs = |(key, value): &(&String, &String)| node.annotations.get(*key) != Some(*value);
    let annotations: Map<String, Value> =
        written.iter().filter(differs).map(|(key, value)| (key.clone(), json!(value))).collect();
    let mut patch = Map::new();
    if !annotations.is_empty() {
        patch.insert("metadata".into(), json!({ "annotations": annotations }));
    }
    if condition && node.network_unavailable.as_deref() != Some("False") {
        patch.insert(
            "status".into(),
            json!({ "conditions": [{
                "type": "NetworkUnavailable",
                "status": "False",
                "reason": "FlannelIsUp",
                "message": "Flannel is running on this node",
                "lastTransitionTime": now,
                "lastHeartbeatTime": now,
            }]}),
        );
    }
    (!patch.is_empty()).then_some(Value::Object(patch))
}

#[cfg(test)]
mod tests;
