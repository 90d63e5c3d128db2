//! A connection to the API server that notices when the other end is gone.
//!
//! The address and the credentials are read anew for every client, so that a certificate that was rotated, a
//! kubeconfig that appears late, or a clock that jumps away from 1970 needs no restart. Every wait is bounded: a
//! dropped SYN by the connect timeout, a path that died while nothing was sent by TCP keepalive, and one that
//! died while something was by TCP_USER_TIMEOUT.

use crate::flags::ApiAddress;
use hyper_util::{
    client::legacy::{self, connect::HttpConnector},
    rt::TokioExecutor,
};
use kube::{
    Client, Config,
    client::{Body, ConfigExt},
    config::{KubeConfigOptions, Kubeconfig},
};
use std::{error::Error, time::Duration};
use tower::{BoxError, ServiceBuilder};

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
    let config = config(address).await?;
    client(config).map_err(|e| format!("set up the connection to the API server: {}", chain(&e)))
}

async fn config(address: &ApiAddress) -> Result<Config, String> {
    let url = |url: &str| url.parse::<http::Uri>().map_err(|e| format!("--kube-api-url={url}: {e}"));
    let mut config = match (&address.kubeconfig, &address.url) {
        (Some(path), overriding) => {
            let shown = path.display();
            let read =
                Kubeconfig::read_from(path).map_err(|e| format!("read kubeconfig {shown}: {}", chain(&e)))?;
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
    Ok(config)
}

fn client(config: Config) -> Result<Client, kube::Error> {
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_connect_timeout(Some(CONNECT_WITHIN));
    let (idle, every, times) = KEEPALIVE;
    tcp.set_keepalive(Some(idle));
    tcp.set_keepalive_interval(Some(every));
    tcp.set_keepalive_retries(Some(times));
    tcp.set_tcp_user_timeout(Some(UNACKNOWLEDGED));
    // Said, not guessed: with another crate's provider in the same build rustls would not choose. The first one stays.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let tls = config.rustls_https_connector_with_connector(tcp)?;
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
        other => chain(other),
    }
}
