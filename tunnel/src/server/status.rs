//! What the server's pages show.

use crate::{
    frontend::gate::{Gate, Phase},
    http::{Session, Sessions, Status},
    metrics::Metrics,
    nodes::Source,
    sessions::session,
};
use std::sync::{Arc, atomic::Ordering::Relaxed};

/// A view on a running server.
pub struct ServerStatus {
    /// What the front ends share.
    pub gate: Arc<Gate>,
}

impl Status for ServerStatus {
    fn metrics(&self) -> &Metrics {
        &self.gate.metrics
    }

    /// Once the nodes are known, and what other replicas have; also without any agent; not while going away.
    fn ready(&self) -> Result<String, String> {
        if self.gate.sessions.is_draining() || *self.gate.phase.borrow() >= Phase::Draining {
            return Err("draining".into());
        }
        if self.gate.nodes.borrow().source() == Source::Pending {
            return Err("the list of nodes has not been loaded yet".into());
        }
        if !self.gate.peers.is_settled() {
            return Err("other replicas have not told yet what they have".into());
        }
        Ok(format!("{} sessions", self.gate.sessions.len()))
    }

    fn sessions(&self) -> Option<Sessions> {
        let sessions = self.gate.sessions.list().iter().map(|session| shown(session)).collect();
        Some(Sessions { replica: self.gate.peers.me.replica.to_string(), sessions })
    }
}

fn shown(session: &session::Session) -> Session {
    let since = jiff::Timestamp::try_from(session.since).unwrap_or_default();
    Session {
        node: session.node.to_string(),
        remote: session.remote.to_string(),
        since: format!("{since:.0}"),
        streams: session.streams(),
        bytes_in: session.bytes_in.load(Relaxed),
        bytes_out: session.bytes_out.load(Relaxed),
        rtt_ms: session.round_trip().map(|time| (time.as_secs_f64() * 1e6).round() / 1e3),
    }
}
