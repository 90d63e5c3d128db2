//! Sticky IPAM: a CNI IPAM plugin that keeps each pod's addresses bound to its name, on the node's own disk.
//!
//! An ADD walks through the files like this: [`plugin`] reads the [`config`] (mistakes are reported before anything
//! is touched) and the [`identity`]; [`store`] takes the [`lock`], opens the state ([`disk`], `database`) and shows
//! it as a [`view::View`]; [`ownership`] decides, with [`allocate`] choosing addresses from the [`range`]s; the
//! store writes the [`view::Changes`] into all [`tables`] in one transaction; the plugin prints the result.
//!
//! What decides is pure (`config`, `identity`, `range`, `allocate`, `ownership`, `record`, `view`); what acts is in
//! `lock`, `disk`, `database`, `tables`, `store`, `notes` (a disk that cannot be written) and `rebuild` with
//! `recover` (a state that is new or damaged). [`command`] is what a person can ask.

pub mod address;
pub mod allocate;
pub mod audit;
pub mod command;
pub mod config;
mod database;
pub mod disk;
pub mod fault;
pub mod identity;
pub mod lock;
pub mod notes;
pub mod ownership;
pub mod plugin;
pub mod range;
mod rebuild;
pub mod record;
pub mod recover;
pub mod resolv;
pub mod store;
pub mod tables;
pub mod view;
