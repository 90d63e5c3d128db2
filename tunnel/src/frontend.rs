//! Where callers come in: one module per kind of listener, all in front of the same router.

pub mod egress;
