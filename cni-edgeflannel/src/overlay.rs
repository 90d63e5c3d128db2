//! The node's end of flannel's VXLAN overlay, as one reconcile.
//!
//! [`desired`] says from the node's record what the kernel should have, [`observed`] is what it has, [`diff`] is
//! the ordered list of steps between the two. All of that is pure; the kernel is read and altered elsewhere.
//! The plugin (restoring after a reboot) and the daemon (always) use the same functions, and doing it again
//! changes nothing.
//!
//! Ownership: flannel.VNI and flannel-v6.VNI are ours alone, with every onlink route, permanent neighbour and
//! permanent forwarding entry on them; of the rest of the machine only what a step names is touched.

pub mod claims;
pub mod desired;
pub mod diff;
pub mod kernel;
pub mod masquerade;
pub mod observed;
pub mod reconcile;
pub mod restore;
pub mod step;
pub mod vtep;

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;

pub use claims::{Conflict, Dispute};
pub use desired::{Desired, Device, Entries, Hop, desired};
pub use diff::plan;
pub use observed::{LinkSeen, Observed, OnLink, RouteSeen};
pub use step::{Kind, Step};

use crate::record::Family;

/// IANA's is 4789; Linux's own default, and with it flannel's, is this one.
pub const DEFAULT_PORT: u16 = 8472;

/// What the VXLAN adds to a packet: outer IP, UDP, VXLAN and inner Ethernet headers. The kernel enforces both;
/// flannel knows only the first and so asks for an MTU that flannel-v6.VNI never gets.
#[must_use]
pub fn overhead(family: Family) -> u32 {
    match family {
        Family::V4 => 50,
        Family::V6 => 70,
    }
}

/// flannel's names: `flannel.1`, `flannel-v6.1`.
#[must_use]
pub fn device_name(family: Family, vni: u32) -> String {
    match family {
        Family::V4 => format!("flannel.{vni}"),
        Family::V6 => format!("flannel-v6.{vni}"),
    }
}
