//! What one pod needs, and the steps from what is there to that. Nothing here touches the kernel.
//!
//! [`Wanted::new`] turns configuration and addresses into everything that shall be, the result that the
//! runtime is told included. [`steps`] compares it with what was seen. [`undo`] says how a step is taken
//! back: those that belong to the pod are, those that belong to the node (bridge, gateway address,
//! forwarding, masquerading) stay, because another ADD may already rely on them, and making them again
//! changes nothing.

use super::names;
use crate::{
    config::{Config, OldGateway},
    mac::Mac,
    masquerade,
    netlink::{Address, NewBridge, NewVeth, Port},
    nft::Chain,
    subnet_env::SubnetEnv,
    sysctl::Sysctl,
};
use cni::{AttachmentId, Interface, NetworkName, Route, Success};
use ipnetwork::IpNetwork;
use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
};

/// MTU when neither the configuration, nor the node's subnet, nor an existing bridge says one.
const DEFAULT_MTU: u32 = 1500;

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

/// The bridge as it was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeenBridge {
    /// Number.
    pub index: u32,
    /// Hardware address.
    pub mac: Option<Mac>,
    /// MTU.
    pub mtu: u32,
    /// Up.
    pub up: bool,
    /// Promiscuous.
    pub promiscuous: bool,
    /// Addresses.
    pub addresses: Vec<Address>,
}

/// A port of the bridge that holds the pod's address: its former sandbox, still alive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Former {
    /// Number.
    pub index: u32,
    /// Name.
    pub name: String,
    /// Settings, for putting it back.
    pub port: Port,
    /// The hardware address that was pinned to it.
    pub mac: Mac,
}

/// What is there before the first step.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen {
    /// The bridge.
    pub bridge: Option<SeenBridge>,
    /// A device with the name of the host's end: left by an ADD of this same attachment that was killed.
    pub leftover: bool,
    /// The pod's former sandbox.
    pub former: Option<Former>,
    /// Comments of the rules in the network's masquerading chain.
    pub rules: Vec<String>,
}

/// One thing to do. In the pod's namespace where the name says so, else in the node's.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// Make the bridge. That it is there is fine: another ADD was faster.
    AddBridge(NewBridge),
    /// Bring the bridge up and fix its hardware address.
    SetBridge {
        /// Its own present one, or none to leave as is.
        mac: Option<Mac>,
        /// Promiscuous or not.
        promiscuous: bool,
    },
    /// Take a gateway address of a former subnet off the bridge.
    DropGateway(IpNetwork),
    /// Put a gateway address on the bridge.
    AddGateway(IpNetwork),
    /// A setting of the node.
    NodeSysctl(Sysctl),
    /// Put the masquerading rules in place.
    Masquerade(Chain),
    /// Take a chain of ours away that is no longer wanted.
    NoMasquerade(String),
    /// Delete what a killed ADD of this attachment has left.
    DeleteLeftover(String),
    /// Take the former sandbox off the bridge.
    Detach(Former),
    /// Make the pair.
    AddVeth(NewVeth),
    /// Settings of the host's end.
    SetPort {
        /// Sends back.
        hairpin: bool,
        /// Sees no other pod.
        isolated: bool,
        /// Whose it is.
        alias: Option<String>,
    },
    /// Tell the bridge where the pod's hardware address is.
    Pin(Mac),
    /// Settings in the pod.
    PodSysctls(Vec<Sysctl>),
    /// Bring the pod's end up.
    PodUp,
    /// An address in the pod.
    PodAddress(IpNetwork),
    /// A route in the pod.
    PodRoute(Route),
    /// Wait until the bridge forwards to the pod, and have the pod's addresses announced.
    Announce(Mac),
}

/// How a step is taken back.
#[derive(Debug, Clone, PartialEq)]
pub enum Undo {
    /// Delete the host's end: the pod's end with its addresses and routes, the port's settings and what the
    /// bridge knows of it go with it.
    DeleteVeth(String),
    /// Put the former sandbox back on the bridge.
    Attach(Former),
}

