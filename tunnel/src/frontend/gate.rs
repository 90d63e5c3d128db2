//! The gate: decides about a target, and connects to it or says why not. Front ends hand it what callers asked for.
//!
//! One budget bounds everything from the request to the status line. The agent gets less of it than there is, so that
//! a kubelet that does not answer (`timeout`, said by the agent) and an agent that does not (`agent-timeout`) are told
//! apart.

use crate::{
    carrier::pipe::Pipe,
    config::server::Limits,
    dial,
    metrics::Metrics,
    network::Network,
    nodes::{Current, Owner},
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
        direct: Vec<Network>,
        limits: Limits,
        metrics: Arc<Metrics>,
        phase: watch::Receiver<Phase>,
    ) -> Self {
        Self { nodes, sessions, direct, limits, metrics, phase, callers: Mutex::default() }
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

    /// Connects to a target. `early` is sent along where there is a way to; `node` is told as soon as it is known.
    ///
    /// # Errors
    /// Why not, within the dial timeout of `start`.
    pub async fn connect(
        &self,
        target: &Target,
        early: Bytes,
        start: Instant,
        node: &mut Option<Name>,
    ) -> Result<(Far, Account), Refusal> {
        // A hair less than was promised, so that the promise is kept on a busy machine too.
        let deadline = start + self.limits.dial_timeout.mul_f32(0.98);
        let way = self.decide(target, deadline).await;
        if way.is_err() {
            *node = self.whose(target);
        }
        match way? {
            Way::Session { node: name, ask } => {
                *node = Some(name.clone());
                self.through_agent(&name, &ask, early, deadline).await
            }
            Way::Direct { node: name, addresses } => {
                node.clone_from(&name);
                self.directly(target, &addresses, deadline).await
            }
            // Router::resolved answers with one of the other two.
            Way::Resolve(_) => Err(Reason::UnknownNode.into()),
        }
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
        let present = |node: &Name| self.sessions.present(node.as_str());
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

    async fn through_agent(
        &self,
        node: &Name,
        ask: &Target,
        early: Bytes,
        deadline: Instant,
    ) -> Result<(Far, Account), Refusal> {
        let opening = Instant::now();
        let mut session = self.sessions.newest(node.as_str()).ok_or_else(|| no_session(node))?;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let on_the_way = session.round_trip().unwrap_or_default() * 2 + Duration::from_millis(200);
            let patience = left.saturating_sub(on_the_way.min(left / 2));
            let most = self.limits.max_streams_per_node;
            match timeout_at(deadline, session.open(ask, most, patience, early.clone())).await {
                Ok(Ok((pipe, stream))) => {
                    self.metrics.dialled(opening.elapsed());
                    return Ok((Far::Session(pipe), Account::new(Some(stream), &self.metrics)));
                }
                // What went along may have arrived: then it is not said twice.
                Ok(Err(refusal)) if refusal.reason == Reason::NoSession && early.is_empty() => {
                    session = self.successor(node, &session, deadline).await.ok_or(refusal)?;
                }
                Ok(Err(refusal)) => return Err(refusal),
                Err(_) => {
                    let waited = left.as_secs_f32().round();
                    let why = format_args!("the agent of node {node} did not answer within {waited} s");
                    return Err(Refusal::new(Reason::AgentTimeout, why));
                }
            }
        }
    }

    /// The session that follows one that has just ended or takes no new streams: an agent with a renewed certificate
    /// has its next one within a few round trips.
    async fn successor(&self, node: &Name, old: &Arc<Session>, deadline: Instant) -> Option<Arc<Session>> {
        const WAIT: Duration = Duration::from_secs(2);
        let deadline = deadline.min(Instant::now() + WAIT);
        while Instant::now() < deadline {
            match self.sessions.newest(node.as_str()) {
                Some(session) if !Arc::ptr_eq(&session, old) => return Some(session),
                _ => sleep(Duration::from_millis(20)).await,
            }
        }
        None
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
