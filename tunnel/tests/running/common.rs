//! What the tests of the running system share: certificates, a server and agents in this process, a kubelet, callers.
//! Everything is on loopback or inside network namespaces, on ports the kernel chooses.

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair,
};
use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream, UnixStream},
    sync::oneshot,
    task::JoinHandle,
    time::timeout,
};
use tokio_rustls::{
    TlsConnector,
    rustls::{
        self, ClientConfig, RootCertStore,
        pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    },
};
use tunnel::{
    agent::Agent,
    config::{
        LogFormat,
        agent::AgentConfig,
        outbound::Outbound,
        server::{Limits, NodeSource, PeerConfig, ServerConfig},
    },
    frontend::gate::Gate,
    server::Server,
    tls,
};

#[path = "common/pki.rs"]
pub mod pki;
pub use pki::Pki;

/// The log of the code under test, for `RUST_LOG=… cargo test`.
pub fn log() {
    let _ = env_logger::builder().is_test(true).try_init();
}

/// The TLS between replicas, with a certificate of this name.
/// The others are named, and looked up.
pub fn peer_config(world: &World, name: &str, peers: Vec<SocketAddr>) -> PeerConfig {
    let named = |peer: SocketAddr| format!("localhost:{}", peer.port()).parse().unwrap();
    PeerConfig {
        listen: "127.0.0.1:0".parse().unwrap(),
        peers: peers.into_iter().map(named).collect(),
        ca: world.pki.ca("peer"),
        pair: world.pki.pair(name),
        names: vec!["server.test".to_owned()].into(),
    }
}

/// A server in this process, and how to stop it.
pub struct Running {
    pub agents: SocketAddr,
    pub pages: SocketAddr,
    pub egress: Option<SocketAddr>,
    pub peers: Option<SocketAddr>,
    pub socket: PathBuf,
    /// The proxy over TLS and plainly.
    pub proxy: [Option<SocketAddr>; 2],
    pub passthrough: Vec<SocketAddr>,
    pub gate: Arc<Gate>,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<std::io::Result<()>>,
}

impl Running {
    /// Tells it to drain.
    pub fn stop(&mut self) {
        drop(self.stop.take());
    }

    /// Waits until it has ended by itself.
    pub async fn ended(self) {
        self.task.await.unwrap().unwrap();
    }

    /// As a crash: nothing is said to anybody.
    pub fn kill(self) {
        self.task.abort();
        for session in self.gate.sessions.list() {
            session.close("killed");
        }
    }

    /// Waits until this many sessions are there.
    pub async fn sessions(&self, count: usize) {
        within(Duration::from_secs(30), async {
            while self.gate.sessions.len() != count {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
    }

    /// CONNECT over the unix socket: the stream after the 200, or the status line.
    pub async fn connect(&self, target: &str) -> Result<UnixStream, String> {
        let mut socket = UnixStream::connect(&self.socket).await.unwrap();
        ask(&mut socket, target).await.map(|()| socket)
    }
}

impl Running {
    /// A caller's TLS connection, with a certificate of this name.
    pub async fn caller(&self, pki: &Pki, name: &str) -> std::io::Result<CallerStream> {
        tls_to(self.egress.unwrap(), pki, Some(name)).await
    }

    /// Whether the API server's certificate is refused in the handshake.
    pub async fn connect_tls_error(&self, pki: &Pki) -> bool {
        match self.caller(pki, "apiserver").await {
            Ok(mut stream) => {
                matches!(ask(&mut stream, "node1:10250").await, Err(line) if !line.starts_with("HTTP/"))
            }
            Err(_) => true,
        }
    }

    /// CONNECT over TLS as the API server.
    pub async fn connect_tls(&self, pki: &Pki, target: &str) -> Result<CallerStream, String> {
        let mut stream = self.caller(pki, "apiserver").await.unwrap();
        ask(&mut stream, target).await.map(|()| stream)
    }
}

/// TLS to one of the server's listeners, with the certificate of this name or with none.
pub async fn tls_to(address: SocketAddr, pki: &Pki, name: Option<&str>) -> std::io::Result<CallerStream> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(pki.ca("server")).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let config = match name.map(|name| pki.pair(name)) {
        None => builder.with_no_client_auth(),
        Some(pair) => {
            let chain = CertificateDer::pem_file_iter(&pair.cert).unwrap().map(Result::unwrap).collect();
            let key = PrivateKeyDer::from_pem_file(&pair.key).unwrap();
            builder.with_client_auth_cert(chain, key).unwrap()
        }
    };
    let socket = TcpStream::connect(address).await?;
    TlsConnector::from(Arc::new(config)).connect("server.test".try_into().unwrap(), socket).await
}

pub type CallerStream = tokio_rustls::client::TlsStream<TcpStream>;

/// Sends a CONNECT and reads the answer's head.
pub async fn ask<S: AsyncRead + AsyncWrite + Unpin>(socket: &mut S, target: &str) -> Result<(), String> {
    let request = format!("CONNECT {target} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n");
    if let Err(error) = socket.write_all(request.as_bytes()).await {
        return Err(error.to_string());
    }
    answer(socket).await
}

/// Reads the head of an answer, and nothing after it.
pub async fn answer<S: AsyncRead + Unpin>(socket: &mut S) -> Result<(), String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match socket.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(error) => return Err(format!("{error} after {:?}", String::from_utf8_lossy(&head))),
        }
    }
    let line = String::from_utf8_lossy(&head).lines().next().unwrap().to_owned();
    if line.starts_with("HTTP/1.1 200 ") { Ok(()) } else { Err(line) }
}

