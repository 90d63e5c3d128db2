//! CHECK: what an attachment should look like by the result that was given for it, what it looks like, and
//! every difference by its name. Comparing touches nothing.
//!
//! The result is the one that the runtime kept, after all chained plugins: where `tuning` has changed the pod's
//! hardware address or MTU, the result says so, and that is what is compared with.

use super::{
    names,
    plan::SeenBridge,
    wanted::{Subject, forwarding},
};
use crate::{
    config::Config,
    mac::Mac,
    masquerade,
    netlink::Link,
    nft::Chain,
    subnet_env::{SubnetEnv, without_host},
    sysctl::Sysctl,
};
use cni::{Interface, Route, Success};
use ipnetwork::IpNetwork;
use std::{fmt, net::IpAddr};

/// What should be there.
#[derive(Debug, Clone, PartialEq)]
pub struct Expected {
    /// Name and hardware address of the bridge.
    pub bridge: (String, Option<Mac>),
    /// Its addresses.
    pub gateways: Vec<IpNetwork>,
    /// It takes every frame.
    pub promiscuous: bool,
    /// Name of the host's end.
    pub host: String,
    /// Setting of the host's end.
    pub hairpin: bool,
    /// The pod's end: name, hardware address, MTU.
    pub pod: (String, Option<Mac>, Option<u32>),
    /// The pod's addresses.
    pub addresses: Vec<IpNetwork>,
    /// The pod's routes, each with its gateway.
    pub routes: Vec<Route>,
    /// The network's rules.
    pub masquerade: Option<Chain>,
    /// Settings of the node.
    pub forwarding: Vec<Sysctl>,
}

/// What is there.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Observed {
    /// The bridge.
    pub bridge: Option<SeenBridge>,
    /// The host's end.
    pub host: Option<Link>,
    /// The pod's end.
    pub pod: Option<Link>,
    /// The pod's addresses.
    pub addresses: Vec<IpNetwork>,
    /// The pod's routes.
    pub routes: Vec<Route>,
    /// Comments of the rules in the network's chain.
    pub rules: Vec<String>,
    /// Settings of the node that do not hold.
    pub unset: Vec<Sysctl>,
}

/// One difference.
#[derive(Debug, Clone, PartialEq)]
pub enum Drift {
    /// The bridge is gone.
    BridgeMissing(String),
    /// The bridge is down.
    BridgeDown(String),
    /// The bridge has another hardware address: pods' ARP caches point nowhere.
    BridgeMac(Mac, Option<Mac>),
    /// Promiscuous or not, against the configuration.
    BridgePromiscuous(bool),
    /// The bridge lacks a gateway address.
    GatewayMissing(IpNetwork),
    /// The host's end is gone.
    HostMissing(String),
    /// The host's end is no port of the bridge.
    HostOffBridge(String),
    /// The host's end is down.
    HostDown(String),
    /// Hairpin mode against the configuration.
    HostHairpin(String, bool),
    /// The pod's interface is gone.
    PodMissing(String),
    /// The pod's interface is down.
    PodDown(String),
    /// The pod's interface belongs to another veth pair.
    PodElsewhere(String),
    /// The pod's interface has another hardware address.
    PodMac(Mac, Option<Mac>),
    /// The pod's interface has another MTU.
    PodMtu(u32, u32),
    /// The pod lacks an address.
    AddressMissing(IpNetwork),
    /// The pod lacks a route.
    RouteMissing(IpNetwork, Option<IpAddr>),
    /// The rules are not there, or not as they were made.
    Masquerade(String),
    /// A setting of the node has been switched off.
    Setting(Sysctl),
}

