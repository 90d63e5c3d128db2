//! The kernel's link, address, route and neighbour tables (rtnetlink), as verbs.
//!
//! A [`Netlink`] belongs to the network namespace it was
//! opened in. Each verb is one request; what the kernel says against it comes back with the operation in
//! front: "add route 0.0.0.0/0 via 10.244.1.1: Network is unreachable (os error 101): Nexthop has invalid gateway".
//! The kernel answers while it takes the request, so requests are sent one after another: several in flight are
//! slower (measured).

pub mod ethtool;
mod machine;
mod message;
mod socket;
pub mod vxlan;

use crate::mac::Mac;
use cni::Route;
use ipnetwork::IpNetwork;
use message::{address_message, family, read_address, read_link, read_route, route_message, without_stats};
use netlink_packet_core::{NLM_F_ACK, NLM_F_APPEND, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage as Message,
    address::{AddressHeaderFlags, AddressMessage},
    link::{
        AfSpecInet, AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InetDevConf, InfoData, InfoKind, InfoVeth,
        LinkAttribute, LinkMessage,
    },
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState},
    route::RouteMessage,
};
use nix::libc;
use rtnetlink::{LinkBridge, LinkBridgePort, LinkMessageBuilder, LinkUnspec, LinkVeth};
use socket::{Refusal, Socket};
use std::{fmt, io, net::IpAddr, os::fd::RawFd};

/// A request that the kernel refused, or that could not be made.
#[derive(Debug)]
pub struct Error {
    what: String,
    refusal: Refusal,
}

impl Error {
    /// The kernel's error number, 0 when it did not come from the kernel.
    #[must_use]
    pub fn errno(&self) -> i32 {
        self.refusal.source.raw_os_error().unwrap_or(0)
    }

    /// What was to be changed or removed is not there.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        matches!(self.errno(), libc::ENODEV | libc::ENOENT | libc::ESRCH | libc::EADDRNOTAVAIL | libc::ENXIO)
    }

    /// The kernel does without this address family.
    #[must_use]
    pub fn knows_no_family(&self) -> bool {
        matches!(self.errno(), libc::EAFNOSUPPORT | libc::EOPNOTSUPP)
    }

    /// What was to be made is there already.
    #[must_use]
    pub fn is_there(&self) -> bool {
        self.errno() == libc::EEXIST
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Refusal { source, said } = &self.refusal;
        write!(f, "{}: {source}", self.what)?;
        said.as_ref().map_or(Ok(()), |said| write!(f, ": {said}"))
    }
}

impl std::error::Error for Error {}

/// What was to be removed may be gone already.
///
/// # Errors
/// Every other refusal.
pub fn fine_if_gone(done: Result<(), Error>) -> Result<(), Error> {
    done.or_else(|e| if e.is_gone() { Ok(()) } else { Err(e) })
}

/// What was to be made may be there already.
///
/// # Errors
/// Every other refusal.
pub fn fine_if_there(done: Result<(), Error>) -> Result<(), Error> {
    done.or_else(|e| if e.is_there() { Ok(()) } else { Err(e) })
}

/// A device as the kernel shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Number in its namespace.
    pub index: u32,
    /// Name.
    pub name: String,
    /// Hardware address.
    pub mac: Option<Mac>,
    /// MTU.
    pub mtu: u32,
    /// Administratively up.
    pub up: bool,
    /// The kernel's work queue has noticed that it has a carrier (`IF_OPER_UP`).
    pub operational: bool,
    /// Asked to be promiscuous (by a person or by us, not by the kernel).
    pub promiscuous: bool,
    /// What kind of device.
    pub kind: Kind,
    /// Of a veth: the number of the other end, in that one's namespace.
    pub peer: Option<u32>,
    /// Number of the bridge (or other controller) that it is a port of.
    pub controller: Option<u32>,
    /// What `ip link` shows as alias.
    pub alias: Option<String>,
    /// Settings as a port of a bridge.
    pub port: Option<Port>,
}

/// Device kinds that are told apart here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A software bridge.
    Bridge,
    /// One end of a veth pair.
    Veth,
    /// Anything else.
    Other,
}

/// A device as a port of a bridge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Port {
    /// Sends back through the port that a frame came from.
    pub hairpin: bool,
    /// Exchanges frames only with ports that are not isolated.
    pub isolated: bool,
    /// Takes part: frames pass.
    pub forwarding: bool,
}

/// A bridge to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewBridge {
    /// Name.
    pub name: String,
    /// Fixed from the start, so it never follows a port's.
    pub mac: Option<Mac>,
    /// MTU until ports determine it.
    pub mtu: u32,
    /// Promiscuous.
    pub promiscuous: bool,
}

