//! What edgeflannel does to the node as a whole: masquerading, the node's subnet, CHECK, GC and STATUS.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod world;

use serde_json::{Value, json};
use std::fs;
use world::World;

const SUBNET_ENV: &str = "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\n\
    FLANNEL_IPV6_NETWORK=fd00:244::/48\nFLANNEL_IPV6_SUBNET=fd00:244:0:1::1/64\nFLANNEL_MTU=1430\nFLANNEL_IPMASQ=";

#[test]
fn masquerading_rules() {
    let world = World::new();
    let masquerading = world.conf(json!({"ipMasq": true}));
    let rules = || world.sh("nft list ruleset");
    world.add(&world.pod("a"), &["10.1.0.5/24"], &masquerading);
    let made = rules();
    let lines: Vec<&str> = made
        .lines()
        .map(|line| line.split(" comment ").next().unwrap().trim())
        .filter(|l| l.len() > 1)
        .collect();
    assert_eq!(
        lines,
        [
            "table inet edgeflannel {",
            "chain masquerade-net {",
            "type nat hook postrouting priority srcnat; policy accept;",
            "meta mark & 0x00004000 == 0x00004000 return",
            "ip saddr 10.1.0.0/24 ip daddr 10.1.0.0/24 return",
            "ip saddr 10.1.0.0/24 ip daddr 224.0.0.0/4 return",
            "ip saddr 10.1.0.0/24 masquerade fully-random",
        ]
    );
    let handles = || world.sh("nft -a list ruleset");
    let before = handles();
    world.add(&world.pod("b"), &["10.1.0.6/24"], &masquerading);
    assert_eq!(handles(), before, "not even written again");

    // Somebody takes a rule, the chain, everything away, or adds one: the next ADD puts it right.
    let last = before.lines().rev().find_map(|line| line.split("# handle ").nth(1)).unwrap();
    let _ = last;
    for (i, damage) in [
        "nft flush chain inet edgeflannel masquerade-net",
        "nft delete table inet edgeflannel",
        "nft flush ruleset",
        "nft insert rule inet edgeflannel masquerade-net accept",
    ]
    .iter()
    .enumerate()
    {
        world.sh(damage);
        world.add(&world.pod(&format!("c{i}")), &["10.1.0.7/24"], &masquerading);
        assert_eq!(rules(), made, "{damage}");
    }
    // Another network's rules stand beside them, and other tables are nobody's business.
    world.sh("nft add table inet other");
    let mut second = world.conf(json!({"ipMasq": true, "bridge": "br2"}));
    second["name"] = json!("second");
    second["ipam"]["ranges"] = json!([[{"subnet": "10.2.0.0/24"}]]);
    world.add(&world.pod("d"), &["10.2.0.5/24"], &second);
    assert!(rules().contains("chain masquerade-net") && rules().contains("chain masquerade-second"));
    world.add(&world.pod("e"), &["10.1.0.8/24"], &world.conf(json!({})));
    assert!(!rules().contains("chain masquerade-net") && rules().contains("chain masquerade-second"));
    assert!(rules().contains("table inet other"));
}

#[test]
fn a_pods_packets_leave_under_the_nodes_address() {
    let world = World::new();
    let (pod, outside) = (world.pod("a"), world.pod("outside"));
    let path = outside.path.display();
    world.sh(&format!(
        "ip link add up0 type veth peer name eth0 netns {path} && ip addr add 192.0.2.1/24 dev up0"
    ));
    world.sh("ip link set up0 up");
    outside.sh("ip addr add 192.0.2.2/24 dev eth0 && ip link set eth0 up");
    world.add(&pod, &["10.1.0.5/24"], &world.conf(json!({})));
    assert!(!pod.reaches("192.0.2.2"), "outside knows no way back to a pod's address");
    world.add(&world.pod("b"), &["10.1.0.6/24"], &world.conf(json!({"ipMasq": true})));
    assert!(pod.reaches("192.0.2.2"));
    // Masked: kube-proxy's mark may come with others.
    world.sh("nft 'add table ip t; add chain ip t f { type filter hook forward priority 0; }; add rule ip t f meta mark set 0x4001'");
    assert!(!pod.reaches("192.0.2.2"), "a packet with kube-proxy's mark is kube-proxy's to masquerade");
}

