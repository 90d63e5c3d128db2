//! `edge-tunnel server`: listeners, sessions and front ends put together, and the drain.
