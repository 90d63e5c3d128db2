//! A server's flags: what they become, and that all mistakes come at once.

use super::*;
use crate::config::{Cli, Command};
use clap::Parser;
use rcgen::{BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, KeyPair as Key};
use std::fs;

/// A directory with two CAs and a server's certificate.
fn files() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in ["agents", "callers"] {
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = params.self_signed(&Key::generate().unwrap()).unwrap();
        fs::write(dir.path().join(name), ca.pem()).unwrap();
    }
    let key = Key::generate().unwrap();
    let cert = CertificateParams::new(vec!["tunnel.example".to_owned()]).unwrap().self_signed(&key).unwrap();
    fs::write(dir.path().join("cert"), cert.pem()).unwrap();
    fs::write(dir.path().join("key"), key.serialize_pem()).unwrap();
    fs::write(dir.path().join("nodes"), "[]").unwrap();
    fs::write(dir.path().join("users"), "[]").unwrap();
    dir
}

/// Checks a command line whose words `@NAME` are files in the directory.
fn check(dir: &Path, line: &str) -> Result<ServerConfig, String> {
    let words = line.split_whitespace().map(|word| match word.strip_prefix('@') {
        Some(name) => dir.join(name).display().to_string(),
        None => word.to_owned(),
    });
    let cli = Cli::try_parse_from(["edge-tunnel".to_owned(), "server".to_owned()].into_iter().chain(words));
    let Command::Server(args) = cli.map_err(|error| error.to_string())?.command else { unreachable!() };
    args.check(false).map_err(|mistakes| mistakes.to_string())
}

const REQUIRED: &str = "--listen :8443 --tls-cert @cert --tls-key @key --agent-ca @agents";

#[test]
fn the_least_there_must_be() {
    let dir = files();
    let config = check(dir.path(), REQUIRED).unwrap();
    assert_eq!(config.listen, "[::]:8443".parse().unwrap());
    assert_eq!(config.metrics_listen, "127.0.0.1:10267".parse().unwrap());
    assert_eq!(config.limits.dial_timeout, Duration::from_secs(10));
    assert_eq!(config.limits.max_streams_per_node, 1000);
    assert!(matches!(config.nodes, NodeSource::None));
    assert!(config.egress_listen.is_none() && config.egress_socket.is_none());
}

#[test]
fn everything_there_can_be() {
    let dir = files();
    let line = format!(
        "{REQUIRED} --caller-ca @callers --caller-name kube-apiserver --caller-name b,c --egress-listen :8131 \
         --egress-socket /run/x.sock --nodes-file @nodes --direct-cidr 10.96.0.0/12,fd00::/108 --dial-timeout 500ms \
         --drain 1m --max-handshakes 5 --max-streams-per-node 6 --max-streams-per-caller 7 --metrics-listen [::1]:0 \
         --log-format json"
    );
    let config = check(dir.path(), &line).unwrap();
    assert_eq!(config.caller_names, ["kube-apiserver", "b", "c"]);
    assert_eq!(config.direct.len(), 2);
    assert!(matches!(config.nodes, NodeSource::File(_)));
    assert_eq!(config.egress_listen.unwrap().1, dir.path().join("callers"));
    assert_eq!((config.limits.max_handshakes, config.limits.drain), (5, Duration::from_secs(60)));
    assert_eq!(config.log_format, LogFormat::Json);
}

#[test]
fn every_mistake_is_reported() {
    let dir = files();
    fs::write(dir.path().join("broken"), "-----BEGIN NONSENSE").unwrap();
    fs::write(dir.path().join("broken2"), "nothing").unwrap();
    let says = check(
        dir.path(),
        "--listen nowhere --tls-cert @none --tls-key @key --caller-ca @broken2 --caller-name x \
         --egress-listen 10.0.0.1 --nodes-file @broken --direct-nodes a=b --direct-cidr 10.0.0.0/40,node1 \
         --dial-timeout 0s --drain soon --max-handshakes 0 --log-format xml",
    )
    .unwrap_err();
    for mistake in [
        "--listen \"nowhere\"",
        "/none: No such file",
        "/broken2: no certificate",
        "--agent-ca is missing",
        "--egress-listen \"10.0.0.1\"",
        "/broken: invalid number",
        "--direct-nodes needs labels",
        "--direct-cidr \"10.0.0.0/40\"",
        "--direct-cidr \"node1\"",
        "--dial-timeout \"0s\"",
        "--drain \"soon\"",
        "--max-handshakes \"0\"",
        "--log-format \"xml\"",
    ] {
        assert!(says.contains(mistake), "{mistake} is not in:\n{says}");
    }
}

