//! The applications that tests and the demo deploy.

use crate::images::BUSYBOX;
use serde_json::{Value, json};

/// A web server on port 80 that says its pod's name, in its log and to whoever asks.
pub const WEB: &str = "echo I am $HOSTNAME; echo $HOSTNAME >/www/index.html; exec httpd -f -p 80 -h /www";

/// A StatefulSet `web` with one pod on each of two nodes, and a DaemonSet `agent`, all of them [`WEB`].
pub fn web_and_agent() -> Value {
    let template = |app: &str, spread: Value| {
        json!({
            "metadata": {"labels": {"app": app}},
            "spec": {
                "terminationGracePeriodSeconds": 1,
                "topologySpreadConstraints": spread,
                "containers": [{"name": "main", "image": BUSYBOX, "imagePullPolicy": "Never", "command": ["sh", "-c", WEB]}],
            },
        })
    };
    let one_per_node = json!([{"maxSkew": 1, "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "DoNotSchedule", "labelSelector": {"matchLabels": {"app": "web"}}}]);
    json!({"apiVersion": "v1", "kind": "List", "items": [
        {"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": {"name": "web", "namespace": "default"},
         "spec": {"serviceName": "web", "replicas": 2, "podManagementPolicy": "Parallel",
            "selector": {"matchLabels": {"app": "web"}}, "template": template("web", one_per_node)}},
        {"apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": {"name": "agent", "namespace": "default"},
         "spec": {"selector": {"matchLabels": {"app": "agent"}}, "template": template("agent", json!([]))}},
    ]})
}
