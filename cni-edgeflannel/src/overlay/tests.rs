//! The reconcile as a whole: tables for flannel's contract and for its bugs, and properties on a model of the
//! kernel's tables.

use super::{model::*, *};
use crate::record::{Backend, NodeRecord, Peer, PerFamily, Record, Underlay};
use proptest::prelude::*;

fn wanted(record: &Record) -> Desired {
    desired(record, Some(&underlay()), &OnLink::default())
}

fn two_peers() -> Record {
    record(&[peer("a", 2), peer("b", 3)])
}

fn said(steps: &[Step]) -> Vec<String> {
    steps.iter().map(ToString::to_string).collect()
}

fn kinds(steps: &[Step]) -> Vec<&'static str> {
    steps.iter().map(|step| step.kind().as_str()).collect()
}

mod contract {
    use super::*;

    #[test]
    fn the_devices_are_flannels() {
        let devices = wanted(&two_peers()).devices;
        let (v4, v6) = (devices.v4.unwrap(), devices.v6.unwrap());
        assert_eq!((v4.name.as_str(), v6.name.as_str()), ("flannel.1", "flannel-v6.1"));
        assert_eq!((v4.vni, v4.port, v4.link, v4.learning, v4.gbp), (1, 8472, 2, false, false));
        assert_eq!((v4.local, v6.local), (ip("192.168.0.1"), ip("fd00::1")));
        assert_eq!((v4.address, v6.address), (net("10.244.1.0/32"), net("fd00:10:244:1::/128")));
        assert_eq!((v4.mac, v6.mac), (mac(1), mac(101)));
        // flannel says 1450 for both; the kernel gives flannel-v6.1 no more than 1430.
        assert_eq!((v4.mtu, v6.mtu), (1450, 1430));
    }

    #[test]
    fn the_backends_options_are_heeded() {
        let mut record = two_peers();
        record.node.backend =
            Backend { vni: 7, port: 4789, gbp: true, learning: true, mtu: 1400, direct_routing: false };
        let device = wanted(&record).devices.v4.unwrap();
        assert_eq!(device.name, "flannel.7");
        assert_eq!((device.vni, device.port, device.learning, device.gbp), (7, 4789, true, true));
        assert_eq!(device.mtu, 1350);
        record.node.backend.mtu = 9000;
        assert_eq!(wanted(&record).devices.v4.unwrap().mtu, 1450, "more than the interface below has");
    }

    #[test]
    fn a_peer_is_a_neighbour_a_forwarding_entry_and_a_route() {
        let devices = wanted(&two_peers()).devices;
        let (v4, v6) = (devices.v4.unwrap().entries, devices.v6.unwrap().entries);
        assert_eq!(v4.neighbours[&ip("10.244.2.0")], mac(2));
        assert_eq!(v4.fdb[&mac(2)], ip("192.168.0.2"));
        assert_eq!(v4.routes[&net("10.244.2.0/24")], Hop::Vxlan(ip("10.244.2.0")));
        assert_eq!(v6.neighbours[&ip("fd00:10:244:3::")], mac(103));
        assert_eq!(v6.fdb[&mac(103)], ip("fd00::3"));
        assert_eq!(v6.routes[&net("fd00:10:244:3::/64")], Hop::Vxlan(ip("fd00:10:244:3::")));
        assert_eq!((v4.routes.len(), v6.routes.len()), (2, 2));
    }

    #[test]
    fn direct_routing_where_there_is_no_gateway() {
        let mut record = two_peers();
        record.node.backend.direct_routing = true;
        let mut connected = route("192.168.0.2/31", "192.168.0.9", 2, false);
        connected.gateway = None;
        let on_link = OnLink::new(&[connected], &[]);
        record.peers.get_mut("b").unwrap().ends.v4.as_mut().unwrap().public_ip = ip("172.16.0.3");
        let device = desired(&record, Some(&underlay()), &on_link).devices.v4.unwrap();
        assert_eq!(device.entries.routes[&net("10.244.2.0/24")], Hop::Direct(ip("192.168.0.2")));
        assert_eq!(device.entries.routes[&net("10.244.3.0/24")], Hop::Vxlan(ip("10.244.3.0")));
        assert_eq!(device.entries.neighbours.len(), 1, "a direct peer needs only the route");
        assert_eq!(device.entries.fdb.len(), 1);
    }