/// A veth pair to be made, one end straight in another namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewVeth {
    /// This end.
    pub name: String,
    /// This end's hardware address.
    pub mac: Mac,
    /// The other end's name.
    pub peer: String,
    /// The other end's hardware address.
    pub peer_mac: Mac,
    /// Of both ends.
    pub mtu: u32,
}

/// An address on a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// Address with prefix length.
    pub cidr: IpNetwork,
    /// Valid everywhere, as against link or host scope.
    pub global: bool,
    /// Neither leased nor from a router advertisement.
    pub permanent: bool,
}

/// One rtnetlink socket.
#[derive(Debug)]
pub struct Netlink {
    socket: Socket,
}

impl Netlink {
    /// Opens a socket in this thread's network namespace.
    ///
    /// # Errors
    /// When the kernel gives no socket.
    pub fn open() -> io::Result<Self> {
        Ok(Self { socket: Socket::open()? })
    }

    /// The device of this name, if there is one.
    ///
    /// # Errors
    /// When the kernel refuses for another reason than there being none.
    pub fn link(&self, name: &str) -> Result<Option<Link>, Error> {
        let ask = without_stats(LinkUnspec::new_with_name(name).build());
        self.one_link(ask, || format!("look up device {name}"))
    }

    /// The device of this number, if there is one.
    ///
    /// # Errors
    /// When the kernel refuses for another reason than there being none.
    pub fn link_at(&self, index: u32) -> Result<Option<Link>, Error> {
        let ask = without_stats(LinkUnspec::new_with_index(index).build());
        self.one_link(ask, || format!("look up device {index}"))
    }

    fn one_link(&self, ask: LinkMessage, what: impl Fn() -> String) -> Result<Option<Link>, Error> {
        match self.ask(Message::GetLink(ask), 0, what) {
            Ok(answers) => Ok(answers.iter().find_map(read_link)),
            Err(e) if e.is_gone() => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// All devices.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn links(&self) -> Result<Vec<Link>, Error> {
        let ask = without_stats(LinkMessage::default());
        let answers = self.ask(Message::GetLink(ask), NLM_F_DUMP, || "list devices".into())?;
        Ok(answers.iter().filter_map(read_link).collect())
    }

    /// Makes a bridge, up.
    ///
    /// # Errors
    /// When the kernel refuses; [`Error::is_there`] when a device of this name exists.
    pub fn add_bridge(&self, bridge: &NewBridge) -> Result<(), Error> {
        let mut message = LinkBridge::new(&bridge.name).mtu(bridge.mtu);
        if let Some(mac) = bridge.mac {
            message = message.address(mac.0.to_vec());
        }
        if bridge.promiscuous {
            message = message.promiscuous(true);
        }
        self.create(Message::NewLink(message.build()), || format!("make bridge {}", bridge.name))
    }

    /// Makes a veth pair: this end up and a port of `bridge`, the other one down in `netns`, everything in one
    /// message. (The other end cannot be brought up in it: the kernel wants its peer registered first.)
    ///
    /// # Errors
    /// When the kernel refuses; then neither end is there.
    pub fn add_veth(&self, veth: &NewVeth, bridge: u32, netns: RawFd) -> Result<(), Error> {
        let peer = LinkMessageBuilder::<LinkUnspec>::new()
            .name(&veth.peer)
            .address(veth.peer_mac.0.to_vec())
            .mtu(veth.mtu)
            .setns_by_fd(netns)
            .build();
        let message = LinkMessageBuilder::<LinkVeth>::new_with_info_kind(InfoKind::Veth)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
            .name(&veth.name)
            .address(veth.mac.0.to_vec())
            .mtu(veth.mtu)
            .controller(bridge)
            .up()
            .build();
        self.create(Message::NewLink(message), || format!("make veth {} with peer {}", veth.name, veth.peer))
    }

    /// Deletes a device by name.
    ///
    /// # Errors
    /// When the kernel refuses; [`Error::is_gone`] when there is none.
    pub fn delete_link(&self, name: &str) -> Result<(), Error> {
        let message = LinkUnspec::new_with_name(name).build();
        self.change(Message::DelLink(message), || format!("delete device {name}"))
    }

    /// Brings a device up; from then on its IPv4 addresses are announced when its hardware address is set
    /// (`arp_notify`, here without a detour through /proc).
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn up(&self, index: u32) -> Result<(), Error> {
        let mut conf = InetDevConf::default();
        conf.arp_notify = 1;
        let family = AfSpecUnspec::Inet(vec![AfSpecInet::DevConfRequest(conf)]);
        let family = LinkAttribute::AfSpecUnspec(vec![family]);
        let message = LinkUnspec::new_with_index(index).up().append_extra_attribute(family).build();
        self.set(message, || format!("bring device {index} up"))
    }

    /// Makes a bridge as it should be: up, its hardware address its own (a bridge whose address was set never
    /// takes that of a port), promiscuous or not.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn set_bridge(&self, index: u32, mac: Option<Mac>, promiscuous: bool) -> Result<(), Error> {
        let mut message = LinkUnspec::new_with_index(index).up().promiscuous(promiscuous);
        if let Some(mac) = mac {
            message = message.address(mac.0.to_vec());
        }
        self.set(message.build(), || format!("set up bridge {index}"))
    }

