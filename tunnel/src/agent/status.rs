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

    /// With a session.
    fn ready(&self) -> Result<String, String> {
        let state = self.state.borrow();
        match (&state.replica, self.metrics.session_age()) {
            (Some(replica), Some(age)) => {
                Ok(format!("session with replica {replica} for {} s", age.as_secs()))
            }
            _ => Err(state.why_not.clone().unwrap_or_else(|| "no session yet".into())),
        }
    }
}