    #[test]
    fn subnet_env_is_flannels_but_for_the_mtu_of_ipv6() {
        let text = |node: &NodeRecord, below: Option<&Underlay>| {
            let record = Record { node: node.clone(), ..Record::default() };
            desired(&record, below, &OnLink::default()).subnet_env.unwrap().to_string()
        };
        assert_eq!(
            text(&node(), Some(&underlay())),
            "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\n\
             FLANNEL_IPV6_NETWORK=fd00:10:244::/56\nFLANNEL_IPV6_SUBNET=fd00:10:244:1::1/64\n\
             FLANNEL_MTU=1430\nFLANNEL_IPMASQ=true\n"
        );
        let mut v4 = node();
        (v4.subnets.v6, v4.networks.v6) = (None, None);
        let single = "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";
        assert_eq!(text(&v4, Some(&underlay())), single);
        // No interface below yet: as it last was, so that local pods do not have to wait for an uplink.
        v4.underlay_mtu = 1400;
        assert!(text(&v4, None).contains("FLANNEL_MTU=1350"));
        v4.underlay_mtu = 0;
        assert_eq!(text(&v4, None), single);
    }

    #[test]
    fn settings_of_the_host() {
        let keys: Vec<String> = wanted(&two_peers()).sysctls.iter().map(ToString::to_string).collect();
        assert_eq!(
            keys,
            [
                "net/ipv4/ip_forward=1",
                "net/ipv6/conf/flannel.1/accept_ra=0",
                "net/ipv6/conf/all/forwarding=1",
                "net/ipv6/conf/flannel-v6.1/disable_ipv6=0",
                "net/ipv6/conf/flannel-v6.1/accept_ra=0",
            ]
        );
    }

    #[test]
    fn a_booted_node_gets_all_of_it_in_order() {
        let steps = plan(&wanted(&two_peers()), &booted());
        let at = |needle: &str| said(&steps).iter().position(|said| said.contains(needle)).unwrap();
        assert!(at("flannel.1 is missing") < at("address 10.244.1.0/32"));
        assert!(at("neighbour 10.244.2.0") < at("forwarding entry 02:00:00:00:00:02"));
        assert!(at("forwarding entry 02:00:00:00:00:02") < at("route 10.244.2.0/24"));
        assert!(at("accept_ra=0") > at("flannel-v6.1 is missing"));
        assert_eq!(kinds(&steps).last(), Some(&"subnet-env"));
    }
}

/// flannel's bugs, each as it was reported.
mod bugs {
    use super::*;

    fn drifted(alter: impl FnOnce(&mut Record)) -> (Desired, Vec<Step>) {
        let mut record = two_peers();
        let kernel = settled(&wanted(&record));
        alter(&mut record);
        let wanted = wanted(&record);
        let steps = plan(&wanted, &kernel);
        settled_after(&wanted, &steps, &kernel);
        (wanted, steps)
    }

    fn settled_after(wanted: &Desired, steps: &[Step], kernel: &Observed) {
        assert_eq!(plan(wanted, &applied(steps, kernel)), []);
    }

    /// flannel#2554: a peer deleted while flanneld was down stays for ever.
    #[test]
    fn a_peer_that_left_while_we_were_down() {
        let (_, steps) = drifted(|record| drop(record.peers.remove("a")));
        assert_eq!(kinds(&steps), ["route", "neigh", "fdb", "route", "neigh", "fdb"]);
        assert!(said(&steps)[0].contains("route 10.244.2.0/24 via 10.244.2.0 is not wanted"));
    }

    /// A peer's MAC changes: flannel leaves the old forwarding entry.
    #[test]
    fn a_peers_mac_changes() {
        let (_, steps) = drifted(|record| {
            record.peers.get_mut("a").unwrap().ends.v4.as_mut().unwrap().vtep_mac = mac(77);
        });
        assert_eq!(
            said(&steps),
            [
                "neighbour 10.244.2.0 should be 02:00:00:00:00:4d",
                "forwarding entry 02:00:00:00:00:4d should lead to 192.168.0.2",
                "forwarding entry 02:00:00:00:00:02 to 192.168.0.2 is not wanted",
            ]
        );
    }

