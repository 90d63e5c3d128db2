//! `edge-tunnel doctor`: the way of an agent, step by step, with the agent's own flags and code: which step fails, and
//! what to do. It opens a probe that is never registered, so it may run beside the agent.

use crate::{
    agent::connect::{Connected, Failure, connect},
    config::agent::AgentConfig,
    dial,
    hello::{Hello, Id, Role, TurnedAway},
    target::Target,
    tls::{self, ClientTls},
};
use std::{
    fmt::Write,
    time::{Duration, Instant},
};
use tokio::time::timeout;

/// The steps to a server, in their order, as [`connect`] names them; the last one is the server's answer.
const STEPS: [&str; 6] = ["resolve", "connect", "proxy", "TLS", "certificate", "session"];

/// How long the kubelet may take to accept.
const KUBELET: Duration = Duration::from_secs(5);

/// Goes the way; gives what to print, and whether all of it was passable.
///
/// # Errors
/// When the files cannot be read, which the agent would say too.
pub async fn run(config: &AgentConfig) -> Result<(String, bool), String> {
    let tls = tls::client(config.pair.clone(), config.server_ca.clone())?;
    let leaf = tls.get().leaf.clone();
    let name = leaf.node().map_err(|why| format!("{}: {why}", config.pair.cert.display()))?;
    let until = jiff::Timestamp::from_second(leaf.not_after).map_err(|error| error.to_string())?;
    let ours = format!("node {name}, until {until}");
    let mut text = String::new();
    let mut all = true;
    for server in &config.servers {
        let via = config.outbound.proxy_for(&server.0);
        let start = Instant::now();
        let outcome = probe(config, server, &tls).await;
        let took = start.elapsed().as_millis();
        let said = match &outcome {
            Ok(connected) => Ok(format!("replica {} welcomes us, after {took} ms", connected.replica)),
            Err(failure) => Err(failure),
        };
        let way = Way { server: &server.0, proxy: via.map(|proxy| proxy.address.clone()), ours: &ours };
        let lines = way.told(&said);
        all &= said.is_ok();
        text.push_str(&lines);
    }
    let kubelet = config.kubelet;
    let dialled = match timeout(KUBELET, dial::first(&[kubelet])).await {
        Ok(dialled) => dialled.map(drop).map_err(|error| error.to_string()),
        Err(_) => Err(format!("no answer within {} s", KUBELET.as_secs())),
    };
    all &= dialled.is_ok();
    text.push_str(&match dialled {
        Ok(()) => line("kubelet", "ok", &format!("{kubelet} accepts")),
        Err(why) => line(
            "kubelet",
            "FAILS",
            &format!("{kubelet}: {why}; is the kubelet running, and is --kubelet where it listens?"),
        ),
    });
    Ok((text, all))
}

async fn probe(
    config: &AgentConfig,
    server: &(Target, rustls::pki_types::ServerName<'static>),
    tls: &ClientTls,
) -> Result<Connected, Failure> {
    let mut random = fastrand::Rng::new();
    let (instance, session) = (Id::random(&mut random), Id::random(&mut random));
    connect(config, server, tls, &Hello { instance, session, role: Role::Probe }).await
}

/// The way to one server.
struct Way<'a> {
    server: &'a Target,
    proxy: Option<Target>,
    ours: &'a str,
}

