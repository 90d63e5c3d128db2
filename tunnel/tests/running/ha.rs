//! Any replica serves any node: rolling restarts, crashes, cuts, clones, and who counts as a replica.

use crate::{
    common::*,
    replicas::{Balance, Cloud, Load},
};
use std::{sync::Arc, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{Instant, sleep},
};
use tokio_rustls::TlsConnector;
use tunnel::{
    carrier::{
        h2::peer::{self, Introduction},
        link::Link,
    },
    config::server::ServerConfig,
    hello::Id,
    tls,
};

const SOON: Duration = Duration::from_secs(10);
const S: fn(u64) -> Duration = Duration::from_secs;

/// Replicas are restarted one after the other, one is added, one is killed, and callers never stop.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_dials_while_replicas_come_and_go() {
    const NODES: usize = 30;
    let cloud = Arc::new(Cloud::with(Balance::Round, 3, NODES).await);
    // Two sessions each within half a minute, and every node everywhere with its first.
    cloud.everywhere(&[1, 2, 3], NODES, S(20)).await;
    within(S(30), async {
        loop {
            let mut sum = 0;
            for replica in [1, 2, 3] {
                sum += cloud.sessions(replica).await;
            }
            if sum == 2 * NODES {
                return;
            }
            sleep(Duration::from_millis(100)).await;
        }
    })
    .await;

    let load = Load::start(&cloud, 16, Duration::from_millis(5), NODES);
    for replica in [1, 2, 3] {
        cloud.stop(replica).await;
        cloud.start(replica);
        cloud.ready(replica).await;
        load.more(500, S(30)).await;
    }
    // One more, without a word to the others.
    cloud.start(4);
    cloud.ready(4).await;
    load.more(500, S(30)).await;
    let made = load.done.load(std::sync::atomic::Ordering::SeqCst);
    load.more(10_000_usize.saturating_sub(made), S(120)).await;
    let failures = load.end().await;
    assert!(failures.is_empty(), "{} dials failed: {:?}", failures.len(), &failures[..failures.len().min(5)]);
    let mut forwarded = 0.0;
    for replica in [1, 2, 3, 4] {
        forwarded += cloud.metric(replica, "edge_tunnel_forwarded_total").await;
    }
    assert!(forwarded > 100.0, "{forwarded}: some were forwarded");
    // Whoever called, the replica that has the session knows it too.
    let told = (1..=4).any(|replica| {
        cloud.log(replica).lines().any(|line| line.contains("caller=unix") && line.contains(" via=r"))
    });
    assert!(told, "no audit line names the caller and the other replica");

    // kill -9 under some fifty dials a second.
    let load = Load::start(&cloud, 5, Duration::from_millis(90), NODES);
    load.more(50, S(20)).await;
    let killed = Instant::now();
    cloud.kill(2).await;
    sleep(S(7)).await;
    let failures = load.end().await;
    for (when, why) in failures {
        assert!(when.duration_since(killed) < S(5), "{why} {:?} after the kill", when.duration_since(killed));
    }
    cloud.everywhere(&[1, 3, 4], NODES, S(5)).await;
}

/// Behind a load balancer that sends a source always to one replica an agent has one session and does not storm; the
/// other replicas forward, and a restart loses no dial here either.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_load_balancer_with_source_affinity() {
    const NODES: usize = 10;
    let cloud = Arc::new(Cloud::with(Balance::Affine, 2, NODES).await);
    cloud.everywhere(&[1, 2], NODES, SOON).await;
    sleep(S(6)).await;
    assert_eq!((cloud.sessions(1).await, cloud.sessions(2).await), (NODES, 0));
    let dials = cloud.dials();
    assert!(dials <= NODES * 10, "{dials} dials of {NODES} agents");
    let load = Load::start(&cloud, 4, Duration::from_millis(20), NODES);
    load.more(50, SOON).await;
    cloud.stop(1).await;
    load.more(50, SOON).await;
    let failures = load.end().await;
    assert!(failures.is_empty(), "{failures:?}");
    assert_eq!(cloud.sessions(2).await, NODES);
}