    #[test]
    fn a_peers_public_address_changes() {
        let (_, steps) = drifted(|record| {
            record.peers.get_mut("a").unwrap().ends.v4.as_mut().unwrap().public_ip = ip("192.168.0.99");
        });
        assert_eq!(said(&steps), ["forwarding entry 02:00:00:00:00:02 should lead to 192.168.0.99"]);
    }

    /// A peer's podCIDR changes: flannel does not look, and leaves the old route.
    #[test]
    fn a_peers_subnet_changes() {
        let (_, steps) = drifted(|record| {
            record.peers.get_mut("a").unwrap().ends.v4.as_mut().unwrap().subnet = net("10.244.9.0/24");
        });
        assert_eq!(
            said(&steps),
            [
                "neighbour 10.244.9.0 should be 02:00:00:00:00:02",
                "route 10.244.9.0/24 should lead through the overlay, via 10.244.9.0",
                "route 10.244.2.0/24 via 10.244.2.0 is not wanted",
                "neighbour 10.244.2.0 at 02:00:00:00:00:02 is not wanted",
            ]
        );
    }

    /// k3s#9957: in dual stack flannel drops an update that changes one family only.
    #[test]
    fn one_family_changes() {
        let (_, steps) = drifted(|record| {
            record.peers.get_mut("a").unwrap().ends.v6.as_mut().unwrap().vtep_mac = mac(200);
        });
        assert_eq!(kinds(&steps), ["neigh", "fdb", "fdb"]);
        let (_, steps) = drifted(|record| record.peers.get_mut("a").unwrap().ends.v6 = None);
        assert_eq!(kinds(&steps), ["route", "neigh", "fdb"]);
    }

    /// flannel#869, #1348: the device is made again, but not what was on it.
    #[test]
    fn the_device_is_deleted() {
        let record = two_peers();
        let wanted = wanted(&record);
        let mut kernel = settled(&wanted);
        let index = kernel.devices.v4.take().unwrap().link.index;
        kernel.routes.retain(|route| route.device != Some(index));
        let steps = plan(&wanted, &kernel);
        settled_after(&wanted, &steps, &kernel);
        let mut kinds = kinds(&steps);
        kinds.dedup();
        assert_eq!(kinds, ["link", "sysctl", "address", "neigh", "fdb", "route"]);
    }

    /// flannel#408, #1052: the node's own address changes.
    #[test]
    fn the_own_address_or_interface_changes() {
        let record = two_peers();
        let kernel = settled(&wanted(&record));
        let mut below = underlay();
        below.local_ips.v4 = Some(ip("192.168.0.77"));
        let steps = plan(&desired(&record, Some(&below), &OnLink::default()), &kernel);
        assert_eq!(said(&steps), ["device flannel.1 should use 192.168.0.77 on interface 2"]);
        below.ifindex = 5;
        let steps = plan(&desired(&record, Some(&below), &OnLink::default()), &kernel);
        assert_eq!(kinds(&steps), ["link", "link"]);
    }

    /// flannel#1070, #1434: an interface that is gone for a while takes the entries with it for good.
    #[test]
    fn without_an_interface_below_nothing_is_taken_away() {
        let record = two_peers();
        let kernel = settled(&wanted(&record));
        let none = desired(&record, None, &OnLink::default());
        assert_eq!(plan(&none, &kernel), []);
        let mut below = underlay();
        below.local_ips.v6 = None;
        assert_eq!(plan(&desired(&record, Some(&below), &OnLink::default()), &kernel), []);
        // On a node that just booted, all that does not need it is done.
        assert_eq!(kinds(&plan(&none, &booted())), ["sysctl", "sysctl", "nft", "nft", "subnet-env"]);
    }

    #[test]
    fn the_own_subnet_changes() {
        let (_, steps) = drifted(|record| record.node.subnets.v4 = Some(net("10.244.8.0/24")));
        assert_eq!(
            said(&steps)[..2],
            ["address 10.244.8.0/32 is missing", "address 10.244.1.0/32 is not wanted"]
        );
        assert_eq!(kinds(&steps)[2..], ["nft", "subnet-env"]);
    }

