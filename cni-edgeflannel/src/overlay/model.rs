//! A model of the kernel's tables, and what tests make records from.
//!
//! The model does to plain data what the kernel does to its tables, and refuses what the kernel refuses: a step
//! that removes what is not there, or hangs something on a device that is not there, is a bug in the plan.

use super::*;
use crate::{
    mac::Mac,
    overlay::observed::{DeviceSeen, VxlanSeen},
    record::{NodeRecord, Peer, PeerEnd, PerFamily, Record, Underlay},
};
use ipnetwork::IpNetwork;
use std::{collections::BTreeSet, net::IpAddr};

pub fn net(text: &str) -> IpNetwork {
    text.parse().unwrap()
}

pub fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub fn mac(last: u8) -> Mac {
    Mac([2, 0, 0, 0, 0, last])
}

/// A dual-stack node with 10.244.1.0/24 and fd00:10:244:1::/64.
pub fn node() -> NodeRecord {
    let both = |v4, v6| PerFamily { v4: Some(net(v4)), v6: Some(net(v6)) };
    NodeRecord {
        node_name: "me".into(),
        networks: both("10.244.0.0/16", "fd00:10:244::/56"),
        subnets: both("10.244.1.0/24", "fd00:10:244:1::/64"),
        vtep_macs: PerFamily { v4: Some(mac(1)), v6: Some(mac(101)) },
        ip_masq: true,
        ..NodeRecord::default()
    }
}

/// A dual-stack peer with number `n`: subnet, public address and MAC all say it.
pub fn peer(name: &str, n: u8) -> Peer {
    let end = |subnet: String, public_ip: String, vtep_mac| PeerEnd {
        subnet: net(&subnet),
        public_ip: ip(&public_ip),
        vtep_mac,
        since: 0,
    };
    let v4 = end(format!("10.244.{n}.0/24"), format!("192.168.0.{n}"), mac(n));
    let v6 = end(format!("fd00:10:244:{n:x}::/64"), format!("fd00::{n:x}"), mac(100 + n));
    Peer { name: name.into(), ends: PerFamily { v4: Some(v4), v6: Some(v6) } }
}

pub fn record(peers: &[Peer]) -> Record {
    let mut record = Record { node: node(), ..Record::default() };
    let mut changes = crate::record::Changes::default();
    peers.iter().for_each(|peer| record.put_peer(peer.clone(), 1, &mut changes));
    record
}

pub fn underlay() -> Underlay {
    let local_ips = PerFamily { v4: Some(ip("192.168.0.1")), v6: Some(ip("fd00::1")) };
    Underlay { ifindex: 2, name: "eth0".into(), mtu: 1500, local_ips }
}

/// The kernel after the steps.
pub fn applied(steps: &[Step], before: &Observed) -> Observed {
    let mut kernel = before.clone();
    steps.iter().for_each(|step| apply(step, &mut kernel));
    kernel
}

