//! The real binaries in two namespaces, with a WAN between that is slow, lossy, cut, or forgetful.

use crate::{
    common::*,
    wan::{CLOUD, Wan},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    path::PathBuf,
    process::{Child, Stdio},
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UnixStream},
    time::{Instant, sleep},
};

const BINARY: &str = env!("CARGO_BIN_EXE_edge-tunnel");

/// A process of ours that ends with the test.
pub struct Process(pub Child);

impl Process {
    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.0.id()).unwrap()), signal).unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A server in the cloud, an agent at the edge, a kubelet beside it.
pub struct Far {
    world: World,
    wan: Wan,
    pub socket: PathBuf,
    pub server: Process,
    pub agent: Process,
}

impl Far {
    pub fn new(round_trip: Duration, loss: u32) -> Self {
        Self::at(round_trip, loss, "10.0.0.1:8443", &[])
    }

    fn at(round_trip: Duration, loss: u32, server_address: &str, env: &[(&str, &str)]) -> Self {
        let world = World::new();
        let wan = Wan::new(round_trip, loss);
        let socket = world.dir.path().join("egress.sock");
        drop(wan.inside("edge", kubelet));
        let server = start_server(&world, &wan);
        drop(wan.inside("cloud", || load_balancer(S(16))));
        let agent = start_agent(&world, &wan, server_address, env);
        Self { world, wan, socket, server, agent }
    }

    async fn connect(&self, target: &str) -> Result<UnixStream, String> {
        let mut stream = UnixStream::connect(&self.socket).await.map_err(|error| error.to_string())?;
        ask(&mut stream, target).await.map(|()| stream)
    }

    /// Connects as soon as that is possible.
    pub async fn connected(&self, most: Duration) -> UnixStream {
        within(most, async {
            loop {
                match self.connect("node1:10250").await {
                    Ok(stream) => return stream,
                    Err(_) => sleep(Duration::from_millis(50)).await,
                }
            }
        })
        .await
    }
}

fn log() -> Stdio {
    if std::env::var_os("RUST_LOG").is_some() { Stdio::inherit() } else { Stdio::null() }
}

fn start_server(world: &World, wan: &Wan) -> Process {
    let (dir, pair) = (world.dir.path(), world.pki.pair("server"));
    let mut command = wan.command("cloud", BINARY);
    command
        .args([
            "server",
            "--listen",
            "[::]:8443",
            "--dial-timeout",
            "10s",
            "--metrics-listen",
            "127.0.0.1:10267",
        ])
        .arg("--tls-cert")
        .arg(pair.cert)
        .arg("--tls-key")
        .arg(pair.key)
        .arg("--agent-ca")
        .arg(world.pki.ca("agent"))
        .arg("--egress-socket")
        .arg(dir.join("egress.sock"))
        .arg("--nodes-file")
        .arg(dir.join("nodes.json"))
        .stderr(log());
    std::fs::write(dir.join("nodes.json"), r#"[{"name": "node1"}]"#).unwrap();
    Process(command.spawn().unwrap())
}

fn start_agent(world: &World, wan: &Wan, server: &str, env: &[(&str, &str)]) -> Process {
    world.pki.node("node1");
    let pair = world.pki.pair("node1");
    let mut command = wan.command("edge", BINARY);
    command
        .args([
            "agent",
            "--server",
            server,
            "--server-name",
            "server.test",
            "--metrics-listen",
            "127.0.0.1:10268",
        ])
        .arg("--server-ca")
        .arg(world.pki.ca("server"))
        .arg("--cert")
        .arg(pair.cert)
        .arg("--key")
        .arg(pair.key)
        .envs(env.iter().copied())
        .stderr(log());
    Process(command.spawn().unwrap())
}

/// Runs inside the edge's namespace until the process ends: echoes, or floods those who say so.
fn kubelet() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:10250").await.unwrap();
        loop {
            let (mut socket, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let mut first = [0; 5];
                if socket.read_exact(&mut first).await.is_err() {
                    return;
                }
                if &first == b"flood" {
                    while socket.write_all(&[7; 65536]).await.is_ok() {}
                } else if socket.write_all(&first).await.is_ok() {
                    let (mut reader, mut writer) = socket.split();
                    let _ = tokio::io::copy(&mut reader, &mut writer).await;
                }
            });
        }
    });
}

