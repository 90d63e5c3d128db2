//! A real kubelet (standalone, static pods) over a real containerd and runc, with our plugins in /opt/cni/bin and the stock
//! portmap chained after them: whatever happens to a pod, its name has the same address afterwards.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may fail loudly, in its helpers too")]

use integration::containerd::{self, Container};
use integration::exec::wait_for;
use integration::host::Host;
use integration::kubelet::http_get;
use integration::link;
use integration::node::{Cni, Node, PodStatus};
use serde_json::{Value, json};
use std::fs;
use std::time::Duration;

const POD_CIDR: &str = "10.244.1.0/24";

fn node() -> Node {
    Node::standalone("node1", Cni::Ours, POD_CIDR).unwrap()
}

/// A web server that says its pod's name.
fn web() -> Value {
    json!({"command": ["sh", "-c", "echo $HOSTNAME >/www/index.html; exec httpd -f -p 80 -h /www"]})
}

fn web_on_host_port(port: u16) -> Value {
    let mut web = web();
    web["ports"] = json!([{"containerPort": 80, "hostPort": port}]);
    web
}

/// The pod answers with its own name at its address, asked from the node.
fn assert_answers(node: &Node, pod: &PodStatus) {
    assert_says(&pod.name, || http_get(node, &format!("http://{}/", pod.address)));
}

/// `ask` answers `name` before long: a web server may need a moment to listen.
fn assert_says(name: &str, ask: impl Fn() -> anyhow::Result<String>) {
    let said =
        wait_for(&format!("an answer of {name}"), Duration::from_secs(20), || ask().map(Some)).unwrap();
    assert_eq!(said.trim(), name, "somebody else answered");
}

fn sandbox_and_container(node: &Node, pod: &PodStatus) -> (Container, Container) {
    let running = containerd::running(node, &pod.name).unwrap();
    let one = |is_sandbox| {
        let mut found = running.iter().filter(|c| c.is_sandbox == is_sandbox);
        let one = found.next().expect("one is running").clone();
        assert_eq!(found.next(), None, "only one is running");
        one
    };
    (one(true), one(false))
}

#[test]
fn a_pod_is_reached_from_another_pod_from_the_node_and_by_host_port() {
    let mut node = node();
    let neighbour = Host::new("neighbour").unwrap();
    link::connect((&node.host, "eth0"), (&neighbour, "eth0")).unwrap();
    node.host.sh("ip addr add 192.0.2.1/24 dev eth0").unwrap();
    neighbour.sh("ip addr add 192.0.2.2/24 dev eth0").unwrap();

    node.run_pod("web", &web_on_host_port(8080)).unwrap();
    node.run_pod("client", &json!({"command": ["sleep", "infinity"]})).unwrap();
    let (web, client) = (node.pod("web").unwrap(), node.pod("client").unwrap());
    assert_ne!(web.address, client.address);

    assert_answers(&node, &web);
    let url = format!("http://{}/", web.address);
    assert_says("web-node1", || {
        containerd::exec(&node, &client.container, &["timeout", "5", "wget", "-qO-", &url])
    });
    for host in [&node.host, &neighbour] {
        assert_says("web-node1", || {
            host.run(["timeout", "5", "busybox", "wget", "-qO-", "http://192.0.2.1:8080/"])?.ok()
        });
    }

    // The stock portmap's rules go with the pod.
    node.remove_pod("web").unwrap();
    let rules = node.host.sh("iptables-save -t nat; nft list ruleset").unwrap();
    assert!(!rules.contains("8080"), "hostPort rules left:\n{rules}");
}

#[test]
fn a_killed_container_comes_back_in_its_sandbox() {
    let mut node = node();
    node.run_pod("web", &web()).unwrap();
    let before = node.pod("web").unwrap();
    let (sandbox, container) = sandbox_and_container(&node, &before);

    containerd::kill(&node, &container).unwrap();

    let after = node.pod_when("web", |pod| pod.container != before.container).unwrap();
    assert_eq!(after.address, before.address);
    assert_eq!(sandbox_and_container(&node, &after).0, sandbox);
    assert_answers(&node, &after);
}

