//! A real cluster with our plugins on its nodes: pods keep their addresses when they are deleted, when daemons restart, when a node
//! loses its power, and when it comes back with the cloud away.
#![allow(clippy::unwrap_used, reason = "a test may fail loudly, in its helpers too")]

use integration::apps::{self, WEB};
use integration::cluster::{Cluster, Pod};
use integration::exec::wait_for;
use integration::kubelet::http_get;
use integration::topology::Options;
use serde_json::json;
use std::fs;
use std::time::Duration;

/// Deploys the applications and gives their four pods, all ready and answering.
fn deploy(cluster: &Cluster) -> Vec<Pod> {
    cluster.apply(&apps::web_and_agent()).unwrap();
    let pods = wait_for("four ready pods", Duration::from_secs(90), || {
        let pods = cluster.pods()?;
        Ok((pods.len() == 4 && pods.iter().all(|pod| pod.ready)).then_some(pods))
    });
    let pods = pods.unwrap();
    pods.iter().for_each(|pod| assert_answers(cluster, pod));
    pods
}

fn name(pod: &Pod) -> &str {
    pod.name.trim_start_matches("default/")
}

/// The pod itself answers at its address, asked from its node.
fn assert_answers(cluster: &Cluster, pod: &Pod) {
    let node = cluster.get_node(&pod.node).unwrap();
    let url = format!("http://{}/", pod.address);
    let said = wait_for(&format!("an answer of {}", pod.name), Duration::from_secs(30), || {
        http_get(node, &url).map(Some)
    });
    assert_eq!(said.unwrap().trim(), name(pod), "somebody else answers at {}", pod.address);
}

/// Waits until each pod runs in a new container, and asserts that it is the same pod at the same address.
fn assert_restarted_in_place(cluster: &Cluster, before: &[&Pod]) {
    for old in before {
        let new = cluster.wait_pod_when("default", name(old), |pod| pod.container != old.container).unwrap();
        assert_eq!(new.address, old.address, "{}", old.name);
        assert_eq!(new.uid, old.uid, "{}", old.name);
        assert_answers(cluster, &new);
    }
}

#[test]
fn pods_keep_their_addresses_through_daily_life_and_a_power_loss() {
    let mut cluster = Cluster::up(Options::default()).unwrap();
    let pods = deploy(&cluster);

    // What a person does every day.
    assert_eq!(cluster.kubectl(&["logs", "web-0"]).unwrap().trim(), "I am web-0");
    assert_eq!(cluster.kubectl(&["exec", "web-1", "--", "hostname"]).unwrap().trim(), "web-1");
    let dir = tempfile::tempdir().unwrap();
    let (there, back) = (dir.path().join("there"), dir.path().join("back"));
    fs::write(&there, "some bytes").unwrap();
    cluster.kubectl(&["cp", &there.to_string_lossy(), "web-0:/tmp/file"]).unwrap();
    cluster.kubectl(&["cp", "web-0:/tmp/file", &back.to_string_lossy()]).unwrap();
    assert_eq!(fs::read_to_string(&back).unwrap(), "some bytes");

    // Deleted and made again by its StatefulSet: another object of the same name.
    let old = cluster.pod("default", "web-0").unwrap();
    cluster.kubectl(&["delete", "pod", "web-0"]).unwrap();
    let new = cluster.wait_pod_when("default", "web-0", |pod| pod.uid != old.uid).unwrap();
    assert_eq!((&new.node, &new.address), (&old.node, &old.address));
    assert_answers(&cluster, &new);

    // Daemons restart; pods do not notice.
    for daemon in ["kubelet", "containerd"] {
        for node in ["node1", "node2"] {
            let mut node = cluster.node(node).unwrap();
            let node = node.get().unwrap();
            node.daemons.stop(daemon).unwrap();
            node.start_missing_services().unwrap();
        }
    }
    let now = cluster.pods().unwrap();
    for pod in &now {
        let old = pods.iter().chain([&new]).rfind(|old| old.name == pod.name).unwrap();
        assert_eq!((&pod.container, &pod.address), (&old.container, &old.address), "{}", pod.name);
        assert_answers(&cluster, pod);
    }

    // The power goes, and comes again.
    let on_node1: Vec<&Pod> = now.iter().filter(|pod| pod.node == "node1").collect();
    assert_eq!(on_node1.len(), 2);
    cluster.node("node1").unwrap().reboot().unwrap();
    assert_restarted_in_place(&cluster, &on_node1);
}

/// The main case: a site has lost its uplink, then a node its power, in the middle of its writes. The node's static pods are back
/// before the cloud is, and everything else after it, on the old addresses.
#[test]
fn a_node_that_loses_power_while_the_cloud_is_away_comes_back_on_its_old_addresses() {
    let site = ("plant".to_owned(), vec!["node1".to_owned(), "node2".to_owned()]);
    let options = Options { sites: vec![site], disk_images: true, ..Options::default() };
    let mut cluster = Cluster::up(options).unwrap();
    let pods = deploy(&cluster);
    let mut node1 = cluster.node("node1").unwrap();
    let node1 = node1.get().unwrap();
    node1.run_pod("fixed", &json!({"command": ["sh", "-c", WEB]})).unwrap();
    let fixed = node1.pod("fixed").unwrap();
    let neighbour = cluster.get_node("node2").unwrap().address().unwrap().to_owned();

    cluster.cut("plant").unwrap();
    let node = &cluster.get_node("node1").unwrap().host;
    node.sh(&format!("ping -c1 -W2 {neighbour}")).unwrap();
    node.sh("! ping -c1 -W1 10.10.0.2").unwrap();

    // The pods have run for a while: the kernel has written everything back. (In the first seconds of a pod's life libcni's
    // record of it, which libcni does not sync, would come back empty, and containerd never gets past that: docs/rig.md.)
    node.sh("sync -f /var").unwrap();
    // A file that nobody synced: it must be lost, or this was no power cut.
    node.sh("echo unsynced >/var/lib/unsynced; echo synced >/var/lib/synced; sync /var/lib/synced").unwrap();
    cluster.node("node1").unwrap().reboot_after_power_cut().unwrap();

    // Offline: the cloud is still away.
    let mut node1 = cluster.node("node1").unwrap();
    let node1 = node1.get().unwrap();
    assert_eq!(node1.host.read("/var/lib/synced").unwrap(), "synced\n");
    assert!(
        node1.host.read("/var/lib/unsynced").unwrap_or_default().is_empty(),
        "the disk kept what nobody synced"
    );
    let again = node1.pod_when("fixed", |pod| pod.container != fixed.container).unwrap();
    assert_eq!(again.address, fixed.address);
    assert_eq!(http_get(node1, &format!("http://{}/", again.address)).unwrap().trim(), "fixed-node1");
    node1.host.sh("! ping -c1 -W1 10.10.0.2").unwrap();
    node1.host.sh(&format!("ping -c1 -W2 {neighbour}")).unwrap();

    cluster.heal(None).unwrap();
    let on_node1: Vec<&Pod> = pods.iter().filter(|pod| pod.node == "node1").collect();
    assert_eq!(on_node1.len(), 2);
    assert_restarted_in_place(&cluster, &on_node1);
    // The other node was never touched.
    for old in pods.iter().filter(|pod| pod.node == "node2") {
        assert_eq!(cluster.wait_pod("default", name(old)).unwrap(), *old);
    }
}
