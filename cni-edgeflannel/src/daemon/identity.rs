//! Who this node is, from everything that knows a part of it: the flags, net-conf.json, our own Node, the machine,
//! and the record of last time.
//!
//! What is known now wins over the record, and the record over nothing. So with the API server away a node is
//! what it was; and what flanneld left behind (device, annotation) is taken over as it is. Pure.

use crate::{
    cluster::{annotations::Own, netconf::NetConf},
    flags::Flags,
    mac::Mac,
    overlay::vtep,
    record::{Family, NodeRecord, PerFamily, Underlay, UnderlayChoice},
};
use std::net::IpAddr;

/// What is known at this moment, beside the record.
#[derive(Debug, Clone, Copy)]
pub struct Known<'a> {
    /// Our name in the cluster.
    pub node_name: &'a str,
    /// The machine's.
    pub host_name: &'a str,
    /// The command line.
    pub flags: &'a Flags,
    /// net-conf.json, when it could be read.
    pub netconf: Option<&'a NetConf>,
    /// Our own Node, when the API server has shown it.
    pub own: Option<&'a Own>,
    /// The interface below, when there is one.
    pub underlay: Option<&'a Underlay>,
    /// The hardware addresses of the devices flannel.VNI and flannel-v6.VNI, where they exist.
    pub running: PerFamily<Mac>,
}

/// The node's record, brought up to date.
#[must_use]
pub fn update(record: &NodeRecord, known: Known<'_>) -> NodeRecord {
    let Known { flags, own, underlay, .. } = known;
    let default = NodeRecord::default();
    let networks = known.netconf.map_or(record.networks, |conf| conf.networks);
    let said = own.map(|own| own.subnets).filter(|subnets| !subnets.is_empty());
    let mut subnets = said.unwrap_or(record.subnets);
    let (mut vtep_macs, mut local_ips) = (record.vtep_macs, record.local_ips);
    let mut public_ips = PerFamily::default();
    for family in Family::ALL {
        if networks.get(family).is_none() {
            *subnets.slot(family) = None;
            continue;
        }
        let macs = vtep::Known {
            recorded: record.vtep_macs.get(family).copied(),
            running: known.running.get(family).copied(),
            published: own.and_then(|own| own.vtep_macs.get(family).copied()),
        };
        *vtep_macs.slot(family) = Some(vtep::choose(macs, known.node_name, family));
        if let Some(local) = underlay.and_then(|underlay| underlay.local_ips.get(family)) {
            *local_ips.slot(family) = Some(*local);
        }
        *public_ips.slot(family) = public_ip(record, known, family, local_ips.get(family).copied());
    }
    NodeRecord {
        node_name: known.node_name.to_owned(),
        host_name: known.host_name.to_owned(),
        subnets,
        networks,
        backend: known.netconf.map_or_else(|| record.backend.clone(), |conf| conf.backend.clone()),
        vtep_macs,
        public_ips,
        local_ips,
        underlay_mtu: underlay.map_or(record.underlay_mtu, |underlay| underlay.mtu),
        underlay: choice(record, flags, own),
        ip_masq: flags.ip_masq.unwrap_or(default.ip_masq),
        random_fully: flags.random_fully.unwrap_or(default.random_fully),
        forward_rules: flags.forward_rules.unwrap_or(default.forward_rules),
        disable_tx_checksum: flags.disable_tx_checksum.unwrap_or(default.disable_tx_checksum),
        annotation_prefix: flags.annotation_prefix.clone().unwrap_or(default.annotation_prefix),
        subnet_file: flags.subnet_file.clone().unwrap_or(default.subnet_file),
    }
}

/// How the interface below is to be found. The annotation `node-public-ip` wins over `--public-ip`; while our Node
/// has not been seen, the one of last time counts.
#[must_use]
pub fn choice(record: &NodeRecord, flags: &Flags, own: Option<&Own>) -> UnderlayChoice {
    let mut choice = flags.underlay.clone();
    for family in Family::ALL {
        let given = flags.underlay.public_ips.get(family).copied();
        *choice.public_ips.slot(family) = match own {
            Some(own) => own.node_public_ips.get(family).copied().or(given),
            None => given.or_else(|| record.underlay.public_ips.get(family).copied()),
        };
    }
    choice
}