#[test]
fn the_nodes_subnet_from_flannels_file() {
    let world = World::new();
    let flannels = json!({"cniVersion": "0.3.1", "name": "cbr0", "type": "edgeflannel",
        "delegate": {"hairpinMode": true, "isDefaultGateway": true},
        "subnetFile": world.file("subnet.env"), "dataDir": world.file("flannel")});
    let pod = world.pod("a");
    let (code, msg) = world.call("ADD", &pod, &flannels).error();
    assert_eq!(code, 11);
    assert!(msg.contains("the node's subnet is not known yet"), "{msg}");
    assert!(world.ipam_calls().is_empty() && world.sh("ip -br link").lines().count() == 1, "no trace");
    // A node that has just booted can release.
    world.call("DEL", &pod, &flannels).ok();
    assert_eq!(world.ipam_calls(), ["DEL a"]);

    fs::write(world.file("subnet.env"), format!("{SUBNET_ENV}true\n")).unwrap();
    let cluster = json!([{"dst": "10.244.0.0/16"}, {"dst": "fd00:244::/48"}]);
    let given =
        json!({"ips": [{"address": "10.244.1.5/24"}, {"address": "fd00:244:0:1::5/64"}], "routes": cluster});
    world.ipam_gives(Some("a"), &given);
    let result = world.call("ADD", &pod, &flannels).ok();
    assert_eq!(result["cniVersion"], "0.3.1");
    let told: Value = serde_json::from_str(&world.ipam_stdin("ADD", "a")).unwrap();
    assert_eq!(told["ipam"]["type"], "ipam-sticky");
    assert_eq!(
        told["ipam"]["ranges"],
        json!([[{"subnet": "10.244.1.0/24"}], [{"subnet": "fd00:244:0:1::/64"}]])
    );
    assert_eq!(told["ipam"]["routes"], cluster);
    assert!(pod.sh("ip link show eth0").contains("mtu 1430"));
    assert!(pod.sh("ip route").contains("10.244.0.0/16 via 10.244.1.1"));
    assert_eq!(world.sh("nft list ruleset"), "", "flannel masquerades");
    assert!(world.reaches("10.244.1.5") && world.reaches("fd00:244:0:1::5"));

    fs::write(world.file("subnet.env"), format!("{SUBNET_ENV}false\n")).unwrap();
    let b = world.pod("b");
    world.ipam_gives(Some("b"), &json!({"ips": [{"address": "10.244.1.6/24"}]}));
    world.call("ADD", &b, &flannels).ok();
    assert!(world.sh("nft list ruleset").contains("ip saddr 10.244.1.0/24 ip daddr 10.244.0.0/16 return"));

    // The podCIDR is replaced: the old gateway goes, new pods come up in the new subnet.
    let moved = SUBNET_ENV.replace("10.244.1.1/24", "10.244.9.1/24");
    fs::write(world.file("subnet.env"), format!("{moved}true\n")).unwrap();
    let c = world.pod("c");
    world.ipam_gives(Some("c"), &json!({"ips": [{"address": "10.244.9.5/24"}]}));
    world.call("ADD", &c, &flannels).ok();
    assert!(world.reaches("10.244.9.5") && !world.sh("ip addr show cni0").contains("10.244.1.1/"));
}

#[test]
fn the_configuration_reaches_ipam_byte_for_byte() {
    let world = World::new();
    world.ipam_gives_addresses("a", &["10.1.0.5/24"]);
    let pod = world.pod("a");
    let text = r#"{ "name":"net", "cniVersion":"1.0.0","type":"edgeflannel" ,"ipam":{"type":"host-local","subnet":"10.1.0.0/24","x":1.50}}"#;
    let mut command = world.command("ADD", "a", pod.path.to_str().unwrap());
    let mut child = command.spawn().unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), text.as_bytes()).unwrap();
    assert!(child.wait_with_output().unwrap().status.success());
    assert_eq!(world.ipam_stdin("ADD", "a"), text);
}

