//! What somebody alters by hand is put right, and what is not ours is left alone.

use crate::world::*;
use cni_edgeflannel::{nft::Nft, overlay::kernel::foreign_drops, record::Family};

/// Each command alters one thing; the repair is of this kind, and afterwards nothing is left to do.
const ALTERATIONS: &[(&str, &[&str])] = &[
    ("ip link del flannel.1", &["link", "sysctl", "address", "neigh", "fdb", "route"]),
    ("ip link del flannel-v6.1", &["link", "sysctl", "address", "neigh", "fdb", "route"]),
    ("ip link set flannel.1 address 02:00:00:00:00:99", &["mac", "neigh"]),
    ("ip link set flannel-v6.1 address 02:00:00:00:00:99", &["mac", "neigh"]),
    ("ip link set flannel.1 mtu 1300", &["mtu"]),
    ("ip link set flannel-v6.1 mtu 1300", &["mtu"]),
    ("ip link set flannel.1 down", &["link", "neigh", "route"]),
    ("ip addr del 10.244.1.0/32 dev flannel.1", &["address", "neigh", "route"]),
    ("ip addr add 10.244.9.0/32 dev flannel.1", &["address"]),
    ("ip addr del fd00:10:244:1::/128 dev flannel-v6.1", &["address"]),
    ("ip route del 10.244.2.0/24", &["route"]),
    ("ip route flush dev flannel.1", &["route"]),
    ("ip -6 route flush dev flannel-v6.1 proto boot", &["route"]),
    ("ip route replace 10.244.2.0/24 via 192.168.77.254", &["route"]),
    ("ip route replace blackhole 10.244.2.0/24", &["route"]),
    ("ip route replace 10.244.2.0/24 via 10.244.3.0 dev flannel.1 onlink", &["route"]),
    ("ip route replace 10.244.2.0/24 via 10.244.2.0 dev flannel.1 onlink proto static", &["route"]),
    ("ip -6 route del fd00:10:244:2::/64", &["route"]),
    ("ip -6 route replace fd00:10:244:2::/64 via fd00:77::fe", &["route"]),
    ("ip route add 10.244.200.0/24 via 10.244.200.0 dev flannel.1 onlink", &["route"]),
    ("ip -6 route add fd00:10:244:c8::/64 via fd00:10:244:c8:: dev flannel-v6.1 onlink", &["route"]),
    ("ip neigh del 10.244.2.0 dev flannel.1", &["neigh"]),
    ("ip neigh replace 10.244.2.0 lladdr 02:00:00:00:00:99 dev flannel.1 nud permanent", &["neigh"]),
    ("ip neigh add 10.244.200.0 lladdr 02:00:00:00:00:99 dev flannel.1 nud permanent", &["neigh"]),
    ("ip neigh flush dev flannel.1 nud permanent", &["neigh"]),
    (
        "ip -6 neigh replace fd00:10:244:2:: lladdr 02:00:00:00:00:99 dev flannel-v6.1 nud permanent",
        &["neigh"],
    ),
    ("bridge fdb del 02:00:00:00:20:02 dev flannel.1 dst 192.168.77.2", &["fdb"]),
    ("bridge fdb replace 02:00:00:00:20:02 dev flannel.1 dst 192.168.77.99 self permanent", &["fdb"]),
    ("bridge fdb append 00:00:00:00:00:00 dev flannel.1 dst 192.168.77.99 self permanent", &["fdb"]),
    ("bridge fdb add 02:00:00:00:00:99 dev flannel.1 dst 192.168.77.99 self permanent", &["fdb"]),
    (
        "bridge fdb replace 02:00:00:00:20:02 dev flannel.1 dst 192.168.77.2 port 9999 self permanent",
        &["fdb"],
    ),
    ("bridge fdb add 02:00:00:00:00:99 dev flannel.1 dst 192.168.77.99 port 9999 self permanent", &["fdb"]),
    ("bridge fdb del 02:00:00:00:80:02 dev flannel-v6.1 dst fd00:77::2", &["fdb"]),
    ("nft delete table inet edgeflannel", &["nft"]),
    ("nft flush chain inet edgeflannel overlay-postrouting", &["nft"]),
    ("nft insert rule inet edgeflannel overlay-forward drop", &["nft"]),
    ("nft chain inet edgeflannel overlay-forward '{ policy drop; }'", &["nft"]),
    ("nft flush ruleset", &["nft"]),
    ("echo 0 >/proc/sys/net/ipv4/ip_forward", &["sysctl"]),
    ("echo 0 >/proc/sys/net/ipv6/conf/all/forwarding", &["sysctl"]),
    ("echo 1 >/proc/sys/net/ipv6/conf/flannel.1/accept_ra", &["sysctl"]),
];

