//! What a node must know to come back by itself: its own part of the overlay, and every peer's.
//!
//! Written to the node's own disk before it is acted upon ([`store`]), so that after a reboot the overlay can be
//! built with nobody to ask. The API server refines it; a record is never thrown away because of silence.
//! Everything here is plain data: no clock, no disk, no kernel.

pub mod store;
mod tables;

pub use store::{Loaded, RecordStore, StoreError};

use crate::mac::Mac;
use ipnetwork::IpNetwork;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
    path::PathBuf,
};

/// IPv4 or IPv6. Flannel keeps a device, an annotation and a lease for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// IPv4
    V4,
    /// IPv6
    V6,
}

impl Family {
    /// Both, in the order in which lists name them.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// The family of an address.
    #[must_use]
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    /// The family of a subnet.
    #[must_use]
    pub fn of_subnet(subnet: IpNetwork) -> Self {
        Self::of(subnet.ip())
    }

    /// 32 or 128: the prefix length of a single address.
    #[must_use]
    pub fn bits(self) -> u8 {
        match self {
            Self::V4 => 32,
            Self::V6 => 128,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// Something that exists once per family, or not at all in one of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default)]
pub struct PerFamily<T> {
    /// IPv4's
    #[serde(skip_serializing_if = "Option::is_none")]
    pub v4: Option<T>,
    /// IPv6's
    #[serde(skip_serializing_if = "Option::is_none")]
    pub v6: Option<T>,
}

impl<T> Default for PerFamily<T> {
    fn default() -> Self {
        Self { v4: None, v6: None }
    }
}

impl<T> PerFamily<T> {
    /// The one of a family.
    #[must_use]
    pub fn get(&self, family: Family) -> Option<&T> {
        match family {
            Family::V4 => self.v4.as_ref(),
            Family::V6 => self.v6.as_ref(),
        }
    }

    /// The place of a family's.
    pub fn slot(&mut self, family: Family) -> &mut Option<T> {
        match family {
            Family::V4 => &mut self.v4,
            Family::V6 => &mut self.v6,
        }
    }

    /// Those that exist, IPv4 first.
    pub fn iter(&self) -> impl Iterator<Item = (Family, &T)> {
        Family::ALL.into_iter().filter_map(|family| Some((family, self.get(family)?)))
    }

    /// Neither family has one.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.v4.is_none() && self.v6.is_none()
    }

    /// The same for every one that exists.
    pub fn map<U>(&self, mut each: impl FnMut(Family, &T) -> U) -> PerFamily<U> {
        PerFamily {
            v4: self.v4.as_ref().map(|one| each(Family::V4, one)),
            v6: self.v6.as_ref().map(|one| each(Family::V6, one)),
        }
    }
}

/// The family is the value's own; a second value of one family replaces the first.
impl FromIterator<IpAddr> for PerFamily<IpAddr> {
    fn from_iter<I: IntoIterator<Item = IpAddr>>(all: I) -> Self {
        let mut found = Self::default();
        all.into_iter().for_each(|one| *found.slot(Family::of(one)) = Some(one));
        found
    }
}

impl FromIterator<IpNetwork> for PerFamily<IpNetwork> {
    fn from_iter<I: IntoIterator<Item = IpNetwork>>(all: I) -> Self {
        let mut found = Self::default();
        all.into_iter().for_each(|one| *found.slot(Family::of_subnet(one)) = Some(one));
        found
    }
}

/// This node, as it last was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeRecord {
    /// Its name in the cluster.
    pub node_name: String,
    /// The kernel's host name when this was written; see [`Self::is_of_host`].
    pub host_name: String,
    /// Its part of the cluster's network (`spec.podCIDRs`), host bits zero.
    pub subnets: PerFamily<IpNetwork>,
    /// The cluster's networks (net-conf.json `Network`, `IPv6Network`), host bits zero.
    pub networks: PerFamily<IpNetwork>,
    /// How nodes are connected (net-conf.json `Backend`).
    pub backend: Backend,
    /// The hardware address of flannel.VNI and of flannel-v6.VNI. Kept for both families as soon as known,
    /// whether or not the family is in use.
    pub vtep_macs: PerFamily<Mac>,
    /// What it publishes as its address (`public-ip`, `public-ipv6`), overwritten ones included.
    pub public_ips: PerFamily<IpAddr>,
    /// Its own address below the VXLAN (`local`). It stays while the interface has it.
    pub local_ips: PerFamily<IpAddr>,
    /// How the interface below is found.
    pub underlay: UnderlayChoice,
    /// The MTU that interface last had; 0 when it was never seen. Pods are wired by it while it is missing.
    pub underlay_mtu: u32,
    /// `--ip-masq`: traffic that leaves the overlay gets the node's address.
    pub ip_masq: bool,
    /// Masquerade with a fully random port (not `--ip-masq-fully-random-disable`).
    pub random_fully: bool,
    /// Accept forwarded packets of the overlay (`--iptables-forward-rules`).
    pub forward_rules: bool,
    /// `--disable-tx-checksum`: switch tx-checksum-ip-generic off on the devices.
    pub disable_tx_checksum: bool,
    /// `--kube-annotation-prefix`
    pub annotation_prefix: String,
    /// Where subnet.env is written.
    pub subnet_file: PathBuf,
}

impl Default for NodeRecord {
    /// Flannel's defaults, and a node that has nothing yet.
    fn default() -> Self {
        Self {
            node_name: String::new(),
            host_name: String::new(),
            subnets: PerFamily::default(),
            networks: PerFamily::default(),
            backend: Backend::default(),
            vtep_macs: PerFamily::default(),
            public_ips: PerFamily::default(),
            local_ips: PerFamily::default(),
            underlay: UnderlayChoice::default(),
            underlay_mtu: 0,
            ip_masq: false,
            random_fully: true,
            forward_rules: true,
            disable_tx_checksum: false,
            annotation_prefix: "flannel.alpha.coreos.com".into(),
            subnet_file: "/run/flannel/subnet.env".into(),
        }
    }
}

impl NodeRecord {
    /// Whether the record may be used on a machine of this host name. A cloned disk wakes up under another
    /// name and must not claim the first machine's subnet. A host name that nobody has set yet says nothing.
    #[must_use]
    pub fn is_of_host(&self, host_name: &str) -> bool {
        let known = |name: &str| !matches!(name, "" | "localhost" | "(none)");
        !known(host_name) || !known(&self.host_name) || self.host_name.eq_ignore_ascii_case(host_name)
    }
}

/// flannel's VXLAN backend (net-conf.json, `Backend`; `flannel/Documentation/backends.md`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Backend {
    /// The VXLAN's number, also the device's: flannel.VNI.
    pub vni: u32,
    /// UDP port; 0 is the kernel's own default, 8472.
    pub port: u16,
    /// Group based policy.
    pub gbp: bool,
    /// The device learns addresses from traffic.
    pub learning: bool,
    /// Peers in the same layer 2 get a plain route.
    pub direct_routing: bool,
    /// Of the interface below, where it shall not be asked; 0 is "ask".
    pub mtu: u32,
}

