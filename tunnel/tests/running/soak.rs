//! The real binaries after very many connects and aborts: descriptors, threads and memory are where they began.

use crate::{common::*, cuts::connects_and_aborts, far::Far};
use std::{fs, process::Child, time::Duration};
use tokio::time::sleep;

/// How many, unless the variable `SOAK` says so: `SOAK=100000 cargo test -p tunnel --test running soak`.
const ROUNDS: usize = 5000;

/// What an allocator may keep of what it was given back, bytes.
const KEPT: usize = 6 << 20;

/// What a process holds.
#[derive(Debug)]
struct Held {
    descriptors: usize,
    threads: usize,
    /// Resident, bytes.
    memory: usize,
}

impl Held {
    fn by(process: &Child) -> Self {
        let file = |name: &str| format!("/proc/{}/{name}", process.id());
        let count = |name: &str| fs::read_dir(file(name)).unwrap().count();
        let pages = fs::read_to_string(file("statm")).unwrap();
        let pages: usize = pages.split(' ').nth(1).unwrap().parse().unwrap();
        Self { descriptors: count("fd"), threads: count("task"), memory: pages * 4096 }
    }

    fn is_no_more_than(&self, before: &Self) -> bool {
        self.descriptors <= before.descriptors
            && self.threads <= before.threads
            && self.memory <= before.memory + KEPT
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connects_and_aborts_leave_both_ends_where_they_began() {
    let rounds = std::env::var("SOAK").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(ROUNDS);
    let far = Far::new(Duration::ZERO, 0);
    drop(far.connected(Duration::from_secs(20)).await);
    let held = || [Held::by(&far.server.0), Held::by(&far.agent.0)];
    let few = held().map(|held| held.descriptors);
    // The first ones bring threads, and memory that is kept for the next.
    connects_and_aborts(&far.socket, 2000).await;
    let quiet = async |before: &[Held; 2]| {
        let mut now = held();
        for _ in 0..200 {
            if now.iter().zip(before).all(|(now, before)| now.is_no_more_than(before)) {
                return;
            }
            sleep(Duration::from_millis(100)).await;
            now = held();
        }
        panic!("server and agent before: {before:?}, after {rounds} connects and aborts: {now:?}");
    };
    let mut warm = held();
    for (warm, few) in warm.iter_mut().zip(few) {
        warm.descriptors = few;
    }
    quiet(&warm).await;
    connects_and_aborts(&far.socket, rounds).await;
    quiet(&warm).await;
    let mut stream = far.connected(Duration::from_secs(5)).await;
    ping(&mut stream).await;
}
