//! `edge-tunnel agent`: dials the server, keeps a session, and dials on the node what the server asks for and the
//! allow-list permits.
//!
//! [`keeper`] decides when to dial and what to leave, [`connect`] makes one connection, [`session`] serves what comes
//! over it, [`backoff`] says how long to wait.

pub mod backoff;
pub mod connect;
pub mod keeper;
pub mod session;
pub mod status;

use crate::{
    config::agent::AgentConfig,
    hello::Id,
    http, listen,
    metrics::Metrics,
    policy::Policy,
    tls::{self, ClientTls},
};
use keeper::{Keeper, State};
use session::Node;
use std::{
    future::Future,
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::{
    net::TcpListener,
    sync::watch,
    task::JoinSet,
    time::{sleep, timeout},
};

/// How long streams that are cut may take to reset their sockets.
const CUT: Duration = Duration::from_secs(1);

/// An agent that is ready to run.
pub struct Agent {
    pages: TcpListener,
    dialler: Arc<Dialler>,
}

/// What it takes to make connections and to serve them.
pub struct Dialler {
    /// The configuration.
    pub config: AgentConfig,
    /// Our certificate and the server's CA.
    pub tls: ClientTls,
    /// The node we are on.
    pub node: Node,
    /// This run of the agent.
    pub instance: Id,
}

impl Agent {
    /// Reads the files, and listens for probes.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn new(config: AgentConfig) -> Result<Self, String> {
        let tls = tls::client(config.pair.clone(), config.server_ca.clone())?;
        let leaf = &tls.get().leaf;
        let name = leaf.node().map_err(|why| format!("{}: {why}", config.pair.cert.display()))?;
        let metrics = Arc::new(Metrics::agent());
        metrics.expires(&config.pair.cert, leaf.not_after);
        let policy = Policy::new(config.kubelet, &config.allow);
        let node = Node { name, policy, streams: AtomicUsize::new(0), metrics };
        let pages = listen::tcp(config.metrics_listen).map_err(|error| error.to_string())?;
        let instance = Id::random(&mut fastrand::Rng::new());
        Ok(Self { pages, dialler: Arc::new(Dialler { config, tls, node, instance }) })
    }

    /// Where probes and people ask.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn pages_address(&self) -> io::Result<SocketAddr> {
        self.pages.local_addr()
    }

    /// Runs until `stop`, then until its streams have ended, at most `--drain`.
    pub async fn run(self, stop: impl Future<Output = ()>) {
        let dialler = self.dialler;
        let state = watch::Sender::new(State::default());
        let status = status::AgentStatus { metrics: dialler.node.metrics.clone(), state: state.subscribe() };
        let mut beside = JoinSet::new();
        beside.spawn(http::serve(self.pages, Arc::new(status)));
        beside.spawn(dialler.clone().follow_files());
        let mut keeper = Keeper::new(dialler.clone(), state);
        tokio::select! {
            () = stop => {}
            () = keeper.keep() => {}
        }
        keeper.leave();
        let idle = async || {
            while dialler.node.streams.load(Relaxed) > 0 {
                sleep(Duration::from_millis(50)).await;
            }
        };
        if timeout(dialler.config.drain, idle()).await.is_err() {
            log::warn!("cutting the streams that are left");
            drop(keeper);
            // They get to say so to the kubelet.
            let _ = timeout(CUT, idle()).await;
        }
    }
}

impl Dialler {
    async fn follow_files(self: Arc<Self>) {
        let (metrics, cert) = (&self.node.metrics, &self.config.pair.cert);
        let mut changes = self.tls.changes();
        let tell = async {
            while changes.changed().await.is_ok() {
                metrics.expires(cert, self.tls.get().leaf.not_after);
            }
        };
        tokio::join!(self.tls.follow(|_| metrics.reload_failed(cert)), tell);
    }
}
