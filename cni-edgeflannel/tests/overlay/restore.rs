//! After a reboot: the record on the disk, an empty /run, an empty kernel, and nobody to ask.

use crate::world::*;
use cni_edgeflannel::{
    overlay::restore::{Restored, restore},
    record::{Family, Peer, PeerEnd, PerFamily, Record},
};
use std::{fs, thread, time::Instant};

/// What a plugin or a daemon does first; on the calling thread's machine.
fn come_back(node: &Node) -> Result<Restored, String> {
    let (state, run) = (node.state_dir(), node.run_dir());
    node.machine.run(move || runtime().block_on(restore(&state, &run, || true)).map_err(|e| e.to_string()))
}

#[test]
fn a_node_comes_back_with_nobody_to_ask() {
    let Some(cluster) = Cluster::new(3) else { return };
    for node in &cluster.nodes {
        node.add_pod();
        save(&node.record, &node.state_dir());
        assert!(matches!(come_back(node), Ok(Restored::Done(outcome)) if outcome.is_settled()));
    }
    let node = &cluster.nodes[0];
    node.machine.sh("ping -c1 -W2 -I 10.244.1.5 10.244.2.5");
    node.machine.sh("ping -c1 -W2 -I fd00:10:244:1::5 fd00:10:244:3::5");
    let env = fs::read_to_string(&node.record.node.subnet_file).unwrap();
    assert!(env.starts_with("FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\n"), "{env}");
    assert!(node.plan().is_empty());

    // Up is up: the mark is enough.
    node.machine.sh("ip route del 10.244.2.0/24");
    assert!(matches!(come_back(node), Ok(Restored::Up)));
    // Without the device, or with another one of the name, it is not.
    node.machine.sh("ip link del flannel.1");
    assert!(matches!(come_back(node), Ok(Restored::Done(_))));
    assert!(node.plan().is_empty());
    node.machine.sh("ip link del flannel-v6.1; ip link add flannel-v6.1 type bridge");
    assert!(matches!(come_back(node), Ok(Restored::Done(_))));
    // Killed half-way: no mark yet.
    node.machine.sh("ip route flush dev flannel.1");
    fs::remove_file(node.run_dir().join("restored")).unwrap();
    assert!(matches!(come_back(node), Ok(Restored::Done(_))));
    node.machine.sh("ping -c1 -W2 -I 10.244.1.5 10.244.2.5");
}

#[test]
fn a_hundred_at_once_restore_once() {
    let Some(cluster) = Cluster::new(3) else { return };
    let node = &cluster.nodes[0];
    save(&node.record, &node.state_dir());
    let (state, run) = (node.state_dir(), node.run_dir());
    let results = node.machine.run(move || {
        // Threads are born into the namespace of the one that starts them.
        let one = |_| {
            let (state, run) = (state.clone(), run.clone());
            thread::spawn(move || runtime().block_on(restore(&state, &run, || true)))
        };
        let all: Vec<_> = (0..100).map(one).collect();
        all.into_iter().map(|one| one.join().unwrap().unwrap()).collect::<Vec<_>>()
    });
    let done = results.iter().filter(|result| matches!(result, Restored::Done(_))).count();
    let up = results.iter().filter(|result| matches!(result, Restored::Up)).count();
    assert_eq!((done, up), (1, 99));
    assert!(node.plan().is_empty());
}

#[test]
fn a_cloned_disk_claims_nothing() {
    let Some(cluster) = Cluster::new(2) else { return };
    let node = &cluster.nodes[0];
    save(&cluster.nodes[1].record, &node.state_dir());
    assert!(matches!(come_back(node), Ok(Restored::OtherHost(name)) if name == "node2"));
    assert!(!node.machine.try_sh("ip link show flannel.1").0);
    assert!(!node.record.node.subnet_file.exists());
    // A host name that nobody has set yet says nothing.
    node.machine.run(|| nix::unistd::sethostname("localhost").unwrap());
    assert!(matches!(come_back(node), Ok(Restored::Done(_))));
}

