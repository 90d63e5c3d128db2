//! Which interface carries the VXLAN, and with which of its addresses.
//!
//! The choice is flanneld's (`pkg/ipmatch/match.go`, `main.go`): what `--iface`, `--iface-regex` and
//! `--iface-can-reach` name, in that order; else the interface that has `--public-ip` (or the annotation
//! `node-public-ip`); else the one of the default route. Three things differ, because an edge node's uplink
//! comes and goes: it is asked again whenever the machine changes, not once; an address that is in use stays
//! as long as the interface has it; and where only the default route is gone, the interface that carries the
//! VXLAN already goes on. Pods' own addresses never count as the node's. Pure, but for [`watch`].

use crate::record::{Family, PerFamily, Underlay, UnderlayChoice};
use ipnetwork::IpNetwork;
use regex_lite::Regex;
use std::{fmt, net::IpAddr};

/// The machine, as far as the choice depends on it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Machine {
    /// Every interface, in the kernel's order.
    pub links: Vec<Link>,
    /// Every default route.
    pub default_routes: Vec<DefaultRoute>,
    /// The answer to "how is `--iface-can-reach` reached", when that was asked.
    pub reach: Option<Reach>,
}

/// An interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Its number.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// What fits through it.
    pub mtu: u32,
    /// Its addresses, in the kernel's order.
    pub addresses: Vec<Address>,
}

/// An address of an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address {
    /// The address.
    pub ip: IpAddr,
    /// Not to be taken for something new: still tentative, deprecated, or one of IPv6's temporary ones.
    pub passing: bool,
}

/// A default route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DefaultRoute {
    /// Of which family.
    pub family: Family,
    /// By which interface.
    pub index: u32,
    /// The kernel takes the lowest.
    pub metric: u32,
}

/// How an address is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reach {
    /// By which interface.
    pub index: u32,
    /// From which address.
    pub source: Option<IpAddr>,
}

/// Why there is no interface at present. It may come yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Absent {
    /// None of those that were named exists.
    NoneOf(String),
    /// No interface has the public address.
    NoAddress(IpAddr),
    /// Nothing was named, and there is no default route.
    NoDefaultRoute,
    /// The interface has no address of any family in use.
    Bare(String),
}

impl fmt::Display for Absent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoneOf(named) => write!(f, "no interface matches {named}"),
            Self::NoAddress(ip) => write!(
                f,
                "no interface has the address {ip} (--public-ip or annotation node-public-ip); for an address that \
                 is not on this node use --iface as well, or the annotation public-ip-overwrite"
            ),
            Self::NoDefaultRoute => f.write_str("there is no default route (name an interface with --iface)"),
            Self::Bare(name) => write!(f, "interface {name} has no address yet"),
        }
    }
}

/// What the choice is made for.
#[derive(Debug, Clone, Copy)]
pub struct Wish<'a> {
    /// What was asked for.
    pub choice: &'a UnderlayChoice,
    /// The families that the overlay has.
    pub families: &'a PerFamily<IpNetwork>,
    /// This node's pods: what lies in there is no address of the node.
    pub pods: &'a PerFamily<IpNetwork>,
    /// The addresses that are in use, or were before the reboot.
    pub before: &'a PerFamily<IpAddr>,
}

/// Chooses the interface and its addresses.
///
/// # Errors
/// [`Absent`]; the caller waits for the machine to change.
pub fn choose(machine: &Machine, wish: Wish<'_>) -> Result<Underlay, Absent> {
    let (link, matched) = choose_link(machine, wish)?;
    let mut local_ips = PerFamily::default();
    for (family, _) in wish.families.iter() {
        let has =
            |ip: &IpAddr| Family::of(*ip) == family && link.addresses.iter().any(|address| address.ip == *ip);
        let named = wish.choice.public_ips.get(family).copied().filter(has);
        let matched = matched.filter(has);
        let before = wish.before.get(family).copied().filter(has);
        *local_ips.slot(family) =
            named.or(matched).or(before).or_else(|| first_usable(link, family, wish.pods));
    }
    if local_ips.is_empty() {
        return Err(Absent::Bare(link.name.clone()));
    }
    Ok(Underlay { ifindex: link.index, name: link.name.clone(), mtu: link.mtu, local_ips })
}

