//! The small HTTP listener for people and probes: /metrics, /healthz, /readyz, /sessions.
