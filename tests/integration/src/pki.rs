//! The cluster's certificates and kubeconfigs: one CA, one more for the API aggregator, a leaf for each who speaks.

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use serde_json::json;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

/// A certificate authority that lives as long as the cluster is being made.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: String,
    key: String,
}

/// Who a certificate is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Usage {
    /// One who connects.
    Client,
    /// One who listens.
    Server,
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Authority")
    }
}

impl Authority {
    /// A new one.
    pub fn new(name: &str) -> Result<Self> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages =
            vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
        let certificate = params.self_signed(&key)?.pem();
        let pem = key.serialize_pem();
        Ok(Self { issuer: Issuer::new(params, key), certificate, key: pem })
    }

    /// Writes `NAME.crt` and `NAME.key` of the authority itself.
    pub fn write(&self, dir: &Path, name: &str) -> Result<()> {
        write(&dir.join(format!("{name}.crt")), &self.certificate)?;
        write(&dir.join(format!("{name}.key")), &self.key)
    }

    /// Writes `NAME.crt` and `NAME.key` of a leaf. `subject` is the common name and the group, if any.
    pub fn leaf(
        &self,
        dir: &Path,
        name: &str,
        subject: (&str, Option<&str>),
        usage: Usage,
        names: &[&str],
    ) -> Result<()> {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, subject.0);
        if let Some(group) = subject.1 {
            params.distinguished_name.push(DnType::OrganizationName, group);
        }
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![match usage {
            Usage::Client => ExtendedKeyUsagePurpose::ClientAuth,
            Usage::Server => ExtendedKeyUsagePurpose::ServerAuth,
        }];
        for name in names {
            params.subject_alt_names.push(match name.parse::<IpAddr>() {
                Ok(address) => SanType::IpAddress(address),
                Err(_) => SanType::DnsName((*name).try_into()?),
            });
        }
        let key = KeyPair::generate()?;
        let certificate =
            params.signed_by(&key, &self.issuer).with_context(|| format!("cannot sign {name}"))?;
        write(&dir.join(format!("{name}.crt")), &certificate.pem())?;
        write(&dir.join(format!("{name}.key")), &key.serialize_pem())
    }
}

/// Writes a key pair for service account tokens: `sa.key`, `sa.pub`.
pub fn service_account_keys(dir: &Path) -> Result<()> {
    let key = KeyPair::generate()?;
    write(&dir.join("sa.key"), &key.serialize_pem())?;
    write(&dir.join("sa.pub"), &key.public_key_pem())
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

fn write(path: &PathBuf, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {path:?}"))
}