impl fmt::Display for Drift {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let other = |mac: &Option<Mac>| mac.map_or_else(|| "none".to_owned(), |mac| mac.to_string());
        match self {
            Self::BridgeMissing(name) => write!(f, "bridge {name} is missing"),
            Self::BridgeDown(name) => write!(f, "bridge {name} is down"),
            Self::BridgeMac(wanted, is) => {
                write!(f, "the bridge's hardware address is {}, not {wanted}", other(is))
            }
            Self::BridgePromiscuous(wanted) => write!(f, "the bridge's promiscuous mode is not {wanted}"),
            Self::GatewayMissing(cidr) => write!(f, "the bridge lacks the gateway address {cidr}"),
            Self::HostMissing(name) => write!(f, "{name}, the host's end of the veth, is missing"),
            Self::HostOffBridge(name) => write!(f, "{name} is not a port of the bridge"),
            Self::HostDown(name) => write!(f, "{name} is down"),
            Self::HostHairpin(name, wanted) => write!(f, "hairpin mode of {name} is not {wanted}"),
            Self::PodMissing(name) => write!(f, "{name} is missing in the container"),
            Self::PodDown(name) => write!(f, "{name} is down in the container"),
            Self::PodElsewhere(name) => {
                write!(f, "{name} in the container is not connected to the host's end")
            }
            Self::PodMac(wanted, is) => {
                write!(f, "the container's hardware address is {}, not {wanted}", other(is))
            }
            Self::PodMtu(wanted, is) => write!(f, "the container's MTU is {is}, not {wanted}"),
            Self::AddressMissing(cidr) => write!(f, "the container lacks the address {cidr}"),
            Self::RouteMissing(dst, Some(gw)) => write!(f, "the container lacks the route {dst} via {gw}"),
            Self::RouteMissing(dst, None) => write!(f, "the container lacks the route {dst}"),
            Self::Masquerade(chain) => {
                write!(f, "the rules of nftables chain {chain} are not as they were made")
            }
            Self::Setting(sysctl) => write!(f, "sysctl {sysctl} does not hold"),
        }
    }
}

impl Expected {
    /// What the result and the configuration say. A device that the result does not name is the one that ADD
    /// would make now.
    #[must_use]
    pub fn new(of: Subject<'_>, config: &Config, subnet: Option<&SubnetEnv>, result: &Success) -> Self {
        let bridge = config.bridge.to_string();
        let ifname = of.at.ifname.to_string();
        let named = |name: &str, sandbox: bool| {
            result.interfaces.iter().find(|i| i.name == name && i.sandbox.is_some() == sandbox)
        };
        let mac = |interface: Option<&Interface>| interface?.mac.as_deref()?.parse().ok();
        let pod = named(&ifname, true);
        let ours = names::host_veth(of.network, of.at);
        // A pod that the reference bridge made has a host end of another name; the result has it after the bridge.
        let host = match named(&ours, false) {
            Some(_) => ours,
            None => result
                .interfaces
                .iter()
                .find(|i| i.sandbox.is_none() && i.name != bridge && i.name.starts_with("veth"))
                .map_or(ours, |i| i.name.clone()),
        };
        let index = pod.and_then(|pod| result.interfaces.iter().position(|i| i == pod));
        let ips: Vec<&cni::Ip> =
            result.ips.iter().filter(|ip| ip.interface.is_none() || ip.interface == index).collect();
        let gateway = |v4: bool| ips.iter().filter(|ip| ip.address.is_ipv4() == v4).find_map(|ip| ip.gateway);
        let gateways = ips
            .iter()
            .filter_map(|ip| IpNetwork::new(ip.gateway?, ip.address.prefix()).ok())
            .filter(|_| config.gateway)
            .collect();
        let routes = result
            .routes
            .iter()
            .map(|route| Route { gw: route.gw.or_else(|| gateway(route.dst.is_ipv4())), ..route.clone() });
        let addresses: Vec<IpNetwork> = ips.iter().map(|ip| ip.address).collect();
        Self {
            gateways,
            promiscuous: config.promiscuous,
            host,
            hairpin: config.hairpin,
            addresses: addresses.clone(),
            routes: routes.collect(),
            masquerade: masquerade::of_network(of.network, config, subnet, &addresses),
            forwarding: forwarding(config.gateway, &addresses),
            bridge: (bridge.clone(), mac(named(&bridge, false))),
            pod: (ifname, mac(pod), pod.and_then(|pod| pod.mtu)),
        }
    }
}

/// Every difference.
#[must_use]
pub fn drift(expected: &Expected, observed: &Observed) -> Vec<Drift> {
    let mut drift = bridge_drift(expected, observed.bridge.as_ref());
    drift.extend(host_drift(expected, observed));
    drift.extend(pod_drift(expected, observed));
    let rules = expected.masquerade.as_ref().filter(|chain| !masquerade::holds(chain, &observed.rules));
    drift.extend(rules.map(|chain| Drift::Masquerade(chain.name.clone())));
    drift.extend(observed.unset.iter().cloned().map(Drift::Setting));
    drift
}

