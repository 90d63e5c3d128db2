//! Nodes from the API server: one watch, of which only what routes need is kept.
//!
//! A streaming list first; where the API server does not know that, pages of a list and then a watch. Silence and
//! errors change nothing: the last list stays in force, and the watch is tried again with growing, jittered waits. So
//! does a new list that is suddenly empty; only a deletion told as such removes the last node.

use super::{Node, Nodes};
use crate::{
    network::Network,
    target::{Host, Name},
};
use futures_util::StreamExt;
use k8s_openapi::{ClusterResourceScope, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::{
    Api, Client, Config, Resource,
    config::{KubeConfigOptions, Kubeconfig},
    core::{Selector, SelectorExt},
    runtime::{WatchStreamExt, utils::Backoff, watcher},
};
use serde::{Deserialize, Deserializer};
use std::{
    borrow::Cow,
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    pin::pin,
    sync::Arc,
    time::Duration,
};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until, timeout_at},
};

/// Changes that come within this time of each other make one snapshot.
const SETTLE: Duration = Duration::from_millis(100);

/// How long one watch lasts, seconds. A path that died in silence is noticed 5 seconds after it.
const WATCH: u32 = 30;

/// The waits between tries grow from this
const TRY_AGAIN: Duration = Duration::from_millis(500);

/// to this.
const TRY_AGAIN_AT_MOST: Duration = Duration::from_secs(10);

/// Quiet for this long counts as well again.
const CALM: Duration = Duration::from_secs(60);

/// How many nodes a page of the fallback list holds.
const PAGE: u32 = 500;

/// Where the API server is, and which nodes the server dials itself.
#[derive(Debug, Clone)]
pub struct ApiSource {
    /// A kubeconfig; none for the service account of the pod we are in.
    pub kubeconfig: Option<PathBuf>,
    /// `--direct-nodes`.
    pub direct: Option<Selector>,
}

impl ApiSource {
    /// Reads the kubeconfig or the service account; nothing is dialled yet.
    ///
    /// # Errors
    /// What is missing or wrong.
    pub async fn client(&self) -> Result<Client, String> {
        let mut config = match &self.kubeconfig {
            Some(path) => {
                let shown = path.display();
                let read = Kubeconfig::read_from(path).map_err(|error| format!("{shown}: {error}"))?;
                let config = Config::from_custom_kubeconfig(read, &KubeConfigOptions::default()).await;
                config.map_err(|error| format!("{shown}: {error}"))?
            }
            None => Config::incluster().map_err(|error| format!("no service account of a pod: {error}"))?,
        };
        config.connect_timeout = Some(Duration::from_secs(10));
        Client::try_from(config).map_err(|error| error.to_string())
    }

    /// Sends every list of nodes there is from now on, for ever.
    pub async fn follow(self, client: Client, nodes: watch::Sender<Arc<Nodes>>) {
        let api: Api<Slim> = Api::all(client);
        let mut mirror = Mirror { direct: self.direct, ..Mirror::default() };
        let streaming = watcher::Config::default().timeout(WATCH).streaming_lists();
        if !mirror.watch(&api, streaming, true, &nodes).await {
            log::info!("nodes: this API server gives no streaming list, reading pages");
            mirror
                .watch(&api, watcher::Config::default().timeout(WATCH).page_size(PAGE), false, &nodes)
                .await;
        }
    }
}

/// What the API server has told so far.
#[derive(Debug, Default)]
struct Mirror {
    direct: Option<Selector>,
    known: HashMap<String, Node>,
    /// The list that is being told, until it is complete.
    listed: Option<HashMap<String, Node>>,
    /// A list has been completed.
    complete: bool,
}

impl Mirror {
    /// Follows a watch. Returns false when the API server refuses it before the first list was complete and it
    /// `may_be_refused`; otherwise it does not return.
    async fn watch(
        &mut self,
        api: &Api<Slim>,
        config: watcher::Config,
        may_be_refused: bool,
        nodes: &watch::Sender<Arc<Nodes>>,
    ) -> bool {
        let mut events = pin!(watcher(api.clone(), config).backoff(Waits::default()));
        // When the changes that came will be sent.
        let mut send_at: Option<Instant> = None;
        loop {
            let event = match send_at {
                None => events.next().await,
                Some(at) => match timeout_at(at, events.next()).await {
                    Ok(event) => event,
                    Err(_) => {
                        send_at = None;
                        nodes.send_replace(Arc::new(self.nodes()));
                        continue;
                    }
                },
            };
            match event {
                Some(Ok(event)) => {
                    if self.take(event) && send_at.is_none() {
                        send_at = Some(Instant::now() + SETTLE);
                    }
                }
                Some(Err(error)) => {
                    if may_be_refused && !self.complete && is_refused(&error) {
                        return false;
                    }
                    log::warn!("nodes: {}", sentence(&error));
                }
                None => {
                    // kube's watcher never ends; if it did, waiting is better than spinning.
                    sleep_until(Instant::now() + Duration::from_secs(1)).await;
                }
            }
        }
    }

