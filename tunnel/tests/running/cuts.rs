//! Breaks travel as breaks, in both directions, and what nobody waits for any more is given up.

use crate::common::*;
use std::{
    io::ErrorKind,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UnixStream},
    sync::mpsc,
    task::JoinSet,
    time::{sleep, timeout},
};

const SOON: Duration = Duration::from_secs(5);

fn reset(socket: &TcpStream) {
    socket2::SockRef::from(socket).set_linger(Some(Duration::ZERO)).unwrap();
}

/// Bytes of a connection to `port` as `ss` counts them: those that whoever dialled has not read yet, and those that have
/// not left the one who listens.
fn queued(port: u16) -> [usize; 2] {
    [("dport", 1), ("sport", 2)].map(|(side, column)| {
        let ss =
            std::process::Command::new("ss").args(["-tnH", side, "=", &format!(":{port}")]).output().unwrap();
        let text = String::from_utf8(ss.stdout).unwrap();
        text.split_whitespace()
            .nth(column)
            .unwrap_or_else(|| panic!("no connection: {text}"))
            .parse()
            .unwrap()
    })
}

/// A kubelet that sends until some of it stays unread with the agent, and nothing with itself; then it goes, as `go` does.
/// Tells how much it has sent.
async fn filling(
    go: impl Fn(TcpStream) + Copy + Send + 'static,
) -> (std::net::SocketAddr, mpsc::UnboundedReceiver<usize>) {
    let (tell, told) = mpsc::unbounded_channel();
    let kubelet = serve(move |mut socket| {
        let tell = tell.clone();
        async move {
            let port = socket.local_addr().unwrap().port();
            let (block, mut sent, mut stays) = ([7; 32 << 10], 0, 0);
            while stays < 3 {
                let [unread, left] = queued(port);
                if left > 0 {
                    stays = 0;
                } else if unread > 0 {
                    stays += 1;
                } else {
                    stays = 0;
                    socket.write_all(&block).await.unwrap();
                    sent += block.len();
                }
                sleep(Duration::from_millis(5)).await;
            }
            go(socket);
            tell.send(sent).unwrap();
        }
    })
    .await;
    (kubelet, told)
}

/// The same, but what the kubelet had to say was not finished: that may not look so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_kubelet_that_breaks_off_before_the_agent_has_read_all_is_a_break_though_the_caller_goes_on_sending()
 {
    let world = World::new();
    let server = world.server();
    let (kubelet, mut told) = filling(|socket| reset(&socket)).await;
    let _agent = world.agent("node1", server.agents, kubelet);
    server.sessions(1).await;
    let mut stream = server.connect_tls(&world.pki, "node1:10250").await.unwrap();
    within(SOON * 6, told.recv()).await.unwrap();
    for _ in 0..5 {
        sleep(Duration::from_millis(50)).await;
        let _ = stream.write_all(b"ping").await;
    }
    let ended = within(SOON * 2, stream.read_to_end(&mut Vec::new())).await;
    assert!(ended.is_err(), "{ended:?}");
}

/// kubectl pings while it reads a large answer. A kubelet that has sent all of it and closed answers that with a reset,
/// which must not cost what the agent has not read yet.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_kubelet_sent_before_it_closed_arrives_though_the_caller_goes_on_sending() {
    let world = World::new();
    let server = world.server();
    let (kubelet, mut told) = filling(drop).await;
    let _agent = world.agent("node1", server.agents, kubelet);
    server.sessions(1).await;
    let mut stream = server.connect("node1:10250").await.unwrap();
    let sent = within(SOON * 6, told.recv()).await.unwrap();
    for _ in 0..5 {
        sleep(Duration::from_millis(50)).await;
        stream.write_all(b"ping").await.unwrap();
    }
    let mut got = Vec::new();
    within(SOON * 2, stream.read_to_end(&mut got)).await.unwrap();
    assert_eq!(got.len(), sent);
}

#[tokio::test]
async fn a_kubelet_that_breaks_off_is_a_break_at_the_caller() {
    let world = World::new();
    let server = world.server();
    let kubelet = serve(|mut socket| async move {
        socket.write_all(b"half of").await.unwrap();
        socket.read_exact(&mut [0; 2]).await.unwrap();
        reset(&socket);
    })
    .await;
    let _agent = world.agent("node1", server.agents, kubelet);
    server.sessions(1).await;
    let mut stream = server.connect_tls(&world.pki, "node1:10250").await.unwrap();
    stream.read_exact(&mut [0; 7]).await.unwrap();
    stream.write_all(b"go").await.unwrap();
    let error = within(SOON, stream.read(&mut [0; 9])).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
}

#[tokio::test]
async fn a_caller_that_breaks_off_is_a_break_at_the_kubelet() {
    let world = World::new();
    let server = world.server();
    let (heard, mut hears) = mpsc::channel(1);
    let kubelet = serve(move |mut socket| {
        let heard = heard.clone();
        async move {
            socket.read_exact(&mut [0; 2]).await.unwrap();
            let read = socket.read(&mut [0; 9]).await;
            heard.send(read).await.unwrap();
        }
    })
    .await;
    let _agent = world.agent("node1", server.agents, kubelet);
    server.sessions(1).await;
    let mut stream = server.connect_tls(&world.pki, "node1:10250").await.unwrap();
    stream.write_all(b"go").await.unwrap();
    stream.flush().await.unwrap();
    sleep(Duration::from_millis(200)).await;
    reset(stream.get_ref().0);
    drop(stream);
    let read = within(SOON, hears.recv()).await.unwrap();
    assert_eq!(read.unwrap_err().kind(), ErrorKind::ConnectionReset);
    // And an orderly end is an orderly end.
    let mut stream = server.connect_tls(&world.pki, "node1:10250").await.unwrap();
    stream.write_all(b"go").await.unwrap();
    stream.shutdown().await.unwrap();
    assert_eq!(within(SOON, hears.recv()).await.unwrap().unwrap(), 0);
}

