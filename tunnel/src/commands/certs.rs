//! `edge-tunnel certs`: the CAs and certificates of a first installation.
//!
//! A server's certificate is what every installation needs; the callers' CA is for kube-apiserver's client certificate;
//! the agents' CA is only for trying out, nodes of a cluster have certificates of the cluster's CA. A CA that is there
//! is used again, a leaf that is there is refused and nothing changes. Keys and certificates are files of mode 0600.

use crate::target::Name;
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose,
};
use std::{
    fs::{self, OpenOptions},
    io::Write,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

/// A machine whose clock is a little behind believes a new certificate all the same.
const BACKDATED: Duration = Duration::from_secs(3600);
const YEAR: Duration = Duration::from_secs(365 * 86_400);

/// How long CAs and leaves count.
const CA_YEARS: u32 = 10;
const LEAF_YEARS: u32 = 1;

/// The flags as written.
#[derive(Debug, Args)]
pub struct CertsArgs {
    /// Where they are written, or used again
    #[arg(long, env = "EDGE_TUNNEL_DIR", value_name = "DIR")]
    dir: PathBuf,
    /// A name or address of the server: what agents dial, and what kube-apiserver's url says
    #[arg(long, env = "EDGE_TUNNEL_SERVER_NAME", value_name = "NAME", value_delimiter = ',')]
    server_name: Vec<String>,
    /// A node for trying out; a cluster's nodes have their kubelet's certificate
    #[arg(long, env = "EDGE_TUNNEL_NODE", value_name = "NAME", value_delimiter = ',')]
    node: Vec<String>,
    /// A caller, such as edge-tunnel-caller for kube-apiserver
    #[arg(long, env = "EDGE_TUNNEL_CALLER", value_name = "NAME", value_delimiter = ',')]
    caller: Vec<String>,
}

/// A certificate to be made.
struct Leaf {
    file: String,
    ca: &'static str,
    params: CertificateParams,
}

/// A file to be written: its name and its text.
type New = (String, String);

/// Makes what is asked for; gives what to print.
///
/// # Errors
/// What is there already, or cannot be made or written; then nothing has changed.
pub fn run(args: &CertsArgs) -> Result<String> {
    let leaves = leaves(args)?;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(&args.dir).with_context(|| shown(&args.dir))?;
    for leaf in &leaves {
        for ending in ["pem", "key"] {
            let path = args.dir.join(format!("{}.{ending}", leaf.file));
            ensure!(!path.exists(), "{} is there already; nothing has been written", path.display());
        }
    }
    let mut new: Vec<New> = Vec::new();
    for ca in ["server", "agent", "caller"] {
        let issuer = authority(&args.dir, ca, &mut new)?;
        for leaf in leaves.iter().filter(|leaf| leaf.ca == ca) {
            let key = KeyPair::generate()?;
            let certificate = leaf.params.signed_by(&key, &issuer)?;
            new.push((format!("{}.pem", leaf.file), certificate.pem()));
            new.push((format!("{}.key", leaf.file), key.serialize_pem()));
        }
    }
    write_all(&args.dir, &new)?;
    Ok(new.iter().map(|(name, _)| shown(&args.dir.join(name)) + "\n").collect())
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

/// What is to be made. Names are checked before anything is written.
fn leaves(args: &CertsArgs) -> Result<Vec<Leaf>> {
    let mut leaves = Vec::new();
    let names: Vec<String> = args.server_name.iter().filter(|name| !name.is_empty()).cloned().collect();
    if let Some(first) = names.first().cloned() {
        let both = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        leaves.push(Leaf { file: "server".into(), ca: "server", params: leaf(names, &first, None, both)? });
    }
    let client = || vec![ExtendedKeyUsagePurpose::ClientAuth];
    for name in args.node.iter().filter(|name| !name.is_empty()) {
        let name: Name = name.parse().map_err(|why| anyhow::anyhow!("--node {name:?}: {why}"))?;
        let params = leaf(Vec::new(), &format!("system:node:{name}"), Some("system:nodes"), client())?;
        leaves.push(Leaf { file: format!("node-{name}"), ca: "agent", params });
    }
    for name in args.caller.iter().filter(|name| !name.is_empty()) {
        let plain = |letter: char| letter.is_ascii_alphanumeric() || "-_.@".contains(letter);
        if !name.chars().all(plain) || name.starts_with('.') || name.len() > 64 {
            bail!("--caller {name:?}: a name of letters, digits and -_.@");
        }
        leaves.push(Leaf {
            file: format!("caller-{name}"),
            ca: "caller",
            params: leaf(Vec::new(), name, None, client())?,
        });
    }
    Ok(leaves)
}

fn leaf(
    sans: Vec<String>,
    common_name: &str,
    organization: Option<&str>,
    usages: Vec<ExtendedKeyUsagePurpose>,
) -> Result<CertificateParams> {
    let mut params = dated(CertificateParams::new(sans)?, common_name, LEAF_YEARS);
    if let Some(organization) = organization {
        params.distinguished_name.push(DnType::OrganizationName, organization);
    }
    params.extended_key_usages = usages;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.is_ca = IsCa::ExplicitNoCa;
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

fn dated(mut params: CertificateParams, common_name: &str, years: u32) -> CertificateParams {
    let now = SystemTime::now();
    params.not_before = (now - BACKDATED).into();
    params.not_after = (now + YEAR * years).into();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    params
}

/// The CA that is there, or a new one, which is added to `new`.
fn authority(dir: &Path, name: &str, new: &mut Vec<New>) -> Result<Issuer<'static, KeyPair>> {
    let (pem, key) = (format!("{name}-ca.pem"), format!("{name}-ca.key"));
    match (read(&dir.join(&pem))?, read(&dir.join(&key))?) {
        (Some(certificate), Some(private)) => {
            let broken = || format!("{} and its .key: no CA that can be used again", shown(&dir.join(&pem)));
            let private = KeyPair::from_pem(&private).with_context(broken)?;
            Issuer::from_ca_cert_pem(&certificate, private).with_context(broken)
        }
        (None, None) => {
            let mut params =
                dated(CertificateParams::new(Vec::new())?, &format!("edge-tunnel {name} CA"), CA_YEARS);
            params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
            let private = KeyPair::generate()?;
            new.push((pem, params.self_signed(&private)?.pem()));
            new.push((key, private.serialize_pem()));
            Ok(Issuer::new(params, private))
        }
        (certificate, _) => {
            let missing = if certificate.is_some() { key } else { pem };
            bail!(
                "{} is missing, its other half is there; nothing has been written",
                shown(&dir.join(missing))
            )
        }
    }
}

fn read(path: &Path) -> Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| shown(path)),
    }
}