/// The interface, and the address by which it was found.
fn choose_link<'m>(machine: &'m Machine, wish: Wish<'_>) -> Result<(&'m Link, Option<IpAddr>), Absent> {
    let choice = wish.choice;
    let links = || machine.links.iter().filter(|link| !is_overlay(&link.name));
    let by_address = |ip: IpAddr| links().find(|link| link.addresses.iter().any(|address| address.ip == ip));
    for iface in &choice.ifaces {
        let found = match iface.parse::<IpAddr>() {
            Ok(ip) => by_address(ip).map(|link| (link, Some(ip))),
            Err(_) => links().find(|link| link.name == *iface).map(|link| (link, None)),
        };
        if let Some(found) = found {
            return Ok(found);
        }
    }
    for pattern in &choice.iface_regexes {
        // Checked when it was given; one in a record that this version cannot read matches nothing.
        let Ok(regex) = Regex::new(pattern) else { continue };
        let usable = |address: &&Address| {
            wish.families.get(Family::of(address.ip)).is_some() && !lies_in(address.ip, wish.pods)
        };
        let by_ip = links().find_map(|link| {
            let mut addresses = link.addresses.iter().filter(usable);
            addresses
                .find(|address| regex.is_match(&address.ip.to_string()))
                .map(|address| (link, Some(address.ip)))
        });
        let by_name = || links().find(|link| regex.is_match(&link.name)).map(|link| (link, None));
        if let Some(found) = by_ip.or_else(by_name) {
            return Ok(found);
        }
    }
    if let Some(reach) = machine.reach.filter(|_| choice.can_reach.is_some())
        && let Some(link) = links().find(|link| link.index == reach.index)
    {
        return Ok((link, reach.source));
    }
    let named = named(choice);
    if !named.is_empty() {
        return Err(Absent::NoneOf(named));
    }
    if let Some((_, ip)) = choice.public_ips.iter().next() {
        return by_address(*ip).map(|link| (link, None)).ok_or(Absent::NoAddress(*ip));
    }
    let default =
        Family::ALL.into_iter().filter(|family| wish.families.get(*family).is_some()).find_map(|family| {
            let routes = machine.default_routes.iter().filter(|route| route.family == family);
            let index = routes.min_by_key(|route| route.metric)?.index;
            links().find(|link| link.index == index)
        });
    let in_use = || wish.before.iter().find_map(|(_, ip)| by_address(*ip));
    default.or_else(in_use).map(|link| (link, None)).ok_or(Absent::NoDefaultRoute)
}

/// What was named, for people.
fn named(choice: &UnderlayChoice) -> String {
    let ifaces = choice.ifaces.iter().map(|iface| format!("--iface={iface}"));
    let regexes = choice.iface_regexes.iter().map(|regex| format!("--iface-regex={regex}"));
    let reach = choice.can_reach.iter().map(|ip| format!("--iface-can-reach={ip}"));
    ifaces.chain(regexes).chain(reach).collect::<Vec<_>>().join(", ")
}

