//! Who is connected to this replica: every node's sessions, and which of them gets the new dials.
//!
//! A session is one agent's: its first connection, and up to seven more while there is work ([`session`]). Who may
//! begin or join one is decided in [`admission`]. When two agents hold one node's certificate the newer gets the new
//! dials, the older's streams go on, and it stands by: were it sent away it would come back as the newer. Newer is
//! whose epoch is higher, so that all replicas agree ([`crate::peers::choose`]); what changes is kept in a [`journal`]
//! for them.

pub mod admission;
pub mod journal;
pub mod session;

use crate::{
    audit::Escaped,
    hello::{Hello, Id, Role, TurnedAway},
    nodes::{Nodes, Source},
    peers::{
        choose,
        news::{self, Hold, Line},
    },
    target::Name,
};
use admission::{Decision, Known};
use journal::Journal;
use session::Session;
use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::{
    sync::watch,
    time::{Instant, timeout},
};

/// How long a session is waited for when another connection of its agent says that it may be dead.
const SIGN_OF_LIFE: Duration = Duration::from_secs(3);

/// Agents of one node whose epochs are remembered.
const SEEN_LIMIT: usize = 8;

/// Every session on this replica.
#[derive(Debug, Default)]
pub struct Sessions {
    known: Mutex<Registry>,
    draining: AtomicBool,
    /// The number of the last change.
    changes: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Registry {
    nodes: HashMap<Name, Node>,
    /// Every node's agents that have been seen here or told of by other replicas, those that are gone too: an agent that
    /// comes back is no newer than it was.
    seen: HashMap<Name, Vec<Hold>>,
    journal: Journal,
}

impl Registry {
    fn see(&mut self, node: &Name, hold: Hold) {
        if self.seen.len() >= news::NODES_LIMIT && !self.seen.contains_key(node) {
            self.seen.clear();
        }
        let seen = self.seen.entry(node.clone()).or_default();
        match seen.iter_mut().find(|other| other.instance == hold.instance) {
            Some(known) => known.epoch = known.epoch.max(hold.epoch),
            None => seen.push(hold),
        }
        if seen.len() > SEEN_LIMIT {
            // The newest stay: what comes must be newer.
            seen.sort_by_key(|hold| std::cmp::Reverse(hold.epoch));
            seen.truncate(SEEN_LIMIT);
        }
    }
}

/// One node's sessions, in the order in which they began.
#[derive(Debug, Default)]
struct Node {
    sessions: Vec<Arc<Session>>,
    taken_over: Option<Instant>,
}

/// What an agent may do with its new connection.
#[derive(Debug)]
pub enum Admitted {
    /// Begin a session.
    Session,
    /// Join this one.
    Extra(Arc<Session>),
    /// Look around.
    Probe,
}

impl Sessions {
    /// The session that gets new dials to this node, as far as this replica knows: the newest agent's that takes any.
    pub fn newest(&self, node: &str) -> Option<Arc<Session>> {
        let sessions = self.of(node);
        sessions.into_iter().max_by_key(|session| (!session.is_leaving(), session.epoch()))
    }

    /// The session of this agent of a node that takes new streams; the last that began when none does.
    pub fn of_instance(&self, node: &str, instance: &Id) -> Option<Arc<Session>> {
        let own = self.of(node).into_iter().filter(|session| session.instance == *instance);
        own.max_by_key(|session| !session.is_leaving())
    }

    /// A node's sessions, in the order in which they began.
    pub fn of(&self, node: &str) -> Vec<Arc<Session>> {
        self.known().nodes.get(node).map(|here| here.sessions.clone()).unwrap_or_default()
    }

    /// Whether there is any session with this node.
    pub fn present(&self, node: &str) -> bool {
        self.known().nodes.contains_key(node)
    }

    /// All sessions, in the order of their nodes' names.
    pub fn list(&self) -> Vec<Arc<Session>> {
        let known = self.known();
        let mut list: Vec<_> = known.nodes.values().flat_map(|node| node.sessions.iter().cloned()).collect();
        drop(known);
        list.sort_by(|a, b| a.node.cmp(&b.node));
        list
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.known().nodes.values().map(|node| node.sessions.len()).sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Turns every new agent away from now on.
    pub fn drain(&self) {
        self.draining.store(true, Relaxed);
        self.changes.send_modify(|_| {});
    }

    /// Whether it does.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Relaxed)
    }

    /// Decides about a new connection, and asks a session that may be dead for a sign of life.
    ///
    /// # Errors
    /// Why it is turned away, and a sentence for its log.
    pub async fn admit(
        &self,
        node: &Name,
        hello: &Hello,
        nodes: &Nodes,
    ) -> Result<Admitted, (TurnedAway, String)> {
        match self.decide(node, hello, nodes) {
            Decision::Begin => Ok(Admitted::Session),
            Decision::Look => Ok(Admitted::Probe),
            Decision::Turn(why, sentence) => Err((why, sentence)),
            Decision::Join => match self.find(node, |session| session.id == hello.session) {
                Some(session) => Ok(Admitted::Extra(session)),
                None => Err((TurnedAway::NotHere, "the session has just ended".into())),
            },
            Decision::AskFirst => {
                if let Some(old) = self.find(node, |session| session.instance == hello.instance) {
                    match timeout(SIGN_OF_LIFE, old.is_there()).await {
                        Ok(true) => {
                            let sentence = "this server has a good session of the same agent".into();
                            return Err((TurnedAway::Duplicate, sentence));
                        }
                        // The agent has said that it takes no more streams there; those that stand may finish.
                        Ok(false) => {}
                        Err(_) => old.close("no sign of life while its agent dialled again"),
                    }
                    self.leave(&old);
                }
                Ok(Admitted::Session)
            }
        }
    }

