//! A cluster of stock flannel (flanneld, its CNI plugin, bridge, host-local) moves to us node by node, and back again, while its
//! pods run under real kubelets: the procedure of docs/install.md. No pod loses its address, and a connection between two of
//! them outlives it all.
#![allow(clippy::unwrap_used, reason = "a test may fail loudly, in its helpers too")]

use integration::apps;
use integration::cluster::{Cluster, Pod};
use integration::daemons::Daemon;
use integration::edgeflanneld::{self, PROGRAM};
use integration::exec::{wait_for, wait_until};
use integration::node::{Cni, Node};
use integration::topology::Options;
use integration::{containerd, flannel};
use serde_json::Value;
use std::collections::BTreeSet;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(60);
/// Where host-local keeps its reservations of kube-flannel's network.
const RESERVATIONS: &str = "/var/lib/cni/networks/cbr0";
const IPAM: &str = "/opt/cni/bin/ipam-sticky";

/// One TCP connection from a pod to a pod on another node: numbers go there ten times a second and come back.
struct Talk {
    client: Daemon,
    node: String,
    port: u16,
}

impl Talk {
    fn start(cluster: &Cluster, from: &Pod, to: &Pod, port: u16) -> Self {
        let spawn = |pod: &Pod, script: &str| {
            let node = cluster.get_node(&pod.node).unwrap();
            let pid = containerd::pid(node, &pod.container).unwrap();
            let mut command = node.host.command("nsenter").unwrap();
            command.args(["-t", &pid, "-n", "sh", "-c", script]);
            node.host.spawn(&mut command, &node.dir().join("logs/talk.log")).unwrap()
        };
        // Ends with the connection.
        spawn(to, &format!("exec socat TCP-LISTEN:{port},reuseaddr EXEC:cat"));
        let script = format!(
            "i=0; while [ ! -e /run/talk{port}.stop ]; do i=$((i+1)); echo $i; sleep 0.1; done \
             | socat - TCP:{}:{port},retry=50,interval=0.1 \
             | while read n; do echo $n $(cut -d' ' -f1 /proc/uptime); done >/run/talk{port}",
            to.address
        );
        let talk = Self { client: spawn(from, &script), node: from.node.clone(), port };
        wait_until("the first word", LIMIT, || talk.heard(cluster).len() > 5).unwrap();
        talk
    }

    /// The numbers that came back, and when.
    fn heard(&self, cluster: &Cluster) -> Vec<(u64, f64)> {
        let host = &cluster.get_node(&self.node).unwrap().host;
        let text = host.read(&format!("/run/talk{}", self.port)).unwrap_or_default();
        let line = |line: &str| {
            let (number, time) = line.split_once(' ')?;
            Some((number.parse().ok()?, time.parse().ok()?))
        };
        text.lines().filter_map(line).collect()
    }

    /// The longest silence, in seconds, of a connection that must still be the first.
    fn end(self, cluster: &Cluster) -> f64 {
        let before = self.heard(cluster).len();
        wait_until("the connection to be alive still", LIMIT, || self.heard(cluster).len() > before).unwrap();
        let host = &cluster.get_node(&self.node).unwrap().host;
        host.sh(&format!("touch /run/talk{}.stop", self.port)).unwrap();
        wait_until("the end of the talk", LIMIT, || self.client.check_alive().is_err()).unwrap();
        let heard = self.heard(cluster);
        assert!(
            heard.iter().map(|(number, _)| *number).eq(1..=heard.len() as u64),
            "nothing lost, nothing twice"
        );
        heard.windows(2).map(|pair| pair[1].1 - pair[0].1).fold(0.0, f64::max)
    }
}

fn pods(cluster: &Cluster) -> Vec<Pod> {
    let pods = wait_for("all pods to be ready", LIMIT, || {
        let pods = cluster.pods()?;
        Ok((pods.len() >= 4 && pods.iter().all(|pod| pod.ready)).then_some(pods))
    });
    pods.unwrap()
}

fn find<'p>(pods: &'p [Pod], name: &str) -> &'p Pod {
    pods.iter().find(|pod| pod.name == format!("default/{name}")).unwrap()
}

/// The same pods in the same containers at the same addresses, and every one of them reaches every other.
fn assert_unmoved(cluster: &Cluster, before: &[Pod]) {
    assert_eq!(pods(cluster), before);
    for from in before {
        for to in before {
            let node = cluster.get_node(&from.node).unwrap();
            let get = || containerd::fetch(node, &from.container, &to.address).map(Some);
            let said = wait_for(&format!("{} to reach {}", from.name, to.name), LIMIT, get).unwrap();
            assert_eq!(format!("default/{said}"), to.name, "somebody else answers at {}", to.address);
        }
    }
}

/// What must not change for the neighbours: the MACs of the VXLAN device and of the bridge, and what is published.
fn identity(cluster: &Cluster, name: &str) -> (String, Value) {
    let macs = cluster
        .get_node(name)
        .unwrap()
        .host
        .sh("cat /sys/class/net/flannel.1/address /sys/class/net/cni0/address");
    let node = cluster.kubectl_json(&["get", "node", name]).unwrap();
    let annotations = node["metadata"]["annotations"].as_object().unwrap();
    let ours = annotations.iter().filter(|(key, _)| key.starts_with("flannel."));
    (macs.unwrap(), ours.map(|(key, value)| (key.clone(), value.clone())).collect())
}