#[test]
fn every_alteration_is_put_right() {
    let Some(cluster) = Cluster::new(3) else { return };
    cluster.nodes.iter().for_each(|node| {
        node.settle();
        node.add_pod();
    });
    let node = &cluster.nodes[0];
    for (command, kinds) in ALTERATIONS {
        node.machine.sh(command);
        let taken = node.settle();
        let mut found = crate::world::kinds(&taken);
        found.sort_unstable();
        found.dedup();
        let mut wanted = kinds.to_vec();
        wanted.sort_unstable();
        assert_eq!(found, wanted, "{command}: {taken:?}");
    }
    // All at once.
    for (command, _) in ALTERATIONS.iter().rev() {
        node.machine.try_sh(command);
    }
    node.machine.sh(&format!("rm -f {}", node.record.node.subnet_file.display()));
    node.settle();
    node.machine.sh("ping -c1 -W2 -I 10.244.1.5 10.244.2.5");
    node.machine.sh("ping -c1 -W2 -I fd00:10:244:1::5 fd00:10:244:3::5");
}

#[test]
fn a_device_of_another_kind_under_our_name_is_replaced() {
    let Some(cluster) = Cluster::new(2) else { return };
    let node = &cluster.nodes[0];
    for command in [
        "ip link add flannel.1 type bridge",
        "ip link add flannel.1 type vxlan id 9 dev eth0 dstport 8472",
        "ip link add flannel.1 type vxlan id 1 dev eth0 dstport 4789 local 192.168.77.1",
        "ip link add flannel.1 type vxlan id 1 dev eth0 dstport 8472 local 192.168.77.1 group 239.1.1.1",
    ] {
        node.machine.try_sh("ip link del flannel.1");
        node.machine.sh(command);
        node.settle();
    }
    // One that only differs in what can be changed stays: flannel.1 as an older configuration made it.
    node.machine.sh("ip link del flannel.1");
    node.machine
        .sh("ip link add flannel.1 type vxlan id 1 dev eth0 dstport 8472 local 192.168.77.1 learning");
    let index = node.index("flannel.1");
    node.settle();
    assert_eq!(node.index("flannel.1"), index, "adopted, not made anew");
}

/// "File exists" alone would send a person looking for flannel.1, which is not there.
#[test]
fn somebody_elses_vxlan_of_our_number_is_named_by_the_kernels_own_sentence() {
    let Some(cluster) = Cluster::new(2) else { return };
    let node = &cluster.nodes[0];
    node.machine.sh("ip link add theirs type vxlan id 1 dev eth0 dstport 8472 local 192.168.77.1");
    let failures = node.reconcile().failures;
    let said = failures.iter().map(|failure| failure.error.to_string()).collect::<Vec<_>>();
    let device = said.iter().find(|text| text.starts_with("make device flannel.1 on interface")).unwrap();
    assert!(device.contains("A VXLAN device with the specified VNI already exists"), "{device}");
    node.machine.sh("ip link del theirs");
    node.settle();
}

#[test]
fn what_is_not_ours_stays() {
    let Some(cluster) = Cluster::new(2) else { return };
    let node = &cluster.nodes[0];
    node.settle();
    node.machine.sh(
        "ip route add 10.99.0.0/24 dev flannel.1 && ip route add 10.98.0.0/24 via 192.168.77.254 && \
         ip route add 10.244.2.0/24 via 192.168.77.254 metric 77 && ip addr add 172.20.0.1/24 dev flannel.1 && \
         ip neigh add 192.168.77.50 lladdr 02:00:00:00:00:50 dev eth0 nud permanent && \
         nft add table inet mine && nft add chain inet mine c && nft add rule inet mine c accept && \
         nft add chain inet edgeflannel masquerade-net && nft add rule inet edgeflannel masquerade-net return && \
         ip link add flannel.9 type vxlan id 9 dev eth0 dstport 8472 && ip link set flannel.9 up",
    );
    let seen = "ip route; ip -6 route; ip addr; ip neigh show nud permanent; nft list ruleset; ip link";
    let before = node.machine.sh(seen);
    assert!(node.plan().is_empty());
    // Also while something of ours is repaired, in the same table and on the same device.
    node.machine
        .sh("nft flush chain inet edgeflannel overlay-forward && ip route del 10.244.2.0/24 metric 0");
    node.settle();
    let sorted = |text: &str| {
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        lines.sort();
        lines
    };
    assert_eq!(sorted(&node.machine.sh(seen)), sorted(&before));
}