#[test]
fn check_finds_each_kind_of_drift() {
    let world = World::new();
    let mut conf = world.conf(json!({"ipMasq": true, "mtu": 1450}));
    let pod = world.pod("a");
    conf["prevResult"] = world.add(&pod, &["10.1.0.5/24", "fd00:1::5/64"], &conf);
    world.call("CHECK", &pod, &conf).ok();
    let host = world.veths()[0].clone();
    let path = pod.path.display();
    let in_pod = |line: &str| format!("nsenter --net={path} {line}");
    let mac = "0a:58:0a:01:00:05";
    let cases = [
        (
            in_pod("ip addr del 10.1.0.5/24 dev eth0"),
            in_pod("sh -c 'ip addr add 10.1.0.5/24 dev eth0; ip route add default via 10.1.0.1'"),
            "lacks the address 10.1.0.5/24",
        ),
        (
            in_pod("ip route del default"),
            in_pod("ip route add default via 10.1.0.1"),
            "lacks the route 0.0.0.0/0",
        ),
        (
            in_pod("ip -6 route del default"),
            in_pod("ip -6 route add default via fd00:1::1"),
            "lacks the route ::/0",
        ),
        (in_pod("ip link set eth0 mtu 1300"), in_pod("ip link set eth0 mtu 1450"), "MTU is 1300"),
        (
            in_pod("ip link set eth0 address 02:00:00:00:00:01"),
            in_pod(&format!("ip link set eth0 address {mac}")),
            "hardware address is 02:00:00:00:00:01",
        ),
        (
            format!("ip link set {host} type bridge_slave hairpin off"),
            format!("ip link set {host} type bridge_slave hairpin on"),
            "hairpin",
        ),
        (
            format!("ip link set {host} nomaster"),
            format!("ip link set {host} master cni0 && ip link set {host} type bridge_slave hairpin on"),
            "not a port",
        ),
        (format!("ip link set {host} down"), format!("ip link set {host} up"), "is down"),
        (
            "ip addr del 10.1.0.1/24 dev cni0".into(),
            "ip addr add 10.1.0.1/24 dev cni0".into(),
            "gateway address 10.1.0.1/24",
        ),
        (
            "ip link set cni0 address 02:00:00:00:00:02".into(),
            "ip link set cni0 address 0a:58:0a:01:00:01".into(),
            "bridge's hardware address",
        ),
        ("ip link set cni0 promisc on".into(), "ip link set cni0 promisc off".into(), "promiscuous"),
        ("ip link set cni0 down".into(), "ip link set cni0 up".into(), "bridge cni0 is down"),
        ("sysctl -qw net.ipv4.ip_forward=0".into(), "sysctl -qw net.ipv4.ip_forward=1".into(), "ip_forward"),
    ];
    for (damage, repair, named) in cases {
        world.sh(&damage);
        let (code, msg) = world.call("CHECK", &pod, &conf).error();
        assert_eq!(code, 102);
        assert!(msg.contains(named), "{damage}: {msg}");
        world.sh(&repair);
        let answer = world.call("CHECK", &pod, &conf);
        assert!(answer.success, "{repair}: {answer:?}");
    }
    world.ipam_fails("CHECK", 100, "not his");
    assert_eq!(world.call("CHECK", &pod, &conf).error(), (100, "not his".into()));
    world.ipam_works("CHECK");
    for (damage, named) in [
        ("nft flush ruleset".to_owned(), "nftables chain masquerade-net"),
        (format!("ip link del {host}"), "is missing"),
        ("ip link del cni0".into(), "bridge cni0 is missing"),
    ] {
        world.sh(&damage);
        let (_, msg) = world.call("CHECK", &pod, &conf).error();
        assert!(msg.contains(named), "{damage}: {msg}");
    }
}

#[test]
fn gc_removes_what_is_not_listed_of_its_own_network() {
    let world = World::new();
    let conf = world.conf(json!({}));
    let mut other = world.conf(json!({"bridge": "br2"}));
    other["name"] = json!("other");
    let (a, b, c) = (world.pod("a"), world.pod("b"), world.pod("c"));
    world.add(&a, &["10.1.0.5/24"], &conf);
    world.add(&b, &["10.1.0.6/24"], &conf);
    world.add(&c, &["10.2.0.6/24"], &other);
    world.sh("ip link add vethaaaaaaaa type veth peer name x");
    world.ipam_calls();
    world.call_at("GC", "", "", &conf).ok();
    assert_eq!(world.veths().len(), 5, "no list is not an empty list");

    let mut listed = conf.clone();
    listed["cni.dev/valid-attachments"] = json!([{"containerID": "b", "ifname": "eth0"}]);
    world.call_at("GC", "", "", &listed).ok();
    assert!(!a.has_eth0() && b.has_eth0() && c.has_eth0() && world.veths().len() == 4);
    assert_eq!(world.ipam_calls(), ["GC ", "GC "]);
    assert_eq!(world.ipam_stdin("GC", ""), listed.to_string());
    world.ipam_fails("GC", 5, "disk");
    listed["cni.dev/valid-attachments"] = json!([]);
    assert_eq!(world.call_at("GC", "", "", &listed).error(), (5, "disk".into()));
    assert!(!b.has_eth0() && c.has_eth0());
}

#[test]
fn status_says_why_not() {
    let world = World::new();
    let status = |conf: &Value| world.call_at("STATUS", "", "", conf);
    status(&world.conf(json!({}))).ok();
    let (code, msg) = status(&world.conf(json!({"ipam": {}}))).error();
    assert_eq!(code, 50);
    assert!(msg.contains("the node's subnet is not known yet"), "{msg}");
    let (code, msg) = status(&world.conf(json!({"bridge": "lo"}))).error();
    assert_eq!(code, 50);
    assert!(msg.contains("not a bridge"), "{msg}");
    world.ipam_fails("STATUS", 51, "exhausted");
    assert_eq!(status(&world.conf(json!({}))).error(), (51, "exhausted".into()));
    let (code, msg) =
        status(&world.conf(json!({"ipam": {"type": "nowhere", "subnet": "10.1.0.0/24"}}))).error();
    assert_eq!(code, 7);
    assert!(msg.contains("nowhere"), "{msg}");
}
