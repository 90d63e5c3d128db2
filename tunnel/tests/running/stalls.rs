//! Readers that stand still, beside people who type.

use crate::common::*;
use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    time::{Instant, sleep},
};

/// A kubelet that sends without end to those who say "flood", and echoes to the others.
async fn flooding() -> std::net::SocketAddr {
    serve(|mut socket| async move {
        let mut first = [0; 5];
        if socket.read_exact(&mut first).await.is_err() {
            return;
        }
        if &first == b"flood" {
            let block = vec![7; 64 << 10];
            while socket.write_all(&block).await.is_ok() {}
        } else {
            socket.write_all(&first).await.unwrap();
            let (mut reader, mut writer) = socket.split();
            let _ = tokio::io::copy(&mut reader, &mut writer).await;
        }
    })
    .await
}

async fn flood(server: &Running) -> UnixStream {
    let mut stream = server.connect("node1:10250").await.unwrap();
    stream.write_all(b"flood").await.unwrap();
    stream
}

/// The slowest of some exchanges.
async fn slowest(stream: &mut UnixStream, times: u32) -> Duration {
    let mut slowest = Duration::ZERO;
    for _ in 0..times {
        let start = Instant::now();
        within(Duration::from_secs(10), ping(stream)).await;
        slowest = slowest.max(start.elapsed());
        sleep(Duration::from_millis(5)).await;
    }
    slowest
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_readers_that_stand_still_cost_nobody_else_anything() {
    let world = World::new();
    let server = world.server();
    let _agent = world.agent("node1", server.agents, flooding().await);
    server.sessions(1).await;
    let mut typing = server.connect("node1:10250").await.unwrap();
    ping(&mut typing).await;
    let mut still = Vec::new();
    for _ in 0..100 {
        still.push(flood(&server).await);
    }
    sleep(Duration::from_secs(4)).await;
    let alone = slowest(&mut typing, 50).await;
    assert!(alone < Duration::from_millis(500), "{alone:?} beside a hundred that stand still");
    // New ones are let in, and bulk flows.
    let mut bulk = flood(&server).await;
    let mut block = vec![0; 1 << 20];
    within(Duration::from_secs(10), async {
        for _ in 0..16 {
            bulk.read_exact(&mut block).await.unwrap();
        }
    })
    .await;
    ping(&mut server.connect("node1:10250").await.unwrap()).await;
    // A reader that goes on gets every byte that was kept for it.
    let first = &mut still[0];
    within(Duration::from_secs(10), first.read_exact(&mut block)).await.unwrap();
    assert!(block.iter().all(|&byte| byte == 7));
}

/// A paused `logs -f`, a `cp`, and somebody who types, all on one node.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_stands_still_and_bulk_leave_a_person_alone() {
    let world = World::new();
    let server = world.server();
    let _agent = world.agent("node1", server.agents, flooding().await);
    server.sessions(1).await;
    let mut typing = server.connect("node1:10250").await.unwrap();
    ping(&mut typing).await;
    let still = flood(&server).await;
    let mut bulk = flood(&server).await;
    let moved = Arc::new(AtomicUsize::new(0));
    let counted = moved.clone();
    let bulk = Dropped(tokio::spawn(async move {
        let mut block = vec![0; 64 << 10];
        while let Ok(read @ 1..) = bulk.read(&mut block).await {
            counted.fetch_add(read, Relaxed);
        }
    }));
    sleep(Duration::from_secs(2)).await;
    let before = moved.load(Relaxed);
    let slowest = slowest(&mut typing, 100).await;
    assert!(slowest < Duration::from_secs(1), "{slowest:?} beside bulk and one that stands still");
    assert!(moved.load(Relaxed) > before + (1 << 20), "the bulk stands still as well");
    // Who comes now is let in.
    ping(&mut server.connect("node1:10250").await.unwrap()).await;
    drop((still, bulk));
}

/// When they hold half of a connection's window, the one that has stood longest is reset.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn too_many_on_one_connection_are_reset_one_by_one() {
    let world = World::new();
    let mut config = world.server_config();
    config.limits.max_streams_per_node = 2000;
    let server = world.server_with(config);
    let _agent = world.agent("node1", server.agents, flooding().await);
    server.sessions(1).await;
    let mut typing = server.connect("node1:10250").await.unwrap();
    let mut still = Vec::new();
    for _ in 0..400 {
        still.push(flood(&server).await);
    }
    let session = server.gate.sessions.newest("node1").unwrap();
    within(Duration::from_secs(60), async {
        while session.streams() > 380 {
            slowest(&mut typing, 10).await;
        }
    })
    .await;
    let (_, metrics) = page(server.pages, "/metrics").await;
    let stalled =
        metrics.lines().find_map(|line| line.strip_prefix("edge_tunnel_refused_total{reason=\"stalled\"} "));
    assert!(stalled.unwrap().parse::<u32>().unwrap() >= 20, "{metrics}");
}
