//! What a person types: who is connected ([`sessions`]), why an agent is not ([`doctor`]), and the certificates of a
//! first installation ([`certs`]). Each has a pure part that decides or draws, and a thin one that acts.

pub mod certs;
pub mod doctor;
pub mod sessions;
