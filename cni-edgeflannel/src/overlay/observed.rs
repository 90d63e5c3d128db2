//! What the kernel and /run have, as far as the overlay is concerned. Plain data, filled by `kernel`.

use crate::{
    mac::Mac,
    record::{Family, PerFamily},
    subnet_env::without_host,
};
use ipnetwork::IpNetwork;
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

/// Everything that [`super::plan`] compares.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observed {
    /// The devices named flannel.VNI and flannel-v6.VNI, with what is on them.
    pub devices: PerFamily<DeviceSeen>,
    /// Routes of the main table.
    pub routes: BTreeSet<RouteSeen>,
    /// Values by key, of the settings that [`super::Desired::sysctls`] names. Those that do not exist are absent.
    pub sysctls: BTreeMap<String, String>,
    /// The comments of our chains' rules, of the chains that are there.
    pub chains: BTreeMap<String, Vec<String>>,
    /// The text of subnet.env; `None` when there is none.
    pub subnet_env: Option<String>,
}

/// A device and what is on it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceSeen {
    /// The device itself.
    pub link: LinkSeen,
    /// Its addresses, but for link-local ones, with the prefix length.
    pub addresses: BTreeSet<IpNetwork>,
    /// Permanent neighbours of its family.
    pub neighbours: BTreeMap<IpAddr, Mac>,
    /// Permanent forwarding entries. One address may lead to several places.
    pub fdb: BTreeSet<(Mac, IpAddr)>,
}

/// A device of one of our names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkSeen {
    /// Number.
    pub index: u32,
    /// Hardware address.
    pub mac: Option<Mac>,
    /// MTU.
    pub mtu: u32,
    /// Administratively up.
    pub up: bool,
    /// What it is as a VXLAN; `None` when it is something else.
    pub vxlan: Option<VxlanSeen>,
    /// Whether tx-checksum-ip-generic is on; `None` when nobody asked.
    pub tx_checksum: Option<bool>,
}

/// A VXLAN's own attributes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct VxlanSeen {
    /// Its number.
    pub vni: u32,
    /// UDP port.
    pub port: u16,
    /// The interface below; 0 when it has none.
    pub link: u32,
    /// The outer source address.
    pub local: Option<IpAddr>,
    /// Learns addresses from traffic.
    pub learning: bool,
    /// Group based policy.
    pub gbp: bool,
    /// A remote or a multicast group that unknown addresses go to. Ours has none.
    pub group: Option<IpAddr>,
    /// Asks for unknown addresses over netlink. Ours does not.
    pub misses: bool,
}

/// A unicast route of the main table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct RouteSeen {
    /// Where to.
    pub dst: IpNetwork,
    /// Its metric: 0 in IPv4 and 1024 in IPv6 unless asked otherwise.
    pub metric: u32,
    /// The next hop.
    pub gateway: Option<IpAddr>,
    /// The device; `None` for several next hops, or none.
    pub device: Option<u32>,
    /// The next hop is taken to be on the device's network.
    pub onlink: bool,
    /// Who made it: `RTPROT_*`.
    pub protocol: u8,
    /// Scope `global`.
    pub global: bool,
}

impl RouteSeen {
    /// `RTPROT_BOOT`: what a route has that no one said more about; flannel's have it.
    pub const PROTOCOL: u8 = 3;

    /// The metric that a route gets when none is asked for.
    #[must_use]
    pub fn default_metric(family: Family) -> u32 {
        match family {
            Family::V4 => 0,
            Family::V6 => 1024,
        }
    }
}

/// Where the main table sends packets, without the overlay: is an address reachable without a gateway?
///
/// flannel asks the kernel for each peer (`DirectRouting` in `flannel/pkg/ip/iface.go`); the longest prefix of
/// the main table gives the same answer for all of them at once. Rules that look into other tables are not seen.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OnLink {
    /// By prefix length, then destination: the best metric, and whether that route has no gateway.
    routes: BTreeMap<u8, BTreeMap<IpNetwork, (u32, bool)>>,
}

impl OnLink {
    /// From the main table's routes, but for those through the given devices (our own).
    #[must_use]
    pub fn new<'r>(routes: impl IntoIterator<Item = &'r RouteSeen>, ours: &[u32]) -> Self {
        let mut table: BTreeMap<u8, BTreeMap<IpNetwork, (u32, bool)>> = BTreeMap::new();
        for route in
            routes.into_iter().filter(|route| route.device.is_none_or(|device| !ours.contains(&device)))
        {
            let direct = route.gateway.is_none() && route.device.is_some();
            let best =
                table.entry(route.dst.prefix()).or_default().entry(route.dst).or_insert((u32::MAX, false));
            if route.metric < best.0 {
                *best = (route.metric, direct);
            }
        }
        Self { routes: table }
    }

    /// Whether packets to the address need no gateway.
    #[must_use]
    pub fn reaches(&self, address: IpAddr) -> bool {
        let longest = self.routes.iter().rev().find_map(|(prefix, routes)| {
            let net = IpNetwork::new(address, *prefix).ok()?;
            routes.get(&without_host(net))
        });
        longest.is_some_and(|(_, direct)| *direct)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_prefix_decides() {
        let route = |dst: &str, metric, gateway: Option<&str>, device| RouteSeen {
            dst: dst.parse().unwrap(),
            metric,
            gateway: gateway.map(|ip| ip.parse().unwrap()),
            device: Some(device),
            onlink: false,
            protocol: 2,
            global: true,
        };
        let routes = [
            route("0.0.0.0/0", 100, Some("192.168.0.1"), 2),
            route("192.168.0.0/24", 100, None, 2),
            route("192.168.0.128/25", 0, Some("192.168.0.1"), 2),
            route("192.168.0.64/26", 600, Some("192.168.0.1"), 3),
            route("192.168.0.64/26", 100, None, 2),
            route("10.244.2.0/24", 0, None, 9),
        ];
        let table = OnLink::new(&routes, &[9]);
        for (address, direct) in [
            ("192.168.0.7", true),
            ("192.168.0.200", false),
            ("192.168.0.65", true),
            ("8.8.8.8", false),
            ("10.244.2.1", false),
            ("fd00::1", false),
        ] {
            assert_eq!(table.reaches(address.parse().unwrap()), direct, "{address}");
        }
    }
}