#[test]
fn a_killed_sandbox_is_replaced_on_the_same_address() {
    let mut node = node();
    node.run_pod("web", &web_on_host_port(8080)).unwrap();
    let before = node.pod("web").unwrap();
    // A free address right after ours: a plugin that only takes the next one is found out.
    node.run_pod("other", &web()).unwrap();
    let other = node.pod("other").unwrap();
    let (sandbox, _) = sandbox_and_container(&node, &before);

    containerd::kill(&node, &sandbox).unwrap();

    let after = node.pod_when("web", |pod| pod.container != before.container).unwrap();
    assert_ne!(sandbox_and_container(&node, &after).0, sandbox);
    assert_eq!(after.address, before.address);
    assert_answers(&node, &after);
    assert_says("web-node1", || http_get(&node, "http://127.0.0.1:8080/"));
    assert_eq!(node.pod("other").unwrap(), other, "the other pod was left alone");
}

#[test]
fn kubelet_and_containerd_may_restart_under_running_pods() {
    let mut node = node();
    node.run_pod("web", &web()).unwrap();
    let before = node.pod("web").unwrap();
    for (daemon, killed) in
        [("kubelet", false), ("kubelet", true), ("containerd", false), ("containerd", true)]
    {
        if killed {
            node.daemons.kill(daemon).unwrap()
        } else {
            node.daemons.stop(daemon).unwrap()
        }
        let answer = http_get(&node, &format!("http://{}/", before.address));
        assert_eq!(answer.unwrap().trim(), "web-node1", "the pod itself does not notice");
        node.start_missing_services().unwrap();
        assert_eq!(node.pod("web").unwrap(), before, "the same container still ({daemon}, killed: {killed})");
        assert_answers(&node, &before);
    }
    // A restarted pair still makes new pods.
    node.run_pod("later", &web()).unwrap();
    let later = node.pod("later").unwrap();
    assert_answers(&node, &later);
}

#[test]
fn a_removed_pod_finds_its_address_again() {
    let mut node = node();
    node.run_pod("web", &web()).unwrap();
    let before = node.pod("web").unwrap();

    node.remove_pod("web").unwrap();
    assert!(http_get(&node, &format!("http://{}/", before.address)).is_err(), "nobody answers there now");
    node.run_pod("other", &web()).unwrap();
    let other = node.pod("other").unwrap();
    assert_ne!(other.address, before.address, "a kept address is not given to others");

    node.run_pod("web", &web()).unwrap();
    let after = node.pod("web").unwrap();
    assert_eq!(after.address, before.address);
    assert_answers(&node, &after);
    assert_answers(&node, &other);
}

#[test]
fn after_a_power_loss_every_pod_has_its_old_address() {
    let mut node = node();
    let names = ["web", "db", "mqtt", "camera"];
    let mut before = Vec::new();
    for name in names {
        node.run_pod(name, &web()).unwrap();
        before.push(node.pod(name).unwrap());
    }
    for _ in 0..2 {
        node.reboot().unwrap();
        for (name, before) in names.iter().zip(&before) {
            let after = node.pod_when(name, |pod| pod.container != before.container).unwrap();
            assert_eq!(after.address, before.address, "pod {name}");
            assert_answers(&node, &after);
        }
    }
    assert!(node.pod("web").unwrap().restarts >= 2, "to the kubelet it is the same pod");
}

/// containerd's state is lost (a wiped disk partition, a reinstalled runtime): nobody will ever call DEL for the pods of the
/// earlier boot, and other pods need their addresses.
#[test]
fn owners_of_an_earlier_boot_do_not_hold_the_last_addresses() {
    // .1 is the gateway's, .2 to .6 are for pods.
    let mut node = Node::standalone("node1", Cni::Ours, "10.244.1.0/29").unwrap();
    for i in 1..=5 {
        node.run_pod(&format!("old{i}"), &web()).unwrap();
    }
    for i in 1..=5 {
        node.pod(&format!("old{i}")).unwrap();
    }

    // Without a kubelet to see it, the manifests are exchanged.
    node.daemons.kill("kubelet").unwrap();
    node.host.sh("rm /etc/kubernetes/manifests/*").unwrap();
    for i in 1..=5 {
        node.run_pod(&format!("new{i}"), &web()).unwrap();
    }
    node.power_off().unwrap();
    let disk = node.host.spec().disk.clone();
    for lost in ["var/lib/containerd", "var/lib/kubelet"] {
        fs::remove_dir_all(disk.join(lost)).unwrap();
    }
    node.power_on().unwrap();
    node.start_services().unwrap();

    let mut addresses: Vec<String> = (1..=5).map(|i| node.pod(&format!("new{i}")).unwrap().address).collect();
    addresses.sort();
    assert_eq!(addresses, ["10.244.1.2", "10.244.1.3", "10.244.1.4", "10.244.1.5", "10.244.1.6"]);
}
