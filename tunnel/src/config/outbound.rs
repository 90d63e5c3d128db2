//! `HTTPS_PROXY` and `NO_PROXY`: whether the agent dials the server through an HTTP proxy, and what it says to it. Pure.
//!
//! The rules are Go's (golang.org/x/net/http/httpproxy), which the kubelet beside us follows: small letters before
//! capitals, loopback never, `NO_PROXY` a list of `*`, addresses, networks, and names that cover what ends in them.

use crate::{
    network::Network,
    target::{Host, Target},
};
use base64::{Engine, prelude::BASE64_STANDARD};
use std::fmt;

/// The largest answer of a proxy, bytes.
pub const ANSWER_LIMIT: usize = 16 * 1024;

/// What the environment says about proxies.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Outbound {
    proxy: Option<Proxy>,
    direct: Vec<Direct>,
}

/// An HTTP proxy that understands CONNECT.
#[derive(Clone, PartialEq, Eq)]
pub struct Proxy {
    /// Where it is.
    pub address: Target,
    /// The value of `Proxy-Authorization`.
    authorization: Option<String>,
}

/// Without the password.
impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let user = if self.authorization.is_some() { "user@" } else { "" };
        write!(f, "{user}{}", self.address)
    }
}

/// An entry of `NO_PROXY`.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Direct {
    All,
    In(Network),
    /// A name and all that ends in it, or (`.example`) only the latter; with a port, only that.
    Name {
        suffix: String,
        itself: bool,
        port: Option<u16>,
    },
    Address(Target),
}

impl Outbound {
    /// Reads `https_proxy` or `HTTPS_PROXY`, and `no_proxy` or `NO_PROXY`.
    ///
    /// # Errors
    /// When the proxy cannot be understood; its password is not repeated.
    pub fn from_environment(environment: impl Fn(&str) -> Option<String>) -> Result<Self, String> {
        let read = |small: &str, capital: &str| {
            let value = environment(small).filter(|value| !value.is_empty());
            value.or_else(|| environment(capital)).unwrap_or_default()
        };
        let written = read("https_proxy", "HTTPS_PROXY");
        let proxy = match written.trim() {
            "" => None,
            text => Some(Proxy::parse(text).map_err(|why| format!("HTTPS_PROXY: {why}"))?),
        };
        let direct = read("no_proxy", "NO_PROXY").split(',').filter_map(Direct::parse).collect();
        Ok(Self { proxy, direct })
    }

    /// The proxy to dial instead of this target, if it is to be one.
    pub fn proxy_for(&self, target: &Target) -> Option<&Proxy> {
        let loopback = match &target.host {
            Host::Address(address) => address.is_loopback(),
            Host::Name(name) => name.as_str() == "localhost",
        };
        let direct = loopback || self.direct.iter().any(|entry| entry.covers(target));
        self.proxy.as_ref().filter(|_| !direct)
    }
}

impl Proxy {
    fn parse(text: &str) -> Result<Self, String> {
        let rest = match text.split_once("://") {
            None => text,
            Some(("http", rest)) => rest,
            Some((scheme, _)) => return Err(format!("a proxy is spoken to in http://, not in {scheme}://")),
        };
        let rest = rest.split(['/', '?', '#']).next().unwrap_or_default();
        let (user, host) = match rest.rsplit_once('@') {
            Some((user, host)) => (Some(user), host),
            None => (None, rest),
        };
        let address = match Target::parse(host.as_bytes()) {
            Err(crate::target::NotATarget::NoPort) => {
                Target { host: Host::parse(host.as_bytes()).map_err(|why| why.to_string())?, port: 80 }
            }
            parsed => parsed.map_err(|why| why.to_string())?,
        };
        let authorization = user.map(|user| {
            let (name, password) = user.split_once(':').unwrap_or((user, ""));
            let pair = [&unescape(name)[..], b":", &unescape(password)].concat();
            format!("Basic {}", BASE64_STANDARD.encode(pair))
        });
        Ok(Self { address, authorization })
    }

