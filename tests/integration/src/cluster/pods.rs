//! Pods as the API server sees them.

use super::{Cluster, READY_LIMIT};
use crate::exec::wait_for;
use anyhow::{Result, bail};
use serde_json::Value;

/// A pod as the API server knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pod {
    /// Its namespace and name.
    pub name: String,
    /// Where it runs.
    pub node: String,
    /// Its address; empty as long as it has none.
    pub address: String,
    /// The API object's id: another one for a pod that was deleted and made again.
    pub uid: String,
    /// Its first container's id; another one after each restart.
    pub container: String,
    /// Does it say that it is ready?
    pub ready: bool,
}

impl Cluster {
    /// All pods of all namespaces, by namespace and name.
    pub fn pods(&self) -> Result<Vec<Pod>> {
        let list = self.kubectl_json(&["get", "pods", "--all-namespaces"])?;
        let items = list["items"].as_array().cloned().unwrap_or_default();
        Ok(items.iter().map(pod).collect())
    }

    /// One pod, whatever its state.
    pub fn pod(&self, namespace: &str, name: &str) -> Result<Pod> {
        Ok(pod(&self.kubectl_json(&["get", "pod", "-n", namespace, name])?))
    }

    /// Waits until a pod is ready.
    pub fn wait_pod(&self, namespace: &str, name: &str) -> Result<Pod> {
        self.wait_pod_when(namespace, name, |_| true)
    }

    /// Waits until a pod is ready and `wanted` holds.
    pub fn wait_pod_when(&self, namespace: &str, name: &str, wanted: impl Fn(&Pod) -> bool) -> Result<Pod> {
        wait_for(&format!("pod {namespace}/{name} to be ready as wanted"), READY_LIMIT, || {
            let pod = self.pod(namespace, name)?;
            if pod.ready && wanted(&pod) { Ok(Some(pod)) } else { bail!("it is {pod:?}") }
        })
    }
}

fn pod(object: &Value) -> Pod {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let conditions = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
    Pod {
        name: format!("{}/{}", text(&object["metadata"]["namespace"]), text(&object["metadata"]["name"])),
        node: text(&object["spec"]["nodeName"]),
        address: text(&object["status"]["podIP"]),
        uid: text(&object["metadata"]["uid"]),
        container: text(&object["status"]["containerStatuses"][0]["containerID"]),
        ready: object["metadata"]["deletionTimestamp"].is_null()
            && conditions.iter().any(|c| c["type"] == "Ready" && c["status"] == "True"),
    }
}