/// What peers are told. `public-ip-overwrite` wins over everything; while our Node has not been seen, an address
/// that did not come from the interface is taken for one that was given.
fn public_ip(record: &NodeRecord, known: Known<'_>, family: Family, local: Option<IpAddr>) -> Option<IpAddr> {
    let given = choice(record, known.flags, known.own).public_ips.get(family).copied();
    let before = record.public_ips.get(family).copied();
    match known.own {
        Some(own) => own.overwrite.get(family).copied().or(given).or(local).or(before),
        None => before
            .filter(|before| Some(before) != record.local_ips.get(family))
            .or(given)
            .or(local)
            .or(before),
    }
}

/// A record that was read, with what the command line says instead: for `restore`, `status` and `remove`.
#[must_use]
pub fn with_flags(record: &NodeRecord, flags: &Flags) -> NodeRecord {
    let mut node = record.clone();
    let given = &flags.underlay;
    if !given.ifaces.is_empty() || !given.iface_regexes.is_empty() || given.can_reach.is_some() {
        node.underlay = UnderlayChoice { public_ips: record.underlay.public_ips, ..given.clone() };
    }
    for (family, ip) in given.public_ips.iter() {
        *node.underlay.public_ips.slot(family) = Some(*ip);
    }
    node.ip_masq = flags.ip_masq.unwrap_or(node.ip_masq);
    node.random_fully = flags.random_fully.unwrap_or(node.random_fully);
    node.forward_rules = flags.forward_rules.unwrap_or(node.forward_rules);
    node.disable_tx_checksum = flags.disable_tx_checksum.unwrap_or(node.disable_tx_checksum);
    if let Some(path) = &flags.subnet_file {
        node.subnet_file.clone_from(path);
    }
    node
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Backend;

    const R: Mac = Mac([2, 0, 0, 0, 0, 1]);
    const K: Mac = Mac([2, 0, 0, 0, 0, 2]);

    fn ip(text: &str) -> Option<IpAddr> {
        Some(text.parse().unwrap())
    }

    fn v4<T>(value: T) -> PerFamily<T> {
        PerFamily { v4: Some(value), v6: None }
    }

    fn conf() -> NetConf {
        NetConf { networks: v4("10.244.0.0/16".parse().unwrap()), backend: Backend::default() }
    }

    fn own() -> Own {
        Own { subnets: v4("10.244.1.0/24".parse().unwrap()), ..Own::default() }
    }

    fn underlay(address: &str) -> Underlay {
        Underlay { ifindex: 2, name: "eth0".into(), mtu: 1500, local_ips: v4(address.parse().unwrap()) }
    }

    /// As it was before the reboot.
    fn record() -> NodeRecord {
        let (conf, own, underlay, flags) = (conf(), own(), underlay("192.168.0.7"), Flags::default());
        let known =
            Known { netconf: Some(&conf), own: Some(&own), underlay: Some(&underlay), ..nothing(&flags) };
        NodeRecord { vtep_macs: v4(R), ..update(&NodeRecord::default(), known) }
    }

    fn nothing(flags: &Flags) -> Known<'_> {
        Known {
            node_name: "edge-1",
            host_name: "edge-1",
            flags,
            netconf: None,
            own: None,
            underlay: None,
            running: PerFamily::default(),
        }
    }

    #[test]
    fn a_new_node() {
        let (conf, own, flags) = (conf(), own(), Flags::default());
        let nothing = nothing(&flags);
        let alone = update(&NodeRecord::default(), nothing);
        assert!(alone.subnets.is_empty() && alone.networks.is_empty() && alone.vtep_macs.is_empty());
        let joined = update(&alone, Known { netconf: Some(&conf), own: Some(&own), ..nothing });
        assert_eq!(joined.subnets, own.subnets);
        assert_eq!(joined.vtep_macs, v4(vtep::derive("edge-1", Family::V4)));
        assert!(joined.public_ips.is_empty(), "no interface yet, nothing to publish");
    }

    #[test]
    fn with_nobody_to_ask_it_is_what_it_was() {
        let flags = Flags::default();
        assert_eq!(update(&record(), nothing(&flags)), record());
        // Our Node exists but has no podCIDR (deleted and made anew): the subnet stays.
        let own = Own::default();
        assert_eq!(update(&record(), Known { own: Some(&own), ..nothing(&flags) }), record());
    }

    #[test]
    fn taken_over_from_flanneld() {
        let (conf, flags) = (conf(), Flags::default());
        let own = Own { vtep_macs: v4(K), ..own() };
        let known = Known { netconf: Some(&conf), own: Some(&own), running: v4(K), ..nothing(&flags) };
        assert_eq!(update(&NodeRecord::default(), known).vtep_macs, v4(K));
        assert_eq!(update(&record(), known).vtep_macs, v4(K), "flanneld ran in between");
        let altered = Known { running: v4(K), ..nothing(&flags) };
        assert_eq!(update(&record(), altered).vtep_macs, v4(R), "somebody altered the device");
    }

    #[test]
    fn the_address_follows_the_interface() {
        let (flags, moved) = (Flags::default(), underlay("10.64.0.9"));
        let node = update(&record(), Known { underlay: Some(&moved), ..nothing(&flags) });
        assert_eq!((node.local_ips.v4, node.public_ips.v4), (ip("10.64.0.9"), ip("10.64.0.9")));
    }

    #[test]
    fn what_is_published_instead() {
        let (flags, moved) = (Flags::default(), underlay("10.64.0.9"));
        let plain = own();
        let own = Own { overwrite: v4("203.0.113.7".parse().unwrap()), ..own() };
        let node = update(&record(), Known { own: Some(&own), ..nothing(&flags) });
        assert_eq!((node.local_ips.v4, node.public_ips.v4), (ip("192.168.0.7"), ip("203.0.113.7")));
        // Offline the overwritten address stays, also when the interface gets another one.
        let node = update(&node, Known { underlay: Some(&moved), ..nothing(&flags) });
        assert_eq!((node.local_ips.v4, node.public_ips.v4), (ip("10.64.0.9"), ip("203.0.113.7")));
        // The annotation is taken away.
        let node = update(&node, Known { own: Some(&plain), ..nothing(&flags) });
        assert_eq!(node.public_ips.v4, ip("10.64.0.9"));
    }

    #[test]
    fn node_public_ip_wins_over_the_flag() {
        let mut flags = Flags::default();
        flags.underlay.public_ips.v4 = ip("192.168.0.1");
        let own = Own { node_public_ips: v4("192.168.0.2".parse().unwrap()), ..own() };
        assert_eq!(choice(&record(), &flags, None).public_ips.v4, ip("192.168.0.1"));
        assert_eq!(choice(&record(), &flags, Some(&own)).public_ips.v4, ip("192.168.0.2"));
        let node = update(&record(), Known { own: Some(&own), ..nothing(&flags) });
        assert_eq!(node.public_ips.v4, ip("192.168.0.2"));
        let offline = choice(&node, &Flags::default(), None);
        assert_eq!(offline.public_ips.v4, ip("192.168.0.2"), "remembered");
    }

    #[test]
    fn a_family_that_is_switched_off_is_dropped_but_its_mac_is_kept() {
        let flags = Flags::default();
        let mut before = record();
        before.networks.v6 = "fd00::/48".parse().ok();
        before.subnets.v6 = "fd00:0:0:1::/64".parse().ok();
        before.vtep_macs.v6 = Some(K);
        let conf = conf();
        let node = update(&before, Known { netconf: Some(&conf), ..nothing(&flags) });
        assert_eq!((node.subnets.v6, node.networks.v6, node.vtep_macs.v6), (None, None, Some(K)));
    }

    #[test]
    fn the_record_stands_in_for_flags_that_are_not_given() {
        let mut record = record();
        record.ip_masq = true;
        record.underlay.ifaces = vec!["eth0".into()];
        assert_eq!(with_flags(&record, &Flags::default()), record);
        let mut flags = Flags { ip_masq: Some(false), subnet_file: Some("/x".into()), ..Flags::default() };
        flags.underlay.iface_regexes = vec!["^wwan".into()];
        let node = with_flags(&record, &flags);
        assert!(!node.ip_masq && node.underlay.ifaces.is_empty());
        assert_eq!(node.subnet_file.to_str(), Some("/x"));
    }
}
