//! What the daemon knows about itself, for those who ask: /readyz, /metrics, `status` and systemd.
//!
//! Written by the loop, read by the listener. `/run/edgeflannel/daemon.json` holds what `status` needs of it,
//! since that must work without asking a daemon.

use crate::overlay::Kind;
use std::{
    fmt::Write as _,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// The upper bounds of the histogram's buckets, in seconds.
const BUCKETS: [f64; 9] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 2.5];

/// The loop turns every few seconds. One that has not for so long hangs, on a disk or in the kernel.
const HANGS: Duration = Duration::from_secs(60);

/// See the module.
#[derive(Debug)]
pub struct Board {
    state: Mutex<State>,
    turned: Mutex<Instant>,
}

#[derive(Debug, Default)]
struct State {
    not_ready: Option<String>,
    peers: usize,
    drift: [u64; Kind::ALL.len()],
    reconciled: [u64; BUCKETS.len()],
    reconcile_count: u64,
    reconcile_seconds: f64,
    last_contact: Option<Instant>,
    restores: u64,
    record_write_failures: u64,
}

impl Default for Board {
    fn default() -> Self {
        let not_ready = Some("nothing has been restored yet".to_owned());
        Self {
            state: Mutex::new(State { not_ready, ..State::default() }),
            turned: Mutex::new(Instant::now()),
        }
    }
}

impl Board {
    fn state(&self) -> MutexGuard<'_, State> {
        // Plain numbers: a panic elsewhere cannot have left them half-written.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The loop has come round.
    pub fn turned(&self, now: Instant) {
        *self.turned.lock().unwrap_or_else(PoisonError::into_inner) = now;
    }

    /// Why /healthz says no; `None` is yes.
    #[must_use]
    pub fn hangs(&self, now: Instant) -> Option<String> {
        let turned = *self.turned.lock().unwrap_or_else(PoisonError::into_inner);
        let since = now.saturating_duration_since(turned);
        (since > HANGS).then(|| format!("the daemon's loop has not come round for {} s", since.as_secs()))
    }

    /// Why /readyz says no; `None` is yes.
    #[must_use]
    pub fn not_ready(&self) -> Option<String> {
        self.state().not_ready.clone()
    }

    /// Says why /readyz says no. True when that is news.
    pub fn set_not_ready(&self, why: Option<String>) -> bool {
        let mut state = self.state();
        let news = state.not_ready != why;
        state.not_ready = why;
        news
    }

    /// The peers in the record.
    pub fn set_peers(&self, peers: usize) {
        self.state().peers = peers;
    }

    /// Something had drifted, or was found wrong.
    pub fn drifted(&self, kind: Kind) {
        if let Some(at) = Kind::ALL.iter().position(|one| *one == kind) {
            self.state().drift[at] += 1;
        }
    }

    /// A reconcile took so long.
    pub fn reconciled(&self, took: Duration) {
        let mut state = self.state();
        let seconds = took.as_secs_f64();
        for (at, bound) in BUCKETS.iter().enumerate() {
            if seconds <= *bound {
                state.reconciled[at] += 1;
            }
        }
        state.reconcile_count += 1;
        state.reconcile_seconds += seconds;
    }

    /// The API server was heard.
    pub fn contact(&self, at: Instant) {
        self.state().last_contact = Some(at);
    }

    /// The overlay was made from the record.
    pub fn restored(&self) {
        self.state().restores += 1;
    }

    /// The record could not be written.
    pub fn record_write_failed(&self) {
        self.state().record_write_failures += 1;
    }

    /// For Prometheus.
    #[must_use]
    pub fn metrics(&self) -> String {
        let state = self.state();
        let mut text = String::new();
        let mut family = |name: &str, kind: &str, help: &str, samples: &[(String, String)]| {
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
            for (label, value) in samples {
                let _ = writeln!(text, "{name}{label} {value}");
            }
        };
        let one = |value: String| [(String::new(), value)];
        family("edgeflannel_peers", "gauge", "Peers in the node's record.", &one(state.peers.to_string()));
        let drift = Kind::ALL.iter().zip(state.drift);
        let drift = drift.map(|(kind, count)| (format!("{{kind=\"{}\"}}", kind.as_str()), count.to_string()));
        family(
            "edgeflannel_drift_total",
            "counter",
            "Things of the overlay that were found other than they should be.",
            &drift.collect::<Vec<_>>(),
        );
        let age = state.last_contact.map_or_else(|| "+Inf".into(), |at| at.elapsed().as_secs().to_string());
        family(
            "edgeflannel_api_last_contact_seconds",
            "gauge",
            "Age of the last sign of the API server.",
            &one(age),
        );
        family(
            "edgeflannel_restores_total",
            "counter",
            "Times the overlay was made from the record.",
            &one(state.restores.to_string()),
        );
        family(
            "edgeflannel_record_write_failures_total",
            "counter",
            "Times the record could not be written.",
            &one(state.record_write_failures.to_string()),
        );
        let name = "edgeflannel_reconcile_seconds";
        let _ = writeln!(text, "# HELP {name} Time to compare the kernel with the record and put it right.");
        let _ = writeln!(text, "# TYPE {name} histogram");
        for (bound, count) in BUCKETS.iter().zip(state.reconciled) {
            let _ = writeln!(text, "{name}_bucket{{le=\"{bound}\"}} {count}");
        }
        let _ = writeln!(text, "{name}_bucket{{le=\"+Inf\"}} {}", state.reconcile_count);
        let _ =
            writeln!(text, "{name}_sum {}\n{name}_count {}", state.reconcile_seconds, state.reconcile_count);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics() {
        let board = Board::default();
        board.set_peers(3);
        board.drifted(Kind::SubnetEnv);
        board.drifted(Kind::SubnetEnv);
        board.reconciled(Duration::from_millis(3));
        let text = board.metrics();
        for line in [
            "edgeflannel_peers 3",
            "edgeflannel_drift_total{kind=\"subnet-env\"} 2",
            "edgeflannel_drift_total{kind=\"foreign-drop\"} 0",
            "edgeflannel_reconcile_seconds_bucket{le=\"0.0025\"} 0",
            "edgeflannel_reconcile_seconds_bucket{le=\"0.005\"} 1",
            "edgeflannel_reconcile_seconds_bucket{le=\"+Inf\"} 1",
            "edgeflannel_reconcile_seconds_count 1",
            "edgeflannel_api_last_contact_seconds +Inf",
            "edgeflannel_restores_total 0",
            "edgeflannel_record_write_failures_total 0",
        ] {
            assert!(text.lines().any(|one| one == line), "{line} in:\n{text}");
        }
        board.contact(Instant::now());
        assert!(board.metrics().contains("edgeflannel_api_last_contact_seconds 0\n"));
    }

    #[test]
    fn readiness_is_news_once() {
        let board = Board::default();
        assert!(board.not_ready().is_some());
        assert!(board.set_not_ready(None));
        assert!(!board.set_not_ready(None));
        assert_eq!(board.not_ready(), None);
    }
}
