//! Flags and environment of `edge-tunnel`: what the person wrote, and what the program uses. All
//! mistakes are reported at once.
