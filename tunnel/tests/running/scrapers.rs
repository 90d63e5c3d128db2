//! The proxy for metrics-server and Prometheus: who may use it, for what, and what passes.

use crate::common::*;
use std::{
    collections::BTreeMap,
    fs,
    io::Read,
    net::SocketAddr,
    path::PathBuf,
    process::{Command, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
    sync::Notify,
    time::{Instant, sleep},
};
use tunnel::config::server::{NodeSource, ProxyConfig, ServerConfig};

/// A line of the users file. `cost` as low as it goes unless the test is about that.
fn user(name: &str, password: &str, cost: u32, ports: &[u16]) -> String {
    let hash = bcrypt::hash(password, cost).unwrap();
    format!(r#"{{"name": "{name}", "hash": "{hash}", "ports": {ports:?}}}"#)
}

/// Base64 of `name:password`, as a header.
fn authorization(name: &str, password: &str) -> String {
    use base64::{Engine, prelude::BASE64_STANDARD};
    format!("Proxy-Authorization: Basic {}\r\n", BASE64_STANDARD.encode(format!("{name}:{password}")))
}

/// A server with a proxy for these users.
fn proxy_config(world: &World, users: &[String]) -> (ServerConfig, PathBuf) {
    let file = world.dir.path().join("users.json");
    fs::write(&file, format!("[{}]", users.join(","))).unwrap();
    let loopback: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let (listen, plain_listen) = (Some(loopback), Some(loopback));
    let mut config = world.server_config();
    config.proxy = Some(ProxyConfig { listen, plain_listen, users: file.clone() });
    (config, file)
}

/// An agent that lets every port of loopback in; NODE:10250 is `kubelet`.
fn agent(world: &World, server: &Running, node: &str, kubelet: SocketAddr) -> Dropped {
    world.pki.node(node);
    let mut config = world.agent_config(node, server.agents, kubelet);
    config.allow.push("127.0.0.1:1-65535".parse().unwrap());
    spawn_agent(config)
}

/// The status line of a CONNECT, or nothing when it stands.
async fn connect<S: AsyncRead + AsyncWrite + Unpin>(
    socket: &mut S,
    target: &str,
    headers: &str,
) -> Result<(), String> {
    let request = format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n{headers}\r\n");
    socket.write_all(request.as_bytes()).await.map_err(|error| error.to_string())?;
    answer(socket).await
}

/// Sends a request; everything that comes back until the end.
async fn fetch<S: AsyncRead + AsyncWrite + Unpin>(mut socket: S, request: &str) -> std::io::Result<String> {
    socket.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    socket.read_to_end(&mut answer).await?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// An exporter that keeps the heads it has seen, answers by path, and closes.
async fn exporter() -> (SocketAddr, Arc<Mutex<Vec<String>>>, Arc<Notify>) {
    let (heads, gone) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Notify::new()));
    let (kept, told) = (heads.clone(), gone.clone());
    let address = serve(move |mut socket| {
        let (kept, told) = (kept.clone(), told.clone());
        async move {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                let Ok(byte) = socket.read_u8().await else { return };
                head.push(byte);
            }
            let head = String::from_utf8(head).unwrap();
            let path = head.split(' ').nth(1).unwrap().to_owned();
            kept.lock().unwrap().push(head);
            let answer = match path.as_str() {
                "/chunked" => "HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\
                               Keep-Alive: timeout=9\r\nConnection: keep-alive\r\n\r\n2\r\nab\r\n0\r\n\r\n",
                "/cut" => "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf of it",
                "/slow" => {
                    let _ = socket.read(&mut [0]).await;
                    return told.notify_one();
                }
                "/ssh" => "SSH-2.0-OpenSSH_9\r\n",
                _ => "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\nup 1\n",
            };
            let _ = socket.write_all(answer.as_bytes()).await;
            if path == "/cut" {
                // Gone with a reset, as a process that is killed.
                let _ = socket2::SockRef::from(&socket).set_linger(Some(Duration::ZERO));
                sleep(Duration::from_millis(200)).await;
            }
        }
    })
    .await;
    (address, heads, gone)
}

