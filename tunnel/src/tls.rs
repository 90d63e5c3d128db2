//! Who is at the other end, and who we are: TLS 1.3 only, both sides with certificates.
//!
//! One [`ServerTls`] per listener and one [`ClientTls`] per way out, each built from files that are followed
//! ([`follow`]): a change is in force for the next handshake, a broken change leaves the old one working, and
//! connections that stand are not touched. What a certificate says about its holder is read in [`identity`].
//! There are no session tickets: a resumed session would skip the look at the certificate, and the whole handshake
//! costs 0.15 ms.

pub mod any_name;
pub mod follow;
pub mod identity;

use follow::Followed;
use rustls::{
    CertificateError, ClientConfig, RootCertStore, ServerConfig,
    client::{Resumption, WebPkiServerVerifier, danger::ServerCertVerifier},
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::{NoServerSessionStorage, WebPkiClientVerifier},
};
use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// What our agents and servers agree to speak after the handshake.
pub const ALPN: &[u8] = b"etun/1";

/// What a connection between our own ends may hold encrypted and unsent: more than a frame of the carrier, so that a
/// frame is one write. (rustls' own 64 KiB cut every frame's last bytes into a record and a write of their own.)
pub const BUFFER: usize = 256 << 10;

/// Where a certificate chain and its key lie; the same file twice is fine, as kubelet keeps them.
#[derive(Debug, Clone)]
pub struct KeyPair {
    /// PEM, leaf first.
    pub cert: PathBuf,
    /// PEM, PKCS#8, SEC1 or PKCS#1.
    pub key: PathBuf,
}

/// The TLS of one listener: our certificate, and the CA that clients' certificates must come from.
pub type ServerTls = Followed<Serving>;

/// What is made from the files of a listener.
#[derive(Debug)]
pub struct Serving {
    /// For the handshake.
    pub config: Arc<ServerConfig>,
    /// Our own certificate.
    pub leaf: identity::Leaf,
}

/// The TLS of one way out: the CA that the server's certificate must come from, and our certificate.
pub type ClientTls = Followed<Client>;

/// What is made from the files of a way out.
#[derive(Debug)]
pub struct Client {
    /// For the handshake.
    pub config: Arc<ClientConfig>,
    /// Our own certificate.
    pub leaf: identity::Leaf,
}

/// Reads the files of a listener and follows them. `client_ca` none: clients show no certificate.
///
/// # Errors
/// What is wrong with the files, all of it, each by its path.
pub fn server(pair: KeyPair, client_ca: Option<PathBuf>, alpn: bool) -> Result<ServerTls, String> {
    let mut paths = vec![pair.cert.clone(), pair.key.clone()];
    paths.extend(client_ca.clone());
    Followed::new(paths, move |files| {
        let (chain, key, leaf) = load_pair(&pair, &files[0], &files[1])?;
        let provider = provider();
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| error.to_string())?;
        let builder = match (&client_ca, files.get(2)) {
            (Some(path), Some(pem)) => {
                let roots = load_roots(path, pem)?;
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                    .clear_root_hint_subjects()
                    .build()
                    .map_err(|error| format!("{}: {error}", path.display()))?;
                builder.with_client_cert_verifier(verifier)
            }
            _ => builder.with_no_client_auth(),
        };
        let mut config = builder
            .with_single_cert(chain, key)
            .map_err(|error| format!("{}: {error}", pair.cert.display()))?;
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        if alpn {
            config.alpn_protocols = vec![ALPN.to_vec()];
        }
        Ok(Serving { config: Arc::new(config), leaf })
    })
}

/// Reads the files of a way out and follows them.
///
/// # Errors
/// What is wrong with the files, each by its path.
pub fn client(pair: KeyPair, server_ca: PathBuf) -> Result<ClientTls, String> {
    way_out(pair, server_ca, |roots, _| Ok(verifier(roots)?))
}

/// Reads the files of the way to other replicas and follows them. The other end must come from `peer_ca` and carry one of
/// `names` or of our certificate's: addresses of replicas come and go and are in no certificate.
///
/// # Errors
/// What is wrong with the files, each by its path.
pub fn to_replicas(pair: KeyPair, peer_ca: PathBuf, names: Arc<[String]>) -> Result<ClientTls, String> {
    way_out(pair, peer_ca, move |roots, leaf| {
        let names: Vec<_> = names.iter().chain(&leaf.alternative_names).cloned().collect();
        Ok(Arc::new(any_name::AnyName::new(roots, &names)?))
    })
}

fn verifier(roots: RootCertStore) -> Result<Arc<WebPkiServerVerifier>, String> {
    let builder = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider());
    builder.build().map_err(|error| error.to_string())
}

