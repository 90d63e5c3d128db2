//! A connection to the API server that notices when the other end is gone.
//!
//! The address and the credentials are read anew for every client, so that a certificate that was rotated, a
//! kubeconfig that appears late, or a clock that jumps away from 1970 needs no restart. Every wait is bounded: a
//! dropped SYN by the connect timeout, a path that died while nothing was sent by TCP keepalive, and one that
//! died while something was by TCP_USER_TIMEOUT.

use super::proxy::{self, Proxy};
use crate::flags::ApiAddress;
use http::Uri;
use hyper::rt::{Read, Write};
use hyper_util::{
    client::legacy::{
        self,
        connect::{Connection, HttpConnector, proxy::Tunnel},
    },
    rt::TokioExecutor,
};
use jiff::Timestamp;
use kube::{
    Client, Config,
    client::{Body, ConfigExt},
    config::{KubeConfigOptions, Kubeconfig},
};
use rustls::{CertificateError, pki_types::UnixTime};
use std::{error::Error, io, time::Duration};
use tower::{BoxError, Service, ServiceBuilder, ServiceExt};

/// How long a connection may take to be made, and how long any single answer may take to begin.
pub const ANSWER_WITHIN: Duration = Duration::from_secs(10);
const CONNECT_WITHIN: Duration = Duration::from_secs(5);
/// An idle connection whose other end is gone is noticed after 10 + 3 * 5 seconds.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(10), Duration::from_secs(5), 3);
const UNACKNOWLEDGED: Duration = Duration::from_secs(20);

/// A client for the API server, from the kubeconfig, the URL, or the pod's service account.
///
/// # Errors
/// A sentence on what is missing or wrong.
pub async fn connect(address: &ApiAddress) -> Result<Client, String> {
    let (config, proxy) = config(address).await?;
    client(config, proxy).map_err(|e| format!("set up the connection to the API server: {}", chain(&e)))
}

async fn config(address: &ApiAddress) -> Result<(Config, Option<Proxy>), String> {
    let url = |url: &str| url.parse::<Uri>().map_err(|e| format!("--kube-api-url={url}: {e}"));
    let mut proxy = None;
    let mut config = match (&address.kubeconfig, &address.url) {
        (Some(path), overriding) => {
            let shown = path.display();
            let read =
                Kubeconfig::read_from(path).map_err(|e| format!("read kubeconfig {shown}: {}", chain(&e)))?;
            proxy = proxy::written(&read);
            let options = KubeConfigOptions::default();
            let config = Config::from_custom_kubeconfig(read, &options).await;
            let mut config = config.map_err(|e| format!("kubeconfig {shown}: {}", chain(&e)))?;
            if let Some(overriding) = overriding {
                config.cluster_url = url(overriding)?;
            }
            config
        }
        (None, Some(plain)) => Config::new(url(plain)?),
        (None, None) => Config::incluster().map_err(|e| {
            format!(
                "neither --kubeconfig-file nor --kube-api-url is given, and this is no pod: {}",
                chain(&e)
            )
        })?,
    };
    // Retries are this program's own affair: it knows what else there is to do meanwhile.
    config.default_retry = false;
    let environment = proxy::environment(|name| std::env::var(name).ok())?;
    let proxy = proxy::choose(proxy.as_deref(), &environment, &config.cluster_url)?;
    Ok((config, proxy))
}

fn client(config: Config, proxy: Option<Proxy>) -> Result<Client, kube::Error> {
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_connect_timeout(Some(CONNECT_WITHIN));
    let (idle, every, times) = KEEPALIVE;
    tcp.set_keepalive(Some(idle));
    tcp.set_keepalive_interval(Some(every));
    tcp.set_keepalive_retries(Some(times));
    tcp.set_tcp_user_timeout(Some(UNACKNOWLEDGED));
    let Some(Proxy { url, authorization }) = proxy else { return over(tcp, config) };
    log::debug!("the API server {} is reached through the proxy {url}", config.cluster_url);
    let mut tunnel = Tunnel::new(url.clone(), tcp);
    if let Some(authorization) = authorization {
        tunnel = tunnel.with_auth(authorization);
    }
    over(tunnel.map_err(move |e| BoxError::from(format!("through the proxy {url}: {}", chain(&e)))), config)
}

/// The client over connections that `connector` makes.
fn over<C>(connector: C, config: Config) -> Result<Client, kube::Error>
where
    C: Service<Uri, Error: Into<BoxError>, Future: Send> + Clone + Send + Sync + 'static,
    C::Response: Connection + Read + Write + Send + Unpin + 'static,
{
    // Said, not guessed: with another crate's provider in the same build rustls would not choose. The first one stays.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let tls = config.rustls_https_connector_with_connector(connector)?;
    // One is kept, for the next page of a list; it goes with the client.
    let http = legacy::Client::builder(TokioExecutor::new()).pool_max_idle_per_host(1).build::<_, Body>(tls);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(BoxError::from)
        .service(http);
    Ok(Client::new(service, config.default_namespace))
}

/// An error with everything that it was caused by, each thing said once.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    text
}

/// What kube says, for people.
#[must_use]
pub fn said(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => {
            format!("the API server answers {} {}: {}", status.code, status.reason, status.message)
        }
        other => out_of_time(other).unwrap_or_else(|| chain(other)),
    }
}

/// What is said of a certificate that this node's clock finds too young or too old. A board without a battery starts in
/// 1970, and the clock is set by the network that it waits for. Without the clock's time, which is another one in each try.
fn out_of_time(error: &(dyn Error + 'static)) -> Option<String> {
    let date = |time: &UnixTime| {
        let seconds = i64::try_from(time.as_secs()).ok();
        seconds.and_then(|at| Timestamp::from_second(at).ok()).map_or("?".into(), |at| at.to_string())
    };
    let rustls::Error::InvalidCertificate(what) = tls_error(error)? else { return None };
    let what = match what {
        CertificateError::NotValidYetContext { not_before, .. } => {
            format!("is not valid yet by this node's clock, only from {} on", date(not_before))
        }
        CertificateError::ExpiredContext { not_after, .. } => {
            format!("has expired by this node's clock, at {}", date(not_after))
        }
        _ => return None,
    };
    Some(format!("its certificate {what}; if the clock is wrong, it is tried again until that is set"))
}

/// What TLS had against it, somewhere in the causes: `io::Error` hides what it carries from `source`.
fn tls_error<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a rustls::Error> {
    let carried = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
    error.downcast_ref().or_else(|| tls_error(carried?)).or_else(|| tls_error(error.source()?))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_and_a_clock_that_do_not_fit() {
        let at = |seconds| UnixTime::since_unix_epoch(Duration::from_secs(seconds));
        let young = CertificateError::NotValidYetContext { time: at(5), not_before: at(1_800_000_000) };
        let old = CertificateError::ExpiredContext { time: at(1_900_000_000), not_after: at(1_800_000_000) };
        // As it comes: hyper's error around an io::Error around rustls'.
        let wrapped = |what| {
            let tls = io::Error::new(io::ErrorKind::InvalidData, rustls::Error::InvalidCertificate(what));
            said(&kube::Error::Service(Box::new(io::Error::other(tls))))
        };
        let said = wrapped(young);
        assert!(
            said.contains("not valid yet by this node's clock, only from 2027-01-15T08:00:00Z on"),
            "{said}"
        );
        assert!(wrapped(old).contains("expired by this node's clock, at 2027-01-15T08:00:00Z"));
        assert!(wrapped(CertificateError::UnknownIssuer).contains("UnknownIssuer"));
    }
}
