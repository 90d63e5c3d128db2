//! What the node's part of the overlay should be, from its record and the interface below. Pure.
//!
//! The attributes are flannel's (`flannel/pkg/backend/vxlan`), so that a node can be handed from flanneld to us
//! and back without anything being made anew, and stock peers are reached as they expect.

use super::{
    DEFAULT_PORT,
    claims::{Conflict, settle},
    device_name, masquerade,
    observed::OnLink,
    overhead, vtep,
};
use crate::{
    mac::Mac,
    nft::Chain,
    record::{Family, NodeRecord, PeerEnd, PerFamily, Record, Underlay},
    subnet_env::SubnetEnv,
    sysctl::Sysctl,
};
use ipnetwork::IpNetwork;
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

/// Of an interface nobody has seen yet.
const ETHERNET_MTU: u32 = 1500;

/// What should be.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Desired {
    /// The devices with all that is on them. A family that is in use but whose lower interface is not there
    /// (yet) has none: what the kernel has of it is left alone until it is.
    pub devices: PerFamily<Device>,
    /// Devices that must not be there: the family is no longer in use.
    pub unwanted: PerFamily<String>,
    /// Kernel settings, in order.
    pub sysctls: Vec<Sysctl>,
    /// The setting by which the interface below heeds router advertisements: at 1 the kernel stops doing so as
    /// soon as it forwards, and the node would lose its way out.
    pub accept_ra: Option<String>,
    /// Rules in our table.
    pub chains: Vec<Chain>,
    /// What the CNI plugin is told; `None` while the node has no subnet.
    pub subnet_env: Option<SubnetEnv>,
    /// The interface below, whose direct routes are ours too when DirectRouting is on.
    pub direct: Option<Direct>,
    /// Peers that are not obeyed.
    pub conflicts: Vec<Conflict>,
}

/// Where direct routes are looked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Direct {
    /// The interface below.
    pub ifindex: u32,
    /// The cluster's networks; routes that are not inside are nobody's of ours.
    pub networks: PerFamily<IpNetwork>,
    /// This node's own subnets.
    pub subnets: PerFamily<IpNetwork>,
}

/// A VXLAN device and what belongs on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Name.
    pub name: String,
    /// VXLAN number.
    pub vni: u32,
    /// UDP port.
    pub port: u16,
    /// Number of the interface below.
    pub link: u32,
    /// Outer source address.
    pub local: IpAddr,
    /// Learns addresses from traffic.
    pub learning: bool,
    /// Group based policy.
    pub gbp: bool,
    /// Hardware address.
    pub mac: Mac,
    /// MTU.
    pub mtu: u32,
    /// Its only address: the first one of the node's subnet, with full prefix length, so that no broadcast
    /// route comes of it.
    pub address: IpNetwork,
    /// Switch tx-checksum-ip-generic off (flannel#1279: NICs that write wrong inner checksums).
    pub disable_tx_checksum: bool,
    /// What leads to the peers.
    pub entries: Entries,
}

/// What leads to the peers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Entries {
    /// First address of a peer's subnet -> its VXLAN device's hardware address.
    pub neighbours: BTreeMap<IpAddr, Mac>,
    /// That hardware address -> the peer's public address.
    pub fdb: BTreeMap<Mac, IpAddr>,
    /// A peer's subnet -> the next hop.
    pub routes: BTreeMap<IpNetwork, Hop>,
}

/// The way to a peer's subnet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hop {
    /// Through the VXLAN, onlink, by the first address of its subnet.
    Vxlan(IpAddr),
    /// By its public address, in the same layer 2 network.
    Direct(IpAddr),
}