    fn decide(&self, node: &Name, hello: &Hello, list: &Nodes) -> Decision {
        let registry = self.known();
        let here = registry.nodes.get(node.as_str());
        let known = Known {
            draining: self.draining.load(Relaxed),
            source: list.source(),
            admitted: list.admits(node),
            sessions: here.map_or(&[], |here| &here.sessions),
            since_takeover: here.and_then(|here| here.taken_over).map(|at| at.elapsed()),
        };
        admission::decide(node, hello, &known)
    }

    fn find(&self, node: &Name, which: impl Fn(&Session) -> bool) -> Option<Arc<Session>> {
        let known = self.known();
        known.nodes.get(node.as_str())?.sessions.iter().find(|session| which(session)).cloned()
    }

    fn known(&self) -> MutexGuard<'_, Registry> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a session that has been admitted; from here on it can get dials.
    pub fn enter(&self, session: &Arc<Session>) {
        let mut known = self.known();
        let seen = known.seen.get(session.node.as_str()).map_or(&[][..], Vec::as_slice);
        session.raise(choose::epoch(&session.instance, seen));
        known.see(&session.node, session.hold());
        let here = known.nodes.entry(session.node.clone()).or_default();
        let older = here.sessions.iter().rev().find(|older| older.instance != session.instance);
        if let Some(older) = older.filter(|older| older.epoch() < session.epoch()) {
            log::warn!(
                "node {}: the agent at {} takes over from the one at {}; is one certificate used twice?",
                session.node,
                session.remote,
                older.remote
            );
            here.taken_over = Some(Instant::now());
        }
        here.sessions.push(session.clone());
        if here.sessions.len() > admission::SESSIONS_LIMIT {
            here.sessions.remove(0).close("too many agents with this node's certificate");
        }
        log::info!("node {}: session {} from {}", session.node, session.id, session.remote);
        self.note(known, &session.node);
    }

    /// Removes a session.
    pub fn leave(&self, session: &Arc<Session>) {
        let mut known = self.known();
        let Some(here) = known.nodes.get_mut(session.node.as_str()) else { return };
        let before = here.sessions.len();
        here.sessions.retain(|other| !Arc::ptr_eq(other, session));
        if here.sessions.len() == before {
            return;
        }
        if here.sessions.is_empty() {
            known.nodes.remove(session.node.as_str());
        }
        self.note(known, &session.node);
    }

    /// A session of this node has turned out to take no new streams.
    pub fn changed(&self, node: &Name) {
        self.note(self.known(), node);
    }

    /// Another replica tells of an agent. Where that has a higher epoch there, it is its epoch here too.
    pub fn see(&self, node: &Name, hold: &Hold) {
        let mut known = self.known();
        known.see(node, hold.clone());
        let here = known.nodes.get(node.as_str()).map_or(&[][..], |here| &here.sessions);
        let own = here.iter().filter(|session| session.instance == hold.instance);
        // Every session of it, so no shortcut.
        if own.filter(|session| session.raise(hold.epoch)).count() > 0 {
            self.note(known, node);
        }
    }

    fn note(&self, mut known: MutexGuard<'_, Registry>, node: &Name) {
        let version = known.journal.note(node);
        drop(known);
        self.changes.send_modify(|last| *last = version.max(*last));
    }

    /// Tells of every change, and of the beginning of a drain.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// What to tell a replica that has been told everything up to the change `told`, and up to where it is told then.
    pub fn news(&self, told: Option<u64>) -> (u64, Vec<Line>) {
        let known = self.known();
        let line = |node: &Name| {
            let mut holds: Vec<Hold> = Vec::new();
            for session in known.nodes.get(node.as_str()).map_or(&[][..], |here| &here.sessions) {
                let hold = session.hold();
                if !session.is_leaving() && !holds.contains(&hold) {
                    holds.push(hold);
                }
            }
            Line::Node(node.clone(), holds)
        };
        let lines = match told.and_then(|told| known.journal.since(told)) {
            Some(changed) => changed.iter().map(line).collect(),
            None => {
                let all = known.nodes.keys().map(line);
                std::iter::once(Line::Begin).chain(all).chain([Line::All]).collect()
            }
        };
        (known.journal.version(), lines)
    }

    /// Ends the sessions of nodes that are not in the list any more.
    pub fn keep_only(&self, list: &Nodes) {
        for session in self.list() {
            self.keep_if_admitted(&session, list);
        }
    }

    /// Ends a session whose node is not in the list.
    pub fn keep_if_admitted(&self, session: &Session, list: &Nodes) {
        if list.source() != Source::Pending && !list.admits(&session.node) {
            session.close("the node is not in the list of nodes any more");
        }
    }
}

/// How a hello is shown in the log.
pub fn shown(hello: &Hello) -> String {
    let role = match hello.role {
        Role::Session => "session",
        Role::Extra => "extra connection of session",
        Role::Probe => "probe",
    };
    let id: &Id = &hello.session;
    format!("{role} {}", Escaped::new(id.as_str().as_bytes()))
}
