//! Every way of being refused, and that each says why: in the status line, within the time.

use crate::common::*;
use socket2::{Domain, Socket, Type};
use std::{fs, net::SocketAddr, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UnixStream},
    time::{Instant, sleep},
};
use tunnel::{config::server::NodeSource, refusal::Reason};

/// A port of loopback that refuses.
async fn closed() -> SocketAddr {
    tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}

/// A port of loopback that never answers, for as long as what is returned lives.
pub fn blackhole() -> (SocketAddr, Vec<Socket>) {
    let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    listener.bind(&"127.0.0.1:0".parse::<SocketAddr>().unwrap().into()).unwrap();
    listener.listen(0).unwrap();
    let address = listener.local_addr().unwrap();
    let mut sockets = vec![listener];
    for _ in 0..4 {
        let filler = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        filler.set_nonblocking(true).unwrap();
        let _ = filler.connect(&address);
        sockets.push(filler);
    }
    (address.as_socket().unwrap(), sockets)
}

#[tokio::test]
async fn what_is_wrong_with_the_target_is_said() {
    let world = World::new();
    let nodes = world.dir.path().join("nodes.json");
    let list = r#"[
        {"name": "node1", "addresses": ["10.1.0.1"], "podCIDRs": ["10.244.1.0/24"]},
        {"name": "node2", "addresses": ["10.1.0.2", "192.168.50.2"]},
        {"name": "node3", "addresses": ["10.1.0.3", "192.168.50.2"]}
    ]"#;
    fs::write(&nodes, list).unwrap();
    let mut config = world.server_config();
    config.nodes = NodeSource::File(nodes);
    let server = world.server_with(config);
    let _agent = world.agent("node1", server.agents, closed().await);
    server.sessions(1).await;
    for (target, status) in [
        ("node1:10250", "502 refused: "),
        ("NODE1:10250", "502 refused: "),
        ("10.1.0.1:10250", "502 refused: "),
        ("[::ffff:10.1.0.1]:10250", "502 refused: "),
        ("node1:22", "403 denied-by-agent: "),
        ("10.244.1.9:80", "403 denied-by-agent: "),
        ("10.250.0.1:443", "403 denied-by-server: "),
        ("node2:10250", "503 no-session: "),
        ("nowhere:10250", "404 unknown-node: "),
        ("192.168.50.2:10250", "409 ambiguous-address: "),
        ("node1", "400 malformed: "),
        ("fd00::5:10250", "400 malformed: "),
    ] {
        let refused = within(Duration::from_secs(2), server.connect(target)).await.unwrap_err();
        assert!(refused.starts_with(&format!("HTTP/1.1 {status}")), "{target}: {refused}");
    }
    let ambiguous = server.connect("192.168.50.2:10250").await.unwrap_err();
    assert!(ambiguous.contains("node2") && ambiguous.contains("node3"), "{ambiguous}");
}

#[tokio::test]
async fn a_kubelet_that_does_not_answer_is_told_within_the_time() {
    let world = World::new();
    let mut config = world.server_config();
    config.limits.dial_timeout = Duration::from_secs(2);
    config.limits.max_streams_per_node = 2;
    let server = Arc::new(world.server_with(config));
    let (hole, _sockets) = blackhole();
    let _agent = world.agent("node1", server.agents, hole);
    server.sessions(1).await;
    let start = Instant::now();
    let dials =
        [server.clone(), server.clone()].map(|server| async move { server.connect("node1:10250").await });
    let dials = tokio::spawn(futures_util::future::join_all(dials));
    sleep(Duration::from_millis(200)).await;
    // Dials under way count for the node's cap: nobody piles them up.
    let refused = server.connect("node1:10250").await.unwrap_err();
    assert!(refused.starts_with("HTTP/1.1 429 too-many: "), "{refused}");
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    for dial in dials.await.unwrap() {
        let refused = dial.unwrap_err();
        assert!(refused.starts_with("HTTP/1.1 504 timeout: "), "{refused}");
    }
    assert!(start.elapsed() <= Duration::from_secs(2), "{:?}", start.elapsed());
}

/// The agent judges what it is asked, whoever asks.
#[tokio::test]
async fn a_hostile_server_reaches_nothing_else() {
    let world = World::new();
    let server = world.server();
    let _agent = world.agent("node1", server.agents, echo().await);
    server.sessions(1).await;
    let session = server.gate.sessions.newest("node1").unwrap();
    for target in [
        "169.254.169.254:80",
        "127.0.0.1:22",
        "[::1]:10250",
        "[fe80::1]:80",
        "224.0.0.1:80",
        "0.0.0.0:10250",
        "node2:10250",
    ] {
        let asked =
            session.open(&target.parse().unwrap(), 9, Duration::from_secs(5), Default::default()).await;
        let Err(refusal) = asked else { panic!("{target} was let in") };
        assert_eq!(refusal.reason, Reason::DeniedByAgent, "{target}: {refusal}");
    }
}