/// The first address that a stranger could use; a link-local one only when there is no other
/// (`pkg/ip/iface.go`, `GetInterfaceIP4Addrs`).
fn first_usable(link: &Link, family: Family, pods: &PerFamily<IpNetwork>) -> Option<IpAddr> {
    let of_family = || {
        let fits = |address: &&Address| {
            Family::of(address.ip) == family && !address.ip.is_loopback() && !lies_in(address.ip, pods)
        };
        link.addresses.iter().filter(fits)
    };
    let link_local = |ip: IpAddr| match ip {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    let lasting = of_family().find(|address| !link_local(address.ip) && !address.passing);
    let global = || of_family().find(|address| !link_local(address.ip));
    lasting.or_else(global).or_else(|| of_family().next()).map(|address| address.ip)
}

fn lies_in(ip: IpAddr, networks: &PerFamily<IpNetwork>) -> bool {
    networks.get(Family::of(ip)).is_some_and(|network| network.contains(ip))
}

/// flannel's own devices never carry themselves.
fn is_overlay(name: &str) -> bool {
    let number = name.strip_prefix("flannel.").or_else(|| name.strip_prefix("flannel-v6."));
    number.is_some_and(|number| number.parse::<u32>().is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn link(index: u32, name: &str, addresses: &[&str]) -> Link {
        let addresses = addresses.iter().map(|text| Address { ip: ip(text), passing: false }).collect();
        Link { index, name: name.into(), mtu: 1500, addresses }
    }

    fn route(family: Family, index: u32, metric: u32) -> DefaultRoute {
        DefaultRoute { family, index, metric }
    }

    fn machine() -> Machine {
        Machine {
            links: vec![
                link(1, "lo", &["127.0.0.1", "::1"]),
                link(2, "eth0", &["192.168.0.7", "192.168.0.8", "fe80::7", "fd00:1::7"]),
                link(3, "wwan0", &["10.64.0.9", "fe80::9"]),
                link(4, "cni0", &["10.244.1.1"]),
                link(5, "flannel.1", &["10.244.1.0"]),
            ],
            default_routes: vec![
                route(Family::V4, 3, 700),
                route(Family::V4, 2, 100),
                route(Family::V6, 2, 1024),
            ],
            reach: None,
        }
    }

    struct Case {
        choice: UnderlayChoice,
        families: PerFamily<IpNetwork>,
        before: PerFamily<IpAddr>,
    }

    fn case() -> Case {
        let families = PerFamily { v4: "10.244.0.0/16".parse().ok(), v6: None };
        Case { choice: UnderlayChoice::default(), families, before: PerFamily::default() }
    }

    fn dual() -> Case {
        let families = PerFamily { v4: "10.244.0.0/16".parse().ok(), v6: "fd00:10:244::/56".parse().ok() };
        Case { families, ..case() }
    }

    fn ifaces(names: &[&str]) -> UnderlayChoice {
        UnderlayChoice {
            ifaces: names.iter().map(|name| (*name).into()).collect(),
            ..UnderlayChoice::default()
        }
    }

    fn regexes(patterns: &[&str]) -> UnderlayChoice {
        let iface_regexes = patterns.iter().map(|pattern| (*pattern).into()).collect();
        UnderlayChoice { iface_regexes, ..UnderlayChoice::default() }
    }

    impl Case {
        fn on(&self, machine: &Machine) -> Result<Underlay, Absent> {
            let pods = PerFamily { v4: "10.244.1.0/24".parse().ok(), v6: None };
            let wish =
                Wish { choice: &self.choice, families: &self.families, pods: &pods, before: &self.before };
            choose(machine, wish)
        }

        /// "name v4 v6"
        fn said(&self, machine: &Machine) -> String {
            match self.on(machine) {
                Ok(underlay) => {
                    let ips = underlay.local_ips.iter().map(|(_, ip)| ip.to_string());
                    [underlay.name.clone()].into_iter().chain(ips).collect::<Vec<_>>().join(" ")
                }
                Err(absent) => absent.to_string(),
            }
        }
    }

    #[test]
    fn the_default_route() {
        assert_eq!(case().said(&machine()), "eth0 192.168.0.7");
        assert_eq!(dual().said(&machine()), "eth0 192.168.0.7 fd00:1::7");
        let v6 = PerFamily { v4: None, v6: "fd00:10:244::/56".parse().ok() };
        assert_eq!(Case { families: v6, ..case() }.said(&machine()), "eth0 fd00:1::7");
        let moved = Machine { default_routes: vec![route(Family::V4, 3, 700)], ..machine() };
        assert_eq!(case().said(&moved), "wwan0 10.64.0.9");
        // The other family's address is only link-local: better than none.
        assert_eq!(dual().said(&moved), "wwan0 10.64.0.9 fe80::9");
    }

    #[test]
    fn without_a_default_route_the_interface_in_use_stays() {
        let none = Machine { default_routes: vec![], ..machine() };
        assert!(case().said(&none).contains("no default route"));
        let before = PerFamily { v4: Some(ip("10.64.0.9")), v6: None };
        assert_eq!(Case { before, ..case() }.said(&none), "wwan0 10.64.0.9");
    }

    #[test]
    fn an_address_in_use_stays_while_it_is_there() {
        let before = PerFamily { v4: Some(ip("192.168.0.8")), v6: None };
        assert_eq!(Case { before, ..case() }.said(&machine()), "eth0 192.168.0.8");
        let before = PerFamily { v4: Some(ip("192.168.0.99")), v6: None };
        assert_eq!(Case { before, ..case() }.said(&machine()), "eth0 192.168.0.7");
    }

    #[test]
    fn by_name_address_pattern_and_route() {
        let said = |choice: UnderlayChoice| Case { choice, ..case() }.said(&machine());
        assert_eq!(said(ifaces(&["usb0", "wwan0"])), "wwan0 10.64.0.9");
        assert_eq!(said(ifaces(&["192.168.0.8"])), "eth0 192.168.0.8");
        assert_eq!(said(ifaces(&["usb0"])), "no interface matches --iface=usb0");
        assert_eq!(said(regexes(&["^192\\.168\\.0\\.8$"])), "eth0 192.168.0.8");
        assert_eq!(said(regexes(&["^wwan"])), "wwan0 10.64.0.9");
        assert_eq!(said(regexes(&["usb", "eth"])), "eth0 192.168.0.7");
        // Not the pods' bridge, which flanneld takes once it is there, nor the overlay itself.
        assert_eq!(said(regexes(&["^10\\."])), "wwan0 10.64.0.9");
        assert!(said(regexes(&["^flannel"])).starts_with("no interface matches"));
        let reach = Some(Reach { index: 3, source: Some(ip("10.64.0.9")) });
        let choice = UnderlayChoice { can_reach: Some(ip("203.0.113.1")), ..UnderlayChoice::default() };
        let reached = Machine { reach, ..machine() };
        assert_eq!(Case { choice: choice.clone(), ..case() }.said(&reached), "wwan0 10.64.0.9");
        assert_eq!(said(choice.clone()), "no interface matches --iface-can-reach=203.0.113.1");
        // Names come before patterns, patterns before routes.
        let all =
            UnderlayChoice { ifaces: vec!["eth0".into()], iface_regexes: vec!["wwan".into()], ..choice };
        assert_eq!(Case { choice: all, ..case() }.said(&reached), "eth0 192.168.0.7");
    }

    #[test]
    fn the_public_address() {
        let public = |v4: &str| PerFamily { v4: Some(ip(v4)), v6: None };
        let alone = |v4: &str| UnderlayChoice { public_ips: public(v4), ..UnderlayChoice::default() };
        assert_eq!(Case { choice: alone("10.64.0.9"), ..case() }.said(&machine()), "wwan0 10.64.0.9");
        assert!(
            Case { choice: alone("203.0.113.7"), ..case() }.said(&machine()).contains("no interface has")
        );
        // Beside --iface it may be anywhere; where the interface has it, it is the local address, too.
        let beside = |v4: &str| UnderlayChoice { public_ips: public(v4), ..ifaces(&["eth0"]) };
        assert_eq!(Case { choice: beside("203.0.113.7"), ..case() }.said(&machine()), "eth0 192.168.0.7");
        assert_eq!(Case { choice: beside("192.168.0.8"), ..case() }.said(&machine()), "eth0 192.168.0.8");
    }

    #[test]
    fn passing_addresses_come_last() {
        let mut machine = machine();
        machine.links[1].addresses[0].passing = true;
        assert_eq!(case().said(&machine), "eth0 192.168.0.8");
        machine.links[1].addresses[1].passing = true;
        assert_eq!(case().said(&machine), "eth0 192.168.0.7");
        machine.links[1].addresses.clear();
        assert_eq!(case().said(&machine), "interface eth0 has no address yet");
    }
}