#[test]
fn without_a_record_or_with_a_damaged_one() {
    let Some(cluster) = Cluster::new(1) else { return };
    let node = &cluster.nodes[0];
    assert!(matches!(come_back(node), Ok(Restored::NoRecord)));
    assert!(!node.run_dir().exists(), "a node that never had an overlay gets no trace of one");
    node.settle();
    fs::create_dir_all(node.state_dir()).unwrap();
    fs::write(node.state_dir().join("node.redb"), [0; 8192]).unwrap();
    assert!(matches!(come_back(node), Ok(Restored::NoRecord)));
    assert!(node.state_dir().join("node.redb.damaged-1").exists());
    assert!(node.plan().is_empty(), "what is up stays up");
}

#[test]
fn without_an_uplink_local_pods_still_get_what_they_need() {
    let Some(cluster) = Cluster::new(2) else { return };
    let node = &cluster.nodes[0];
    save(&node.record, &node.state_dir());
    node.machine.sh("ip link set eth0 down && ip addr flush dev eth0");
    assert!(matches!(come_back(node), Ok(Restored::Done(outcome)) if outcome.is_settled()));
    assert!(node.record.node.subnet_file.exists());
    assert!(!node.machine.try_sh("ip link show flannel.1").0);
    assert_eq!(node.machine.sh("cat /proc/sys/net/ipv4/ip_forward"), "1");
    // The next pod tries again, and now it is there.
    node.machine.sh("ip addr add 192.168.77.1/24 dev eth0 && ip addr add fd00:77::1/64 dev eth0 nodad && ip link set eth0 up && ip route add default via 192.168.77.254");
    assert!(matches!(come_back(node), Ok(Restored::Done(_))));
    node.machine.sh("ip link show flannel.1 && ip link show flannel-v6.1");
    assert!(matches!(come_back(node), Ok(Restored::Up)));
}

/// A goal: 5,000 peers in 200 ms. The floor is 86 ms of netlink.
#[test]
fn five_thousand_peers() {
    let Some(cluster) = Cluster::new(1) else { return };
    let node = &cluster.nodes[0];
    let mut record = Record { node: node.record.node.clone(), ..Record::default() };
    record.node.networks = PerFamily { v4: Some("10.0.0.0/8".parse().unwrap()), v6: None };
    record.node.subnets.v6 = None;
    for n in 0..5000_u16 {
        let [a, b] = n.to_be_bytes();
        let end = PeerEnd {
            subnet: format!("10.{a}.{b}.0/24").parse().unwrap(),
            public_ip: [172, 16, a, b].into(),
            vtep_mac: cni_edgeflannel::mac::Mac([2, 1, 0, 0, a, b]),
            since: 1,
        };
        let name = format!("node-{n}");
        record.peers.insert(name.clone(), Peer { name, ends: PerFamily { v4: Some(end), v6: None } });
    }
    assert!(record.node.subnets.get(Family::V4).is_some());
    save(&record, &node.state_dir());
    let started = Instant::now();
    assert!(matches!(come_back(node), Ok(Restored::Done(outcome)) if outcome.is_settled()));
    let restored = started.elapsed();
    let mut node = cluster.nodes.into_iter().next().unwrap();
    node.record = record;
    assert_eq!(node.machine.sh("ip route show dev flannel.1 | wc -l; bridge fdb show dev flannel.1 | wc -l; ip neigh show dev flannel.1 nud permanent | wc -l"), "5000\n5000\n5000");
    let started = Instant::now();
    assert!(node.plan().is_empty());
    let compared = started.elapsed();
    node.machine.sh("ip link del flannel.1");
    let started = Instant::now();
    node.reconcile();
    println!(
        "5,000 peers: restored from disk in {restored:?}, compared in {compared:?}, device healed in {:?}",
        started.elapsed()
    );
}
