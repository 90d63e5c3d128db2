//! Names that come from outside, checked once when the value is made (`cni/pkg/utils` of the reference).
//!
//! They end up in file names, device names and kernel messages, so nothing else may construct them.

use crate::Error;
use std::fmt;

/// A name that is safe as a file name: a letter or digit, then letters, digits, `_`, `.`, `-`.
fn is_identifier(name: &str) -> bool {
    let rest = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    name.starts_with(|c: char| c.is_ascii_alphanumeric()) && name.chars().all(rest)
}

const IDENTIFIER: &str = "a letter or digit, followed by letters, digits, '_', '.' or '-'";

/// `CNI_CONTAINERID`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ContainerId(String);

impl ContainerId {
    /// # Errors
    /// Code 4 when it is empty or has a character that has no business in a file name.
    pub fn parse(name: &str) -> Result<Self, Error> {
        if !is_identifier(name) {
            let msg = format!("CNI_CONTAINERID {name:?} is not a container id: {IDENTIFIER}");
            return Err(Error::invalid_environment(msg));
        }
        Ok(Self(name.into()))
    }
}

/// The `name` of a network configuration.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NetworkName(String);

impl NetworkName {
    /// # Errors
    /// Code 7 when it is missing or has a character that has no business in a file name.
    pub fn parse(name: &str) -> Result<Self, Error> {
        if name.is_empty() {
            return Err(Error::invalid_config("the network configuration has no \"name\""));
        }
        if !is_identifier(name) {
            let msg = format!("the network name {name:?} is not {IDENTIFIER}");
            return Err(Error::invalid_config(msg));
        }
        Ok(Self(name.into()))
    }
}

/// `CNI_IFNAME`: a name that the kernel accepts for a device.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IfName(String);

impl IfName {
    /// IFNAMSIZ of `linux/if.h`, less the closing zero byte.
    pub const MAX: usize = 15;

    /// # Errors
    /// Code 4 when the kernel would refuse it.
    pub fn parse(name: &str) -> Result<Self, Error> {
        let bad = |why: &str| {
            Err(Error::invalid_environment(format!("CNI_IFNAME {name:?} is not an interface name: {why}")))
        };
        match name {
            "" => bad("it is empty"),
            "." | ".." => bad("it is a directory"),
            _ if name.len() > Self::MAX => bad("it has more than 15 bytes"),
            _ if name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace()) => {
                bad("it has '/', ':' or white space")
            }
            _ => Ok(Self(name.into())),
        }
    }
}

/// What the three names share: they are read as text.
macro_rules! text {
    ($($name:ident),*) => {$(
        impl $name {
            /// The name as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }
    )*};
}

text!(ContainerId, NetworkName, IfName);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers() {
        for good in ["a", "0", "cnitool-77383ca0a0715733ca6f", "A_b.c-d", "cbr0"] {
            assert!(ContainerId::parse(good).is_ok(), "{good}");
            assert!(NetworkName::parse(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "-a", "_a", "a/b", "a b", "a\0", "é", "a\n"] {
            assert_eq!(ContainerId::parse(bad).unwrap_err().code, 4, "{bad:?}");
            assert_eq!(NetworkName::parse(bad).unwrap_err().code, 7, "{bad:?}");
        }
    }

    #[test]
    fn interface_names() {
        for good in ["eth0", "a", "123456789012345", "veth.1", "é", "..a"] {
            assert!(IfName::parse(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "1234567890123456", "a/b", "a:1", "a b", "a\t", "a\u{a0}"] {
            assert_eq!(IfName::parse(bad).unwrap_err().code, 4, "{bad:?}");
        }
    }
}
