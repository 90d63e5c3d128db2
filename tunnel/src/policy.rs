//! The agent's last word: which addresses and ports may be dialled on this node. Pure.
//!
//! Whoever holds the server can ask an agent for anything, so the agent believes nothing: it dials its kubelet, what
//! `--allow` names, and nothing else; link-local (cloud metadata), multicast and unspecified addresses not even then.
//! A rule is matched against the address that is dialled, never against a name that something else resolves.

use crate::{
    network::{Network, NotANetwork, never_dialled},
    refusal::{Reason, Refusal},
    target::{Host, Name, Target, parse_port},
};
use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    ops::RangeInclusive,
    str::FromStr,
};

/// The port that means the kubelet, wherever `--kubelet` says that it listens.
pub const KUBELET_PORT: u16 = 10250;

/// One `--allow`, as written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Allow {
    /// `none`: the kubelet is not let in by default.
    None,
    /// `HOST:PORT`, `CIDR:PORT` or either with `PORT-PORT`.
    Rule(Rule),
}

/// Hosts and ports that are let in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    hosts: Hosts,
    ports: RangeInclusive<u16>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Hosts {
    /// Addresses as they are dialled.
    In(Network),
    /// `localhost`: the loopback address of either family.
    Loopback,
    /// A node by its name: lets in on that node, under whatever address `--kubelet` has.
    Node(Name),
}

impl FromStr for Allow {
    type Err = NotARule;

    fn from_str(text: &str) -> Result<Self, NotARule> {
        if text == "none" {
            return Ok(Self::None);
        }
        let (host, ports) = text.rsplit_once(':').ok_or(NotARule::Shape)?;
        let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
        let port = |text: &str| parse_port(text.as_bytes()).ok_or(NotARule::Ports);
        let ports = port(first)?..=port(last)?;
        if ports.is_empty() {
            return Err(NotARule::Ports);
        }
        let hosts = if let Some((address, prefix)) = host.split_once('/') {
            let address =
                address.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(address);
            Hosts::In(format!("{address}/{prefix}").parse().map_err(|NotANetwork| NotARule::Network)?)
        } else if host.contains(':') && !host.starts_with('[') {
            // "fd00::5:80" may be either; the person must say which.
            return Err(NotARule::Shape);
        } else {
            match Host::parse(host.as_bytes()).map_err(|_| NotARule::Shape)? {
                Host::Address(address) => Hosts::In(Network::one(address)),
                Host::Name(name) if name.as_str() == "localhost" => Hosts::Loopback,
                Host::Name(name) => Hosts::Node(name),
            }
        };
        Ok(Self::Rule(Rule { hosts, ports }))
    }
}

/// Why a text is no `--allow`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotARule {
    /// Neither host nor network with a port.
    Shape,
    /// The network is none.
    Network,
    /// The ports are none.
    Ports,
}

impl fmt::Display for NotARule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Shape => "write HOST:PORT, CIDR:PORT-PORT or none (IPv6 in brackets: [ADDRESS]:PORT)",
            Self::Network => "what stands before the last colon is no network such as 10.244.0.0/16",
            Self::Ports => "what stands after the last colon is no port such as 9100 or 1-65535",
        })
    }
}

impl std::error::Error for NotARule {}

/// Everything an agent needs to judge what the server asks for.
#[derive(Debug, Clone)]
pub struct Policy {
    kubelet: SocketAddr,
    rules: Vec<Rule>,
}

impl Policy {
    /// The rules as they are used: the kubelet unless `none` was said, and what was allowed beside it.
    pub fn new(kubelet: SocketAddr, allowed: &[Allow]) -> Self {
        let kubelet = SocketAddr::new(kubelet.ip().to_canonical(), kubelet.port());
        let default =
            Rule { hosts: Hosts::In(Network::one(kubelet.ip())), ports: kubelet.port()..=kubelet.port() };
        let mut rules = Vec::new();
        if !allowed.contains(&Allow::None) {
            rules.push(default);
        }
        rules.extend(allowed.iter().filter_map(|allow| match allow {
            Allow::None => None,
            Allow::Rule(rule) => Some(rule.clone()),
        }));
        Self { kubelet, rules }
    }

