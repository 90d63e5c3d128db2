//! Tests of the running system: server and agents in one process, and in network namespaces with a WAN between.
//!
//! One binary, so that it is linked once. Nothing leaves loopback or the test's own namespaces.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    missing_docs,
    reason = "a test may fail loudly"
)]

mod commands;
mod common;
mod cuts;
mod far;
mod ha;
mod identity;
mod life;
mod passthrough;
mod refusals;
mod replicas;
mod scrapers;
mod soak;
mod stalls;
mod storm;
mod through;
mod wan;