/// What should be. `on_link` is asked only when DirectRouting is on.
#[must_use]
pub fn desired(record: &Record, underlay: Option<&Underlay>, on_link: &OnLink) -> Desired {
    let node = &record.node;
    let used = |family| Some((*node.subnets.get(family)?, *node.networks.get(family)?));
    // Without any lease nothing is known about this node; nothing is made and nothing is taken away.
    if Family::ALL.into_iter().all(|family| used(family).is_none()) {
        return Desired::default();
    }
    let mut wanted = Desired {
        chains: masquerade::chains(node),
        sysctls: sysctls(node, underlay),
        subnet_env: Some(subnet_env(node, underlay)),
        accept_ra: underlay.map(|below| format!("net/ipv6/conf/{}/accept_ra", below.name)),
        ..Desired::default()
    };
    for family in Family::ALL {
        let name = device_name(family, node.backend.vni);
        let Some((subnet, network)) = used(family) else {
            *wanted.unwanted.slot(family) = Some(name);
            continue;
        };
        let mac = vtep_mac(node, family);
        let (peers, conflicts) = settle(record, family, subnet, network, mac);
        wanted.conflicts.extend(conflicts);
        let Some((underlay, local)) = underlay.and_then(|below| Some((below, *below.local_ips.get(family)?)))
        else {
            continue;
        };
        let direct = |end: &PeerEnd| node.backend.direct_routing && on_link.reaches(end.public_ip);
        *wanted.devices.slot(family) = Some(Device {
            name,
            vni: node.backend.vni,
            port: if node.backend.port == 0 { DEFAULT_PORT } else { node.backend.port },
            link: underlay.ifindex,
            local,
            learning: node.backend.learning,
            gbp: node.backend.gbp,
            mac,
            mtu: device_mtu(node, family, underlay.mtu),
            address: single(subnet.network(), family),
            disable_tx_checksum: node.disable_tx_checksum,
            entries: entries(peers.values().map(|(_, end)| end), direct),
        });
    }
    if node.backend.direct_routing {
        wanted.direct = underlay.map(|below| Direct {
            ifindex: below.ifindex,
            networks: node.networks,
            subnets: node.subnets,
        });
    }
    wanted
}

/// The hardware address of a family's device.
#[must_use]
pub fn vtep_mac(node: &NodeRecord, family: Family) -> Mac {
    let known = vtep::Known { recorded: node.vtep_macs.get(family).copied(), ..vtep::Known::default() };
    vtep::choose(known, &node.node_name, family)
}

fn entries<'r>(peers: impl Iterator<Item = &'r PeerEnd>, direct: impl Fn(&PeerEnd) -> bool) -> Entries {
    let mut entries = Entries::default();
    for end in peers {
        let base = end.subnet.network();
        if direct(end) {
            entries.routes.insert(end.subnet, Hop::Direct(end.public_ip));
        } else {
            entries.neighbours.insert(base, end.vtep_mac);
            entries.fdb.insert(end.vtep_mac, end.public_ip);
            entries.routes.insert(end.subnet, Hop::Vxlan(base));
        }
    }
    entries
}

/// flannel's rule is "the interface's, or the configured one, less 50" for both families. The kernel never lets
/// a VXLAN have more than the interface below leaves it, so neither do we.
fn device_mtu(node: &NodeRecord, family: Family, underlay: u32) -> u32 {
    let below = match node.backend.mtu {
        0 => underlay,
        configured => configured.min(underlay),
    };
    below.saturating_sub(overhead(family))
}

fn subnet_env(node: &NodeRecord, underlay: Option<&Underlay>) -> SubnetEnv {
    let below = match (underlay, node.underlay_mtu) {
        (Some(underlay), _) => underlay.mtu,
        (None, 0) => ETHERNET_MTU,
        (None, last) => last,
    };
    let used: BTreeSet<Family> = node.subnets.iter().map(|(family, _)| family).collect();
    let used = || used.iter().copied().filter(|family| node.networks.get(*family).is_some());
    let mtu = used().map(|family| device_mtu(node, family, below)).min();
    SubnetEnv {
        networks: used().filter_map(|family| node.networks.get(family).copied()).collect(),
        subnets: used().filter_map(|family| node.subnets.get(family).copied()).collect(),
        mtu: mtu.unwrap_or(below),
        ip_masq: node.ip_masq,
    }
}

/// Forwarding, which flannel expects of the host, and what keeps router advertisements off our devices.
fn sysctls(node: &NodeRecord, underlay: Option<&Underlay>) -> Vec<Sysctl> {
    let mut wanted = Vec::new();
    for family in Family::ALL {
        if node.subnets.get(family).is_none() || node.networks.get(family).is_none() {
            continue;
        }
        match family {
            Family::V4 => wanted.push(Sysctl::new("net/ipv4/ip_forward", "1")),
            Family::V6 => wanted.push(Sysctl::new("net/ipv6/conf/all/forwarding", "1")),
        }
        if underlay.is_some_and(|below| below.local_ips.get(family).is_some()) {
            let device = device_name(family, node.backend.vni);
            if family == Family::V6 {
                wanted.push(Sysctl::new(format!("net/ipv6/conf/{device}/disable_ipv6"), "0"));
            }
            wanted.push(Sysctl::optional(format!("net/ipv6/conf/{device}/accept_ra"), "0"));
        }
    }
    wanted
}

fn single(address: IpAddr, family: Family) -> IpNetwork {
    IpNetwork::new(address, family.bits()).unwrap_or_else(|_| IpNetwork::from(address))
}