fn apply(step: &Step, kernel: &mut Observed) {
    fn device(kernel: &mut Observed, family: Family) -> &mut DeviceSeen {
        kernel.devices.slot(family).as_mut().expect("a step needs a device that is not there")
    }
    match step {
        Step::DeleteDevice { name, index } => {
            let family = if name.starts_with("flannel-v6") { Family::V6 } else { Family::V4 };
            let gone = kernel.devices.slot(family).take().expect("deleted what is not there");
            assert_eq!(gone.link.index, *index);
            kernel.routes.retain(|route| route.device != Some(*index));
            kernel.sysctls.retain(|key, _| !key.contains(&format!("/{name}/")));
        }
        Step::CreateDevice(wanted, family) => {
            let link = LinkSeen {
                index: 50 + u32::from(family.bits()),
                mac: Some(wanted.mac),
                mtu: wanted.mtu,
                up: true,
                vxlan: Some(vxlan(wanted)),
                tx_checksum: Some(true),
            };
            let made = DeviceSeen {
                link,
                addresses: BTreeSet::new(),
                neighbours: Default::default(),
                fdb: BTreeSet::new(),
            };
            assert_eq!(kernel.devices.slot(*family).replace(made), None, "made twice");
            kernel.sysctls.insert(format!("net/ipv6/conf/{}/accept_ra", wanted.name), "1".into());
        }
        Step::ChangeVxlan(wanted, family) => device(kernel, *family).link.vxlan = Some(vxlan(wanted)),
        Step::SetMac(family, mac) => {
            let device = device(kernel, *family);
            device.link.mac = Some(*mac);
            device.neighbours.clear();
        }
        Step::SetMtu(family, mtu) => device(kernel, *family).link.mtu = *mtu,
        Step::SetUp(family) => device(kernel, *family).link.up = true,
        Step::TxChecksumOff(family) => device(kernel, *family).link.tx_checksum = Some(false),
        Step::SetSysctl(sysctl) => drop(kernel.sysctls.insert(sysctl.key.clone(), sysctl.value.into())),
        Step::AddAddress(family, cidr) => assert!(device(kernel, *family).addresses.insert(*cidr)),
        Step::RemoveAddress(family, cidr) => assert!(device(kernel, *family).addresses.remove(cidr)),
        Step::PutNeighbour(family, ip, mac) => drop(device(kernel, *family).neighbours.insert(*ip, *mac)),
        Step::RemoveNeighbour(family, ip, _) => {
            assert!(device(kernel, *family).neighbours.remove(ip).is_some())
        }
        Step::PutFdb(family, mac, place) => {
            let fdb = &mut device(kernel, *family).fdb;
            // vxlan_fdb_replace of the kernel: one place is altered, unless the wanted one is among them.
            if !fdb.contains(&(*mac, *place)) {
                let first = fdb.iter().find(|(of, _)| of == mac).copied();
                first.map(|first| fdb.remove(&first));
                fdb.insert((*mac, *place));
            }
        }
        Step::RemoveFdb(family, mac, place) => assert!(device(kernel, *family).fdb.remove(&(*mac, *place))),
        Step::PutRoute(family, dst, hop) => {
            let metric = RouteSeen::default_metric(*family);
            kernel.routes.retain(|route| route.dst != *dst || route.metric != metric);
            let (gateway, onlink, through) = match hop {
                Hop::Vxlan(gateway) => (*gateway, true, device(kernel, *family).link.index),
                Hop::Direct(gateway) => (*gateway, false, 2),
            };
            kernel.routes.insert(route(&dst.to_string(), &gateway.to_string(), through, onlink));
        }
        Step::RemoveRoute(route) => assert!(kernel.routes.remove(route), "removed a route that is not there"),
        Step::PutChain(chain) => {
            let comments = chain.rules.iter().map(crate::nft::Rule::comment).collect();
            kernel.chains.insert(chain.name.clone(), comments);
        }
        Step::RemoveChain(name) => assert!(kernel.chains.remove(name).is_some()),
        Step::WriteSubnetEnv(text) => kernel.subnet_env = Some(text.clone()),
    }
}

fn vxlan(device: &Device) -> VxlanSeen {
    VxlanSeen {
        vni: device.vni,
        port: device.port,
        link: device.link,
        local: Some(device.local),
        learning: device.learning,
        gbp: device.gbp,
        group: None,
        misses: false,
    }
}

/// A route as flannel makes it.
pub fn route(dst: &str, gateway: &str, device: u32, onlink: bool) -> RouteSeen {
    let dst = net(dst);
    RouteSeen {
        dst,
        metric: RouteSeen::default_metric(Family::of_subnet(dst)),
        gateway: Some(ip(gateway)),
        device: Some(device),
        onlink,
        protocol: RouteSeen::PROTOCOL,
        global: true,
    }
}

/// A node that has just booted.
pub fn booted() -> Observed {
    let off = ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"];
    Observed { sysctls: off.map(|key| (key.into(), "0".into())).into(), ..Observed::default() }
}

/// The kernel that is exactly as it should be.
pub fn settled(desired: &Desired) -> Observed {
    let kernel = applied(&plan(desired, &booted()), &booted());
    assert_eq!(plan(desired, &kernel), [], "what was restored is not what was wanted");
    kernel
}
