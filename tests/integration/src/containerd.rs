//! containerd on a node: starting it, and what a test wants to know of it or do to it behind the kubelet's back.

use crate::exec::wait_for;
use crate::images;
use crate::node::Node;
use anyhow::{Context, Result};
use serde_json::Value;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

const CONFIG: &str = include_str!("../templates/containerd.toml");

/// One container that containerd knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Container {
    /// Its id.
    pub id: String,
    /// A pod's sandbox, or one of its containers?
    pub is_sandbox: bool,
}

/// Starts containerd and waits until it answers; imports the images if its disk has none yet.
pub fn start(node: &mut Node) -> Result<()> {
    node.host.write("/etc/containerd/config.toml", CONFIG)?;
    let mut command = node.host.command("containerd")?;
    command.args(["--log-level", "warn"]);
    node.daemons.start("containerd", command)?;
    wait_for("containerd to answer", Duration::from_secs(30), || {
        node.daemons.check_alive("containerd")?;
        ctr(node, &["version"]).map(Some)
    })?;
    let known = ctr(node, &["image", "ls", "-q"])?;
    if ![images::BUSYBOX, images::PAUSE].iter().all(|name| known.contains(name)) {
        let archive = node.dir().join("images.tar");
        images::write_archive(&archive)?;
        ctr(node, &["image", "import", &archive.to_string_lossy()])?;
    }
    Ok(())
}

/// `ctr` in Kubernetes' containerd namespace.
pub fn ctr(node: &Node, arguments: &[&str]) -> Result<String> {
    node.host.run(["ctr", "-n", "k8s.io"].iter().chain(arguments))?.ok()
}

/// The containers of the pod called `name`, newest sandboxes and dead ones included.
pub fn containers(node: &Node, pod: &str) -> Result<Vec<Container>> {
    let filter = format!("labels.\"io.kubernetes.pod.name\"=={pod}");
    let ids = ctr(node, &["container", "ls", "-q", &filter])?;
    ids.lines()
        .map(|id| {
            let info: Value = serde_json::from_str(&ctr(node, &["container", "info", id])?)
                .with_context(|| format!("ctr container info {id} is no JSON"))?;
            let is_sandbox = info["Labels"]["io.cri-containerd.kind"] == "sandbox";
            Ok(Container { id: id.to_owned(), is_sandbox })
        })
        .collect()
}

/// Those of the pod's containers whose process runs.
pub fn running(node: &Node, pod: &str) -> Result<Vec<Container>> {
    let tasks = ctr(node, &["task", "ls"])?;
    let runs = |id: &str| tasks.lines().any(|line| line.starts_with(id) && line.ends_with("RUNNING"));
    Ok(containers(node, pod)?.into_iter().filter(|c| runs(&c.id)).collect())
}

/// Kills the process of a container with SIGKILL.
pub fn kill(node: &Node, container: &Container) -> Result<()> {
    ctr(node, &["task", "kill", "-s", "SIGKILL", &container.id]).map(drop)
}

/// Runs a program to its end in a container; gives its stdout.
pub fn exec(node: &Node, container: &str, words: &[&str]) -> Result<String> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let id = format!("exec{}", COUNT.fetch_add(1, Ordering::Relaxed));
    let mut arguments = vec!["task", "exec", "--exec-id", &id, container];
    arguments.extend(words);
    ctr(node, &arguments)
}

/// What a pod's container reads at another pod's address, port 80. `container` may be written as the kubelet writes it.
pub fn fetch(node: &Node, container: &str, address: &str) -> Result<String> {
    let url = format!("http://{address}/");
    let said = exec(node, bare(container), &["timeout", "5", "wget", "-qO-", &url])?;
    Ok(said.trim().to_owned())
}

/// The process id of a running container, as the node counts. `container` may be written as the kubelet writes it.
pub fn pid(node: &Node, container: &str) -> Result<String> {
    let id = bare(container);
    let tasks = ctr(node, &["task", "ls"])?;
    let pid = tasks.lines().find_map(|line| line.strip_prefix(id)?.split_whitespace().next());
    pid.map(str::to_owned).with_context(|| format!("container {id} does not run:\n{tasks}"))
}

fn bare(container: &str) -> &str {
    container.trim_start_matches("containerd://")
}
