//! What the API server says, and what of it is believed.
//!
//! [`watch`] follows the Node objects and keeps of each only what is needed; [`annotations`] reads and writes
//! flannel's annotations; [`believe`] decides what a list's silence about a peer means; [`lease`] turns all
//! that into changes of the node's record; [`publish`] tells the cluster about this node. [`netconf`] is the
//! one piece of configuration that the cluster shares. Only `watch` and `publish` talk to anybody.

pub mod annotations;
pub mod believe;
pub mod netconf;
