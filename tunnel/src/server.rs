//! `edge-tunnel server`: listeners, sessions and front ends put together, and how they end.
//!
//! [`Server::bind`] opens everything that can fail, [`Server::run`] serves until it is told to stop and then drains:
//! agents are told to move at once, new dials are served for five seconds more, streams that stand have until `--drain`.

pub mod agents;
pub mod status;

use crate::{
    carrier::h2::peer::Introduction,
    config::server::{NodeSource, PeerConfig, ServerConfig},
    frontend::{
        egress,
        gate::{Gate, Phase},
        passthrough,
        proxy::{self, Proxy},
    },
    hello::Id,
    http,
    listen::{self, Handshakes, UnixSocket},
    metrics::Metrics,
    nodes::{Nodes, file},
    peers::{self, Peers, mesh::Mesh},
    proxy::users::Users,
    sessions::{Sessions, session::Session},
    tls::{self, ServerTls},
};
use agents::Agents;
use futures_util::future::join_all;
use std::{
    future::Future,
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
    task::JoinSet,
    time::{Instant, sleep, sleep_until, timeout, timeout_at},
};

/// New dials are served for this long after SIGTERM, while others learn that we are going.
const GRACE: Duration = Duration::from_secs(5);

/// Replicas come and go together; agents are told once of what happens within this time.
const COLLECT: Duration = Duration::from_millis(500);

/// How long streams that are cut may take to reset their sockets.
const CUT: Duration = Duration::from_secs(1);

/// A server that listens.
pub struct Server {
    config: ServerConfig,
    agents: (TcpListener, Arc<ServerTls>),
    egress: Option<(TcpListener, Arc<ServerTls>)>,
    socket: Option<UnixSocket>,
    scrapers: Option<Scrapers>,
    passthrough: Vec<(TcpListener, u16)>,
    peer_listener: Option<TcpListener>,
    pages: TcpListener,
    nodes: watch::Sender<Arc<Nodes>>,
    phase: watch::Sender<Phase>,
    gate: Arc<Gate>,
}

/// The proxy's listeners.
struct Scrapers {
    tls: Option<(TcpListener, Arc<ServerTls>)>,
    plain: Option<TcpListener>,
    proxy: Arc<Proxy>,
    users: PathBuf,
}

impl Server {
    /// Reads the files and opens the listeners.
    ///
    /// # Errors
    /// The first that fails.
    pub fn bind(config: ServerConfig) -> io::Result<Self> {
        let server_tls = |ca: Option<&PathBuf>, alpn| {
            let tls = tls::server(config.pair.clone(), ca.cloned(), alpn);
            tls.map(Arc::new).map_err(io::Error::other)
        };
        let agents = (listen::tcp(config.listen)?, server_tls(Some(&config.agent_ca), true)?);
        let egress = match &config.egress_listen {
            Some((address, ca)) => Some((listen::tcp(*address)?, server_tls(Some(ca), false)?)),
            None => None,
        };
        let socket = config.egress_socket.as_deref().map(listen::unix).transpose()?;
        let peer_listener = match &config.peers {
            Some(peers) => Some(listen::tcp(peers.listen)?),
            None => None,
        };
        let pages = listen::tcp(config.metrics_listen)?;
        let first = match &config.nodes {
            NodeSource::None => Nodes::without_source(),
            NodeSource::File(_) | NodeSource::Api(_) => Nodes::default(),
        };
        let (nodes, known) = watch::channel(Arc::new(first));
        let phase = watch::Sender::new(Phase::Serving);
        let metrics = Arc::new(Metrics::server());
        let sessions = Arc::new(Sessions::default());
        let (direct, limits) = (config.direct.clone(), config.limits);
        let mut random = fastrand::Rng::new();
        let replica = config.replica.clone().unwrap_or_else(|| Id::random(&mut random));
        let port =
            peer_listener.as_ref().map_or(Ok(0), |listener| listener.local_addr().map(|at| at.port()))?;
        let me = Introduction { replica, run: Id::random(&mut random), port };
        let peers = Arc::new(Peers::new(me, config.peers.is_none(), metrics.clone()));
        let gate = Arc::new(Gate::new(known, sessions, peers, direct, limits, metrics, phase.subscribe()));
        let scrapers = match &config.proxy {
            Some(proxy) => Some(Scrapers {
                tls: match proxy.listen {
                    Some(address) => Some((listen::tcp(address)?, server_tls(None, false)?)),
                    None => None,
                },
                plain: proxy.plain_listen.map(listen::tcp).transpose()?,
                proxy: Arc::new(Proxy {
                    gate: gate.clone(),
                    users: Users::open(proxy.users.clone()).map_err(io::Error::other)?,
                }),
                users: proxy.users.clone(),
            }),
            None => None,
        };
        let passthrough = config.passthrough.iter();
        let passthrough = passthrough.map(|&(address, port)| Ok((listen::tcp(address)?, port)));
        let passthrough = passthrough.collect::<io::Result<_>>()?;
        Ok(Self {
            config,
            agents,
            egress,
            socket,
            scrapers,
            passthrough,
            peer_listener,
            pages,
            nodes,
            phase,
            gate,
        })
    }