fn bridge_drift(expected: &Expected, bridge: Option<&SeenBridge>) -> Vec<Drift> {
    let (name, mac) = &expected.bridge;
    let Some(bridge) = bridge else { return vec![Drift::BridgeMissing(name.clone())] };
    let mut drift = Vec::new();
    if !bridge.up {
        drift.push(Drift::BridgeDown(name.clone()));
    }
    if let Some(mac) = mac.filter(|mac| bridge.mac != Some(*mac)) {
        drift.push(Drift::BridgeMac(mac, bridge.mac));
    }
    if bridge.promiscuous != expected.promiscuous {
        drift.push(Drift::BridgePromiscuous(expected.promiscuous));
    }
    for gateway in &expected.gateways {
        if !bridge.addresses.iter().any(|address| address.cidr == *gateway) {
            drift.push(Drift::GatewayMissing(*gateway));
        }
    }
    drift
}

fn host_drift(expected: &Expected, observed: &Observed) -> Vec<Drift> {
    let name = || expected.host.clone();
    let Some(host) = &observed.host else { return vec![Drift::HostMissing(name())] };
    let mut drift = Vec::new();
    if !host.up {
        drift.push(Drift::HostDown(name()));
    }
    match (&host.port, &observed.bridge) {
        (Some(port), Some(bridge)) if host.controller == Some(bridge.index) => {
            if port.hairpin != expected.hairpin {
                drift.push(Drift::HostHairpin(name(), expected.hairpin));
            }
        }
        _ => drift.push(Drift::HostOffBridge(name())),
    }
    drift
}

fn pod_drift(expected: &Expected, observed: &Observed) -> Vec<Drift> {
    let (name, mac, mtu) = &expected.pod;
    let Some(pod) = &observed.pod else { return vec![Drift::PodMissing(name.clone())] };
    let mut drift = Vec::new();
    if !pod.up {
        drift.push(Drift::PodDown(name.clone()));
    }
    if observed.host.as_ref().is_some_and(|host| pod.peer != Some(host.index)) {
        drift.push(Drift::PodElsewhere(name.clone()));
    }
    if let Some(mac) = mac.filter(|mac| pod.mac != Some(*mac)) {
        drift.push(Drift::PodMac(mac, pod.mac));
    }
    if let Some(mtu) = mtu.filter(|mtu| pod.mtu != *mtu) {
        drift.push(Drift::PodMtu(mtu, pod.mtu));
    }
    for cidr in &expected.addresses {
        if !observed.addresses.contains(cidr) {
            drift.push(Drift::AddressMissing(*cidr));
        }
    }
    for route in &expected.routes {
        if !observed.routes.iter().any(|other| is_route(route, other)) {
            drift.push(Drift::RouteMissing(route.dst, route.gw));
        }
    }
    drift
}

/// Number of the kernel's main routing table (`RT_TABLE_MAIN`).
const TABLE_MAIN: u32 = 254;

