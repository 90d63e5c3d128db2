//! What is restored is what flanneld would have made, and packets pass.

use crate::world::*;
use cni_edgeflannel::record::{Backend, Family, PerFamily};
use std::collections::BTreeSet;

/// facts: vxlan id 1, dev, local, dstport 8472, nolearning, no proxy/rsc/l2miss/l3miss, no group, ttl 0, no UDP_CSUM
/// attribute, udp6zerocsumtx/rx off, /32, up, accept_ra 0.
#[test]
fn the_devices_are_as_flanneld_makes_them() {
    let Some(cluster) = Cluster::new(2) else { return };
    let node = &cluster.nodes[0];
    node.settle();
    let machine = &node.machine;
    // What flanneld's own message makes, said with iproute2, beside ours under another number.
    machine.sh(
        "ip link add flannel.2 address 02:00:00:00:00:22 mtu 1450 txqueuelen 0 type vxlan id 2 dev eth0 local 192.168.77.1 \
         dstport 8472 nolearning && ip link set flannel.2 up",
    );
    let words = |device: &str| -> BTreeSet<String> {
        let text = machine.sh(&format!("ip -d link show {device}"));
        let skip = ["id", "link/ether", device];
        let mut words = text.split_whitespace().collect::<Vec<_>>();
        words.retain(|word| !word.contains(device) && !word.ends_with("eth0:"));
        let mut out = BTreeSet::new();
        let mut after_skipped = true;
        for word in words {
            if !after_skipped {
                out.insert(word.to_owned());
            }
            after_skipped = skip.contains(&word);
        }
        out
    };
    assert_eq!(words("flannel.1"), words("flannel.2"));
    let text = machine.sh("ip -d link show flannel.1");
    for piece in [
        "mtu 1450",
        "02:00:00:00:20:01",
        "vxlan id 1 local 192.168.77.1 dev eth0",
        "dstport 8472",
        "nolearning",
        ",UP",
    ] {
        assert!(text.contains(piece), "{piece}: {text}");
    }
    assert!(!text.contains("qlen"), "flanneld makes it with txqueuelen 0: {text}");
    let v6 = machine.sh("ip -d link show flannel-v6.1");
    for piece in [
        "mtu 1430",
        "02:00:00:00:80:01",
        "vxlan id 1 local fd00:77::1 dev eth0",
        "dstport 8472",
        "nolearning",
    ] {
        assert!(v6.contains(piece), "{piece}: {v6}");
    }
    assert!(machine.sh("ip -4 addr show flannel.1").contains("inet 10.244.1.0/32 scope global flannel.1"));
    assert!(machine.sh("ip -6 addr show flannel-v6.1").contains("inet6 fd00:10:244:1::/128 scope global"));
    assert_eq!(
        machine.sh("cat /proc/sys/net/ipv6/conf/flannel.1/accept_ra /proc/sys/net/ipv4/ip_forward"),
        "0\n1"
    );
    // Per peer: neighbour, forwarding entry, route.
    assert_eq!(
        machine.sh("ip neigh show dev flannel.1 nud permanent"),
        "10.244.2.0 lladdr 02:00:00:00:20:02 PERMANENT"
    );
    assert_eq!(
        machine.sh("bridge fdb show dev flannel.1"),
        "02:00:00:00:20:02 dst 192.168.77.2 self permanent"
    );
    assert_eq!(
        machine.sh("ip -d route show 10.244.2.0/24"),
        "unicast 10.244.2.0/24 via 10.244.2.0 dev flannel.1 proto boot scope global onlink"
    );
    assert_eq!(
        machine.sh("bridge fdb show dev flannel-v6.1"),
        "02:00:00:00:80:02 dst fd00:77::2 self permanent"
    );
    let route = machine.sh("ip -6 -d route show fd00:10:244:2::/64");
    assert!(route.starts_with("unicast fd00:10:244:2::/64 via fd00:10:244:2:: dev flannel-v6.1 proto boot scope global metric 1024 onlink"), "{route}");
}

#[test]
fn three_nodes_talk_to_each_other() {
    let Some(cluster) = Cluster::new(3) else { return };
    for node in &cluster.nodes {
        node.settle();
        node.add_pod();
    }
    for node in &cluster.nodes {
        for other in cluster.nodes.iter().filter(|other| other.n != node.n) {
            let (me, it) = (node.n, other.n);
            // Pod to pod with full packets, unfragmented.
            node.machine.sh(&format!("ping -c1 -W2 -M do -s 1422 -I 10.244.{me}.5 10.244.{it}.5"));
            node.machine
                .sh(&format!("ping -c1 -W2 -M do -s 1382 -I fd00:10:244:{me:x}::5 fd00:10:244:{it:x}::5"));
            // Host to pod.
            node.machine.sh(&format!("ping -c1 -W2 10.244.{it}.5"));
        }
    }
    // A pod reaches the world under its node's address: the wire knows no way back to pods.
    let node = &cluster.nodes[0].machine;
    node.sh("ping -c1 -W2 -I 10.244.1.5 192.168.77.254");
    node.sh("ping -c1 -W2 -I fd00:10:244:1::5 fd00:77::fe");
    node.sh("nft flush chain inet edgeflannel overlay-postrouting");
    assert!(
        !node.try_sh("ping -c1 -W1 -I 10.244.1.5 192.168.77.254").0,
        "it was not masquerading that let it pass"
    );
}