    /// Takes one event; says whether a new snapshot is due.
    fn take(&mut self, event: watcher::Event<Slim>) -> bool {
        match event {
            watcher::Event::Init => {
                self.listed = Some(HashMap::new());
                false
            }
            watcher::Event::InitApply(object) => {
                if let (Some(listed), Some((name, node))) =
                    (&mut self.listed, object.node(self.direct.as_ref()))
                {
                    listed.insert(name, node);
                }
                false
            }
            watcher::Event::InitDone => {
                let Some(listed) = self.listed.take() else { return false };
                if listed.is_empty() && !self.known.is_empty() {
                    log::warn!("nodes: the API server lists none, {} were known and stay", self.known.len());
                    return false;
                }
                let changed = !self.complete || listed != self.known;
                self.complete = true;
                self.known = listed;
                changed
            }
            watcher::Event::Apply(object) => {
                let Some((name, node)) = object.node(self.direct.as_ref()) else { return false };
                if self.known.get(&name) == Some(&node) {
                    return false;
                }
                self.known.insert(name, node);
                self.complete
            }
            watcher::Event::Delete(object) => {
                let name = object.metadata.name.unwrap_or_default();
                self.known.remove(&name).is_some() && self.complete
            }
        }
    }

    fn nodes(&self) -> Nodes {
        Nodes::new(self.known.values().cloned().collect())
    }
}

/// The waits between tries: doubled each time, and up to half of each left to chance, so that the replicas do not ask
/// a starting API server all at once. They begin anew after [`CALM`] without an error; one
/// event is not enough for that, since a watch that fails at once begins with one.
#[derive(Default)]
struct Waits {
    last: Duration,
    failed: Option<Instant>,
}

impl Iterator for Waits {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let now = Instant::now();
        if self.failed.is_none_or(|failed| now - failed > CALM) {
            self.last = Duration::ZERO;
        }
        self.failed = Some(now);
        self.last = (self.last * 2).clamp(TRY_AGAIN, TRY_AGAIN_AT_MOST);
        Some(self.last.mul_f64(1.0 - fastrand::f64() / 2.0))
    }
}

impl Backoff for Waits {
    fn reset(&mut self) {}
}

/// Whether the API server itself said no, and not the way to it. What it says to a streaming list that it cannot serve
/// differs: 422 from one that does not know them, 500 from one whose etcd is too old.
fn is_refused(error: &watcher::Error) -> bool {
    matches!(error, watcher::Error::WatchError(_) | watcher::Error::WatchStartFailed(kube::Error::Api(_)))
}

/// The error and what caused it, on one line.
fn sentence(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

/// A Node object, of which nothing is decoded but what routes need.
#[derive(Debug, Clone, Default, Deserialize)]
struct Slim {
    #[serde(deserialize_with = "metadata")]
    metadata: ObjectMeta,
    #[serde(default)]
    spec: Spec,
    #[serde(default)]
    status: Status,
}

#[derive(Debug, Clone, Default, Deserialize)]
struct Spec {
    #[serde(default, rename = "podCIDR")]
    pod_cidr: Option<String>,
    #[serde(default, rename = "podCIDRs")]
    pod_cidrs: Option<Vec<String>>,
}

#[derive(Debug, Clone, Default, Deserialize)]
struct Status {
    #[serde(default)]
    addresses: Option<Vec<Address>>,
}

#[derive(Debug, Clone, Deserialize)]
struct Address {
    address: String,
}

/// Name, version and labels; the rest of metadata (managedFields above all) is most of a Node object.
fn metadata<'de, D: Deserializer<'de>>(from: D) -> Result<ObjectMeta, D::Error> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Metadata {
        name: Option<String>,
        resource_version: Option<String>,
        labels: Option<BTreeMap<String, String>>,
    }
    let Metadata { name, resource_version, labels } = Metadata::deserialize(from)?;
    Ok(ObjectMeta { name, resource_version, labels, ..ObjectMeta::default() })
}

impl Slim {
    /// The node this is about, by the name the API server uses. What in it cannot be understood is left out.
    fn node(&self, direct: Option<&Selector>) -> Option<(String, Node)> {
        let written = self.metadata.name.clone()?;
        let name = Name::parse(written.as_bytes()).ok()?;
        let addresses = self.status.addresses.iter().flatten();
        let mut hosts: Vec<Host> = Vec::new();
        for host in addresses.filter_map(|one| Host::parse(one.address.as_bytes()).ok()) {
            if !hosts.contains(&host) {
                hosts.push(host);
            }
        }
        // podCIDR is the first of podCIDRs, where there are both.
        let networks = self.spec.pod_cidr.iter().chain(self.spec.pod_cidrs.iter().flatten());
        let mut pods: Vec<Network> = networks.filter_map(|text| text.parse().ok()).collect();
        pods.dedup();
        let labels = self.metadata.labels.clone().unwrap_or_default();
        let direct = direct.is_some_and(|selector| selector.matches(&labels));
        Some((written, Node { name, addresses: hosts, pods, direct }))
    }
}

impl Resource for Slim {
    type DynamicType = ();
    type Scope = ClusterResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        "Node".into()
    }

    fn group((): &()) -> Cow<'_, str> {
        "".into()
    }

    fn version((): &()) -> Cow<'_, str> {
        "v1".into()
    }

    fn plural((): &()) -> Cow<'_, str> {
        "nodes".into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

#[cfg(test)]
mod tests;