    #[test]
    fn a_family_is_switched_off() {
        let (_, steps) = drifted(|record| {
            (record.node.subnets.v6, record.node.networks.v6) = (None, None);
        });
        assert_eq!(said(&steps)[0], "device flannel-v6.1 is not as it should be");
        assert_eq!(kinds(&steps), ["link", "nft", "nft", "subnet-env"]);
    }

    /// Two nodes claim one subnet: the one that was there first stays in the kernel.
    #[test]
    fn a_second_claim_changes_nothing() {
        let (wanted, steps) = drifted(|record| {
            let mut changes = crate::record::Changes::default();
            let claim = record.next_claim();
            let mut late = peer("0-sorts-first", 2);
            late.ends.v4.as_mut().unwrap().vtep_mac = mac(55);
            late.ends.v6 = None;
            record.put_peer(late, claim, &mut changes);
            record.put_peer(Peer { name: "thief".into(), ..peer("", 1) }, claim, &mut changes);
        });
        assert_eq!(steps, []);
        let conflicts: Vec<String> = wanted.conflicts.iter().map(ToString::to_string).collect();
        assert!(
            conflicts[0].contains("nodes a and 0-sorts-first both claim 10.244.2.0/24; a keeps it"),
            "{conflicts:?}"
        );
        assert!(
            conflicts.iter().any(|said| said.contains("node thief claims this node's subnet")),
            "{conflicts:?}"
        );
    }

    #[test]
    fn an_unknown_node_touches_nothing() {
        let kernel = settled(&wanted(&two_peers()));
        let unknown = desired(&Record::default(), Some(&underlay()), &OnLink::default());
        assert_eq!(plan(&unknown, &kernel), []);
    }
}

/// What a person does to the tables.
mod drift {
    use super::*;
    use crate::overlay::observed::DeviceSeen;

    fn repaired(alter: impl FnOnce(&mut Observed)) -> Vec<Step> {
        let wanted = wanted(&two_peers());
        let mut kernel = settled(&wanted);
        alter(&mut kernel);
        let steps = plan(&wanted, &kernel);
        assert_eq!(plan(&wanted, &applied(&steps, &kernel)), []);
        steps
    }

    fn v4(kernel: &mut Observed) -> &mut DeviceSeen {
        kernel.devices.v4.as_mut().unwrap()
    }

    #[test]
    fn each_object_has_one_repair_of_its_kind() {
        type Alter = fn(&mut Observed);
        let table: [(&str, Alter); 21] = [
            ("mtu", |k| v4(k).link.mtu = 1400),
            ("link", |k| v4(k).link.up = false),
            ("link", |k| v4(k).link.vxlan.as_mut().unwrap().learning = true),
            ("address", |k| v4(k).addresses.clear()),
            ("address", |k| {
                v4(k).addresses.insert(net("10.244.7.0/32"));
            }),
            ("neigh", |k| {
                v4(k).neighbours.remove(&ip("10.244.2.0"));
            }),
            ("neigh", |k| {
                v4(k).neighbours.insert(ip("10.244.2.0"), mac(9));
            }),
            ("neigh", |k| {
                v4(k).neighbours.insert(ip("10.244.66.0"), mac(9));
            }),
            ("fdb", |k| {
                v4(k).fdb.remove(&(mac(2), ip("192.168.0.2")));
            }),
            ("fdb", |k| {
                v4(k).fdb.insert((mac(2), ip("192.168.0.66")));
            }),
            ("fdb", |k| {
                v4(k).fdb.insert((mac(66), ip("192.168.0.66")));
            }),
            ("route", |k| k.routes.retain(|route| route.dst != net("10.244.2.0/24"))),
            ("route", |k| {
                k.routes.insert(route("10.244.66.0/24", "10.244.66.0", 82, true));
            }),
            ("nft", |k| {
                k.chains.remove("overlay-forward");
            }),
            ("nft", |k| {
                k.chains.get_mut("overlay-postrouting").unwrap().pop();
            }),
            ("nft", |k| k.chains.get_mut("overlay-postrouting").unwrap().swap(1, 2)),
            ("nft", |k| k.chains.get_mut("overlay-postrouting").unwrap()[0].clear()),
            ("sysctl", |k| {
                k.sysctls.insert("net/ipv4/ip_forward".into(), "0".into());
            }),
            ("sysctl", |k| {
                k.sysctls.insert("net/ipv6/conf/flannel.1/accept_ra".into(), "1".into());
            }),
            ("subnet-env", |k| k.subnet_env = None),
            ("subnet-env", |k| k.subnet_env.as_mut().unwrap().truncate(20)),
        ];
        for (row, (kind, alter)) in table.into_iter().enumerate() {
            assert_eq!(kinds(&repaired(alter)), [kind], "row {row}");
        }
    }