    /// Sets a device's hardware address. Setting the one it has makes the kernel announce it to the neighbours
    /// (`inetdev_event` and `ndisc_netdev_event` of the kernel, on NETDEV_CHANGEADDR) when `arp_notify` and
    /// `ndisc_notify` are on.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn set_mac(&self, index: u32, mac: Mac) -> Result<(), Error> {
        let message = LinkUnspec::new_with_index(index).address(mac.0.to_vec()).build();
        self.set(message, || format!("set address {mac} of device {index}"))
    }

    /// Settings of a bridge's port, with the device's alias, in one message. The port gets no IPv6 address of
    /// its own: whatever it receives goes to the bridge.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn set_port(
        &self,
        index: u32,
        hairpin: bool,
        isolated: bool,
        alias: Option<&str>,
    ) -> Result<(), Error> {
        let mut message = LinkBridgePort::new(index).hairpin(hairpin).isolated(isolated);
        if let Some(alias) = alias {
            message = message.alias(alias);
        }
        let no_address = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
        let family = AfSpecUnspec::Inet6(vec![no_address]);
        let message = message.append_extra_attribute(LinkAttribute::AfSpecUnspec(vec![family])).build();
        match self.set(message.clone(), || format!("set up bridge port {index}")) {
            // A kernel without IPv6 knows no such family.
            Err(e) if e.knows_no_family() => {
                let mut message = message;
                message.attributes.retain(|attribute| !matches!(attribute, LinkAttribute::AfSpecUnspec(_)));
                self.set(message, || format!("set up bridge port {index}"))
            }
            other => other,
        }
    }

    /// Takes a port off its bridge and down.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn detach(&self, index: u32) -> Result<(), Error> {
        let message = LinkUnspec::new_with_index(index).nocontroller().down().build();
        self.set(message, || format!("take device {index} off its bridge"))
    }

    /// Makes a device a port of a bridge, up.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn attach(&self, index: u32, bridge: u32) -> Result<(), Error> {
        let message = LinkUnspec::new_with_index(index).controller(bridge).up().build();
        self.set(message, || format!("make device {index} a port of bridge {bridge}"))
    }

    /// The addresses of a device.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn addresses(&self, index: u32) -> Result<Vec<Address>, Error> {
        let mut ask = AddressMessage::default();
        ask.header.index = index;
        let what = || format!("list addresses of device {index}");
        let answers = self.ask(Message::GetAddress(ask), NLM_F_DUMP, what)?;
        // A kernel that knows no strict checking (before 5.0) sends those of all devices.
        Ok(answers.iter().filter_map(|answer| read_address(answer, index)).collect())
    }

    /// Puts an address on a device, usable at once (IPv6: without duplicate address detection).
    ///
    /// # Errors
    /// When the kernel refuses; [`Error::is_there`] when it has it.
    pub fn add_address(&self, index: u32, cidr: IpNetwork) -> Result<(), Error> {
        let mut message = address_message(index, cidr);
        if cidr.is_ipv6() {
            message.header.flags |= AddressHeaderFlags::Nodad;
        }
        self.create(Message::NewAddress(message), || format!("add address {cidr} to device {index}"))
    }

    /// Takes an address off a device.
    ///
    /// # Errors
    /// When the kernel refuses; [`Error::is_gone`] when it has none such.
    pub fn delete_address(&self, index: u32, cidr: IpNetwork) -> Result<(), Error> {
        let message = address_message(index, cidr);
        self.change(Message::DelAddress(message), || format!("delete address {cidr} of device {index}"))
    }

    /// Adds a route through a device. IPv4: after those to the same place that are there. IPv6 would make one
    /// route with several next hops out of them and divide the traffic, so there must be none.
    ///
    /// # Errors
    /// When the kernel refuses; [`Error::is_there`] when this very route is there (IPv6: one of the same metric).
    pub fn add_route(&self, index: u32, route: &Route) -> Result<(), Error> {
        let what = || match route.gw {
            Some(gw) => format!("add route {} via {gw}", route.dst),
            None => format!("add route {}", route.dst),
        };
        let message = Message::NewRoute(route_message(index, route));
        let second = if route.dst.is_ipv4() { NLM_F_APPEND } else { NLM_F_EXCL };
        self.ask(message, NLM_F_ACK | NLM_F_CREATE | second, what).map(drop)
    }

    /// The routes of one family through a device, in all tables but `local`.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn routes(&self, index: u32, v4: bool) -> Result<Vec<Route>, Error> {
        let mut ask = RouteMessage::default();
        ask.header.address_family = if v4 { AddressFamily::Inet } else { AddressFamily::Inet6 };
        let answers = self.ask(Message::GetRoute(ask), NLM_F_DUMP, || "list routes".into())?;
        Ok(answers.iter().filter_map(|answer| read_route(answer, index)).collect())
    }

    /// The port behind which a bridge knows a hardware address to be (`br_fdb_get`; kernel 5.0).
    ///
    /// # Errors
    /// When the kernel refuses for another reason than not knowing it.
    pub fn port_of(&self, bridge: u32, mac: Mac) -> Result<Option<u32>, Error> {
        let mut ask = NeighbourMessage::default();
        ask.header.family = AddressFamily::Bridge;
        ask.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()));
        ask.attributes.push(NeighbourAttribute::Controller(bridge));
        let found = self.neighbour(ask, || format!("look up {mac} on bridge {bridge}"))?;
        // An entry of the bridge itself is its own address.
        Ok(found.map(|entry| entry.header.ifindex).filter(|index| *index != bridge))
    }

    /// The hardware address that a device's neighbour table has for an address.
    ///
    /// # Errors
    /// When the kernel refuses for another reason than having none.
    pub fn neighbour_mac(&self, index: u32, address: IpAddr) -> Result<Option<Mac>, Error> {
        let mut ask = NeighbourMessage::default();
        ask.header.family = family(address);
        ask.header.ifindex = index;
        ask.attributes.push(NeighbourAttribute::Destination(match address {
            IpAddr::V4(v4) => NeighbourAddress::Inet(v4),
            IpAddr::V6(v6) => NeighbourAddress::Inet6(v6),
        }));
        let found = self.neighbour(ask, || format!("look up neighbour {address}"))?;
        Ok(found.and_then(|entry| {
            entry.attributes.iter().find_map(|attribute| match attribute {
                NeighbourAttribute::LinkLayerAddress(bytes) => Mac::from_bytes(bytes),
                _ => None,
            })
        }))
    }

    fn neighbour(
        &self,
        ask: NeighbourMessage,
        what: impl Fn() -> String,
    ) -> Result<Option<NeighbourMessage>, Error> {
        match self.ask(Message::GetNeighbour(ask), 0, what) {
            Ok(answers) => Ok(answers.into_iter().find_map(|answer| match answer {
                Message::NewNeighbour(entry) => Some(entry),
                _ => None,
            })),
            Err(e) if e.is_gone() => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Tells a port's bridge that a hardware address is behind this port and stays there: not learned, not
    /// forgotten, not moved by a frame that another port sends under it (NTF_STICKY).
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn pin(&self, port: u32, mac: Mac) -> Result<(), Error> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Bridge;
        message.header.ifindex = port;
        message.header.state = NeighbourState::Noarp;
        message.header.flags = NeighbourFlags::Controller | NeighbourFlags::Sticky;
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()));
        let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
        let what = || format!("pin {mac} to bridge port {port}");
        self.ask(Message::NewNeighbour(message), flags, what).map(drop)
    }

    fn create(&self, message: Message, what: impl Fn() -> String) -> Result<(), Error> {
        self.ask(message, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, what).map(drop)
    }

    fn change(&self, message: Message, what: impl Fn() -> String) -> Result<(), Error> {
        self.ask(message, NLM_F_ACK, what).map(drop)
    }

    /// RTM_NEWLINK without NLM_F_CREATE changes a device; unlike RTM_SETLINK it takes port settings too.
    fn set(&self, message: LinkMessage, what: impl Fn() -> String) -> Result<(), Error> {
        self.change(Message::NewLink(message), what)
    }

    /// One request and everything that the kernel answers.
    fn ask(&self, message: Message, flags: u16, what: impl Fn() -> String) -> Result<Vec<Message>, Error> {
        self.socket.ask(message, flags).map_err(|refusal| Error { what: what(), refusal })
    }
}
