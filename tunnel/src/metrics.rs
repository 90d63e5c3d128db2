//! Counters, gauges and the one histogram, named as docs/tunnel.md promises.
