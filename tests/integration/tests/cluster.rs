//! A real cluster with our plugins on its nodes: pods keep their addresses when they are deleted, when daemons restart, when a node
//! loses its power, and when it comes back with the cloud away.
#![allow(clippy::unwrap_used, reason = "a test may fail loudly, in its helpers too")]

use integration::apps::{self, WEB};
use integration::cluster::{Cluster, Pod};
use integration::containerd;
use integration::edgeflanneld::{self, in_kernel};
use integration::exec::wait_for;
use integration::kubelet::http_get;
use integration::node::Node;
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
    // From 0.4.0 on a runtime reads libcni's record of a pod before each DEL.
    cluster.nodes().values().for_each(|node| node.set_cni_version("1.0.0").unwrap());
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

    // The power goes, and comes again. Of libcni's records nothing but their names has reached the disk.
    let on_node1: Vec<&Pod> = now.iter().filter(|pod| pod.node == "node1").collect();
    assert_eq!(on_node1.len(), 2);
    cluster.node("node1").unwrap().power_off().unwrap();
    let results = cluster.get_node("node1").unwrap().host.spec().disk.join("var/lib/cni/results");
    let records: Vec<_> = fs::read_dir(results).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(records.len() >= 2, "{records:?}");
    records.iter().for_each(|record| fs::write(record, "").unwrap());
    cluster.node("node1").unwrap().power_on().unwrap();
    assert_restarted_in_place(&cluster, &on_node1);
}

/// Two pods on two nodes talk, both ways, and what they say goes through flannel.1.
fn assert_talk(cluster: &Cluster, one: &Place<'_>, other: &Place<'_>) {
    let received = |place: &Place<'_>| -> u64 {
        let host = &cluster.get_node(place.node).unwrap().host;
        host.sh("cat /sys/class/net/flannel.1/statistics/rx_packets").unwrap().trim().parse().unwrap()
    };
    for (from, to) in [(one, other), (other, one)] {
        let node = cluster.get_node(from.node).unwrap();
        let way = node.host.sh(&format!("ip route get {}", to.address)).unwrap();
        assert!(way.contains("dev flannel.1"), "{way}");
        let before = received(to);
        let get = || containerd::fetch(node, from.container, to.address).map(Some);
        let said = wait_for(&format!("{from:?} to reach {to:?}"), Duration::from_secs(30), get).unwrap();
        assert_eq!(said, to.name, "somebody else answers at {to:?}");
        assert!(received(to) >= before + 4, "a whole conversation, seen on the other side");
    }
}

/// Where a pod is.
#[derive(Debug)]
struct Place<'a> {
    node: &'a str,
    name: &'a str,
    address: &'a str,
    container: &'a str,
}

