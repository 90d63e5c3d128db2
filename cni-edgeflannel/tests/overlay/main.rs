//! The overlay against a real kernel, in network namespaces.
//!
//! Needs root (or CAP_SYS_ADMIN and CAP_NET_ADMIN), iproute2, nftables, ping. In CI a missing privilege fails.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test fails loudly, and says what it measured"
)]

mod disk;
mod drift;
mod plugin;
mod restore;
mod traffic;
mod world;
