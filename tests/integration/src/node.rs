//! A node: a host with cgroups of its own in which a real containerd and a real kubelet run our plugins from /opt/cni/bin.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! use integration::node::{Cni, Node};
//! let mut node = Node::standalone("node1", Cni::Ours, "10.244.1.0/24")?;
//! node.run_pod("web", &serde_json::json!({"command": ["httpd", "-f", "-p", "80"]}))?;
//! let address = node.pod("web")?.address;
//! node.reboot()?;
//! assert_eq!(node.pod("web")?.address, address);
//! # Ok(()) }
//! ```

use crate::daemons::{Daemons, DaemonsRecord};
use crate::exec::wait_for;
use crate::host::{Host, HostRecord, unique_id};
use crate::host_init::HostSpec;
use crate::kubelet::{self, Mode};
use crate::{containerd, edgeflanneld, images, tools};
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long a pod may take to come up on a busy machine of two cores.
const POD_LIMIT: Duration = Duration::from_secs(60);

/// Where a node's conflist lies.
const CONFLIST: &str = "/etc/cni/net.d/10-pods.conflist";

/// Whose plugins wire the pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cni {
    /// edgeflannel with ipam-sticky; in a cluster with edgeflanneld, too.
    Ours,
    /// The reference bridge with host-local.
    Bridge,
    /// flannel's CNI plugin, with flanneld beside it.
    Flannel,
    /// Ours in a flannel cluster: edgeflannel where flannel's plugin was, flanneld beside it.
    OursOnFlannel,
}

impl Cni {
    /// Does flanneld make the overlay and tell the plugin the node's subnet?
    pub fn wants_flanneld(self) -> bool {
        matches!(self, Self::Flannel | Self::OursOnFlannel)
    }
}

impl std::str::FromStr for Cni {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "ours" => Ok(Self::Ours),
            "bridge" => Ok(Self::Bridge),
            "flannel" => Ok(Self::Flannel),
            "ours-on-flannel" => Ok(Self::OursOnFlannel),
            _ => bail!("{text} is not a CNI choice: ours, bridge, flannel or ours-on-flannel"),
        }
    }
}

/// A pod as its kubelet sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodStatus {
    /// Its name.
    pub name: String,
    /// Its address.
    pub address: String,
    /// The id of its only container.
    pub container: String,
    /// How often that was restarted.
    pub restarts: u64,
}

/// A running (or powered-off) node.
#[derive(Debug)]
pub struct Node {
    /// The machine under it.
    pub host: Host,
    /// containerd, kubelet and whatever else was started on it.
    pub daemons: Daemons,
    settings: Settings,
    /// Present when the node's folder is a temporary one. After `host`: that must be gone first.
    _temporary: Option<tempfile::TempDir>,
}

/// What stays true of a node over reboots.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Settings {
    /// Holds the disk and the logs.
    pub dir: PathBuf,
    /// Its address, when it has a network.
    pub address: Option<String>,
    /// Alone or in a cluster.
    pub mode: Mode,
    /// Whose plugins.
    pub cni: Cni,
}

/// What `rig` writes down to find a node again.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NodeRecord {
    host: HostRecord,
    daemons: DaemonsRecord,
    settings: Settings,
}

impl Node {
    /// A node on its own: no API server, no network but its pods', static pods from /etc/kubernetes/manifests.
    pub fn standalone(name: &str, cni: Cni, pod_cidr: &str) -> Result<Self> {
        let id = unique_id(name);
        let temporary = tempfile::Builder::new().prefix(&format!("{id}-")).tempdir()?;
        let dir = temporary.path().to_owned();
        let spec = HostSpec {
            name: name.to_owned(),
            id,
            disk: dir.join("disk"),
            image: None,
            cgroups: true,
            stay: false,
            hosts: Vec::new(),
        };
        let settings = Settings { dir, address: None, mode: Mode::Standalone, cni };
        let mut node = Self::boot(spec, settings, Some(temporary))?;
        node.configure_cni(pod_cidr)?;
        node.start_services()?;
        Ok(node)
    }

    /// A booted node with plugins installed and nothing running yet.
    pub fn boot(spec: HostSpec, settings: Settings, temporary: Option<tempfile::TempDir>) -> Result<Self> {
        let daemons = Daemons::new(&settings.dir.join("logs"))?;
        let node = Self { host: Host::boot(spec)?, daemons, settings, _temporary: temporary };
        node.host.sh("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1")?;
        node.install()?;
        Ok(node)
    }

    /// A node that another run of `rig` made.
    pub fn found(record: NodeRecord) -> Self {
        let daemons = Daemons::found(record.daemons);
        Self { host: Host::found(record.host), daemons, settings: record.settings, _temporary: None }
    }

