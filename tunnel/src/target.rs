//! What a caller asks for: the authority of a CONNECT, checked once and then carried as a type.
//!
//! Equal spellings are equal targets: names are lower case without a trailing dot, `::ffff:10.0.0.5` is `10.0.0.5`, an
//! IPv6 address is its number. Hostile bytes are judged where they lie; memory is reserved only for a good name.

use crate::refusal::{Reason, Refusal};
use std::{
    borrow::Borrow,
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    str::FromStr,
    sync::Arc,
};

/// The longest name, as in DNS.
const NAME_LIMIT: usize = 253;

/// The longest label between two dots of a name.
const LABEL_LIMIT: usize = 63;

/// The name of a node or host: letters, digits, `-` and `.`, lower case. Cheap to clone.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(Arc<str>);

impl Name {
    /// Checks a name.
    ///
    /// # Errors
    /// When it is no DNS name: empty, too long, with other characters, or with an empty label.
    pub fn parse(text: &[u8]) -> Result<Self, NotATarget> {
        let text = text.strip_suffix(b".").unwrap_or(text);
        let label = |label: &[u8]| {
            let inner = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'-';
            (1..=LABEL_LIMIT).contains(&label.len())
                && label.iter().all(inner)
                && !label.starts_with(b"-")
                && !label.ends_with(b"-")
        };
        if text.len() > NAME_LIMIT || !text.split(|&byte| byte == b'.').all(label) {
            return Err(NotATarget::Name);
        }
        let text = str::from_utf8(text).map_err(|_| NotATarget::Name)?;
        Ok(Self(text.to_ascii_lowercase().into()))
    }

    /// The name's text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = NotATarget;

    fn from_str(text: &str) -> Result<Self, NotATarget> {
        Self::parse(text.as_bytes())
    }
}

impl Borrow<str> for Name {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// The host part of a target.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Host {
    /// A node's or another host's name.
    Name(Name),
    /// An address; never an IPv4 one in IPv6 clothes.
    Address(IpAddr),
}

impl Host {
    /// Checks a host without a port: `NAME`, `10.0.0.5`, `fd00::5` or `[fd00::5]`.
    ///
    /// # Errors
    /// When it is neither a name nor an address.
    pub fn parse(text: &[u8]) -> Result<Self, NotATarget> {
        if let Some(inner) = text.strip_prefix(b"[") {
            let inner = inner.strip_suffix(b"]").ok_or(NotATarget::Address)?;
            return v6(inner).map(Self::Address);
        }
        if text.contains(&b':') {
            return v6(text).map(Self::Address);
        }
        Self::without_colon(text)
    }

    fn without_colon(text: &[u8]) -> Result<Self, NotATarget> {
        match str::from_utf8(text).map(Ipv4Addr::from_str) {
            Ok(Ok(address)) => Ok(Self::Address(address.into())),
            _ => Name::parse(text).map(Self::Name),
        }
    }
}

impl From<IpAddr> for Host {
    fn from(address: IpAddr) -> Self {
        Self::Address(address.to_canonical())
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => write!(f, "{name}"),
            Self::Address(IpAddr::V4(address)) => write!(f, "{address}"),
            Self::Address(IpAddr::V6(address)) => write!(f, "[{address}]"),
        }
    }
}

/// `NODE:PORT`, `ADDRESS:PORT` or `[v6]:PORT`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Target {
    /// Which host.
    pub host: Host,
    /// Which port; never 0.
    pub port: u16,
}

impl Target {
    /// Checks an authority, the part of a CONNECT between method and version.
    ///
    /// # Errors
    /// What is wrong with it; converts into a `malformed` refusal.
    pub fn parse(text: &[u8]) -> Result<Self, NotATarget> {
        let (host, port) = match text.iter().rposition(|&byte| byte == b':') {
            Some(colon) => (&text[..colon], &text[colon + 1..]),
            None => return Err(NotATarget::NoPort),
        };
        let host = match host.strip_prefix(b"[") {
            Some(inner) => match inner.strip_suffix(b"]") {
                Some(inner) => Host::Address(v6(inner)?),
                // "[fd00::5]": the last colon is inside the brackets.
                None if port.ends_with(b"]") => return Err(NotATarget::NoPort),
                None => return Err(NotATarget::Address),
            },
            None if host.contains(&b':') && v6(host).is_ok() => return Err(NotATarget::Brackets),
            None => Host::without_colon(host)?,
        };
        Ok(Self { host, port: parse_port(port).ok_or(NotATarget::Port)? })
    }
}

impl FromStr for Target {
    type Err = NotATarget;

    fn from_str(text: &str) -> Result<Self, NotATarget> {
        Self::parse(text.as_bytes())
    }
}

impl From<SocketAddr> for Target {
    fn from(address: SocketAddr) -> Self {
        Self { host: address.ip().into(), port: address.port() }
    }
}

/// The one spelling of this target: what is sent over the carrier and written to the audit line.
impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

