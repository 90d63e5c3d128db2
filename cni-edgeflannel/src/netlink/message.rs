//! What rtnetlink messages say, as plain values, and the other way round. Nothing here touches a socket.

use super::{Address, Kind, Link, Port};
use crate::mac::Mac;
use cni::Route;
use ipnetwork::IpNetwork;
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage as Message,
    address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope},
    link::{
        BridgePortState, InfoBridgePort, InfoKind, InfoPortData, LinkAttribute, LinkExtentMask, LinkFlags,
        LinkInfo, LinkMessage, State,
    },
    route::{RouteAddress, RouteAttribute, RouteMessage, RouteMetric, RouteScope},
};
use rtnetlink::{AddressMessageBuilder, RouteMessageBuilder};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

pub(super) fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

pub(super) fn without_stats(mut ask: LinkMessage) -> LinkMessage {
    ask.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    ask
}

pub(super) fn address_message(index: u32, cidr: IpNetwork) -> AddressMessage {
    match cidr {
        IpNetwork::V4(v4) => {
            AddressMessageBuilder::<Ipv4Addr>::new().index(index).address(v4.ip(), v4.prefix()).build()
        }
        IpNetwork::V6(v6) => {
            AddressMessageBuilder::<Ipv6Addr>::new().index(index).address(v6.ip(), v6.prefix()).build()
        }
    }
}

pub(super) fn route_message(index: u32, route: &Route) -> RouteMessage {
    let mut message = match route.dst {
        IpNetwork::V4(v4) => {
            RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(v4.network(), v4.prefix()).build()
        }
        IpNetwork::V6(v6) => {
            RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(v6.network(), v6.prefix()).build()
        }
    };
    message.attributes.push(RouteAttribute::Oif(index));
    match route.gw {
        Some(gw) => message.attributes.push(RouteAttribute::Gateway(RouteAddress::from(gw))),
        None => message.header.scope = RouteScope::Link,
    }
    if let Some(scope) = route.scope {
        message.header.scope = RouteScope::from(scope);
    }
    match route.table.map(u8::try_from) {
        Some(Ok(table)) => message.header.table = table,
        Some(Err(_)) => message.attributes.extend(route.table.map(RouteAttribute::Table)),
        None => {}
    }
    message.attributes.extend(route.priority.map(RouteAttribute::Priority));
    let metrics: Vec<RouteMetric> = [route.mtu.map(RouteMetric::Mtu), route.advmss.map(RouteMetric::Advmss)]
        .into_iter()
        .flatten()
        .collect();
    if !metrics.is_empty() {
        message.attributes.push(RouteAttribute::Metrics(metrics));
    }
    message
}

pub(super) fn read_link(message: &Message) -> Option<Link> {
    let Message::NewLink(message) = message else { return None };
    let flags = message.header.flags;
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        mac: None,
        mtu: 0,
        up: flags.contains(LinkFlags::Up),
        operational: false,
        promiscuous: flags.contains(LinkFlags::Promisc),
        kind: Kind::Other,
        peer: None,
        controller: None,
        alias: None,
        port: None,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Address(bytes) => link.mac = Mac::from_bytes(bytes),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::OperState(state) => link.operational = *state == State::Up,
            LinkAttribute::Link(index) => link.peer = Some(*index),
            LinkAttribute::Controller(index) => link.controller = Some(*index),
            LinkAttribute::IfAlias(alias) => link.alias = Some(alias.clone()),
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    match info {
                        LinkInfo::Kind(InfoKind::Bridge) => link.kind = Kind::Bridge,
                        LinkInfo::Kind(InfoKind::Veth) => link.kind = Kind::Veth,
                        LinkInfo::PortData(InfoPortData::BridgePort(infos)) => {
                            link.port = Some(read_port(infos))
                        }
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    Some(link)
}

fn read_port(infos: &[InfoBridgePort]) -> Port {
    let mut port = Port { hairpin: false, isolated: false, forwarding: false };
    for info in infos {
        match info {
            InfoBridgePort::HairpinMode(on) => port.hairpin = *on,
            InfoBridgePort::Isolated(on) => port.isolated = *on,
            InfoBridgePort::State(state) => port.forwarding = *state == BridgePortState::Forwarding,
            _ => {}
        }
    }
    port
}

pub(super) fn read_address(message: &Message, index: u32) -> Option<Address> {
    let Message::NewAddress(message) = message else { return None };
    if message.header.index != index {
        return None;
    }
    let (mut address, mut local) = (None, None);
    let mut permanent = message.header.flags.contains(AddressHeaderFlags::Permanent);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Address(ip) => address = Some(*ip),
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Flags(flags) => permanent = flags.contains(AddressFlags::Permanent),
            _ => {}
        }
    }
    let cidr = IpNetwork::new(local.or(address)?, message.header.prefix_len).ok()?;
    Some(Address { cidr, global: message.header.scope == AddressScope::Universe, permanent })
}

/// Number of the kernel's table of its own addresses (`RT_TABLE_LOCAL`).
const TABLE_LOCAL: u32 = 255;

pub(super) fn read_route(message: &Message, index: u32) -> Option<Route> {
    let Message::NewRoute(message) = message else { return None };
    let any: IpAddr = match message.header.address_family {
        AddressFamily::Inet => Ipv4Addr::UNSPECIFIED.into(),
        AddressFamily::Inet6 => Ipv6Addr::UNSPECIFIED.into(),
        _ => return None,
    };
    let address = |address: &RouteAddress| match address {
        RouteAddress::Inet(v4) => Some(IpAddr::V4(*v4)),
        RouteAddress::Inet6(v6) => Some(IpAddr::V6(*v6)),
        _ => None,
    };
    let (mut dst, mut through) = (any, None);
    let mut table = u32::from(message.header.table);
    let mut route = Route::new(IpNetwork::new(any, 0).ok()?, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(to) => dst = address(to)?,
            RouteAttribute::Gateway(gw) => route.gw = address(gw),
            RouteAttribute::Oif(oif) => through = Some(*oif),
            RouteAttribute::Priority(priority) => route.priority = Some(*priority),
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Metrics(metrics) => {
                for metric in metrics {
                    match metric {
                        RouteMetric::Mtu(mtu) => route.mtu = Some(*mtu),
                        RouteMetric::Advmss(advmss) => route.advmss = Some(*advmss),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    if through != Some(index) || table == TABLE_LOCAL {
        return None;
    }
    route.dst = IpNetwork::new(dst, message.header.destination_prefix_length).ok()?;
    route.table = Some(table);
    route.scope = Some(u8::from(message.header.scope));
    Some(route)
}
