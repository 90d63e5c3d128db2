//! Flags and environment of `edge-tunnel`: what the person wrote, and what the program uses.
//!
//! clap only collects text; [`server::ServerArgs::check`] and [`agent::AgentArgs::check`] turn it into what is used and
//! report every mistake at once. Every flag is also a variable, `EDGE_TUNNEL_` and the flag in capitals with
//! underscores; a flag that may be repeated takes several values with commas.

pub mod agent;
pub mod outbound;
pub mod server;

use crate::{
    commands::{certs::CertsArgs, sessions::SessionsArgs},
    tls::KeyPair,
};
use clap::{Parser, Subcommand};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use std::{
    collections::HashSet,
    fmt,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

/// Remote access to kubelets that nobody can dial, over a connection the node opened.
#[derive(Debug, Parser)]
#[command(name = "edge-tunnel", version)]
pub struct Cli {
    /// What to be.
    #[command(subcommand)]
    pub command: Command,
}

/// What to be.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Where agents and callers meet; in the cloud
    Server(Box<server::ServerArgs>),
    /// Dials the server from the node, and dials the kubelet for it
    Agent(Box<agent::AgentArgs>),
    /// Goes an agent's way step by step: which step fails, and what to do
    Doctor(Box<agent::AgentArgs>),
    /// Shows who is connected
    Sessions(SessionsArgs),
    /// Makes the CAs and certificates of a first installation
    Certs(CertsArgs),
}

/// How the log is written to stderr.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// Lines for people.
    Text,
    /// One JSON object a line.
    Json,
}

impl FromStr for LogFormat {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err("text or json"),
        }
    }
}

/// Everything that is wrong with a configuration, a line each.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Mistakes(Vec<String>);

impl Mistakes {
    /// Notes one; the same one twice is one.
    pub fn add(&mut self, mistake: impl fmt::Display) {
        let mistake = mistake.to_string();
        if !self.0.contains(&mistake) {
            self.0.push(mistake);
        }
    }

    /// The value, or a note of what is wrong with it.
    pub fn take<T, E: fmt::Display>(&mut self, result: Result<T, E>) -> Option<T> {
        result.map_err(|error| self.add(error)).ok()
    }

    /// The value if nothing has been noted.
    ///
    /// # Errors
    /// What has been noted.
    pub fn none_or<T>(self, value: Option<T>) -> Result<T, Self> {
        match value {
            Some(value) if self.0.is_empty() => Ok(value),
            _ => Err(self),
        }
    }

    /// Reads one flag's text.
    fn read<T>(&mut self, flag: &str, text: &str, read: impl FnOnce(&str) -> Result<T, String>) -> Option<T> {
        self.take(read(text).map_err(|why| format!("{flag} {text:?}: {why}")))
    }

    /// Reads a flag that may be missing.
    fn optional<T>(
        &mut self,
        flag: &str,
        text: &Option<String>,
        read: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        given(text).and_then(|text| self.read(flag, text, read))
    }

    /// Reads a flag that must not be missing.
    fn required<T>(
        &mut self,
        flag: &str,
        text: &Option<String>,
        read: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<T> {
        if given(text).is_none() {
            self.add(format_args!("{flag} is missing"));
        }
        self.optional(flag, text, read)
    }

    /// Reads a certificate and its key, each for itself so that both are reported.
    fn key_pair(&mut self, cert: Option<PathBuf>, key: Option<PathBuf>) -> Option<KeyPair> {
        let chain = cert.as_ref().and_then(|path| self.take(certificates(path)));
        let private = key.as_ref().and_then(|path| self.take(private_key(path)));
        chain.and(private)?;
        Some(KeyPair { cert: cert?, key: key? })
    }

    /// Reads every value of a flag that may be repeated.
    fn every<T>(&mut self, flag: &str, texts: &[String], read: impl Fn(&str) -> Result<T, String>) -> Vec<T> {
        let texts = texts.iter().map(|text| text.trim()).filter(|text| !text.is_empty());
        texts.filter_map(|text| self.read(flag, text, &read)).collect()
    }
}

impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("\n"))
    }
}

impl std::error::Error for Mistakes {}

/// A flag's text; an empty one, as an unset variable in a manifest leaves it, is none.
fn given(text: &Option<String>) -> Option<&str> {
    text.as_deref().map(str::trim).filter(|text| !text.is_empty())
}

/// An address to listen on: `ADDRESS:PORT`, or `:PORT` for every address.
fn listen(text: &str) -> Result<SocketAddr, String> {
    if let Some(port) = text.strip_prefix(':') {
        let port = port.parse().map_err(|_| format!("{port:?} is no port"))?;
        return Ok(SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port));
    }
    text.parse().map_err(|_| "no address; write ADDRESS:PORT, or :PORT for every address".into())
}

