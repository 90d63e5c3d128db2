//! Hears what others do to the kernel's tables, and tells what of it concerns us.
//!
//! Two multicast sockets: rtnetlink's (devices, addresses, routes, neighbours) and nftables'. Most of what is
//! heard is this daemon's own work, or pods coming and going, so each event is compared with what is wanted, and
//! only what differs wakes anybody. When the kernel has more to tell than the buffer holds, everything counts as
//! touched. [`touches`] is pure.

use crate::{
    mac::Mac,
    overlay::{Desired, Hop},
    record::{Family, PerFamily},
};
use ipnetwork::IpNetwork;
use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::{
    RouteNetlinkMessage,
    link::{LinkAttribute, LinkMessage},
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::{RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage},
};
use nix::{
    errno::Errno,
    sys::socket::{self, AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, sockopt},
};
use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd, OwnedFd},
};
use tokio::io::{Interest, unix::AsyncFd};

/// A bit for each of RTNLGRP_LINK (1), NEIGH (3), IPV4_IFADDR (5), IPV4_ROUTE (7), IPV6_IFADDR (9), IPV6_ROUTE (11).
const ROUTE_GROUPS: u32 = 1 | 1 << 2 | 1 << 4 | 1 << 6 | 1 << 8 | 1 << 10;
/// NFNLGRP_NFTABLES (7)
const NFTABLES_GROUP: u32 = 1 << 6;
/// For a burst of 15,000 events, as the removal of a device with 5,000 peers makes it.
const BUFFER: usize = 4 << 20;

/// What somebody has touched.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Touched {
    /// Something that we want otherwise.
    pub overlay: bool,
    /// What the choice of the interface below depends on.
    pub underlay: bool,
}

impl Touched {
    /// Nobody knows what.
    pub const ALL: Self = Self { overlay: true, underlay: true };

    fn is_nothing(self) -> bool {
        self == Self::default()
    }

    fn or(self, other: Self) -> Self {
        Self { overlay: self.overlay || other.overlay, underlay: self.underlay || other.underlay }
    }
}

/// The sockets, and what their events are compared with.
#[derive(Debug)]
pub struct Monitor {
    route: AsyncFd<OwnedFd>,
    nftables: Option<AsyncFd<OwnedFd>>,
    view: View,
    buffer: Vec<u8>,
}

impl Monitor {
    /// Opens the sockets in this thread's network namespace.
    ///
    /// # Errors
    /// When rtnetlink's cannot be opened. Without nftables' the rules are looked at now and then instead.
    pub fn open() -> io::Result<Self> {
        let nftables = socket(SockProtocol::NetlinkNetFilter, NFTABLES_GROUP)
            .inspect_err(|e| log::warn!("listen to changes of nftables: {e}"))
            .ok();
        let route = socket(SockProtocol::NetlinkRoute, ROUTE_GROUPS)?;
        Ok(Self { route, nftables, view: View::default(), buffer: vec![0; 32 << 10] })
    }

    /// The devices of our names, as they were last seen.
    pub fn see(&mut self, devices: PerFamily<u32>, underlay: Option<u32>) {
        self.view.devices = devices;
        self.view.underlay = underlay;
    }

    /// Waits until something that matters is touched. May be dropped at any time.
    pub async fn next(&mut self, wanted: &Desired) -> Touched {
        loop {
            let touched = match &self.nftables {
                None => match self.route.readable().await {
                    Ok(mut ready) => {
                        ready.clear_ready();
                        self.read_route(wanted)
                    }
                    Err(_) => Touched::ALL,
                },
                Some(nftables) => tokio::select! {
                    biased;
                    ready = self.route.readable() => match ready {
                        Ok(mut ready) => {
                            ready.clear_ready();
                            self.read_route(wanted)
                        }
                        Err(_) => Touched::ALL,
                    },
                    ready = nftables.readable() => match ready {
                        Ok(mut ready) => {
                            ready.clear_ready();
                            self.read_nftables()
                        }
                        Err(_) => Touched { overlay: true, underlay: false },
                    },
                },
            };
            if !touched.is_nothing() {
                return touched;
            }
        }
    }

