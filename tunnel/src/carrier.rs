//! What carries streams between server and agent. One module per wire protocol; only `h2` today.

pub mod h2;
