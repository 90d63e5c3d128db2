//! Who may begin a session or join one. Pure: what is known and a hello in, a decision out.

use super::session::{CONNECTIONS_LIMIT, Session};
use crate::{
    hello::{Hello, Role, TurnedAway},
    nodes::Source,
    target::Name,
};
use std::{sync::Arc, time::Duration};

/// Sessions one node can have: what two clones and a stale one need, and one more.
pub const SESSIONS_LIMIT: usize = 4;

/// Takeovers of one node are at least this far apart.
const TAKEOVER_REST: Duration = Duration::from_secs(1);

/// What a decision rests on.
pub struct Known<'a> {
    /// The server is going away.
    pub draining: bool,
    /// Where the list of nodes comes from.
    pub source: Source,
    /// The node is in it, or there is none.
    pub admitted: bool,
    /// The node's sessions here.
    pub sessions: &'a [Arc<Session>],
    /// Time since one agent of the node last took over from another.
    pub since_takeover: Option<Duration>,
}

/// What to do with a connection.
#[derive(Debug, PartialEq, Eq)]
pub enum Decision {
    /// It begins a session.
    Begin,
    /// It begins a session if the one its agent has here shows no sign of life.
    AskFirst,
    /// It joins its session.
    Join,
    /// It is a probe.
    Look,
    /// It is turned away.
    Turn(TurnedAway, String),
}

/// Decides about a connection of this node's agent.
pub fn decide(node: &Name, hello: &Hello, known: &Known<'_>) -> Decision {
    let turn = |why, sentence: String| Decision::Turn(why, sentence);
    if known.source == Source::Pending {
        return turn(TurnedAway::NotReady, "this server has not loaded its list of nodes yet".into());
    }
    if !known.admitted {
        return turn(TurnedAway::UnknownNode, format!("{node} is not in this server's list of nodes"));
    }
    match hello.role {
        Role::Probe => Decision::Look,
        // A session that is here may have one more connection to the last.
        Role::Extra => {
            let own =
                |session: &&Arc<Session>| session.id == hello.session && session.instance == hello.instance;
            match known.sessions.iter().find(own) {
                None => turn(TurnedAway::NotHere, "the session is not on this replica".into()),
                Some(session) if session.connections() >= CONNECTIONS_LIMIT => turn(
                    TurnedAway::TooMany,
                    format!("a session has at most {CONNECTIONS_LIMIT} connections"),
                ),
                Some(_) => Decision::Join,
            }
        }
        Role::Session if known.draining => turn(TurnedAway::Draining, "this server is going away".into()),
        Role::Session if known.sessions.iter().any(|session| session.instance == hello.instance) => {
            Decision::AskFirst
        }
        Role::Session => match known.since_takeover {
            Some(time) if time < TAKEOVER_REST && !known.sessions.is_empty() => {
                turn(TurnedAway::TooMany, format!("another agent of {node} took over less than a second ago"))
            }
            _ => Decision::Begin,
        },
    }
}
