//! Who may be an agent and who may call: certificates decide, nothing else.

use crate::common::*;
use std::time::Duration;
use tokio::time::{Instant, sleep};
use tunnel::{
    agent::connect::{Failure, connect},
    hello::{Hello, Id, Role},
    tls,
};

/// What an agent with this certificate hears.
async fn as_agent(world: &World, server: &Running, name: &str) -> Result<(), String> {
    let config = world.agent_config(name, server.agents, "127.0.0.1:1".parse().unwrap());
    let tls = tls::client(config.pair.clone(), config.server_ca.clone()).unwrap();
    let id = |text| Id::parse(text).unwrap();
    let hello = Hello { instance: id("i"), session: id("s"), role: Role::Probe };
    match connect(&config, &config.servers[0], &tls, &hello).await {
        Ok(_) => Ok(()),
        Err(failure @ (Failure::Step(..) | Failure::TurnedAway(..))) => Err(failure.to_string()),
    }
}

#[tokio::test]
async fn only_a_nodes_own_certificate_is_an_agents() {
    let world = World::new();
    let server = world.server();
    let usual = world.pki.usual();
    let node = pki::Leaf { cn: "system:node:node1", organization: Some("system:nodes"), ..usual };
    for (name, leaf, heard) in [
        ("good", pki::Leaf { ..node.clone() }, ""),
        ("no-o", pki::Leaf { organization: None, ..node.clone() }, "unknown-node"),
        ("masters", pki::Leaf { organization: Some("system:masters"), ..node.clone() }, "unknown-node"),
        ("plain", pki::Leaf { cn: "node1", sans: &["system:node:node1"], ..node.clone() }, "unknown-node"),
        ("foreign", pki::Leaf { ca: "foreign", ..node.clone() }, "certificate"),
        ("caller", pki::Leaf { ca: "caller", ..node.clone() }, "certificate"),
        ("expired", pki::Leaf { not_after: -60, ..node.clone() }, "certificate"),
        ("future", pki::Leaf { not_before: 3600, ..node.clone() }, "certificate"),
        ("server", pki::Leaf { server: true, ..node.clone() }, "certificate"),
    ] {
        world.pki.issue(name, &leaf);
        match as_agent(&world, &server, name).await {
            Ok(()) => assert_eq!(heard, "", "{name} was let in"),
            Err(why) => assert!(!heard.is_empty() && why.contains(heard), "{name}: {why}"),
        }
    }
    assert!(server.gate.sessions.is_empty());
}

/// A node whose certificate names another one as well is itself and nobody else.
#[tokio::test]
async fn a_certificate_of_one_node_claims_no_other() {
    let world = World::new();
    let server = world.server();
    let sans = &["system:node:node2", "node2"];
    let usual = world.pki.usual();
    let both = pki::Leaf { cn: "system:node:node1", organization: Some("system:nodes"), sans, ..usual };
    world.pki.issue("node1", &both);
    let _agent = spawn_agent(world.agent_config("node1", server.agents, echo().await));
    server.sessions(1).await;
    ping(&mut server.connect("node1:10250").await.unwrap()).await;
    let refused = server.connect("node2:10250").await.unwrap_err();
    assert!(refused.starts_with("HTTP/1.1 404 unknown-node: "), "{refused}");
}

/// An edge board without a clock: it says so, and recovers by itself once the time is right.
#[tokio::test]
async fn a_server_certificate_that_is_not_yet_valid_is_told_plainly() {
    let world = World::new();
    let sans = &["server.test"];
    let future =
        pki::Leaf { ca: "server", cn: "server", sans, server: true, not_before: 3600, ..world.pki.usual() };
    world.pki.issue("server", &future);
    let server = world.server();
    world.pki.node("node1");
    let why = as_agent(&world, &server, "node1").await.unwrap_err();
    assert!(why.contains("not yet valid") && why.contains("clock"), "{why}");
    let _agent = world.agent("node1", server.agents, echo().await);
    sleep(Duration::from_secs(1)).await;
    world.pki.issue("server", &pki::Leaf { not_before: -3600, ..future });
    server.sessions(1).await;
}

#[tokio::test]
async fn nodes_never_call_and_callers_may_be_listed() {
    let world = World::new();
    let mut config = world.server_config();
    config.caller_names = vec!["kube-apiserver".into(), "prometheus.example".into()];
    let server = world.server_with(config);
    let _agent = world.agent("node1", server.agents, echo().await);
    server.sessions(1).await;
    let usual = pki::Leaf { ca: "caller", ..world.pki.usual() };
    let node = pki::Leaf { cn: "system:node:node1", organization: Some("system:nodes"), ..usual.clone() };
    for (name, leaf, answered) in [
        ("listed", pki::Leaf { cn: "kube-apiserver", ..usual.clone() }, Some("")),
        ("by-san", pki::Leaf { cn: "x", sans: &["prometheus.example"], ..usual.clone() }, Some("")),
        ("other", pki::Leaf { cn: "someone", ..usual.clone() }, Some("HTTP/1.1 403 denied-by-server: ")),
        ("node", pki::Leaf { ..node.clone() }, Some("HTTP/1.1 403 denied-by-server: ")),
        (
            "sly",
            pki::Leaf { sans: &["kube-apiserver"], ..node.clone() },
            Some("HTTP/1.1 403 denied-by-server: "),
        ),
        ("agents-ca", pki::Leaf { ca: "agent", cn: "kube-apiserver", ..usual.clone() }, None),
        ("old", pki::Leaf { cn: "kube-apiserver", not_after: -60, ..usual.clone() }, None),
    ] {
        world.pki.issue(name, &leaf);
        let answer = match server.caller(&world.pki, name).await {
            Ok(mut stream) => ask(&mut stream, "node1:10250").await,
            Err(error) => Err(error.to_string()),
        };
        match (answer, answered) {
            (Ok(()), expected) => assert_eq!(expected, Some(""), "{name} was let in"),
            (Err(line), Some(expected)) => {
                assert!(!expected.is_empty() && line.starts_with(expected), "{name}: {line}");
            }
            (Err(line), None) => assert!(!line.starts_with("HTTP/"), "{name}: {line}"),
        }
    }
}

