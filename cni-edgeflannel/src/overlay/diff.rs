//! The steps from what is to what should be, in the order in which they must be taken. Pure.
//!
//! Devices come first, since everything else hangs on them; a peer's route comes after its neighbour and
//! forwarding entry, or the kernel would ask for the hardware address; what is not wanted goes last, route first.
//! Ours is what [`super`] says; no step touches anything else.

use super::{
    claims::contains,
    desired::{Desired, Device, Direct, Hop},
    observed::{DeviceSeen, LinkSeen, Observed, RouteSeen, VxlanSeen},
    step::Step,
};
use crate::{
    mac::Mac,
    nft::Rule,
    record::{Family, Record},
    sysctl::Sysctl,
};
use ipnetwork::IpNetwork;
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

/// The steps from what is to what should be; empty when nothing has to be done.
#[must_use]
pub fn plan(desired: &Desired, observed: &Observed) -> Vec<Step> {
    let mut steps = Vec::new();
    for (family, name) in desired.unwanted.iter() {
        if let Some(seen) = observed.devices.get(family) {
            steps.push(Step::DeleteDevice { name: name.clone(), index: seen.link.index });
        }
    }
    // What is on a device that is made anew goes with it.
    let mut kept: BTreeMap<Family, &DeviceSeen> = BTreeMap::new();
    for (family, device) in desired.devices.iter() {
        match observed.devices.get(family) {
            Some(seen) if fits(device, seen.link.vxlan.as_ref()) => {
                kept.insert(family, seen);
                change_device(family, device, &seen.link, &mut steps);
            }
            other => {
                if let Some(seen) = other {
                    steps.push(Step::DeleteDevice { name: device.name.clone(), index: seen.link.index });
                }
                steps.push(Step::CreateDevice(Box::new(device.clone()), family));
                if device.disable_tx_checksum {
                    steps.push(Step::TxChecksumOff(family));
                }
            }
        }
    }
    set_sysctls(desired, observed, &kept, &mut steps);
    for (family, device) in desired.devices.iter() {
        let seen = kept.get(&family).copied();
        put_address(family, device, seen, &mut steps);
        put_entries(family, device, seen, &observed.routes, &mut steps);
    }
    for (family, device) in desired.devices.iter() {
        let seen = kept.get(&family).copied();
        prune(family, device, seen, desired.direct.as_ref(), &observed.routes, &mut steps);
    }
    rules(desired, observed, &mut steps);
    if let Some(env) = &desired.subnet_env {
        let text = env.to_string();
        if observed.subnet_env.as_ref() != Some(&text) {
            steps.push(Step::WriteSubnetEnv(text));
        }
    }
    steps
}

/// Whether the device can become the wanted one without being made anew. flannel compares the same
/// (`vxlanLinksIncompat`); what it does not compare is set below.
fn fits(device: &Device, seen: Option<&VxlanSeen>) -> bool {
    seen.is_some_and(|seen| {
        seen.vni == device.vni
            && seen.port == device.port
            && seen.gbp == device.gbp
            && seen.group.is_none()
            && !seen.misses
            && seen.local.is_none_or(|local| Family::of(local) == Family::of(device.local))
    })
}

fn change_device(family: Family, device: &Device, link: &LinkSeen, steps: &mut Vec<Step>) {
    let same = link.vxlan.as_ref().is_some_and(|seen| {
        seen.link == device.link && seen.local == Some(device.local) && seen.learning == device.learning
    });
    if !same {
        steps.push(Step::ChangeVxlan(Box::new(device.clone()), family));
    }
    if link.mac != Some(device.mac) {
        steps.push(Step::SetMac(family, device.mac));
    }
    if link.mtu != device.mtu {
        steps.push(Step::SetMtu(family, device.mtu));
    }
    if device.disable_tx_checksum && link.tx_checksum == Some(true) {
        steps.push(Step::TxChecksumOff(family));
    }
    if !link.up {
        steps.push(Step::SetUp(family));
    }
}

