//! What the agent's pages show.

use super::keeper::State;
use crate::{http::Status, metrics::Metrics};
use std::sync::Arc;
use tokio::sync::watch;

/// A view on a running agent.
pub struct AgentStatus {
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// How things stand.
    pub state: watch::Receiver<State>,
}

impl Status for AgentStatus {
    fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// With a session, on whichever replica.
    fn ready(&self) -> Result<String, String> {
        let state = self.state.borrow();
        match (&state.replicas[..], self.metrics.session_age()) {
            (replicas @ [_, ..], Some(age)) => {
                let names: Vec<_> = replicas.iter().map(|replica| replica.as_str()).collect();
                Ok(format!("session with replica {} for {} s", names.join(" and "), age.as_secs()))
            }
            _ => Err(state.why_not.clone().unwrap_or_else(|| "no session yet".into())),
        }
    }
}