/// A duration: a number with a unit, or several: `10s`, `500ms`, `1m30s`, `2h`.
fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || "no duration; write 10s, 500ms or 1m30s".to_owned();
    let mut sum = Duration::ZERO;
    let mut rest = text;
    if rest.is_empty() {
        return Err(wrong());
    }
    while !rest.is_empty() {
        let digits = rest.find(|letter: char| !letter.is_ascii_digit()).ok_or_else(wrong)?;
        let number: u64 = rest[..digits].parse().map_err(|_| wrong())?;
        rest = &rest[digits..];
        let unit = rest.find(|letter: char| letter.is_ascii_digit()).unwrap_or(rest.len());
        let one = match &rest[..unit] {
            "ms" => Duration::from_millis(1),
            "s" => Duration::from_secs(1),
            "m" => Duration::from_secs(60),
            "h" => Duration::from_secs(3600),
            _ => return Err(wrong()),
        };
        rest = &rest[unit..];
        let factor = u32::try_from(number).map_err(|_| wrong())?;
        sum = one.checked_mul(factor).and_then(|more| sum.checked_add(more)).ok_or_else(wrong)?;
    }
    if sum > Duration::from_secs(24 * 3600) { Err("longer than a day".into()) } else { Ok(sum) }
}

/// A duration that bounds a wait, so not zero.
fn wait(text: &str) -> Result<Duration, String> {
    match duration(text)? {
        Duration::ZERO => Err("a wait of nothing lets nothing through".into()),
        wait => Ok(wait),
    }
}

/// A cap: at least one.
fn cap(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(cap) if cap > 0 => Ok(cap),
        _ => Err("no number from 1 upwards".into()),
    }
}

/// The certificates in a PEM file, at least one.
fn certificates(path: &Path) -> Result<HashSet<Vec<u8>>, String> {
    let wrong = |why: &dyn fmt::Display| format!("{}: {why}", path.display());
    let pem = std::fs::read(path).map_err(|error| wrong(&error))?;
    let found: Result<HashSet<_>, _> =
        CertificateDer::pem_slice_iter(&pem).map(|cert| cert.map(|cert| cert.to_vec())).collect();
    match found {
        Ok(found) if found.is_empty() => Err(wrong(&"no certificate in it")),
        found => found.map_err(|error| wrong(&error)),
    }
}

/// Whether there is a private key in a PEM file. The key is forgotten again.
fn private_key(path: &Path) -> Result<(), String> {
    let wrong = |why: &dyn fmt::Display| format!("{}: {why}", path.display());
    let pem = std::fs::read(path).map_err(|error| wrong(&error))?;
    let key = PrivateKeyDer::from_pem_slice(&pem);
    key.map(drop).map_err(|error| wrong(&format_args!("no private key in it: {error}")))
}

fn path(text: &str) -> Result<PathBuf, String> {
    Ok(text.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;
    use proptest::prelude::*;

    #[test]
    fn every_flag_has_its_variable() {
        Cli::command().debug_assert();
        for command in Cli::command().get_subcommands() {
            let mut flags = 0;
            for flag in command.get_arguments().filter(|flag| flag.get_id() != "help") {
                let long = flag.get_long().unwrap();
                let variable = format!("EDGE_TUNNEL_{}", long.to_uppercase().replace('-', "_"));
                assert_eq!(flag.get_env().unwrap().to_str(), Some(variable.as_str()), "{long}");
                assert!(flag.get_help().is_some(), "{long}");
                flags += 1;
            }
            let least = if ["sessions", "certs"].contains(&command.get_name()) { 2 } else { 10 };
            assert!(flags >= least, "{}", command.get_name());
        }
    }

    #[test]
    fn durations() {
        for (text, millis) in
            [("10s", 10_000), ("500ms", 500), ("1m30s", 90_000), ("2h", 7_200_000), ("0s", 0)]
        {
            assert_eq!(duration(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for text in
            ["", "10", "s", "10 s", "-1s", "1.5s", "10x", "1d", "25h", "99999999999999999999s", "10sm", "5s5"]
        {
            assert!(duration(text).is_err(), "{text}");
        }
        assert!(wait("0s").is_err());
    }

    #[test]
    fn addresses_to_listen_on() {
        for (text, meant) in [(":8443", "[::]:8443"), ("10.0.0.1:1", "10.0.0.1:1"), ("[::1]:2", "[::1]:2")] {
            assert_eq!(listen(text), Ok(meant.parse().unwrap()), "{text}");
        }
        for text in ["8443", "localhost:8443", "10.0.0.1", ":", ":70000", "::1:80"] {
            assert!(listen(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_a_duration_or_not(text in "[0-9a-z. -]{0,12}") {
            let _ = duration(&text);
        }
    }
}
