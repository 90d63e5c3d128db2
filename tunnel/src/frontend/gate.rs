//! The gate: decides about a target, and connects to it or says why not. Front ends hand it what callers asked for.
//!
//! One budget bounds everything from the request to the status line. The agent gets less of it than there is, so that
//! a kubelet that does not answer (`timeout`, said by the agent) and an agent that does not (`agent-timeout`) are told
//! apart.

use crate::{
    carrier::{h2::peer::Order, pipe::Pipe},
    config::server::Limits,
    dial,
    metrics::Metrics,
    network::Network,
    nodes::{Current, Owner},
    peers::{
        Elsewhere, Peer, Peers,
        choose::{self, Candidate, Fitness},
    },
    refusal::{Reason, Refusal},
    relay::Meter,
    route::{Router, Way},
    sessions::{
        Sessions,
        session::{Session, Stream},
    },
    target::{Host, Name, Target},
};
use bytes::Bytes;
use std::{
    collections::HashMap,
    future::Future,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::{
    net::TcpStream,
    sync::watch,
    time::{Instant, sleep, timeout_at},
};

/// Decides, and connects.
pub struct Gate {
    /// The nodes there are.
    pub nodes: Current,
    /// Who is connected.
    pub sessions: Arc<Sessions>,
    /// The other replicas, and who is connected there.
    pub peers: Arc<Peers>,
    /// Networks that are dialled from here.
    pub direct: Vec<Network>,
    /// Bounds.
    pub limits: Limits,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// How far the server's end has come.
    pub phase: watch::Receiver<Phase>,
    callers: Mutex<HashMap<Arc<str>, usize>>,
}

/// How far the server's end has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// It serves.
    Serving,
    /// No new dials any more.
    Draining,
    /// Streams that stand are cut.
    Cut,
}

/// The far side of a connection that stands.
#[derive(Debug)]
pub enum Far {
    /// A stream through a node's agent.
    Session(Pipe),
    /// A socket that was dialled from here.
    Direct(TcpStream),
}

/// Counts what passes.
pub struct Account {
    bytes_in: AtomicU64,
    bytes_out: AtomicU64,
    stream: Option<Stream>,
    metrics: Arc<Metrics>,
}

/// One of a caller's connections; leaves the count when it is dropped.
pub struct Slot<'a> {
    gate: &'a Gate,
    caller: Arc<str>,
}

impl Gate {
    /// A gate.
    pub fn new(
        nodes: Current,
        sessions: Arc<Sessions>,
        peers: Arc<Peers>,
        direct: Vec<Network>,
        limits: Limits,
        metrics: Arc<Metrics>,
        phase: watch::Receiver<Phase>,
    ) -> Self {
        Self { nodes, sessions, peers, direct, limits, metrics, phase, callers: Mutex::default() }
    }

