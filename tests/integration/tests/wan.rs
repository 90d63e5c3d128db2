//! The networks of a cluster without a cluster: what the uplinks do to packets, measured by ping and iperf3, and what a cut does.
#![allow(clippy::unwrap_used, reason = "a test may fail loudly, in its helpers too")]

use integration::host::{Host, unique_id};
use integration::host_init::HostSpec;
use integration::network::Network;
use integration::topology::{Options, plan};
use integration::wan::Wan;
use std::path::Path;

/// Networks for `options`, and their nodes as plain hosts.
struct World {
    nodes: Vec<Host>,
    network: Network,
    _dir: tempfile::TempDir,
}

impl World {
    fn new(options: &Options) -> Self {
        let sites = plan(options).unwrap();
        let prefix = unique_id("wan");
        let dir = tempfile::Builder::new().prefix(&prefix).tempdir().unwrap();
        let spec = |name: &str| host(dir.path(), &prefix, name);
        let network = Network::up(&sites, options.wan, &dir.path().join("logs"), spec).unwrap();
        let names = sites.iter().flat_map(|site| &site.nodes);
        let nodes = names.map(|name| {
            let node = Host::boot(host(dir.path(), &prefix, name)).unwrap();
            network.attach(&node).unwrap();
            node
        });
        Self { nodes: nodes.collect(), network, _dir: dir }
    }

    fn node(&self, name: &str) -> &Host {
        self.nodes.iter().find(|node| node.name() == name).unwrap()
    }

    fn reaches(&self, from: &str, to: &str) -> bool {
        let from = if from == "cloud" { &self.network.cloud } else { self.node(from) };
        from.run(["ping", "-c2", "-i0.1", "-W1", to]).unwrap().status.success()
    }
}

fn host(dir: &Path, prefix: &str, name: &str) -> HostSpec {
    HostSpec {
        name: name.to_owned(),
        id: format!("{prefix}-{name}"),
        disk: dir.join(name),
        image: None,
        cgroups: false,
        stay: false,
        hosts: Vec::new(),
    }
}

const CLOUD: &str = "10.10.0.2";

fn one_node(wan: &str) -> World {
    World::new(&Options { nodes: 1, wan: wan.parse::<Wan>().unwrap(), ..Options::default() })
}

/// A number out of ping's last lines.
fn field<'a>(text: &'a str, after: &str, until: &str) -> &'a str {
    text.split_once(after).unwrap().1.split_once(until).unwrap().0
}

#[test]
fn a_plain_uplink_is_quick() {
    let world = one_node("");
    let out = world.node("node1").sh(&format!("ping -c20 -i0.01 -q {CLOUD}")).unwrap();
    let median: f64 = field(&out, "rtt min/avg/max/mdev = ", "/").parse().unwrap();
    assert!(median < 5.0, "{out}");
}

#[test]
fn delay_is_what_ping_measures() {
    let world = one_node("delay=30ms");
    let out = world.node("node1").sh(&format!("ping -c20 -i0.05 -q {CLOUD}")).unwrap();
    let least: f64 = field(&out, "rtt min/avg/max/mdev = ", "/").parse().unwrap();
    // Twice the delay; never less, and the best of twenty not much more.
    assert!((60.0..64.0).contains(&least), "{out}");
    assert!(out.contains(" 0% packet loss"), "{out}");
}

#[test]
fn loss_is_what_ping_measures() {
    let world = one_node("loss=10%");
    let out = world.node("node1").sh(&format!("ping -c1000 -i0.002 -W1 -q {CLOUD} || true")).unwrap();
    // Each echo passes twice: 1 - 0.9 * 0.9 = 19 %. Five standard deviations of a thousand throws are 6.2 %.
    let lost: f64 = field(&out, "received, ", "%").parse().unwrap();
    assert!((12.8..25.2).contains(&lost), "{out}");
}

#[test]
fn rate_is_what_iperf3_measures() {
    let world = one_node("rate=20mbit,delay=5ms");
    let log = tempfile::NamedTempFile::new().unwrap();
    let server =
        world.network.cloud.spawn(world.network.cloud.command("iperf3").unwrap().args(["-s"]), log.path());
    server.unwrap().check_alive().unwrap();
    // Both directions, one after the other.
    for reverse in ["", "-R"] {
        let line = format!("iperf3 -J -t3 -O1 --connect-timeout 2000 {reverse} -c {CLOUD}");
        let out = integration::exec::wait_for("iperf3", std::time::Duration::from_secs(30), || {
            world.node("node1").sh(&line).map(Some)
        });
        let json: serde_json::Value = serde_json::from_str(&out.unwrap()).unwrap();
        let rate = json["end"]["sum_received"]["bits_per_second"].as_f64().unwrap() / 1e6;
        // What TCP carries of 20 Mbit/s: 1448 of 1500 bytes.
        assert!((16.0..20.0).contains(&rate), "{reverse} {rate} Mbit/s");
    }
}

#[test]
fn a_cut_site_keeps_its_lan_and_a_cut_node_is_alone() {
    let site = ("A".to_owned(), vec!["node1".to_owned(), "node2".to_owned()]);
    let mut world = World::new(&Options { nodes: 3, sites: vec![site], ..Options::default() });
    let (node1, node2, node3) = ("10.20.1.2", "10.20.1.3", "10.20.2.2");
    let everybody = |world: &World| {
        [("node1", node2), ("node1", node3), ("node1", CLOUD), ("node3", CLOUD), ("cloud", node1)]
            .map(|(from, to)| world.reaches(from, to))
    };
    assert_eq!(everybody(&world), [true; 5]);

    world.network.cut("A").unwrap();
    assert_eq!(everybody(&world), [true, false, false, true, false], "the LAN is whole, the uplink silent");
    world.network.cut("A").unwrap();
    world.network.heal("A").unwrap();
    assert_eq!(everybody(&world), [true; 5]);

    world.network.cut("node1").unwrap();
    assert_eq!(everybody(&world), [false, false, false, true, false]);
    assert!(world.reaches("node2", CLOUD), "its neighbour is not concerned");
    world.network.heal_all().unwrap();
    assert_eq!(everybody(&world), [true; 5]);

    world.network.cut("cloud").unwrap();
    assert_eq!(everybody(&world), [true, true, false, false, false]);
    world.network.heal_all().unwrap();
    assert_eq!(everybody(&world), [true; 5]);
    assert!(world.network.cut("nowhere").is_err());
}

#[test]
fn behind_a_nat_one_reaches_the_cloud_and_is_not_reached() {
    let nat = vec!["node1".to_owned(), "node2".to_owned()];
    let world = World::new(&Options { nodes: 2, nat, same_address: true, ..Options::default() });
    let address = "192.168.50.2";
    for node in ["node1", "node2"] {
        assert!(world.node(node).sh("ip -o -4 addr show eth0").unwrap().contains(address));
        assert!(world.reaches(node, CLOUD));
    }
    assert!(!world.reaches("cloud", address));
}

#[test]
fn a_node_that_was_cut_is_still_cut_after_a_reboot() {
    let mut world = one_node("");
    world.network.cut("node1").unwrap();
    world.nodes[0].reboot().unwrap();
    world.network.attach(&world.nodes[0]).unwrap();
    assert!(!world.reaches("node1", CLOUD));
    world.network.heal("node1").unwrap();
    assert!(world.reaches("node1", CLOUD));
}