const MS: fn(u64) -> Duration = Duration::from_millis;
const S: fn(u64) -> Duration = Duration::from_secs;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dial_costs_one_round_trip_on_a_long_link() {
    let far = Far::new(MS(100), 0);
    drop(far.connected(S(20)).await);
    let mut times = Vec::new();
    for _ in 0..15 {
        let start = Instant::now();
        let mut stream = far.connect("node1:10250").await.unwrap();
        times.push(start.elapsed());
        within(S(5), ping(&mut stream)).await;
    }
    times.sort();
    assert!(times[0] >= MS(100), "{times:?}: is the link long?");
    assert!(times[7] < MS(115), "{times:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_hundred_milliseconds_and_five_percent_are_slow_and_whole() {
    let far = Far::new(MS(300), 50_000);
    let stream = far.connected(S(40)).await;
    let (mut reader, mut writer) = stream.into_split();
    let sent: Vec<u8> = (0..3_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let expected = sent.clone();
    tokio::spawn(async move {
        writer.write_all(&sent).await.unwrap();
        writer.shutdown().await.unwrap();
    });
    let mut back = Vec::new();
    within(S(90), reader.read_to_end(&mut back)).await.unwrap();
    assert!(back == expected, "{} of {} bytes", back.len(), expected.len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_short_cut_is_waited_out_and_costs_no_stream() {
    let far = Far::new(MS(20), 0);
    let mut stream = far.connected(S(20)).await;
    ping(&mut stream).await;
    far.wan.weather.blackhole(true);
    let start = Instant::now();
    let refused = far.connect("node1:10250").await.unwrap_err();
    assert!(refused.starts_with("HTTP/1.1 504 agent-timeout: "), "{refused}");
    assert!(start.elapsed() <= S(10), "{:?}", start.elapsed());
    sleep(S(3)).await;
    far.wan.weather.blackhole(false);
    let back = Instant::now();
    within(S(10), ping(&mut stream)).await;
    far.connected(S(10)).await;
    assert!(back.elapsed() <= S(3), "{:?}", back.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_path_is_noticed_at_both_ends_and_the_agent_comes_back() {
    let far = Far::new(MS(20), 0);
    let mut stream = far.connected(S(20)).await;
    far.wan.weather.blackhole(true);
    let start = Instant::now();
    // The server's end: the caller's stream ends, new dials are told that there is no session.
    let _ = within(S(30), stream.read(&mut [0])).await;
    within(S(30), async {
        while !far.connect("node1:10250").await.is_err_and(|line| line.contains(" no-session: ")) {}
    })
    .await;
    assert!(start.elapsed() <= S(32), "{:?}", start.elapsed());
    // The agent's end: it has to have noticed by itself to be back soon.
    sleep(S(32).saturating_sub(start.elapsed())).await;
    far.wan.weather.blackhole(false);
    let mut stream = far.connected(S(20)).await;
    ping(&mut stream).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_nat_that_forgets_is_noticed_and_dialled_around() {
    let far = Far::new(MS(20), 0);
    let mut stream = far.connected(S(20)).await;
    ping(&mut stream).await;
    far.wan.weather.forget_flows();
    let start = Instant::now();
    sleep(S(1)).await;
    within(S(45), async { while far.connect("node1:10250").await.is_err() {} }).await;
    assert!(start.elapsed() <= S(42), "{:?}", start.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_is_stopped_is_an_answer_and_then_no_session() {
    let far = Far::new(Duration::ZERO, 0);
    let _stream = far.connected(S(20)).await;
    far.agent.signal(Signal::SIGSTOP);
    let start = Instant::now();
    let refused = far.connect("node1:10250").await.unwrap_err();
    assert!(refused.starts_with("HTTP/1.1 504 agent-timeout: "), "{refused}");
    assert!(start.elapsed() <= S(10), "{:?}", start.elapsed());
    within(S(30), async {
        while !far.connect("node1:10250").await.is_err_and(|line| line.contains(" no-session: ")) {}
    })
    .await;
    assert!(start.elapsed() <= S(32), "{:?}", start.elapsed());
    far.agent.signal(Signal::SIGCONT);
    far.connected(S(10)).await;
}

/// The story: a person pressed ^C twice during a drain, and the second was ignored for half a minute.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_signal_ends_a_drain_at_once() {
    let mut far = Far::new(Duration::ZERO, 0);
    let mut stream = far.connected(S(20)).await;
    ping(&mut stream).await;
    // A server drains for a while also without a stream.
    for process in [&mut far.agent, &mut far.server] {
        process.signal(Signal::SIGTERM);
        sleep(S(1)).await;
        assert!(process.0.try_wait().unwrap().is_none(), "it does not drain");
        process.signal(Signal::SIGINT);
        let status = within(S(3), async {
            loop {
                match process.0.try_wait().unwrap() {
                    Some(status) => return status,
                    None => sleep(MS(20)).await,
                }
            }
        });
        assert_eq!(status.await.code(), Some(1));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_killed_is_found_again_within_ten_seconds() {
    let mut far = Far::new(MS(20), 0);
    drop(far.connected(S(20)).await);
    sleep(S(11)).await;
    far.server.signal(Signal::SIGKILL);
    sleep(S(2)).await;
    far.server = start_server(&far.world, &far.wan);
    let mut stream = far.connected(S(10)).await;
    ping(&mut stream).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ipv6_alone_is_enough() {
    let far = Far::at(Duration::ZERO, 0, "[fd00::1]:8443", &[]);
    let mut stream = far.connected(S(20)).await;
    ping(&mut stream).await;
}

/// A load balancer that drops idle connections and tells nobody.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_load_balancer_that_drops_the_idle_finds_no_idle_one() {
    let far = Far::at(Duration::ZERO, 0, "10.0.0.1:9443", &[]);
    let mut stream = far.connected(S(20)).await;
    sleep(S(40)).await;
    within(S(1), ping(&mut stream)).await;
    within(S(1), far.connect("node1:10250")).await.unwrap();
}

/// Passes connections on; one that was idle for too long is silently kept and never served again.
fn load_balancer(idle_limit: Duration) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let listener = TcpListener::bind((CLOUD, 9443)).await.unwrap();
        loop {
            let (mut near, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let Ok(mut far) = TcpStream::connect((CLOUD, 8443)).await else { return };
                let (mut a, mut b) = ([0; 16384], [0; 16384]);
                loop {
                    let passed = tokio::select! {
                        read = near.read(&mut a) => far.write_all(&a[..read.unwrap_or(0)]).await,
                        read = far.read(&mut b) => near.write_all(&b[..read.unwrap_or(0)]).await,
                        () = sleep(idle_limit) => return std::future::pending().await,
                    };
                    if passed.is_err() {
                        return;
                    }
                }
            });
        }
    });
}

/// Where only an HTTP proxy leads out, with a user and a password.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_http_proxy_is_asked_where_the_environment_says_so() {
    let env = [("HTTPS_PROXY", "http://me:p%40ss@10.0.0.1:3128"), ("NO_PROXY", "10.0.0.99")];
    let far = Far::at(Duration::ZERO, 0, "192.0.2.1:443", &env);
    drop(far.wan.inside("cloud", proxy));
    let mut stream = far.connected(S(20)).await;
    ping(&mut stream).await;
}

/// A proxy that knows one user, and one place to go.
fn proxy() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let listener = TcpListener::bind((CLOUD, 3128)).await.unwrap();
        loop {
            let (mut near, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(near.read_u8().await.unwrap());
                }
                let head = String::from_utf8(head).unwrap();
                assert!(head.starts_with("CONNECT 192.0.2.1:443 HTTP/1.1\r\n"), "{head}");
                assert!(head.contains("\r\nProxy-Authorization: Basic bWU6cEBzcw==\r\n"), "{head}");
                let mut far = TcpStream::connect((CLOUD, 8443)).await.unwrap();
                near.write_all(b"HTTP/1.1 200 OK\r\nVia: test\r\n\r\n").await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
            });
        }
    });
}

/// Bulk on a lossy link, somebody who types, and a reader that stands still, all on one node.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn typing_is_not_behind_bulk() {
    let far = Far::new(MS(100), 10_000);
    let mut typing = far.connected(S(20)).await;
    ping(&mut typing).await;
    let mut still = far.connect("node1:10250").await.unwrap();
    still.write_all(b"flood").await.unwrap();
    let mut bulk = far.connect("node1:10250").await.unwrap();
    bulk.write_all(b"flood").await.unwrap();
    let drain = tokio::spawn(async move {
        let mut buffer = vec![0; 1 << 20];
        while bulk.read(&mut buffer).await.is_ok_and(|read| read > 0) {}
    });
    // Until the bulk has been moved.
    sleep(S(3)).await;
    let mut times = Vec::new();
    for _ in 0..30 {
        let start = Instant::now();
        within(S(10), ping(&mut typing)).await;
        times.push(start.elapsed());
    }
    times.sort();
    drain.abort();
    // A debug build on a busy machine; behind the bulk it would be seconds. The bench has the figure.
    assert!(times[15] < MS(500), "{times:?}");
}
