//! Clusters whose overlay is stock flannel's: as it is, for comparison, and with our plugin where flannel's was.
#![allow(clippy::unwrap_used, reason = "a test may fail loudly, in its helpers too")]

use integration::apps;
use integration::cluster::{Cluster, Pod};
use integration::exec::wait_for;
use integration::node::Cni;
use integration::topology::Options;
use serde_json::json;
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(90);

/// Pods on two nodes reach each other by address and by Service; then one is made again. Gives its address before and after.
fn cluster_works(cni: Cni) -> (String, String) {
    let cluster = Cluster::up(Options { cni, kube_proxy: true, ..Options::default() }).unwrap();
    cluster.apply(&apps::web_and_agent()).unwrap();
    let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "default"},
        "spec": {"clusterIP": "10.96.0.80", "selector": {"statefulset.kubernetes.io/pod-name": "web-1"},
            "ports": [{"port": 80}]}});
    cluster.apply(&service).unwrap();
    let (web0, web1) = (ready(&cluster, "web-0"), ready(&cluster, "web-1"));
    assert_ne!(web0.node, web1.node);
    for (from, to, name) in [
        ("web-0", web1.address.as_str(), "web-1"),
        ("web-1", web0.address.as_str(), "web-0"),
        ("web-0", "10.96.0.80", "web-1"),
    ] {
        let get = ["exec", from, "--", "timeout", "5", "wget", "-qO-", &format!("http://{to}/")];
        let said =
            wait_for(&format!("{from} to reach {to}"), LIMIT, || cluster.kubectl(&get).map(Some)).unwrap();
        assert_eq!(said.trim(), name);
    }
    cluster.kubectl(&["delete", "pod", "web-0"]).unwrap();
    let again = cluster.wait_pod_when("default", "web-0", |pod| pod.uid != web0.uid).unwrap();
    (web0.address, again.address)
}

fn ready(cluster: &Cluster, name: &str) -> Pod {
    cluster.wait_pod("default", name).unwrap()
}

#[test]
fn stock_flannel_connects_pods_and_gives_a_new_pod_a_new_address() {
    let (before, after) = cluster_works(Cni::Flannel);
    assert_ne!(before, after, "if this holds one day, our promise is no longer ours alone");
}

#[test]
fn our_plugin_in_a_flannel_cluster_connects_pods_and_keeps_their_addresses() {
    let (before, after) = cluster_works(Cni::OursOnFlannel);
    assert_eq!(before, after);
}