    /// Where agents dial, when the port was left to the kernel.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn agents_address(&self) -> io::Result<SocketAddr> {
        self.agents.0.local_addr()
    }

    /// Where callers dial over TLS.
    pub fn egress_address(&self) -> Option<SocketAddr> {
        self.egress.as_ref().and_then(|(listener, _)| listener.local_addr().ok())
    }

    /// Where scrapers ask, over TLS and plainly.
    pub fn proxy_addresses(&self) -> [Option<SocketAddr>; 2] {
        let scrapers = self.scrapers.as_ref();
        let tls = scrapers.and_then(|scrapers| scrapers.tls.as_ref()).map(|(listener, _)| listener);
        let plain = scrapers.and_then(|scrapers| scrapers.plain.as_ref());
        [tls, plain].map(|listener| listener?.local_addr().ok())
    }

    /// Where connections come in unopened, in the order of the configuration.
    pub fn passthrough_addresses(&self) -> Vec<SocketAddr> {
        self.passthrough.iter().filter_map(|(listener, _)| listener.local_addr().ok()).collect()
    }

    /// Where probes and people ask.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn pages_address(&self) -> io::Result<SocketAddr> {
        self.pages.local_addr()
    }

    /// Where other replicas dial.
    pub fn peers_address(&self) -> Option<SocketAddr> {
        self.peer_listener.as_ref().and_then(|listener| listener.local_addr().ok())
    }

    /// What the front ends share: who is connected, which nodes there are, what is counted.
    pub fn gate(&self) -> Arc<Gate> {
        self.gate.clone()
    }

    /// Serves until `stop`, then drains.
    ///
    /// # Errors
    /// When the source of nodes cannot be opened.
    pub async fn run(self, stop: impl Future<Output = ()>) -> io::Result<()> {
        let mut tasks = JoinSet::new();
        self.follow_nodes(&mut tasks).await?;
        let (gate, cap) = (&self.gate, self.config.limits.max_handshakes);
        let agents = Arc::new(Agents {
            sessions: gate.sessions.clone(),
            nodes: gate.nodes.clone(),
            metrics: gate.metrics.clone(),
            peers: gate.peers.clone(),
        });
        let status = Arc::new(status::ServerStatus { gate: gate.clone() });
        tasks.spawn(http::serve(self.pages, status));
        let (listener, tls) = self.agents;
        follow_files(&mut tasks, &tls, &gate.metrics, &self.config.pair.cert);
        tasks.spawn(async move { agents.listen(&listener, &Handshakes::new(cap), &tls).await });
        if let Some((listener, tls)) = self.egress {
            follow_files(&mut tasks, &tls, &gate.metrics, &self.config.pair.cert);
            let (gate, names): (_, Arc<[String]>) = (gate.clone(), self.config.caller_names.into());
            tasks.spawn(
                async move { egress::tls(&listener, &Handshakes::new(cap), &tls, &names, &gate).await },
            );
        }
        if let Some(socket) = self.socket {
            let gate = gate.clone();
            tasks.spawn(async move { egress::unix(&socket, &gate).await });
        }
        if let Some(scrapers) = self.scrapers {
            scrapers.serve(&mut tasks, &gate.metrics, &self.config.pair.cert, cap);
        }
        for (listener, port) in self.passthrough {
            let gate = gate.clone();
            tasks.spawn(
                async move { passthrough::listen(&listener, &Handshakes::new(cap), port, &gate).await },
            );
        }
        let (sessions, metrics, mut nodes) =
            (gate.sessions.clone(), gate.metrics.clone(), gate.nodes.clone());
        tasks.spawn(async move {
            loop {
                let list = nodes.borrow_and_update().clone();
                metrics.nodes(list.len());
                sessions.keep_only(&list);
                if nodes.changed().await.is_err() {
                    return;
                }
            }
        });
        if let (Some(config), Some(listener)) = (self.config.peers, self.peer_listener) {
            join(&mut tasks, gate, config, listener, cap)?;
        }
        stop.await;
        drain(gate, &self.phase, self.config.limits.drain).await;
        Ok(())
    }

    async fn follow_nodes(&self, tasks: &mut JoinSet<()>) -> io::Result<()> {
        let (nodes, metrics) = (self.nodes.clone(), self.gate.metrics.clone());
        match self.config.nodes.clone() {
            NodeSource::None => {}
            NodeSource::File(path) => {
                let file = file::File::open(path.clone()).map_err(io::Error::other)?;
                nodes.send_replace(file.nodes());
                tasks.spawn(async move { file.follow(nodes, |_| metrics.reload_failed(&path)).await });
            }
            NodeSource::Api(source) => {
                let client = source.client().await.map_err(io::Error::other)?;
                tasks.spawn(source.follow(client, nodes));
            }
        }
        Ok(())
    }
}

