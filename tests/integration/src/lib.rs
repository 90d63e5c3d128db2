//! The project's test rig: hosts made of namespaces, the real tools that drive our plugins, and
//! (on top of both) nodes with a real containerd and kubelet, and whole clusters.
//!
//! From the bottom up:
//! * [`tools`] finds or builds every program that is not ours (cnitool, kubelet, reference plugins);
//! * [`host`] is a machine made of namespaces: own network, mounts, processes and disk directory;
//! * [`link`] joins two hosts by a cable;
//! * [`cnitool`] and [`plugin`] call CNI plugins in a host, as a runtime would;
//! * [`node`] is a host with a real [`containerd`] and [`kubelet`], running pods from our own [`images`];
//! * [`leaks`] fails a test that leaves anything behind on the real machine.
//!
//! Start with `docs/rig.md`.
#![allow(
    clippy::print_stderr,
    clippy::print_stdout,
    clippy::expect_used,
    clippy::panic,
    reason = "test code: progress belongs on the terminal, and a broken test should stop loudly"
)]

pub mod apps;
pub mod balance;
pub mod cluster;
pub mod cnitool;
pub mod containerd;
pub mod control_plane;
pub mod daemons;
pub mod disk;
pub mod edgeflanneld;
pub mod enter;
pub mod exec;
pub mod flannel;
pub mod go;
pub mod host;
pub mod host_init;
pub mod images;
pub mod konnectivity;
pub mod kube_proxy;
pub mod kubelet;
pub mod leaks;
pub mod link;
pub mod network;
pub mod node;
pub mod pki;
pub mod plugin;
pub mod proc;
pub mod sweep;
pub mod tools;
pub mod topology;
pub mod tun;
pub mod tunnel;
pub mod wan;