    /// The kernel forgets the neighbours of a device whose own address changes, so they are put again at once.
    #[test]
    fn the_own_hardware_address_is_put_back() {
        assert_eq!(kinds(&repaired(|kernel| v4(kernel).link.mac = Some(mac(9)))), ["mac", "neigh", "neigh"]);
    }

    #[test]
    fn a_forwarding_entry_with_several_wrong_places() {
        let steps = repaired(|kernel| {
            let fdb = &mut v4(kernel).fdb;
            fdb.remove(&(mac(2), ip("192.168.0.2")));
            fdb.insert((mac(2), ip("192.168.0.66")));
            fdb.insert((mac(2), ip("192.168.0.67")));
        });
        assert_eq!(kinds(&steps), ["fdb", "fdb", "fdb"]);
    }

    #[test]
    fn a_route_with_other_attributes_is_replaced() {
        type Alter = fn(&mut RouteSeen);
        let alterations: [Alter; 5] = [
            |route| route.onlink = false,
            |route| route.gateway = Some(ip("10.244.99.0")),
            |route| route.device = Some(2),
            |route| route.protocol = 4,
            |route| route.gateway = None,
        ];
        for alter in alterations {
            let steps = repaired(|kernel| {
                let mut one = *kernel.routes.iter().find(|route| route.dst == net("10.244.2.0/24")).unwrap();
                kernel.routes.remove(&one);
                alter(&mut one);
                kernel.routes.insert(one);
            });
            assert_eq!(said(&steps), ["route 10.244.2.0/24 should lead through the overlay, via 10.244.2.0"]);
        }
    }

    /// What the kernel cannot change in place is made anew, with all that was on it.
    #[test]
    fn a_device_of_our_name_that_is_another_one() {
        type Alter = fn(&mut Option<observed::VxlanSeen>);
        let alterations: [Alter; 6] = [
            |vxlan| *vxlan = None,
            |vxlan| vxlan.as_mut().unwrap().vni = 2,
            |vxlan| vxlan.as_mut().unwrap().port = 4789,
            |vxlan| vxlan.as_mut().unwrap().gbp = true,
            |vxlan| vxlan.as_mut().unwrap().group = Some(ip("239.1.1.1")),
            |vxlan| vxlan.as_mut().unwrap().misses = true,
        ];
        for alter in alterations {
            let steps = repaired(|kernel| alter(&mut v4(kernel).link.vxlan));
            assert!(matches!(steps[..2], [Step::DeleteDevice { .. }, Step::CreateDevice(..)]), "{steps:?}");
            assert!(kinds(&steps).iter().filter(|kind| **kind == "route").count() == 2);
        }
    }

    #[test]
    fn what_is_not_ours_stays() {
        let steps = repaired(|kernel| {
            // A person's own: no onlink, another device, another metric, an address with a network, a setting.
            let mut plain = route("10.99.0.0/24", "10.244.2.0", 82, true);
            plain.onlink = false;
            kernel.routes.insert(plain);
            kernel.routes.insert(route("10.244.40.0/24", "192.168.0.40", 2, false));
            kernel
                .routes
                .insert(RouteSeen { metric: 50, ..route("10.244.2.0/24", "192.168.0.40", 2, false) });
            v4(kernel).addresses.insert(net("172.20.0.1/24"));
            kernel.sysctls.insert("net/ipv4/conf/all/rp_filter".into(), "1".into());
        });
        assert_eq!(steps, []);
    }

