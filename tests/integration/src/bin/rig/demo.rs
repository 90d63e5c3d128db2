//! `rig demo`: what edgeflannel is for, in about a minute, on a real cluster that is gone afterwards.

use crate::show::say;
use anyhow::{Context, Result, ensure};
use integration::apps::{WEB, web_and_agent};
use integration::cluster::{Cluster, Pod};
use integration::containerd;
use integration::exec::wait_for;
use integration::kubelet;
use integration::tools;
use integration::topology::Options;
use serde_json::json;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// How long one step may take on a busy machine.
const STEP_LIMIT: Duration = Duration::from_secs(120);

/// Pods by name, with their node and address.
type Addresses = BTreeMap<String, (String, String)>;

/// The whole show; fails if a pod's address changed.
pub fn run() -> Result<()> {
    let options = Options {
        sites: vec![("plant".to_owned(), vec!["node1".to_owned(), "node2".to_owned()])],
        ..Options::default()
    };
    tools::build_for(&options)?;
    let start = Instant::now();
    let step = |text: &str| say(format!("\n[{:4.1} s] {text}", start.elapsed().as_secs_f64()));

    step("A cluster: control plane in the cloud, node1 and node2 on one LAN at a plant, behind one uplink.");
    let mut cluster = Cluster::up(options)?;
    say(cluster.kubectl(&["get", "nodes"])?.trim_end());

    step("A StatefulSet, a DaemonSet, and on node1 a static pod.");
    cluster.apply(&web_and_agent())?;
    cluster.node("node1")?.get()?.run_pod("fixed", &json!({"command": ["sh", "-c", WEB]}))?;
    let before = wait_for("five ready pods", STEP_LIMIT, || {
        let pods = cluster.pods()?;
        Ok((pods.len() == 5 && pods.iter().all(|pod| pod.ready)).then_some(pods))
    })?;
    show(&before);

    step("web-0 is deleted; its StatefulSet makes it again.");
    let old = find(&before, "default/web-0")?;
    cluster.kubectl(&["delete", "pod", "web-0"])?;
    let new = cluster.wait_pod_when("default", "web-0", |pod| pod.uid != old.uid)?;
    say(format!("  another pod object, the same name: {} was {}, is {}", new.name, old.address, new.address));
    ensure!(new.address == old.address, "web-0 has another address");
    let before = cluster.pods()?;
    let static_before = find(&before, "default/fixed-node1")?;
    let neighbour = before.iter().find(|pod| pod.node == "node2" && pod.name.contains("/web-"));
    let neighbour = neighbour.context("no web pod on node2")?;
    let talk_before = Overlay::look(&cluster, &static_before.container, static_before, neighbour)?;

    step(
        "The plant loses its uplink. Then node1 loses its power: every process, link and namespace gone at once.",
    );
    cluster.cut("plant")?;
    cluster.node("node1")?.reboot()?;
    step("node1 is on again: edgeflanneld, containerd, kubelet. The cloud is still away.");
    let node1 = cluster.node("node1")?.get()?.pod_when("fixed", |pod| {
        // The kubelet's first word is from before the power loss.
        !static_before.container.ends_with(&pod.container)
    })?;
    say(format!("  {} runs again at {}, with no API server", node1.name, node1.address));
    let talk_during = Overlay::look(&cluster, &node1.container, static_before, neighbour)?;
    say(format!(
        "  it and {} on node2 reach each other again, through the overlay that node1 kept on its disk",
        neighbour.name
    ));
    let during = running(&cluster)?;

    step("The uplink is back.");
    cluster.heal(None)?;
    for old in before.iter().filter(|pod| pod.node == "node1" && pod.name != "default/fixed-node1") {
        let (namespace, name) = old.name.split_once('/').context("a pod without a namespace")?;
        cluster.wait_pod_when(namespace, name, |pod| pod.container != old.container)?;
    }
    let after = cluster.pods()?;
    let talk_after = Overlay::look(&cluster, &node1.container, static_before, neighbour)?;

    step("Every pod, before, while the cloud was away, and after:\n");
    let same = compare(&before, &during, &after);
    say("");
    let same = compare_overlays(&[talk_before, talk_during, talk_after]) && same;
    step("Done; the cluster is being removed.");
    cluster.down()?;
    ensure!(same, "not everything is as it was");
    Ok(())
}

