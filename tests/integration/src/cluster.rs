//! A whole Kubernetes cluster: control plane in the cloud, nodes at sites, our plugins on them.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! use integration::{cluster::Cluster, topology::Options};
//! let mut cluster = Cluster::up(Options { nodes: 2, ..Options::default() })?;
//! cluster.kubectl(&["create", "-f", "apps.yaml"])?;
//! let address = cluster.wait_pod("default", "web-0")?.address;
//! cluster.node("node1")?.cut()?;
//! cluster.node("node1")?.reboot()?;
//! # Ok(()) }
//! ```
//! Dropping it removes all of it, and panics if anything is left.

mod handle;
mod pods;
mod saved;

pub use handle::NodeHandle;
pub use pods::Pod;
pub use saved::rigs_dir;

use crate::control_plane::ControlPlane;
use crate::daemons::Daemons;
use crate::disk;
use crate::exec::{COMMAND_LIMIT, run, wait_for};
use crate::flannel;
use crate::go::progress;
use crate::host::unique_id;
use crate::host_init::HostSpec;
use crate::kubelet::{self, Mode};
use crate::leaks;
use crate::network::Network;
use crate::node::{Cni, Node, Settings};
use crate::sweep::sweep;
use crate::topology::{Options, Site, plan};
use crate::{containerd, edgeflanneld, konnectivity, kube_proxy, tools, tunnel};
use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long nodes and pods may take to be ready on a busy machine of two cores.
const READY_LIMIT: Duration = Duration::from_secs(120);

/// A running cluster.
#[derive(Debug)]
pub struct Cluster {
    nodes: BTreeMap<String, Node>,
    network: Network,
    control_plane: ControlPlane,
    options: Options,
    place: Place,
    _temporary: Option<tempfile::TempDir>,
}

/// Where a cluster's files are, and what its hosts' ids begin with.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Place {
    dir: PathBuf,
    prefix: String,
    stay: bool,
}

impl Cluster {
    /// A cluster for a test, all nodes Ready.
    pub fn up(options: Options) -> Result<Self> {
        let prefix = format!("{}.", unique_id("rig"));
        let temporary = tempfile::Builder::new().prefix(&prefix).tempdir()?;
        let place = Place { dir: temporary.path().to_owned(), prefix, stay: false };
        Self::make(options, place, Some(temporary))
    }

    fn make(options: Options, place: Place, temporary: Option<tempfile::TempDir>) -> Result<Self> {
        // First of all: a build takes longer than anybody waits for a daemon.
        tools::build_for(&options)?;
        let start = Instant::now();
        let say = |what: &str| {
            if place.stay {
                progress(&format!("{:5.1} s  {what}", start.elapsed().as_secs_f64()));
            }
        };
        let sites = plan(&options)?;
        let logs = place.dir.join("logs");
        let network = Network::up(&sites, options.wan, &logs, |name| place.host(name, None, Vec::new()))?;
        let control_plane = ControlPlane::new(&place.dir, Daemons::new(&logs)?);
        let mut cluster = Self {
            nodes: BTreeMap::new(),
            network,
            control_plane,
            options,
            place: place.clone(),
            _temporary: temporary,
        };
        // From here on a failure still finds everything to remove.
        cluster.save()?;
        cluster.control_plane.make_certificates(&sites)?;
        cluster.start_api()?;
        say("networks, certificates, etcd and API server started");
        cluster.boot_nodes(&sites)?;
        cluster.save()?;
        say("nodes booted, containerd up, images in");
        cluster.control_plane.wait_ready(&cluster.network.cloud)?;
        if cluster.options.tunnel.is_some() {
            tunnel::authorize(&cluster.network.cloud, &cluster.control_plane)?;
        }
        say("API server ready");
        if cluster.options.cni == Cni::Ours {
            cluster.apply_text(edgeflanneld::RBAC)?;
        }
        for node in cluster.nodes.values_mut() {
            start_daemon_and_kubelet(node)?;
        }
        cluster.save()?;
        cluster.finish_nodes()?;
        cluster.save()?;
        say("all nodes Ready");
        Ok(cluster)
    }

