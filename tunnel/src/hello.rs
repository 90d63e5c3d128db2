//! What an agent says of itself when a connection is made (instance, session id, role) and what the
//! server answers. Bytes from outside: pure, bounded, fuzzed.
