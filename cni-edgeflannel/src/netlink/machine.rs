//! The node's interfaces, for the choice of the one that carries the VXLAN.

use super::{Error, Message, Netlink, family, without_stats};
use crate::{
    record::Family,
    underlay::{Address, DefaultRoute, Link, Machine, Reach},
};
use netlink_packet_core::NLM_F_DUMP;
use netlink_packet_route::{
    AddressFamily,
    address::{AddressAttribute, AddressFlags, AddressMessage},
    link::{LinkAttribute, LinkMessage},
    route::{RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteType},
};
use std::{collections::BTreeMap, net::IpAddr};

impl Netlink {
    /// Every interface with its addresses, the default routes, and how `reach` is reached, if that is asked.
    ///
    /// # Errors
    /// When the kernel refuses to say.
    pub fn machine(&self, reach: Option<IpAddr>) -> Result<Machine, Error> {
        let mut addresses = self.all_addresses()?;
        let ask = without_stats(LinkMessage::default());
        let answers = self.ask(Message::GetLink(ask), NLM_F_DUMP, || "list devices".into())?;
        let links = answers.iter().filter_map(|answer| read_link(answer, &mut addresses)).collect();
        let mut default_routes = Vec::new();
        for family in Family::ALL {
            default_routes.extend(self.default_routes(family)?);
        }
        let reach = match reach {
            Some(ip) => self.reach(ip),
            None => None,
        };
        Ok(Machine { links, default_routes, reach })
    }

    fn all_addresses(&self) -> Result<BTreeMap<u32, Vec<Address>>, Error> {
        let ask = Message::GetAddress(AddressMessage::default());
        let answers = self.ask(ask, NLM_F_DUMP, || "list addresses".into())?;
        let mut found: BTreeMap<u32, Vec<Address>> = BTreeMap::new();
        for (index, address) in answers.iter().filter_map(read_address) {
            found.entry(index).or_default().push(address);
        }
        Ok(found)
    }

    fn default_routes(&self, of: Family) -> Result<Vec<DefaultRoute>, Error> {
        let mut ask = RouteMessage::default();
        ask.header.address_family = match of {
            Family::V4 => AddressFamily::Inet,
            Family::V6 => AddressFamily::Inet6,
        };
        ask.header.table = RouteHeader::RT_TABLE_MAIN;
        match self.ask(Message::GetRoute(ask), NLM_F_DUMP, || format!("list {of} routes")) {
            Ok(answers) => Ok(answers.iter().flat_map(|answer| read_default_route(answer, of)).collect()),
            Err(e) if e.is_gone() || e.knows_no_family() => Ok(Vec::new()),
            Err(e) => Err(e),
        }
    }

    /// The kernel's own answer, rules and all. No answer is no reach.
    fn reach(&self, ip: IpAddr) -> Option<Reach> {
        let mut ask = RouteMessage::default();
        ask.header.address_family = family(ip);
        ask.header.destination_prefix_length = Family::of(ip).bits();
        ask.attributes.push(RouteAttribute::Destination(RouteAddress::from(ip)));
        let answers = self.ask(Message::GetRoute(ask), 0, || format!("look up the way to {ip}")).ok()?;
        answers.iter().find_map(|answer| {
            let Message::NewRoute(route) = answer else { return None };
            let index = route.attributes.iter().find_map(|attribute| match attribute {
                RouteAttribute::Oif(index) => Some(*index),
                _ => None,
            })?;
            let source = route.attributes.iter().find_map(|attribute| match attribute {
                RouteAttribute::PrefSource(RouteAddress::Inet(v4)) => Some(IpAddr::V4(*v4)),
                RouteAttribute::PrefSource(RouteAddress::Inet6(v6)) => Some(IpAddr::V6(*v6)),
                _ => None,
            });
            Some(Reach { index, source })
        })
    }
}

fn read_link(message: &Message, addresses: &mut BTreeMap<u32, Vec<Address>>) -> Option<Link> {
    let Message::NewLink(message) = message else { return None };
    let index = message.header.index;
    let (mut name, mut mtu) = (None, 0);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(text) => name = Some(text.clone()),
            LinkAttribute::Mtu(number) => mtu = *number,
            _ => {}
        }
    }
    Some(Link { index, name: name?, mtu, addresses: addresses.remove(&index).unwrap_or_default() })
}

fn read_address(message: &Message) -> Option<(u32, Address)> {
    let Message::NewAddress(message) = message else { return None };
    let (mut address, mut local) = (None, None);
    let mut flags = AddressFlags::from_bits_retain(u32::from(message.header.flags.bits()));
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Address(ip) => address = Some(*ip),
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Flags(all) => flags = *all,
            _ => {}
        }
    }
    // IFA_F_SECONDARY is IFA_F_TEMPORARY in IPv6; in IPv4 it only says "of the same subnet as another".
    let ip = local.or(address)?;
    let temporary = ip.is_ipv6() && flags.contains(AddressFlags::Secondary);
    let passing = temporary || flags.intersects(AddressFlags::Tentative | AddressFlags::Deprecated);
    Some((message.header.index, Address { ip, passing }))
}

/// One per next hop.
fn read_default_route(message: &Message, family: Family) -> Vec<DefaultRoute> {
    let Message::NewRoute(message) = message else { return Vec::new() };
    let header = &message.header;
    if header.destination_prefix_length != 0
        || header.kind != RouteType::Unicast
        || header.table != RouteHeader::RT_TABLE_MAIN
        || header.flags.intersects(RouteFlags::Cloned | RouteFlags::Dead)
    {
        return Vec::new();
    }
    let (mut metric, mut through) = (0, Vec::new());
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => through.push(*index),
            RouteAttribute::MultiPath(hops) => through.extend(hops.iter().map(|hop| hop.interface_index)),
            RouteAttribute::Priority(priority) => metric = *priority,
            _ => {}
        }
    }
    through.into_iter().map(|index| DefaultRoute { family, index, metric }).collect()
}