    fn start_api(&mut self) -> Result<()> {
        let (cloud, dir) = (&self.network.cloud, &self.place.dir);
        let egress = match (self.options.konnectivity, self.options.tunnel) {
            (true, Some(_)) => bail!("konnectivity and our tunnel at once: an API server has one egress"),
            (true, None) => Some(konnectivity::start_server(cloud, dir, &mut self.control_plane.daemons)?),
            (false, Some(egress)) => {
                Some(tunnel::start_server(cloud, dir, &self.options, egress, &mut self.control_plane)?)
            }
            (false, None) => None,
        };
        self.control_plane.start_api(cloud, egress.as_deref())
    }

    /// Boots all nodes side by side, up to a containerd with images.
    fn boot_nodes(&mut self, sites: &[Site]) -> Result<()> {
        let this = &*self;
        let booted: Vec<Result<Node>> = std::thread::scope(|scope| {
            let threads: Vec<_> = sites
                .iter()
                .flat_map(|site| site.nodes.iter().map(move |name| (site, name)))
                .map(|(site, name)| scope.spawn(move || this.boot_node(site, name)))
                .collect();
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|_| bail!("booting panicked")))
                .collect()
        });
        // All are kept before the first failure is told: what was booted must be found again to be removed.
        let mut failed = None;
        for node in booted {
            match node {
                Ok(node) => drop(self.nodes.insert(node.host.name().to_owned(), node)),
                Err(error) => failed = Some(error),
            }
        }
        failed.map_or(Ok(()), Err)
    }

    fn boot_node(&self, site: &Site, name: &str) -> Result<Node> {
        let address = site.address(name).with_context(|| format!("{name} has no address"))?.to_string();
        let dir = self.place.dir.join("nodes").join(name);
        fs::create_dir_all(&dir)?;
        let image = self.options.disk_images.then(|| dir.join("disk.img"));
        if let Some(image) = &image {
            disk::make_image(image)?;
        }
        let mut spec = self.place.host(name, image, vec![(address.clone(), name.to_owned())]);
        spec.disk = dir.join("disk");
        spec.cgroups = true;
        let settings = Settings { dir, address: Some(address), mode: Mode::Cluster, cni: self.options.cni };
        let mut node = Node::boot(spec, settings, None)?;
        self.network.attach(&node.host)?;
        self.control_plane.equip(&node.host)?;
        containerd::start(&mut node)?;
        Ok(node)
    }

    /// What needs the API: each node's pod addresses, its other daemons, and its word that it is ready.
    fn finish_nodes(&mut self) -> Result<()> {
        let names: Vec<String> = self.nodes.keys().cloned().collect();
        for name in &names {
            let cidr = wait_for(&format!("the pod addresses of {name}"), READY_LIMIT, || {
                let cidr = self.kubectl(&["get", "node", name, "-o", "jsonpath={.spec.podCIDR}"])?;
                Ok(Some(cidr).filter(|cidr| !cidr.is_empty()))
            })?;
            let node = self.nodes.get_mut(name).context("it was booted")?;
            node.configure_cni(&cidr)?;
            start_extras(node, &self.options)?;
            if node.wants_edgeflanneld() {
                edgeflanneld::wait_ready(node)?;
            }
            if self.options.tunnel.is_some() {
                let label = tunnel::label(&self.options, name)?;
                self.control_plane.kubectl(&self.network.cloud, &["label", "node", name, label])?;
            }
            // The installation of a node is over and synced; what comes after it is on its own.
            node.host.sh("sync -f /var; sync -f /etc/kubernetes")?;
        }
        let mut wait = vec!["wait", "--for=condition=Ready", "node", "--timeout=120s"];
        wait.extend(names.iter().map(String::as_str));
        let mut command = self.control_plane.kubectl_command(&self.network.cloud)?;
        run(command.args(wait), b"", READY_LIMIT + COMMAND_LIMIT)?.ok().map(drop)
    }

    /// A handle on a node.
    pub fn node(&mut self, name: &str) -> Result<NodeHandle<'_>> {
        ensure!(self.nodes.contains_key(name), "there is no node {name}");
        Ok(NodeHandle { cluster: self, name: name.to_owned() })
    }

    /// A node, to look at.
    pub fn get_node(&self, name: &str) -> Result<&Node> {
        self.nodes.get(name).with_context(|| format!("there is no node {name}"))
    }

    /// Its nodes, by name.
    pub fn nodes(&self) -> &BTreeMap<String, Node> {
        &self.nodes
    }

    /// Its networks.
    pub fn network(&self) -> &Network {
        &self.network
    }

    /// The control plane's daemons.
    pub fn control_plane(&self) -> &ControlPlane {
        &self.control_plane
    }

    /// Its folder, with everybody's logs.
    pub fn dir(&self) -> &Path {
        &self.place.dir
    }

    /// What the ids of its hosts begin with; it ends with a dot, so that no other rig's do.
    pub fn prefix(&self) -> &str {
        &self.place.prefix
    }

    /// Silences "cloud", a site's uplink (its LAN stays whole), or a node.
    pub fn cut(&mut self, what: &str) -> Result<()> {
        self.network.cut(what)?;
        self.save()
    }

    /// Undoes a cut, or all of them.
    pub fn heal(&mut self, what: Option<&str>) -> Result<()> {
        match what {
            Some(what) => self.network.heal(what)?,
            None => self.network.heal_all()?,
        }
        self.save()
    }

    /// Runs kubectl as the cluster's admin; gives its stdout.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        self.control_plane.kubectl(&self.network.cloud, arguments)
    }

    /// The same for an answer in JSON.
    pub fn kubectl_json(&self, arguments: &[&str]) -> Result<Value> {
        let text = self.kubectl(&[arguments, &["-o", "json"]].concat())?;
        serde_json::from_str(&text).context("kubectl -o json gave no JSON")
    }

    /// `kubectl apply` of an object, or of several in a `List`.
    pub fn apply(&self, object: &Value) -> Result<()> {
        self.apply_text(&object.to_string())
    }

    /// The same of a manifest's text.
    pub fn apply_text(&self, manifest: &str) -> Result<()> {
        let mut command = self.control_plane.kubectl_command(&self.network.cloud)?;
        run(command.args(["apply", "-f", "-"]), manifest.as_bytes(), COMMAND_LIMIT)?.ok().map(drop)
    }

    /// Everything off and removed. Every step is tried; the first error is given.
    pub fn down(mut self) -> Result<()> {
        let removed = self.remove();
        if !self.place.stay {
            return removed;
        }
        // A broken `rig up` may not have written everything down. This fails if anything is left, whatever went wrong before.
        sweep(&self.place.prefix)?;
        let dir = &self.place.dir;
        fs::remove_dir_all(dir).with_context(|| format!("cannot remove {dir:?}"))
    }

    fn remove(&mut self) -> Result<()> {
        let nodes = std::thread::scope(|scope| {
            let off = |node: &mut Node| node.power_off().and_then(|()| node.host.remove());
            let threads: Vec<_> =
                self.nodes.values_mut().map(|node| scope.spawn(move || off(node))).collect();
            let joined =
                threads.into_iter().map(|t| t.join().unwrap_or_else(|_| bail!("removing a node panicked")));
            joined.collect::<Vec<Result<()>>>()
        });
        let mut results = nodes;
        results.push(self.network.down());
        results.push(self.control_plane.daemons.reap());
        results.push(leaks::check_named(&self.place.prefix));
        results.into_iter().collect()
    }
}