    #[test]
    fn checksum_offload_only_when_asked() {
        let mut record = two_peers();
        let kernel = settled(&wanted(&record));
        record.node.disable_tx_checksum = true;
        let steps = plan(&wanted(&record), &kernel);
        assert_eq!(steps, [Step::TxChecksumOff(Family::V4), Step::TxChecksumOff(Family::V6)]);
        assert_eq!(plan(&wanted(&record), &applied(&steps, &kernel)), []);
        settled(&wanted(&record));
    }

    /// Linux stops heeding router advertisements when it forwards, unless told 2: the node would lose IPv6.
    #[test]
    fn forwarding_keeps_the_uplinks_router() {
        let mut kernel = booted();
        kernel.sysctls.insert("net/ipv6/conf/eth0/accept_ra".into(), "1".into());
        let text = said(&plan(&wanted(&two_peers()), &kernel));
        let at = |needle: &str| text.iter().position(|said| said.starts_with(needle)).unwrap();
        assert!(at("net/ipv6/conf/eth0/accept_ra=2") < at("net/ipv6/conf/all/forwarding=1"));
        kernel.sysctls.insert("net/ipv6/conf/eth0/accept_ra".into(), "0".into());
        assert!(!said(&plan(&wanted(&two_peers()), &kernel)).iter().any(|said| said.contains("eth0")));
    }

    #[test]
    fn stale_direct_routes() {
        let mut record = two_peers();
        record.node.backend.direct_routing = true;
        let mut connected = route("192.168.0.0/24", "192.168.0.9", 2, false);
        connected.gateway = None;
        let wanted = |record: &Record| desired(record, Some(&underlay()), &OnLink::new(&[connected], &[]));
        let kernel = settled(&wanted(&record));
        record.peers.remove("a");
        let steps = plan(&wanted(&record), &kernel);
        assert!(said(&steps)[0].contains("route 10.244.2.0/24 via 192.168.0.2 is not wanted"), "{steps:?}");
        assert_eq!(plan(&wanted(&record), &applied(&steps, &kernel)), []);
        // Switched off: the same peers now go through the overlay, in the old routes' place.
        record.node.backend.direct_routing = false;
        let steps = plan(&wanted(&record), &kernel);
        assert!(steps.contains(&Step::PutRoute(
            Family::V4,
            net("10.244.3.0/24"),
            Hop::Vxlan(ip("10.244.3.0"))
        )));
    }

    #[test]
    fn a_peer_is_in_the_kernel_when_nothing_about_it_is_missing() {
        let record = two_peers();
        let wanted = wanted(&record);
        let mut kernel = settled(&wanted);
        let steps = plan(&wanted, &kernel);
        assert!(diff::in_kernel("a", &record, &wanted, &steps));
        v4(&mut kernel).fdb.remove(&(mac(2), ip("192.168.0.2")));
        let steps = plan(&wanted, &kernel);
        assert!(
            !diff::in_kernel("a", &record, &wanted, &steps) && diff::in_kernel("b", &record, &wanted, &steps)
        );
        assert!(!diff::in_kernel("nobody", &record, &wanted, &steps));
    }
}

/// What happened to the tables behind our back.
#[derive(Debug, Clone)]
enum Mischief {
    Nothing,
    DropRoute(usize),
    Onlink(u8, u8),
    Foreign(u8, u8),
    Neighbour(u8, u8),
    Forget(u8),
    Fdb(u8, u8),
    Address(u8),
    Mac(u8),
    Mtu(u32),
    Down,
    Vni(u32),
    Delete,
    Flush,
    Env,
}

fn mischief() -> impl Strategy<Value = Mischief> {
    let n = 0..10_u8;
    prop_oneof![
        Just(Mischief::Nothing),
        any::<usize>().prop_map(Mischief::DropRoute),
        (n.clone(), n.clone()).prop_map(|(a, b)| Mischief::Onlink(a, b)),
        (n.clone(), n.clone()).prop_map(|(a, b)| Mischief::Foreign(a, b)),
        (n.clone(), n.clone()).prop_map(|(a, b)| Mischief::Neighbour(a, b)),
        n.clone().prop_map(Mischief::Forget),
        (n.clone(), n.clone()).prop_map(|(a, b)| Mischief::Fdb(a, b)),
        n.clone().prop_map(Mischief::Address),
        n.prop_map(Mischief::Mac),
        (1280..1600_u32).prop_map(Mischief::Mtu),
        Just(Mischief::Down),
        (1..3_u32).prop_map(Mischief::Vni),
        Just(Mischief::Delete),
        Just(Mischief::Flush),
        Just(Mischief::Env),
    ]
}

