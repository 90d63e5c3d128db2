//! Nodes at two sites, each behind a NAT, with the same address: nobody can dial them, and Kubernetes' own tunnel still finds the right one.
//! What our tunnel will be measured against.
#![allow(clippy::unwrap_used, reason = "a test may fail loudly, in its helpers too")]

use integration::apps;
use integration::cluster::Cluster;
use integration::exec::wait_for;
use integration::topology::Options;
use std::time::Duration;

#[test]
fn logs_and_exec_reach_the_right_one_of_two_nodes_with_the_same_address() {
    let nat = vec!["node1".to_owned(), "node2".to_owned()];
    let mut cluster =
        Cluster::up(Options { nat, same_address: true, konnectivity: true, ..Options::default() }).unwrap();
    let address = |name: &str| cluster.get_node(name).unwrap().address().unwrap().to_owned();
    assert_eq!(address("node1"), address("node2"));
    cluster.apply(&apps::web_and_agent()).unwrap();
    let pods = ["web-0", "web-1"].map(|name| cluster.wait_pod("default", name).unwrap());
    assert_ne!(pods[0].node, pods[1].node);
    let asks = |cluster: &Cluster, name: &str| {
        let limit = Duration::from_secs(60);
        let said =
            wait_for("exec", limit, || cluster.kubectl(&["exec", name, "--", "hostname"]).map(Some)).unwrap();
        assert_eq!(said.trim(), name);
        assert_eq!(cluster.kubectl(&["logs", name]).unwrap().trim(), format!("I am {name}"));
    };
    asks(&cluster, "web-0");
    asks(&cluster, "web-1");

    // After a power loss the agent dials again.
    cluster.node("node1").unwrap().reboot().unwrap();
    let old = pods.iter().find(|pod| pod.node == "node1").unwrap();
    let name = old.name.trim_start_matches("default/");
    cluster.wait_pod_when("default", name, |pod| pod.container != old.container).unwrap();
    asks(&cluster, name);
}