    /// Where to dial for what the server asks, on the node called `own`.
    ///
    /// A node's own name means the kubelet's host, and its port 10250 the kubelet itself; an address means itself.
    /// Any other name is refused: the server resolves names, the agent never does.
    ///
    /// # Errors
    /// A `denied-by-agent` refusal that says what was not let in.
    pub fn judge(&self, own: &Name, asked: &Target) -> Result<SocketAddr, Refusal> {
        let denied = |why: &dyn fmt::Display| Err(Refusal::new(Reason::DeniedByAgent, why));
        let (dialled, by_name) = match &asked.host {
            Host::Name(name) if name == own && asked.port == KUBELET_PORT => (self.kubelet, true),
            Host::Name(name) if name == own => (SocketAddr::new(self.kubelet.ip(), asked.port), true),
            Host::Name(name) => {
                return denied(&format_args!("{name} is not this node, {own}"));
            }
            Host::Address(address) => (SocketAddr::new(address.to_canonical(), asked.port), false),
        };
        if let Some(kind) = never_dialled(dialled.ip()) {
            return denied(&format_args!("{} is {kind}, which is never dialled", dialled.ip()));
        }
        let lets_in = |rule: &Rule| {
            rule.ports.contains(&dialled.port())
                && match &rule.hosts {
                    Hosts::In(network) => network.contains(dialled.ip()),
                    Hosts::Loopback => [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()]
                        .contains(&dialled.ip()),
                    Hosts::Node(name) => by_name && name == own,
                }
        };
        if self.rules.iter().any(lets_in) {
            Ok(dialled)
        } else {
            denied(&format_args!("the agent on {own} does not let {dialled} in; see its --allow"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn policy(kubelet: &str, allowed: &[&str]) -> Policy {
        let allowed: Vec<Allow> = allowed.iter().map(|text| text.parse().unwrap()).collect();
        Policy::new(kubelet.parse().unwrap(), &allowed)
    }

    /// What is dialled, or the sentence why not.
    fn judge(policy: &Policy, asked: &str) -> Result<String, String> {
        let own = "node1".parse().unwrap();
        match policy.judge(&own, &asked.parse().unwrap()) {
            Ok(address) => Ok(address.to_string()),
            Err(refusal) => {
                assert_eq!(refusal.reason, Reason::DeniedByAgent);
                Err(refusal.sentence().to_owned())
            }
        }
    }

    #[test]
    fn by_default_only_the_kubelet() {
        let policy = policy("127.0.0.1:10250", &[]);
        assert_eq!(judge(&policy, "node1:10250").as_deref(), Ok("127.0.0.1:10250"));
        assert_eq!(judge(&policy, "NODE1:10250").as_deref(), Ok("127.0.0.1:10250"));
        assert_eq!(judge(&policy, "127.0.0.1:10250").as_deref(), Ok("127.0.0.1:10250"));
        // What a hostile server would like.
        for asked in [
            "node1:22",
            "127.0.0.1:22",
            "[::1]:10250",
            "node2:10250",
            "localhost:10250",
            "169.254.169.254:80",
            "[::ffff:169.254.169.254]:80",
            "0.0.0.0:10250",
            "10.0.0.1:10250",
        ] {
            assert!(judge(&policy, asked).is_err(), "{asked}");
        }
    }

    #[test]
    fn the_kubelet_may_be_elsewhere() {
        let moved = policy("10.0.0.5:20250", &[]);
        assert_eq!(judge(&moved, "node1:10250").as_deref(), Ok("10.0.0.5:20250"));
        assert_eq!(judge(&moved, "node1:20250").as_deref(), Ok("10.0.0.5:20250"));
        assert!(judge(&moved, "10.0.0.5:10250").is_err());
        let v6 = policy("[::1]:10250", &["[::1]:9100"]);
        assert_eq!(judge(&v6, "node1:9100").as_deref(), Ok("[::1]:9100"));
        let mapped = policy("[::ffff:127.0.0.1]:10250", &["[::ffff:127.0.0.1]:9100"]);
        assert_eq!(judge(&mapped, "node1:10250").as_deref(), Ok("127.0.0.1:10250"));
        assert_eq!(judge(&mapped, "node1:9100").as_deref(), Ok("127.0.0.1:9100"));
    }

    #[test]
    fn rules_add_to_the_default_and_none_removes_it() {
        let more = policy("127.0.0.1:10250", &["127.0.0.1:9100", "10.244.1.0/24:80-90", "[fd00::]/64:443"]);
        for (asked, lets_in) in [
            ("node1:10250", true),
            ("node1:9100", true),
            ("node1:9101", false),
            ("10.244.1.7:80", true),
            ("10.244.1.7:90", true),
            ("10.244.1.7:91", false),
            ("10.244.2.7:80", false),
            ("[::ffff:10.244.1.7]:85", true),
            ("[fd00::7]:443", true),
            ("[fd00:0:0:1::7]:443", false),
        ] {
            assert_eq!(judge(&more, asked).is_ok(), lets_in, "{asked}");
        }
        let none = policy("127.0.0.1:10250", &["none", "node1:9100"]);
        assert!(judge(&none, "node1:10250").is_err());
        assert!(judge(&none, "node1:9100").is_ok());
        assert!(judge(&none, "127.0.0.1:9100").is_err(), "only by name was it allowed");
        let local = policy("[::1]:10250", &["localhost:9100"]);
        assert!(judge(&local, "127.0.0.1:9100").is_ok() && judge(&local, "node1:9100").is_ok());
    }

    #[test]
    fn some_addresses_are_refused_whatever_is_allowed() {
        let all = policy("127.0.0.1:10250", &["0.0.0.0/0:1-65535", "::/0:1-65535", "169.254.169.254:80"]);
        assert!(judge(&all, "8.8.8.8:53").is_ok() && judge(&all, "[2001:db8::1]:53").is_ok());
        for asked in
            ["169.254.169.254:80", "[fe80::1]:80", "224.0.0.1:80", "0.0.0.0:80", "[::]:80", "[ff02::1]:80"]
        {
            let why = judge(&all, asked).unwrap_err();
            assert!(why.contains("never dialled"), "{asked}: {why}");
        }
    }

    #[test]
    fn what_is_no_rule() {
        for text in [
            "",
            "None",
            "node1",
            "node1:",
            "node1:0",
            "node1:9-8",
            "fd00::5:80",
            "10.0.0.0/33:80",
            "a/8:80",
            "node1:80-",
            "node1:-80",
            "no_de:80",
            ":80",
            "10.0.0.0/8",
            "*:80",
        ] {
            assert!(text.parse::<Allow>().is_err(), "{text:?} is {:?}", text.parse::<Allow>());
        }
    }

    proptest! {
        /// Nothing but the kubelet's address is ever dialled by default, and no forbidden one with everything allowed.
        #[test]
        fn the_last_word(address in any::<IpAddr>(), port in 1u16.., all in any::<bool>()) {
            let policy = if all { policy("127.0.0.1:10250", &["0.0.0.0/0:1-65535", "::/0:1-65535"]) }
                         else { policy("127.0.0.1:10250", &[]) };
            let asked = Target::from(SocketAddr::new(address, port));
            match policy.judge(&"node1".parse().unwrap(), &asked) {
                Ok(dialled) => {
                    prop_assert_eq!(Target::from(dialled), asked);
                    prop_assert!(never_dialled(dialled.ip()).is_none());
                    prop_assert!(all || dialled == "127.0.0.1:10250".parse().unwrap());
                }
                Err(refusal) => prop_assert!(!all || never_dialled(address).is_some(), "{refusal}"),
            }
        }
    }
}
