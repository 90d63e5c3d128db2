//! Many replicas, one server: any of them serves any node.
//!
//! Every replica dials every other ([`mesh`]) and answers those that dial it ([`listen`]). Over the connection that A
//! made to B, B tells A which agents it has ([`news`]), and A has B open streams to them: one hop, because what B
//! answers with is its own sessions alone. What A knows of B lives exactly as long as that connection, so there is no
//! state to reconcile, and no clock. Which session gets a dial, here or there, is decided in [`choose`], alike on every
//! replica.
//!
//! A replica is whoever shows a certificate of `--peer-ca` with a name of our own ([`crate::tls::identity`]). An agent's
//! or a caller's does not count here, and neither does a replica's there.

pub mod choose;
pub mod listen;
pub mod mesh;
pub mod news;

use crate::{
    carrier::{
        h2::{
            Opener,
            peer::{Introduction, Order},
        },
        link::Heard,
        pipe::Pipe,
    },
    hello::Id,
    metrics::Metrics,
    refusal::{Reason, Refusal},
    target::Name,
};
use bytes::Bytes;
use choose::Fitness;
use news::{Hold, Line, NotNews, Table};
use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard},
    time::Duration,
};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};

/// A replica that has been silent for this long gets no new dials while there is another way. It is asked every second.
const SILENT: Duration = Duration::from_secs(3);

/// How often a dial that waits for a replica looks whether that has fallen silent.
const LOOK: Duration = Duration::from_millis(500);

/// After this a replica is ready, whoever has not been heard of.
pub const SETTLED: Duration = Duration::from_secs(5);

/// The replicas that this one is connected to.
#[derive(Debug)]
pub struct Peers {
    /// Who we are.
    pub me: Introduction,
    connected: RwLock<Vec<Arc<Peer>>>,
    /// How many replicas there are, this one and those that are not going away.
    replicas: watch::Sender<usize>,
    settled: watch::Sender<bool>,
    metrics: Arc<Metrics>,
}

/// Another replica, for as long as the connection to it lasts.
pub struct Peer {
    /// Who it is.
    pub who: Introduction,
    /// Where it was dialled.
    pub remote: SocketAddr,
    opener: Opener,
    heard: Arc<Heard>,
    table: Mutex<Table>,
}

impl std::fmt::Debug for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Peer").field("who", &self.who).field("remote", &self.remote).finish_non_exhaustive()
    }
}

/// A session with another replica.
#[derive(Debug)]
pub struct Elsewhere {
    /// Which replica.
    pub peer: Arc<Peer>,
    /// Which agent.
    pub hold: Hold,
    /// Its chances.
    pub fitness: Fitness,
}

impl Peers {
    /// A replica that knows of no other. `alone`: nor will it.
    pub fn new(me: Introduction, alone: bool, metrics: Arc<Metrics>) -> Self {
        let (replicas, settled) = (watch::Sender::new(1), watch::Sender::new(alone));
        Self { me, connected: RwLock::default(), replicas, settled, metrics }
    }

    /// Whether any other replica has a session with this node.
    pub fn present(&self, node: &str) -> bool {
        self.connected().iter().any(|peer| !peer.table().holds(node).is_empty())
    }

    /// The node's sessions with other replicas.
    pub fn sessions(&self, node: &str) -> Vec<Elsewhere> {
        let of = |peer: &Arc<Peer>| {
            let table = peer.table();
            let fitness = match () {
                () if peer.is_silent() => Fitness::Doubtful,
                () if table.is_draining() => Fitness::Draining,
                () => Fitness::Good,
            };
            let holds = table.holds(node).to_vec();
            let session = |hold| Elsewhere { peer: peer.clone(), hold, fitness };
            holds.into_iter().map(session).collect::<Vec<_>>()
        };
        self.connected().iter().flat_map(of).collect()
    }

