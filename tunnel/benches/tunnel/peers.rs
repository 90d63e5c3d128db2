//! The programs that are measured: ours, its peers, and the relay that is the floor, each as a process at either end.

use crate::{common::*, wan::*};
use std::{
    fs,
    net::SocketAddr,
    ops::Range,
    path::{Path, PathBuf},
    process::{Child, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream, UnixListener, UnixStream},
    sync::mpsc,
    time::sleep,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tokio_util::either::Either;

const BINARY: &str = env!("CARGO_BIN_EXE_edge-tunnel");

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Which {
    Floor,
    Konnectivity,
    Rathole,
    Ours,
}

/// So many agents are in one process: each has two files open, and a process may often have 20,000.
const CROWD: usize = 5000;

/// The kubelet, for those who know nodes by their names.
const NODE: &str = "node1:10250";

/// A connection to the kubelet, as its caller sees it.
pub type Stream = Either<UnixStream, TcpStream>;

/// Where callers come in.
enum Entry {
    /// A unix socket that takes CONNECT, and what to ask for.
    Connect { socket: PathBuf, target: &'static str },
    /// A port of the cloud's loopback that stands for the kubelet's. Sockets belong to the namespace that they were made
    /// in: some are always ready, so that nobody measures how they are made.
    Port { address: SocketAddr, sockets: Mutex<mpsc::Receiver<TcpSocket>> },
}

/// A way from a caller in the cloud to the kubelet at the edge.
pub struct Subject {
    pub which: Which,
    entry: Entry,
    /// At the server's end, at the agent's end, and the kubelet.
    processes: Vec<Child>,
}

impl Drop for Subject {
    fn drop(&mut self) {
        for process in &mut self.processes {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

fn role(wan: &Wan, side: &str, role: &str, words: &[&str]) -> Child {
    let me = std::env::current_exe().unwrap();
    let mut command = wan.command(side, me.to_str().unwrap());
    command.env("ETUN_BENCH_ROLE", role).args(words).spawn().unwrap()
}

impl Subject {
    pub async fn floor(world: &World, wan: &Wan) -> Self {
        let socket = world.dir.path().join("floor.sock");
        let dir = world.dir.path().to_str().unwrap();
        let processes = vec![
            role(wan, "cloud", "near", &[dir, socket.to_str().unwrap()]),
            role(wan, "edge", "far", &[dir]),
            role(wan, "edge", "kubelet", &[]),
        ];
        let entry = Entry::Connect { socket, target: NODE };
        let subject = Self { which: Which::Floor, entry, processes };
        subject.wait().await;
        subject
    }

    pub async fn ours(world: &World, wan: &Wan) -> Self {
        world.pki.node("node1");
        let mut agent = wan.command("edge", BINARY);
        let pair = world.pki.pair("node1");
        agent.args(["agent", "--server", "10.0.0.1:8443", "--server-name", "server.test"]);
        agent.arg("--server-ca").arg(world.pki.ca("server"));
        agent.arg("--cert").arg(pair.cert).arg("--key").arg(pair.key).stderr(log());
        let socket = world.dir.path().join("egress.sock");
        let server = server(world, wan, &socket);
        let processes = vec![server, agent.spawn().unwrap(), role(wan, "edge", "kubelet", &[])];
        let subject = Self { which: Which::Ours, entry: Entry::Connect { socket, target: NODE }, processes };
        subject.wait().await;
        subject
    }

    /// konnectivity of the test rig, as it is installed beside kube-apiserver. It has no name for a node's loopback but its address.
    pub async fn konnectivity(world: &World, wan: &Wan, programs: &Path) -> Self {
        let socket = world.dir.path().join("konnectivity.sock");
        let program = |name: &str| programs.join(name).to_str().unwrap().to_owned();
        let pair = world.pki.pair("server");
        let mut server = wan.command("cloud", &program("konnectivity-server"));
        server.args(["--mode=http-connect", "--server-port=0", "--agent-port=8132", "--admin-port=8133"]);
        server.args(["--health-port=8134", "--server-id=cloud", "--server-count=1", "--keepalive-time=30s"]);
        server.args(["--proxy-strategies=destHost", "--uds-name"]).arg(&socket);
        server.arg("--cluster-cert").arg(pair.cert).arg("--cluster-key").arg(pair.key);
        server.arg("--cluster-ca-cert").arg(world.pki.ca("agent")).stdout(log()).stderr(log());
        world.pki.node("node1");
        let pair = world.pki.pair("node1");
        let mut agent = wan.command("edge", &program("konnectivity-agent"));
        agent.args(["--proxy-server-host=10.0.0.1", "--proxy-server-port=8132", "--admin-server-port=8094"]);
        agent.args(["--health-server-port=8093", "--keepalive-time=30s", "--sync-interval=1s"]);
        agent.args(["--sync-interval-cap=5s", "--agent-id=node1", "--agent-identifiers=ipv4=127.0.0.1"]);
        agent.arg("--agent-cert").arg(pair.cert).arg("--agent-key").arg(pair.key);
        agent.arg("--ca-cert").arg(world.pki.ca("server")).stdout(log()).stderr(log());
        let kubelet = role(wan, "edge", "kubelet", &[]);
        let processes = vec![server.spawn().unwrap(), agent.spawn().unwrap(), kubelet];
        let entry = Entry::Connect { socket, target: "127.0.0.1:10250" };
        let subject = Self { which: Which::Konnectivity, entry, processes };
        subject.wait().await;
        subject
    }

    /// rathole with TLS, as its README sets it up. It knows no CONNECT: a service of the kubelet has a port in the cloud.
    pub async fn rathole(world: &World, wan: &Wan, program: &str) -> Self {
        let file = |name: &str| world.dir.path().join(name);
        let pair = world.pki.pair("server");
        let identity = file("rathole.p12");
        let mut openssl = std::process::Command::new("openssl");
        openssl.args(["pkcs12", "-export", "-passout", "pass:bench", "-in"]).arg(pair.cert);
        openssl.arg("-inkey").arg(pair.key).arg("-out").arg(&identity);
        assert!(openssl.status().unwrap().success());
        let address = "127.0.0.1:10249".parse().unwrap();
        let server = format!(
            "[server]\nbind_addr = \"10.0.0.1:2333\"\ndefault_token = \"bench\"\n\
             [server.transport]\ntype = \"tls\"\n\
             [server.transport.tls]\npkcs12 = {identity:?}\npkcs12_password = \"bench\"\n\
             [server.services.kubelet]\nbind_addr = \"{address}\"\n"
        );
        let agent = format!(
            "[client]\nremote_addr = \"10.0.0.1:2333\"\ndefault_token = \"bench\"\n\
             [client.transport]\ntype = \"tls\"\n\
             [client.transport.tls]\nhostname = \"server.test\"\ntrusted_root = {:?}\n\
             [client.services.kubelet]\nlocal_addr = \"127.0.0.1:10250\"\n",
            world.pki.ca("server")
        );
        let start = |side: &str, option: &str, name: &str, config: String| {
            fs::write(file(name), config).unwrap();
            let mut command = wan.command(side, program);
            command.arg(option).arg(file(name)).stdout(log()).stderr(log()).spawn().unwrap()
        };
        let processes = vec![
            start("cloud", "--server", "rathole-server.toml", server),
            start("edge", "--client", "rathole-client.toml", agent),
            role(wan, "edge", "kubelet", &[]),
        ];
        let (ready, sockets) = mpsc::channel(64);
        // It ends when the subject does.
        wan.inside("cloud", move || while ready.blocking_send(TcpSocket::new_v4().unwrap()).is_ok() {});
        let entry = Entry::Port { address, sockets: Mutex::new(sockets) };
        let subject = Self { which: Which::Rathole, entry, processes };
        subject.wait().await;
        subject
    }

    /// A server and many agents, which are in few processes.
    pub async fn crowd(world: &World, wan: &Wan, agents: usize) -> Self {
        for agent in 0..agents {
            world.pki.node(&format!("n{agent}"));
        }
        let socket = world.dir.path().join("egress.sock");
        let dir = world.dir.path().to_str().unwrap();
        let mut processes = vec![server(world, wan, &socket)];
        for first in (0..agents).step_by(CROWD) {
            let end = agents.min(first + CROWD);
            processes.push(role(wan, "edge", "agents", &[dir, &first.to_string(), &end.to_string()]));
        }
        let entry = Entry::Connect { socket, target: NODE };
        let subject = Self { which: Which::Ours, entry, processes };
        subject.all(wan, agents).await;
        sleep(Duration::from_secs(5)).await;
        subject
    }

    /// Kills the server and starts it again; how long it takes until every agent is back.
    pub async fn restart(mut self, world: &World, wan: &Wan, agents: usize) -> (Self, f64) {
        let _ = self.processes[0].kill();
        let _ = self.processes[0].wait();
        sleep(Duration::from_secs(1)).await;
        let Entry::Connect { socket, .. } = &self.entry else { unreachable!("ours takes CONNECT") };
        self.processes[0] = server(world, wan, socket);
        let start = Instant::now();
        self.all(wan, agents).await;
        (self, start.elapsed().as_secs_f64())
    }

    /// Waits until so many agents are connected.
    async fn all(&self, wan: &Wan, agents: usize) {
        let start = Instant::now();
        loop {
            let output =
                wan.command("cloud", "curl").args(["-s", "http://127.0.0.1:10267/metrics"]).output().unwrap();
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            if text.lines().any(|line| line == format!("edge_tunnel_sessions {agents}")) {
                return;
            }
            let sessions = text.lines().find(|line| line.starts_with("edge_tunnel_sessions "));
            assert!(start.elapsed() < Duration::from_secs(300), "not {agents} agents: {sessions:?}");
            sleep(Duration::from_millis(100)).await;
        }
    }

    async fn wait(&self) {
        loop {
            if self.works().await {
                return;
            }
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// A new connection to the kubelet.
    pub async fn connect(&self) -> Result<Stream, String> {
        match &self.entry {
            Entry::Connect { socket, target } => {
                let mut stream = UnixStream::connect(socket).await.map_err(|error| error.to_string())?;
                ask(&mut stream, target).await.map(|()| Either::Left(stream))
            }
            Entry::Port { address, sockets } => {
                let next = std::future::poll_fn(|context| sockets.lock().unwrap().poll_recv(context));
                let stream =
                    next.await.unwrap().connect(*address).await.map_err(|error| error.to_string())?;
                stream.set_nodelay(true).map_err(|error| error.to_string())?;
                Ok(Either::Right(stream))
            }
        }
    }

    async fn works(&self) -> bool {
        let Ok(mut stream) = self.connect().await else { return false };
        stream.write_all(b"E1").await.unwrap();
        matches!(stream.read(&mut [0]).await, Ok(1))
    }

    /// CPU seconds so far, at the server's and the agent's end.
    pub fn cpu(&self) -> [f64; 2] {
        [0, 1].map(|end| {
            let stat = fs::read_to_string(format!("/proc/{}/stat", self.processes[end].id())).unwrap();
            let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
            (fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()) / 100.0
        })
    }

    /// Resident bytes, at the server's and the agent's end.
    pub fn memory(&self) -> [f64; 2] {
        [0, 1].map(|end| {
            let statm = fs::read_to_string(format!("/proc/{}/statm", self.processes[end].id())).unwrap();
            statm.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() * 4096.0
        })
    }
}

fn server(world: &World, wan: &Wan, socket: &Path) -> Child {
    let pair = world.pki.pair("server");
    let nodes = world.dir.path().join("nodes.json");
    let list: Vec<_> = ["node1".to_owned()].into_iter().chain((0..20_000).map(|n| format!("n{n}"))).collect();
    let list: Vec<_> = list.iter().map(|name| serde_json::json!({ "name": name })).collect();
    fs::write(&nodes, serde_json::to_string(&list).unwrap()).unwrap();
    let mut command = wan.command("cloud", BINARY);
    command.args(["server", "--listen", "10.0.0.1:8443"]);
    command.arg("--tls-cert").arg(pair.cert).arg("--tls-key").arg(pair.key);
    command.arg("--agent-ca").arg(world.pki.ca("agent")).arg("--egress-socket").arg(socket);
    command.arg("--nodes-file").arg(nodes).args(["--max-streams-per-node", "20000"]).stderr(log());
    command.spawn().unwrap()
}

fn log() -> Stdio {
    if std::env::var_os("RUST_LOG").is_some() { Stdio::inherit() } else { Stdio::null() }
}

/// What a child process does.
pub fn play(role: &str) {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        match role {
            "kubelet" => kubelet().await,
            "near" => near(Path::new(&words[0]), &words[1]).await,
            "far" => far(Path::new(&words[0])).await,
            _ => agents(Path::new(&words[0]), words[1].parse().unwrap()..words[2].parse().unwrap()).await,
        }
    });
}

/// One byte says what a connection is: echo, a flood down, a drain up.
async fn kubelet() {
    // There may be one already, of the other subject.
    let Ok(listener) = TcpListener::bind("127.0.0.1:10250").await else {
        return std::future::pending().await;
    };
    loop {
        let (mut socket, _) = listener.accept().await.unwrap();
        socket.set_nodelay(true).unwrap();
        tokio::spawn(async move {
            let mut buffer = vec![7; 64 << 10];
            match socket.read_u8().await {
                Ok(b'E') => {
                    while let Ok(read @ 1..) = socket.read(&mut buffer).await {
                        if socket.write_all(&buffer[..read]).await.is_err() {
                            return;
                        }
                    }
                }
                Ok(b'D') => while socket.write_all(&buffer).await.is_ok() {},
                _ => while socket.read(&mut buffer).await.is_ok_and(|read| read > 0) {},
            }
        });
    }
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// The floor's end in the cloud.
async fn near(dir: &Path, socket: &str) {
    use rustls::pki_types::{CertificateDer, pem::PemObject};
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(dir.join("server-ca.pem")).unwrap()).unwrap();
    let config = rustls::ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let connector = TlsConnector::from(Arc::new(config));
    let listener = UnixListener::bind(socket).unwrap();
    loop {
        let (mut near, _) = listener.accept().await.unwrap();
        let connector = connector.clone();
        tokio::spawn(async move {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                match near.read_u8().await {
                    Ok(byte) => head.push(byte),
                    Err(_) => return,
                }
            }
            let Ok(far) = TcpStream::connect((EDGE, 9443)).await else { return };
            far.set_nodelay(true).unwrap();
            let mut far = connector.connect("server.test".try_into().unwrap(), far).await.unwrap();
            near.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
            let _ = tokio::io::copy_bidirectional_with_sizes(&mut near, &mut far, 64 << 10, 64 << 10).await;
        });
    }
}

/// The floor's end at the edge.
async fn far(dir: &Path) {
    use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
    let chain = vec![CertificateDer::from_pem_file(dir.join("server.pem")).unwrap()];
    let key = PrivateKeyDer::from_pem_file(dir.join("server.key")).unwrap();
    let config = rustls::ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind((EDGE, 9443)).await.unwrap();
    loop {
        let (near, _) = listener.accept().await.unwrap();
        near.set_nodelay(true).unwrap();
        let acceptor = acceptor.clone();
        tokio::spawn(async move {
            let Ok(mut near) = acceptor.accept(near).await else { return };
            let Ok(mut far) = TcpStream::connect("127.0.0.1:10250").await else { return };
            far.set_nodelay(true).unwrap();
            let _ = tokio::io::copy_bidirectional_with_sizes(&mut near, &mut far, 64 << 10, 64 << 10).await;
        });
    }
}

/// Many agents in one process.
async fn agents(dir: &Path, numbers: Range<usize>) {
    let config = |node: String| tunnel::config::agent::AgentConfig {
        servers: vec![("10.0.0.1:8443".parse().unwrap(), "server.test".try_into().unwrap())],
        server_ca: dir.join("server-ca.pem"),
        pair: tunnel::tls::KeyPair {
            cert: dir.join(format!("{node}.pem")),
            key: dir.join(format!("{node}.key")),
        },
        kubelet: "127.0.0.1:10250".parse().unwrap(),
        allow: Vec::new(),
        outbound: Default::default(),
        metrics_listen: "127.0.0.1:0".parse().unwrap(),
        drain: Duration::from_secs(1),
        log_format: tunnel::config::LogFormat::Text,
    };
    let agents: Vec<_> = numbers.map(|agent| spawn_agent(config(format!("n{agent}")))).collect();
    std::future::pending::<()>().await;
    drop(agents);
}
