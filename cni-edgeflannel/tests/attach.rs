//! ADD and DEL in real network namespaces: what a pod can reach, what is left behind, what survives.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod world;

use serde_json::{Value, json};
use std::{fs, thread, time::Instant};
use world::{Answer, Pod, World};

#[test]
fn a_pod_is_reachable_as_soon_as_add_returns_and_gone_after_del() {
    let world = World::new();
    let conf = world.conf(json!({"mtu": 1450}));
    let (a, b) = (world.pod("a"), world.pod("b"));
    let result = world.add(&a, &["10.1.0.5/24", "fd00:1::5/64"], &conf);
    assert!(world.reaches("10.1.0.5") && world.reaches("fd00:1::5"));
    world.add(&b, &["10.1.0.6/24", "fd00:1::6/64"], &conf);
    assert!(
        a.reaches("10.1.0.6") && b.reaches("fd00:1::5") && a.reaches("10.1.0.1") && a.reaches("fd00:1::1")
    );

    let interfaces = result["interfaces"].as_array().unwrap();
    assert_eq!(interfaces[0]["name"], "cni0");
    assert_eq!(
        interfaces[0]["mac"],
        world.sh(
            "cat /proc/self/net/dev >/dev/null; ip -j link show cni0 | sed 's/.*\"address\":\"//; s/\".*//'"
        )
    );
    assert_eq!(interfaces[2]["mac"], "0a:58:0a:01:00:05");
    assert_eq!(interfaces[2]["sandbox"], a.path.to_str().unwrap());
    assert_eq!(interfaces[2]["mtu"], 1450);
    assert!(
        a.sh("ip link show eth0").contains("mtu 1450")
            && a.sh("ip link show eth0").contains("0a:58:0a:01:00:05")
    );
    assert_eq!(result["ips"][1], json!({"address": "fd00:1::5/64", "gateway": "fd00:1::1", "interface": 2}));
    let host = interfaces[1]["name"].as_str().unwrap();
    let shown = world.sh(&format!("ip -d link show {host}"));
    assert!(shown.contains("alias edgeflannel:net:a:eth0") && shown.contains("hairpin on"), "{shown}");
    assert_eq!(world.sh(&format!("ip -6 addr show {host}")), "", "a port has no address of its own");
    assert!(!a.sh("ip -6 addr show eth0").contains("tentative"));
    assert_eq!(world.sh("cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv6/conf/all/forwarding"), "1\n1");
    assert_eq!(world.sh("cat /proc/sys/net/ipv6/conf/cni0/accept_ra"), "0");

    assert_eq!(world.ipam_calls(), ["ADD a", "ADD b"]);
    world.call("DEL", &a, &conf).ok();
    assert!(!a.has_eth0() && world.veths().len() == 1);
    world.call("DEL", &a, &conf).ok();
    world.call_at("DEL", "b", "", &conf).ok();
    assert_eq!(world.veths(), [""; 0]);
    assert_eq!(world.ipam_calls(), ["DEL a", "DEL a", "DEL b"]);
}

#[test]
fn del_without_anything_to_delete() {
    let world = World::new();
    let conf = world.conf(json!({}));
    for netns in ["", "/nonexistent/netns", "/etc/hostname"] {
        world.call_at("DEL", "never", netns, &conf).ok();
    }
    // The node's own namespace, as a runtime passes it that kept a process id over a reboot.
    world.sh("ip link add eth0 type veth peer name other");
    let own = format!("/proc/{}/task/{}/ns/net", std::process::id(), nix::unistd::gettid());
    let (code, _) = world.call_at("DEL", "never", &own, &conf).error();
    assert_eq!(code, 8);
    assert_eq!(world.veths().len(), 2);
}