#[test]
fn direct_routing() {
    let Some(mut cluster) = Cluster::new(3) else { return };
    for node in &mut cluster.nodes {
        node.record.node.backend.direct_routing = true;
    }
    // The third node is behind a router for the first one.
    cluster.nodes[0].machine.sh("ip route add 192.168.77.3/32 via 192.168.77.254");
    cluster.wire.sh("echo 1 >/proc/sys/net/ipv4/ip_forward");
    for node in &cluster.nodes {
        node.settle();
        node.add_pod();
    }
    let node = &cluster.nodes[0];
    assert_eq!(node.machine.sh("ip route show 10.244.2.0/24"), "10.244.2.0/24 via 192.168.77.2 dev eth0");
    assert!(node.machine.sh("ip route show 10.244.3.0/24").contains("dev flannel.1 onlink"));
    assert_eq!(node.machine.sh("bridge fdb show dev flannel.1 | wc -l"), "1");
    node.machine.sh("ping -c1 -W2 -M do -s 1472 -I 10.244.1.5 10.244.2.5");
    node.machine.sh("ping -c1 -W2 -I fd00:10:244:1::5 fd00:10:244:2::5");
    // A peer that left.
    cluster.nodes[0].record.peers.remove("node2");
    let node = &cluster.nodes[0];
    assert_eq!(kinds(&node.settle()), ["route"]);
    assert_eq!(node.machine.sh("ip route show 10.244.2.0/24"), "");
    // Switched off again: through the overlay, in place.
    cluster.nodes[1].record.node.backend.direct_routing = false;
    cluster.nodes[1].settle();
    assert!(cluster.nodes[1].machine.sh("ip route show 10.244.1.0/24").contains("dev flannel.1 onlink"));
}

#[test]
fn another_number_port_policy_and_mtu() {
    let Some(mut cluster) = Cluster::new(2) else { return };
    for node in &mut cluster.nodes {
        node.record.node.backend =
            Backend { vni: 4096, port: 4789, gbp: true, learning: true, mtu: 1400, direct_routing: false };
        node.record.node.subnets.v6 = None;
        node.settle();
        node.add_pod();
    }
    let node = &cluster.nodes[0].machine;
    let text = node.sh("ip -d link show flannel.4096");
    for piece in ["mtu 1350", "vxlan id 4096", "dstport 4789", "gbp"] {
        assert!(text.contains(piece), "{piece}: {text}");
    }
    assert!(!text.contains("nolearning"));
    node.sh("ping -c1 -W2 -I 10.244.1.5 10.244.2.5");
    cluster.nodes[0].settle();
    assert!(!node.try_sh("ip link show flannel-v6.4096").0);
}

#[test]
fn checksum_offload_off_when_asked() {
    let Some(mut cluster) = Cluster::new(1) else { return };
    cluster.nodes[0].settle();
    let offload = "ethtool -k flannel.1 2>/dev/null | grep tx-checksum-ip-generic || echo no ethtool here";
    println!("before: {}", cluster.nodes[0].machine.sh(offload));
    cluster.nodes[0].record.node.disable_tx_checksum = true;
    let taken = cluster.nodes[0].settle();
    assert_eq!(taken.len(), 2, "both devices: {taken:?}");
    println!("after: {}", cluster.nodes[0].machine.sh(offload));
    // Made anew, it is off from the start.
    cluster.nodes[0].machine.sh("ip link del flannel.1");
    cluster.nodes[0].settle();
}

#[test]
fn one_family_only() {
    for family in Family::ALL {
        let Some(mut cluster) = Cluster::new(2) else { return };
        for node in &mut cluster.nodes {
            let of = |other: Family| (other == family).then(|| subnet(family, node.n));
            node.record.node.subnets = PerFamily { v4: of(Family::V4), v6: of(Family::V6) };
            node.settle();
            node.add_pod();
        }
        let node = &cluster.nodes[0].machine;
        let (there, missing, ping) = match family {
            Family::V4 => ("flannel.1", "flannel-v6.1", "ping -c1 -W2 -I 10.244.1.5 10.244.2.5"),
            Family::V6 => ("flannel-v6.1", "flannel.1", "ping -c1 -W2 -I fd00:10:244:1::5 fd00:10:244:2::5"),
        };
        node.sh(&format!("ip link show {there}"));
        assert!(!node.try_sh(&format!("ip link show {missing}")).0);
        node.sh(ping);
    }
}
