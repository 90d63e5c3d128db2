//! Sessions begin, move, and end: restarts, drains, clones, nodes that go.

use crate::common::*;
use std::{fs, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::oneshot,
    time::{Instant, sleep},
};
use tunnel::{agent::Agent, config::server::NodeSource};

const SOON: Duration = Duration::from_secs(10);

#[tokio::test]
async fn a_server_that_is_told_to_stop_drains() {
    let world = World::new();
    let mut server = world.server();
    let _agent = world.agent("node1", server.agents, echo().await);
    server.sessions(1).await;
    assert_eq!(page(server.pages, "/readyz").await.0, 200);
    let mut stream = server.connect("node1:10250").await.unwrap();
    ping(&mut stream).await;
    let start = Instant::now();
    server.stop();
    sleep(Duration::from_millis(300)).await;
    assert_eq!(page(server.pages, "/readyz").await.0, 503);
    // New dials for five seconds more.
    sleep(Duration::from_secs(4)).await;
    ping(&mut server.connect("node1:10250").await.unwrap()).await;
    sleep(Duration::from_secs(2)).await;
    let refused = server.connect("node1:10250").await.unwrap_err();
    assert!(refused.starts_with("HTTP/1.1 503 draining: "), "{refused}");
    // The stream that stands has its time, and when it is done so is the server.
    ping(&mut stream).await;
    stream.shutdown().await.unwrap();
    within(Duration::from_secs(3), server.ended()).await;
    assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
}

#[tokio::test]
async fn what_is_left_after_the_drain_is_cut_and_says_so() {
    let world = World::new();
    let mut config = world.server_config();
    config.limits.drain = Duration::from_secs(1);
    let mut server = world.server_with(config);
    let _agent = world.agent("node1", server.agents, echo().await);
    server.sessions(1).await;
    let mut stream = server.connect_tls(&world.pki, "node1:10250").await.unwrap();
    ping(&mut stream).await;
    server.stop();
    within(Duration::from_secs(3), server.ended()).await;
    let error = within(SOON, stream.read(&mut [0; 9])).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}");
}