fn set_sysctls(
    desired: &Desired,
    observed: &Observed,
    kept: &BTreeMap<Family, &DeviceSeen>,
    steps: &mut Vec<Step>,
) {
    // Settings of a device that is about to be made are not those of the one that was seen.
    let made: Vec<String> = desired
        .devices
        .iter()
        .filter(|(family, _)| !kept.contains_key(family))
        .map(|(_, device)| format!("/{}/", device.name))
        .collect();
    for sysctl in &desired.sysctls {
        let fresh = made.iter().any(|device| sysctl.key.contains(device));
        let holds = match observed.sysctls.get(&sysctl.key) {
            _ if fresh => false,
            Some(value) => value == sysctl.value,
            None => sysctl.optional,
        };
        if holds {
            continue;
        }
        if sysctl.key == "net/ipv6/conf/all/forwarding" {
            let heeded =
                desired.accept_ra.iter().filter(|key| observed.sysctls.get(*key).is_some_and(|v| v == "1"));
            steps.extend(heeded.map(|key| Step::SetSysctl(Sysctl::new(key.clone(), "2"))));
        }
        steps.push(Step::SetSysctl(sysctl.clone()));
    }
}

fn put_address(family: Family, device: &Device, seen: Option<&DeviceSeen>, steps: &mut Vec<Step>) {
    let none = BTreeSet::new();
    let addresses = seen.map_or(&none, |seen| &seen.addresses);
    if !addresses.contains(&device.address) {
        steps.push(Step::AddAddress(family, device.address));
    }
    for cidr in addresses {
        // flannel's are single addresses; a person's with a network of its own stays.
        let single = cidr.prefix() == family.bits() && cidr.is_ipv4() == device.address.is_ipv4();
        if single && *cidr != device.address {
            steps.push(Step::RemoveAddress(family, *cidr));
        }
    }
}

fn put_entries(
    family: Family,
    device: &Device,
    seen: Option<&DeviceSeen>,
    routes: &BTreeSet<RouteSeen>,
    steps: &mut Vec<Step>,
) {
    let entries = &device.entries;
    for (ip, mac) in &entries.neighbours {
        if seen.and_then(|seen| lasting_neighbours(seen, device).get(ip)) != Some(mac) {
            steps.push(Step::PutNeighbour(family, *ip, *mac));
        }
    }
    for (mac, ip) in &entries.fdb {
        let places = places(seen, *mac);
        if places.contains(ip) {
            continue;
        }
        // Replacing alters the first place only, whichever that is; with several the entry is emptied first.
        if places.len() > 1 {
            steps.extend(places.iter().map(|place| Step::RemoveFdb(family, *mac, *place)));
        }
        steps.push(Step::PutFdb(family, *mac, *ip));
    }
    for (dst, hop) in &entries.routes {
        let index = seen.map(|seen| seen.link.index);
        if routes_to(routes, *dst).any(|route| leads(route, family, *hop, index)) {
            continue;
        }
        // IPv6 takes no onlink gateway that another device leads to, and the route to be replaced does
        // (`ip6_route_check_nh_onlink`): it has to go first.
        if family == Family::V6 && matches!(hop, Hop::Vxlan(_)) {
            let elsewhere = routes_to(routes, *dst)
                .filter(|route| route.metric == RouteSeen::default_metric(family) && route.device != index);
            steps.extend(elsewhere.map(|route| Step::RemoveRoute(Box::new(*route))));
        }
        steps.push(Step::PutRoute(family, *dst, *hop));
    }
}

/// The neighbours that will be there once the device is as it should be: a change of its own hardware address makes
/// the kernel forget all of them, the permanent ones too (`neigh_changeaddr`).
fn lasting_neighbours<'s>(seen: &'s DeviceSeen, device: &Device) -> &'s BTreeMap<IpAddr, Mac> {
    static NONE: BTreeMap<IpAddr, Mac> = BTreeMap::new();
    if seen.link.mac == Some(device.mac) { &seen.neighbours } else { &NONE }
}

/// Where the forwarding table sends a hardware address.
fn places(seen: Option<&DeviceSeen>, mac: Mac) -> Vec<IpAddr> {
    let range = (mac, IpAddr::from([0, 0, 0, 0]))..;
    let all = seen.map(|seen| seen.fdb.range(range)).into_iter().flatten();
    all.take_while(|(of, _)| *of == mac).map(|(_, place)| *place).collect()
}

fn routes_to(routes: &BTreeSet<RouteSeen>, dst: IpNetwork) -> impl Iterator<Item = &RouteSeen> {
    let least =
        RouteSeen { dst, metric: 0, gateway: None, device: None, onlink: false, protocol: 0, global: false };
    routes.range(least..).take_while(move |route| route.dst == dst)
}