/// What keeps bytes from being a target. Holds none of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotATarget {
    /// `node1`, `[fd00::5]`.
    NoPort,
    /// `node1:`, `node1:0`, `node1:http`, `node1:65536`.
    Port,
    /// `fd00::5:10250`.
    Brackets,
    /// `[10.0.0.5]:80`, `[fe80::1%eth0]:80`, `[fd00::5:80`.
    Address,
    /// `no_de:80`, `-a:80`, `:80`, `user@node:80`.
    Name,
}

impl fmt::Display for NotATarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoPort => "the target has no port; write HOST:PORT",
            Self::Port => "the target's port is no number from 1 to 65535",
            Self::Brackets => "an IPv6 address is written in brackets: [ADDRESS]:PORT",
            Self::Address => "what is in brackets is no IPv6 address without a zone",
            Self::Name => "the target's host is neither a name nor an address",
        })
    }
}

impl std::error::Error for NotATarget {}

impl From<NotATarget> for Refusal {
    fn from(why: NotATarget) -> Self {
        Self::new(Reason::Malformed, why)
    }
}

/// Digits only, no sign, no leading zero: one spelling for one port.
pub fn parse_port(text: &[u8]) -> Option<u16> {
    if text.starts_with(b"0") || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    str::from_utf8(text).ok()?.parse().ok()
}

fn v6(text: &[u8]) -> Result<IpAddr, NotATarget> {
    let address: Ipv6Addr =
        str::from_utf8(text).ok().and_then(|text| text.parse().ok()).ok_or(NotATarget::Address)?;
    Ok(IpAddr::V6(address).to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str) -> Result<String, NotATarget> {
        Target::parse(text.as_bytes()).map(|target| target.to_string())
    }

    #[test]
    fn targets_have_one_spelling() {
        let table = [
            ("node1:10250", "node1:10250"),
            ("Node1.Example.:10250", "node1.example:10250"),
            ("cn-hangzhou.10.0.0.1:10250", "cn-hangzhou.10.0.0.1:10250"),
            ("10.0.0.5:10250", "10.0.0.5:10250"),
            ("[::ffff:10.0.0.5]:10250", "10.0.0.5:10250"),
            ("[::FFFF:a00:5]:10250", "10.0.0.5:10250"),
            ("[fd00:0:0::5]:1", "[fd00::5]:1"),
            ("[FD00::5]:65535", "[fd00::5]:65535"),
        ];
        for (written, meant) in table {
            assert_eq!(parse(written).as_deref(), Ok(meant), "{written}");
            assert_eq!(written.parse::<Target>(), meant.parse(), "{written}");
        }
    }

    #[test]
    fn everything_else_says_what_is_wrong() {
        use NotATarget::*;
        let long_label = format!("{}:1", "a".repeat(64));
        let long_name = format!("{}:1", ["abcdefg"; 32].join("."));
        let table = [
            ("", NoPort),
            ("node1", NoPort),
            ("[fd00::5]", NoPort),
            ("node1:", Port),
            ("node1:0", Port),
            ("node1:010250", Port),
            ("node1:+1", Port),
            ("node1:65536", Port),
            ("node1:http", Port),
            ("node1:10250/", Port),
            ("http://node1:10250/", Name),
            ("fd00::5:10250", Brackets),
            ("::1:80", Brackets),
            ("[10.0.0.5]:80", Address),
            ("[fe80::1%eth0]:80", Address),
            ("[fd00::5:80", Address),
            ("[]:80", Address),
            (":80", Name),
            (".:80", Name),
            ("a..b:80", Name),
            ("-a:80", Name),
            ("a-:80", Name),
            ("no_de:80", Name),
            ("user@node:80", Name),
            ("*:80", Name),
            ("n\u{f6}de:80", Name),
            (&long_label, Name),
            (&long_name, Name),
        ];
        for (written, why) in table {
            assert_eq!(parse(written), Err(why), "{written}");
        }
        assert_eq!(Target::parse(b"\xff\xfe:80"), Err(Name));
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_target_or_not(bytes in any::<Vec<u8>>()) {
            if let Ok(target) = Target::parse(&bytes) {
                prop_assert_eq!(Target::parse(target.to_string().as_bytes()), Ok(target));
            }
        }

        #[test]
        fn what_is_written_is_read(address in any::<IpAddr>(), port in 1u16..) {
            let target = Target::from(SocketAddr::new(address, port));
            prop_assert_eq!(target.to_string().parse(), Ok(target.clone()));
            prop_assert_eq!(SocketAddr::new(address, port).to_string().parse(), Ok(target));
        }

        #[test]
        fn case_and_a_last_dot_make_no_difference(name in "[a-zA-Z0-9]([a-zA-Z0-9-]{0,20}[a-zA-Z0-9])?(\\.[a-z]{1,9}){0,3}") {
            let lower = name.to_ascii_lowercase().parse::<Name>();
            prop_assert!(lower.is_ok());
            prop_assert_eq!(&name.to_ascii_uppercase().parse::<Name>(), &lower);
            prop_assert_eq!(&format!("{name}.").parse::<Name>(), &lower);
        }
    }
}
