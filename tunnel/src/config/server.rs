//! `edge-tunnel server`: its flags, and what they mean together.

use super::{LogFormat, Mistakes, cap, certificates, duration, given, listen, path, wait};
use crate::{
    hello::Id,
    network::Network,
    nodes::{api::ApiSource, file, selector},
    proxy::users::Users,
    target::{Target, parse_port},
    tls::{self, KeyPair},
};
use clap::Args;
use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

const NOT_AN_ID: &str = "no id; write 1 to 64 letters, digits, -, _ and .";

/// The flags as written.
#[derive(Debug, Clone, Default, Args)]
pub struct ServerArgs {
    /// Where agents dial: ADDRESS:PORT, or :PORT for every address
    #[arg(long, env = "EDGE_TUNNEL_LISTEN", value_name = "ADDR")]
    listen: Option<String>,
    /// The server's certificate, shown on every TLS listener (PEM)
    #[arg(long, env = "EDGE_TUNNEL_TLS_CERT", value_name = "FILE")]
    tls_cert: Option<String>,
    /// Its key (PEM)
    #[arg(long, env = "EDGE_TUNNEL_TLS_KEY", value_name = "FILE")]
    tls_key: Option<String>,
    /// The CA of agents' certificates, usually the cluster's (PEM)
    #[arg(long, env = "EDGE_TUNNEL_AGENT_CA", value_name = "FILE")]
    agent_ca: Option<String>,
    /// The CA of callers' certificates: kube-apiserver's (PEM)
    #[arg(long, env = "EDGE_TUNNEL_CALLER_CA", value_name = "FILE")]
    caller_ca: Option<String>,
    /// A common name or subjectAltName that may call; without one, every certificate of --caller-ca may
    #[arg(long, env = "EDGE_TUNNEL_CALLER_NAME", value_name = "NAME", value_delimiter = ',')]
    caller_name: Vec<String>,
    /// HTTP CONNECT for kube-apiserver, with client certificates of --caller-ca
    #[arg(long, env = "EDGE_TUNNEL_EGRESS_LISTEN", value_name = "ADDR")]
    egress_listen: Option<String>,
    /// HTTP CONNECT for kube-apiserver on a unix socket, guarded by its mode 0660
    #[arg(long, env = "EDGE_TUNNEL_EGRESS_SOCKET", value_name = "PATH")]
    egress_socket: Option<String>,
    /// HTTP proxy for metrics-server and Prometheus over TLS, with users and passwords of --proxy-users
    #[arg(long, env = "EDGE_TUNNEL_PROXY_LISTEN", value_name = "ADDR")]
    proxy_listen: Option<String>,
    /// The same without TLS, on a loopback address
    #[arg(long, env = "EDGE_TUNNEL_PROXY_PLAIN_LISTEN", value_name = "ADDR")]
    proxy_plain_listen: Option<String>,
    /// Users as JSON: [{"name", "hash": "$2b$…" (htpasswd -B), "ports": [10250]}]; followed
    #[arg(long, env = "EDGE_TUNNEL_PROXY_USERS", value_name = "FILE")]
    proxy_users: Option<String>,
    /// TLS by its server name, HTTP by its Host, unopened to this port of the node; only the cluster may reach it
    #[arg(
        long,
        env = "EDGE_TUNNEL_PASSTHROUGH_LISTEN",
        value_name = "IP:PORT=NODEPORT",
        value_delimiter = ','
    )]
    passthrough_listen: Vec<String>,
    /// This replica's name in logs, /sessions and to agents; random without it
    #[arg(long, env = "EDGE_TUNNEL_REPLICA_ID", value_name = "ID")]
    replica_id: Option<String>,
    /// Where other replicas dial
    #[arg(long, env = "EDGE_TUNNEL_PEER_LISTEN", value_name = "ADDR")]
    peer_listen: Option<String>,
    /// The other replicas: HOST:PORT, or a name with an address for each; ourselves among them does no harm
    #[arg(long, env = "EDGE_TUNNEL_PEERS", value_name = "HOST:PORT", value_delimiter = ',')]
    peers: Vec<String>,
    /// The CA of replicas' certificates (PEM)
    #[arg(long, env = "EDGE_TUNNEL_PEER_CA", value_name = "FILE")]
    peer_ca: Option<String>,
    /// The certificate shown to other replicas, for servers and clients; without it --tls-cert (PEM)
    #[arg(long, env = "EDGE_TUNNEL_PEER_CERT", value_name = "FILE")]
    peer_cert: Option<String>,
    /// Its key (PEM)
    #[arg(long, env = "EDGE_TUNNEL_PEER_KEY", value_name = "FILE")]
    peer_key: Option<String>,
    /// Where Nodes come from; without it and --nodes-file, the service account of the pod, if there is one
    #[arg(long, env = "EDGE_TUNNEL_KUBECONFIG", value_name = "FILE")]
    kubeconfig: Option<String>,
    /// Nodes as JSON: [{"name", "addresses": [], "podCIDRs": [], "direct": false}]; followed
    #[arg(long, env = "EDGE_TUNNEL_NODES_FILE", value_name = "FILE")]
    nodes_file: Option<String>,
    /// Labels of the nodes that are dialled from here: cloud nodes
    #[arg(long, env = "EDGE_TUNNEL_DIRECT_NODES", value_name = "SELECTOR")]
    direct_nodes: Option<String>,
    /// A network dialled from here: services, webhooks, aggregated APIs
    #[arg(long, env = "EDGE_TUNNEL_DIRECT_CIDR", value_name = "CIDR", value_delimiter = ',')]
    direct_cidr: Vec<String>,
    /// From the CONNECT to the status line
    #[arg(long, env = "EDGE_TUNNEL_DIAL_TIMEOUT", value_name = "TIME", default_value = "10s")]
    dial_timeout: Option<String>,
    /// How long open streams may go on after SIGTERM
    #[arg(long, env = "EDGE_TUNNEL_DRAIN", value_name = "TIME", default_value = "30s")]
    drain: Option<String>,
    /// TLS handshakes and heads under way, each listener
    #[arg(long, env = "EDGE_TUNNEL_MAX_HANDSHAKES", value_name = "N", default_value = "200")]
    max_handshakes: Option<String>,
    /// Streams to one node
    #[arg(long, env = "EDGE_TUNNEL_MAX_STREAMS_PER_NODE", value_name = "N", default_value = "1000")]
    max_streams_per_node: Option<String>,
    /// Streams of one caller's certificate
    #[arg(long, env = "EDGE_TUNNEL_MAX_STREAMS_PER_CALLER", value_name = "N", default_value = "10000")]
    max_streams_per_caller: Option<String>,
    /// /metrics, /healthz, /readyz, /sessions
    #[arg(long, env = "EDGE_TUNNEL_METRICS_LISTEN", value_name = "ADDR", default_value = "127.0.0.1:10267")]
    metrics_listen: Option<String>,
    /// text or json
    #[arg(long, env = "EDGE_TUNNEL_LOG_FORMAT", value_name = "FORMAT", default_value = "text")]
    log_format: Option<String>,
}