/// konnectivity leaks these by the ten thousand.
/// The story: a kubelet stopped reading in the middle of an upload, kubectl was killed, and the stream stayed for ever, since nobody looks at a
/// socket while its bytes have nowhere to go.
#[tokio::test]
async fn a_caller_that_vanishes_behind_a_kubelet_that_does_not_read_is_noticed() {
    let world = World::new();
    let server = world.server();
    let kubelet = serve(|socket| async move {
        std::future::pending::<()>().await;
        drop(socket);
    })
    .await;
    let _agent = world.agent("node1", server.agents, kubelet);
    server.sessions(1).await;
    let session = server.gate.sessions.newest("node1").unwrap();
    /// Writes until nothing is taken any more.
    async fn fill(socket: &mut (impl tokio::io::AsyncWrite + Unpin)) {
        let chunk = [7; 65536];
        while timeout(Duration::from_millis(700), socket.write_all(&chunk)).await.is_ok() {}
    }
    let mut unix = server.connect("node1:10250").await.unwrap();
    fill(&mut unix).await;
    let mut tls = server.connect_tls(&world.pki, "node1:10250").await.unwrap();
    fill(&mut tls).await;
    assert_eq!(session.streams(), 2);
    reset(tls.get_ref().0);
    drop((unix, tls));
    within(SOON, async {
        while session.streams() > 0 || server.gate.is_busy() {
            sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_dial_that_its_caller_gave_up_is_cancelled_on_the_agent() {
    let world = World::new();
    let mut config = world.server_config();
    config.limits.dial_timeout = Duration::from_secs(60);
    let server = world.server_with(config);
    // 127.0.0.1 refuses at once, so the dial has to hang in the kernel: a listener whose backlog is full.
    let (hole, _sockets) = crate::refusals::blackhole();
    let _agent = world.agent("node1", server.agents, hole);
    server.sessions(1).await;
    let dialling = || {
        let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
        let to = format!(":{:04X}", hole.port());
        table
            .lines()
            .filter(|line| {
                line.split_whitespace().nth(2).is_some_and(|remote| remote.ends_with(&to))
                    && line.split_whitespace().nth(3) == Some("02")
            })
            .count()
    };
    let before = dialling();
    let request = b"CONNECT node1:10250 HTTP/1.1\r\n\r\n";
    let mut unix = UnixStream::connect(&server.socket).await.unwrap();
    unix.write_all(request).await.unwrap();
    let mut tls = server.caller(&world.pki, "apiserver").await.unwrap();
    tls.write_all(request).await.unwrap();
    sleep(Duration::from_millis(500)).await;
    assert_eq!(dialling(), before + 2);
    drop((unix, tls));
    within(Duration::from_secs(2), async {
        while dialling() > before {
            sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    assert!(!server.gate.is_busy());
}

/// Connects so often, twenty at a time, and goes away in every manner there is.
pub async fn connects_and_aborts(socket: &Path, rounds: usize) {
    let mut workers = JoinSet::new();
    for worker in 0..20 {
        let socket = socket.to_owned();
        workers.spawn(async move {
            for round in 0..rounds / 20 {
                connect_and_abort(&socket, worker + round).await;
            }
        });
    }
    while let Some(worker) = workers.join_next().await {
        worker.unwrap();
    }
}

/// Gone before, while, and after asking; with and without goodbye.
async fn connect_and_abort(socket: &Path, manner: usize) {
    let mut socket = UnixStream::connect(socket).await.unwrap();
    match manner % 5 {
        0 => {}
        1 => socket.write_all(b"CONNECT node1:102").await.unwrap(),
        2 => socket.write_all(b"CONNECT node1:10250 HTTP/1.1\r\n\r\n").await.unwrap(),
        3 => {
            ask(&mut socket, "node1:10250").await.unwrap();
            socket.write_all(&[7; 5000]).await.unwrap();
        }
        _ => {
            ask(&mut socket, "node1:10250").await.unwrap();
            ping(&mut socket).await;
            socket.shutdown().await.unwrap();
            let _ = socket.read(&mut [0]).await;
        }
    }
}

/// After connects and aborts of every kind, nothing is left of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connects_and_aborts_leave_nothing_behind() {
    const ROUNDS: usize = 2000;
    let world = World::new();
    let server = world.server();
    let open = Arc::new(AtomicUsize::new(0));
    let kubelet = serve({
        let open = open.clone();
        move |mut socket| {
            let open = open.clone();
            async move {
                open.fetch_add(1, SeqCst);
                let (mut reader, mut writer) = socket.split();
                let _ = tokio::io::copy(&mut reader, &mut writer).await;
                open.fetch_sub(1, SeqCst);
            }
        }
    })
    .await;
    let _agent = world.agent("node1", server.agents, kubelet);
    server.sessions(1).await;
    connects_and_aborts(&server.socket, ROUNDS).await;
    let session = server.gate.sessions.newest("node1").unwrap();
    within(Duration::from_secs(15), async {
        while open.load(SeqCst) > 0 || server.gate.is_busy() || session.streams() > 0 {
            sleep(Duration::from_millis(100)).await;
        }
    })
    .await;
}