/// Writes every file or, when one fails, none.
fn write_all(dir: &Path, new: &[New]) -> Result<()> {
    for (at, (name, text)) in new.iter().enumerate() {
        let path = dir.join(name);
        let written =
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).and_then(|mut file| {
                let written = file.write_all(text.as_bytes()).and_then(|()| file.sync_all());
                written.inspect_err(|_| drop(fs::remove_file(&path)))
            });
        if let Err(error) = written {
            for (name, _) in &new[..at] {
                let _ = fs::remove_file(dir.join(name));
            }
            return Err(error).with_context(|| format!("{}; nothing has been written", path.display()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::{self, identity};
    use rustls::pki_types::{CertificateDer, pem::PemObject};
    use std::{collections::BTreeSet, os::unix::fs::PermissionsExt};

    fn args(dir: &Path, server_name: &[&str], node: &[&str], caller: &[&str]) -> CertsArgs {
        let [server_name, node, caller] =
            [server_name, node, caller].map(|names| names.iter().map(|name| (*name).to_owned()).collect());
        CertsArgs { dir: dir.to_owned(), server_name, node, caller }
    }

    fn files(dir: &Path) -> BTreeSet<(String, Vec<u8>)> {
        let read = |entry: std::io::Result<fs::DirEntry>| {
            let path = entry.unwrap().path();
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600, "{path:?}");
            (path.file_name().unwrap().to_string_lossy().into_owned(), fs::read(path).unwrap())
        };
        fs::read_dir(dir).unwrap().map(read).collect()
    }

    fn leaf_of(dir: &Path, name: &str) -> identity::Leaf {
        identity::Leaf::parse(&CertificateDer::from_pem_file(dir.join(name)).unwrap()).unwrap()
    }

    #[test]
    fn a_first_installation_and_what_is_added_later() {
        let temp = tempfile::tempdir().unwrap();
        let dir = &temp.path().join("new");
        let said =
            run(&args(dir, &["tunnel.example", "10.0.0.1"], &["node1"], &["edge-tunnel-caller"])).unwrap();
        assert_eq!(said.lines().count(), 12, "{said}");
        let server = leaf_of(dir, "server.pem");
        assert_eq!(server.alternative_names, ["tunnel.example", "10.0.0.1"]);
        assert!(server.client_auth, "replicas show it to each other");
        assert_eq!(leaf_of(dir, "node-node1.pem").node().unwrap().as_str(), "node1");
        let caller = leaf_of(dir, "caller-edge-tunnel-caller.pem");
        assert_eq!(&*caller.caller(&["edge-tunnel-caller".into()]).unwrap(), "edge-tunnel-caller");
        // What the server and the agent make of the files.
        let pair = |name: &str| tls::KeyPair {
            cert: dir.join(format!("{name}.pem")),
            key: dir.join(format!("{name}.key")),
        };
        tls::server(pair("server"), Some(dir.join("agent-ca.pem")), true).unwrap();
        tls::client(pair("node-node1"), dir.join("server-ca.pem")).unwrap();

        // A leaf that is there is refused, and with it everything that was asked for.
        let before = files(dir);
        for (server_name, node, says) in [
            (&["other.example"][..], &["node2"][..], "server.pem is there already"),
            (&[], &["node2", "node1"], "node-node1.pem is there already"),
            (&[], &["no/de"], "--node"),
        ] {
            let why = run(&args(dir, server_name, node, &[])).unwrap_err().to_string();
            assert!(why.contains(says), "{why}");
            assert_eq!(files(dir), before, "{says}");
        }
        // The CAs are used again.
        run(&args(dir, &[], &["node2"], &["another"])).unwrap();
        let after = files(dir);
        assert!(before.is_subset(&after) && after.len() == before.len() + 4);
    }

    #[test]
    fn half_a_ca_or_a_broken_one_is_not_replaced() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path();
        run(&args(dir, &["tunnel.example"], &[], &[])).unwrap();
        let key = dir.join("agent-ca.key");
        let private = fs::read(&key).unwrap();
        fs::remove_file(&key).unwrap();
        let before = files(dir);
        let why = run(&args(dir, &[], &["node1"], &[])).unwrap_err().to_string();
        assert!(why.contains("agent-ca.key is missing") && files(dir) == before, "{why}");
        fs::write(&key, "nonsense").unwrap();
        fs::set_permissions(&key, fs::Permissions::from_mode(0o600)).unwrap();
        assert!(run(&args(dir, &[], &["node1"], &[])).unwrap_err().to_string().contains("no CA"));
        fs::write(&key, private).unwrap();
        run(&args(dir, &[], &["node1"], &[])).unwrap();
        for caller in ["../x", "a b", ".x"] {
            assert!(run(&args(dir, &[], &[], &[caller])).is_err(), "{caller}");
        }
    }
}
