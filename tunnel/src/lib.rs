//! edge-tunnel: the cloud looks inside nodes that nobody can dial.
//!
//! The agent on the node dials the server and keeps that connection. When kube-apiserver wants a
//! kubelet it sends an HTTP CONNECT to a front end of the server; the router decides which node is
//! meant or why not; the server opens a stream towards that node's agent; the agent asks its own
//! allow-list, dials the kubelet and only then answers 200. From there bytes are copied, both ways,
//! until both ends are done. The kubelet's TLS stays closed all the way: nothing here holds a
//! credential a kubelet would accept.
//!
//! Reading order: `server`, `frontend::egress`, `route`, `sessions`, `carrier::h2`, `agent`, `relay`; then `peers`,
//! which makes one server of many.

pub mod agent;
pub mod audit;
pub mod carrier;
pub mod commands;
pub mod config;
pub mod connect;
pub mod dial;
pub mod frontend;
pub mod head;
pub mod hello;
pub mod http;
pub mod listen;
pub mod logging;
pub mod metrics;
pub mod network;
pub mod nodes;
pub mod peers;
pub mod policy;
pub mod proxy;
pub mod refusal;
pub mod relay;
pub mod route;
pub mod server;
pub mod server_name;
pub mod sessions;
pub mod target;
pub mod tls;
