//! Connections that go to a node unopened, by the name their ClientHello or Host has.

use crate::common::*;
use std::{fs, net::SocketAddr, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{Instant, sleep},
};
use tokio_rustls::{
    TlsAcceptor, TlsConnector,
    rustls::{
        self, ClientConfig, ClientConnection, RootCertStore, ServerConfig,
        pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
    },
};
use tunnel::config::server::NodeSource;

/// A kubelet with a serving certificate of its own name, which echoes.
async fn tls_kubelet(world: &World, node: &str) -> SocketAddr {
    let leaf = pki::Leaf { ca: "server", cn: node, sans: &["node1"], server: true, ..world.pki.usual() };
    world.pki.issue("serving", &leaf);
    let pair = world.pki.pair("serving");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![CertificateDer::from_pem_file(pair.cert).unwrap()],
            PrivateKeyDer::from_pem_file(pair.key).unwrap(),
        )
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    serve(move |socket| {
        let acceptor = acceptor.clone();
        async move {
            let Ok(stream) = acceptor.accept(socket).await else { return };
            let (mut reader, mut writer) = tokio::io::split(stream);
            let _ = tokio::io::copy(&mut reader, &mut writer).await;
            let _ = writer.shutdown().await;
        }
    })
    .await
}

fn client(world: &World) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(world.pki.ca("server")).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder =
        ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    Arc::new(builder.with_root_certificates(roots).with_no_client_auth())
}

fn client_hello(world: &World, name: &str) -> Vec<u8> {
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let mut connection = ClientConnection::new(client(world), name).unwrap();
    let mut bytes = Vec::new();
    connection.write_tls(&mut bytes).unwrap();
    bytes
}