impl Default for Backend {
    fn default() -> Self {
        Self { vni: 1, port: 0, gbp: false, learning: false, direct_routing: false, mtu: 0 }
    }
}

/// Which interface carries the VXLAN: the first choice that matches, else the one of the default route.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct UnderlayChoice {
    /// `--iface`: names or addresses, the first that exists.
    pub ifaces: Vec<String>,
    /// `--iface-regex`
    pub iface_regexes: Vec<String>,
    /// `--iface-can-reach`
    pub can_reach: Option<IpAddr>,
    /// `--public-ip`, `--public-ipv6`, or the annotations `node-public-ip`, `node-public-ipv6`.
    pub public_ips: PerFamily<IpAddr>,
}

/// The interface that carries the VXLAN, as the choice found it in the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Underlay {
    /// Its index, the VXLAN's `dev`.
    pub ifindex: u32,
    /// Its name, for messages.
    pub name: String,
    /// Its MTU.
    pub mtu: u32,
    /// The node's own address on it per family, the VXLAN's `local`.
    pub local_ips: PerFamily<IpAddr>,
}

/// Another node of the overlay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// Its name in the cluster.
    pub name: String,
    /// Its end of the overlay, per family.
    pub ends: PerFamily<PeerEnd>,
}

/// What is needed to reach a peer's pods of one family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerEnd {
    /// Its part of the cluster's network, host bits zero.
    pub subnet: IpNetwork,
    /// Its public address of this family.
    pub public_ip: IpAddr,
    /// The hardware address of its VXLAN device.
    pub vtep_mac: Mac,
    /// When it first claimed the subnet, counted, not timed: of two nodes that claim one subnet the earlier one
    /// keeps it. Set by [`Record::put_peer`].
    #[serde(default)]
    pub since: u64,
}

/// All that the node keeps.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Record {
    /// Itself.
    pub node: NodeRecord,
    /// The others, by name.
    pub peers: BTreeMap<String, Peer>,
}

/// What was altered since the record was last saved.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// The node itself.
    pub node: bool,
    /// Peers put or removed, by name.
    pub peers: BTreeSet<String>,
}

