//! One pod's network: its names, what it needs, and making it so.

pub mod check;
pub mod kernel;
pub mod look;
pub mod names;
pub mod plan;
pub mod remove;
pub mod wanted;
