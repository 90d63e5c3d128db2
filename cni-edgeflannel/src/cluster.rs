//! What the API server says, and what of it is believed.
//!
//! [`watch`] tells what happens to the Node objects, keeping of each only what is needed ([`node`]);
//! [`annotations`] reads and writes flannel's annotations; [`believe`] decides what a list's silence about a peer
//! means; [`follow`] turns all that into changes of the node's record; [`publish`] tells the cluster about this
//! node. [`netconf`] is the one piece of configuration that the cluster shares. Only `watch` and `publish` talk
//! to anybody, both through [`api`], where need be by way of a [`proxy`].

pub mod annotations;
pub mod api;
pub mod backoff;
pub mod believe;
pub mod follow;
pub mod netconf;
pub mod node;
pub mod proxy;
pub mod publish;
pub mod watch;