impl Changes {
    /// Nothing to save.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        !self.node && self.peers.is_empty()
    }

    /// Adds what was altered later.
    pub fn merge(&mut self, later: Self) {
        self.node |= later.node;
        self.peers.extend(later.peers);
    }
}

impl Record {
    /// The number for claims that are made now: all claims that arrive together share one.
    #[must_use]
    pub fn next_claim(&self) -> u64 {
        let claims = self.peers.values().flat_map(|peer| peer.ends.iter()).map(|(_, end)| end.since);
        claims.max().map_or(1, |latest| latest + 1)
    }

    /// Adds a peer or replaces what is known about it, noting in `changes` whether anything did change.
    /// An end whose subnet stays keeps its claim; a new one is made at `claim` ([`Self::next_claim`]).
    pub fn put_peer(&mut self, mut peer: Peer, claim: u64, changes: &mut Changes) {
        let known = self.peers.get(&peer.name);
        for family in Family::ALL {
            let before = known.and_then(|known| known.ends.get(family));
            if let Some(end) = peer.ends.slot(family) {
                end.since = match before {
                    Some(before) if before.subnet == end.subnet => before.since,
                    _ => claim,
                };
            }
        }
        if known != Some(&peer) {
            changes.peers.insert(peer.name.clone());
            self.peers.insert(peer.name.clone(), peer);
        }
    }

    /// Forgets a peer, noting in `changes` whether there was one.
    pub fn remove_peer(&mut self, name: &str, changes: &mut Changes) {
        if self.peers.remove(name).is_some() {
            changes.peers.insert(name.to_owned());
        }
    }

    /// Replaces what is known about the node itself.
    pub fn put_node(&mut self, node: NodeRecord, changes: &mut Changes) {
        if self.node != node {
            self.node = node;
            changes.node = true;
        }
    }
}

impl Serialize for Mac {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Mac {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        text.parse().map_err(|bad| de::Error::custom(format_args!("hardware address {text:?}: {bad}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(name: &str, subnet: &str) -> Peer {
        let end = PeerEnd {
            subnet: subnet.parse().unwrap(),
            public_ip: "192.168.0.2".parse().unwrap(),
            vtep_mac: Mac([2, 0, 0, 0, 0, 1]),
            since: 0,
        };
        Peer { name: name.into(), ends: PerFamily { v4: Some(end), v6: None } }
    }

    fn since(record: &Record, name: &str) -> u64 {
        record.peers[name].ends.v4.unwrap().since
    }

    #[test]
    fn a_claim_is_as_old_as_its_subnet() {
        let (mut record, mut changes) = (Record::default(), Changes::default());
        let claim = record.next_claim();
        record.put_peer(peer("a", "10.244.1.0/24"), claim, &mut changes);
        record.put_peer(peer("b", "10.244.2.0/24"), claim, &mut changes);
        assert_eq!((since(&record, "a"), since(&record, "b")), (1, 1));
        assert_eq!(changes.peers.len(), 2);

        let mut changes = Changes::default();
        record.put_peer(peer("a", "10.244.1.0/24"), record.next_claim(), &mut changes);
        assert!(changes.is_empty(), "the same again is no change");
        record.put_peer(peer("a", "10.244.2.0/24"), record.next_claim(), &mut changes);
        assert_eq!((since(&record, "a"), since(&record, "b")), (2, 1));
        record.remove_peer("b", &mut changes);
        record.remove_peer("c", &mut changes);
        assert_eq!(changes.peers, ["a", "b"].map(String::from).into());
    }

    #[test]
    fn a_cloned_disk_is_told_by_the_host_name() {
        let of = |written: &str, now: &str| {
            NodeRecord { host_name: written.into(), ..NodeRecord::default() }.is_of_host(now)
        };
        assert!(of("edge-1", "edge-1") && of("Edge-1", "edge-1"));
        assert!(!of("edge-1", "edge-2"));
        for unknown in ["", "localhost", "(none)"] {
            assert!(of("edge-1", unknown) && of(unknown, "edge-2"), "{unknown}");
        }
    }

    #[test]
    fn a_record_of_a_later_version_of_this_schema_is_readable() {
        let node: NodeRecord = serde_json::from_str(r#"{"node_name":"n","added_later":1}"#).unwrap();
        assert_eq!(node, NodeRecord { node_name: "n".into(), ..NodeRecord::default() });
        let json = serde_json::to_string(&peer("a", "10.244.1.0/24")).unwrap();
        assert_eq!(serde_json::from_str::<Peer>(&json).unwrap(), peer("a", "10.244.1.0/24"));
    }
}