#[test]
fn a_failed_add_leaves_nothing_of_the_pod() {
    let world = World::new();
    let conf = world.conf(json!({}));
    let pod = world.pod("a");
    // The route cannot be made: its gateway is not reachable.
    let route = json!({"dst": "192.168.0.0/16", "gw": "172.16.0.1"});
    world.ipam_gives(Some("a"), &json!({"ips": [{"address": "10.1.0.5/24"}], "routes": [route]}));
    let (code, msg) = world.call("ADD", &pod, &conf).error();
    assert_eq!(code, 5);
    assert!(msg.contains("add route 192.168.0.0/16 via 172.16.0.1: Network is unreachable"), "{msg}");
    assert!(!pod.has_eth0() && world.veths().is_empty());
    assert_eq!(world.ipam_calls(), ["ADD a", "DEL a"]);

    world.ipam_gives(Some("a"), &json!({"ips": []}));
    let (_, msg) = world.call("ADD", &pod, &conf).error();
    assert!(msg.contains("no address"), "{msg}");
    assert_eq!(world.ipam_calls(), ["ADD a", "DEL a"]);

    world.ipam_fails("ADD", 100, "no addresses left");
    assert_eq!(world.call("ADD", &pod, &conf).error(), (100, "no addresses left".into()));
    assert_eq!(world.ipam_calls(), ["ADD a", "DEL a"]);
    world.ipam_works("ADD");
    world.add(&pod, &["10.1.0.5/24"], &conf);
    assert!(world.reaches("10.1.0.5"));
}

#[test]
fn an_interface_that_is_there_is_not_taken_over() {
    let world = World::new();
    let conf = world.conf(json!({}));
    let pod = world.pod("a");
    world.add(&pod, &["10.1.0.5/24"], &conf);
    world.ipam_calls();
    let (code, msg) = world.call("ADD", &pod, &conf).error();
    assert_eq!(code, 4);
    assert!(msg.contains("CNI_IFNAME eth0 exists already"), "{msg}");
    assert!(world.ipam_calls().is_empty() && world.reaches("10.1.0.5"));

    let (code, _) = world.call_at("ADD", "b", "/nonexistent/netns", &conf).error();
    assert_eq!(code, 3);
    let (code, msg) = world.call("ADD", &world.pod("c"), &world.conf(json!({"bridge": "lo"}))).error();
    assert_eq!(code, 5);
    assert!(msg.contains("not a bridge"), "{msg}");
    assert!(world.ipam_calls().is_empty());
}

#[test]
fn a_gateway_of_another_subnet_is_replaced() {
    let world = World::new();
    world.sh("ip link add cni0 type bridge && ip link set cni0 up && ip addr add 10.9.0.1/24 dev cni0");
    world.sh("ip addr add fd09::1/64 dev cni0 && ip addr add 192.168.7.7/32 dev cni0");
    let pod = world.pod("a");
    world.ipam_gives_addresses("a", &["10.1.0.5/24"]);
    let (code, msg) = world.call("ADD", &pod, &world.conf(json!({"forceAddress": false}))).error();
    assert_eq!(code, 7);
    assert!(msg.contains("10.9.0.1/24"), "{msg}");
    assert!(!pod.has_eth0());

    world.call("ADD", &pod, &world.conf(json!({}))).ok();
    let addresses = world.sh("ip addr show cni0");
    assert!(addresses.contains("10.1.0.1/24") && !addresses.contains("10.9.0.1"), "{addresses}");
    // Not of this pod's family, or not a gateway's: left alone.
    assert!(addresses.contains("fd09::1/64") && addresses.contains("192.168.7.7/32"), "{addresses}");
    assert!(world.reaches("10.1.0.5"));
}

#[test]
fn a_bridge_that_is_there_keeps_its_hardware_address_for_good() {
    let world = World::new();
    // Made by hand: it has the address of its first port, and would follow.
    world.sh("ip link add cni0 type bridge && ip link set cni0 up");
    world.sh("ip link add p0 address 02:00:00:00:00:99 type veth peer name p1 && ip link set p0 master cni0");
    let mac = || world.sh("ip -br link show cni0 | awk '{print $3}'");
    let before = mac();
    let pod = world.pod("a");
    let result = world.add(&pod, &["10.1.0.5/24"], &world.conf(json!({})));
    assert_eq!((mac(), result["interfaces"][0]["mac"].as_str().unwrap()), (before.clone(), before.as_str()));
    world.sh("ip link add p2 address 02:00:00:00:00:01 type veth peer name p3 && ip link set p2 master cni0");
    world.sh("ip link del p0");
    assert_eq!(mac(), before);
}