    /// Takes one of the caller's places.
    ///
    /// # Errors
    /// `too-many` at its cap, `draining` when the server is going away.
    pub fn admit(&self, caller: &Arc<str>) -> Result<Slot<'_>, Refusal> {
        if *self.phase.borrow() >= Phase::Draining {
            return Err(Reason::Draining.into());
        }
        let mut callers = self.callers.lock().unwrap_or_else(PoisonError::into_inner);
        let count = callers.entry(caller.clone()).or_default();
        if *count >= self.limits.max_streams_per_caller {
            let cap = self.limits.max_streams_per_caller;
            return Err(Refusal::new(
                Reason::TooMany,
                format_args!("{caller} has {cap} connections already"),
            ));
        }
        *count += 1;
        Ok(Slot { gate: self, caller: caller.clone() })
    }

    /// Whether any caller is connected.
    pub fn is_busy(&self) -> bool {
        !self.callers.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// Counts a refusal.
    pub fn refused(&self, reason: Reason) {
        self.metrics.refused(reason);
    }

    /// Ready when streams that stand are to be cut.
    pub async fn cut(&self) {
        let mut phase = self.phase.clone();
        if phase.wait_for(|phase| *phase == Phase::Cut).await.is_err() {
            std::future::pending().await
        }
    }

    /// Connects to a target for a caller. `early` is sent along where there is a way to; `node` is told as soon as it is
    /// known.
    ///
    /// # Errors
    /// Why not, within the dial timeout of `start`.
    pub async fn connect(
        &self,
        caller: &str,
        target: &Target,
        early: Bytes,
        start: Instant,
        node: &mut Option<Name>,
    ) -> Result<(Far, Account), Refusal> {
        let deadline = self.deadline(start);
        let way = self.decide(target, deadline).await.inspect_err(|_| *node = self.whose(target))?;
        self.go(caller, way, target, early, deadline, node).await
    }

    /// Connects to a node and to nothing else: for those who show neither certificate nor password.
    ///
    /// # Errors
    /// As [`Gate::connect`]; `unknown-node` for whatever is no node's name.
    pub async fn connect_to_node(
        &self,
        caller: &str,
        target: &Target,
        early: Bytes,
        start: Instant,
        node: &mut Option<Name>,
    ) -> Result<(Far, Account), Refusal> {
        let way = self.to_node(target)?;
        self.go(caller, way, target, early, self.deadline(start), node).await
    }

    fn to_node(&self, target: &Target) -> Result<Way, Refusal> {
        let nodes = self.nodes.borrow().clone();
        let present = |node: &Name| self.present(node);
        let way = Router { nodes: &nodes, direct: &[], present: &present }.route(target)?;
        match (&target.host, way) {
            (Host::Name(_), way @ (Way::Session { .. } | Way::Direct { node: Some(_), .. })) => Ok(way),
            (host, _) => Err(Refusal::new(Reason::UnknownNode, format_args!("there is no node {host}"))),
        }
    }

    /// A hair less than was promised, so that the promise is kept on a busy machine too.
    fn deadline(&self, start: Instant) -> Instant {
        start + self.limits.dial_timeout.mul_f32(0.98)
    }

    async fn go(
        &self,
        caller: &str,
        way: Way,
        target: &Target,
        early: Bytes,
        deadline: Instant,
        node: &mut Option<Name>,
    ) -> Result<(Far, Account), Refusal> {
        match way {
            Way::Session { node: name, ask } => {
                *node = Some(name.clone());
                self.through_agent(caller, &name, &ask, early, deadline).await
            }
            Way::Direct { node: name, addresses } => {
                node.clone_from(&name);
                self.directly(target, &addresses, deadline).await
            }
            // Router::resolved answers with one of the other two.
            Way::Resolve(_) => Err(Reason::UnknownNode.into()),
        }
    }

    /// Whether an agent of this node is connected, to whichever replica.
    fn present(&self, node: &Name) -> bool {
        self.sessions.present(node.as_str()) || self.peers.present(node.as_str())
    }

    /// The node that a target is on, for the audit line of a refusal: none when there is no such node, or more than one.
    fn whose(&self, target: &Target) -> Option<Name> {
        let nodes = self.nodes.borrow();
        let named = match &target.host {
            Host::Name(name) => nodes.named(name),
            Host::Address(_) => None,
        };
        match nodes.edge(&target.host) {
            _ if named.is_some() => named.map(|node| node.name.clone()),
            Owner::One(node) => Some(node.name.clone()),
            Owner::Nobody | Owner::Several(_) => None,
        }
    }

    async fn decide(&self, target: &Target, deadline: Instant) -> Result<Way, Refusal> {
        let nodes = self.nodes.borrow().clone();
        let present = |node: &Name| self.present(node);
        let router = || Router { nodes: &nodes, direct: &self.direct, present: &present };
        let way = router().route(target)?;
        let Way::Resolve(name) = way else { return Ok(way) };
        let lookup = tokio::net::lookup_host((name.as_str(), target.port));
        let addresses: Vec<_> = match timeout_at(deadline, lookup).await {
            Ok(Ok(found)) => found.map(|address| address.ip()).collect(),
            Ok(Err(_)) => Vec::new(),
            Err(_) => {
                return Err(Refusal::new(Reason::Timeout, format_args!("looking up {name} took too long")));
            }
        };
        router().resolved(&name, target.port, &addresses)
    }

    /// Tries the node's sessions, here and with other replicas, the best first. One that is lost or takes no new streams
    /// is followed by the next; when none is left, by the one that its agent makes: with a renewed certificate it has
    /// that within a few round trips.
    async fn through_agent(
        &self,
        caller: &str,
        node: &Name,
        ask: &Target,
        early: Bytes,
        deadline: Instant,
    ) -> Result<(Far, Account), Refusal> {
        const WAIT: Duration = Duration::from_secs(2);
        const LOOK: Duration = Duration::from_millis(20);
        let opening = Instant::now();
        let mut lost = no_session(node);
        loop {
            for way in self.ways(node) {
                let opened = match &way {
                    To::Session(session) => self.open(session, ask, early.clone(), deadline).await,
                    To::Peer(other) => {
                        let (node, instance) = (node.clone(), other.hold.instance.clone());
                        let order = Order { node, instance, target: ask.clone(), caller: caller.into() };
                        self.forward(&other.peer, &order, early.clone(), deadline).await
                    }
                };
                match opened {
                    Ok((pipe, account)) => {
                        self.metrics.dialled(opening.elapsed());
                        return Ok((Far::Session(pipe), account));
                    }
                    // What went along may have arrived: then it is not said twice.
                    Err(refusal) if way.may_be_followed(refusal.reason) && early.is_empty() => lost = refusal,
                    Err(refusal) => return Err(refusal),
                }
            }
            if Instant::now() + LOOK > deadline.min(opening + WAIT) {
                return Err(lost);
            }
            sleep(LOOK).await;
        }
    }

    /// The node's sessions, the one to try first in front.
    fn ways(&self, node: &Name) -> Vec<To> {
        let here = self.sessions.of(node.as_str());
        let elsewhere = self.peers.sessions(node.as_str());
        let own = here.iter().map(|session| Candidate {
            epoch: session.epoch(),
            instance: &session.instance,
            replica: &self.peers.me.replica,
            here: true,
            fitness: if session.is_leaving() { Fitness::Doubtful } else { Fitness::Good },
        });
        let others = elsewhere.iter().map(|other| Candidate {
            epoch: other.hold.epoch,
            instance: &other.hold.instance,
            replica: &other.peer.who.replica,
            here: false,
            fitness: other.fitness,
        });
        let candidates: Vec<_> = own.chain(others).collect();
        let order = choose::order(&candidates, &mut fastrand::Rng::new());
        let mut ways: Vec<_> = here.iter().cloned().map(To::Session).map(Some).collect();
        ways.extend(elsewhere.into_iter().map(|other| Some(To::Peer(other))));
        order.into_iter().filter_map(|at| ways[at].take()).collect()
    }

    /// Opens a stream through a session of this replica.
    ///
    /// # Errors
    /// `too-many`, what the agent says, `no-session` when it is lost or takes no new streams, `agent-timeout`.
    pub async fn open(
        &self,
        session: &Arc<Session>,
        ask: &Target,
        early: Bytes,
        deadline: Instant,
    ) -> Result<(Pipe, Account), Refusal> {
        let patience = patience(deadline, session.round_trip());
        let most = self.limits.max_streams_per_node;
        match answered(deadline, &session.node, session.open(ask, most, patience, early)).await {
            Ok((pipe, stream)) => Ok((pipe, Account::new(Some(stream), &self.metrics))),
            Err(refusal) => {
                if refusal.reason == Reason::NoSession {
                    self.sessions.changed(&session.node);
                }
                Err(refusal)
            }
        }
    }

    /// Has another replica open a stream.
    async fn forward(
        &self,
        peer: &Peer,
        order: &Order,
        early: Bytes,
        deadline: Instant,
    ) -> Result<(Pipe, Account), Refusal> {
        let patience = patience(deadline, peer.round_trip());
        let pipe = answered(deadline, &order.node, peer.forward(order, patience, early)).await?;
        self.metrics.forwarded();
        Ok((pipe, Account::new(None, &self.metrics)))
    }

    async fn directly(
        &self,
        target: &Target,
        addresses: &[SocketAddr],
        deadline: Instant,
    ) -> Result<(Far, Account), Refusal> {
        let opening = Instant::now();
        match timeout_at(deadline, dial::first(addresses)).await {
            Ok(Ok(socket)) => {
                let _ = socket.set_nodelay(true);
                self.metrics.dialled(opening.elapsed());
                Ok((Far::Direct(socket), Account::new(None, &self.metrics)))
            }
            Ok(Err(error)) => Err(dial::refusal(&error, target)),
            Err(_) => Err(Refusal::new(Reason::Timeout, format_args!("{target} did not answer"))),
        }
    }
}

