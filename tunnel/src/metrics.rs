//! What is counted, under the names that dashboards rely on.
//!
//! One set for the server and one for the agent ([`Metrics::server`], [`Metrics::agent`]), in Prometheus' text format.
//! Labels are reason words, directions and the files of the configuration; nothing a caller says becomes a label.

use crate::refusal::Reason;
use prometheus_client::{
    encoding::{EncodeLabelSet, prometheus_text},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};
use std::{
    path::Path,
    sync::{Mutex, PoisonError, atomic::AtomicU64},
    time::{Duration, Instant},
};

/// The content type of [`Metrics::text`].
pub const CONTENT_TYPE: &str = prometheus_text::CONTENT_TYPE;

/// Bounds of the dial histogram, seconds: from a kubelet in the next room to `--dial-timeout`.
const DIAL_BUCKETS: [f64; 11] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Refused {
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Direction {
    direction: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct File {
    file: String,
}

/// The counters of one process.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    sessions: Gauge,
    streams: Gauge,
    streams_total: Counter,
    bytes_in: Counter,
    bytes_out: Counter,
    refused: Family<Refused, Counter>,
    dial: Histogram,
    nodes: Gauge,
    peers: Gauge,
    forwarded: Counter,
    expiry: Family<File, Gauge>,
    broken: Family<File, Counter>,
    age: Gauge<f64, AtomicU64>,
    /// Since when an agent has had its session.
    session_since: Mutex<Option<Instant>>,
}

impl Metrics {
    /// The server's.
    pub fn server() -> Self {
        let mut metrics = Self::common("Agents with a session on this replica");
        let nodes = metrics.nodes.clone();
        metrics.registry.register("edge_tunnel_nodes", "Nodes that are known", nodes);
        let (peers, forwarded) = (metrics.peers.clone(), metrics.forwarded.clone());
        metrics.registry.register("edge_tunnel_peers", "Other replicas that are connected", peers);
        metrics.registry.register(
            "edge_tunnel_forwarded",
            "Streams that were opened through another replica",
            forwarded,
        );
        metrics
    }

    /// The agent's.
    pub fn agent() -> Self {
        let mut metrics = Self::common("Sessions with servers");
        let age = metrics.age.clone();
        metrics.registry.register(
            "edge_tunnel_session_age_seconds",
            "Since when there has been a session without a gap; 0 without one",
            age,
        );
        metrics
    }

    fn common(sessions_help: &str) -> Self {
        let bytes = Family::<Direction, Counter>::default();
        let direction = |direction| bytes.get_or_create(&Direction { direction }).clone();
        let mut metrics = Self {
            registry: Registry::default(),
            sessions: Gauge::default(),
            streams: Gauge::default(),
            streams_total: Counter::default(),
            bytes_in: direction("in"),
            bytes_out: direction("out"),
            refused: Family::default(),
            dial: Histogram::new(DIAL_BUCKETS),
            nodes: Gauge::default(),
            peers: Gauge::default(),
            forwarded: Counter::default(),
            expiry: Family::default(),
            broken: Family::default(),
            age: Gauge::default(),
            session_since: Mutex::default(),
        };
        for reason in Reason::ALL {
            drop(metrics.refused.get_or_create(&Refused { reason: reason.word() }));
        }
        let registry = &mut metrics.registry;
        registry.register("edge_tunnel_sessions", sessions_help, metrics.sessions.clone());
        registry.register("edge_tunnel_streams", "Open streams", metrics.streams.clone());
        registry.register("edge_tunnel_streams", "Streams that were opened", metrics.streams_total.clone());
        registry.register("edge_tunnel_bytes", "Bytes: in to the node, out of it", bytes);
        registry.register(
            "edge_tunnel_refused",
            "Refused or cut, by the reason's word",
            metrics.refused.clone(),
        );
        registry.register(
            "edge_tunnel_dial_seconds",
            "From asking to an open connection",
            metrics.dial.clone(),
        );
        registry.register(
            "edge_tunnel_certificate_expiry_timestamp_seconds",
            "When the certificate in a file expires, seconds since 1970",
            metrics.expiry.clone(),
        );
        registry.register(
            "edge_tunnel_reload_failed",
            "Changes of a file that were broken, so that the old one stays in force",
            metrics.broken.clone(),
        );
        metrics
    }

    /// How many sessions there are.
    pub fn sessions(&self, count: usize) {
        self.sessions.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// How many nodes are known.
    pub fn nodes(&self, count: usize) {
        self.nodes.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// How many other replicas are connected.
    pub fn peers(&self, count: usize) {
        self.peers.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// A stream was opened through another replica.
    pub fn forwarded(&self) {
        self.forwarded.inc();
    }

    /// The agent has a session from now on, or has none any more. Said again it changes nothing.
    pub fn connected(&self, connected: bool) {
        let mut since = self.session_since.lock().unwrap_or_else(PoisonError::into_inner);
        *since = if connected { since.or_else(|| Some(Instant::now())) } else { None };
    }

    /// For how long the agent has had a session.
    pub fn session_age(&self) -> Option<Duration> {
        self.session_since.lock().unwrap_or_else(PoisonError::into_inner).map(|since| since.elapsed())
    }

    /// A stream has been opened.
    pub fn stream_opened(&self) {
        self.streams.inc();
        self.streams_total.inc();
    }

    /// It has ended.
    pub fn stream_closed(&self) {
        self.streams.dec();
    }

    /// Bytes that went to the node.
    pub fn bytes_in(&self, bytes: u64) {
        self.bytes_in.inc_by(bytes);
    }

    /// Bytes that came from the node.
    pub fn bytes_out(&self, bytes: u64) {
        self.bytes_out.inc_by(bytes);
    }

    /// Something was refused, or a stream reset, for this reason.
    pub fn refused(&self, reason: Reason) {
        self.refused.get_or_create(&Refused { reason: reason.word() }).inc();
    }

    /// A dial has succeeded after this time.
    pub fn dialled(&self, took: Duration) {
        self.dial.observe(took.as_secs_f64());
    }

    /// The certificate in this file of the configuration expires then, seconds since 1970.
    pub fn expires(&self, file: &Path, not_after: i64) {
        self.expiry.get_or_create(&File { file: file.display().to_string() }).set(not_after);
    }

    /// A change of this file was broken.
    pub fn reload_failed(&self, file: &Path) {
        self.broken.get_or_create(&File { file: file.display().to_string() }).inc();
    }

    /// Everything, as /metrics shows it.
    pub fn text(&self) -> String {
        self.age.set(self.session_age().unwrap_or_default().as_secs_f64());
        let mut text = String::new();
        if prometheus_text::encode(&mut text, &self.registry).is_err() {
            log::error!("metrics cannot be written");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_names_dashboards_rely_on() {
        let metrics = Metrics::server();
        metrics.sessions(3);
        metrics.nodes(5);
        metrics.stream_opened();
        metrics.stream_opened();
        metrics.stream_closed();
        metrics.bytes_in(7);
        metrics.bytes_out(8);
        metrics.refused(Reason::NoSession);
        metrics.dialled(Duration::from_millis(3));
        metrics.expires(Path::new("/tls/a\"b.pem"), 1_800_000_000);
        metrics.reload_failed(Path::new("/etc/nodes.json"));
        let text = metrics.text();
        for line in [
            "# TYPE edge_tunnel_sessions gauge",
            "edge_tunnel_sessions 3",
            "edge_tunnel_nodes 5",
            "# TYPE edge_tunnel_streams gauge",
            "edge_tunnel_streams 1",
            "# TYPE edge_tunnel_streams_total counter",
            "edge_tunnel_streams_total 2",
            "# TYPE edge_tunnel_bytes_total counter",
            "edge_tunnel_bytes_total{direction=\"in\"} 7",
            "edge_tunnel_bytes_total{direction=\"out\"} 8",
            "edge_tunnel_refused_total{reason=\"no-session\"} 1",
            "edge_tunnel_refused_total{reason=\"stalled\"} 0",
            "# TYPE edge_tunnel_dial_seconds histogram",
            "edge_tunnel_dial_seconds_bucket{le=\"0.0025\"} 0",
            "edge_tunnel_dial_seconds_bucket{le=\"0.005\"} 1",
            "edge_tunnel_dial_seconds_bucket{le=\"+Inf\"} 1",
            "edge_tunnel_dial_seconds_count 1",
            "edge_tunnel_certificate_expiry_timestamp_seconds{file=\"/tls/a\\\"b.pem\"} 1800000000",
            "edge_tunnel_reload_failed_total{file=\"/etc/nodes.json\"} 1",
        ] {
            assert!(text.lines().any(|other| other == line), "{line} is not in\n{text}");
        }
        assert!(!text.contains("session_age"), "that is the agent's");
    }

    #[test]
    fn an_agent_tells_how_long_it_has_been_connected() {
        let metrics = Metrics::agent();
        assert!(metrics.text().contains("\nedge_tunnel_session_age_seconds 0.0\n"), "{}", metrics.text());
        metrics.connected(true);
        std::thread::sleep(Duration::from_millis(20));
        metrics.connected(true);
        let age = metrics.session_age().unwrap();
        assert!(age >= Duration::from_millis(20), "{age:?}: said again, it goes on");
        assert!(!metrics.text().contains("\nedge_tunnel_session_age_seconds 0.0\n"));
        metrics.connected(false);
        assert_eq!(metrics.session_age(), None);
    }
}
