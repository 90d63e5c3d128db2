//! Who may have which subnet: two nodes that claim one are reported, not obeyed.
//!
//! The node's own subnet is never routed away, nor anything inside or around it. Of several peers that claim the
//! same addresses the first keeps them, of equally old claims the one with the lower name. The same goes for a
//! VXLAN device's hardware address, because the forwarding table has room for one owner only.

use crate::{
    mac::Mac,
    record::{Family, PeerEnd, Record},
};
use ipnetwork::IpNetwork;
use std::{
    collections::{BTreeMap, btree_map::Entry},
    fmt,
    net::IpAddr,
};

/// A peer's end that is not programmed, and why.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Conflict {
    /// The peer.
    pub peer: String,
    /// The subnet that it claims.
    pub subnet: IpNetwork,
    /// What stands against it.
    pub dispute: Dispute,
}

/// What stands against a claim.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Dispute {
    /// It is this node's subnet, lies inside it or around it.
    Ours(IpNetwork),
    /// Another peer had it, or a part of it, first.
    Taken {
        /// That peer.
        by: String,
        /// Its subnet.
        subnet: IpNetwork,
    },
    /// It is not part of the cluster's network: obeying would let one node take any address from all others.
    Outside(IpNetwork),
    /// Its VXLAN device has this node's hardware address.
    OurMac(Mac),
    /// Its VXLAN device has the hardware address of another peer, who had it first.
    MacTaken {
        /// That peer.
        by: String,
        /// The address.
        mac: Mac,
    },
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { peer, subnet, dispute } = self;
        match dispute {
            Dispute::Ours(own) if own == subnet => {
                write!(f, "node {peer} claims this node's subnet {subnet}")
            }
            Dispute::Ours(own) => {
                write!(f, "node {peer} claims {subnet}, which overlaps this node's subnet {own}")
            }
            Dispute::Taken { by, subnet: first } if first == subnet => {
                write!(f, "nodes {by} and {peer} both claim {subnet}; {by} keeps it")
            }
            Dispute::Taken { by, subnet: first } => {
                write!(f, "node {peer} claims {subnet}, which overlaps {first} of node {by}; {by} keeps it")
            }
            Dispute::Outside(network) => {
                write!(f, "node {peer} claims {subnet}, which is outside the cluster's network {network}")
            }
            Dispute::OurMac(mac) => {
                write!(f, "node {peer} has this node's VTEP address {mac}; its {subnet} is not routed")
            }
            Dispute::MacTaken { by, mac } => {
                write!(
                    f,
                    "nodes {by} and {peer} both have VTEP address {mac}; {by} keeps it, {subnet} of {peer} is not routed"
                )
            }
        }
    }
}

/// The ends of one family that may be programmed, by subnet, and the others with the reason.
pub(super) fn settle(
    record: &Record,
    family: Family,
    own: IpNetwork,
    network: IpNetwork,
    own_mac: Mac,
) -> (BTreeMap<IpNetwork, (&str, PeerEnd)>, Vec<Conflict>) {
    let mut claims: Vec<(&str, PeerEnd)> = record
        .peers
        .iter()
        .filter(|(name, _)| **name != record.node.node_name)
        .filter_map(|(name, peer)| Some((name.as_str(), *peer.ends.get(family)?)))
        .collect();
    claims.sort_by_key(|(name, end)| (end.since, *name));

    let mut settled = Settled::default();
    let mut conflicts = Vec::new();
    for (peer, end) in claims {
        let dispute = if overlap(end.subnet, own) {
            Some(Dispute::Ours(own))
        } else if !contains(network, end.subnet) {
            Some(Dispute::Outside(network))
        } else if end.vtep_mac == own_mac {
            Some(Dispute::OurMac(own_mac))
        } else {
            settled.add(peer, end)
        };
        conflicts.extend(dispute.map(|dispute| Conflict {
            peer: peer.to_owned(),
            subnet: end.subnet,
            dispute,
        }));
    }
    (settled.by_subnet, conflicts)
}

/// Claims that stand beside each other, found again by first address and by MAC.
#[derive(Default)]
struct Settled<'r> {
    by_subnet: BTreeMap<IpNetwork, (&'r str, PeerEnd)>,
    by_mac: BTreeMap<Mac, &'r str>,
}

impl<'r> Settled<'r> {
    /// Adds a claim, unless one is in its way.
    fn add(&mut self, peer: &'r str, end: PeerEnd) -> Option<Dispute> {
        // None of those that are there overlap, so that only the neighbours in order can.
        let before = self.by_subnet.range(..=end.subnet).next_back();
        let after = self.by_subnet.range(end.subnet..).next();
        if let Some((subnet, (by, _))) =
            before.into_iter().chain(after).find(|(other, _)| overlap(**other, end.subnet))
        {
            return Some(Dispute::Taken { by: (*by).to_owned(), subnet: *subnet });
        }
        match self.by_mac.entry(end.vtep_mac) {
            Entry::Occupied(taken) => {
                return Some(Dispute::MacTaken { by: (*taken.get()).to_owned(), mac: end.vtep_mac });
            }
            Entry::Vacant(free) => free.insert(peer),
        };
        self.by_subnet.insert(end.subnet, (peer, end));
        None
    }
}

