//! A first installation as a person tries it out, with the real binary: `certs`, a server, `doctor`, an agent, `sessions`.

use crate::common::*;
use std::{
    fs,
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Output, Stdio},
    time::Duration,
};
use tokio::{net::TcpStream, time::sleep};

struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn edge_tunnel(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_edge-tunnel"));
    command.args(words).env_remove("HTTPS_PROXY").env_remove("https_proxy");
    command
}

/// Runs to the end, beside the kubelet of this process.
async fn run(words: &[&str]) -> (bool, String) {
    let mut command = edge_tunnel(words);
    let done = tokio::task::spawn_blocking(move || command.output().unwrap());
    let Output { status, stdout, stderr } = within(Duration::from_secs(60), done).await.unwrap();
    (status.success(), [stdout, stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat())
}

fn start(words: &[&str]) -> Process {
    Process(edge_tunnel(words).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
}

/// A port that nobody has at this moment.
fn free() -> SocketAddr {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

#[tokio::test]
async fn a_first_installation() {
    let temp = tempfile::tempdir().unwrap();
    let file = |name: &str| temp.path().join(name).to_str().unwrap().to_owned();
    let [dir, nodes] = [file("pki"), file("nodes.json")];
    let pki = |name: &str| Path::new(&dir).join(name).to_str().unwrap().to_owned();
    let certs =
        ["certs", "--dir", &dir, "--server-name", "tunnel.example,127.0.0.1", "--node", "node1,node2"];
    let (good, said) = run(&certs).await;
    assert!(good && said.contains("server-ca.pem\n") && said.contains("node-node1.key\n"), "{said}");
    let (good, said) = run(&certs).await;
    assert!(!good && said.contains("server.pem is there already"), "{said}");

    fs::write(&nodes, r#"[{"name": "node1"}]"#).unwrap();
    let [listen, pages, agents_pages] = [free(), free(), free()].map(|address| address.to_string());
    let kubelet = echo().await.to_string();
    let (server_ca, agent_ca) = (pki("server-ca.pem"), pki("agent-ca.pem"));
    let [cert, key] = [pki("server.pem"), pki("server.key")];
    let server = [
        &["server", "--listen", &listen, "--metrics-listen", &pages, "--nodes-file", &nodes][..],
        &["--tls-cert", &cert, "--tls-key", &key, "--agent-ca", &agent_ca],
    ]
    .concat();
    let as_node = |node: &str, server: &str, kubelet: &str| -> Vec<String> {
        let [cert, key] = [pki(&format!("node-{node}.pem")), pki(&format!("node-{node}.key"))];
        let words = ["--server", server, "--cert", &cert, "--key", &key, "--kubelet", kubelet];
        words.map(str::to_owned).into()
    };
    let doctor = async |flags: Vec<String>| {
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        run(&[&["doctor", "--server-ca", &server_ca, "--metrics-listen", &agents_pages][..], &flags].concat())
            .await
    };
    let step = |said: &str, step: &str, how: &str| {
        let found = said.lines().any(|line| line.split_whitespace().take(2).eq([step, how]));
        assert!(found, "{step} is not {how}:\n{said}");
    };

    let (good, said) = doctor(as_node("node1", &listen, &kubelet)).await;
    assert!(!good, "{said}");
    for (name, how) in
        [("resolve", "ok"), ("connect", "FAILS"), ("tls", "-"), ("session", "-"), ("kubelet", "ok")]
    {
        step(&said, name, how);
    }
    let server = start(&server);
    within(Duration::from_secs(20), async {
        while TcpStream::connect(&listen).await.is_err() {
            sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    let (good, said) = doctor(as_node("node1", &listen, &kubelet)).await;
    assert!(good, "{said}");
    for name in ["resolve", "connect", "proxy", "tls", "certificate", "session", "kubelet"] {
        step(&said, name, "ok");
    }
    assert!(said.contains("node node1, until "), "{said}");

    let closed = free().to_string();
    let named =
        [as_node("node1", &listen, &kubelet), ["--server-name", "other.example"].map(str::to_owned).into()]
            .concat();
    for (flags, name, says) in [
        (named, "tls", "--server-name"),
        (as_node("node2", &listen, &kubelet), "session", "node2"),
        (as_node("node1", "nowhere.invalid:1", &kubelet), "resolve", "resolver"),
        (as_node("node1", &listen, &closed), "kubelet", "is the kubelet running"),
    ] {
        let (good, said) = doctor(flags).await;
        assert!(!good && said.contains(says), "{name}: {said}");
        step(&said, name, "FAILS");
    }

    let url = format!("http://{pages}");
    let (good, table) = run(&["sessions", "--url", &url]).await;
    assert!(good && table.lines().count() == 1, "a probe is no session: {table}");
    let flags = as_node("node1", &listen, &kubelet);
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let agent = [&["agent", "--server-ca", &server_ca, "--metrics-listen", &agents_pages][..], &flags];
    let agent = start(&agent.concat());
    within(Duration::from_secs(20), async {
        while run(&["sessions", "--url", &url]).await.1.lines().count() != 2 {
            sleep(Duration::from_millis(100)).await;
        }
    })
    .await;
    let (_, json) = run(&["sessions", "--url", &url, "-o", "json"]).await;
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["sessions"][0]["node"], "node1");
    let (good, said) = run(&["sessions", "--url", &format!("http://{agents_pages}")]).await;
    assert!(!good && said.contains("an agent has no such page"), "{said}");
    drop((agent, server));
    let (good, said) = run(&["sessions", "--url", &url]).await;
    assert!(!good && said.contains("cannot connect"), "{said}");
}