    /// What to send to the proxy for a connection to `target`.
    pub fn request(&self, target: &Target) -> Vec<u8> {
        let authorization = match &self.authorization {
            Some(value) => format!("Proxy-Authorization: {value}\r\n"),
            None => String::new(),
        };
        format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n{authorization}\r\n").into_bytes()
    }
}

/// What the proxy has said so far: `None` to read on, the length of its head once the way is open.
///
/// # Errors
/// A sentence, when it said no or something that is not HTTP.
pub fn answered(bytes: &[u8]) -> Result<Option<usize>, String> {
    let mut headers = [httparse::EMPTY_HEADER; 64];
    let mut response = httparse::Response::new(&mut headers);
    match response.parse(bytes) {
        Ok(httparse::Status::Partial) if bytes.len() < ANSWER_LIMIT => Ok(None),
        Ok(httparse::Status::Partial) => Err("the proxy's answer does not end".into()),
        Err(_) => Err("what answers at the proxy's address speaks no HTTP".into()),
        Ok(httparse::Status::Complete(length)) => match response.code.unwrap_or_default() {
            200..300 => Ok(Some(length)),
            407 => Err("the proxy wants another user or password (407); see HTTPS_PROXY".into()),
            code => {
                let phrase = crate::audit::Escaped::new(response.reason.unwrap_or_default().as_bytes());
                Err(format!("the proxy answers {code} {phrase}"))
            }
        },
    }
}

impl Direct {
    fn parse(text: &str) -> Option<Self> {
        let text = text.trim().to_ascii_lowercase();
        if text.is_empty() {
            return None;
        }
        if text == "*" {
            return Some(Self::All);
        }
        if let Ok(network) = text.parse() {
            return Some(Self::In(network));
        }
        if let Ok(target @ Target { host: Host::Address(_), .. }) = text.parse::<Target>() {
            return Some(Self::Address(target));
        }
        let (name, port) = match text.rsplit_once(':') {
            Some((name, port)) => (name, Some(port.parse().ok()?)),
            None => (text.as_str(), None),
        };
        let name = name.strip_prefix('*').unwrap_or(name);
        let suffix = name.trim_start_matches('.').trim_end_matches('.');
        let itself = !name.starts_with('.');
        (!suffix.is_empty()).then(|| Self::Name { suffix: suffix.to_owned(), itself, port })
    }

    fn covers(&self, target: &Target) -> bool {
        match (self, &target.host) {
            (Self::All, _) => true,
            (Self::In(network), Host::Address(address)) => network.contains(*address),
            (Self::Address(other), _) => other == target,
            (Self::Name { suffix, itself, port }, Host::Name(name)) => {
                port.is_none_or(|port| port == target.port)
                    && match name.as_str().strip_suffix(suffix.as_str()) {
                        Some("") => *itself,
                        Some(before) => before.ends_with('.'),
                        None => false,
                    }
            }
            _ => false,
        }
    }
}

