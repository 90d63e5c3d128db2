//! What one pod needs: everything that follows from the configuration and the addresses that IPAM gave, the result
//! that the runtime is told included. Nothing here touches the kernel.

use super::{
    names,
    plan::{Refusal, SeenBridge},
};
use crate::{
    config::{Config, OldGateway},
    mac::Mac,
    masquerade,
    netlink::{NewBridge, NewVeth},
    nft::Chain,
    subnet_env::SubnetEnv,
    sysctl::Sysctl,
};
use cni::{AttachmentId, Interface, NetworkName, Route, Success};
use ipnetwork::IpNetwork;
use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
};

/// MTU when neither the configuration, nor the node's subnet, nor an existing bridge says one.
const DEFAULT_MTU: u32 = 1500;

/// Which attachment of which network, and where the pod is.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    /// `name` of the network.
    pub network: &'a NetworkName,
    /// Container and interface.
    pub at: &'a AttachmentId,
    /// `CNI_NETNS`.
    pub netns: &'a Path,
}

/// Everything about one attachment, decided.
#[derive(Debug, Clone, PartialEq)]
pub struct Wanted {
    /// The bridge as it is made when there is none.
    pub bridge: NewBridge,
    /// Its addresses: the gateways of the pod's subnets.
    pub gateways: Vec<IpNetwork>,
    /// What to do with other gateway addresses on it.
    pub old_gateway: OldGateway,
    /// The pair.
    pub veth: NewVeth,
    /// Whose it is, for GC.
    pub alias: Option<String>,
    /// Of the host's end, as a port.
    pub hairpin: bool,
    /// Of the host's end, as a port.
    pub isolated: bool,
    /// The hardware address was asked for and does not follow from the IP address.
    pub mac_asked: bool,
    /// The pod's addresses.
    pub addresses: Vec<IpNetwork>,
    /// The pod's routes, each with its gateway.
    pub routes: Vec<Route>,
    /// The network's masquerading rules, if it has any.
    pub masquerade: Option<Chain>,
    /// The name of the chain they are in, whether wanted or not.
    pub masquerade_chain: String,
    /// Settings of the node.
    pub forwarding: Vec<Sysctl>,
    /// What the runtime is told.
    pub result: Success,
}

impl Wanted {
    /// Decides everything. `bridge` is what there is of the bridge: it lends its MTU and keeps its hardware
    /// address.
    ///
    /// # Errors
    /// [`Refusal::NoAddress`].
    pub fn new(
        of: Subject<'_>,
        config: &Config,
        subnet: Option<&SubnetEnv>,
        ipam: &Success,
        bridge: Option<&SeenBridge>,
    ) -> Result<Self, Refusal> {
        let ips = with_gateways(ipam, config.gateway);
        let Some(first) = ips.first() else { return Err(Refusal::NoAddress) };
        let mac = config.mac.unwrap_or_else(|| Mac::of_address(first.address.ip()));
        let mtu = config.mtu.or(subnet.map(|subnet| subnet.mtu));
        let mtu = mtu.or(bridge.map(|bridge| bridge.mtu)).unwrap_or(DEFAULT_MTU);
        let gateways = if config.gateway { gateways(&ips) } else { Vec::new() };
        let routes = routes(ipam, &ips, config.default_route);

        // The bridge's address follows from its gateway address, and is unique to the node without one too.
        let bridge_mac =
            Mac::of_address(gateways.first().map_or_else(|| first.address.network(), IpNetwork::ip));
        let bridge_name = config.bridge.to_string();
        let told_mac = bridge.and_then(|bridge| bridge.mac).unwrap_or(bridge_mac);
        let host = names::host_veth(of.network, of.at);
        let host_mac = names::host_mac(&host);
        let ifname = of.at.ifname.to_string();
        let device = |name: &str, mac: Mac, mtu: u32, sandbox: Option<String>| Interface {
            name: name.into(),
            mac: Some(mac.to_string()),
            mtu: Some(mtu),
            sandbox,
            ..Interface::default()
        };
        let result = Success {
            interfaces: vec![
                device(&bridge_name, told_mac, bridge.map_or(mtu, |bridge| bridge.mtu), None),
                device(&host, host_mac, mtu, None),
                device(&ifname, mac, mtu, Some(of.netns.display().to_string())),
            ],
            ips: ips.iter().map(|ip| cni::Ip { interface: Some(2), ..ip.clone() }).collect(),
            routes: routes.iter().map(|(told, _)| told.clone()).collect(),
            dns: config.dns.clone().unwrap_or_else(|| ipam.dns.clone()),
        };
        let addresses: Vec<IpNetwork> = ips.iter().map(|ip| ip.address).collect();
        Ok(Self {
            bridge: NewBridge {
                name: bridge_name,
                mac: Some(bridge_mac),
                mtu,
                promiscuous: config.promiscuous,
            },
            gateways,
            old_gateway: config.old_gateway,
            veth: NewVeth { name: host, mac: host_mac, peer: ifname, peer_mac: mac, mtu },
            alias: names::alias(of.network, of.at),
            hairpin: config.hairpin,
            isolated: config.isolated,
            mac_asked: config.mac.is_some(),
            routes: routes.into_iter().map(|(_, made)| made).collect(),
            masquerade: masquerade::of_network(of.network, config, subnet, &addresses),
            forwarding: forwarding(config.gateway, &addresses),
            masquerade_chain: masquerade::chain_name(of.network),
            addresses,
            result,
        })
    }