impl Place {
    fn host(&self, name: &str, image: Option<PathBuf>, hosts: Vec<(String, String)>) -> HostSpec {
        HostSpec {
            name: name.to_owned(),
            id: format!("{}{name}", self.prefix),
            disk: self.dir.join("hosts").join(name),
            image,
            cgroups: false,
            stay: self.stay,
            hosts,
        }
    }
}

/// Our daemon, if it belongs there, and the kubelet after it, at each boot.
fn start_daemon_and_kubelet(node: &mut Node) -> Result<()> {
    if node.wants_edgeflanneld() {
        edgeflanneld::start(node)?;
    }
    kubelet::start(node)
}

/// What else runs on a node, and comes after the kubelet where it is a pod in real life.
fn start_extras(node: &mut Node, options: &Options) -> Result<()> {
    if node.cni().wants_flanneld() {
        flannel::start(node)?;
    }
    if options.kube_proxy {
        kube_proxy::start(node)?;
    }
    if options.konnectivity {
        konnectivity::start_agent(node)?;
    }
    if options.tunnel.is_some() && tunnel::is_edge(options, node.host.name())? {
        tunnel::start_agent(node)?;
    }
    Ok(())
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.place.stay {
            return;
        }
        if std::thread::panicking() {
            eprintln!("the control plane's logs end:\n{}", self.control_plane.daemons.log_ends());
            self.nodes.values().for_each(Node::show_logs);
        }
        if let Err(error) = self.remove() {
            leaks::complain(&format!("the cluster could not be removed: {error:#}"));
        }
    }
}