    fn read_route(&mut self, wanted: &Desired) -> Touched {
        let mut touched = Touched::default();
        loop {
            match receive(self.route.get_ref(), &mut self.buffer) {
                Ok(None) => return touched,
                Ok(Some(datagram)) => {
                    for event in events(datagram) {
                        touched = touched.or(touches(&event, &mut self.view, wanted));
                    }
                }
                Err(Errno::ENOBUFS) => touched = Touched::ALL,
                Err(e) => {
                    log::warn!("read from rtnetlink: {e}");
                    return Touched::ALL;
                }
            }
        }
    }

    fn read_nftables(&mut self) -> Touched {
        let Some(socket) = &self.nftables else { return Touched::default() };
        let mut touched = Touched::default();
        loop {
            match receive(socket.get_ref(), &mut self.buffer) {
                Ok(None) => return touched,
                Ok(Some(datagram)) => touched.overlay |= names_table(datagram, crate::nft::TABLE),
                Err(Errno::ENOBUFS) => touched.overlay = true,
                Err(e) => {
                    log::warn!("read from nftables: {e}");
                    return Touched { overlay: true, underlay: false };
                }
            }
        }
    }
}

fn socket(protocol: SockProtocol, groups: u32) -> io::Result<AsyncFd<OwnedFd>> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let socket = socket::socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?;
    // Without the privilege to exceed the limit the default must do; overruns are noticed.
    let _ = socket::setsockopt(&socket, sockopt::RcvBufForce, &BUFFER);
    socket::bind(socket.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
    listen(socket)
}

#[allow(unsafe_code, reason = "tokio's safe constructors are deprecated since 1.54")]
fn listen(socket: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is open, always names the same descriptor, and is closed only when it is dropped.
    unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) }.map_err(io::Error::from)
}

/// Reads one datagram; `None` when there is none at present.
fn receive<'b>(socket: &OwnedFd, buffer: &'b mut [u8]) -> nix::Result<Option<&'b [u8]>> {
    loop {
        match socket::recv(socket.as_raw_fd(), buffer, MsgFlags::empty()) {
            Ok(0) | Err(Errno::EAGAIN) => return Ok(None),
            Ok(length) => return Ok(buffer.get(..length)),
            Err(Errno::EINTR) => {}
            Err(e) => return Err(e),
        }
    }
}

/// What is known of the machine's devices while listening.
#[derive(Debug, Default)]
pub struct View {
    /// Our devices' numbers.
    devices: PerFamily<u32>,
    /// The number of the interface below.
    underlay: Option<u32>,
    /// Ports of a bridge: pods'.
    ports: BTreeSet<u32>,
}

impl View {
    fn family_of(&self, index: u32) -> Option<Family> {
        self.devices.iter().find(|(_, device)| **device == index).map(|(family, _)| family)
    }
}

/// One change, as the kernel tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A device.
    Link {
        /// Number.
        index: u32,
        /// Name.
        name: String,
        /// It belongs to a bridge.
        port: bool,
        /// It is no more.
        gone: bool,
    },
    /// An address of a device.
    Address {
        /// The device's number.
        index: u32,
    },
    /// A neighbour.
    Neighbour {
        /// The device's number.
        index: u32,
        /// Its address.
        ip: IpAddr,
        /// Its hardware address.
        mac: Option<Mac>,
        /// It stays until it is removed.
        permanent: bool,
        /// It is no more.
        gone: bool,
    },
    /// A forwarding entry.
    Fdb {
        /// The device's number.
        index: u32,
        /// The hardware address.
        mac: Mac,
        /// Where it leads.
        place: Option<IpAddr>,
        /// It stays until it is removed.
        permanent: bool,
        /// It is no more.
        gone: bool,
    },
    /// A route of the main table.
    Route {
        /// Where to; `None` for a default route.
        dst: Option<IpNetwork>,
        /// The next hop.
        gateway: Option<IpAddr>,
        /// The device's number.
        device: Option<u32>,
        /// Without regard to the device's own network.
        onlink: bool,
        /// It is no more.
        gone: bool,
    },
}