/// The configuration as used.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// Where agents dial.
    pub listen: SocketAddr,
    /// The certificate of every TLS listener.
    pub pair: KeyPair,
    /// The CA of agents.
    pub agent_ca: PathBuf,
    /// Where kube-apiserver calls over TLS, and the CA of its certificate.
    pub egress_listen: Option<(SocketAddr, PathBuf)>,
    /// Which certificates of that CA may call; empty for all.
    pub caller_names: Vec<String>,
    /// Where kube-apiserver calls on this machine.
    pub egress_socket: Option<PathBuf>,
    /// The proxy for scrapers.
    pub proxy: Option<ProxyConfig>,
    /// Where connections to nodes come in unopened, and the port of the nodes that they go to.
    pub passthrough: Vec<(SocketAddr, u16)>,
    /// What this replica is called; none: anything.
    pub replica: Option<Id>,
    /// The other replicas, if there can be any.
    pub peers: Option<PeerConfig>,
    /// Where nodes come from.
    pub nodes: NodeSource,
    /// What may be dialled from here.
    pub direct: Vec<Network>,
    /// The bounds.
    pub limits: Limits,
    /// Metrics and probes.
    pub metrics_listen: SocketAddr,
    /// The log's form.
    pub log_format: LogFormat,
}

/// The proxy for scrapers.
#[derive(Debug, Clone)]
pub struct ProxyConfig {
    /// Where it listens over TLS.
    pub listen: Option<SocketAddr>,
    /// Where it listens without, on loopback.
    pub plain_listen: Option<SocketAddr>,
    /// Who may ask.
    pub users: PathBuf,
}