    /// What to write down so that [`Node::found`] finds it.
    pub fn record(&self) -> NodeRecord {
        let (host, daemons) = (self.host.record(), self.daemons.record());
        NodeRecord { host, daemons, settings: self.settings.clone() }
    }

    /// The folder that holds its disk and logs.
    pub fn dir(&self) -> &Path {
        &self.settings.dir
    }

    /// Its address, if it has a network.
    pub fn address(&self) -> Option<&str> {
        self.settings.address.as_deref()
    }

    /// Alone or in a cluster.
    pub fn mode(&self) -> &Mode {
        &self.settings.mode
    }

    /// Whose plugins its pods get.
    pub fn cni(&self) -> Cni {
        self.settings.cni
    }

    /// Does our daemon run on it? Alone in the world it has nobody to follow.
    pub fn wants_edgeflanneld(&self) -> bool {
        self.settings.cni == Cni::Ours && matches!(self.settings.mode, Mode::Cluster)
    }

    /// Installs another choice's programs and conflist; what runs is not touched, the daemons neither.
    pub fn move_to(&mut self, cni: Cni, pod_cidr: &str) -> Result<()> {
        self.settings.cni = cni;
        self.install()?;
        self.configure_cni(pod_cidr)
    }

    fn install(&self) -> Result<()> {
        const REFERENCE: &[&str] =
            &["bridge", "host-local", "loopback", "portmap", "bandwidth", "tuning", "firewall"];
        let mut programs = vec![(tools::cni_plugins_dir()?, REFERENCE)];
        match self.settings.cni {
            Cni::Ours | Cni::OursOnFlannel => {
                programs.push((tools::ours()?, &["edgeflannel", "ipam-sticky"]))
            }
            Cni::Flannel => programs.push((tools::flannel_cni_dir()?, &["flannel"])),
            Cni::Bridge => {}
        }
        let bin = self.host.path("/opt/cni/bin")?;
        for (dir, names) in programs {
            for name in names {
                install_program(&dir.join(name), &bin.join(name))?;
            }
        }
        if self.wants_edgeflanneld() { edgeflanneld::install(self) } else { Ok(()) }
    }

    /// Writes the conflist for pods out of `pod_cidr`.
    pub fn configure_cni(&self, pod_cidr: &str) -> Result<()> {
        let conflist = conflist(self.settings.cni, &self.settings.mode, pod_cidr)?;
        self.host.write(CONFLIST, conflist.to_string())
    }

    /// Rewrites the conflist for another version of the CNI specification.
    pub fn set_cni_version(&self, version: &str) -> Result<()> {
        let mut conflist: Value = serde_json::from_str(&self.host.read(CONFLIST)?)?;
        conflist["cniVersion"] = json!(version);
        self.host.write(CONFLIST, conflist.to_string())
    }

    /// containerd and the kubelet, both answering.
    pub fn start_services(&mut self) -> Result<()> {
        containerd::start(self)?;
        kubelet::start(self)?;
        kubelet::wait_healthy(self)
    }

    /// Those of containerd and the kubelet that do not run.
    pub fn start_missing_services(&mut self) -> Result<()> {
        if !self.daemons.has("containerd") {
            containerd::start(self)?;
        }
        if !self.daemons.has("kubelet") {
            kubelet::start(self)?;
        }
        kubelet::wait_healthy(self)
    }

    /// Prints the end of each log, for a test that fails.
    pub fn show_logs(&self) {
        eprintln!("the logs of node {} end:\n{}", self.host.name(), self.daemons.log_ends());
    }

    /// Power loss.
    pub fn power_off(&mut self) -> Result<()> {
        self.host.power_off()?;
        self.daemons.reap()
    }

    /// Power on and what an init system would do: forwarding, containerd, kubelet. No link: see `NodeHandle::power_on` for a node with a network.
    pub fn power_on(&mut self) -> Result<()> {
        self.host.power_on()?;
        self.host.sh("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1").map(drop)
    }

    /// Power loss, power on, containerd and kubelet started.
    pub fn reboot(&mut self) -> Result<()> {
        self.power_off()?;
        self.power_on()?;
        self.start_services()
    }

    /// Puts a static pod's manifest in place. `container` is merged into a container of the busybox image.
    pub fn run_pod(&self, name: &str, container: &Value) -> Result<()> {
        self.run_pod_as(name, container, &json!({}))
    }