#[test]
fn the_former_sandbox_gives_way() {
    let world = World::new();
    let conf = world.conf(json!({}));
    let (old, new) = (world.pod("old"), world.pod("new"));
    world.add(&old, &["10.1.0.5/24", "fd00:1::5/64"], &conf);
    // The new sandbox fails: the old one goes on.
    let bad =
        json!({"ips": [{"address": "10.1.0.5/24"}], "routes": [{"dst": "9.9.9.9/32", "gw": "8.8.8.8"}]});
    world.ipam_gives(Some("new"), &bad);
    world.call("ADD", &new, &conf).error();
    assert!(world.reaches("10.1.0.5") && old.reaches("10.1.0.1") && !new.has_eth0());
    let port = world.veths();
    assert!(
        world.sh(&format!("bridge fdb show dev {}", port[0])).contains("0a:58:0a:01:00:05 sticky master")
    );
    assert!(world.sh(&format!("ip -d link show {}", port[0])).contains("hairpin on"));

    world.add(&new, &["10.1.0.5/24", "fd00:1::5/64"], &conf);
    assert!(world.reaches("10.1.0.5") && new.reaches("10.1.0.1") && !old.reaches("10.1.0.1"));
    world.call("CHECK", &new, &with_result(&world, &conf, &new)).ok();
    // Its DEL comes late, and twice.
    world.call("DEL", &old, &conf).ok();
    world.call("DEL", &old, &conf).ok();
    assert!(world.reaches("10.1.0.5") && world.veths().len() == 1);
}

/// The configuration with the result that ADD would have given.
fn with_result(world: &World, conf: &Value, pod: &Pod) -> Value {
    let network = cni::NetworkName::parse("net").unwrap();
    let id = cni::AttachmentId {
        container_id: cni::ContainerId::parse(&pod.container).unwrap(),
        ifname: cni::IfName::parse("eth0").unwrap(),
    };
    let host = cni_edgeflannel::pod::names::host_veth(&network, &id);
    assert!(world.veths().contains(&host));
    let mut conf = conf.clone();
    conf["prevResult"] = json!({"cniVersion": "1.1.0", "interfaces": [
        {"name": "cni0"}, {"name": host}, {"name": "eth0", "sandbox": pod.path, "mac": "0a:58:0a:01:00:05"}],
        "ips": [{"address": "10.1.0.5/24", "gateway": "10.1.0.1", "interface": 2}]});
    conf
}

/// A pod as flannel with the reference bridge and host-local leaves it.
fn foreign_pod(world: &World, pod: &Pod, mac: &str, address: &str) {
    world.sh("ip link show cni0 2>/dev/null || { ip link add cni0 type bridge; ip addr add 10.1.0.1/24 dev cni0; ip link set cni0 up; }");
    let path = pod.path.display();
    world.sh(&format!("ip link add vethf00 type veth peer name eth0 address {mac} netns {path}"));
    world.sh("ip link set vethf00 master cni0 up");
    pod.sh(&format!(
        "ip addr add {address} dev eth0 && ip link set eth0 up && ip route add default via 10.1.0.1"
    ));
}