/// How to be one of several replicas.
#[derive(Debug, Clone)]
pub struct PeerConfig {
    /// Where the others dial.
    pub listen: SocketAddr,
    /// Who they are.
    pub peers: Vec<Target>,
    /// The CA of their certificates.
    pub ca: PathBuf,
    /// Our certificate among them.
    pub pair: KeyPair,
    /// Names of which a replica's certificate must carry one: those of our own.
    pub names: Arc<[String]>,
}

/// Where nodes come from.
#[derive(Debug, Clone)]
pub enum NodeSource {
    /// Nowhere: every agent's certificate is believed.
    None,
    /// A file.
    File(PathBuf),
    /// The API server.
    Api(ApiSource),
}

/// Times and numbers that bound what callers and agents can ask for.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// From the CONNECT to the status line.
    pub dial_timeout: Duration,
    /// How long open streams may go on after SIGTERM.
    pub drain: Duration,
    /// Handshakes in flight, each listener.
    pub max_handshakes: usize,
    /// Streams to one node.
    pub max_streams_per_node: usize,
    /// Streams of one caller.
    pub max_streams_per_caller: usize,
}

impl ServerArgs {
    /// Turns what was written into what is used. Reads the files that are named; `in_pod`: there is a service
    /// account to fall back on ([`in_pod`]).
    ///
    /// # Errors
    /// Every mistake there is.
    pub fn check(&self, in_pod: bool) -> Result<ServerConfig, Mistakes> {
        let mut mistakes = Mistakes::default();
        let config = self.checked(in_pod, &mut mistakes);
        mistakes.none_or(config)
    }

    fn checked(&self, in_pod: bool, mistakes: &mut Mistakes) -> Option<ServerConfig> {
        // Everything is read before anything is missed.
        let listen_at = mistakes.required("--listen", &self.listen, listen);
        let cert = mistakes.required("--tls-cert", &self.tls_cert, path);
        let key = mistakes.required("--tls-key", &self.tls_key, path);
        let agent_ca = mistakes.required("--agent-ca", &self.agent_ca, path);
        let caller_ca = mistakes.optional("--caller-ca", &self.caller_ca, path);
        let egress_listen = mistakes.optional("--egress-listen", &self.egress_listen, listen);
        let egress_socket = mistakes.optional("--egress-socket", &self.egress_socket, path);
        let direct = mistakes
            .every("--direct-cidr", &self.direct_cidr, |text| text.parse().map_err(|why| format!("{why}")));
        let dial_timeout = mistakes.required("--dial-timeout", &self.dial_timeout, wait);
        let drain = mistakes.required("--drain", &self.drain, duration);
        let max_handshakes = mistakes.required("--max-handshakes", &self.max_handshakes, cap);
        let max_streams_per_node =
            mistakes.required("--max-streams-per-node", &self.max_streams_per_node, cap);
        let max_streams_per_caller =
            mistakes.required("--max-streams-per-caller", &self.max_streams_per_caller, cap);
        let metrics_listen = mistakes.required("--metrics-listen", &self.metrics_listen, listen);
        let log_format = mistakes.required("--log-format", &self.log_format, |text| {
            text.parse().map_err(|why| format!("write {why}"))
        });
        let nodes = self.node_source(in_pod, mistakes);
        let replica = mistakes
            .optional("--replica-id", &self.replica_id, |text| Id::parse(text).map_err(|_| NOT_AN_ID.into()));
        let peer_listen = mistakes.optional("--peer-listen", &self.peer_listen, listen);
        let caller_names = mistakes.every("--caller-name", &self.caller_name, |text| Ok(text.to_owned()));

        let proxy = self.proxy(mistakes);
        let passthrough = mistakes.every("--passthrough-listen", &self.passthrough_listen, passthrough);

        let proxied = proxy.iter().flat_map(|proxy| {
            [("--proxy-listen", proxy.listen), ("--proxy-plain-listen", proxy.plain_listen)]
        });
        let passed = passthrough.iter().map(|(address, _)| ("--passthrough-listen", Some(*address)));
        let listeners = [
            ("--listen", listen_at),
            ("--egress-listen", egress_listen),
            ("--peer-listen", peer_listen),
            ("--metrics-listen", metrics_listen),
        ];
        one_listener_each(mistakes, listeners.into_iter().chain(proxied).chain(passed));
        if egress_listen.is_some() && caller_ca.is_none() {
            mistakes.add("--egress-listen needs --caller-ca: who may call?");
        }
        if !caller_names.is_empty() && caller_ca.is_none() {
            mistakes.add("--caller-name needs --caller-ca: it does not apply to --egress-socket");
        }
        let pair = mistakes.key_pair(cert, key);
        for ca in [&agent_ca, &caller_ca].into_iter().flatten() {
            let readable = mistakes.take(certificates(ca));
            if let (Some(pair), Some(_)) = (&pair, readable) {
                mistakes.take(tls::server(pair.clone(), Some(ca.clone()), true));
            }
        }
        if let (Some(agents), Some(callers)) = (&agent_ca, &caller_ca)
            && caller_names.is_empty()
            && share_a_certificate(agents, callers)
        {
            mistakes.add("--caller-name is missing: --caller-ca and --agent-ca have a CA in common, which of its certificates may call?");
        }
        let peers = self.peers(peer_listen, pair.as_ref(), mistakes);
        let egress_listen = match (egress_listen, caller_ca) {
            (Some(address), Some(ca)) => Some((address, ca)),
            _ => None,
        };
        Some(ServerConfig {
            listen: listen_at?,
            pair: pair?,
            agent_ca: agent_ca?,
            egress_listen,
            caller_names,
            egress_socket,
            proxy,
            passthrough,
            replica,
            peers,
            nodes: nodes?,
            direct,
            limits: Limits {
                dial_timeout: dial_timeout?,
                drain: drain?,
                max_handshakes: max_handshakes?,
                max_streams_per_node: max_streams_per_node?,
                max_streams_per_caller: max_streams_per_caller?,
            },
            metrics_listen: metrics_listen?,
            log_format: log_format?,
        })
    }