#[test]
fn peers_that_left_came_and_changed() {
    let Some(mut cluster) = Cluster::new(4) else { return };
    cluster.nodes[0].settle();
    let record = &mut cluster.nodes[0].record;
    record.peers.remove("node2");
    let third = record.peers.get_mut("node3").unwrap();
    third.ends.v4.as_mut().unwrap().vtep_mac = mac(Family::V4, 33);
    third.ends.v6.as_mut().unwrap().public_ip = "fd00:77::33".parse().unwrap();
    let fourth = record.peers.get_mut("node4").unwrap();
    fourth.ends.v4.as_mut().unwrap().subnet = subnet(Family::V4, 44);
    record.peers.insert("node5".into(), peer(5));
    let node = &cluster.nodes[0];
    node.settle();
    let routes = node.machine.sh("ip route show dev flannel.1 | cut -d' ' -f1 | sort");
    assert_eq!(routes, "10.244.3.0/24\n10.244.44.0/24\n10.244.5.0/24");
    let fdb = node.machine.sh("bridge fdb show dev flannel.1 | cut -d' ' -f1,3 | sort");
    assert_eq!(
        fdb,
        "02:00:00:00:20:04 192.168.77.4\n02:00:00:00:20:05 192.168.77.5\n02:00:00:00:20:21 192.168.77.3"
    );
    let neighbours = node.machine.sh("ip -6 neigh show dev flannel-v6.1 nud permanent | wc -l");
    assert_eq!(neighbours, "3");
}

#[test]
fn the_own_subnet_and_address_and_interface_change() {
    let Some(mut cluster) = Cluster::new(2) else { return };
    cluster.nodes.iter().for_each(|node| {
        node.settle();
        node.add_pod();
    });
    let index = cluster.nodes[0].index("flannel.1");
    cluster.nodes[0].record.node.subnets.v4 = Some(subnet(Family::V4, 11));
    cluster.nodes[0].settle();
    let machine = &cluster.nodes[0].machine;
    assert!(machine.sh("ip -4 -o addr show flannel.1").contains("10.244.11.0/32"));
    assert_eq!(machine.sh("ip -4 -o addr show flannel.1 | wc -l"), "1");

    // Another address on the same interface (DHCP): changed in place, so that nothing else is lost.
    machine.sh("ip addr del 192.168.77.1/24 dev eth0 && ip addr add 192.168.77.201/24 dev eth0 && ip route add default via 192.168.77.254");
    assert_eq!(kinds(&cluster.nodes[0].settle()), ["link"]);
    assert!(machine.sh("ip -d link show flannel.1").contains("local 192.168.77.201"));
    println!("changing the local address keeps the device: {}", cluster.nodes[0].index("flannel.1") == index);

    // Another interface.
    plug_in(&cluster.wire, &Machine::new("x").unwrap(), 99, "x");
    machine.sh("ip link set eth0 down; ip route flush default; true");
    cluster.nodes[0].settle();
    cluster.wire.sh("true");
    plug_in_second(&cluster);
    cluster.nodes[0].settle();
    let text = cluster.nodes[0].machine.sh("ip -d link show flannel.1");
    assert!(text.contains("local 192.168.77.150 dev usb0"), "{text}");
    println!("changing the interface keeps the device: {}", cluster.nodes[0].index("flannel.1") == index);

    // The interface is pulled out: the device goes with it. Nothing can be done, and nothing fails.
    cluster.nodes[0].machine.sh("ip link del usb0");
    assert!(!cluster.nodes[0].machine.try_sh("ip link show flannel.1").0);
    cluster.nodes[0].settle();
    plug_in_second(&cluster);
    cluster.nodes[0].settle();
    cluster.nodes[0].machine.sh("ip link show flannel.1");
}