#[test]
fn a_sandbox_that_flannel_made_gives_way_too() {
    let world = World::new();
    let conf = world.conf(json!({}));
    let (old, new, other) = (world.pod("old"), world.pod("new"), world.pod("other"));
    world.add(&other, &["10.1.0.6/24", "fd00:1::6/64"], &conf);
    foreign_pod(&world, &old, "02:00:00:00:00:77", "10.1.0.5/24");
    old.sh("ip addr add fd00:1::5/64 dev eth0 nodad");
    assert!(world.reaches("10.1.0.5") && other.reaches("10.1.0.5") && other.reaches("fd00:1::5"));
    world.add(&new, &["10.1.0.5/24", "fd00:1::5/64"], &conf);
    assert!(!old.reaches("10.1.0.1"));
    // The node's neighbour table has the old hardware address; the kernel announces the new one.
    let neighbour = world.sh("ip neigh show 10.1.0.5 dev cni0");
    assert!(
        neighbour.contains("0a:58:0a:01:00:05"),
        "{neighbour} {}",
        new.sh("cat /proc/sys/net/ipv4/conf/eth0/arp_notify; ip addr")
    );
    assert!(world.reaches("10.1.0.5"));
}

#[test]
fn a_pod_that_flannel_made_is_deleted_properly() {
    let world = World::new();
    let conf = world.conf(json!({}));
    let pod = world.pod("old");
    foreign_pod(&world, &pod, "02:00:00:00:00:77", "10.1.0.5/24");
    fs::create_dir(world.file("flannel")).unwrap();
    fs::write(world.file("flannel/old"), "{}").unwrap();
    // The path leads to a pod of ours by now: its interface is not the one that is meant.
    let other = world.pod("other");
    world.add(&other, &["10.1.0.6/24"], &conf);
    world.ipam_calls();
    world.call_at("DEL", "old", other.path.to_str().unwrap(), &conf).ok();
    assert!(other.has_eth0() && world.reaches("10.1.0.6"));

    world.call("DEL", &pod, &conf).ok();
    assert!(!pod.has_eth0() && world.veths().len() == 1);
    assert!(!world.file("flannel/old").exists());
    assert_eq!(world.ipam_calls(), ["DEL old", "DEL old"]);
}

#[test]
fn what_a_killed_add_leaves_the_next_call_puts_right() {
    let world = World::new();
    let conf = world.conf(json!({"ipMasq": true}));
    world.ipam_gives(None, &json!({"ips": [{"address": "10.1.0.5/24"}]}));
    let started = Instant::now();
    let pod = world.pod("first");
    world.call("ADD", &pod, &conf).ok();
    let whole = started.elapsed();
    drop(pod);
    let mut killed = 0;
    for round in 0..200_u32 {
        let container = format!("c{round}");
        let pod = world.pod(&container);
        let netns = pod.path.to_str().unwrap();
        let mut child = world.start(&mut world.command("ADD", &container, netns), &conf);
        // Anywhere from before it reads to after it is done.
        thread::sleep(whole.mul_f64(f64::from(round * 7919 % 200) / 180.0));
        child.kill().unwrap();
        let answer: Answer = child.wait_with_output().unwrap().into();
        killed += u32::from(!answer.success);
        if round % 2 == 0 {
            world.call("DEL", &pod, &conf).ok();
            assert!(!pod.has_eth0(), "round {round}");
        } else {
            // No DEL ever comes; the same pod starts in the next round, in a new sandbox, on the same address.
            drop(pod);
        }
    }
    assert!(killed > 50, "only {killed} calls were killed: adjust the delay");
    let pod = world.pod("last");
    world.call("ADD", &pod, &conf).ok();
    assert!(world.reaches("10.1.0.5"));
}

