//! edgeflannel: flannel-compatible pod networking for edge nodes.

pub mod config;
pub mod ipam;
pub mod mac;
pub mod masquerade;
pub mod netlink;
pub mod netns;
pub mod nft;
pub mod plugin;
pub mod pod;
pub mod subnet_env;
pub mod sysctl;
