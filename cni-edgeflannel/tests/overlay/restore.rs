//! After a reboot: the record on the disk, an empty /run, an empty kernel, and nobody to ask.

use crate::world::*;
use cni_edgeflannel::{
    overlay::restore::{Restored, restore},
    record::{Peer, PeerEnd, PerFamily},
};
use std::{
    fs, thread,
    time::{Duration, Instant},
};

/// What a plugin or a daemon does first; on the calling thread's machine.
fn come_back(node: &Node) -> Result<Restored, String> {
    let (state, run) = (node.state_dir(), node.run_dir());
    node.machine.run(move || restore(&state, &run, || true).map_err(|e| e.to_string()))
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
            thread::spawn(move || restore(&state, &run, || true))
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

/// A route that the kernel refuses (somebody leads the whole of IPv6 elsewhere) is reported; it does not make every
/// pod restore the overlay again.
#[test]
fn what_the_kernel_refuses_does_not_hold_up_the_rest() {
    let Some(cluster) = Cluster::new(2) else { return };
    let node = &cluster.nodes[0];
    save(&node.record, &node.state_dir());
    node.machine.sh("ip -6 route add fd00:10:244::/56 via fd00:77::fe");
    let Ok(Restored::Done(outcome)) = come_back(node) else { panic!() };
    assert_eq!(outcome.failures.len(), 1);
    assert!(outcome.failures[0].error.to_string().starts_with("put route fd00:10:244:2::/64"));
    assert!(matches!(come_back(node), Ok(Restored::Up)));
    node.add_pod();
    cluster.nodes[1].settle();
    cluster.nodes[1].add_pod();
    node.machine.sh("ping -c1 -W2 -I 10.244.1.5 10.244.2.5");
    node.machine.sh("ip -6 route del fd00:10:244::/56");
    node.settle();
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

/// How long 1,000 and 5,000 peers take, and what the kernel itself takes of it: iproute2's batches of the same
/// routes, neighbours and forwarding entries, on the same machine in the same run.
///
/// The kernel keeps the next hops of one device in one hash bucket (`fib_info_hash_bucket` hashes the device, not the
/// gateway) and searches it for every new one, so that the cost of flannel's routes grows with the square.
#[test]
fn many_peers() {
    for count in [1000, 5000] {
        let Some(cluster) = Cluster::new(1) else { return };
        let mut node = cluster.nodes.into_iter().next().unwrap();
        node.record.node.networks = PerFamily { v4: Some("10.0.0.0/8".parse().unwrap()), v6: None };
        node.record.node.subnets.v6 = None;
        node.record.peers = (0..count).map(numbered_peer).map(|peer| (peer.name.clone(), peer)).collect();
        save(&node.record, &node.state_dir());

        let (state, run) = (node.state_dir(), node.run_dir());
        let (wall, cpu) = node.machine.run(move || {
            measured(|| {
                let restored = restore(&state, &run, || true).unwrap();
                assert!(matches!(restored, Restored::Done(outcome) if outcome.is_settled()));
            })
        });
        let lines = |command: &str| node.machine.sh(&format!("{command} | wc -l"));
        for command in [
            "ip route show dev flannel.1",
            "bridge fdb show dev flannel.1",
            "ip neigh show dev flannel.1 nud permanent",
        ] {
            assert_eq!(lines(command), count.to_string(), "{command}");
        }
        let started = Instant::now();
        assert!(node.plan().is_empty());
        let compared = started.elapsed();
        let floor = floor(&node, count);
        println!(
            "{count} peers: restored from disk in {wall:?} ({cpu:?} CPU; iproute2 {floor:?} CPU), compared in {compared:?}"
        );
    }
}

fn numbered_peer(n: u16) -> Peer {
    let [a, b] = n.to_be_bytes();
    let end = PeerEnd {
        subnet: format!("10.{a}.{b}.0/24").parse().unwrap(),
        public_ip: [172, 16, a, b].into(),
        vtep_mac: cni_edgeflannel::mac::Mac([2, 1, 0, 0, a, b]),
        since: 1,
    };
    Peer { name: format!("node-{n}"), ends: PerFamily { v4: Some(end), v6: None } }
}

/// Wall time, and the time that the calling thread was on a processor.
fn measured(act: impl FnOnce()) -> (Duration, Duration) {
    let on_cpu = || {
        let text = fs::read_to_string("/proc/thread-self/schedstat").unwrap();
        Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
    };
    let (started, before) = (Instant::now(), on_cpu());
    act();
    (started.elapsed(), on_cpu() - before)
}

/// The CPU time of iproute2 for the same entries.
fn floor(node: &Node, count: u16) -> Duration {
    node.machine.sh("ip route flush dev flannel.1; ip neigh flush dev flannel.1 nud permanent");
    let (mut ip, mut bridge) = (String::new(), String::new());
    for peer in (0..count).map(numbered_peer) {
        let PeerEnd { subnet, public_ip, vtep_mac, .. } = peer.ends.v4.unwrap();
        let base = subnet.network();
        ip += &format!("neigh replace {base} lladdr {vtep_mac} dev flannel.1 nud permanent\n");
        ip += &format!("route replace {subnet} via {base} dev flannel.1 onlink\n");
        bridge += &format!("fdb replace {vtep_mac} dev flannel.1 dst {public_ip} self permanent\n");
    }
    let dir = node.disk.path();
    fs::write(dir.join("ip"), ip).unwrap();
    fs::write(dir.join("bridge"), bridge).unwrap();
    let dir = dir.display();
    let times = node.machine.sh(&format!(
        "bash -c 'TIMEFORMAT=\"%U %S\"; time ip -batch {dir}/ip; time bridge -batch {dir}/bridge'"
    ));
    Duration::from_secs_f64(times.split_whitespace().map(|seconds| seconds.parse::<f64>().unwrap()).sum())
}