/// Why a plan cannot be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// IPAM gave nothing.
    NoAddress,
    /// Another subnet's gateway is on the bridge, and the configuration forbids replacing it.
    OtherGateway(IpNetwork),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoAddress => f.write_str("the IPAM plugin gave no address"),
            Self::OtherGateway(cidr) => write!(
                f,
                "the bridge has the gateway address {cidr} of another subnet; \"forceAddress\": false forbids replacing it"
            ),
        }
    }
}

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
    fn bridge_settings(&self) -> Vec<Sysctl> {
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

    fn pod_settings(&self) -> Vec<Sysctl> {
        let name = &self.veth.peer;
        let mut settings = Vec::new();
        if self.has(true) {
            settings.push(Sysctl::new(format!("net/ipv4/conf/{name}/arp_notify"), "1"));
        }
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

/// The steps from what was seen to what is wanted, in order.
///
/// # Errors
/// [`Refusal::OtherGateway`].
pub fn steps(wanted: &Wanted, seen: &Seen) -> Result<Vec<Step>, Refusal> {
    let mut steps = bridge_steps(wanted, seen.bridge.as_ref())?;
    steps.extend(wanted.forwarding.iter().cloned().map(Step::NodeSysctl));
    match &wanted.masquerade {
        Some(chain) if !masquerade::holds(chain, &seen.rules) => steps.push(Step::Masquerade(chain.clone())),
        None if !seen.rules.is_empty() => steps.push(Step::NoMasquerade(wanted.masquerade_chain.clone())),
        _ => {}
    }
    if seen.leftover {
        steps.push(Step::DeleteLeftover(wanted.veth.name.clone()));
    }
    // Before the new one goes up, so that address and hardware address are never there twice.
    steps.extend(seen.former.clone().map(Step::Detach));
    steps.push(Step::AddVeth(wanted.veth.clone()));
    let (hairpin, isolated, alias) = (wanted.hairpin, wanted.isolated, wanted.alias.clone());
    steps.push(Step::SetPort { hairpin, isolated, alias });
    steps.push(Step::Pin(wanted.veth.peer_mac));
    steps.push(Step::PodSysctls(wanted.pod_settings()));
    steps.push(Step::PodUp);
    steps.extend(wanted.addresses.iter().copied().map(Step::PodAddress));
    steps.extend(wanted.routes.iter().cloned().map(Step::PodRoute));
    steps.push(Step::Announce(wanted.veth.peer_mac));
    Ok(steps)
}

fn bridge_steps(wanted: &Wanted, seen: Option<&SeenBridge>) -> Result<Vec<Step>, Refusal> {
    let mut steps = Vec::new();
    let present = match seen {
        None => {
            steps.push(Step::AddBridge(wanted.bridge.clone()));
            steps.extend(wanted.bridge_settings().into_iter().map(Step::NodeSysctl));
            &[][..]
        }
        Some(bridge) => {
            // A bridge that another plugin made may still follow its ports' addresses. It keeps the one that pods
            // know, but as its own. Ours was made with its own.
            let fixed = bridge.mac.is_some() && bridge.mac == wanted.bridge.mac;
            if !fixed || !bridge.up || bridge.promiscuous != wanted.bridge.promiscuous {
                let mac = if fixed { None } else { bridge.mac };
                steps.push(Step::SetBridge { mac, promiscuous: wanted.bridge.promiscuous });
            }
            &bridge.addresses[..]
        }
    };
    for old in old_gateways(&wanted.gateways, present) {
        match wanted.old_gateway {
            OldGateway::Replace => steps.push(Step::DropGateway(old)),
            OldGateway::Refuse => return Err(Refusal::OtherGateway(old)),
        }
    }
    let missing: Vec<IpNetwork> = wanted
        .gateways
        .iter()
        .filter(|gateway| !present.iter().any(|address| address.cidr == **gateway))
        .copied()
        .collect();
    if seen.is_some() && missing.iter().any(IpNetwork::is_ipv6) {
        steps.extend(wanted.bridge_settings().into_iter().map(Step::NodeSysctl));
    }
    steps.extend(missing.into_iter().map(Step::AddGateway));
    Ok(steps)
}

/// Gateway addresses of a subnet that is no longer this network's. The bridge is ours, so what looks like one is
/// one: global, permanent, of a family that we have a gateway of, and with a subnet behind it (a host address,
/// /32 or /128, is somebody's service address). Left in place it would keep the old subnet's traffic on
/// this node, wherever that subnet lives now.
fn old_gateways(wanted: &[IpNetwork], present: &[Address]) -> Vec<IpNetwork> {
    let concerned = |cidr: IpNetwork| wanted.iter().any(|gateway| gateway.is_ipv4() == cidr.is_ipv4());
    present
        .iter()
        .filter(|address| address.global && address.permanent)
        .map(|address| address.cidr)
        .filter(|cidr| concerned(*cidr) && !wanted.contains(cidr))
        .filter(|cidr| cidr.prefix() < if cidr.is_ipv4() { 32 } else { 128 })
        .collect()
}

/// How a step that was carried out is taken back, if it is at all.
#[must_use]
pub fn undo(step: &Step) -> Option<Undo> {
    match step {
        Step::AddVeth(veth) => Some(Undo::DeleteVeth(veth.name.clone())),
        Step::Detach(former) => Some(Undo::Attach(former.clone())),
        // These go with the veth.
        Step::SetPort { .. }
        | Step::Pin(_)
        | Step::PodSysctls(_)
        | Step::PodUp
        | Step::PodAddress(_)
        | Step::PodRoute(_)
        | Step::Announce(_) => None,
        // These are the node's.
        Step::AddBridge(_)
        | Step::SetBridge { .. }
        | Step::DropGateway(_)
        | Step::AddGateway(_)
        | Step::NodeSysctl(_)
        | Step::Masquerade(_)
        | Step::NoMasquerade(_)
        | Step::DeleteLeftover(_) => None,
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

#[cfg(test)]
mod tests;
