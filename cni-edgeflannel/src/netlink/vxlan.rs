//! What the overlay asks of rtnetlink: a VXLAN device, its neighbours and forwarding entries, and routes.
//!
//! The messages are those that flanneld sends by way of vishvananda/netlink (`addVxlanAttrs`, `NeighSet`,
//! `RouteReplace`), attribute for attribute, so that either finds the other's work to be its own.

use super::{Error, Message, Netlink, family, without_stats};
use crate::{
    mac::Mac,
    overlay::{
        Device, Hop, RouteSeen,
        observed::{LinkSeen, VxlanSeen},
    },
    record::Family,
};
use ipnetwork::IpNetwork;
use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REPLACE};
use netlink_packet_route::{
    AddressFamily,
    link::{InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo},
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState},
    route::{
        RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope,
        RouteType,
    },
};
use rtnetlink::{LinkMessageBuilder, LinkUnspec, LinkVxlan};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

/// In the place of the address, for a forwarding entry that says more than an address (a port, a VXLAN number,
/// an interface) or none: none of ours does.
pub const NOWHERE: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);

impl Netlink {
    /// The device of this name as a VXLAN, if there is one.
    ///
    /// # Errors
    /// When the kernel refuses for another reason than there being none.
    pub fn vxlan(&self, name: &str) -> Result<Option<LinkSeen>, Error> {
        let ask = without_stats(LinkUnspec::new_with_name(name).build());
        match self.ask(Message::GetLink(ask), 0, || format!("look up device {name}")) {
            Ok(answers) => Ok(answers.iter().find_map(read_vxlan)),
            Err(e) if e.is_gone() => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Makes a VXLAN device, up, with everything that can be said in one message: a hardware address that is
    /// there from the start is one that udev's MACAddressPolicy leaves alone (flannel#1485).
    ///
    /// # Errors
    /// When the kernel refuses; [`Error::is_there`] also when another device has the same number and port.
    pub fn add_vxlan(&self, device: &Device) -> Result<(), Error> {
        let mut message = LinkVxlan::new(&device.name, device.vni).dev(device.link).port(device.port);
        message = match device.local {
            IpAddr::V4(v4) => message.local(v4),
            IpAddr::V6(v6) => message.local6(v6),
        };
        message = message
            .ttl(0)
            .tos(0)
            .learning(device.learning)
            .proxy(false)
            .rsc(false)
            .l2miss(false)
            .l3miss(false)
            .udp_zero_csum6_tx(false)
            .udp_zero_csum6_rx(false);
        if device.gbp {
            message = message.gbp();
        }
        let message = message
            .address(device.mac.0.to_vec())
            .mtu(device.mtu)
            .append_extra_attribute(LinkAttribute::TxQueueLen(0))
            .up()
            .build();
        self.create(Message::NewLink(message), || {
            format!("make device {} on interface {} with {}", device.name, device.link, device.local)
        })
    }

    /// Gives a VXLAN device another interface below, local address and learning, leaving all that is on it.
    ///
    /// # Errors
    /// When the kernel refuses: it can change only some of it, older ones less.
    pub fn change_vxlan(&self, index: u32, device: &Device) -> Result<(), Error> {
        let local = match device.local {
            IpAddr::V4(v4) => InfoVxlan::Local(v4),
            IpAddr::V6(v6) => InfoVxlan::Local6(v6),
        };
        let data = vec![InfoVxlan::Link(device.link), local, InfoVxlan::Learning(device.learning)];
        let message = LinkMessageBuilder::<LinkUnspec>::new_with_info_kind(InfoKind::Vxlan)
            .index(index)
            .set_info_data(InfoData::Vxlan(data))
            .build();
        self.set(message, || {
            format!("let device {} use {} on interface {}", device.name, device.local, device.link)
        })
    }

    /// Brings a device up, and says nothing else about it.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn only_up(&self, index: u32) -> Result<(), Error> {
        let message = LinkUnspec::new_with_index(index).up().build();
        self.set(message, || format!("bring device {index} up"))
    }

    /// Sets a device's MTU.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn set_mtu(&self, index: u32, mtu: u32) -> Result<(), Error> {
        let message = LinkUnspec::new_with_index(index).mtu(mtu).build();
        self.set(message, || format!("set MTU {mtu} of device {index}"))
    }