impl Way<'_> {
    /// A line for each step: passed, failed, or not reached.
    fn told(&self, outcome: &Result<String, &Failure>) -> String {
        let (failed, why) = match outcome {
            Ok(_) => (STEPS.len(), String::new()),
            Err(Failure::Step(step, why)) => {
                let at = STEPS.iter().position(|known| known == step).unwrap_or(0);
                (at, format!("{why}\n{:17}{}", "", remedy(step, self.proxy.is_some())))
            }
            Err(failure @ Failure::TurnedAway(reason, _)) => {
                (STEPS.len() - 1, format!("{failure}\n{:17}{}", "", turned_away(*reason)))
            }
        };
        let mut text = String::new();
        for (at, step) in STEPS.iter().enumerate() {
            let passed = match (*step, outcome) {
                ("resolve" | "connect", _) => self.proxy.as_ref().unwrap_or(self.server).to_string(),
                ("proxy", _) => match &self.proxy {
                    Some(_) => format!("lets us through to {}", self.server),
                    None => "none (HTTPS_PROXY, NO_PROXY)".into(),
                },
                ("certificate", _) => self.ours.to_owned(),
                ("session", Ok(said)) => said.clone(),
                _ => format!("{} is who it should be", self.server),
            };
            let name = if *step == "TLS" { "tls" } else { step };
            text.push_str(&match at.cmp(&failed) {
                std::cmp::Ordering::Less => line(name, "ok", &passed),
                std::cmp::Ordering::Equal => line(name, "FAILS", &why),
                std::cmp::Ordering::Greater => line(name, "-", "not reached"),
            });
        }
        text
    }
}

fn line(step: &str, how: &str, what: &str) -> String {
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = writeln!(text, "{step:11} {how:5} {what}");
    text
}

/// What to do when a step fails.
fn remedy(step: &str, proxied: bool) -> &'static str {
    match step {
        "resolve" => "Does --server name it right? Which resolver has this machine (/etc/resolv.conf)?",
        "connect" if proxied => "Is the proxy of HTTPS_PROXY there, and may this machine reach it?",
        "connect" => {
            "Is the server up, and does a firewall let this machine out to that port? Is HTTPS_PROXY needed?"
        }
        "proxy" => {
            "Must the proxy allow CONNECT to that host and port? User and password are part of HTTPS_PROXY."
        }
        "TLS" => {
            "Is --server-ca the CA of the server, --server-name a name in its certificate, the clock right, and does the \
             load balancer pass TCP through?"
        }
        _ => {
            "Does the server's --agent-ca have the CA of this certificate, is it still valid, and is the clock right?"
        }
    }
}

/// What to do when the server does not want us.
fn turned_away(why: TurnedAway) -> &'static str {
    match why {
        TurnedAway::UnknownNode => "Is there a Node of that name, or a line in the server's --nodes-file?",
        TurnedAway::Version | TurnedAway::Malformed => "Are server and agent of one release?",
        _ => "Try again; the server's log says more.",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_passed_what_fails_and_what_is_not_reached() {
        let server: Target = "tunnel.example:443".parse().unwrap();
        let way = Way { server: &server, proxy: None, ours: "node node1, until then" };
        let columns = |text: &str| -> String {
            text.lines().filter(|line| !line.starts_with(' ')).map(|line| line[12..13].to_owned()).collect()
        };
        for (at, step) in STEPS.iter().enumerate().take(5) {
            let failure = Failure::Step(step, "why".into());
            let text = way.told(&Err(&failure));
            let expected = "o".repeat(at) + "F" + &"-".repeat(5 - at);
            assert_eq!(columns(&text), expected, "{text}");
            assert!(text.contains("why\n                 ") && text.contains('?'), "{text}");
        }
        let failure = Failure::TurnedAway(TurnedAway::UnknownNode, "no node1".into());
        let text = way.told(&Err(&failure));
        assert_eq!(columns(&text), "oooooF", "{text}");
        assert!(text.contains("no node1") && text.contains("--nodes-file"), "{text}");
        let text = way.told(&Ok("replica a welcomes us".into()));
        assert_eq!(columns(&text), "oooooo", "{text}");
        assert!(text.contains("certificate ok    node node1, until then\n"), "{text}");
        let proxied = Way { proxy: Some("proxy:3128".parse().unwrap()), ..way };
        let text = proxied.told(&Ok("replica a welcomes us".into()));
        assert!(
            text.contains("connect     ok    proxy:3128\n")
                && text.contains("lets us through to tunnel.example"),
            "{text}"
        );
    }
}
