//! `edge-tunnel agent`: its flags, and what they mean together.

use super::{LogFormat, Mistakes, certificates, duration, given, listen, outbound::Outbound, path};
use crate::{
    network::never_dialled,
    policy::{Allow, KUBELET_PORT},
    target::{Host, Target},
    tls::{self, KeyPair},
};
use clap::Args;
use rustls::pki_types::ServerName;
use std::{net::SocketAddr, path::PathBuf, time::Duration};

/// Where a kubelet keeps its rotating client certificate and key, both in one file.
const KUBELET_CERT: &str = "/var/lib/kubelet/pki/kubelet-client-current.pem";

/// The flags as written.
#[derive(Debug, Clone, Default, Args)]
pub struct AgentArgs {
    /// The server, or its load balancer
    #[arg(long, env = "EDGE_TUNNEL_SERVER", value_name = "HOST:PORT", value_delimiter = ',')]
    server: Vec<String>,
    /// The CA of the server's certificate (PEM)
    #[arg(long, env = "EDGE_TUNNEL_SERVER_CA", value_name = "FILE")]
    server_ca: Option<String>,
    /// The name in the server's certificate, where it is not the host of --server
    #[arg(long, env = "EDGE_TUNNEL_SERVER_NAME", value_name = "NAME")]
    server_name: Option<String>,
    /// The node's client certificate (PEM); by default the kubelet's own, rotated by it
    #[arg(long, env = "EDGE_TUNNEL_CERT", value_name = "FILE", default_value = KUBELET_CERT)]
    cert: Option<String>,
    /// Its key (PEM); by default in the same file
    #[arg(long, env = "EDGE_TUNNEL_KEY", value_name = "FILE")]
    key: Option<String>,
    /// Where NODE:10250 is dialled on this node
    #[arg(long, env = "EDGE_TUNNEL_KUBELET", value_name = "ADDR", default_value = "127.0.0.1:10250")]
    kubelet: Option<String>,
    /// What else is let in: HOST:PORT or CIDR:PORT-PORT as dialled on this node; none takes the kubelet out
    #[arg(long, env = "EDGE_TUNNEL_ALLOW", value_name = "TARGET", value_delimiter = ',')]
    allow: Vec<String>,
    /// /metrics, /healthz, /readyz
    #[arg(long, env = "EDGE_TUNNEL_METRICS_LISTEN", value_name = "ADDR", default_value = "127.0.0.1:10268")]
    metrics_listen: Option<String>,
    /// How long open streams may go on after SIGTERM
    #[arg(long, env = "EDGE_TUNNEL_DRAIN", value_name = "TIME", default_value = "30s")]
    drain: Option<String>,
    /// text or json
    #[arg(long, env = "EDGE_TUNNEL_LOG_FORMAT", value_name = "FORMAT", default_value = "text")]
    log_format: Option<String>,
}

/// The configuration as used.
#[derive(Debug, Clone)]
pub struct AgentConfig {
    /// Where to dial, each with the name its certificate must have. Never empty.
    pub servers: Vec<(Target, ServerName<'static>)>,
    /// The CA of the server.
    pub server_ca: PathBuf,
    /// The node's certificate.
    pub pair: KeyPair,
    /// The kubelet.
    pub kubelet: SocketAddr,
    /// `--allow`.
    pub allow: Vec<Allow>,
    /// The HTTP proxy that the environment asks for.
    pub outbound: Outbound,
    /// Metrics and probes.
    pub metrics_listen: SocketAddr,
    /// How long open streams may go on after SIGTERM.
    pub drain: Duration,
    /// The log's form.
    pub log_format: LogFormat,
}

impl AgentArgs {
    /// Turns what was written into what is used. Reads the files that are named; `environment` is asked for
    /// `HTTPS_PROXY` and `NO_PROXY`.
    ///
    /// # Errors
    /// Every mistake there is.
    pub fn check(&self, environment: impl Fn(&str) -> Option<String>) -> Result<AgentConfig, Mistakes> {
        let mut mistakes = Mistakes::default();
        let config = self.checked(environment, &mut mistakes);
        mistakes.none_or(config)
    }

    fn checked(
        &self,
        environment: impl Fn(&str) -> Option<String>,
        mistakes: &mut Mistakes,
    ) -> Option<AgentConfig> {
        if self.server.iter().all(|text| text.trim().is_empty()) {
            mistakes.add("--server is missing");
        }
        let servers: Vec<Target> =
            mistakes.every("--server", &self.server, |text| text.parse().map_err(|why| format!("{why}")));
        let server_ca = mistakes.required("--server-ca", &self.server_ca, path);
        let server_name = mistakes.optional("--server-name", &self.server_name, |text| {
            ServerName::try_from(text.to_owned()).map_err(|_| "neither a name nor an address".into())
        });
        let cert = mistakes.required("--cert", &self.cert, path);
        let key = mistakes.optional("--key", &self.key, path).or_else(|| cert.clone());
        let kubelet = mistakes.required("--kubelet", &self.kubelet, kubelet);
        let allow =
            mistakes.every("--allow", &self.allow, |text| text.parse().map_err(|why| format!("{why}")));
        let metrics_listen = mistakes.required("--metrics-listen", &self.metrics_listen, listen);
        let drain = mistakes.required("--drain", &self.drain, duration);
        let log_format = mistakes.required("--log-format", &self.log_format, |text| {
            text.parse().map_err(|why| format!("write {why}"))
        });
        let outbound = mistakes.take(Outbound::from_environment(environment));
        if given(&self.key).is_some() && given(&self.cert) == Some(KUBELET_CERT) {
            mistakes.add("--key needs --cert: the kubelet's own file holds its key already");
        }
        let pair = mistakes.key_pair(cert, key);
        let readable = server_ca.as_ref().and_then(|ca| mistakes.take(certificates(ca)));
        if let (Some(pair), Some(ca), Some(_)) = (&pair, &server_ca, readable) {
            mistakes.take(tls::client(pair.clone(), ca.clone()));
        }
        let named = |target: Target| {
            let name = match (&server_name, &target.host) {
                (Some(name), _) => name.clone(),
                (None, Host::Address(address)) => ServerName::from(*address),
                (None, Host::Name(name)) => ServerName::try_from(name.to_string()).ok()?,
            };
            Some((target, name))
        };
        Some(AgentConfig {
            servers: servers.into_iter().filter_map(named).collect(),
            server_ca: server_ca?,
            pair: pair?,
            kubelet: kubelet?,
            allow,
            outbound: outbound?,
            metrics_listen: metrics_listen?,
            drain: drain?,
            log_format: log_format?,
        })
    }
}

/// The kubelet's address; without a port it is the usual one.
fn kubelet(text: &str) -> Result<SocketAddr, String> {
    let target = match Host::parse(text.as_bytes()) {
        Ok(host) => Target { host, port: KUBELET_PORT },
        Err(_) => text.parse().map_err(|why| format!("{why}"))?,
    };
    let Host::Address(address) = target.host else {
        return Err("an address is needed, the agent looks no names up".into());
    };
    match never_dialled(address) {
        Some(kind) => Err(format!("{address} is {kind}, which is never dialled")),
        None => Ok(SocketAddr::new(address, target.port)),
    }
}

#[cfg(test)]
mod tests;