#[tokio::test]
async fn what_is_no_connect_gets_an_answer_all_the_same() {
    let world = World::new();
    let server = world.server();
    let long = format!("CONNECT node1:10250 HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(64 << 10));
    for (bytes, status) in [
        ("GET http://node1:10250/ HTTP/1.1\r\nHost: a\r\n\r\n", "405 method: "),
        ("CONNECT node1:10250 HTTP/2\r\n\r\n", "400 malformed: "),
        ("CONNECT node1:10250\r\n\r\n", "400 malformed: "),
        ("\x16\x03\x01\x02\x00\x01\x00\x01\u{fc}\x03\x03", "40"),
        (&long, "431 header-too-large: "),
    ] {
        let mut unix = UnixStream::connect(&server.socket).await.unwrap();
        let mut tls = server.caller(&world.pki, "apiserver").await.unwrap();
        let _ = unix.write_all(bytes.as_bytes()).await;
        let _ = tls.write_all(bytes.as_bytes()).await;
        for refused in [answer(&mut unix).await.unwrap_err(), answer(&mut tls).await.unwrap_err()] {
            assert!(refused.starts_with(&format!("HTTP/1.1 {status}")), "{bytes:.60}: {refused}");
        }
    }
}

#[tokio::test]
async fn bytes_after_the_blank_line_come_first_and_in_order() {
    let world = World::new();
    let server = world.server();
    let _agent = world.agent("node1", server.agents, echo().await);
    server.sessions(1).await;
    let early = "e".repeat(9000);
    let mut socket = UnixStream::connect(&server.socket).await.unwrap();
    let request = format!("CONNECT node1:10250 HTTP/1.1\r\n\r\n{early}");
    socket.write_all(request.as_bytes()).await.unwrap();
    // And more while the kubelet is being dialled, then the half's end before the 200.
    socket.write_all(b"late").await.unwrap();
    socket.shutdown().await.unwrap();
    answer(&mut socket).await.unwrap();
    let mut back = String::new();
    within(Duration::from_secs(5), socket.read_to_string(&mut back)).await.unwrap();
    assert_eq!(back, early + "late");
}

#[tokio::test]
async fn caps_are_kept() {
    let world = World::new();
    let mut config = world.server_config();
    config.limits.max_streams_per_node = 3;
    config.limits.max_streams_per_caller = 5;
    let server = world.server_with(config);
    let _agent = world.agent("node1", server.agents, echo().await);
    server.sessions(1).await;
    let mut streams = Vec::new();
    for _ in 0..3 {
        streams.push(server.connect("node1:10250").await.unwrap());
    }
    let refused = server.connect("node1:10250").await.unwrap_err();
    assert!(refused.starts_with("HTTP/1.1 429 too-many: node"), "{refused}");
    // Connections that have not asked for anything count for their caller.
    let _idle = [
        UnixStream::connect(&server.socket).await.unwrap(),
        UnixStream::connect(&server.socket).await.unwrap(),
    ];
    sleep(Duration::from_millis(100)).await;
    let refused = server.connect("node1:10250").await.unwrap_err();
    assert!(refused.starts_with("HTTP/1.1 429 too-many: unix"), "{refused}");
    // Another caller has its own.
    let other = server.connect_tls(&world.pki, "node1:10250").await.unwrap_err();
    assert!(other.contains("too-many: node"), "{other}");
    streams.pop();
    sleep(Duration::from_millis(100)).await;
    server.connect_tls(&world.pki, "node1:10250").await.unwrap();
}

/// Heads and handshakes that never end harm nobody else.
#[tokio::test]
async fn slow_and_silent_connections_lock_nobody_out() {
    let world = World::new();
    let mut config = world.server_config();
    config.limits.max_handshakes = 20;
    let server = world.server_with(config);
    let mut crowd = Vec::new();
    for i in 0..100 {
        for address in [server.agents, server.egress.unwrap()] {
            let mut socket = TcpStream::connect(address).await.unwrap();
            if i % 10 == 0 {
                socket.write_all(b"\x16").await.unwrap();
            }
            crowd.push(socket);
        }
        let mut socket = UnixStream::connect(&server.socket).await.unwrap();
        socket.write_all(b"CONN").await.unwrap();
        tokio::spawn(async move {
            let mut end = Vec::new();
            let _ = socket.read_to_end(&mut end).await;
        });
    }
    let start = Instant::now();
    let _agent = world.agent("node1", server.agents, echo().await);
    server.sessions(1).await;
    let mut stream = server.connect_tls(&world.pki, "node1:10250").await.unwrap();
    ping(&mut stream).await;
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    // Whoever says nothing is closed after ten seconds.
    let mut silent = UnixStream::connect(&server.socket).await.unwrap();
    let mut end = Vec::new();
    let start = Instant::now();
    within(Duration::from_secs(12), silent.read_to_end(&mut end)).await.unwrap();
    assert!(start.elapsed() > Duration::from_secs(9), "{:?}", start.elapsed());
}
