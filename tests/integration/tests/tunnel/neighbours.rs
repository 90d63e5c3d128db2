//! What is in the cloud and goes through the egress all the same: a cloud node, a webhook, an aggregated API. The server dials these itself.

use crate::{answers, pod};
use integration::cluster::Cluster;
use integration::exec::{COMMAND_LIMIT, run, wait_for};
use integration::pki::{Authority, Subject, Usage};
use integration::tools;
use integration::tunnel::DAEMON;
use serde_json::json;
use std::fs;
use std::process::Command;
use std::time::Duration;

/// Waits for the audit line of a stream to this target that had an answer, dialled for this node or for none.
fn assert_audited(cluster: &Cluster, node: &str, target: &str) {
    let answered = |line: &str| !line.contains(" bytes_out=0 ");
    audited(cluster, node, target, answered).unwrap();
}

/// Waits for an audit line of the server about this node and target.
pub fn audited(
    cluster: &Cluster,
    node: &str,
    target: &str,
    wanted: impl Fn(&str) -> bool,
) -> anyhow::Result<()> {
    let part = format!(" node={node} target={target} ");
    let log = cluster.dir().join("logs").join(format!("{DAEMON}.log"));
    wait_for(&format!("an audit line with {part:?}"), Duration::from_secs(20), || {
        let log = fs::read_to_string(&log)?;
        Ok(log.lines().any(|line| line.contains(&part) && wanted(line)).then_some(()))
    })
}

/// Logs and exec on a node that the server reaches: dialled by its address, no agent there.
pub fn a_cloud_node_is_dialled(cluster: &Cluster, node: &str) {
    assert!(!cluster.get_node(node).unwrap().daemons.has(DAEMON), "{node} has an agent");
    answers(cluster, node);
    assert_audited(cluster, node, &format!("{node}:10250"));
}

/// The way that a cloud's network has to its nodes' pods.
fn route_to_pods(cluster: &Cluster, node: &str) {
    let cidr = cluster.kubectl(&["get", "node", node, "-o", "jsonpath={.spec.podCIDR}"]).unwrap();
    let address = cluster.get_node(node).unwrap().address().unwrap();
    let router = cluster.network().hosts()[1];
    let gateway = cluster.network().gateway_of(node).unwrap();
    let uplink = gateway.sh("ip -4 -o addr show dev wan | sed 's/.*inet \\([0-9.]*\\).*/\\1/'").unwrap();
    router.sh(&format!("ip route add {cidr} via {}", uplink.trim())).unwrap();
    gateway.sh(&format!("ip route add {cidr} via {address}")).unwrap();
}

