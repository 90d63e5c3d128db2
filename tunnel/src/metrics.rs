//! Counters, gauges and the one histogram, named as docs/tunnel.md promises.
// T1: the calls that server and agent make. T2 owns this file and fills it.

use crate::refusal::Reason;
use std::time::Duration;

/// What is counted.
#[derive(Debug, Default)]
pub struct Metrics;

#[allow(missing_docs, reason = "stub until T2's")]
impl Metrics {
    pub fn refused(&self, _reason: Reason) {}
    pub fn dialled(&self, _took: Duration) {}
    pub fn stream_opened(&self) {}
    pub fn stream_closed(&self) {}
    pub fn bytes_in(&self, _bytes: usize) {}
    pub fn bytes_out(&self, _bytes: usize) {}
    pub fn reload_failed(&self, _file: &str) {}
}