/// Where a session is.
enum To {
    Session(Arc<Session>),
    Peer(Elsewhere),
}

impl To {
    /// Whether another way may be tried after this refusal: nothing has reached the node. A replica that goes away
    /// refuses what others may serve.
    fn may_be_followed(&self, reason: Reason) -> bool {
        match self {
            Self::Session(_) => reason == Reason::NoSession,
            Self::Peer(_) => matches!(reason, Reason::NoSession | Reason::Draining),
        }
    }
}

/// How long the other end may try, so that its answer is here before the deadline.
fn patience(deadline: Instant, round_trip: Option<Duration>) -> Duration {
    let left = deadline.saturating_duration_since(Instant::now());
    let on_the_way = round_trip.unwrap_or_default() * 2 + Duration::from_millis(200);
    left.saturating_sub(on_the_way.min(left / 2))
}

/// What is answered until the deadline.
async fn answered<T>(
    deadline: Instant,
    node: &Name,
    asked: impl Future<Output = Result<T, Refusal>>,
) -> Result<T, Refusal> {
    let waiting = Instant::now();
    match timeout_at(deadline, asked).await {
        Ok(answer) => answer,
        Err(_) => {
            let waited = waiting.elapsed().as_secs_f32().round();
            let why = format_args!("the agent of node {node} did not answer within {waited} s");
            Err(Refusal::new(Reason::AgentTimeout, why))
        }
    }
}