    /// Whether this agent has a session with another replica that stays.
    pub fn stays_elsewhere(&self, node: &Name, instance: &Id) -> bool {
        let there = self.sessions(node.as_str());
        there.iter().any(|other| other.fitness == Fitness::Good && other.hold.instance == *instance)
    }

    /// How many replicas there are, this one and those that are connected and not going away.
    pub fn replicas(&self) -> watch::Receiver<usize> {
        self.replicas.subscribe()
    }

    /// Whether every other replica that can be reached has told what it has; true after [`SETTLED`] in any case.
    pub fn is_settled(&self) -> bool {
        *self.settled.borrow()
    }

    fn is_connected(&self, run: &Id) -> bool {
        self.connected().iter().any(|peer| peer.who.run == *run)
    }

    /// Enters a replica; none when it is connected already.
    fn enter(self: &Arc<Self>, peer: Arc<Peer>) -> Option<Entered> {
        let mut connected = self.connected.write().unwrap_or_else(PoisonError::into_inner);
        if connected.iter().any(|other| other.who.run == peer.who.run) {
            return None;
        }
        connected.push(peer.clone());
        drop(connected);
        self.count();
        Some(Entered { peers: self.clone(), peer })
    }

    fn count(&self) {
        self.replicas.send_if_modified(|replicas| {
            let connected = self.connected();
            self.metrics.peers(connected.len());
            let staying = connected.iter().filter(|peer| !peer.table().is_draining()).count();
            std::mem::replace(replicas, staying + 1) != staying + 1
        });
    }

    fn connected(&self) -> RwLockReadGuard<'_, Vec<Arc<Peer>>> {
        self.connected.read().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A replica's place among those that are connected, left by dropping it: nothing of what it told counts any more.
struct Entered {
    peers: Arc<Peers>,
    peer: Arc<Peer>,
}

impl Drop for Entered {
    fn drop(&mut self) {
        let mut connected = self.peers.connected.write().unwrap_or_else(PoisonError::into_inner);
        connected.retain(|other| !Arc::ptr_eq(other, &self.peer));
        drop(connected);
        self.peers.count();
    }
}

impl Entered {
    /// Takes in what the replica tells; whether everything has been told.
    fn take(&self, line: Line) -> Result<bool, NotNews> {
        let counts = line == Line::Draining;
        let mut table = self.peer.table();
        table.take(line)?;
        let complete = table.is_complete();
        drop(table);
        if counts {
            self.peers.count();
        }
        Ok(complete)
    }
}

impl Peer {
    /// Has it open a stream. `order` names one of its agents.
    ///
    /// # Errors
    /// Its refusal; `no-session` when it is lost or falls silent meanwhile.
    pub async fn forward(&self, order: &Order, patience: Duration, early: Bytes) -> Result<Pipe, Refusal> {
        tokio::select! {
            forwarded = self.opener.forward(order, patience, early) => forwarded,
            () = self.falls_silent() => {
                let why = format_args!("replica {}, which has the session of {}, is silent", self.who.replica, order.node);
                Err(Refusal::new(Reason::NoSession, why))
            }
        }
    }

    /// Whether nothing has been heard of it for some seconds.
    pub fn is_silent(&self) -> bool {
        self.heard.last().elapsed() > SILENT
    }

    /// The last round trip that was measured.
    pub fn round_trip(&self) -> Option<Duration> {
        self.opener.path.round_trip()
    }

    async fn falls_silent(&self) {
        if self.is_silent() {
            // It has been chosen for want of another.
            return std::future::pending().await;
        }
        while !self.is_silent() {
            sleep(LOOK).await;
        }
    }

    fn table(&self) -> std::sync::MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ends a wait for what another replica should do at once.
async fn soon<T>(
    time: Duration,
    what: &str,
    future: impl Future<Output = Result<T, String>>,
) -> Result<T, String> {
    match timeout(time, future).await {
        Ok(done) => done,
        Err(_) => Err(format!("{what}: no answer within {} s", time.as_secs())),
    }
}
