//! Pod networking of an edge node: flannel's VXLAN overlay, and what a pod needs on top of it.
//!
//! Two binaries share this library: the CNI plugin `edgeflannel` and the node daemon `edgeflanneld`. What must
//! be is computed from the node's own record ([`record`]), compared with what the kernel has, and the
//! difference is carried out ([`overlay`]); doing it again changes nothing.

pub mod cluster;
pub mod config;
pub mod daemon;
pub mod flags;
pub mod http;
pub mod ipam;
pub mod mac;
pub mod masquerade;
pub mod netlink;
pub mod netns;
pub mod nft;
pub mod oneshot;
pub mod overlay;
pub mod plugin;
pub mod pod;
pub mod record;
pub mod status;
pub mod subnet_env;
pub mod sysctl;
pub mod underlay;
