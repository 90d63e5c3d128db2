//! An agent's flags: what they become, and that all mistakes come at once.

use super::*;
use crate::config::{Cli, Command};
use clap::Parser;
use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair as Key};
use std::{fs, path::Path};

fn files() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let key = Key::generate().unwrap();
    let mut params = CertificateParams::new(vec!["tunnel.example".to_owned()]).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let cert = params.self_signed(&key).unwrap();
    fs::write(dir.path().join("cert"), cert.pem()).unwrap();
    fs::write(dir.path().join("key"), key.serialize_pem()).unwrap();
    // As the kubelet keeps them.
    fs::write(dir.path().join("both"), cert.pem() + &key.serialize_pem()).unwrap();
    dir
}

fn check(dir: &Path, line: &str) -> Result<AgentConfig, String> {
    let words = line.split_whitespace().map(|word| match word.strip_prefix('@') {
        Some(name) => dir.join(name).display().to_string(),
        None => word.to_owned(),
    });
    let cli = Cli::try_parse_from(["edge-tunnel".to_owned(), "agent".to_owned()].into_iter().chain(words));
    let Command::Agent(args) = cli.map_err(|error| error.to_string())?.command else { unreachable!() };
    args.check(|_| None).map_err(|mistakes| mistakes.to_string())
}

#[test]
fn the_least_there_must_be() {
    let dir = files();
    let config = check(dir.path(), "--server tunnel.example:443 --server-ca @cert --cert @both").unwrap();
    assert_eq!(config.servers[0].0.to_string(), "tunnel.example:443");
    assert_eq!(config.servers[0].1.to_str(), "tunnel.example");
    assert_eq!(config.pair.key, dir.path().join("both"));
    assert_eq!(config.kubelet, "127.0.0.1:10250".parse().unwrap());
    assert_eq!(config.metrics_listen, "127.0.0.1:10268".parse().unwrap());
    assert_eq!(config.outbound, Outbound::default());
}

#[test]
fn everything_there_can_be() {
    let dir = files();
    let line = "--server a:1,[fd00::1]:2 --server 10.0.0.1:3 --server-ca @cert --server-name x.example --cert @cert \
                --key @key --kubelet [::1]:20250 --allow 127.0.0.1:9100 --allow none,10.244.0.0/16:1-65535 \
                --metrics-listen :0 --drain 0s --log-format json";
    let config = check(dir.path(), line).unwrap();
    assert_eq!(config.servers.len(), 3);
    assert!(config.servers.iter().all(|(_, name)| name.to_str() == "x.example"));
    assert_eq!(config.allow.len(), 3);
    assert_eq!((config.drain, config.kubelet), (Duration::ZERO, "[::1]:20250".parse().unwrap()));
    let config =
        check(dir.path(), "--server 10.0.0.1:3 --server-ca @cert --cert @both --kubelet 10.0.0.9").unwrap();
    assert_eq!(config.servers[0].1.to_str(), "10.0.0.1");
    assert_eq!(config.kubelet, "10.0.0.9:10250".parse().unwrap());
}

#[test]
fn every_mistake_is_reported() {
    let dir = files();
    let says = check(
        dir.path(),
        "--server nowhere --server-name no_name --kubelet localhost:10250 --allow 9100,a:b --cert @none --server-ca @none2 \
         --drain x --metrics-listen 1",
    )
    .unwrap_err();
    for mistake in [
        "--server \"nowhere\": the target has no port",
        "--kubelet",
        "--allow \"9100\"",
        "--allow \"a:b\"",
        "/none:",
        "/none2:",
        "--drain",
        "--metrics-listen",
    ] {
        assert!(says.contains(mistake), "{mistake} is not in:\n{says}");
    }
    let says = check(dir.path(), "--kubelet 169.254.1.1:10250 --key @key").unwrap_err();
    for mistake in ["--server is missing", "--server-ca is missing", "never dialled", "--key needs --cert"] {
        assert!(says.contains(mistake), "{mistake} is not in:\n{says}");
    }
}