/// Whether an event concerns us: it takes away what is wanted, or brings what is not.
#[must_use]
pub fn touches(event: &Event, view: &mut View, wanted: &Desired) -> Touched {
    const NOTHING: Touched = Touched { overlay: false, underlay: false };
    const OVERLAY: Touched = Touched { overlay: true, underlay: false };
    const UNDERLAY: Touched = Touched { overlay: false, underlay: true };
    let entries = |family: Family| wanted.devices.get(family).map(|device| &device.entries);
    match event {
        Event::Link { index, name, port, gone } => {
            for (family, device) in wanted.devices.iter() {
                if device.name == *name {
                    *view.devices.slot(family) = (!gone).then_some(*index);
                    return OVERLAY;
                }
            }
            if wanted.unwanted.iter().any(|(_, unwanted)| unwanted == name) {
                return if *gone { NOTHING } else { OVERLAY };
            }
            if *port && view.underlay != Some(*index) {
                if *gone {
                    view.ports.remove(index)
                } else {
                    view.ports.insert(*index)
                };
                return NOTHING;
            }
            view.ports.remove(index);
            UNDERLAY
        }
        Event::Address { index } => match view.family_of(*index) {
            Some(_) => OVERLAY,
            None if view.ports.contains(index) => NOTHING,
            None => UNDERLAY,
        },
        Event::Neighbour { index, ip, mac, permanent, gone } => {
            let family = Family::of(*ip);
            if view.devices.get(family) != Some(index) {
                return NOTHING;
            }
            let want = entries(family).and_then(|entries| entries.neighbours.get(ip));
            let wrong = match want {
                Some(want) => *gone || !permanent || *mac != Some(*want),
                None => !gone && *permanent,
            };
            if wrong { OVERLAY } else { NOTHING }
        }
        Event::Fdb { index, mac, place, permanent, gone } => {
            let Some(family) = view.family_of(*index) else { return NOTHING };
            let want = entries(family).and_then(|entries| entries.fdb.get(mac)).copied();
            let same = want.is_some() && want == *place;
            let wrong = if *gone { same } else { *permanent && !same };
            if wrong { OVERLAY } else { NOTHING }
        }
        Event::Route { dst: None, .. } => UNDERLAY,
        Event::Route { dst: Some(dst), gateway, device, onlink, gone } => {
            let family = Family::of_subnet(*dst);
            let ours = device.is_some_and(|device| view.family_of(device).is_some());
            let wrong = match entries(family).and_then(|entries| entries.routes.get(dst)) {
                Some(Hop::Vxlan(via)) => *gone || !ours || !onlink || *gateway != Some(*via),
                Some(Hop::Direct(via)) => *gone || ours || *gateway != Some(*via),
                // Whatever route comes or goes may alter who is in the same network.
                None if wanted.direct.is_some() => !ours || (*onlink && !gone),
                None => ours && *onlink && !gone,
            };
            if wrong { OVERLAY } else { NOTHING }
        }
    }
}

/// The events of a datagram; what cannot be read is none.
fn events(datagram: &[u8]) -> Vec<Event> {
    let mut found = Vec::new();
    let mut rest = datagram;
    while let Ok(message) = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest) {
        let length = usize::try_from(message.header.length).unwrap_or(rest.len()).next_multiple_of(4);
        if let NetlinkPayload::InnerMessage(message) = message.payload {
            found.extend(event(message));
        }
        if length == 0 || length >= rest.len() {
            break;
        }
        rest = &rest[length..];
    }
    found
}

fn event(message: RouteNetlinkMessage) -> Option<Event> {
    use RouteNetlinkMessage as Message;
    match message {
        Message::NewLink(link) => read_link(&link, false),
        Message::DelLink(link) => read_link(&link, true),
        Message::NewAddress(address) | Message::DelAddress(address) => {
            Some(Event::Address { index: address.header.index })
        }
        Message::NewNeighbour(entry) => read_neighbour(&entry, false),
        Message::DelNeighbour(entry) => read_neighbour(&entry, true),
        Message::NewRoute(route) => read_route(&route, false),
        Message::DelRoute(route) => read_route(&route, true),
        _ => None,
    }
}

fn read_link(link: &LinkMessage, gone: bool) -> Option<Event> {
    // A bridge tells about its ports in messages of its own family; they say nothing new.
    if link.header.interface_family == netlink_packet_route::AddressFamily::Bridge {
        return None;
    }
    let (mut name, mut port) = (None, false);
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(text) => name = Some(text.clone()),
            LinkAttribute::Controller(_) => port = true,
            _ => {}
        }
    }
    Some(Event::Link { index: link.header.index, name: name?, port, gone })
}