    fn proxy(&self, mistakes: &mut Mistakes) -> Option<ProxyConfig> {
        let at = mistakes.optional("--proxy-listen", &self.proxy_listen, listen);
        let plain =
            mistakes.optional("--proxy-plain-listen", &self.proxy_plain_listen, |text| match listen(text)? {
                address if address.ip().to_canonical().is_loopback() => Ok(address),
                _ => {
                    Err("passwords would be read on the way; only a loopback address, or --proxy-listen"
                        .into())
                }
            });
        let wanted = given(&self.proxy_listen).is_some() || given(&self.proxy_plain_listen).is_some();
        let Some(users) = given(&self.proxy_users) else {
            if wanted {
                mistakes.add("--proxy-users is missing: who may use the proxy?");
            }
            return None;
        };
        if !wanted {
            mistakes.add("--proxy-users needs --proxy-listen or --proxy-plain-listen");
        }
        mistakes.take(Users::open(users.into()))?;
        Some(ProxyConfig { listen: at, plain_listen: plain, users: users.into() })
    }

    /// `--peer-…`; `pair` is the server's.
    fn peers(
        &self,
        listen: Option<SocketAddr>,
        pair: Option<&KeyPair>,
        mistakes: &mut Mistakes,
    ) -> Option<PeerConfig> {
        let ca = mistakes.optional("--peer-ca", &self.peer_ca, path);
        let peers =
            mistakes.every("--peers", &self.peers, |text| text.parse().map_err(|why| format!("{why}")));
        let (cert, key) = (given(&self.peer_cert), given(&self.peer_key));
        if given(&self.peer_listen).is_none() {
            let named = [
                ("--peers", !self.peers.is_empty()),
                ("--peer-ca", ca.is_some()),
                ("--peer-cert", cert.is_some()),
                ("--peer-key", key.is_some()),
            ];
            for (flag, _) in named.into_iter().filter(|(_, given)| *given) {
                mistakes.add(format_args!("{flag} needs --peer-listen: where do the others dial?"));
            }
            return None;
        }
        if ca.is_none() {
            mistakes.add("--peer-listen needs --peer-ca: who is a replica?");
        }
        let own = match (cert, key) {
            (Some(cert), Some(key)) => mistakes.key_pair(Some(cert.into()), Some(key.into())),
            (None, None) => pair.cloned(),
            _ => {
                mistakes.add("--peer-cert and --peer-key need each other");
                None
            }
        };
        let (own, ca) = (own?, ca?);
        mistakes.take(certificates(&ca))?;
        // The names of the server's certificate are ours as well as those of the one replicas share.
        let leaves = [pair, Some(&own)].into_iter().flatten().map(|pair| tls::leaf(&pair.cert));
        let leaves: Vec<_> = leaves.map(|leaf| mistakes.take(leaf)).collect::<Option<_>>()?;
        let mut names: Vec<_> = leaves.iter().flat_map(|leaf| leaf.alternative_names.clone()).collect();
        names.sort();
        names.dedup();
        let names: Arc<[String]> = names.into();
        if leaves.last().is_some_and(|leaf| !leaf.client_auth) {
            let cert = own.cert.display();
            mistakes.add(format_args!(
                "{cert}: replicas show this certificate as clients too, and its extended key usage lacks clientAuth"
            ));
        }
        mistakes.take(tls::server(own.clone(), Some(ca.clone()), true))?;
        mistakes.take(
            tls::to_replicas(own.clone(), ca.clone(), names.clone())
                .map_err(|why| format!("{}: {why}", own.cert.display())),
        )?;
        Some(PeerConfig { listen: listen?, peers, ca, pair: own, names })
    }