/// What can be seen of node1's overlay: whether pods on both sides reach each other through it, and its device's MAC.
#[derive(PartialEq, Eq)]
struct Overlay {
    rows: Vec<(String, String)>,
}

impl Overlay {
    /// `own` is a pod on node1, now in `container`; the other pod is on node2.
    fn look(cluster: &Cluster, container: &str, own: &Pod, other: &Pod) -> Result<Self> {
        let mut rows = Vec::new();
        for (from, container, to) in [(own, container, other), (other, other.container.as_str(), own)] {
            let node = cluster.get_node(&from.node)?;
            let what = format!("{} asks {}", bare(&from.name), bare(&to.name));
            let said =
                wait_for(&what, STEP_LIMIT, || containerd::fetch(node, container, &to.address).map(Some))?;
            let way = node.host.sh(&format!("ip route get {}", to.address))?;
            let by = way.split_once(" dev ").and_then(|(_, rest)| rest.split(' ').next()).unwrap_or("?");
            let answer = if said == bare(&to.name) { "answered" } else { "SOMEBODY ELSE" };
            rows.push((what, format!("{answer}, {by}")));
        }
        let mac = cluster.get_node("node1")?.host.read("/sys/class/net/flannel.1/address")?;
        rows.push(("MAC of flannel.1".to_owned(), mac.trim().to_owned()));
        Ok(Self { rows })
    }
}

fn bare(name: &str) -> &str {
    name.trim_start_matches("default/")
}

/// The second table; true if nothing differs.
fn compare_overlays(all: &[Overlay; 3]) -> bool {
    let [before, during, after] = all;
    say(format!("  {:<25} {:<20} {:<20} {:<20}", "node1's overlay", "before", "cloud away", "after"));
    for ((what, before), (during, after)) in before.rows.iter().zip(during.rows.iter().zip(&after.rows)) {
        let (during, after) = (&during.1, &after.1);
        let word = if before == during && before == after { "same" } else { "ANOTHER" };
        say(format!("  {what:<25} {before:<20} {during:<20} {after:<20} {word}"));
    }
    before == during && before == after
}

fn find<'a>(pods: &'a [Pod], name: &str) -> Result<&'a Pod> {
    pods.iter().find(|pod| pod.name == name).with_context(|| format!("there is no pod {name}"))
}

fn show(pods: &[Pod]) {
    for pod in pods {
        say(format!("  {:<22} {:<7} {}", pod.name, pod.node, pod.address));
    }
}

/// What the nodes' own kubelets run now: the API server's word is stale while it is away.
fn running(cluster: &Cluster) -> Result<Addresses> {
    let mut all = Addresses::new();
    for (node_name, node) in cluster.nodes() {
        for pod in kubelet::pods(node)? {
            let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
            if pod["status"]["containerStatuses"][0]["state"]["running"].is_object() {
                let name =
                    format!("{}/{}", text(&pod["metadata"]["namespace"]), text(&pod["metadata"]["name"]));
                all.insert(name, (node_name.clone(), text(&pod["status"]["podIP"])));
            }
        }
    }
    Ok(all)
}

/// The table; true if every pod has its old address.
fn compare(before: &[Pod], during: &Addresses, after: &[Pod]) -> bool {
    say(format!("  {:<22} {:<7} {:<14} {:<20} {:<14}", "pod", "node", "before", "cloud away", "after"));
    let mut all_same = before.len() == after.len();
    for old in before {
        let meanwhile = during.get(&old.name).map_or("waits for the cloud", |(_, address)| address);
        let new = after.iter().find(|pod| pod.name == old.name).map_or("gone", |pod| &pod.address);
        let same = new == old.address;
        all_same &= same;
        let word = if same { "same" } else { "ANOTHER" };
        say(format!(
            "  {:<22} {:<7} {:<14} {meanwhile:<20} {new:<14} {word}",
            old.name, old.node, old.address
        ));
    }
    all_same
}
