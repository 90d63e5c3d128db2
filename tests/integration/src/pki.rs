//! The cluster's certificates and kubeconfigs: one CA, one more for the API aggregator, a leaf for each who speaks.
//! Made by the `openssl` program, so that no cryptography need be compiled for the tests.

use crate::exec::{COMMAND_LIMIT, run};
use anyhow::{Context, Result};
use serde_json::json;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A certificate authority: `NAME.crt` and `NAME.key` in a folder.
#[derive(Debug)]
pub struct Authority {
    certificate: PathBuf,
    key: PathBuf,
}

/// Who a certificate is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Usage {
    /// One who connects.
    Client,
    /// One who listens.
    Server,
    /// One who does both: replicas talk to each other.
    Both,
}

/// Whose certificate it is.
#[derive(Debug, Clone, Copy)]
pub struct Subject<'a> {
    /// The user's name.
    pub common_name: &'a str,
    /// The user's group, if any.
    pub organization: Option<&'a str>,
}

impl<'a> Subject<'a> {
    /// A user of this name, in this group.
    pub fn new(common_name: &'a str, organization: Option<&'a str>) -> Self {
        Self { common_name, organization }
    }
}

impl Authority {
    /// A new one.
    pub fn new(dir: &Path, name: &str) -> Result<Self> {
        let new = Self::open(dir, name);
        let mut command = request(&new.certificate, &new.key, &format!("/CN=rig-{name}"));
        command.args(["-addext", "basicConstraints=critical,CA:TRUE"]);
        command.args(["-addext", "keyUsage=critical,keyCertSign,cRLSign,digitalSignature"]);
        run(&mut command, b"", COMMAND_LIMIT)?.ok()?;
        Ok(new)
    }

    /// One that [`Authority::new`] made.
    pub fn open(dir: &Path, name: &str) -> Self {
        Self { certificate: dir.join(format!("{name}.crt")), key: dir.join(format!("{name}.key")) }
    }

    /// Makes `NAME.crt` and `NAME.key` of a leaf, good for the hosts and addresses in `names`.
    pub fn leaf(
        &self,
        dir: &Path,
        name: &str,
        subject: Subject<'_>,
        usage: Usage,
        names: &[&str],
    ) -> Result<()> {
        let group = subject.organization.map(|group| format!("/O={group}")).unwrap_or_default();
        let whole = format!("{group}/CN={}", subject.common_name);
        let mut command = request(&dir.join(format!("{name}.crt")), &dir.join(format!("{name}.key")), &whole);
        command.arg("-CA").arg(&self.certificate).arg("-CAkey").arg(&self.key);
        command.args([
            "-addext",
            "basicConstraints=critical,CA:FALSE",
            "-addext",
            "keyUsage=critical,digitalSignature",
        ]);
        command.args([
            "-addext",
            match usage {
                Usage::Client => "extendedKeyUsage=clientAuth",
                Usage::Server => "extendedKeyUsage=serverAuth",
                Usage::Both => "extendedKeyUsage=serverAuth,clientAuth",
            },
        ]);
        if !names.is_empty() {
            command.args(["-addext", &format!("subjectAltName={}", alternatives(names))]);
        }
        run(&mut command, b"", COMMAND_LIMIT)?
            .ok()
            .with_context(|| format!("cannot make certificate {name}"))?;
        Ok(())
    }
}

/// openssl's command for a new EC key and a certificate over it, ten years long. A configuration of its own: Debian's adds extensions.
fn request(certificate: &Path, key: &Path, subject: &str) -> Command {
    let mut command = Command::new("openssl");
    command.args([
        "req",
        "-x509",
        "-config",
        "/dev/null",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
    ]);
    command.args(["-noenc", "-days", "3650", "-subj", subject]);
    command.arg("-out").arg(certificate).arg("-keyout").arg(key);
    command
}

fn alternatives(names: &[&str]) -> String {
    let one = |name: &&str| match name.parse::<IpAddr>() {
        Ok(_) => format!("IP:{name}"),
        Err(_) => format!("DNS:{name}"),
    };
    names.iter().map(one).collect::<Vec<_>>().join(",")
}

/// Writes a key pair for service account tokens: `sa.key`, `sa.pub`.
pub fn service_account_keys(dir: &Path) -> Result<()> {
    let (key, public) = (dir.join("sa.key"), dir.join("sa.pub"));
    let mut command = Command::new("openssl");
    command.args(["genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out"]).arg(&key);
    run(&mut command, b"", COMMAND_LIMIT)?.ok()?;
    let mut command = Command::new("openssl");
    command.args(["pkey", "-pubout", "-in"]).arg(&key).arg("-out").arg(&public);
    run(&mut command, b"", COMMAND_LIMIT)?.ok().map(drop)
}

/// A kubeconfig that names certificate files in `dir`.
pub fn kubeconfig(server: &str, dir: &str, name: &str) -> String {
    json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "rig",
        "clusters": [{"name": "rig", "cluster": {"server": server, "certificate-authority": format!("{dir}/ca.crt")}}],
        "users": [{"name": name, "user": {
            "client-certificate": format!("{dir}/{name}.crt"), "client-key": format!("{dir}/{name}.key")}}],
        "contexts": [{"name": "rig", "context": {"cluster": "rig", "user": name}}],
    })
    .to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leaf_is_signed_by_its_authority_for_its_use_and_names() {
        let dir = tempfile::tempdir().unwrap();
        let ca = Authority::new(dir.path(), "ca").unwrap();
        let subject = Subject::new("system:node:node1", Some("system:nodes"));
        ca.leaf(dir.path(), "leaf", subject, Usage::Server, &["node1", "10.20.1.2"]).unwrap();
        let openssl = |arguments: &[&str]| {
            let mut command = Command::new("openssl");
            run(command.args(arguments).current_dir(dir.path()), b"", COMMAND_LIMIT).unwrap()
        };
        openssl(&["verify", "-purpose", "sslserver", "-CAfile", "ca.crt", "leaf.crt"]).ok().unwrap();
        let as_client = openssl(&["verify", "-purpose", "sslclient", "-CAfile", "ca.crt", "leaf.crt"]);
        assert!(!as_client.status.success(), "a server's certificate is no client's");
        let text = openssl(&["x509", "-noout", "-text", "-in", "leaf.crt"]).ok().unwrap();
        for part in ["O = system:nodes, CN = system:node:node1", "DNS:node1, IP Address:10.20.1.2"] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
    }
}