/// One lies in the other. Two subnets cannot overlap otherwise.
pub(super) fn overlap(one: IpNetwork, other: IpNetwork) -> bool {
    contains(one, other) || contains(other, one)
}

/// `outer` has every address of `inner`.
pub(super) fn contains(outer: IpNetwork, inner: IpNetwork) -> bool {
    outer.prefix() <= inner.prefix() && covers(outer, inner.network())
}

/// `network` has the address; never across families.
pub(super) fn covers(network: IpNetwork, address: IpAddr) -> bool {
    network.is_ipv4() == address.is_ipv4() && network.contains(address)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Peer, PerFamily};

    fn net(text: &str) -> IpNetwork {
        text.parse().unwrap()
    }

    /// name, subnet, last byte of the MAC, age of the claim
    fn settled(peers: &[(&str, &str, u8, u64)]) -> (Vec<String>, Vec<String>) {
        let mut record = Record::default();
        record.node.node_name = "me".into();
        for (name, subnet, mac, since) in peers {
            let vtep_mac = Mac([2, 0, 0, 0, 0, *mac]);
            let public_ip = [192, 168, 0, *mac].into();
            let end = PeerEnd { subnet: net(subnet), public_ip, vtep_mac, since: *since };
            let peer = Peer { name: (*name).into(), ends: PerFamily { v4: Some(end), v6: None } };
            record.peers.insert(peer.name.clone(), peer);
        }
        let own_mac = Mac([2, 0, 0, 0, 0, 99]);
        let (good, bad) = settle(&record, Family::V4, net("10.244.1.0/24"), net("10.244.0.0/16"), own_mac);
        let good = good.iter().map(|(subnet, (name, _))| format!("{subnet} {name}")).collect();
        (good, bad.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn peaceful_neighbours() {
        let (good, bad) = settled(&[
            ("a", "10.244.2.0/24", 2, 1),
            ("b", "10.244.3.0/24", 3, 1),
            ("c", "10.244.0.0/24", 4, 1),
        ]);
        assert_eq!(good, ["10.244.0.0/24 c", "10.244.2.0/24 a", "10.244.3.0/24 b"]);
        assert!(bad.is_empty());
    }

    #[test]
    fn ours_is_never_routed_away() {
        for (claim, said) in [
            ("10.244.1.0/24", "claims this node's subnet 10.244.1.0/24"),
            ("10.244.1.128/25", "overlaps this node's subnet"),
            ("10.244.0.0/23", "overlaps this node's subnet"),
            ("0.0.0.0/0", "overlaps this node's subnet"),
            ("192.168.0.0/16", "outside the cluster's network"),
            ("10.245.0.0/24", "outside the cluster's network"),
        ] {
            let (good, bad) = settled(&[("a", claim, 2, 1)]);
            assert!(good.is_empty() && bad[0].contains(said), "{claim}: {bad:?}");
        }
        // Our own Node among the peers is none of them.
        assert_eq!(settled(&[("me", "10.244.1.0/24", 99, 1)]), (vec![], vec![]));
    }

    #[test]
    fn the_first_claim_stays() {
        let (good, bad) = settled(&[("a", "10.244.2.0/24", 2, 5), ("b", "10.244.2.0/24", 3, 4)]);
        assert_eq!(good, ["10.244.2.0/24 b"]);
        assert_eq!(bad, ["nodes b and a both claim 10.244.2.0/24; b keeps it"]);
        let (good, _) = settled(&[("b", "10.244.2.0/24", 2, 1), ("a", "10.244.2.0/24", 3, 1)]);
        assert_eq!(good, ["10.244.2.0/24 a"], "both new: the lower name");
    }

    #[test]
    fn a_subnet_inside_anothers() {
        for (first, second) in [("10.244.2.0/24", "10.244.2.128/25"), ("10.244.2.64/26", "10.244.2.0/24")] {
            let (good, bad) =
                settled(&[("a", first, 2, 1), ("x", "10.244.9.0/24", 9, 1), ("b", second, 3, 2)]);
            assert_eq!((good.len(), bad.len()), (2, 1), "{bad:?}");
            assert!(bad[0].contains("node b claims") && bad[0].contains("a keeps it"), "{bad:?}");
        }
    }

    #[test]
    fn a_cloned_device() {
        let (good, bad) = settled(&[
            ("a", "10.244.2.0/24", 2, 1),
            ("b", "10.244.3.0/24", 2, 2),
            ("c", "10.244.4.0/24", 99, 1),
        ]);
        assert_eq!(good, ["10.244.2.0/24 a"]);
        assert!(bad.iter().any(|bad| bad.contains("nodes a and b both have VTEP address")), "{bad:?}");
        assert!(bad.iter().any(|bad| bad.contains("node c has this node's VTEP address")), "{bad:?}");
    }
}
