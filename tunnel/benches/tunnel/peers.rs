//! The programs that are measured: ours, and the relay that is the floor, each as a process at either end.

use crate::{common::*, wan::*};
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    time::sleep,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

const BINARY: &str = env!("CARGO_BIN_EXE_edge-tunnel");

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Which {
    Floor,
    Konnectivity,
    Ours,
}

/// The kubelet, for those who know nodes by their names.
const NODE: &str = "node1:10250";

/// A way from a unix socket in the cloud to the kubelet at the edge.
pub struct Subject {
    pub which: Which,
    pub socket: PathBuf,
    /// What a CONNECT asks for.
    target: &'static str,
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
        let subject = Self { which: Which::Floor, socket, target: NODE, processes };
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
        let subject = Self { which: Which::Ours, socket, target: NODE, processes };
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
        let subject = Self { which: Which::Konnectivity, socket, target: "127.0.0.1:10250", processes };
        subject.wait().await;
        subject
    }

    /// A server and many agents, all of which are in one process.
    pub async fn crowd(world: &World, wan: &Wan, agents: usize) -> Self {
        for agent in 0..agents {
            world.pki.node(&format!("n{agent}"));
        }
        let socket = world.dir.path().join("egress.sock");
        let dir = world.dir.path().to_str().unwrap();
        let processes =
            vec![server(world, wan, &socket), role(wan, "edge", "agents", &[dir, &agents.to_string()])];
        let subject = Self { which: Which::Ours, socket, target: NODE, processes };
        subject.all(wan, agents).await;
        sleep(Duration::from_secs(5)).await;
        subject
    }

    /// Kills the server and starts it again; how long it takes until every agent is back.
    pub async fn restart(mut self, world: &World, wan: &Wan, agents: usize) -> (Self, f64) {
        let _ = self.processes[0].kill();
        let _ = self.processes[0].wait();
        sleep(Duration::from_secs(1)).await;
        self.processes[0] = server(world, wan, &self.socket);
        let start = Instant::now();
        self.all(wan, agents).await;
        (self, start.elapsed().as_secs_f64())
    }

    /// Waits until so many agents are connected.
    async fn all(&self, wan: &Wan, agents: usize) {
        loop {
            let output =
                wan.command("cloud", "curl").args(["-s", "http://127.0.0.1:10267/metrics"]).output().unwrap();
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            if text.lines().any(|line| line == format!("edge_tunnel_sessions {agents}")) {
                return;
            }
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
    pub async fn connect(&self) -> Result<UnixStream, String> {
        let mut stream = UnixStream::connect(&self.socket).await.map_err(|error| error.to_string())?;
        ask(&mut stream, self.target).await.map(|()| stream)
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
            _ => agents(Path::new(&words[0]), words[1].parse().unwrap()).await,
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
async fn agents(dir: &Path, count: usize) {
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
    let agents: Vec<_> = (0..count).map(|agent| spawn_agent(config(format!("n{agent}")))).collect();
    std::future::pending::<()>().await;
    drop(agents);
}