    /// The permanent neighbours of a device.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn permanent_neighbours(&self, index: u32, of: Family) -> Result<BTreeMap<IpAddr, Mac>, Error> {
        let mut ask = NeighbourMessage::default();
        ask.header.family = family_of(of);
        ask.attributes.push(NeighbourAttribute::IfIndex(index));
        let what = || format!("list neighbours of device {index}");
        let answers = self.ask(Message::GetNeighbour(ask), NLM_F_DUMP, what)?;
        let entries = answers.iter().filter_map(|answer| match answer {
            Message::NewNeighbour(entry) => Some(entry),
            _ => None,
        });
        let permanent = entries
            .filter(|entry| entry.header.ifindex == index && has_state(entry, &[NeighbourState::Permanent]));
        Ok(permanent.filter_map(|entry| Some((destination(entry)?, hardware(entry)?))).collect())
    }

    /// The permanent forwarding entries of a VXLAN device, each place that an address leads to on its own.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn permanent_fdb(&self, index: u32) -> Result<BTreeSet<(Mac, IpAddr)>, Error> {
        let mut ask = NeighbourMessage::default();
        ask.header.family = AddressFamily::Bridge;
        ask.header.ifindex = index;
        let what = || format!("list forwarding entries of device {index}");
        let answers = self.ask(Message::GetNeighbour(ask), NLM_F_DUMP, what)?;
        let entries = answers.iter().filter_map(|answer| match answer {
            Message::NewNeighbour(entry) => Some(entry),
            _ => None,
        });
        let lasting = entries.filter(|entry| {
            entry.header.ifindex == index
                && entry.header.flags.contains(NeighbourFlags::Own)
                && has_state(entry, &[NeighbourState::Permanent, NeighbourState::Noarp])
        });
        Ok(lasting.filter_map(|entry| Some((hardware(entry)?, place(entry)))).collect())
    }

    /// Puts a permanent neighbour, in the place of one with the same address.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn put_neighbour(&self, index: u32, ip: IpAddr, mac: Mac) -> Result<(), Error> {
        let mut message = neighbour(index, ip, mac);
        message.header.state = NeighbourState::Permanent;
        self.put(Message::NewNeighbour(message), || format!("put neighbour {ip} at {mac}"))
    }

    /// Takes a neighbour away.
    ///
    /// # Errors
    /// When the kernel refuses; [`Error::is_gone`] when there is none.
    pub fn delete_neighbour(&self, index: u32, ip: IpAddr, mac: Mac) -> Result<(), Error> {
        let message = neighbour(index, ip, mac);
        self.change(Message::DelNeighbour(message), || format!("delete neighbour {ip}"))
    }

    /// Puts a forwarding entry, in the place of one with the same hardware address.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn put_fdb(&self, index: u32, mac: Mac, place: IpAddr) -> Result<(), Error> {
        let mut message = forwarding(index, mac, place);
        message.header.state = NeighbourState::Permanent;
        self.put(Message::NewNeighbour(message), || format!("put forwarding entry {mac} to {place}"))
    }

    /// Takes one place of a forwarding entry away; with [`NOWHERE`], the whole entry.
    ///
    /// # Errors
    /// When the kernel refuses; [`Error::is_gone`] when there is none.
    pub fn delete_fdb(&self, index: u32, mac: Mac, place: IpAddr) -> Result<(), Error> {
        let message = forwarding(index, mac, place);
        self.change(Message::DelNeighbour(message), || format!("delete forwarding entry {mac} to {place}"))
    }

    /// The unicast routes of a family in the main table.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn main_routes(&self, of: Family) -> Result<BTreeSet<RouteSeen>, Error> {
        let mut ask = RouteMessage::default();
        ask.header.address_family = family_of(of);
        ask.header.table = RouteHeader::RT_TABLE_MAIN;
        match self.ask(Message::GetRoute(ask), NLM_F_DUMP, || format!("list {of} routes")) {
            Ok(answers) => Ok(answers.iter().filter_map(|answer| read_main_route(answer, of)).collect()),
            // A namespace that never had a route has no table, a kernel without IPv6 no family.
            Err(e) if e.is_gone() || e.knows_no_family() => Ok(BTreeSet::new()),
            Err(e) => Err(e),
        }
    }

    /// Puts the route to a peer, in the place of one with the same destination and metric. A direct one finds
    /// its device by the gateway.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn put_peer_route(&self, index: u32, dst: IpNetwork, hop: Hop) -> Result<(), Error> {
        let mut message = main_route(dst);
        let gateway = match hop {
            Hop::Vxlan(gateway) => {
                message.header.flags = RouteFlags::Onlink;
                message.attributes.push(RouteAttribute::Oif(index));
                gateway
            }
            Hop::Direct(gateway) => gateway,
        };
        message.attributes.push(RouteAttribute::Gateway(RouteAddress::from(gateway)));
        self.put(Message::NewRoute(message), || format!("put route {dst} via {gateway}"))
    }

    /// Takes away exactly this route.
    ///
    /// # Errors
    /// When the kernel refuses; [`Error::is_gone`] when it is not there.
    pub fn delete_main_route(&self, route: &RouteSeen) -> Result<(), Error> {
        let mut message = main_route(route.dst);
        message.header.protocol = RouteProtocol::from(route.protocol);
        message.header.scope = if route.global { RouteScope::Universe } else { RouteScope::NoWhere };
        message.attributes.extend(route.device.map(RouteAttribute::Oif));
        message
            .attributes
            .extend(route.gateway.map(|gateway| RouteAttribute::Gateway(RouteAddress::from(gateway))));
        if route.metric != 0 {
            message.attributes.push(RouteAttribute::Priority(route.metric));
        }
        self.change(Message::DelRoute(message), || format!("delete route {}", route.dst))
    }

    fn put(&self, message: Message, what: impl Fn() -> String) -> Result<(), Error> {
        self.ask(message, NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE, what).map(drop)
    }
}