#[tokio::test]
async fn an_agent_that_is_told_to_stop_lets_its_streams_finish() {
    let world = World::new();
    let server = world.server();
    world.pki.node("node1");
    let agent = Agent::new(world.agent_config("node1", server.agents, echo().await)).unwrap();
    let pages = agent.pages_address().unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let task = tokio::spawn(agent.run(async move { drop(stopped.await) }));
    server.sessions(1).await;
    within(SOON, async {
        while page(pages, "/readyz").await.0 != 200 {
            sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    let mut stream = server.connect("node1:10250").await.unwrap();
    ping(&mut stream).await;
    drop(stop);
    sleep(Duration::from_millis(200)).await;
    assert_eq!(page(pages, "/readyz").await.0, 503);
    let refused = server.connect("node1:10250").await.unwrap_err();
    assert!(refused.starts_with("HTTP/1.1 503 no-session: "), "{refused}");
    ping(&mut stream).await;
    stream.shutdown().await.unwrap();
    let mut rest = Vec::new();
    within(SOON, stream.read_to_end(&mut rest)).await.unwrap();
    within(Duration::from_secs(1), task).await.unwrap();
}

#[tokio::test]
async fn a_lost_session_resets_its_streams_and_comes_back() {
    let world = World::new();
    let server = world.server();
    let kubelet = echo().await;
    let agent = world.agent("node1", server.agents, kubelet);
    server.sessions(1).await;
    let mut stream = server.connect_tls(&world.pki, "node1:10250").await.unwrap();
    ping(&mut stream).await;
    // The agent is killed.
    drop(agent);
    let error = within(SOON, stream.read(&mut [0; 9])).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}");
    server.sessions(0).await;
    // Without a list of nodes nobody knows it now.
    let refused = server.connect("node1:10250").await.unwrap_err();
    assert!(refused.starts_with("HTTP/1.1 404 unknown-node: "), "{refused}");
    // And started again.
    let _agent = world.agent("node1", server.agents, kubelet);
    server.sessions(1).await;
    ping(&mut server.connect("node1:10250").await.unwrap()).await;
    // The server is killed, and is back on the same port: so is the agent, within ten seconds.
    let mut config = world.server_config();
    config.listen = server.agents;
    server.kill();
    sleep(Duration::from_secs(1)).await;
    let server = world.server_with(config);
    within(SOON, server.sessions(1)).await;
    ping(&mut server.connect("node1:10250").await.unwrap()).await;
}

#[tokio::test]
async fn of_two_agents_with_one_certificate_the_newer_gets_the_new_dials() {
    let world = World::new();
    let server = world.server();
    let word = |word: &'static [u8]| {
        serve(move |mut socket| async move {
            socket.write_all(word).await.unwrap();
            let _ = socket.read(&mut [0]).await;
        })
    };
    let said = async |server: &Running| {
        let mut stream = server.connect("node1:10250").await.unwrap();
        let mut word = [0; 3];
        stream.read_exact(&mut word).await.unwrap();
        (stream, word)
    };
    let _old = world.agent("node1", server.agents, word(b"old").await);
    server.sessions(1).await;
    let (mut stream, heard) = said(&server).await;
    assert_eq!(&heard, b"old");
    let new = spawn_agent(world.agent_config("node1", server.agents, word(b"new").await));
    server.sessions(2).await;
    assert_eq!(&said(&server).await.1, b"new");
    // The older's streams may finish.
    stream.write_all(b"bye").await.unwrap();
    let mut rest = Vec::new();
    within(SOON, stream.read_to_end(&mut rest)).await.unwrap();
    // Nobody flaps, and when the newer goes the older is there.
    sleep(Duration::from_secs(2)).await;
    assert_eq!(&said(&server).await.1, b"new");
    drop(new);
    server.sessions(1).await;
    assert_eq!(&said(&server).await.1, b"old");
}

#[tokio::test]
async fn a_node_that_is_deleted_loses_its_session_and_a_broken_list_deletes_nobody() {
    let world = World::new();
    let nodes = world.dir.path().join("nodes.json");
    fs::write(&nodes, r#"[{"name": "node1"}]"#).unwrap();
    let mut config = world.server_config();
    config.nodes = NodeSource::File(nodes.clone());
    let server = world.server_with(config);
    let _agent = world.agent("node1", server.agents, echo().await);
    let _stranger = world.agent("node2", server.agents, echo().await);
    server.sessions(1).await;
    assert!(server.gate.sessions.present("node1"));
    for broken in ["", "[{", r#"{"name": "node1"}"#] {
        fs::write(&nodes, broken).unwrap();
        sleep(Duration::from_secs(5)).await;
        ping(&mut server.connect("node1:10250").await.unwrap()).await;
    }
    fs::write(&nodes, r#"[{"name": "node2"}]"#).unwrap();
    within(SOON, async {
        while server.gate.sessions.present("node1") {
            sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn the_pages_show_who_is_connected() {
    let world = World::new();
    let server = world.server();
    let _agent = world.agent("node1", server.agents, echo().await);
    server.sessions(1).await;
    let mut stream = server.connect("node1:10250").await.unwrap();
    ping(&mut stream).await;
    let (code, body) = page(server.pages, "/sessions").await;
    let sessions: serde_json::Value = serde_json::from_str(&body).unwrap();
    let session = &sessions["sessions"][0];
    assert_eq!((code, &session["node"], &session["streams"]), (200, &"node1".into(), &1.into()), "{body}");
    assert_eq!((&session["bytes_in"], &session["bytes_out"]), (&5.into(), &5.into()), "{body}");
    assert!(session["rtt_ms"].as_f64().is_some_and(|ms| ms > 0.0), "{body}");
    let (_, metrics) = page(server.pages, "/metrics").await;
    for line in
        ["edge_tunnel_sessions 1", "edge_tunnel_streams 1", "edge_tunnel_bytes_total{direction=\"in\"} 5"]
    {
        assert!(metrics.lines().any(|other| other == line), "{line} is not in {metrics}");
    }
}
