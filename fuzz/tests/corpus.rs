//! Replays the committed corpus through every fuzz target.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::{fs, path::Path};

/// Feeds every file of the target's corpus, and says how many that were.
fn replay(target: &str, run: fn(&[u8])) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    let mut replayed = 0;
    for file in fs::read_dir(&corpus).unwrap() {
        let file = file.unwrap().path();
        let data = fs::read(&file).unwrap();
        if let Err(panic) = std::panic::catch_unwind(|| run(&data)) {
            panic!("{}: {:?}", file.display(), panic.downcast_ref::<String>());
        }
        replayed += 1;
    }
    assert!(replayed >= 10, "only {replayed} inputs in {}", corpus.display());
}

#[test]
fn request() {
    replay("request", fuzz::request);
}

#[test]
fn result() {
    replay("result", fuzz::result);
}

#[test]
fn config() {
    replay("config", fuzz::config);
}

#[test]
fn subnet_env() {
    replay("subnet_env", fuzz::subnet_env);
}

#[test]
fn connect() {
    replay("connect", fuzz::connect);
}

#[test]
fn hello() {
    replay("hello", fuzz::hello);
}

#[test]
fn news() {
    replay("news", fuzz::news);
}

#[test]
fn proxy_answer() {
    replay("proxy_answer", fuzz::proxy_answer);
}

#[test]
fn client_hello() {
    replay("client_hello", fuzz::client_hello);
}

#[test]
fn proxy_request() {
    replay("proxy_request", fuzz::proxy_request);
}