/// A test's world: certificates and a place for files.
pub struct World {
    pub dir: TempDir,
    pub pki: Pki,
}

impl World {
    pub fn new() -> Self {
        log();
        let dir = tempfile::tempdir().unwrap();
        let pki = Pki::new(dir.path());
        Self { dir, pki }
    }

    /// The configuration of a server that listens on loopback and believes every agent's certificate.
    pub fn server_config(&self) -> ServerConfig {
        ServerConfig {
            listen: "127.0.0.1:0".parse().unwrap(),
            pair: self.pki.pair("server"),
            agent_ca: self.pki.ca("agent"),
            egress_listen: Some(("127.0.0.1:0".parse().unwrap(), self.pki.ca("caller"))),
            caller_names: Vec::new(),
            egress_socket: Some(self.dir.path().join("egress.sock")),
            proxy: None,
            passthrough: Vec::new(),
            replica: None,
            peers: None,
            nodes: NodeSource::None,
            direct: Vec::new(),
            limits: Limits {
                dial_timeout: Duration::from_secs(10),
                drain: Duration::from_secs(30),
                max_handshakes: 200,
                max_streams_per_node: 1000,
                max_streams_per_caller: 10_000,
            },
            metrics_listen: "127.0.0.1:0".parse().unwrap(),
            log_format: LogFormat::Text,
        }
    }

    pub fn server(&self) -> Running {
        self.server_with(self.server_config())
    }

    pub fn server_with(&self, config: ServerConfig) -> Running {
        let socket = config.egress_socket.clone().unwrap_or_default();
        let server = Server::bind(config).unwrap();
        let (agents, egress, gate) =
            (server.agents_address().unwrap(), server.egress_address(), server.gate());
        let pages = server.pages_address().unwrap();
        let (proxy, passthrough) = (server.proxy_addresses(), server.passthrough_addresses());
        let peers = server.peers_address();
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(server.run(async move { drop(stopped.await) }));
        Running { agents, pages, egress, peers, socket, proxy, passthrough, gate, stop: Some(stop), task }
    }

    /// The configuration of an agent of this node.
    pub fn agent_config(&self, node: &str, server: SocketAddr, kubelet: SocketAddr) -> AgentConfig {
        AgentConfig {
            servers: vec![(server.into(), "server.test".try_into().unwrap())],
            server_ca: self.pki.ca("server"),
            pair: self.pki.pair(node),
            kubelet,
            allow: Vec::new(),
            outbound: Outbound::default(),
            metrics_listen: "127.0.0.1:0".parse().unwrap(),
            drain: Duration::from_secs(30),
            log_format: LogFormat::Text,
        }
    }

    /// An agent of this node; it ends when the handle is dropped.
    pub fn agent(&self, node: &str, server: SocketAddr, kubelet: SocketAddr) -> Dropped {
        self.pki.node(node);
        spawn_agent(self.agent_config(node, server, kubelet))
    }
}

pub fn spawn_agent(config: AgentConfig) -> Dropped {
    let agent = Agent::new(config).unwrap();
    Dropped(tokio::spawn(async move { agent.run(std::future::pending()).await }))
}

/// GET of a page: status code and body.
pub async fn page(address: SocketAddr, path: &str) -> (u16, String) {
    let mut socket = TcpStream::connect(address).await.unwrap();
    socket.write_all(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head[9..12].parse().unwrap(), body.to_owned())
}

/// A task that ends with its handle.
pub struct Dropped(pub JoinHandle<()>);

impl Drop for Dropped {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A kubelet that answers every byte with itself and closes after the caller does.
pub async fn echo() -> SocketAddr {
    serve(|mut socket| async move {
        let (mut reader, mut writer) = socket.split();
        let _ = tokio::io::copy(&mut reader, &mut writer).await;
        let _ = writer.shutdown().await;
    })
    .await
}

/// A kubelet that does something else.
pub async fn serve<F: Future<Output = ()> + Send + 'static>(
    mut behave: impl FnMut(TcpStream) -> F + Send + 'static,
) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (socket, _) = listener.accept().await.unwrap();
            tokio::spawn(behave(socket));
        }
    });
    address
}

/// The future's value, or a failed test.
pub async fn within<T>(time: Duration, future: impl Future<Output = T>) -> T {
    match timeout(time, future).await {
        Ok(value) => value,
        Err(_) => panic!("not within {time:?}"),
    }
}

/// Sends a word and reads it back.
pub async fn ping<S: AsyncRead + AsyncWrite + Unpin>(socket: &mut S) {
    socket.write_all(b"hello").await.unwrap();
    let mut back = [0; 5];
    socket.read_exact(&mut back).await.unwrap();
    assert_eq!(&back, b"hello");
}