/// The main case: a site has lost its uplink, then two of its nodes their power, in the middle of their writes. Static pods are
/// back and talk to the third node's pods before the cloud is; everything else after it, on the old addresses. One of the two
/// runs nothing but a pod in the host's network, so that no CNI plugin is ever called there.
#[test]
fn nodes_that_lose_power_while_the_cloud_is_away_come_back_as_they_were() {
    let site = ("plant".to_owned(), ["node1", "node2", "node3"].map(str::to_owned).to_vec());
    let options = Options { nodes: 3, sites: vec![site], disk_images: true, ..Options::default() };
    let mut cluster = Cluster::up(options).unwrap();
    cluster.kubectl(&["taint", "node", "node3", "pods=none:NoSchedule"]).unwrap();
    // From 0.4.0 on a runtime reads libcni's record of a pod before each DEL; libcni does not sync it.
    cluster.nodes().values().for_each(|node| node.set_cni_version("1.0.0").unwrap());
    let pods = deploy(&cluster);
    let mut fixed = Vec::new();
    for name in ["node1", "node2"] {
        let mut node = cluster.node(name).unwrap();
        let node = node.get().unwrap();
        node.run_pod("fixed", &json!({"command": ["sh", "-c", WEB]})).unwrap();
        fixed.push(node.pod("fixed").unwrap());
    }
    let mut node3 = cluster.node("node3").unwrap();
    let node3 = node3.get().unwrap();
    node3
        .run_pod_as("inspector", &json!({"command": ["sleep", "infinity"]}), &json!({"hostNetwork": true}))
        .unwrap();
    let inspector = node3.pod("inspector").unwrap();
    let neighbours: Vec<&Pod> = pods.iter().filter(|pod| pod.node == "node2").collect();
    let neighbour = neighbours.iter().find(|pod| pod.name.contains("web")).unwrap();
    let in_kernels = |cluster: &Cluster| -> Vec<Vec<String>> {
        cluster.nodes().values().map(|node| in_kernel(node).unwrap()).collect()
    };
    // A MAC and two peers' three lines each.
    let overlays = wait_for("all peers in all kernels", Duration::from_secs(30), || {
        let overlays = in_kernels(&cluster);
        Ok(overlays.iter().all(|lines| lines.len() == 7).then_some(overlays))
    });
    let overlays = overlays.unwrap();

    cluster.cut("plant").unwrap();
    // A file that nobody synced: it must be lost, or this was no power cut. The pods are a few seconds old.
    let node = &cluster.get_node("node1").unwrap().host;
    node.sh("echo unsynced >/var/lib/unsynced; echo synced >/var/lib/synced; sync /var/lib/synced").unwrap();
    for name in ["node1", "node3"] {
        cluster.node(name).unwrap().reboot_after_power_cut().unwrap();
    }

    // Offline: the cloud is still away.
    let mut node1 = cluster.node("node1").unwrap();
    let node1 = node1.get().unwrap();
    assert_eq!(node1.host.read("/var/lib/synced").unwrap(), "synced\n");
    assert!(
        node1.host.read("/var/lib/unsynced").unwrap_or_default().is_empty(),
        "the disk kept what nobody synced"
    );
    // What an init system has waited for is enough: the overlay stands, whoever else runs.
    assert_eq!(in_kernels(&cluster), overlays);
    let mut node1 = cluster.node("node1").unwrap();
    let again = node1.get().unwrap().pod_when("fixed", |pod| pod.container != fixed[0].container).unwrap();
    assert_eq!(again.address, fixed[0].address);
    let own =
        Place { node: "node1", name: &again.name, address: &again.address, container: &again.container };
    let theirs = Place {
        node: "node2",
        name: name(neighbour),
        address: &neighbour.address,
        container: &neighbour.container,
    };
    assert_talk(&cluster, &own, &theirs);
    let theirs = Place {
        node: "node2",
        name: &fixed[1].name,
        address: &fixed[1].address,
        container: &fixed[1].container,
    };
    assert_talk(&cluster, &own, &theirs);

    // No plugin was called on node3, and it is back all the same.
    let mut node3 = cluster.node("node3").unwrap();
    let node3 = node3.get().unwrap();
    node3.pod_when("inspector", |pod| pod.container != inspector.container).unwrap();
    node3
        .host
        .sh("! ip link show cni0 && ! test -e /var/lib/cni/ipam-sticky && ! test -e /var/lib/cni/results")
        .unwrap();
    let vtep =
        node3.host.sh("ip -4 -o addr show dev flannel.1 | sed 's,.*inet \\([0-9.]*\\).*,\\1,'").unwrap();
    assert_eq!(http_get(node3, &format!("http://{}/", neighbour.address)).unwrap().trim(), name(neighbour));
    let node2 = cluster.get_node("node2").unwrap();
    let container = neighbour.container.trim_start_matches("containerd://");
    containerd::exec(node2, container, &["ping", "-c1", "-W2", vtep.trim()]).unwrap();
    for node in cluster.nodes().values() {
        node.host.sh("! ping -c1 -W1 10.10.0.2").unwrap();
        assert_eq!(edgeflanneld::status(node).unwrap()["drift"], json!([]));
    }

    cluster.heal(None).unwrap();
    let on_node1: Vec<&Pod> = pods.iter().filter(|pod| pod.node == "node1").collect();
    assert_eq!(on_node1.len(), 2);
    assert_restarted_in_place(&cluster, &on_node1);
    // Nothing else moved.
    for old in neighbours {
        assert_eq!(cluster.wait_pod("default", name(old)).unwrap(), *old);
    }
    let reachable = |node: &Node| Ok((edgeflanneld::status(node)?["api"]["reachable"] == true).then_some(()));
    for node in cluster.nodes().values() {
        wait_for("the daemon to reach the API", Duration::from_secs(60), || reachable(node)).unwrap();
    }
    assert_eq!(in_kernels(&cluster), overlays);
}