    fn has(&self, v4: bool) -> bool {
        self.addresses.iter().any(|cidr| cidr.is_ipv4() == v4)
    }

    /// Settings of a bridge that has just been made: pods must not configure the node by router
    /// advertisements, and its addresses are usable at once.
    pub(super) fn bridge_settings(&self) -> Vec<Sysctl> {
        let name = &self.bridge.name;
        let mut settings = vec![Sysctl::optional(format!("net/ipv6/conf/{name}/accept_ra"), "0")];
        if self.has(false) {
            settings.extend([
                Sysctl::new(format!("net/ipv6/conf/{name}/disable_ipv6"), "0"),
                Sysctl::new(format!("net/ipv6/conf/{name}/accept_dad"), "0"),
                Sysctl::optional(format!("net/ipv6/conf/{name}/keep_addr_on_down"), "1"),
            ]);
        }
        settings
    }

    /// IPv6 on, its addresses usable at once, and announced when the hardware address is set. (What IPv4 needs is
    /// part of bringing the interface up.)
    pub(super) fn pod_settings(&self) -> Vec<Sysctl> {
        let name = &self.veth.peer;
        let mut settings = Vec::new();
        if self.has(false) {
            settings.extend([
                Sysctl::new("net/ipv6/conf/lo/disable_ipv6", "0"),
                Sysctl::new(format!("net/ipv6/conf/{name}/disable_ipv6"), "0"),
                Sysctl::new(format!("net/ipv6/conf/{name}/accept_dad"), "0"),
                Sysctl::optional(format!("net/ipv6/conf/{name}/keep_addr_on_down"), "1"),
                Sysctl::optional(format!("net/ipv6/conf/{name}/ndisc_notify"), "1"),
            ]);
        }
        settings
    }
}

/// IPAM's addresses, each with a gateway if the bridge is to be one: the first address of the subnet where IPAM
/// names none, as in the reference plugin.
fn with_gateways(ipam: &Success, gateway: bool) -> Vec<cni::Ip> {
    let mut ips = ipam.ips.clone();
    for ip in &mut ips {
        if gateway && ip.gateway.is_none() {
            ip.gateway = first_of(ip.address);
        }
    }
    ips
}

fn first_of(subnet: IpNetwork) -> Option<IpAddr> {
    match subnet.network() {
        IpAddr::V4(v4) => u32::from(v4).checked_add(1).map(|ip| Ipv4Addr::from(ip).into()),
        IpAddr::V6(v6) => u128::from(v6).checked_add(1).map(|ip| Ipv6Addr::from(ip).into()),
    }
}

fn gateways(ips: &[cni::Ip]) -> Vec<IpNetwork> {
    let mut gateways = Vec::new();
    for ip in ips {
        let cidr = ip.gateway.and_then(|gateway| IpNetwork::new(gateway, ip.address.prefix()).ok());
        gateways.extend(cidr.filter(|cidr| !gateways.contains(cidr)));
    }
    gateways
}

/// The pod's routes, as told to the runtime and as made. IPAM's come first; one without gateway goes through
/// the gateway of its family. A default route of ours is added per family, unless IPAM gave one with a gateway.
fn routes(ipam: &Success, ips: &[cni::Ip], default_route: bool) -> Vec<(Route, Route)> {
    let gateway = |v4: bool| ips.iter().filter(|ip| ip.address.is_ipv4() == v4).find_map(|ip| ip.gateway);
    let mut routes: Vec<(Route, Route)> = Vec::new();
    let mut add = |told: Route| {
        let made = Route { gw: told.gw.or_else(|| gateway(told.dst.is_ipv4())), ..told.clone() };
        let same = |(_, other): &(Route, Route)| {
            (other.dst, other.table, other.priority) == (made.dst, made.table, made.priority)
        };
        // The kernel would refuse a second route to the same place: flannel's cluster network may be IPAM's too.
        if !routes.iter().any(same) {
            routes.push((told, made));
        }
    };
    for route in &ipam.routes {
        add(route.clone());
    }
    if default_route {
        for v4 in [true, false] {
            if let Some(gateway) = gateway(v4) {
                add(Route::new(everything(v4), Some(gateway)));
            }
        }
    }
    routes
}

fn everything(v4: bool) -> IpNetwork {
    let any: IpAddr = if v4 { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    IpNetwork::new(any, 0).unwrap_or_else(|_| IpNetwork::from(any))
}

/// Settings of the node without which the packets of pods with these addresses go nowhere.
#[must_use]
pub fn forwarding(gateway: bool, addresses: &[IpNetwork]) -> Vec<Sysctl> {
    let has = |v4: bool| gateway && addresses.iter().any(|cidr| cidr.is_ipv4() == v4);
    let mut settings = Vec::new();
    if has(true) {
        settings.push(Sysctl::new("net/ipv4/ip_forward", "1"));
    }
    if has(false) {
        settings.push(Sysctl::new("net/ipv6/conf/all/forwarding", "1"));
    }
    settings
}