#[test]
fn replicas() {
    let dir = files();
    let issue = |name: &str, sans: &[&str], usages: &[ExtendedKeyUsagePurpose]| {
        let key = Key::generate().unwrap();
        let mut params =
            CertificateParams::new(sans.iter().map(|san| (*san).to_owned()).collect::<Vec<_>>()).unwrap();
        params.extended_key_usages = usages.to_vec();
        fs::write(dir.path().join(name), params.self_signed(&key).unwrap().pem()).unwrap();
        fs::write(dir.path().join(format!("{name}.key")), key.serialize_pem()).unwrap();
    };
    let both = [ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    issue("peer", &["peers.example", "tunnel.example"], &both);
    issue("server-only", &["tunnel.example"], &both[..1]);
    issue("nameless", &[], &both);
    let usual = "--peer-listen :9443 --peer-ca @agents";
    let peers = "--replica-id edge-tunnel-0 --peers peers.example:9443,10.0.0.1:9443";
    let config = check(dir.path(), &format!("{REQUIRED} {usual} {peers}")).unwrap();
    assert_eq!(config.replica.unwrap().as_str(), "edge-tunnel-0");
    let config = config.peers.unwrap();
    assert_eq!((config.peers.len(), config.listen.port()), (2, 9443));
    assert_eq!(config.pair.cert, dir.path().join("cert"), "the server's own");
    assert_eq!(&config.names[..], ["tunnel.example"]);
    let own = "--peer-cert @peer --peer-key @peer.key";
    let config = check(dir.path(), &format!("{REQUIRED} {usual} {own}")).unwrap().peers.unwrap();
    assert_eq!(config.pair.key, dir.path().join("peer.key"));
    assert_eq!(&config.names[..], ["peers.example", "tunnel.example"]);
    for (flags, mistake) in [
        ("--peers a:1", "--peers needs --peer-listen"),
        ("--peer-ca @agents", "--peer-ca needs --peer-listen"),
        ("--peer-listen :9443", "--peer-listen needs --peer-ca"),
        ("--peer-listen :9443 --peer-ca @none", "/none: No such file"),
        ("--peer-listen :9443 --peer-ca @agents --peers a", "--peers \"a\""),
        (
            "--peer-listen :9443 --peer-ca @agents --peer-cert @peer",
            "--peer-cert and --peer-key need each other",
        ),
        ("--peer-listen :8443 --peer-ca @agents", "--listen and --peer-listen are both"),
        (
            "--peer-listen :9443 --peer-ca @agents --peer-cert @server-only --peer-key @server-only.key",
            "lacks clientAuth",
        ),
        ("--replica-id a/b", "--replica-id \"a/b\""),
    ] {
        let says = check(dir.path(), &format!("{REQUIRED} {flags}")).unwrap_err();
        assert!(says.contains(mistake), "{flags}: {says}");
    }
    let nameless = REQUIRED.replace("@cert", "@nameless").replace("@key", "@nameless.key");
    let says = check(dir.path(), &format!("{nameless} {usual}")).unwrap_err();
    assert!(says.contains("no subjectAltName"), "{says}");
}

#[test]
fn flags_that_need_each_other() {
    let dir = files();
    for (more, mistake) in [
        ("--egress-listen :1", "--egress-listen needs --caller-ca"),
        ("--caller-name x", "--caller-name needs --caller-ca"),
        ("--caller-ca @agents", "--caller-name is missing"),
        ("--kubeconfig @nodes --nodes-file @nodes", "both given"),
        ("--direct-nodes a=b", "--direct-nodes needs Nodes"),
        ("--egress-listen :8443 --caller-ca @callers", "--listen and --egress-listen are both [::]:8443"),
        ("--kubeconfig @none", "--kubeconfig"),
        ("--tls-key @cert", "no private key"),
    ] {
        let line = if more.contains("tls-key") {
            REQUIRED.replace("--tls-key @key", "")
        } else {
            REQUIRED.to_owned()
        };
        let says = check(dir.path(), &format!("{line} {more}")).unwrap_err();
        assert!(says.contains(mistake), "{more}: {says}");
    }
    // One CA for both is fine once it is said who may call; a bundle that holds both counts as the same CA.
    assert!(
        check(dir.path(), &format!("{REQUIRED} --caller-ca @agents --caller-name kube-apiserver")).is_ok()
    );
    let bundle =
        ["agents", "callers"].map(|name| fs::read_to_string(dir.path().join(name)).unwrap()).concat();
    fs::write(dir.path().join("bundle"), bundle).unwrap();
    assert!(
        check(dir.path(), &format!("{REQUIRED} --caller-ca @bundle")).unwrap_err().contains("--caller-name")
    );
}

#[test]
fn scrapers_ways_in() {
    let dir = files();
    let line = format!(
        "{REQUIRED} --proxy-listen :8080 --proxy-plain-listen [::1]:3128 --proxy-users @users \
         --passthrough-listen 10.0.0.1:10250=10250,:9100=9101 --passthrough-listen [::1]:0=10255"
    );
    let config = check(dir.path(), &line).unwrap();
    let proxy = config.proxy.unwrap();
    assert_eq!(proxy.listen, Some("[::]:8080".parse().unwrap()));
    assert_eq!(proxy.plain_listen, Some("[::1]:3128".parse().unwrap()));
    assert_eq!(proxy.users, dir.path().join("users"));
    let passthrough: Vec<_> = config.passthrough.iter().map(|(at, port)| format!("{at}={port}")).collect();
    assert_eq!(passthrough, ["10.0.0.1:10250=10250", "[::]:9100=9101", "[::1]:0=10255"]);
    for (flags, says) in [
        ("--proxy-listen :8080", "--proxy-users is missing"),
        ("--proxy-users @users", "--proxy-users needs --proxy-listen"),
        ("--proxy-plain-listen :3128 --proxy-users @users", "loopback"),
        ("--proxy-plain-listen 10.0.0.1:3128 --proxy-users @users", "loopback"),
        ("--proxy-listen :8080 --proxy-users @nodes --proxy-plain-listen x", "--proxy-plain-listen \"x\""),
        ("--proxy-listen :8080 --proxy-users @key", "key: "),
        ("--proxy-listen :8443 --proxy-users @users", "--listen and --proxy-listen are both"),
        ("--passthrough-listen :10250", "IP:PORT=NODEPORT"),
        ("--passthrough-listen :10250=0", "no port"),
        ("--passthrough-listen node1:10250=10250", "no address"),
        ("--passthrough-listen :10250=1 --passthrough-listen :10250=2", "are both [::]:10250"),
    ] {
        let why = check(dir.path(), &format!("{REQUIRED} {flags}")).unwrap_err();
        assert!(why.contains(says), "{flags}: {why}");
    }
}
