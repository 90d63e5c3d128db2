//! The first pod after a reboot brings the node's network back: the real plugin, no daemon, no API server.

use crate::world::*;
use serde_json::{Value, json};
use std::{
    fs,
    io::Write,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Stdio},
    time::Instant,
};

/// Gives every pod the address that lies ready.
const IPAM: &str = r#"#!/bin/sh
cat >/dev/null
if [ "$CNI_COMMAND" = ADD ]; then cat "$(dirname "$0")/result"; fi
"#;

struct Answer {
    success: bool,
    stdout: String,
}

impl Node {
    fn conf(&self, more: &Value) -> Value {
        let mut conf = json!({
            "cniVersion": "1.1.0", "name": "cbr0", "type": "edgeflannel", "isDefaultGateway": true,
            "stateDir": self.state_dir(), "subnetFile": self.record.node.subnet_file,
            "ipam": {"type": "ipam-sticky"}, "logFile": self.disk.path().join("log"), "logLevel": "info",
        });
        for (key, value) in more.as_object().unwrap() {
            conf[key] = value.clone();
        }
        conf
    }

    fn ready_for_plugin(&self) {
        // /run is empty after a boot, and this machine's own.
        self.machine.run(private_run);
        let path = self.disk.path().join("ipam-sticky");
        fs::write(&path, IPAM).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        let n = self.n;
        let result = json!({"cniVersion": "1.1.0", "ips": [
            {"address": format!("10.244.{n}.5/24"), "gateway": format!("10.244.{n}.1")},
            {"address": format!("fd00:10:244:{n:x}::5/64"), "gateway": format!("fd00:10:244:{n:x}::1")},
        ]});
        fs::write(self.disk.path().join("result"), result.to_string()).unwrap();
    }

    fn call(&self, verb: &str, pod: Option<&Machine>, more: &Value) -> Answer {
        let conf = self.conf(more).to_string();
        let path = self.disk.path().to_owned();
        let netns = pod.map(Machine::netns).unwrap_or_default();
        let verb = verb.to_owned();
        self.machine.run(move || {
            let mut plugin = Command::new(env!("CARGO_BIN_EXE_edgeflannel"))
                .env("CNI_COMMAND", verb)
                .env("CNI_CONTAINERID", "pod")
                .env("CNI_IFNAME", "eth0")
                .env("CNI_NETNS", netns)
                .env("CNI_PATH", path)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            plugin.stdin.take().unwrap().write_all(conf.as_bytes()).unwrap();
            let output = plugin.wait_with_output().unwrap();
            Answer { success: output.status.success(), stdout: String::from_utf8(output.stdout).unwrap() }
        })
    }

    fn log(&self) -> String {
        fs::read_to_string(self.disk.path().join("log")).unwrap_or_default()
    }
}

#[test]
fn the_first_pod_brings_the_network_back() {
    let Some(cluster) = Cluster::new(2) else { return };
    let mut pods = Vec::new();
    for node in &cluster.nodes {
        save(&node.record, &node.state_dir());
        node.ready_for_plugin();
        let Some(pod) = Machine::new("pod") else { return };
        let started = Instant::now();
        let answer = node.call("ADD", Some(&pod), &json!({}));
        assert!(answer.success, "{} {}", answer.stdout, node.log());
        println!("first ADD after a boot, overlay and all: {:?}", started.elapsed());
        assert!(node.plan().is_empty());
        pods.push(pod);
    }
    assert!(cluster.nodes[0].machine.sh("ip -d link show flannel.1").contains("02:00:00:00:20:01"));
    pods[0].sh("ping -c1 -W2 -M do -s 1402 10.244.2.5");
    pods[1].sh("ping -c1 -W2 fd00:10:244:1::5");
    // Pods' MTU is what fits through both devices.
    assert!(pods[0].sh("ip link show eth0").contains("mtu 1430"));

    // The next pod finds it up, and looks no further.
    let node = &cluster.nodes[0];
    node.machine.sh("ip route del 10.244.2.0/24");
    let another = Machine::new("pod").unwrap();
    assert!(node.call("DEL", Some(&pods[0]), &json!({})).success);
    assert!(node.call("ADD", Some(&another), &json!({})).success);
    assert!(!node.plan().is_empty());
    // But not without subnet.env, nor without the device.
    for broken in
        [format!("rm {}", node.record.node.subnet_file.display()), "ip link del flannel.1".to_owned()]
    {
        node.machine.sh(&broken);
        assert!(node.call("DEL", Some(&another), &json!({})).success);
        assert!(node.call("ADD", Some(&another), &json!({})).success, "{broken}: {}", node.log());
        assert!(node.plan().is_empty(), "{broken}");
    }
}

/// A runtime of CNI 1.1 asks STATUS first, and sends no ADD while that fails.
#[test]
fn a_runtime_that_asks_first_is_told_that_all_is_well() {
    let Some(cluster) = Cluster::new(2) else { return };
    let node = &cluster.nodes[0];
    node.ready_for_plugin();
    let answer = node.call("STATUS", None, &json!({}));
    assert!(!answer.success && answer.stdout.contains("\"code\":50"), "{}", answer.stdout);
    save(&node.record, &node.state_dir());
    let answer = node.call("STATUS", None, &json!({}));
    assert!(answer.success, "{}", answer.stdout);
    assert!(node.plan().is_empty());
}