/// Answers an AdmissionReview with a refusal of its own; reads HTTP from stdin.
const ANSWER: &str = r#"
length=0
while read -r line; do
    line=$(echo "$line" | tr -d '\r' | tr A-Z a-z)
    [ -n "$line" ] || break
    case $line in "content-length: "*) length=${line#*: };; esac
done
body=$(head -c "$length")
uid=${body#*\"uid\":\"}
uid=${uid%%\"*}
answer='{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","response":{"uid":"'$uid'","allowed":false,"status":{"message":"a pod in the cloud says no"}}}'
printf 'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: %s\r\n\r\n%s' "${#answer}" "$answer"
"#;

/// A webhook named as a Service whose pod runs on a cloud node.
pub fn a_webhook_in_a_cloud_pod_answers(cluster: &Cluster, node: &str) {
    route_to_pods(cluster, node);
    let dir = cluster.dir();
    let ca = Authority::new(dir, "hook-ca").unwrap();
    ca.leaf(dir, "hook", Subject::new("hook", None), Usage::Server, &["hook.default.svc"]).unwrap();
    let read = |file: &str| fs::read_to_string(dir.join(file)).unwrap();
    let bundle = run(Command::new("base64").args(["-w0"]), read("hook-ca.crt").as_bytes(), COMMAND_LIMIT);
    let bundle = bundle.unwrap().ok().unwrap();

    // The image is busybox alone: TLS is the node's own socat's.
    let serve = "exec /usr/bin/socat OPENSSL-LISTEN:8443,reuseaddr,fork,cert=/hook/tls.crt,key=/hook/tls.key,verify=0 EXEC:'sh /hook/answer'";
    let mounts = json!({"volumeMounts": [
        {"name": "hook", "mountPath": "/hook"}, {"name": "usr", "mountPath": "/usr"},
        {"name": "lib", "mountPath": "/lib"}, {"name": "lib64", "mountPath": "/lib64"}],
        "readinessProbe": {"tcpSocket": {"port": 8443}, "periodSeconds": 1}});
    let mut hook = pod("hook", node, serve, &mounts);
    hook["spec"]["volumes"] = json!([
        {"name": "hook", "configMap": {"name": "hook"}},
        {"name": "usr", "hostPath": {"path": "/usr"}},
        {"name": "lib", "hostPath": {"path": "/usr/lib"}}, {"name": "lib64", "hostPath": {"path": "/usr/lib64"}}]);
    let objects = json!({"apiVersion": "v1", "kind": "List", "items": [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "hook", "namespace": "default"},
         "data": {"answer": ANSWER, "tls.crt": read("hook.crt"), "tls.key": read("hook.key")}},
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "hook", "namespace": "default"},
         "spec": {"selector": {"app": "hook"}, "ports": [{"port": 443, "targetPort": 8443}]}},
        hook]});
    cluster.apply(&objects).unwrap();
    let address = cluster.wait_pod("default", "hook").unwrap().address;
    cluster
        .apply(&json!({"apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration",
            "metadata": {"name": "hook"},
            "webhooks": [{"name": "hook.rig.local", "sideEffects": "None", "admissionReviewVersions": ["v1"],
                "failurePolicy": "Fail", "timeoutSeconds": 20,
                "clientConfig": {"caBundle": bundle, "service": {"namespace": "default", "name": "hook"}},
                "objectSelector": {"matchLabels": {"asks": "the-cloud"}},
                "rules": [{"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["configmaps"]}]}]}))
        .unwrap();
    let asked = json!({"apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {"name": "asked", "namespace": "default", "labels": {"asks": "the-cloud"}}});
    wait_for("the webhook's refusal", Duration::from_secs(60), || {
        let mut create = cluster.control_plane().kubectl_command(&cluster.network().cloud)?;
        let out = run(
            create.args(["create", "--dry-run=server", "-f", "-"]),
            asked.to_string().as_bytes(),
            COMMAND_LIMIT,
        )?;
        anyhow::ensure!(out.stderr.contains("a pod in the cloud says no"), "{out:?}");
        Ok(Some(()))
    })
    .unwrap();
    assert_audited(cluster, node, &format!("{address}:8443"));
    cluster.kubectl(&["delete", "validatingwebhookconfiguration", "hook"]).unwrap();
}

/// The real metrics-server in the cloud, as an APIService: the API server asks it through the egress.
pub fn an_aggregated_api_answers(cluster: &mut Cluster, node: &str) {
    let file = |name: &str| cluster.dir().join("pki").join(name).display().to_string();
    let admin = file("admin.kubeconfig");
    let mut server = cluster.network().cloud.command(tools::metrics_server().unwrap()).unwrap();
    for flag in ["kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig"] {
        server.arg(format!("--{flag}={admin}"));
    }
    server.args([
        "--secure-port=4443",
        "--kubelet-preferred-address-types=InternalIP",
        "--kubelet-use-node-status-port",
    ]);
    server.args(["--metric-resolution=10s", "--kubelet-request-timeout=3s"]);
    server.arg(format!("--cert-dir={}", cluster.dir().join("metrics-certs").display()));
    server.arg(format!("--kubelet-certificate-authority={}", file("ca.crt")));
    let log = cluster.dir().join("logs/metrics-server.log");
    let mut server = cluster.network().cloud.spawn(&mut server, &log).unwrap();
    let version = "v1beta1.metrics.k8s.io";
    cluster
        .apply(&json!({"apiVersion": "v1", "kind": "List", "items": [
            {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "metrics-server", "namespace": "kube-system"},
             "spec": {"ports": [{"port": 443, "targetPort": 4443}]}},
            {"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
             "metadata": {"name": "metrics-server", "namespace": "kube-system", "labels": {"kubernetes.io/service-name": "metrics-server"}},
             "addressType": "IPv4", "ports": [{"port": 4443}], "endpoints": [{"addresses": ["10.10.0.2"]}]},
            {"apiVersion": "apiregistration.k8s.io/v1", "kind": "APIService", "metadata": {"name": version},
             "spec": {"group": "metrics.k8s.io", "version": "v1beta1", "groupPriorityMinimum": 100, "versionPriority": 100,
                "insecureSkipTLSVerify": true, "service": {"namespace": "kube-system", "name": "metrics-server"}}}]}))
        .unwrap();
    // Two scrapes make a figure. It scrapes by itself, so it knows the nodes that it can dial, and those alone.
    let top = wait_for("kubectl top node", Duration::from_secs(90), || {
        server.check_alive()?;
        cluster.kubectl(&["top", "node", node, "--no-headers"]).map(Some)
    });
    assert!(top.unwrap().starts_with(node));
    // The API server keeps its connection: the line comes when that ends.
    server.terminate().unwrap();
    assert_audited(cluster, "-", "10.10.0.2:4443");
}