/// `%2F` and the like in a user or password.
fn unescape(text: &str) -> Vec<u8> {
    let bytes = text.as_bytes();
    let mut plain = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        let digits = bytes.get(at + 1..at + 3).and_then(|digits| str::from_utf8(digits).ok());
        let escaped =
            digits.filter(|digits| byte == b'%' && digits.bytes().all(|digit| digit.is_ascii_hexdigit()));
        match escaped.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(value) => {
                plain.push(value);
                at += 3;
            }
            None => {
                plain.push(byte);
                at += 1;
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn outbound(proxy: &str, no_proxy: &str) -> Result<Outbound, String> {
        Outbound::from_environment(|name| match name {
            "HTTPS_PROXY" => Some(proxy.to_owned()),
            "no_proxy" => Some(no_proxy.to_owned()),
            _ => None,
        })
    }

    #[test]
    fn what_is_said_to_the_proxy() {
        let table = [
            ("http://proxy:3128", "proxy:3128", None),
            ("proxy:3128", "proxy:3128", None),
            ("http://10.0.0.1", "10.0.0.1:80", None),
            ("http://[fd00::1]:8080/", "[fd00::1]:8080", None),
            ("http://ann:p%40ss%3A@proxy:1", "proxy:1", Some("Basic YW5uOnBAc3M6")),
            ("http://ann@proxy:1", "proxy:1", Some("Basic YW5uOg==")),
        ];
        let target = "tunnel.example:443".parse().unwrap();
        for (written, address, authorization) in table {
            let outbound = outbound(written, "").unwrap();
            let proxy = outbound.proxy_for(&target).unwrap();
            assert_eq!(proxy.address.to_string(), address, "{written}");
            let line =
                authorization.map(|value| format!("Proxy-Authorization: {value}\r\n")).unwrap_or_default();
            let request =
                format!("CONNECT tunnel.example:443 HTTP/1.1\r\nHost: tunnel.example:443\r\n{line}\r\n");
            assert_eq!(String::from_utf8(proxy.request(&target)).unwrap(), request, "{written}");
        }
        assert_eq!(outbound("", ""), Ok(Outbound::default()));
        for wrong in ["https://proxy:1", "socks5://proxy:1", "http://secret:word@no_host:1", "http://proxy:0"]
        {
            let why = outbound(wrong, "").unwrap_err();
            assert!(!why.contains("word"), "{why}");
        }
        let shown = format!("{:?}", outbound("http://ann:word@proxy:1", ""));
        assert!(!shown.contains("word") && !shown.contains("Basic"), "{shown}");
    }

    #[test]
    fn who_is_dialled_without_it() {
        let no_proxy =
            "10.0.0.0/8, 192.0.2.7, 192.0.2.8:443,.only.sub,example.com,named:8443,,*.star.org,[fd00::9]:443";
        let outbound = outbound("proxy:1", no_proxy).unwrap();
        for (target, proxied) in [
            ("tunnel.example:443", true),
            ("10.1.2.3:443", false),
            ("11.1.2.3:443", true),
            ("192.0.2.7:443", false),
            ("192.0.2.8:443", false),
            ("192.0.2.8:444", true),
            ("a.only.sub:443", false),
            ("only.sub:443", true),
            ("EXAMPLE.com.:443", false),
            ("a.b.example.com:443", false),
            ("notexample.com:443", true),
            ("named:8443", false),
            ("named:443", true),
            ("a.star.org:1", false),
            ("[fd00::9]:443", false),
            ("localhost:443", false),
            ("127.0.0.1:443", false),
            ("[::1]:443", false),
        ] {
            assert_eq!(outbound.proxy_for(&target.parse().unwrap()).is_some(), proxied, "{target}");
        }
        let all = self::outbound("proxy:1", "*").unwrap();
        assert_eq!(all.proxy_for(&"tunnel.example:443".parse().unwrap()), None);
    }

    #[test]
    fn what_the_proxy_answers() {
        assert_eq!(answered(b"HTTP/1.1 200 Conn"), Ok(None));
        assert_eq!(answered(b"HTTP/1.1 200 OK\r\nVia: x\r\n\r\n\x16\x03"), Ok(Some(27)));
        assert!(answered(b"HTTP/1.1 407 Auth\r\n\r\n").unwrap_err().contains("407"));
        assert!(answered(b"HTTP/1.1 502 Bad Gateway\r\n\r\n").unwrap_err().contains("502 Bad Gateway"));
        assert!(answered(b"SSH-2.0-OpenSSH\r\n").is_err());
        assert!(answered(&[b"HTTP/1.1 200 OK\r\nA: ", &[b'a'; ANSWER_LIMIT][..]].concat()).is_err());
    }

    proptest! {
        #[test]
        fn no_environment_and_no_answer_is_too_much(text in ".{0,40}", bytes in any::<Vec<u8>>()) {
            let _ = outbound(&text, &text);
            let _ = answered(&bytes);
        }
    }
}
