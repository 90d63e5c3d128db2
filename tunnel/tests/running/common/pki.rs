//! A small public key infrastructure: CAs (server, agent, caller, peer, a foreign one) and leaves in files.

use super::*;

pub struct Pki {
    dir: PathBuf,
    cas: Vec<(&'static str, CertificateParams, KeyPair)>,
}

/// What a leaf is like.
#[derive(Clone, Default)]
pub struct Leaf<'a> {
    pub ca: &'static str,
    pub cn: &'a str,
    pub organization: Option<&'a str>,
    pub sans: &'a [&'a str],
    pub server: bool,
    /// A server's that is a client's too: replicas show one certificate to each other.
    pub replica: bool,
    /// Seconds from now.
    pub not_before: i64,
    pub not_after: i64,
}

impl Pki {
    pub fn new(dir: &Path) -> Self {
        let cas = ["server", "agent", "caller", "peer", "foreign"].map(|name| {
            let mut params = CertificateParams::new(Vec::new()).unwrap();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.distinguished_name = DistinguishedName::new();
            params.distinguished_name.push(DnType::CommonName, format!("{name} CA"));
            let key = KeyPair::generate().unwrap();
            fs::write(dir.join(format!("{name}-ca.pem")), params.self_signed(&key).unwrap().pem()).unwrap();
            (name, params, key)
        });
        let pki = Self { dir: dir.to_owned(), cas: cas.into() };
        let sans = &["server.test", "127.0.0.1", "::1", "10.0.0.1"];
        pki.issue("server", &Leaf { ca: "server", cn: "server", sans, server: true, ..pki.usual() });
        pki.issue("peer", &pki.replica());
        pki.issue("apiserver", &Leaf { ca: "caller", cn: "kube-apiserver", ..pki.usual() });
        pki
    }

    pub fn usual(&self) -> Leaf<'static> {
        Leaf { ca: "agent", cn: "nobody", not_before: -3600, not_after: 86_400, ..Leaf::default() }
    }

    /// The certificate that replicas share.
    pub fn replica(&self) -> Leaf<'static> {
        Leaf { ca: "peer", cn: "edge-tunnel", sans: &["server.test"], replica: true, ..self.usual() }
    }

    /// A node's certificate, as the cluster's CA makes it.
    pub fn node(&self, node: &str) {
        let cn = format!("system:node:{node}");
        self.issue(node, &Leaf { cn: &cn, organization: Some("system:nodes"), ..self.usual() });
    }

    /// Writes NAME.pem and NAME.key, each renamed into place.
    pub fn issue(&self, name: &str, leaf: &Leaf<'_>) {
        let (_, ca, ca_key) = self.cas.iter().find(|(name, ..)| *name == leaf.ca).unwrap();
        let sans: Vec<String> = leaf.sans.iter().map(|san| (*san).to_owned()).collect();
        let mut params = CertificateParams::new(sans).unwrap();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, leaf.cn);
        if let Some(organization) = leaf.organization {
            params.distinguished_name.push(DnType::OrganizationName, organization);
        }
        params.extended_key_usages = match (leaf.server, leaf.replica) {
            (_, true) => vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth],
            (true, false) => vec![ExtendedKeyUsagePurpose::ServerAuth],
            (false, false) => vec![ExtendedKeyUsagePurpose::ClientAuth],
        };
        let at = |seconds: i64| {
            let now = SystemTime::now();
            let delta = Duration::from_secs(seconds.unsigned_abs());
            if seconds < 0 { now - delta } else { now + delta }.into()
        };
        params.not_before = at(leaf.not_before);
        params.not_after = at(leaf.not_after);
        let key = KeyPair::generate().unwrap();
        let issuer = Issuer::from_params(ca, ca_key);
        let cert = params.signed_by(&key, &issuer).unwrap();
        for (file, text) in [("pem", cert.pem()), ("key", key.serialize_pem())] {
            let path = self.dir.join(format!("{name}.{file}"));
            let new = self.dir.join(format!("{name}.{file}.new"));
            fs::write(&new, text).unwrap();
            fs::rename(new, path).unwrap();
        }
    }

    pub fn pair(&self, name: &str) -> tls::KeyPair {
        tls::KeyPair { cert: self.dir.join(format!("{name}.pem")), key: self.dir.join(format!("{name}.key")) }
    }

    pub fn ca(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}-ca.pem"))
    }
}