fn way_out(
    pair: KeyPair,
    server_ca: PathBuf,
    verifier: impl Fn(RootCertStore, &identity::Leaf) -> Result<Arc<dyn ServerCertVerifier>, String>
    + Send
    + Sync
    + 'static,
) -> Result<ClientTls, String> {
    let paths = vec![pair.cert.clone(), pair.key.clone(), server_ca.clone()];
    Followed::new(paths, move |files| {
        let (chain, key, leaf) = load_pair(&pair, &files[0], &files[1])?;
        let roots = load_roots(&server_ca, &files[2])?;
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| error.to_string())?
            .dangerous()
            .with_custom_certificate_verifier(verifier(roots, &leaf)?)
            .with_client_auth_cert(chain, key)
            .map_err(|error| format!("{}: {error}", pair.cert.display()))?;
        config.resumption = Resumption::disabled();
        config.alpn_protocols = vec![ALPN.to_vec()];
        Ok(Client { config: Arc::new(config), leaf })
    })
}

/// Waits for the moment after which a certificate counts no more. The clock is looked at again now and then: an edge
/// board learns the time long after it started.
pub async fn expired(not_after: i64) {
    const LOOK_AGAIN: Duration = Duration::from_secs(30);
    loop {
        let Ok(left) = u64::try_from(not_after.saturating_sub(unix_now())) else { return };
        if left == 0 {
            return;
        }
        tokio::time::sleep(LOOK_AGAIN.min(Duration::from_secs(left))).await;
    }
}

/// Seconds since 1970, as this machine's clock has it.
pub fn unix_now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

/// What a failed handshake or TLS connection means, in words for a person. `peer` is "the server", "the agent".
pub fn explain(error: &io::Error, peer: &str) -> String {
    let Some(tls) = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) else {
        return match error.kind() {
            io::ErrorKind::UnexpectedEof => format!("{peer} closed the connection during the TLS handshake"),
            _ => error.to_string(),
        };
    };
    match tls {
        rustls::Error::InvalidCertificate(why) => match why {
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => format!(
                "{peer}'s certificate is not yet valid ({why}): this machine's clock says {}, is it set?",
                clock()
            ),
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                format!("{peer}'s certificate has expired ({why}); this machine's clock says {}", clock())
            }
            CertificateError::UnknownIssuer => format!("{peer}'s certificate comes from another CA"),
            why => format!("{peer}'s certificate is refused: {why}"),
        },
        rustls::Error::AlertReceived(alert) => {
            format!(
                "{peer} broke off the TLS handshake: {alert:?}; our certificate may have expired, not be valid yet, or come from another CA than {peer} trusts"
            )
        }
        rustls::Error::NoCertificatesPresented => format!("{peer} shows no certificate"),
        other => format!("TLS with {peer}: {other}"),
    }
}

fn clock() -> String {
    jiff::Timestamp::from_second(unix_now()).map_or_else(|_| "nonsense".into(), |now| now.to_string())
}

/// Reads the leaf of a certificate chain in a file.
///
/// # Errors
/// What is wrong with the file.
pub fn leaf(path: &Path) -> Result<identity::Leaf, String> {
    let pem = std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let chain = load_certs(path, &pem)?;
    identity::Leaf::parse(&chain[0]).map_err(|error| format!("{}: {error}", path.display()))
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

fn load_pair(
    pair: &KeyPair,
    cert: &[u8],
    key: &[u8],
) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>, identity::Leaf), String> {
    let chain = load_certs(&pair.cert, cert)?;
    let key = PrivateKeyDer::from_pem_slice(key)
        .map_err(|error| format!("{}: no private key in it: {error}", pair.key.display()))?;
    let leaf =
        identity::Leaf::parse(&chain[0]).map_err(|error| format!("{}: {error}", pair.cert.display()))?;
    if leaf.not_after <= unix_now() {
        log::warn!("{}: this certificate has expired", pair.cert.display());
    }
    Ok((chain, key, leaf))
}

fn load_roots(path: &Path, pem: &[u8]) -> Result<RootCertStore, String> {
    let mut roots = RootCertStore::empty();
    for cert in load_certs(path, pem)? {
        roots.add(cert).map_err(|error| format!("{}: no CA certificate: {error}", path.display()))?;
    }
    Ok(roots)
}

/// At least one certificate, or why not.
fn load_certs(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let certs: Vec<_> = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(|error| format!("{}: {error}", path.display()))?;
    if certs.is_empty() {
        return Err(format!("{}: no certificate in it", path.display()));
    }
    Ok(certs)
}
