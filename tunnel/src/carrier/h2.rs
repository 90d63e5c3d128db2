//! Streams over one HTTP/2 connection in reversed roles: the agent dials, the server opens streams.