    fn node_source(&self, in_pod: bool, mistakes: &mut Mistakes) -> Option<NodeSource> {
        let kubeconfig = mistakes.optional("--kubeconfig", &self.kubeconfig, |text| {
            kube::config::Kubeconfig::read_from(text).map_err(|error| error.to_string())?;
            path(text)
        });
        let direct = mistakes.optional("--direct-nodes", &self.direct_nodes, selector::parse);
        let file = given(&self.nodes_file);
        let direct_given = given(&self.direct_nodes).is_some();
        match (file, given(&self.kubeconfig)) {
            (Some(_), Some(_)) => {
                mistakes.add("--kubeconfig and --nodes-file are both given: nodes come from one place");
                None
            }
            (Some(file), None) => {
                if direct_given {
                    mistakes.add("--direct-nodes needs labels, and --nodes-file has none: write \"direct\": true there");
                }
                mistakes.take(file::File::open(file.into())).map(|_| NodeSource::File(file.into()))
            }
            (None, Some(_)) => Some(NodeSource::Api(ApiSource { kubeconfig: Some(kubeconfig?), direct })),
            (None, None) if in_pod => Some(NodeSource::Api(ApiSource { kubeconfig: None, direct })),
            (None, None) => {
                if direct_given {
                    mistakes.add("--direct-nodes needs Nodes: give --kubeconfig, or run in a pod");
                }
                Some(NodeSource::None)
            }
        }
    }
}

/// Whether this process runs in a pod that has a service account.
pub fn in_pod() -> bool {
    let token = Path::new("/var/run/secrets/kubernetes.io/serviceaccount/token");
    std::env::var_os("KUBERNETES_SERVICE_HOST").is_some() && token.exists()
}

/// `IP:PORT=NODEPORT`
fn passthrough(text: &str) -> Result<(SocketAddr, u16), String> {
    let (address, port) = text.rsplit_once('=').ok_or("write IP:PORT=NODEPORT, such as :10250=10250")?;
    let port = parse_port(port.as_bytes()).ok_or_else(|| format!("{port:?} is no port"))?;
    Ok((listen(address)?, port))
}

/// Two flags with one address would leave one of them without a listener. Port 0 is a free port each time.
fn one_listener_each<'a>(
    mistakes: &mut Mistakes,
    listeners: impl Iterator<Item = (&'a str, Option<SocketAddr>)>,
) {
    let mut seen: Vec<(&str, SocketAddr)> = Vec::new();
    for (flag, address) in listeners.filter_map(|(flag, address)| Some((flag, address?))) {
        if let Some((other, _)) = seen.iter().find(|(_, other)| *other == address && address.port() != 0) {
            mistakes.add(format_args!("{other} and {flag} are both {address}"));
        }
        seen.push((flag, address));
    }
}

/// Whether a certificate of the one file can be mistaken for one of the other's.
fn share_a_certificate(one: &Path, other: &Path) -> bool {
    let certificates = |path| certificates(path).unwrap_or_default();
    !certificates(one).is_disjoint(&certificates(other))
}

#[cfg(test)]
mod tests;