fn no_session(node: &Name) -> Refusal {
    Refusal::new(Reason::NoSession, format_args!("no agent of node {node} is connected"))
}

impl Account {
    fn new(stream: Option<Stream>, metrics: &Arc<Metrics>) -> Self {
        metrics.stream_opened();
        Self { bytes_in: AtomicU64::new(0), bytes_out: AtomicU64::new(0), stream, metrics: metrics.clone() }
    }

    /// Bytes to the target and from it.
    pub fn bytes(&self) -> (u64, u64) {
        (self.bytes_in.load(Relaxed), self.bytes_out.load(Relaxed))
    }
}

impl Meter for Account {
    fn sent(&self, bytes: usize) {
        self.bytes_in.fetch_add(bytes as u64, Relaxed);
        self.metrics.bytes_in(bytes as u64);
        if let Some(stream) = &self.stream {
            stream.sent(bytes);
        }
    }

    fn received(&self, bytes: usize) {
        self.bytes_out.fetch_add(bytes as u64, Relaxed);
        self.metrics.bytes_out(bytes as u64);
        if let Some(stream) = &self.stream {
            stream.received(bytes);
        }
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        self.metrics.stream_closed();
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        let mut callers = self.gate.callers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = callers.get_mut(&self.caller) {
            *count -= 1;
            if *count == 0 {
                callers.remove(&self.caller);
            }
        }
    }
}