fn family_of(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    }
}

fn neighbour(index: u32, ip: IpAddr, mac: Mac) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(ip);
    message.header.ifindex = index;
    message.header.kind = RouteType::Unicast;
    message.attributes = vec![
        NeighbourAttribute::Destination(neighbour_address(ip)),
        NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()),
    ];
    message
}

fn forwarding(index: u32, mac: Mac, place: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = index;
    message.header.flags = NeighbourFlags::Own;
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()));
    if place != NOWHERE {
        message.attributes.push(NeighbourAttribute::Destination(neighbour_address(place)));
    }
    message
}

fn neighbour_address(ip: IpAddr) -> NeighbourAddress {
    match ip {
        IpAddr::V4(v4) => NeighbourAddress::Inet(v4),
        IpAddr::V6(v6) => NeighbourAddress::Inet6(v6),
    }
}

/// As flannel makes routes: `RTPROT_BOOT`, global, unicast, main table, nothing else said.
fn main_route(dst: IpNetwork) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(dst.ip());
    message.header.destination_prefix_length = dst.prefix();
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Boot;
    message.header.scope = RouteScope::Universe;
    message.header.kind = RouteType::Unicast;
    message.attributes.push(RouteAttribute::Destination(RouteAddress::from(dst.network())));
    message
}

fn read_vxlan(message: &Message) -> Option<LinkSeen> {
    let Message::NewLink(message) = message else { return None };
    let mut link = LinkSeen {
        index: message.header.index,
        mac: None,
        mtu: 0,
        up: message.header.flags.contains(LinkFlags::Up),
        vxlan: None,
        tx_checksum: None,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::Address(bytes) => link.mac = Mac::from_bytes(bytes),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    if let LinkInfo::Data(InfoData::Vxlan(data)) = info {
                        link.vxlan = Some(read_vxlan_data(data));
                    }
                }
            }
            _ => {}
        }
    }
    Some(link)
}