fn play(mischief: &Mischief, kernel: &mut Observed) {
    // One route per destination and metric, as the kernel keeps them without NLM_F_APPEND.
    let replace = |kernel: &mut Observed, new: RouteSeen| {
        kernel.routes.retain(|old| (old.dst, old.metric) != (new.dst, new.metric));
        kernel.routes.insert(new);
    };
    match *mischief {
        Mischief::DropRoute(n) if !kernel.routes.is_empty() => {
            let one = *kernel.routes.iter().nth(n % kernel.routes.len()).unwrap();
            kernel.routes.remove(&one);
        }
        Mischief::Foreign(n, via) => {
            replace(kernel, route(&format!("10.244.{n}.0/24"), &format!("192.168.0.{via}"), 2, false));
        }
        Mischief::Flush => kernel.chains.clear(),
        Mischief::Env => kernel.subnet_env = None,
        Mischief::Delete => {
            if let Some(gone) = kernel.devices.v4.take() {
                kernel.routes.retain(|route| route.device != Some(gone.link.index));
            }
        }
        _ => {
            let Some(index) = kernel.devices.v4.as_ref().map(|device| device.link.index) else { return };
            if let Mischief::Onlink(n, via) = *mischief {
                replace(kernel, route(&format!("10.244.{n}.0/24"), &format!("10.244.{via}.0"), index, true));
            }
            let Some(device) = kernel.devices.v4.as_mut() else { return };
            match *mischief {
                Mischief::Neighbour(n, of) => {
                    device.neighbours.insert(ip(&format!("10.244.{n}.0")), mac(of));
                }
                Mischief::Forget(n) => drop(device.neighbours.remove(&ip(&format!("10.244.{n}.0")))),
                Mischief::Fdb(of, n) => drop(device.fdb.insert((mac(of), ip(&format!("192.168.0.{n}"))))),
                Mischief::Address(n) => drop(device.addresses.insert(net(&format!("10.244.{n}.0/32")))),
                Mischief::Mac(of) => device.link.mac = Some(mac(of)),
                Mischief::Mtu(mtu) => device.link.mtu = mtu,
                Mischief::Down => device.link.up = false,
                Mischief::Vni(vni) => device.link.vxlan.as_mut().unwrap().vni = vni,
                _ => {}
            }
        }
    }
}

/// Peers that agree and peers that do not: few numbers, so that they meet.
fn peers() -> impl Strategy<Value = Vec<Peer>> {
    let one = ("[a-f]", 0..10_u8, 0..10_u8, 0..10_u8, 0..3_u8);
    prop::collection::vec(one, 0..8).prop_map(|all| {
        let made = all.into_iter().map(|(name, subnet, public, hardware, families)| {
            let mut made = peer(&name, subnet);
            let (v4, v6) = (made.ends.v4.as_mut().unwrap(), made.ends.v6.as_mut().unwrap());
            v4.public_ip = ip(&format!("192.168.0.{public}"));
            v4.vtep_mac = mac(hardware);
            v6.vtep_mac = mac(100 + hardware);
            match families {
                0 => made.ends.v4 = None,
                1 => made.ends.v6 = None,
                _ => {}
            }
            made
        });
        made.collect()
    })
}

fn connected() -> RouteSeen {
    RouteSeen { gateway: None, ..route("192.168.0.0/29", "192.168.0.9", 2, false) }
}

fn want(peers: &[Peer], direct: bool, families: u8) -> Desired {
    let mut record = record(peers);
    record.node.backend.direct_routing = direct;
    if families == 0 {
        (record.node.subnets.v6, record.node.networks.v6) = (None, None);
    }
    desired(&record, Some(&underlay()), &OnLink::new(&[connected()], &[]))
}

