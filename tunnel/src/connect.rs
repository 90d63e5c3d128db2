//! The head of an HTTP/1.x CONNECT, from bytes to a target or a refusal. Pure, bounded, fuzzed.
