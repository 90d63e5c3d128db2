//! kubectl against nodes that nobody can dial: a real kube-apiserver whose EgressSelectorConfiguration is the shipped one, `edge-tunnel server`
//! beside it, an agent on each node behind a NAT, and the kubelets' own TLS from end to end.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stderr,
    reason = "a test may fail loudly, in its helpers too, and says how long a copy took"
)]

mod kubectl;
mod neighbours;
mod replicas;

use integration::cluster::Cluster;
use integration::exec::{COMMAND_LIMIT, run, wait_for};
use integration::images::BUSYBOX;
use integration::topology::{Options, plan};
use integration::tunnel::{DAEMON, Egress};
use kubectl::{attach, copies, follows_a_log, forwards_a_port, refused, types};
use serde_json::{Value, json};
use std::path::Path;
use std::time::Duration;

/// A pod on this node, by the kubelet alone: no scheduler is asked.
fn pod(name: &str, node: &str, command: &str, more: &Value) -> Value {
    let mut container = json!({"name": "main", "image": BUSYBOX, "imagePullPolicy": "Never", "command": ["sh", "-c", command]});
    container.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    json!({"apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", "labels": {"app": name}},
        "spec": {"nodeName": node, "restartPolicy": "Never", "terminationGracePeriodSeconds": 1, "containers": [container]}})
}

/// Waits for a cluster's tunnel: the agents of these nodes answer, and the API server gets through.
fn up(options: Options) -> Cluster {
    let nodes = options.nodes;
    let cluster = Cluster::up(options).unwrap();
    for node in (1..=nodes).map(|i| format!("node{i}")) {
        serves(&cluster, &node);
    }
    cluster
}

/// A pod on this node, called like it, runs and is reached.
fn serves(cluster: &Cluster, node: &str) {
    cluster.apply(&pod(node, node, integration::apps::WEB, &json!({}))).unwrap();
    cluster.wait_pod("default", node).unwrap();
    answers(cluster, node);
}

/// `kubectl exec` into the pod of that name gets the right machine.
fn answers(cluster: &Cluster, name: &str) {
    let said = wait_for(&format!("exec in {name}"), Duration::from_secs(60), || {
        cluster.kubectl(&["exec", name, "--", "hostname"]).map(Some)
    });
    assert_eq!(said.unwrap().trim(), name);
    assert_eq!(cluster.kubectl(&["logs", name]).unwrap().trim(), format!("I am {name}"));
}

/// The cloud has no way to this node's kubelet, neither at its own address nor at its gateway's.
fn assert_out_of_reach(cluster: &Cluster, options: &Options, node: &str) {
    let sites = plan(options).unwrap();
    let site = sites.iter().find(|site| site.nodes.iter().any(|name| name == node)).unwrap();
    for address in [site.address(node).unwrap(), site.uplink().1] {
        let dial = format!("socat -u /dev/null TCP:{address}:10250,connect-timeout=2");
        let error = cluster.network().cloud.sh(&dial).unwrap_err();
        assert!(error.to_string().contains("connect"), "{error}");
    }
}

/// All that a person does with a pod on an edge node, and a copy that is broken in the middle.
fn daily_life(cluster: &mut Cluster, node: &str) {
    follows_a_log(cluster, node);
    types(cluster, node);
    attach(cluster, node);
    forwards_a_port(cluster, node);
    // The node proxy and pod proxy subresources.
    let configz = cluster.kubectl(&["get", "--raw", &format!("/api/v1/nodes/{node}/proxy/configz")]).unwrap();
    assert!(configz.contains("kubeletconfig"), "{configz}");
    let page = format!("/api/v1/namespaces/default/pods/{node}:80/proxy/");
    assert_eq!(cluster.kubectl(&["get", "--raw", &page]).unwrap().trim(), node);
    // The agent lets in port 80 of its pods and no other.
    let closed = format!("/api/v1/namespaces/default/pods/{node}:81/proxy/");
    refused(cluster, &["get", "--raw", &closed], "403 denied-by-agent");
    copies(cluster, node);
}

#[test]
fn two_nodes_with_one_address_by_the_socket_and_a_cloud_beside_them() {
    let nat = vec!["node1".to_owned(), "node2".to_owned()];
    let options =
        Options { nodes: 3, nat, same_address: true, tunnel: Some(Egress::Socket), ..Options::default() };
    let mut cluster = up(options.clone());
    let address = |name: &str| cluster.get_node(name).unwrap().address().unwrap().to_owned();
    assert_eq!(address("node1"), address("node2"));
    for node in ["node1", "node2"] {
        assert_out_of_reach(&cluster, &options, node);
    }
    daily_life(&mut cluster, "node1");
    neighbours::a_cloud_node_is_dialled(&cluster, "node3");
    neighbours::a_webhook_in_a_cloud_pod_answers(&cluster, "node3");
    neighbours::an_aggregated_api_answers(&mut cluster, "node3");

    // What the person is told when a node has no agent, and that its neighbour with the same address is not taken for it.
    cluster.node("node2").unwrap().get().unwrap().daemons.kill(DAEMON).unwrap();
    refused(&cluster, &["logs", "node2"], "503 no-session: no agent of node node2 is connected");
    neighbours::audited(&cluster, "node2", "node2:10250", |line| line.contains("no-session")).unwrap();
    answers(&cluster, "node1");
    // A power loss: the agent dials again.
    cluster.node("node2").unwrap().reboot().unwrap();
    wait_for("the log of a pod on node2", Duration::from_secs(60), || {
        cluster.kubectl(&["logs", "node2"]).map(Some)
    })
    .unwrap();
}

#[test]
fn by_mtls_and_what_is_shipped_is_accepted() {
    let options =
        Options { nodes: 1, nat: vec!["node1".to_owned()], tunnel: Some(Egress::Tcp), ..Options::default() };
    let mut cluster = up(options.clone());
    assert_out_of_reach(&cluster, &options, "node1");
    daily_life(&mut cluster, "node1");
    shipped_manifests_are_accepted(&cluster);
}

/// Strictly: a field that the API does not know is a mistake.
fn shipped_manifests_are_accepted(cluster: &Cluster) {
    let conf = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../conf/tunnel");
    // Objects in a namespace that a dry run has not made are refused.
    cluster
        .apply(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "edge-tunnel"}}))
        .unwrap();
    for (file, objects) in [
        ("server.yaml", 9),
        ("agent.yaml", 4),
        ("server-static-pod.yaml", 1),
        ("scrapers.yaml", 3),
        ("coredns.yaml", 1),
    ] {
        let text = std::fs::read(conf.join(file)).unwrap();
        let mut apply = cluster.control_plane().kubectl_command(&cluster.network().cloud).unwrap();
        apply.args(["apply", "--dry-run=server", "--validate=strict", "-f", "-"]);
        let out = run(&mut apply, &text, COMMAND_LIMIT).unwrap();
        assert!(!out.stderr.contains("Warning"), "{file}: {}", out.stderr);
        assert_eq!(out.ok().unwrap().lines().count(), objects, "{file}");
    }
}