/// What a person has in the same tables, of which no step may ever speak.
fn foreign() -> Vec<RouteSeen> {
    let mut plain = route("10.99.0.0/24", "10.244.2.0", 82, false);
    plain.protocol = 4;
    vec![
        connected(),
        plain,
        route("10.244.77.0/24", "192.168.7.7", 3, false),
        RouteSeen { metric: 9, ..route("10.244.2.0/24", "192.168.0.5", 2, false) },
        RouteSeen { protocol: 4, ..route("10.244.78.0/24", "192.168.0.5", 2, false) },
        route("0.0.0.0/0", "192.168.0.6", 2, false),
        route("10.244.0.0/16", "192.168.0.6", 2, false),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn whatever_happened_one_plan_puts_it_right(
        before in peers(), after in peers(), direct in any::<(bool, bool)>(), families in 0..2_u8,
        mischiefs in prop::collection::vec(mischief(), 0..6),
    ) {
        let old = want(&before, direct.0, 1);
        let mut kernel = settled(&old);
        mischiefs.iter().for_each(|one| play(one, &mut kernel));
        kernel.routes.extend(foreign());
        let person = net("172.20.0.1/24");
        if let Some(device) = &mut kernel.devices.v4 {
            device.addresses.insert(person);
        }

        let new = want(&after, direct.1, families);
        let steps = plan(&new, &kernel);
        let fixed = applied(&steps, &kernel);
        prop_assert_eq!(plan(&new, &fixed), [], "the second plan is empty");

        // Exactly the wanted entries, and nothing else, on our devices.
        for (family, device) in new.devices.iter() {
            let seen = fixed.devices.get(family).unwrap();
            prop_assert_eq!(&seen.neighbours, &device.entries.neighbours);
            let fdb: std::collections::BTreeSet<_> = device.entries.fdb.iter().map(|(mac, ip)| (*mac, *ip)).collect();
            prop_assert_eq!(&seen.fdb, &fdb);
            let routed: Vec<_> = fixed.routes.iter().filter(|r| r.onlink && r.device == Some(seen.link.index)).map(|r| r.dst).collect();
            let through: Vec<_> = device.entries.routes.iter().filter(|(_, hop)| matches!(hop, Hop::Vxlan(_))).map(|(dst, _)| *dst).collect();
            prop_assert_eq!(routed, through);
            prop_assert!(!device.entries.routes.contains_key(&device.address) && seen.addresses.contains(&device.address));
        }
        // The node's own subnet is never routed away.
        prop_assert!(!new.devices.iter().any(|(_, device)| device.entries.routes.keys().any(|dst| claims::overlap(*dst, net("10.244.1.0/24")))));
        prop_assert_eq!(fixed.devices.v6.is_some(), families == 1);
        // What is not ours is where it was, unless its device went, which was not ours to keep.
        for one in foreign() {
            prop_assert!(fixed.routes.contains(&one) || one.device == Some(82), "{one:?} is gone");
            prop_assert!(!steps.contains(&Step::RemoveRoute(Box::new(one))));
        }
        prop_assert!(!steps.contains(&Step::RemoveAddress(Family::V4, person)));
    }
}

#[test]
fn five_thousand_peers_are_planned_in_milliseconds() {
    let mut record = record(&[]);
    record.node.networks = PerFamily { v4: Some(net("10.0.0.0/8")), v6: None };
    record.node.subnets = PerFamily { v4: Some(net("10.244.1.0/24")), v6: None };
    for n in 0..5000_u16 {
        let [a, b] = n.to_be_bytes();
        let mut one = peer(&format!("node-{n}"), 2);
        let end = one.ends.v4.as_mut().unwrap();
        end.subnet = net(&format!("10.{a}.{b}.0/24"));
        end.vtep_mac = crate::mac::Mac([2, 9, 0, 0, a, b]);
        end.public_ip = [192, 168, a, b].into();
        one.ends.v6 = None;
        record.peers.insert(one.name.clone(), one);
    }
    let started = std::time::Instant::now();
    let wanted = wanted(&record);
    let made = started.elapsed();
    let steps = plan(&wanted, &booted());
    let planned = started.elapsed();
    let kernel = applied(&steps, &booted());
    let started = std::time::Instant::now();
    assert_eq!(plan(&wanted, &kernel), []);
    println!("5,000 peers: wanted {made:?}, planned {planned:?}, nothing to do {:?}", started.elapsed());
    assert_eq!(steps.iter().filter(|step| step.kind() == Kind::Route).count(), 5000);
}