    /// The same, with `more` merged into the pod's specification.
    pub fn run_pod_as(&self, name: &str, container: &Value, more: &Value) -> Result<()> {
        let mut full = json!({"name": "main", "image": images::BUSYBOX, "imagePullPolicy": "Never"});
        if let (Some(full), Some(more)) = (full.as_object_mut(), container.as_object()) {
            full.extend(more.clone());
        }
        let mut manifest = json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "default"},
            "spec": {"terminationGracePeriodSeconds": 1, "containers": [full]},
        });
        if let (Some(spec), Some(more)) = (manifest["spec"].as_object_mut(), more.as_object()) {
            spec.extend(more.clone());
        }
        self.host.write(&format!("{}/{name}.json", kubelet::MANIFESTS), manifest.to_string())
    }

    /// Removes a static pod's manifest and waits until the kubelet has done away with the pod.
    pub fn remove_pod(&self, name: &str) -> Result<()> {
        self.host.sh(&format!("rm {}/{name}.json", kubelet::MANIFESTS))?;
        let full = self.full_name(name);
        wait_for(&format!("the end of pod {full}"), POD_LIMIT, || {
            let gone = kubelet::pods(self)?.iter().all(|pod| pod["metadata"]["name"] != full.as_str());
            Ok((gone && containerd::running(self, &full)?.is_empty()).then_some(()))
        })
    }

    /// A static pod's name in Kubernetes: its own and the node's.
    pub fn full_name(&self, name: &str) -> String {
        format!("{name}-{}", self.host.name())
    }

    /// Waits until a static pod runs with its container ready, and says what the kubelet knows.
    pub fn pod(&mut self, name: &str) -> Result<PodStatus> {
        self.pod_when(name, |_| true)
    }

    /// Waits until a static pod is ready and `wanted` holds.
    pub fn pod_when(&mut self, name: &str, wanted: impl Fn(&PodStatus) -> bool) -> Result<PodStatus> {
        let full = self.full_name(name);
        wait_for(&format!("pod {full} to run as wanted"), POD_LIMIT, || {
            self.daemons.check_alive("kubelet")?;
            let pods = kubelet::pods(self)?;
            let Some(pod) = pods.iter().find(|pod| pod["metadata"]["name"] == full.as_str()) else {
                bail!("the kubelet knows no such pod");
            };
            let status = ready(pod).with_context(|| format!("its status: {}", pod["status"]))?;
            if !wanted(&status) {
                bail!("it is {status:?}");
            }
            // The kubelet's word may be from before the last kill: the runtime knows best.
            let runs = containerd::running(self, &full)?;
            Ok(runs.iter().any(|c| c.id == status.container).then_some(status))
        })
    }
}

/// What a ready pod's object says, or why it is not ready.
fn ready(pod: &Value) -> Result<PodStatus> {
    let text = |value: &Value| value.as_str().filter(|s| !s.is_empty()).map(str::to_owned);
    let container = &pod["status"]["containerStatuses"][0];
    if container["ready"] != true {
        bail!("its container is not ready");
    }
    let id = text(&container["containerID"]).context("its container has no id")?;
    Ok(PodStatus {
        name: text(&pod["metadata"]["name"]).context("it has no name")?,
        address: text(&pod["status"]["podIP"]).context("it has no address")?,
        container: id.trim_start_matches("containerd://").to_owned(),
        restarts: container["restartCount"].as_u64().unwrap_or(0),
    })
}

/// Copies a program to where it may be running: as install(1) does, so that nobody ever finds half of it.
pub fn install_program(from: &Path, to: &Path) -> Result<()> {
    let new = to.with_extension("new");
    fs::copy(from, &new)
        .and_then(|_| fs::rename(&new, to))
        .with_context(|| format!("cannot install {from:?} as {to:?}"))
}

/// The network configuration of a node's pods: what we ship, or for comparison the like for other plugins.
fn conflist(cni: Cni, mode: &Mode, pod_cidr: &str) -> Result<Value> {
    let flannels = || serde_json::from_str::<Value>(include_str!("../../../conf/10-flannel.conflist"));
    Ok(match (cni, mode) {
        (Cni::Ours, Mode::Standalone) => {
            let mut shipped: Value =
                serde_json::from_str(include_str!("../../../conf/10-edgeflannel.conflist"))?;
            shipped["plugins"][0]["ipam"]["ranges"] = json!([[{"subnet": pod_cidr}]]);
            shipped
        }
        // The subnet comes from the daemon.
        (Cni::Ours, Mode::Cluster) | (Cni::OursOnFlannel, _) => flannels()?,
        // Ours is kube-flannel's with one word changed.
        (Cni::Flannel, _) => {
            let mut stock = flannels()?;
            stock["plugins"][0]["type"] = json!("flannel");
            stock
        }
        (Cni::Bridge, _) => json!({"cniVersion": "1.0.0", "name": "pods", "plugins": [
            {"type": "bridge", "bridge": "cni0", "isDefaultGateway": true, "ipMasq": true, "hairpinMode": true,
             "ipam": {"type": "host-local", "ranges": [[{"subnet": pod_cidr}]]}},
            {"type": "portmap", "capabilities": {"portMappings": true}}]}),
    })
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() && self.host.is_on() {
            self.show_logs();
        }
    }
}