fn pod_cidr(cluster: &Cluster, name: &str) -> String {
    cluster.kubectl(&["get", "node", name, "-o", "jsonpath={.spec.podCIDR}"]).unwrap()
}

fn run(node: &Node, words: &[&str]) -> String {
    node.host.run(words).unwrap().ok().unwrap()
}

/// docs/install.md, "Moving from flannel".
fn to_ours(cluster: &mut Cluster, name: &str) {
    let cidr = pod_cidr(cluster, name);
    let mut node = cluster.node(name).unwrap();
    let node = node.get().unwrap();
    node.move_to(Cni::Ours, &cidr).unwrap();
    let said = run(node, &[IPAM, "import", "--network", "cbr0", "--host-local", RESERVATIONS]);
    // The state was new: it took them over when it was opened.
    assert!(said.starts_with("0 of 2 containers") && said.contains("2 known already"), "{said}");
    node.daemons.stop("flanneld").unwrap();
    edgeflanneld::start(node).unwrap();
    edgeflanneld::wait_ready(node).unwrap();
}

/// docs/install.md, "Back".
fn to_flannel(cluster: &mut Cluster, name: &str) {
    let cidr = pod_cidr(cluster, name);
    let mut node = cluster.node(name).unwrap();
    let node = node.get().unwrap();
    run(node, &[IPAM, "export", "--network", "cbr0", "--host-local", RESERVATIONS]);
    node.move_to(Cni::Flannel, &cidr).unwrap();
    node.daemons.stop("edgeflanneld").unwrap();
    run(node, &[PROGRAM, "remove"]);
    flannel::start(node).unwrap();
    let up = || node.host.sh("test -e /run/flannel/subnet.env; ip link show flannel.1").is_ok();
    wait_until("flanneld's overlay", LIMIT, up).unwrap();
}

#[test]
fn from_stock_flannel_and_back_with_pods_running() {
    let mut cluster = Cluster::up(Options { cni: Cni::Flannel, ..Options::default() }).unwrap();
    cluster.apply(&apps::web_and_agent()).unwrap();
    cluster.apply_text(edgeflanneld::RBAC).unwrap();
    let before = pods(&cluster);
    assert_unmoved(&cluster, &before);
    let identities = ["node1", "node2"].map(|name| identity(&cluster, name));

    // Node by node; in between, one of each kind.
    let talk = Talk::start(&cluster, find(&before, "web-0"), find(&before, "web-1"), 7001);
    for name in ["node1", "node2"] {
        to_ours(&mut cluster, name);
        assert_unmoved(&cluster, &before);
    }
    let silent = talk.end(&cluster);
    println!("from flannel: longest silence {silent:.1} s");
    assert!(silent < 5.0, "silent for {silent} s");
    assert_eq!(["node1", "node2"].map(|name| identity(&cluster, name)), identities);
    for name in ["node1", "node2"] {
        run(cluster.get_node(name).unwrap(), &[IPAM, "verify", "--network", "cbr0"]);
    }

    // From now on addresses stay with names: of a pod that is made again ...
    let old = find(&before, "web-0");
    cluster.kubectl(&["delete", "pod", "web-0"]).unwrap();
    let web0 = cluster.wait_pod_when("default", "web-0", |pod| pod.uid != old.uid).unwrap();
    assert_eq!((&web0.node, &web0.address), (&old.node, &old.address));
    // ... and of all pods of a node that restarts, those that flannel's plugins had wired included.
    cluster.node("node1").unwrap().reboot().unwrap();
    let restarted = |pod: &Pod| pod.node == "node1";
    for old in before.iter().filter(|pod| restarted(pod)) {
        let name = old.name.trim_start_matches("default/");
        let dead = if name == "web-0" { &web0.container } else { &old.container };
        let new = cluster.wait_pod_when("default", name, |pod| pod.container != *dead).unwrap();
        assert_eq!(new.address, old.address, "{name}");
    }
    let now = pods(&cluster);
    assert_unmoved(&cluster, &now);
    assert_eq!(identity(&cluster, "node1").1, identities[0].1);

    // And back.
    let talk = Talk::start(&cluster, find(&now, "web-0"), find(&now, "web-1"), 7002);
    for name in ["node1", "node2"] {
        to_flannel(&mut cluster, name);
        assert_unmoved(&cluster, &now);
    }
    let silent = talk.end(&cluster);
    println!("back to flannel: longest silence {silent:.1} s");
    assert!(silent < 10.0, "silent for {silent} s");
    for name in ["node1", "node2"] {
        let rules = cluster.get_node(name).unwrap().host.sh("nft list ruleset").unwrap();
        assert!(!rules.contains("table inet edgeflannel"), "{rules}");
    }
    // A pod of ours is deleted by flannel's plugin, and the next one gets an address that nobody has.
    let old = find(&now, "web-0");
    cluster.kubectl(&["delete", "pod", "web-0"]).unwrap();
    let new = cluster.wait_pod_when("default", "web-0", |pod| pod.uid != old.uid).unwrap();
    let all = pods(&cluster);
    let addresses: BTreeSet<&str> = all.iter().map(|pod| pod.address.as_str()).collect();
    assert_eq!(addresses.len(), all.len(), "an address was given away: {all:?}");
    assert_ne!(new.container, old.container);
    assert_unmoved(&cluster, &all);
}