fn plug_in_second(cluster: &Cluster) {
    plug_in(&cluster.wire, &cluster.nodes[0].machine, 150, "usb0");
    cluster.nodes[0].machine.sh("ip link set eth0 down");
}

#[test]
fn an_underlay_that_shrinks_and_grows() {
    let Some(cluster) = Cluster::new(2) else { return };
    let node = &cluster.nodes[0];
    node.settle();
    for (below, v4, v6) in [(1400, 1350, 1330), (9000, 8950, 8930), (1500, 1450, 1430)] {
        node.machine.sh(&format!("ip link set eth0 mtu {below}"));
        node.settle();
        assert_eq!(
            node.machine.sh("cat /proc/net/dev >/dev/null; ip -o link show flannel.1 | grep -o 'mtu [0-9]*'"),
            format!("mtu {v4}")
        );
        assert_eq!(
            node.machine.sh("ip -o link show flannel-v6.1 | grep -o 'mtu [0-9]*'"),
            format!("mtu {v6}")
        );
        let env = std::fs::read_to_string(&node.record.node.subnet_file).unwrap();
        assert!(env.contains(&format!("FLANNEL_MTU={v6}")), "{env}");
    }
}

#[test]
fn a_family_that_is_switched_off() {
    let Some(mut cluster) = Cluster::new(2) else { return };
    cluster.nodes[0].settle();
    cluster.nodes[0].record.node.networks.v6 = None;
    cluster.nodes[0].settle();
    assert!(!cluster.nodes[0].machine.try_sh("ip link show flannel-v6.1").0);
    cluster.nodes[0].machine.sh("ip link show flannel.1");
}

#[test]
fn foreign_chains_that_drop_are_reported() {
    let Some(cluster) = Cluster::new(1) else { return };
    let machine = &cluster.nodes[0].machine;
    cluster.nodes[0].settle();
    assert!(machine.run(foreign_drops).is_empty());
    machine.sh("nft add table ip filter && nft add chain ip filter FORWARD '{ type filter hook forward priority 0; policy drop; }'");
    machine.sh("nft add table inet fw && nft add chain inet fw input '{ type filter hook input priority 0; policy drop; }'");
    let said = machine.run(foreign_drops);
    assert_eq!(said.len(), 1);
    assert!(said[0].contains("\"ip filter FORWARD\""), "{said:?}");
}

#[test]
fn flannels_rules_are_removed() {
    let Some(cluster) = Cluster::new(1) else { return };
    let machine = &cluster.nodes[0].machine;
    machine.sh("nft add table ip flannel-ipv4 && nft add chain ip flannel-ipv4 postrtg '{ type nat hook postrouting priority 100; }'");
    for tables in ["iptables-nft", "ip6tables-nft"] {
        let net = if tables == "iptables-nft" { "10.244.0.0/16" } else { "fd00:10:244::/56" };
        for line in [
            "-t nat -N FLANNEL-POSTRTG",
            "-t nat -A POSTROUTING -m comment --comment other -j RETURN",
            "-t nat -A POSTROUTING -m comment --comment 'flanneld masq' -j FLANNEL-POSTRTG",
            &format!("-t nat -A FLANNEL-POSTRTG -s {net} -m comment --comment 'flanneld masq' -j RETURN"),
            "-t filter -N FLANNEL-FWD",
            "-t filter -A FORWARD -m comment --comment 'flanneld forward' -j FLANNEL-FWD",
            &format!("-t filter -A FLANNEL-FWD -s {net} -j ACCEPT"),
        ] {
            machine.sh(&format!("{tables} {line}"));
        }
    }
    let removed = machine.run(|| Nft::open().unwrap().remove_flannels().unwrap());
    assert_eq!(
        removed,
        [
            "table ip flannel-ipv4",
            "chain ip nat FLANNEL-POSTRTG",
            "chain ip filter FLANNEL-FWD",
            "chain ip6 nat FLANNEL-POSTRTG",
            "chain ip6 filter FLANNEL-FWD",
        ]
    );
    let left = machine.sh("nft list ruleset; iptables-nft-save");
    assert!(!left.to_lowercase().contains("flannel"), "{left}");
    assert!(left.contains("--comment other"), "{left}");
    assert!(machine.run(|| Nft::open().unwrap().remove_flannels().unwrap()).is_empty());
}
