//! The whole way in one process: caller, server, agent, kubelet.

use crate::common::*;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const SOON: Duration = Duration::from_secs(10);

#[tokio::test]
async fn bytes_go_both_ways_and_ends_are_ends() {
    let world = World::new();
    let server = world.server();
    let _agent = world.agent("node1", server.agents, echo().await);
    server.sessions(1).await;
    let mut stream = server.connect("Node1:10250").await.unwrap();
    ping(&mut stream).await;
    ping(&mut stream).await;
    // Half-close: the echo still comes, then its end.
    stream.write_all(b"last").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut rest = Vec::new();
    within(SOON, stream.read_to_end(&mut rest)).await.unwrap();
    assert_eq!(rest, b"last");
}

/// The bytes from `from` on of an endless text that nothing can shift or swap unseen.
fn text(from: usize, length: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length + 8);
    let mut word = from / 8;
    while bytes.len() < from % 8 + length {
        bytes.extend_from_slice(&(word as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
        word += 1;
    }
    bytes[from % 8..from % 8 + length].to_vec()
}

/// Found when it was written: a stream that was moved ended, looking whole, where the move had been slow.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bulk_arrives_whole_in_both_directions_while_it_is_moved() {
    const SIZE: usize = 64 << 20;
    let world = World::new();
    let server = world.server();
    let _agent = world.agent("node1", server.agents, echo().await);
    server.sessions(1).await;
    let stream = server.connect("node1:10250").await.unwrap();
    let (mut reader, mut writer) = stream.into_split();
    let sent = tokio::spawn(async move {
        let mut sent = 0;
        while sent < SIZE {
            let piece = text(sent, fastrand::usize(1..100_000).min(SIZE - sent));
            writer.write_all(&piece).await.unwrap();
            sent += piece.len();
        }
        writer.shutdown().await.unwrap();
    });
    let (mut seen, mut buffer) = (0, vec![0; 100_000]);
    loop {
        let read = within(SOON, reader.read(&mut buffer)).await.unwrap();
        if read == 0 {
            break;
        }
        assert!(buffer[..read] == text(seen, read), "at {seen}");
        seen += read;
    }
    assert_eq!(seen, SIZE);
    sent.await.unwrap();
    let session = server.gate.sessions.newest("node1").unwrap();
    assert!(session.connections() > 1, "bulk moved to a connection of its own");
}