#[test]
fn a_node_that_knows_no_subnet_says_so_and_leaves_no_trace() {
    let Some(cluster) = Cluster::new(1) else { return };
    let node = &cluster.nodes[0];
    node.ready_for_plugin();
    let Some(pod) = Machine::new("pod") else { return };
    let answer = node.call("ADD", Some(&pod), &json!({}));
    assert!(
        answer.stdout.contains("\"code\":11") && answer.stdout.contains("subnet is not known yet"),
        "{}",
        answer.stdout
    );
    assert_eq!(node.machine.sh("ip -o link show type bridge; ip -o link show type vxlan; ls /run"), "");
    // With ranges of its own it needs no overlay.
    let ranges =
        json!({"ipam": {"type": "ipam-sticky", "ranges": [[{"subnet": "10.244.1.0/24"}]]}, "subnetFile": ""});
    let answer = node.call("ADD", Some(&pod), &ranges);
    assert!(answer.success, "{}", answer.stdout);
    assert_eq!(node.machine.sh("ip -o link show type vxlan; ls /run"), "");
}

#[test]
fn a_record_that_cannot_be_used_does_not_keep_pods_from_starting() {
    let Some(cluster) = Cluster::new(2) else { return };
    let node = &cluster.nodes[0];
    node.ready_for_plugin();
    let Some(pod) = Machine::new("pod") else { return };
    let text = "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";
    cni_edgeflannel::subnet_env::write(&node.record.node.subnet_file, text).unwrap();
    // Of another host: a cloned disk.
    save(&cluster.nodes[1].record, &node.state_dir());
    assert!(node.call("ADD", Some(&pod), &json!({})).success);
    assert!(node.log().contains("was written on node2"), "{}", node.log());
    assert!(node.call("DEL", Some(&pod), &json!({})).success);
    // Of a later version.
    newer(&node.state_dir());
    let bytes = fs::read(node.state_dir().join("node.redb")).unwrap();
    assert!(node.call("ADD", Some(&pod), &json!({})).success);
    assert!(node.log().contains("has schema 7"), "{}", node.log());
    assert_eq!(fs::read(node.state_dir().join("node.redb")).unwrap(), bytes);
    assert!(node.call("DEL", Some(&pod), &json!({})).success);
    // Damaged.
    fs::write(node.state_dir().join("node.redb"), [0; 4096]).unwrap();
    assert!(node.call("ADD", Some(&pod), &json!({})).success);
    assert!(node.state_dir().join("node.redb.damaged-1").exists() && node.log().contains("is damaged"));
    assert_eq!(node.machine.sh("ip -o link show type vxlan"), "", "none of them was used");
}

/// A node that was set back to an older version: plugin, daemon and the person's commands refuse the record, each with the same
/// sentence, and neither it nor the overlay that stands is touched.
#[test]
fn a_record_of_a_later_version_is_left_alone_by_everybody() {
    let Some(cluster) = Cluster::new(2) else { return };
    let node = &cluster.nodes[0];
    node.ready_for_plugin();
    save(&node.record, &node.state_dir());
    let Some(pod) = Machine::new("pod") else { return };
    assert!(node.call("ADD", Some(&pod), &json!({})).success);
    newer(&node.state_dir());
    let seen = "ip -d -o link show type vxlan; ip route; ip neigh show nud permanent; bridge fdb show dev flannel.1; \
        nft list chain inet edgeflannel overlay-postrouting";
    let (before, file) = (node.machine.sh(seen), node.state_dir().join("node.redb"));
    let bytes = fs::read(&file).unwrap();
    let untouched = |after: &str| {
        assert_eq!(fs::read(&file).unwrap(), bytes, "{after}");
        assert_eq!(node.machine.sh(seen), before, "{after}");
    };
    let daemon = |word: &str| {
        let flags = format!("--state-dir={} --node-name=node1", node.state_dir().display());
        let api = "--kube-api-url=http://192.168.77.254:8080 --healthz-port=0";
        node.machine
            .try_sh(&format!("timeout 10 {} {word} {flags} {api}", env!("CARGO_BIN_EXE_edgeflanneld")))
    };
    for word in ["", "restore", "status"] {
        let (success, said) = daemon(word);
        let place = format!("the node record {} has schema 7", file.display());
        assert!(
            !success && said.contains(&place) && said.contains("install the version"),
            "{word:?}: {said}"
        );
        untouched(word);
    }
    assert!(node.call("DEL", Some(&pod), &json!({})).success);
    let another = Machine::new("pod").unwrap();
    assert!(node.call("ADD", Some(&another), &json!({})).success, "{}", node.log());
    assert!(another.sh("ip -o -4 addr show eth0").contains("10.244.1.5/24"));
    // An overlay that is gone is not restored from what cannot be read; the pod starts all the same.
    node.machine.sh("ip link del flannel.1");
    assert!(node.call("DEL", Some(&another), &json!({})).success);
    assert!(node.call("ADD", Some(&Machine::new("pod").unwrap()), &json!({})).success);
    assert!(node.log().contains("has schema 7"), "{}", node.log());
    assert_eq!(fs::read(&file).unwrap(), bytes);
}

fn newer(dir: &Path) {
    let database = redb::Database::open(dir.join("node.redb")).unwrap();
    let write = database.begin_write().unwrap();
    let meta: redb::TableDefinition<&str, u32> = redb::TableDefinition::new("meta");
    write.open_table(meta).unwrap().insert("schema", 7).unwrap();
    write.commit().unwrap();
}