fn read_neighbour(entry: &NeighbourMessage, gone: bool) -> Option<Event> {
    let index = entry.header.ifindex;
    let (mut ip, mut mac) = (None, None);
    for attribute in &entry.attributes {
        match attribute {
            NeighbourAttribute::Destination(to) => ip = neighbour_ip(to),
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = Mac::from_bytes(bytes),
            _ => {}
        }
    }
    if entry.header.family == netlink_packet_route::AddressFamily::Bridge {
        // iproute2 sets both.
        let permanent =
            has_state(entry, NeighbourState::Permanent) || has_state(entry, NeighbourState::Noarp);
        return Some(Event::Fdb { index, mac: mac?, place: ip, permanent, gone });
    }
    let permanent = has_state(entry, NeighbourState::Permanent);
    Some(Event::Neighbour { index, ip: ip?, mac, permanent, gone })
}

/// States are bits, and several may be set.
fn has_state(entry: &NeighbourMessage, state: NeighbourState) -> bool {
    u16::from(entry.header.state) & u16::from(state) != 0
}

fn neighbour_ip(address: &NeighbourAddress) -> Option<IpAddr> {
    match address {
        NeighbourAddress::Inet(v4) => Some(IpAddr::V4(*v4)),
        NeighbourAddress::Inet6(v6) => Some(IpAddr::V6(*v6)),
        // A forwarding entry's address has no family of its own.
        NeighbourAddress::Other(bytes) => match bytes.len() {
            4 => bytes.first_chunk().map(|bytes: &[u8; 4]| Ipv4Addr::from(*bytes).into()),
            16 => bytes.first_chunk().map(|bytes: &[u8; 16]| Ipv6Addr::from(*bytes).into()),
            _ => None,
        },
        _ => None,
    }
}

fn read_route(route: &RouteMessage, gone: bool) -> Option<Event> {
    let ip = |address: &RouteAddress| match address {
        RouteAddress::Inet(v4) => Some(IpAddr::V4(*v4)),
        RouteAddress::Inet6(v6) => Some(IpAddr::V6(*v6)),
        _ => None,
    };
    let (mut dst, mut gateway, mut device) = (None, None, None);
    let mut table = u32::from(route.header.table);
    for attribute in &route.attributes {
        match attribute {
            RouteAttribute::Destination(to) => dst = ip(to),
            RouteAttribute::Gateway(by) => gateway = ip(by),
            RouteAttribute::Oif(index) => device = Some(*index),
            RouteAttribute::Table(number) => table = *number,
            _ => {}
        }
    }
    if table != u32::from(RouteHeader::RT_TABLE_MAIN) || route.header.flags.contains(RouteFlags::Cloned) {
        return None;
    }
    let prefix = route.header.destination_prefix_length;
    let dst = if prefix == 0 { None } else { Some(IpNetwork::new(dst?, prefix).ok()?) };
    let onlink = route.header.flags.contains(RouteFlags::Onlink);
    Some(Event::Route { dst, gateway, device, onlink, gone })
}

/// Whether a datagram of nftables' tells about a table of this name. In every message about tables, chains,
/// rules, sets and elements the attribute 1 is the table's name.
fn names_table(datagram: &[u8], table: &str) -> bool {
    const HEADERS: usize = 16 + 4;
    let mut rest = datagram;
    while let Some((length, message)) = word(rest).and_then(|length| Some((length, rest.get(..length)?))) {
        let name = message.get(HEADERS..).and_then(|attribute| {
            let length = usize::from(u16::from_ne_bytes(*attribute.first_chunk()?));
            let kind = u16::from_ne_bytes(*attribute.get(2..)?.first_chunk()?) & 0x3fff;
            (kind == 1).then(|| attribute.get(4..length))?
        });
        if name.and_then(|name| name.strip_suffix(b"\0")) == Some(table.as_bytes()) {
            return true;
        }
        let Some(next) = rest.get(length.next_multiple_of(4)..).filter(|_| length >= HEADERS) else { break };
        rest = next;
    }
    false
}

fn word(bytes: &[u8]) -> Option<usize> {
    bytes.first_chunk().and_then(|bytes| usize::try_from(u32::from_ne_bytes(*bytes)).ok())
}

#[cfg(test)]
mod tests;