fn read_vxlan_data(data: &[InfoVxlan]) -> VxlanSeen {
    let mut seen = VxlanSeen::default();
    for one in data {
        match one {
            InfoVxlan::Id(vni) => seen.vni = *vni,
            InfoVxlan::Port(port) => seen.port = *port,
            InfoVxlan::Link(link) => seen.link = *link,
            InfoVxlan::Local(ip) => seen.local = Some(IpAddr::V4(*ip)),
            InfoVxlan::Local6(ip) => seen.local = Some(IpAddr::V6(*ip)),
            InfoVxlan::Group(ip) => seen.group = Some(IpAddr::V4(*ip)),
            InfoVxlan::Group6(ip) => seen.group = Some(IpAddr::V6(*ip)),
            InfoVxlan::Learning(on) => seen.learning = *on,
            InfoVxlan::Gbp => seen.gbp = true,
            InfoVxlan::L2Miss(on) | InfoVxlan::L3Miss(on) => seen.misses |= *on,
            _ => {}
        }
    }
    seen
}

/// States are bits; `bridge fdb add` sets two of them.
fn has_state(entry: &NeighbourMessage, any: &[NeighbourState]) -> bool {
    any.iter().any(|state| u16::from(entry.header.state) & u16::from(*state) != 0)
}

fn hardware(entry: &NeighbourMessage) -> Option<Mac> {
    entry.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::LinkLayerAddress(bytes) => Mac::from_bytes(bytes),
        _ => None,
    })
}

fn destination(entry: &NeighbourMessage) -> Option<IpAddr> {
    entry.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => Some(IpAddr::V4(*v4)),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => Some(IpAddr::V6(*v6)),
        // The library knows the address's family only from the header, which says AF_BRIDGE.
        NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => {
            let v4 = || bytes.first_chunk().map(|bytes: &[u8; 4]| IpAddr::V4(Ipv4Addr::from(*bytes)));
            let v6 = || bytes.first_chunk().map(|bytes: &[u8; 16]| IpAddr::V6(Ipv6Addr::from(*bytes)));
            if bytes.len() == 4 { v4() } else { v6() }
        }
        _ => None,
    })
}

/// Where a forwarding entry leads.
fn place(entry: &NeighbourMessage) -> IpAddr {
    let says_more = entry.attributes.iter().any(|attribute| {
        matches!(
            attribute,
            NeighbourAttribute::Port(_) | NeighbourAttribute::Vni(_) | NeighbourAttribute::IfIndex(_)
        )
    });
    destination(entry).filter(|_| !says_more).unwrap_or(NOWHERE)
}

fn read_main_route(message: &Message, of: Family) -> Option<RouteSeen> {
    let Message::NewRoute(message) = message else { return None };
    let header = &message.header;
    let mut table = u32::from(header.table);
    let any = match of {
        Family::V4 => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        Family::V6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    let address = |address: &RouteAddress| match address {
        RouteAddress::Inet(v4) => Some(IpAddr::V4(*v4)),
        RouteAddress::Inet6(v6) => Some(IpAddr::V6(*v6)),
        _ => None,
    };
    let (mut dst, mut metric, mut gateway, mut device) = (any, 0, None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(to) => dst = address(to)?,
            RouteAttribute::Gateway(by) => gateway = address(by),
            RouteAttribute::Oif(oif) => device = Some(*oif),
            RouteAttribute::Priority(priority) => metric = *priority,
            RouteAttribute::Table(number) => table = *number,
            _ => {}
        }
    }
    let main = table == u32::from(RouteHeader::RT_TABLE_MAIN);
    let learned = header.flags.contains(RouteFlags::Cloned);
    if !main || learned || header.kind != RouteType::Unicast || header.address_family != family_of(of) {
        return None;
    }
    Some(RouteSeen {
        dst: IpNetwork::new(dst, header.destination_prefix_length).ok()?,
        metric,
        gateway,
        device,
        onlink: header.flags.contains(RouteFlags::Onlink),
        protocol: header.protocol.into(),
        global: header.scope == RouteScope::Universe,
    })
}
