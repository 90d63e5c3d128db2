//! Who is connected: every node's sessions, the newest of which gets the new dials.
//!
//! A session is one agent's: its first connection, and up to seven more while there is work ([`session`]). Who may
//! begin or join one is decided in [`admission`]. When two agents hold one node's certificate the newer gets the new
//! dials, the older's streams go on, and it stands by: were it sent away it would come back as the newer.

pub mod admission;
pub mod session;

use crate::{
    audit::Escaped,
    hello::{Hello, Id, Role, TurnedAway},
    nodes::{Nodes, Source},
    target::Name,
};
use admission::{Decision, Known};
use session::Session;
use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::time::{Instant, timeout};

/// How long a session is waited for when another connection of its agent says that it may be dead.
const SIGN_OF_LIFE: Duration = Duration::from_secs(3);

/// Every session on this replica.
#[derive(Debug, Default)]
pub struct Sessions {
    nodes: Mutex<HashMap<Name, Node>>,
    count: AtomicUsize,
    draining: AtomicBool,
}

/// One node's sessions, the newest last.
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
    /// The session that gets new dials to this node: the newest that takes any.
    pub fn newest(&self, node: &str) -> Option<Arc<Session>> {
        let nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        let sessions = &nodes.get(node)?.sessions;
        sessions.iter().rfind(|session| !session.is_leaving()).or(sessions.last()).cloned()
    }

    /// Whether there is any session with this node.
    pub fn present(&self, node: &str) -> bool {
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner).contains_key(node)
    }

    /// All sessions, in the order of their nodes' names.
    pub fn list(&self) -> Vec<Arc<Session>> {
        let nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        let mut list: Vec<_> = nodes.values().flat_map(|node| node.sessions.iter().cloned()).collect();
        drop(nodes);
        list.sort_by(|a, b| a.node.cmp(&b.node));
        list
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.nodes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .map(|node| node.sessions.len())
            .sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Turns every new agent away from now on.
    pub fn drain(&self) {
        self.draining.store(true, Relaxed);
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
        let nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        let here = nodes.get(node.as_str());
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
        let nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        nodes.get(node.as_str())?.sessions.iter().find(|session| which(session)).cloned()
    }

    /// Enters a session that has been admitted; from here on it gets the node's new dials.
    pub fn enter(&self, session: &Arc<Session>) {
        let mut nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        let here = nodes.entry(session.node.clone()).or_default();
        if let Some(older) = here.sessions.last().filter(|older| older.instance != session.instance) {
            log::warn!(
                "node {}: the agent at {} takes over from the one at {}; is one certificate used twice?",
                session.node,
                session.remote,
                older.remote
            );
            here.taken_over = Some(Instant::now());
        }
        here.sessions.push(session.clone());
        self.count.fetch_add(1, Relaxed);
        if here.sessions.len() > admission::SESSIONS_LIMIT {
            here.sessions.remove(0).close("too many agents with this node's certificate");
            self.count.fetch_sub(1, Relaxed);
        }
        log::info!("node {}: session {} from {}", session.node, session.id, session.remote);
    }

    /// Removes a session.
    pub fn leave(&self, session: &Arc<Session>) {
        let mut nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(here) = nodes.get_mut(session.node.as_str()) else { return };
        let before = here.sessions.len();
        here.sessions.retain(|other| !Arc::ptr_eq(other, session));
        self.count.fetch_sub(before - here.sessions.len(), Relaxed);
        if here.sessions.is_empty() {
            nodes.remove(session.node.as_str());
        }
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