#[tokio::test]
async fn a_session_ends_with_its_certificate() {
    let world = World::new();
    let server = world.server();
    let kubelet = echo().await;
    let leaf = pki::Leaf {
        cn: "system:node:node1",
        organization: Some("system:nodes"),
        not_after: 4,
        ..world.pki.usual()
    };
    world.pki.issue("node1", &leaf);
    let _agent = spawn_agent(world.agent_config("node1", server.agents, kubelet));
    server.sessions(1).await;
    let mut stream = server.connect("node1:10250").await.unwrap();
    ping(&mut stream).await;
    let start = Instant::now();
    server.sessions(0).await;
    assert!(start.elapsed() < Duration::from_secs(6), "{:?}", start.elapsed());
    // kubelet has renewed it: back by itself.
    world.pki.node("node1");
    server.sessions(1).await;
    ping(&mut server.connect("node1:10250").await.unwrap()).await;
}

/// Certificates and CAs change under open streams.
#[tokio::test]
async fn files_are_read_again_and_no_stream_notices() {
    let world = World::new();
    let server = world.server();
    let agent = world.agent("node1", server.agents, echo().await);
    server.sessions(1).await;
    let mut stream = server.connect("node1:10250").await.unwrap();
    let mut tls = server.connect_tls(&world.pki, "node1:10250").await.unwrap();
    ping(&mut stream).await;
    // The agent renews: its new session takes the new dials, the old one's streams go on.
    let old = server.gate.sessions.newest("node1").unwrap();
    world.pki.node("node1");
    within(Duration::from_secs(10), async {
        while server.gate.sessions.newest("node1").is_none_or(|session| session.id == old.id) {
            sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    ping(&mut stream).await;
    ping(&mut tls).await;
    // The server gets another certificate and other CAs; a broken file changes nothing.
    let server_leaf =
        pki::Leaf { ca: "server", cn: "new", sans: &["server.test"], server: true, ..world.pki.usual() };
    world.pki.issue("server", &server_leaf);
    std::fs::copy(world.pki.ca("foreign"), world.pki.ca("caller")).unwrap();
    std::fs::write(world.pki.ca("agent"), "nonsense").unwrap();
    sleep(Duration::from_secs(10)).await;
    ping(&mut stream).await;
    ping(&mut tls).await;
    world.pki.issue("foreigner", &pki::Leaf { ca: "foreign", cn: "kube-apiserver", ..world.pki.usual() });
    let mut new = server.caller(&world.pki, "foreigner").await.unwrap();
    assert_eq!(new.get_ref().1.peer_certificates().map(<[_]>::len), Some(1));
    ask(&mut new, "node1:10250").await.unwrap();
    assert!(server.connect_tls_error(&world.pki).await, "the old CA's callers are refused");
    as_agent(&world, &server, "node1").await.unwrap();
    drop(agent);
}

/// Only the server opens streams: an agent that tries ends its own connection, and nothing else.
#[tokio::test]
async fn an_agent_that_opens_streams_is_dropped() {
    let world = World::new();
    let server = world.server();
    let _good = world.agent("node2", server.agents, echo().await);
    server.sessions(1).await;
    world.pki.node("node1");
    let config = world.agent_config("node1", server.agents, "127.0.0.1:1".parse().unwrap());
    let tls = tls::client(config.pair.clone(), config.server_ca.clone()).unwrap();
    let id = |text| Id::parse(text).unwrap();
    let hello = Hello { instance: id("i"), session: id("s"), role: Role::Session };
    let connected =
        connect(&config, &config.servers[0], &tls, &hello).await.map_err(|why| why.to_string()).unwrap();
    let (mut h2, connection) = h2::client::handshake(connected.stream).await.unwrap();
    let connection = tokio::spawn(connection);
    let request = http::Request::builder().method("CONNECT").uri("node2:10250").body(()).unwrap();
    let answered = match h2.send_request(request, false) {
        Ok((response, _send)) => response.await.map(|_| ()),
        Err(error) => Err(error),
    };
    assert!(answered.is_err(), "somebody served it");
    within(Duration::from_secs(5), connection).await.unwrap().unwrap_err();
    server.sessions(1).await;
    ping(&mut server.connect("node2:10250").await.unwrap()).await;
}