/// A server with a passthrough to the kubelet's port and one to an exporter's; node2 is known and away.
async fn world_with(exporter: SocketAddr) -> (World, Running, Dropped) {
    let world = World::new();
    let nodes = world.dir.path().join("nodes.json");
    fs::write(&nodes, r#"[{"name": "node1"}, {"name": "node2", "addresses": ["10.1.0.2"]}]"#).unwrap();
    let mut config = world.server_config();
    let loopback = "127.0.0.1:0".parse().unwrap();
    config.passthrough = vec![(loopback, 10250), (loopback, exporter.port())];
    config.nodes = NodeSource::File(nodes);
    // Names that are no nodes' would lead there; nobody who comes in here may follow them.
    config.direct = vec!["10.0.0.0/8".parse().unwrap(), "127.0.0.0/8".parse().unwrap()];
    let kubelet = tls_kubelet(&world, "node1").await;
    let server = world.server_with(config);
    world.pki.node("node1");
    let mut config = world.agent_config("node1", server.agents, kubelet);
    config.allow.push(format!("127.0.0.1:{}", exporter.port()).parse().unwrap());
    let agent = spawn_agent(config);
    server.sessions(1).await;
    (world, server, agent)
}

async fn exporter() -> SocketAddr {
    serve(|mut socket| async move {
        let mut seen = [0; 1024];
        let read = socket.read(&mut seen).await.unwrap_or_default();
        let body = String::from_utf8_lossy(&seen[..read]).into_owned();
        let _ =
            socket.write_all(format!("HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n{body}").as_bytes()).await;
    })
    .await
}

#[tokio::test]
async fn tls_by_its_server_name_and_http_by_its_host() {
    let (world, server, _agent) = world_with(exporter().await).await;
    let [kubelets, exporters] = server.passthrough[..] else { panic!("two listeners") };
    // The certificate that the client sees is the kubelet's own.
    for name in ["node1", "Node1"] {
        let socket = TcpStream::connect(kubelets).await.unwrap();
        let connector = TlsConnector::from(client(&world));
        let mut stream = connector.connect(name.try_into().unwrap(), socket).await.unwrap();
        ping(&mut stream).await;
        stream.shutdown().await.unwrap();
        let mut rest = Vec::new();
        within(Duration::from_secs(5), stream.read_to_end(&mut rest)).await.unwrap();
        assert!(rest.is_empty(), "half-closed, and closed cleanly");
    }
    // Byte by byte.
    let mut socket = TcpStream::connect(kubelets).await.unwrap();
    socket.set_nodelay(true).unwrap();
    for byte in client_hello(&world, "node1") {
        socket.write_all(&[byte]).await.unwrap();
    }
    assert_eq!(within(Duration::from_secs(5), socket.read_u8()).await.unwrap(), 22, "a ServerHello");

    let request =
        "POST /x HTTP/1.1\r\nHost: node1:9100\r\nAuthorization: Bearer t\r\nContent-Length: 2\r\n\r\nab";
    let mut socket = TcpStream::connect(exporters).await.unwrap();
    socket.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    within(Duration::from_secs(5), socket.read_to_string(&mut answer)).await.unwrap();
    assert_eq!(answer.split_once("\r\n\r\n").unwrap().1, request, "as it came");
}

/// Whoever names no node is closed within two seconds, and hears why as far as there is a way to say it.
#[tokio::test]
async fn whoever_names_no_node_is_closed() {
    let (world, server, _agent) = world_with(exporter().await).await;
    let alert = &[21, 3, 3, 0, 2, 2, 112][..];
    let http = |host: &str| format!("GET / HTTP/1.1\r\n{host}\r\n").into_bytes();
    for (what, bytes, expected) in [
        ("unknown", client_hello(&world, "node9"), alert),
        ("a cloud name", client_hello(&world, "localhost"), alert),
        ("no server name", client_hello(&world, "10.1.0.2"), alert),
        ("away", client_hello(&world, "node2"), alert),
        ("garbage after a good start", [&b"\x16\x03\x01\x02\x00"[..], &[0xff; 600]].concat(), alert),
        ("garbage", b"\x00\x01\x02\x03\x04".to_vec(), b"HTTP/1.1 400 "),
        ("unknown host", http("Host: node9:10250\r\n"), b"HTTP/1.1 404 "),
        ("a cloud host", http("Host: localhost\r\n"), b"HTTP/1.1 404 "),
        ("an address", http("Host: 10.1.0.2:10250\r\n"), b"HTTP/1.1 404 "),
        ("a host that is away", http("Host: node2\r\n"), b"HTTP/1.1 503 "),
        ("no host", http(""), b"HTTP/1.1 400 "),
        ("a tunnel", b"CONNECT node1:22 HTTP/1.1\r\nHost: node1\r\n\r\n".to_vec(), b"HTTP/1.1 405 "),
    ] {
        let mut socket = TcpStream::connect(server.passthrough[0]).await.unwrap();
        socket.write_all(&bytes).await.unwrap();
        let mut answer = Vec::new();
        within(Duration::from_secs(2), socket.read_to_end(&mut answer)).await.unwrap();
        assert!(answer.starts_with(expected), "{what}: {:?}", String::from_utf8_lossy(&answer));
    }
}

/// ClientHellos that never end are closed after ten seconds, and until then lock nobody out.
#[tokio::test]
async fn hellos_that_never_end_harm_nobody() {
    let (world, server, _agent) = world_with(exporter().await).await;
    let hello = client_hello(&world, "node1");
    let mut crowd = Vec::new();
    for length in (0..200).map(|number| number % (hello.len() - 1)) {
        let mut socket = TcpStream::connect(server.passthrough[0]).await.unwrap();
        socket.write_all(&hello[..length]).await.unwrap();
        crowd.push(socket);
    }
    let start = Instant::now();
    let mut dripping = TcpStream::connect(server.passthrough[0]).await.unwrap();
    let drip = async {
        for byte in &hello[..hello.len() - 1] {
            if dripping.write_all(&[*byte]).await.is_err() {
                break;
            }
            sleep(Duration::from_millis(100)).await;
        }
    };
    let good = async {
        let socket = TcpStream::connect(server.passthrough[0]).await.unwrap();
        let connector = TlsConnector::from(client(&world));
        let mut stream = connector.connect("node1".try_into().unwrap(), socket).await.unwrap();
        ping(&mut stream).await;
        start.elapsed()
    };
    let (took, _) = tokio::join!(
        within(Duration::from_secs(9), good),
        tokio::time::timeout(Duration::from_secs(15), drip)
    );
    assert!(took < Duration::from_secs(9), "{took:?}");
    let mut end = Vec::new();
    let ended = within(Duration::from_secs(2), dripping.read_to_end(&mut end)).await;
    assert!(ended.is_err() || end.is_empty(), "somebody answered half a ClientHello");
    for mut socket in crowd {
        let _ = within(Duration::from_secs(2), socket.read_to_end(&mut Vec::new())).await;
    }
}
