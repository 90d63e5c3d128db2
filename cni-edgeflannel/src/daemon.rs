//! The node daemon: restores the overlay from the record, then keeps it and follows the cluster.

pub mod board;
pub mod identity;
pub mod lock;
pub mod monitor;
pub mod pace;
pub mod systemd;