#[test]
fn a_hundred_at_once() {
    let world = World::new();
    let conf = world.conf(json!({"ipMasq": true}));
    let pods: Vec<Pod> = (0..100).map(|i| world.pod(&format!("c{i}"))).collect();
    for (i, pod) in pods.iter().enumerate() {
        world.ipam_gives_addresses(
            &pod.container,
            &[&format!("10.1.0.{}/24", i + 2), &format!("fd00:1::{i:x}2/64")],
        );
    }
    let together = |verb: &str| {
        let mut children = Vec::new();
        for pod in &pods {
            let mut command = world.command(verb, &pod.container, pod.path.to_str().unwrap());
            children.push(world.start(&mut command, &conf));
        }
        for child in children {
            Answer::from(child.wait_with_output().unwrap()).ok();
        }
    };
    together("ADD");
    assert_eq!(world.veths().len(), 100);
    assert_eq!(
        world.sh("nft -a list ruleset | grep -c 'masquerade fully-random comment'"),
        "2",
        "one set of rules"
    );
    // A hundred announcements, each flooded to a hundred ports, can fill the kernel's backlog (net.core.netdev_max_backlog) on
    // a busy machine: what is dropped then, be it the question for the neighbour, is asked again after a second.
    let soon = |pod: &Pod, address: &str| (0..3).any(|_| pod.reaches(address));
    assert!(soon(&pods[0], "10.1.0.101") && soon(&pods[99], "fd00:1::02"));
    together("DEL");
    assert!(world.veths().is_empty());
}

#[test]
fn a_hardware_address_that_was_asked_for() {
    let world = World::new();
    let conf = |mac: &str| world.conf(json!({"runtimeConfig": {"mac": mac}}));
    let (a, b) = (world.pod("a"), world.pod("b"));
    let result = world.add(&a, &["10.1.0.5/24"], &conf("02:aa:00:00:00:01"));
    assert_eq!(result["interfaces"][2]["mac"], "02:aa:00:00:00:01");
    assert!(world.reaches("10.1.0.5"));
    // Another pod wants the same: the first must not suffer.
    world.ipam_gives_addresses("b", &["10.1.0.6/24"]);
    let (_, msg) = world.call("ADD", &b, &conf("02:aa:00:00:00:01")).error();
    assert!(msg.contains("02:aa:00:00:00:01") && msg.contains("in use"), "{msg}");
    assert!(world.reaches("10.1.0.5") && !b.has_eth0());
}

#[test]
fn options_of_the_bridge() {
    let world = World::new();
    let conf =
        world.conf(json!({"bridge": "br7", "isGateway": false, "promiscMode": true, "portIsolation": true}));
    let pod = world.pod("a");
    let result = world.add(&pod, &["10.1.0.5/24"], &conf);
    assert_eq!(result.get("routes"), None);
    assert_eq!(world.sh("ip -4 addr show br7"), "");
    assert!(world.sh("ip link show br7").contains("PROMISC"));
    let port = world.sh(&format!("ip -d link show {}", world.veths()[0]));
    assert!(port.contains("hairpin off") && port.contains("isolated on"), "{port}");
    assert_eq!(pod.sh("ip route show default"), "");
}

#[test]
fn two_interfaces_of_one_pod_and_names_of_full_length() {
    let world = World::new();
    let container = "c".repeat(64);
    let pod = world.pod(&container);
    let mut long = world.conf(json!({"bridge": "br-of-15-bytes0"}));
    long["name"] = json!("n".repeat(200));
    world.add(&pod, &["10.1.0.5/24", "fd00:1::5/64"], &world.conf(json!({})));
    world.ipam_gives_addresses(&container, &["10.2.0.5/24", "fd00:2::5/64"]);
    let second = |verb: &str| {
        let mut command = world.command(verb, &container, pod.path.to_str().unwrap());
        let child = world.start(command.env("CNI_IFNAME", "a-long-name-014"), &long);
        Answer::from(child.wait_with_output().unwrap())
    };
    second("ADD").ok();
    assert!(world.reaches("10.1.0.5") && world.reaches("10.2.0.5") && world.reaches("fd00:2::5"));
    // The first interface keeps what goes elsewhere.
    for elsewhere in ["192.0.2.1", "2001:db8::1"] {
        let route = pod.sh(&format!("ip route get {elsewhere}"));
        assert!(route.contains("dev eth0"), "{route}");
    }
    assert!(!pod.sh("ip -6 route").contains("nexthop"));
    assert_eq!(
        world.sh("ip link | grep -c 'alias edgeflannel'"),
        "1",
        "too long for an alias, not for a pod"
    );
    second("DEL").ok();
    assert!(world.reaches("10.1.0.5") && world.veths().len() == 1);
}