/// Two replicas cannot reach each other, then one is unreachable for everybody: there is another way to every node.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_that_are_cut_off_from_each_other() {
    const NODES: usize = 12;
    let cloud = Cloud::with(Balance::Round, 3, NODES).await;
    cloud.everywhere(&[1, 2, 3], NODES, S(20)).await;
    within(S(30), async {
        while cloud.sessions(1).await + cloud.sessions(2).await + cloud.sessions(3).await < 2 * NODES {
            sleep(Duration::from_millis(100)).await;
        }
    })
    .await;
    cloud.cut(1, 2, true);
    cloud.everywhere(&[1, 2, 3], NODES, S(5)).await;
    sleep(S(4)).await;
    let start = Instant::now();
    cloud.everywhere(&[1, 2, 3], NODES, S(5)).await;
    let time = start.elapsed();
    assert!(time < S(3), "nobody waits for a replica that is silent: {time:?}");
    cloud.cut(1, 2, false);
    // Nobody tells anybody: the others do not answer, and within five seconds are not asked any more.
    cloud.unplug(3);
    cloud.everywhere(&[1, 2], NODES, S(5)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_clones_the_newer_is_the_newer_on_every_replica() {
    let cloud = Cloud::with(Balance::Round, 2, 1).await;
    cloud.everywhere(&[1, 2], 1, S(20)).await;
    let heard = async |replica| {
        let mut stream = cloud.connect(replica, "node0").await?;
        let _ = stream.write_all(b"hello").await;
        let mut word = [0; 5];
        stream.read_exact(&mut word).await.map_err(|error| error.to_string())?;
        Ok::<_, String>(word)
    };
    let all_hear = async |expected: &[u8; 5], most| {
        within(most, async {
            for replica in [1, 2] {
                while heard(replica).await.as_ref() != Ok(expected) {
                    sleep(Duration::from_millis(50)).await;
                }
            }
        })
        .await;
    };
    let newer = cloud.clone_of("node0", b"newer");
    all_hear(b"newer", SOON).await;
    // Nobody flaps while both look for their second sessions.
    for _ in 0..20 {
        for replica in [1, 2] {
            assert_eq!(heard(replica).await.as_ref(), Ok(b"newer"), "at r{replica}");
        }
        sleep(Duration::from_millis(200)).await;
    }
    drop(newer);
    all_hear(b"hello", SOON).await;
}

/// Two replicas in this process, of which the second has the agent.
struct Two {
    world: World,
    near: Running,
    far: Running,
}

impl Two {
    async fn new(change: impl Fn(&mut ServerConfig)) -> Self {
        let world = World::new();
        let mut config = world.server_config();
        config.peers = Some(peer_config(&world, "peer", Vec::new()));
        let near = world.server_with(config.clone());
        config.peers = Some(peer_config(&world, "peer", vec![near.peers.unwrap()]));
        config.egress_socket = None;
        change(&mut config);
        let far = world.server_with(config);
        within(SOON, async {
            while *near.gate.peers.replicas().borrow() != 2 || *far.gate.peers.replicas().borrow() != 2 {
                sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
        Self { world, near, far }
    }

    async fn node(&self, kubelet: std::net::SocketAddr) -> Dropped {
        let agent = self.world.agent("node1", self.far.agents, kubelet);
        within(SOON, async {
            while !self.near.gate.peers.present("node1") {
                sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
        agent
    }
}

#[tokio::test]
async fn a_forwarded_stream_is_like_any_other() {
    let two = Two::new(|config| config.limits.max_streams_per_caller = 1).await;
    let _agent = two.node(echo().await).await;
    let mut stream = two.near.connect_tls(&two.world.pki, "node1:10250").await.unwrap();
    ping(&mut stream).await;
    // The cap of the caller counts where the session is, by the caller's own name.
    let refused = two.near.connect_tls(&two.world.pki, "node1:10250").await.unwrap_err();
    assert_eq!(refused, "HTTP/1.1 429 too-many: kube-apiserver has 1 connections already");
    let mut other = two.near.connect("node1:10250").await.unwrap();
    ping(&mut other).await;
    // Ends are ends.
    stream.write_all(b"last").await.unwrap();
    stream.shutdown().await.unwrap();
    let mut rest = Vec::new();
    within(SOON, stream.read_to_end(&mut rest)).await.unwrap();
    assert_eq!(rest, b"last");
    drop(other);
    // The agent's last word is the caller's answer.
    let refused = within(SOON, async {
        loop {
            match two.near.connect("node1:22").await {
                Err(line) if line.contains("too-many") => sleep(Duration::from_millis(20)).await,
                answer => return answer.unwrap_err(),
            }
        }
    })
    .await;
    assert!(refused.starts_with("HTTP/1.1 403 denied-by-agent: "), "{refused}");
    // A cut is a cut.
    let mut stream = two.near.connect_tls(&two.world.pki, "node1:10250").await.unwrap();
    ping(&mut stream).await;
    two.far.kill();
    let error = within(SOON, stream.read(&mut [0; 9])).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}");
    within(SOON, async {
        while two.near.gate.peers.present("node1") {
            sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn what_the_kubelet_says_to_a_dial_is_carried_through() {
    let two = Two::new(|_| {}).await;
    let gone = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let _agent = two.node(gone).await;
    let refused = two.near.connect("node1:10250").await.unwrap_err();
    assert!(refused.starts_with("HTTP/1.1 502 refused: node1:10250 "), "{refused}");
}

/// A caller that reads nothing of an endless answer holds its own window on both hops, and nobody else's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_stands_still_stops_nobody_behind_the_hop() {
    let two = Two::new(|_| {}).await;
    let kubelet = serve(|mut socket| async move {
        match socket.read_u8().await {
            Ok(b'D') => while socket.write_all(&[7; 65536]).await.is_ok() {},
            Ok(byte) => drop(socket.write_all(&[byte]).await),
            Err(_) => {}
        }
    })
    .await;
    let _agent = two.node(kubelet).await;
    let mut still = Vec::new();
    for _ in 0..20 {
        let mut stream = two.near.connect("node1:10250").await.unwrap();
        stream.write_all(b"D").await.unwrap();
        still.push(stream);
    }
    sleep(S(2)).await;
    for _ in 0..20 {
        let mut stream = within(S(2), two.near.connect("node1:10250")).await.unwrap();
        stream.write_all(b"x").await.unwrap();
        assert_eq!(within(S(2), stream.read_u8()).await.unwrap(), b'x');
    }
    // Nothing was lost of what stood still.
    let mut piece = vec![0; 8 << 20];
    within(SOON, still[0].read_exact(&mut piece)).await.unwrap();
    assert!(piece.iter().all(|byte| *byte == 7));
}

/// 64 MiB through both hops, whole.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bulk_is_forwarded_whole() {
    const SIZE: usize = 64 << 20;
    let two = Two::new(|_| {}).await;
    let _agent = two.node(echo().await).await;
    let (mut reader, mut writer) = two.near.connect("node1:10250").await.unwrap().into_split();
    let sent = tokio::spawn(async move {
        for piece in 0..SIZE / 65536 {
            writer.write_all(&[piece as u8; 65536]).await.unwrap();
        }
        writer.shutdown().await.unwrap();
    });
    let (mut seen, mut buffer) = (0, vec![0; 65536]);
    loop {
        let read = within(SOON, reader.read(&mut buffer)).await.unwrap();
        if read == 0 {
            break;
        }
        for byte in &buffer[..read] {
            assert_eq!(*byte, (seen / 65536) as u8, "at {seen}");
            seen += 1;
        }
    }
    assert_eq!(seen, SIZE);
    sent.await.unwrap();
}

/// What a replica says to whoever comes with this certificate.
async fn as_replica(server: &Running, world: &World, name: &str) -> Result<(), String> {
    let names = vec!["server.test".to_owned()].into();
    let client = tls::to_replicas(world.pki.pair(name), world.pki.ca("peer"), names).unwrap();
    let socket = TcpStream::connect(server.peers.unwrap()).await.unwrap();
    let connector = TlsConnector::from(client.get().config.clone());
    let address = "127.0.0.1".try_into().unwrap();
    let stream = connector.connect(address, Link::new(socket)).await.map_err(|error| error.to_string())?;
    let heard = stream.get_ref().0.heard();
    let (opener, live) = peer::asking_side(stream, heard).await.map_err(|error| error.to_string())?;
    let id = |text| Id::parse(text).unwrap();
    let me = Introduction { replica: id("stranger"), run: id("stranger"), port: 0 };
    tokio::select! {
        answer = opener.ask_for_news(&me) => answer.map(drop),
        ended = live => Err(ended.to_string()),
    }
}

#[tokio::test]
async fn only_a_certificate_of_the_peers_ca_with_our_name_is_a_replicas() {
    let world = World::new();
    let mut config = world.server_config();
    config.peers = Some(peer_config(&world, "peer", Vec::new()));
    let server = world.server_with(config.clone());
    let good = world.pki.replica();
    for (name, leaf, welcome) in [
        ("good", pki::Leaf { ..good.clone() }, true),
        ("agents", pki::Leaf { ca: "agent", ..good.clone() }, false),
        ("callers", pki::Leaf { ca: "caller", ..good.clone() }, false),
        ("servers", pki::Leaf { ca: "server", ..good.clone() }, false),
        ("foreign", pki::Leaf { ca: "foreign", ..good.clone() }, false),
        ("other-name", pki::Leaf { sans: &["other.test"], ..good.clone() }, false),
        ("no-name", pki::Leaf { sans: &[], cn: "server.test", ..good.clone() }, false),
        ("node", pki::Leaf { organization: Some("system:nodes"), ..good.clone() }, false),
        ("server-only", pki::Leaf { replica: false, server: true, ..good.clone() }, false),
        ("old", pki::Leaf { not_after: -60, ..good.clone() }, false),
    ] {
        world.pki.issue(name, &leaf);
        let answer = as_replica(&server, &world, name).await;
        assert_eq!(answer.is_ok(), welcome, "{name}: {answer:?}");
    }
    // An impostor that is dialled is believed as little: it would hear every caller's bytes.
    world.pki.issue("foreign", &pki::Leaf { ca: "foreign", ..good });
    let mut impostor = config.clone();
    impostor.egress_socket = None;
    let mut peers = peer_config(&world, "foreign", Vec::new());
    peers.ca = world.pki.ca("peer");
    impostor.peers = Some(peers);
    let impostor = world.server_with(impostor);
    config.egress_socket = None;
    config.peers = Some(peer_config(&world, "peer", vec![impostor.peers.unwrap(), server.peers.unwrap()]));
    let third = world.server_with(config);
    within(SOON, async {
        while *third.gate.peers.replicas().borrow() != 2 || page(third.pages, "/readyz").await.0 != 200 {
            sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    sleep(S(1)).await;
    assert_eq!((*third.gate.peers.replicas().borrow(), *impostor.gate.peers.replicas().borrow()), (2, 1));
}

/// A new replica is ready once it knows what the others have; nobody who is not there holds it up for long.
#[tokio::test]
async fn a_replica_is_ready_when_it_knows_what_the_others_have() {
    let world = World::new();
    let mut config = world.server_config();
    config.peers = Some(peer_config(&world, "peer", Vec::new()));
    let first = world.server_with(config.clone());
    let _agent = world.agent("node1", first.agents, echo().await);
    first.sessions(1).await;
    // One that accepts and says nothing.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let others = vec![first.peers.unwrap(), silent.local_addr().unwrap(), "127.0.0.1:1".parse().unwrap()];
    config.peers = Some(peer_config(&world, "peer", others));
    let socket = world.dir.path().join("second.sock");
    config.egress_socket = Some(socket);
    let second = world.server_with(config);
    let start = Instant::now();
    within(S(7), async {
        while page(second.pages, "/readyz").await.0 != 200 {
            sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    assert!(start.elapsed() >= S(2), "it waited for the silent one: {:?}", start.elapsed());
    ping(&mut second.connect("node1:10250").await.unwrap()).await;
}
