//! The steps from what is there to what one pod needs, and how they are taken back. Nothing here touches the
//! kernel.
//!
//! Steps that belong to the pod are taken back when a later one fails; those that belong to the node (bridge,
//! gateway address, forwarding, masquerading) stay, because another ADD may already rely on them, and making them
//! again changes nothing.

use super::wanted::Wanted;
use crate::{
    config::OldGateway,
    mac::Mac,
    masquerade,
    netlink::{Address, NewBridge, NewVeth, Port},
    nft::Chain,
    sysctl::Sysctl,
};
use cni::Route;
use ipnetwork::IpNetwork;
use std::fmt;

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
    steps.extend(Some(wanted.pod_settings()).filter(|settings| !settings.is_empty()).map(Step::PodSysctls));
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

#[cfg(test)]
mod tests;