/// The route is exactly the one that flannel would make.
fn leads(route: &RouteSeen, family: Family, hop: Hop, device: Option<u32>) -> bool {
    let way = match hop {
        Hop::Vxlan(gateway) => {
            route.onlink && route.gateway == Some(gateway) && device.is_some() && route.device == device
        }
        Hop::Direct(gateway) => !route.onlink && route.gateway == Some(gateway),
    };
    way && route.metric == RouteSeen::default_metric(family)
        && route.protocol == RouteSeen::PROTOCOL
        && route.global
}

fn prune(
    family: Family,
    device: &Device,
    seen: Option<&DeviceSeen>,
    direct: Option<&Direct>,
    routes: &BTreeSet<RouteSeen>,
    steps: &mut Vec<Step>,
) {
    let index = seen.map(|seen| seen.link.index);
    for route in routes.iter().filter(|route| Family::of_subnet(route.dst) == family) {
        let ours = (route.onlink && index.is_some() && route.device == index)
            || direct.is_some_and(|direct| is_direct(route, family, direct));
        let wanted = device.entries.routes.get(&route.dst);
        // One that differs from the wanted one in its place is replaced by it, not removed.
        let replaced = wanted.is_some_and(|hop| {
            leads(route, family, *hop, index)
                || (route.metric == RouteSeen::default_metric(family)
                    && !routes_to(routes, route.dst).any(|other| leads(other, family, *hop, index)))
        });
        if ours && !replaced {
            steps.push(Step::RemoveRoute(Box::new(*route)));
        }
    }
    let Some(seen) = seen else { return };
    for (ip, mac) in lasting_neighbours(seen, device) {
        if !device.entries.neighbours.contains_key(ip) {
            steps.push(Step::RemoveNeighbour(family, *ip, *mac));
        }
    }
    for (mac, place) in &seen.fdb {
        let unwanted = match device.entries.fdb.get(mac) {
            None => true,
            // Another one is replaced, or was removed before the right one was put.
            Some(wanted) => wanted != place && seen.fdb.contains(&(*mac, *wanted)),
        };
        if unwanted {
            steps.push(Step::RemoveFdb(family, *mac, *place));
        }
    }
}

/// A direct route that flannel or we made: with DirectRouting on, through the interface below to a part of the
/// cluster's network that is not this node's, with nothing said about it that flannel would not say.
fn is_direct(route: &RouteSeen, family: Family, direct: &Direct) -> bool {
    let inside = direct
        .networks
        .get(family)
        .is_some_and(|network| contains(*network, route.dst) && *network != route.dst);
    let own = direct.subnets.get(family).is_some_and(|own| contains(*own, route.dst));
    inside
        && !own
        && !route.onlink
        && route.gateway.is_some()
        && route.device == Some(direct.ifindex)
        && route.protocol == RouteSeen::PROTOCOL
        && route.global
        && route.metric == RouteSeen::default_metric(family)
}

fn rules(desired: &Desired, observed: &Observed, steps: &mut Vec<Step>) {
    // Nothing is known about the node yet: what is there stays.
    if desired.subnet_env.is_none() {
        return;
    }
    for chain in &desired.chains {
        let wanted = chain.rules.iter().map(Rule::comment);
        let same = observed.chains.get(&chain.name).is_some_and(|seen| wanted.eq(seen.iter().cloned()));
        if !same {
            steps.push(Step::PutChain(chain.clone()));
        }
    }
    for name in observed.chains.keys() {
        if !desired.chains.iter().any(|chain| chain.name == *name) {
            steps.push(Step::RemoveChain(name.clone()));
        }
    }
}

/// Whether a peer's entries are all in the kernel, for `status`.
#[must_use]
pub fn in_kernel(peer: &str, record: &Record, desired: &Desired, steps: &[Step]) -> bool {
    let Some(peer) = record.peers.get(peer) else { return false };
    peer.ends.iter().all(|(family, end)| {
        let Some(device) = desired.devices.get(family) else { return false };
        device.entries.routes.contains_key(&end.subnet)
            && !steps.iter().any(|step| match step {
                Step::CreateDevice(_, of) | Step::SetUp(of) => *of == family,
                Step::PutRoute(_, dst, _) => *dst == end.subnet,
                Step::PutNeighbour(of, ip, _) => *of == family && *ip == end.subnet.network(),
                Step::PutFdb(of, mac, _) => *of == family && *mac == end.vtep_mac,
                _ => false,
            })
    })
}