#[tokio::test]
async fn a_user_reaches_the_users_ports_and_no_others() {
    let world = World::new();
    let kubelet = echo().await;
    let users = [user("prometheus", "right", 4, &[10250, kubelet.port()]), user("nothing", "right", 4, &[])];
    let (mut config, _) = proxy_config(&world, &users);
    let nodes = world.dir.path().join("nodes.json");
    fs::write(&nodes, r#"[{"name": "node1"}, {"name": "node2"}]"#).unwrap();
    config.nodes = NodeSource::File(nodes);
    let server = world.server_with(config);
    let _agent = agent(&world, &server, "node1", kubelet);
    server.sessions(1).await;
    world.pki.node("node1");
    let good = authorization("prometheus", "right");
    for (target, headers, expected) in [
        ("node1:10250", &*good, ""),
        (&format!("node1:{}", kubelet.port()), &good, ""),
        ("node1:22", &good, "HTTP/1.1 403 forbidden-port: "),
        ("node2:10250", &good, "HTTP/1.1 503 no-session: "),
        ("node9:10250", &good, "HTTP/1.1 404 unknown-node: "),
        ("169.254.169.254:10250", &good, "HTTP/1.1 403 denied-by-server: "),
        ("node1", &good, "HTTP/1.1 400 malformed: "),
        ("node1:10250", "", "HTTP/1.1 407 auth: "),
        ("node9:22", "", "HTTP/1.1 407 auth: "),
        ("node1:10250", "Proxy-Authorization: Bearer right\r\n", "HTTP/1.1 407 auth: "),
        ("node1:10250", &authorization("prometheus", "wrong"), "HTTP/1.1 407 auth: "),
        ("node1:10250", &authorization("nobody", "right"), "HTTP/1.1 407 auth: "),
        ("node1:10250", &authorization("nothing", "right"), "HTTP/1.1 403 forbidden-port: "),
    ] {
        let [tls, plain] = server.proxy.map(Option::unwrap);
        let mut plain = TcpStream::connect(plain).await.unwrap();
        // A node's certificate is nothing here, nor anybody's: nobody is asked for one.
        let mut tls = tls_to(tls, &world.pki, Some("node1")).await.unwrap();
        for heard in [connect(&mut plain, target, headers).await, connect(&mut tls, target, headers).await] {
            match heard {
                Ok(()) => assert_eq!(expected, "", "{target} {headers}"),
                Err(line) => assert!(!expected.is_empty() && line.starts_with(expected), "{target}: {line}"),
            }
        }
        if expected.is_empty() {
            ping(&mut plain).await;
            ping(&mut tls).await;
        }
    }
    // The challenge a client needs to ask a person.
    let plain = TcpStream::connect(server.proxy[1].unwrap()).await.unwrap();
    let said = fetch(plain, "CONNECT node1:10250 HTTP/1.1\r\n\r\n").await.unwrap();
    assert!(said.contains("\r\nProxy-Authenticate: Basic realm=\"edge-tunnel\"\r\n"), "{said}");
}

#[tokio::test]
async fn a_plain_page_is_fetched_without_what_was_meant_for_us() {
    let world = World::new();
    let (exporter, heads, gone) = exporter().await;
    let port = exporter.port();
    let (config, _) = proxy_config(&world, &[user("prometheus", "right", 4, &[port])]);
    let server = world.server_with(config);
    let _agent = agent(&world, &server, "node1", exporter);
    server.sessions(1).await;
    let good = authorization("prometheus", "right");
    let plain = async || TcpStream::connect(server.proxy[1].unwrap()).await.unwrap();
    let get =
        |path: &str| format!("GET http://node1:{port}{path} HTTP/1.1\r\nHost: node1:{port}\r\n{good}\r\n");

    let said = fetch(plain().await, &get("/metrics?x=1")).await.unwrap();
    assert_eq!(
        said,
        "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nVia: 1.1 edge-tunnel\r\nConnection: close\r\n\r\nup 1\n"
    );
    assert_eq!(
        heads.lock().unwrap().pop().unwrap(),
        format!(
            "GET /metrics?x=1 HTTP/1.1\r\nHost: node1:{port}\r\nVia: 1.1 edge-tunnel\r\nConnection: close\r\n\r\n"
        )
    );
    // Over TLS, an answer in chunks; and whatever else is sent on the connection goes nowhere.
    let tls = tls_to(server.proxy[0].unwrap(), &world.pki, None).await.unwrap();
    let said = fetch(tls, &(get("/chunked") + &get("/second"))).await.unwrap();
    assert_eq!(
        said,
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nVia: 1.1 edge-tunnel\r\nConnection: close\r\n\r\n\
         2\r\nab\r\n0\r\n\r\n"
    );
    assert!(heads.lock().unwrap().pop().unwrap().starts_with("GET /chunked HTTP/1.1\r\n"));
    let head = get("/metrics").replace("GET ", "HEAD ");
    assert!(fetch(plain().await, &head).await.unwrap().starts_with("HTTP/1.1 200 OK\r\n"));
    assert!(heads.lock().unwrap().pop().unwrap().starts_with("HEAD /metrics HTTP/1.1\r\n"));
    assert_eq!(fetch(plain().await, &get("/ssh")).await.unwrap(), "SSH-2.0-OpenSSH_9\r\n");
    heads.lock().unwrap().clear();

    // An answer that was cut never looks whole.
    let cut = fetch(plain().await, &get("/cut")).await.unwrap_err();
    assert_eq!(cut.kind(), std::io::ErrorKind::ConnectionReset);
    // A scraper that gives up is noticed on the node.
    let mut slow = plain().await;
    slow.write_all(get("/slow").as_bytes()).await.unwrap();
    within(Duration::from_secs(5), async {
        while !heads.lock().unwrap().iter().any(|head| head.starts_with("GET /slow")) {
            sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    drop(slow);
    within(Duration::from_secs(2), gone.notified()).await;

    for (request, expected) in [
        (get("/").replace(&good, ""), "HTTP/1.1 407 auth: "),
        (get("/").replace("http:", "https:"), "HTTP/1.1 400 malformed: "),
        (get("/").replace(&format!("{port}/"), "22/"), "HTTP/1.1 403 forbidden-port: "),
        (get("/").replace("node1", "node9"), "HTTP/1.1 404 unknown-node: "),
        (get("/").replace("GET", "POST"), "HTTP/1.1 405 method: "),
        (format!("GET /metrics HTTP/1.1\r\n{good}\r\n"), "HTTP/1.1 400 malformed: "),
    ] {
        let said = fetch(plain().await, &request).await.unwrap();
        assert!(said.starts_with(expected), "{request}: {said}");
    }
    within(Duration::from_secs(10), async {
        while server.gate.is_busy() {
            sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

/// The story this guards against: somebody guesses, every guess costs a core 50 ms and more, and kubectl, the scrapes of
/// everybody else and even the guessed-at user's own stand in line behind them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_passwords_by_the_thousand_stall_nobody() {
    let world = World::new();
    let users = [user("prometheus", "right", 5, &[10250]), user("metrics-server", "right too", 5, &[10250])];
    let (config, _) = proxy_config(&world, &users);
    let server = Arc::new(world.server_with(config));
    let _agent = world.agent("node1", server.agents, echo().await);
    server.sessions(1).await;
    let plain = server.proxy[1].unwrap();
    let scrape = async |name: &str, password: &str| {
        let mut socket = TcpStream::connect(plain).await.unwrap();
        connect(&mut socket, "node1:10250", &authorization(name, password)).await.map(|()| socket)
    };
    ping(&mut scrape("prometheus", "right").await.unwrap()).await;

    let heard: Arc<Mutex<BTreeMap<String, usize>>> = Arc::default();
    let crowd: Vec<_> = (0..50)
        .map(|who| {
            let heard = heard.clone();
            tokio::spawn(async move {
                for guess in 0..40 {
                    let mut socket = TcpStream::connect(plain).await.unwrap();
                    let name = ["prometheus", "nobody"][guess % 2];
                    let headers = authorization(name, &format!("guess {who} {guess}"));
                    let refused = connect(&mut socket, "node1:10250", &headers).await.unwrap_err();
                    let code = refused.chars().skip(9).take(3).collect();
                    *heard.lock().unwrap().entry(code).or_default() += 1;
                }
            })
        })
        .collect();
    // A user who has not been there yet, the one that is guessed at, and kube-apiserver.
    let first = scrape("metrics-server", "right too");
    ping(&mut within(Duration::from_secs(8), first).await.unwrap()).await;
    let mut slowest = Duration::ZERO;
    let mut meanwhile = 0;
    while !crowd.iter().all(tokio::task::JoinHandle::is_finished) {
        let start = Instant::now();
        ping(&mut scrape("prometheus", "right").await.unwrap()).await;
        ping(&mut server.connect("node1:10250").await.unwrap()).await;
        slowest = slowest.max(start.elapsed());
        meanwhile += 1;
        sleep(Duration::from_millis(50)).await;
    }
    for guesser in crowd {
        guesser.await.unwrap();
    }
    let heard = heard.lock().unwrap().clone();
    eprintln!("{heard:?}; {meanwhile} scrapes meanwhile, the slowest two took {slowest:?}");
    assert_eq!(heard.values().sum::<usize>(), 2000, "{heard:?}");
    assert!(heard.keys().all(|code| code == "407" || code == "429"), "{heard:?}");
    assert!(heard.contains_key("407") && meanwhile > 0, "{heard:?}");
    assert!(slowest < Duration::from_secs(5), "{slowest:?}");
}

#[tokio::test]
async fn a_users_file_that_breaks_changes_nothing_and_is_told() {
    let world = World::new();
    let (config, file) = proxy_config(&world, &[user("prometheus", "right", 4, &[10250])]);
    let server = world.server_with(config);
    let _agent = world.agent("node1", server.agents, echo().await);
    server.sessions(1).await;
    let may = async |password: &str| {
        let mut socket = TcpStream::connect(server.proxy[1].unwrap()).await.unwrap();
        connect(&mut socket, "node1:10250", &authorization("prometheus", password)).await.map(|()| socket)
    };
    let mut stream = may("right").await.unwrap();
    fs::write(&file, r#"[{"name": "prometheus", "hash": "right"}]"#).unwrap();
    let failed = format!("edge_tunnel_reload_failed_total{{file=\"{}\"}} 1", file.display());
    within(Duration::from_secs(10), async {
        while !page(server.pages, "/metrics").await.1.contains(&failed) {
            sleep(Duration::from_millis(200)).await;
        }
    })
    .await;
    ping(&mut may("right").await.unwrap()).await;
    // Repaired, with another password: the old one counts no more, what stands goes on.
    fs::write(&file, format!("[{}]", user("prometheus", "renewed", 4, &[10250]))).unwrap();
    within(Duration::from_secs(10), async {
        while may("renewed").await.is_err() {
            sleep(Duration::from_millis(200)).await;
        }
    })
    .await;
    assert!(may("right").await.unwrap_err().starts_with("HTTP/1.1 407 auth: "));
    ping(&mut stream).await;
}

/// A proxy's connections that never say who they are lock nobody out, and leave.
#[tokio::test]
async fn silent_and_slow_scrapers_lock_nobody_out() {
    let world = World::new();
    let (mut config, _) = proxy_config(&world, &[user("prometheus", "right", 4, &[10250])]);
    config.limits.max_handshakes = 10;
    let server = world.server_with(config);
    let _agent = world.agent("node1", server.agents, echo().await);
    server.sessions(1).await;
    let mut crowd = Vec::new();
    for number in 0..60 {
        for address in server.proxy.map(Option::unwrap) {
            let mut socket = TcpStream::connect(address).await.unwrap();
            if number % 10 == 0 {
                let _ = socket.write_all(b"GET http://node1").await;
            }
            crowd.push(socket);
        }
    }
    let good = authorization("prometheus", "right");
    let start = Instant::now();
    let mut plain = TcpStream::connect(server.proxy[1].unwrap()).await.unwrap();
    connect(&mut plain, "node1:10250", &good).await.unwrap();
    let mut tls = tls_to(server.proxy[0].unwrap(), &world.pki, None).await.unwrap();
    connect(&mut tls, "node1:10250", &good).await.unwrap();
    assert!(start.elapsed() < Duration::from_secs(9), "{:?}", start.elapsed());
    ping(&mut plain).await;
    drop(crowd);
    let mut slow = TcpStream::connect(server.proxy[1].unwrap()).await.unwrap();
    slow.write_all(b"GET http://node1").await.unwrap();
    let start = Instant::now();
    let _ = within(Duration::from_secs(13), slow.read_to_end(&mut Vec::new())).await;
    assert!(start.elapsed() > Duration::from_secs(9), "{:?}", start.elapsed());
}

/// The log of the real binary: who and what for, never a password, however it was sent.
#[tokio::test]
async fn passwords_are_never_logged() {
    let world = World::new();
    let (_, users) = proxy_config(&world, &[user("prometheus", "s3cret", 4, &[10250])]);
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let pair = world.pki.pair("server");
    let mut command = Command::new(env!("CARGO_BIN_EXE_edge-tunnel"));
    command.args([
        "server",
        "--listen",
        "127.0.0.1:0",
        "--metrics-listen",
        "127.0.0.1:0",
        "--proxy-plain-listen",
    ]);
    command
        .arg(port.to_string())
        .arg("--proxy-users")
        .arg(users)
        .arg("--agent-ca")
        .arg(world.pki.ca("agent"));
    command.arg("--tls-cert").arg(pair.cert).arg("--tls-key").arg(pair.key);
    let mut process = command.env("RUST_LOG", "debug").stderr(Stdio::piped()).spawn().unwrap();
    let connected = within(Duration::from_secs(20), async {
        loop {
            match TcpStream::connect(port).await {
                Ok(socket) => return socket,
                Err(_) => sleep(Duration::from_millis(50)).await,
            }
        }
    });
    drop(connected.await);
    let (right, wrong) = (authorization("prometheus", "s3cret"), authorization("prometheus", "s3cret2"));
    for request in [
        format!("CONNECT node1:10250 HTTP/1.1\r\n{right}\r\n"),
        format!("CONNECT node1:10250 HTTP/1.1\r\n{wrong}\r\n"),
        format!("GET http://node1:10250/a?token=s3cret HTTP/1.1\r\n{right}\r\n"),
        format!("GET http://prometheus:s3cret@node1:10250/ HTTP/1.1\r\n{right}\r\n"),
        format!("GET http://prometheus:s3cret@node1:10250/ HTTP/9\r\n{right}\r\n"),
        format!("CONNECT prometheus:s3cret@node1:10250 HTTP/1.1\r\n{right}no colon\r\n\r\n"),
    ] {
        let socket = TcpStream::connect(port).await.unwrap();
        assert!(fetch(socket, &request).await.unwrap().starts_with("HTTP/1.1 40"), "{request}");
    }
    process.kill().unwrap();
    process.wait().unwrap();
    let mut log = String::new();
    process.stderr.take().unwrap().read_to_string(&mut log).unwrap();
    assert!(log.contains("stream caller=proxy:prometheus node=- target=node1:10250 "), "{log}");
    assert!(log.contains("end=auth:") || log.contains("end=\"auth:"), "{log}");
    let encoded = right.split(' ').nth(2).unwrap().trim();
    assert!(!log.contains("s3cret") && !log.contains(encoded), "{log}");
}