/// Whether an observed route is the expected one. What the result does not say the kernel may have filled in.
fn is_route(expected: &Route, observed: &Route) -> bool {
    let same = |wanted: Option<u32>, is: Option<u32>| wanted.is_none() || wanted == is;
    without_host(expected.dst) == observed.dst
        && expected.gw == observed.gw
        && expected.table.unwrap_or(TABLE_MAIN) == observed.table.unwrap_or(TABLE_MAIN)
        && same(expected.priority, observed.priority)
        && same(expected.mtu, observed.mtu)
        && same(expected.advmss, observed.advmss)
        && (expected.scope.is_none() || expected.scope == observed.scope)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::{Address, Kind, Port};

    fn expected() -> Expected {
        Expected {
            bridge: ("cni0".into(), Some(Mac([2, 0, 0, 0, 0, 1]))),
            gateways: vec!["10.1.0.1/24".parse().unwrap()],
            promiscuous: false,
            host: "vethx".into(),
            hairpin: true,
            pod: ("eth0".into(), Some(Mac([2, 0, 0, 0, 0, 2])), Some(1450)),
            addresses: vec!["10.1.0.2/24".parse().unwrap()],
            routes: vec![Route::new("0.0.0.0/0".parse().unwrap(), Some("10.1.0.1".parse().unwrap()))],
            masquerade: None,
            forwarding: Vec::new(),
        }
    }

    fn link(index: u32, name: &str) -> Link {
        Link {
            index,
            name: name.into(),
            mac: None,
            mtu: 1450,
            up: true,
            operational: true,
            promiscuous: false,
            kind: Kind::Veth,
            peer: None,
            controller: None,
            alias: None,
            port: None,
        }
    }

    fn healthy() -> Observed {
        Observed {
            bridge: Some(SeenBridge {
                index: 1,
                mac: Some(Mac([2, 0, 0, 0, 0, 1])),
                mtu: 1450,
                up: true,
                promiscuous: false,
                addresses: vec![Address {
                    cidr: "10.1.0.1/24".parse().unwrap(),
                    global: true,
                    permanent: true,
                }],
            }),
            host: Some(Link {
                controller: Some(1),
                port: Some(Port { hairpin: true, isolated: false, forwarding: true }),
                ..link(2, "vethx")
            }),
            pod: Some(Link { mac: Some(Mac([2, 0, 0, 0, 0, 2])), peer: Some(2), ..link(7, "eth0") }),
            addresses: vec!["10.1.0.2/24".parse().unwrap(), "fe80::1/64".parse().unwrap()],
            routes: vec![Route {
                table: Some(254),
                scope: Some(0),
                ..Route::new("0.0.0.0/0".parse().unwrap(), Some("10.1.0.1".parse().unwrap()))
            }],
            rules: Vec::new(),
            unset: Vec::new(),
        }
    }

    #[test]
    fn no_drift() {
        assert_eq!(drift(&expected(), &healthy()), []);
    }

    #[test]
    fn each_kind_is_named() {
        type Damage = fn(&mut Observed);
        let cases: [(Damage, Drift); 16] = [
            (|o| o.bridge = None, Drift::BridgeMissing("cni0".into())),
            (|o| o.bridge.as_mut().unwrap().up = false, Drift::BridgeDown("cni0".into())),
            (|o| o.bridge.as_mut().unwrap().mac = None, Drift::BridgeMac(Mac([2, 0, 0, 0, 0, 1]), None)),
            (|o| o.bridge.as_mut().unwrap().promiscuous = true, Drift::BridgePromiscuous(false)),
            (
                |o| o.bridge.as_mut().unwrap().addresses.clear(),
                Drift::GatewayMissing("10.1.0.1/24".parse().unwrap()),
            ),
            (|o| o.host = None, Drift::HostMissing("vethx".into())),
            (|o| o.host.as_mut().unwrap().up = false, Drift::HostDown("vethx".into())),
            (|o| o.host.as_mut().unwrap().controller = Some(9), Drift::HostOffBridge("vethx".into())),
            (
                |o| o.host.as_mut().unwrap().port.as_mut().unwrap().hairpin = false,
                Drift::HostHairpin("vethx".into(), true),
            ),
            (|o| o.pod = None, Drift::PodMissing("eth0".into())),
            (|o| o.pod.as_mut().unwrap().up = false, Drift::PodDown("eth0".into())),
            (|o| o.pod.as_mut().unwrap().peer = Some(3), Drift::PodElsewhere("eth0".into())),
            (|o| o.pod.as_mut().unwrap().mac = None, Drift::PodMac(Mac([2, 0, 0, 0, 0, 2]), None)),
            (|o| o.pod.as_mut().unwrap().mtu = 1500, Drift::PodMtu(1450, 1500)),
            (|o| o.addresses.clear(), Drift::AddressMissing("10.1.0.2/24".parse().unwrap())),
            (
                |o| o.routes.clear(),
                Drift::RouteMissing("0.0.0.0/0".parse().unwrap(), Some("10.1.0.1".parse().unwrap())),
            ),
        ];
        for (damage, named) in cases {
            let mut observed = healthy();
            damage(&mut observed);
            let found = drift(&expected(), &observed);
            assert!(found.contains(&named), "{named}: {found:?}");
        }
    }

    #[test]
    fn what_the_result_does_not_say_is_not_compared() {
        let mut expected = expected();
        (expected.pod.1, expected.pod.2, expected.bridge.1) = (None, None, None);
        let mut observed = healthy();
        observed.pod.as_mut().unwrap().mtu = 9000;
        observed.pod.as_mut().unwrap().mac = Some(Mac([2, 0, 0, 0, 0, 9]));
        assert_eq!(drift(&expected, &observed), []);
    }

    #[test]
    fn routes_with_more_than_a_gateway() {
        let route = |text: &str| Route::new(text.parse().unwrap(), Some("10.1.0.1".parse().unwrap()));
        let wanted = Route { mtu: Some(1400), table: Some(100), ..route("10.9.9.9/16") };
        let there = Route { mtu: Some(1400), table: Some(100), priority: Some(5), ..route("10.9.0.0/16") };
        assert!(is_route(&wanted, &there));
        assert!(!is_route(&wanted, &Route { table: Some(254), ..there.clone() }));
        assert!(!is_route(&wanted, &Route { mtu: None, ..there.clone() }));
        assert!(!is_route(&wanted, &Route { gw: None, ..there }));
    }
}