impl Scrapers {
    fn serve(self, tasks: &mut JoinSet<()>, metrics: &Arc<Metrics>, cert: &Path, cap: usize) {
        let Self { tls, plain, proxy, users } = self;
        if let Some((listener, tls)) = tls {
            follow_files(tasks, &tls, metrics, cert);
            let proxy = proxy.clone();
            tasks.spawn(async move { proxy::tls(&listener, &Handshakes::new(cap), &tls, &proxy).await });
        }
        if let Some(listener) = plain {
            let proxy = proxy.clone();
            tasks.spawn(async move { proxy::plain(&listener, &Handshakes::new(cap), &proxy).await });
        }
        let metrics = metrics.clone();
        tasks.spawn(async move { proxy.users.follow(|_| metrics.reload_failed(&users)).await });
    }
}

/// Becomes one of several replicas.
fn join(
    tasks: &mut JoinSet<()>,
    gate: &Arc<Gate>,
    config: PeerConfig,
    listener: TcpListener,
    cap: usize,
) -> io::Result<()> {
    let PeerConfig { peers: names, ca, pair, names: ours, .. } = config;
    let tls = tls::server(pair.clone(), Some(ca.clone()), true).map_err(io::Error::other)?;
    let tls = Arc::new(tls);
    follow_files(tasks, &tls, &gate.metrics, &pair.cert);
    let out = Arc::new(tls::to_replicas(pair.clone(), ca, ours.clone()).map_err(io::Error::other)?);
    let (back, who) = mpsc::channel(16);
    let (peers, sessions) = (gate.peers.clone(), gate.sessions.clone());
    let listen =
        Arc::new(peers::listen::Listen { peers: peers.clone(), gate: gate.clone(), names: ours, back });
    tasks.spawn(async move { listen.listen(&listener, &Handshakes::new(cap), &tls).await });
    let mesh = Mesh { peers: peers.clone(), sessions: sessions.clone(), names, tls: out.clone() };
    tasks.spawn(mesh.keep(who));
    let (metrics, cert) = (gate.metrics.clone(), pair.cert);
    tasks.spawn(async move { out.follow(|_| metrics.reload_failed(&cert)).await });
    // Agents look for another replica when there is one more.
    tasks.spawn(async move {
        let mut replicas = peers.replicas();
        while replicas.changed().await.is_ok() {
            sleep(COLLECT).await;
            let count = *replicas.borrow_and_update();
            log::info!("{count} replicas");
            let sessions = sessions.list();
            let told = join_all(sessions.iter().map(|session| session.tell_replicas(count)));
            let _ = timeout(GRACE, told).await;
        }
    });
    Ok(())
}

/// Follows the files of a listener, and tells when its certificate expires.
fn follow_files(tasks: &mut JoinSet<()>, tls: &Arc<ServerTls>, metrics: &Arc<Metrics>, cert: &Path) {
    let (tls, metrics, cert) = (tls.clone(), metrics.clone(), cert.to_owned());
    tasks.spawn(async move {
        let mut changes = tls.changes();
        let tell = async {
            loop {
                metrics.expires(&cert, tls.get().leaf.not_after);
                if changes.changed().await.is_err() {
                    return;
                }
            }
        };
        tokio::join!(tls.follow(|_| metrics.reload_failed(&cert)), tell);
    });
}

/// Lets everything come to its end. The listeners go on meanwhile.
async fn drain(gate: &Gate, phase: &watch::Sender<Phase>, most: Duration) {
    let deadline = Instant::now() + most;
    log::info!("going away: agents are told to move, streams have {} s", most.as_secs());
    gate.sessions.drain();
    let sessions = gate.sessions.list();
    let told = join_all(sessions.iter().map(|session| session.ask_to_move()));
    let grace = Instant::now() + GRACE.min(most);
    let _ = timeout_at(grace, told).await;
    sleep_until(grace).await;
    let elsewhere = async || {
        let stays = |session: &Arc<Session>| gate.peers.stays_elsewhere(&session.node, &session.instance);
        while !gate.sessions.list().iter().all(stays) {
            sleep(Duration::from_millis(100)).await;
        }
    };
    if *gate.peers.replicas().borrow() > 1 {
        // A load balancer with source affinity sends agents away only when it has noticed that we go.
        let _ = timeout_at(deadline - most / 2, elsewhere()).await;
    }
    phase.send_replace(Phase::Draining);
    let quiet = async || {
        while gate.is_busy() {
            sleep(Duration::from_millis(50)).await;
        }
    };
    if timeout_at(deadline, quiet()).await.is_err() {
        log::warn!("cutting the streams that are left");
        phase.send_replace(Phase::Cut);
        let _ = timeout(CUT, quiet()).await;
    }
}
