//! What a verified certificate says about its holder. Pure: DER in, an identity or the reason why not out.
//!
//! The chain has been verified by rustls against the listener's CA, for client authentication, before anything here is
//! believed. A node is CN=system:node:NAME with O=system:nodes and nothing else; whatever else the holder says of
//! itself names nobody.

use crate::target::Name;
use std::{fmt, sync::Arc};
use x509_parser::prelude::*;

const NODE_PREFIX: &str = "system:node:";
const NODES: &str = "system:nodes";

/// The parts of a leaf certificate that identities are made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leaf {
    /// The common names; one in any certificate that counts.
    pub common_names: Vec<String>,
    /// The organizations.
    pub organizations: Vec<String>,
    /// DNS names, URIs, mail and IP addresses of the subjectAltName, as text.
    pub alternative_names: Vec<String>,
    /// Seconds since 1970 up to which it counts.
    pub not_after: i64,
    /// Whether it may be shown by a client.
    pub client_auth: bool,
}

/// Why a certificate is not what it is needed for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NotThatOne {
    /// No X.509 certificate at all.
    Unreadable,
    /// Not CN=system:node:NAME with O=system:nodes.
    NotANode(String),
    /// A node's certificate where a caller's is needed.
    ANode(String),
    /// A caller that `--caller-name` does not list.
    NotListed(String),
    /// No replica's: it carries none of our own names, or is a node's.
    NotAReplica(String),
}

impl fmt::Display for NotThatOne {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreadable => f.write_str("no readable certificate"),
            Self::NotANode(name) => {
                write!(
                    f,
                    "the certificate of {name:?} names no node: CN=system:node:NAME and O=system:nodes are needed"
                )
            }
            Self::ANode(name) => write!(f, "{name:?} is a node's certificate; nodes may not call"),
            Self::NotListed(name) => write!(f, "{name:?} is not among --caller-name"),
            Self::NotAReplica(name) => {
                write!(
                    f,
                    "the certificate of {name:?} is no replica's: it carries none of our own certificate's names"
                )
            }
        }
    }
}

impl std::error::Error for NotThatOne {}

impl Leaf {
    /// Reads a certificate.
    ///
    /// # Errors
    /// When it is none.
    pub fn parse(der: &[u8]) -> Result<Self, NotThatOne> {
        let (_, cert) = X509Certificate::from_der(der).map_err(|_| NotThatOne::Unreadable)?;
        let text = |value: &AttributeTypeAndValue<'_>| value.as_str().unwrap_or_default().to_owned();
        let subject = cert.subject();
        let alternative_names = match cert.subject_alternative_name() {
            Ok(Some(names)) => names.value.general_names.iter().filter_map(alternative_name).collect(),
            Ok(None) => Vec::new(),
            Err(_) => return Err(NotThatOne::Unreadable),
        };
        let client_auth = match cert.extended_key_usage() {
            Ok(Some(usage)) => usage.value.client_auth || usage.value.any,
            Ok(None) => true,
            Err(_) => return Err(NotThatOne::Unreadable),
        };
        Ok(Self {
            common_names: subject.iter_common_name().map(text).collect(),
            organizations: subject.iter_organization().map(text).collect(),
            alternative_names,
            not_after: cert.validity().not_after.timestamp(),
            client_auth,
        })
    }

    /// The node this certificate belongs to.
    ///
    /// # Errors
    /// When it belongs to none.
    pub fn node(&self) -> Result<Name, NotThatOne> {
        let not = || NotThatOne::NotANode(self.shown());
        let [name] = &self.common_names[..] else { return Err(not()) };
        if !self.is_nodes() {
            return Err(not());
        }
        let name = name.strip_prefix(NODE_PREFIX).ok_or_else(not)?;
        Name::parse(name.as_bytes()).map_err(|_| not())
    }

    /// The name of a caller, who must be one of `listed` unless that is empty; never a node.
    ///
    /// # Errors
    /// When the holder may not call.
    pub fn caller(&self, listed: &[String]) -> Result<Arc<str>, NotThatOne> {
        if self.is_nodes() {
            return Err(NotThatOne::ANode(self.shown()));
        }
        let mut names = self.common_names.iter().chain(&self.alternative_names);
        if listed.is_empty() || names.any(|name| listed.contains(name)) {
            Ok(self.shown().into())
        } else {
            Err(NotThatOne::NotListed(self.shown()))
        }
    }

    /// Whether the holder is another replica: one that carries one of our own certificate's alternative names.
    ///
    /// # Errors
    /// When it is none.
    pub fn replica(&self, ours: &[String]) -> Result<(), NotThatOne> {
        let shares = self.alternative_names.iter().any(|name| ours.contains(name));
        if shares && !self.is_nodes() { Ok(()) } else { Err(NotThatOne::NotAReplica(self.shown())) }
    }

    /// Whether this is a node's own certificate.
    pub fn is_nodes(&self) -> bool {
        self.organizations.iter().any(|name| name == NODES)
    }

    /// The one name to show: the common name, else the first alternative one.
    fn shown(&self) -> String {
        self.common_names
            .iter()
            .chain(&self.alternative_names)
            .next()
            .cloned()
            .unwrap_or_else(|| "nameless".into())
    }
}

fn alternative_name(name: &GeneralName<'_>) -> Option<String> {
    match name {
        GeneralName::DNSName(text) | GeneralName::URI(text) | GeneralName::RFC822Name(text) => {
            Some((*text).to_owned())
        }
        GeneralName::IPAddress(bytes) => match bytes.len() {
            4 => <[u8; 4]>::try_from(*bytes).ok().map(|bytes| std::net::Ipv4Addr::from(bytes).to_string()),
            16 => <[u8; 16]>::try_from(*bytes).ok().map(|bytes| std::net::Ipv6Addr::from(bytes).to_string()),
            _ => None,
        },
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, KeyPair};

    fn leaf(names: &[&str], organizations: &[&str], sans: &[&str]) -> Leaf {
        let mut params =
            CertificateParams::new(sans.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>()).unwrap();
        params.distinguished_name = DistinguishedName::new();
        for name in names {
            params.distinguished_name.push(DnType::CommonName, *name);
        }
        for name in organizations {
            params.distinguished_name.push(DnType::OrganizationName, *name);
        }
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let cert = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        Leaf::parse(cert.der()).unwrap()
    }

    #[test]
    fn only_kubelets_own_certificate_names_a_node() {
        let node = |cn: &str, o: &[&str]| leaf(&[cn], o, &["node9"]).node().map(|name| name.to_string());
        assert_eq!(node("system:node:node1", &["system:nodes"]), Ok("node1".into()));
        assert_eq!(node("system:node:Node1", &["system:nodes"]), Ok("node1".into()));
        for (cn, o) in [
            ("system:node:node1", &[][..]),
            ("system:node:node1", &["system:masters"]),
            ("system:node:node1", &["system:nodes "]),
            ("system:node:", &["system:nodes"]),
            ("system:node:a b", &["system:nodes"]),
            ("node1", &["system:nodes"]),
            ("SYSTEM:NODE:node1", &["system:nodes"]),
            ("x,CN=system:node:node1", &["system:nodes"]),
        ] {
            assert!(node(cn, o).is_err(), "{cn} {o:?}");
        }
        assert!(leaf(&[], &["system:nodes"], &[]).node().is_err());
    }

    #[test]
    fn a_caller_is_anyone_listed_but_never_a_node() {
        let listed = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let apiserver = leaf(&["kube-apiserver"], &["system:masters"], &["api.example", "10.0.0.1"]);
        assert_eq!(apiserver.caller(&[]).as_deref(), Ok("kube-apiserver"));
        assert!(apiserver.caller(&listed(&["kube-apiserver"])).is_ok());
        assert!(apiserver.caller(&listed(&["other", "api.example"])).is_ok());
        assert!(apiserver.caller(&listed(&["10.0.0.1"])).is_ok());
        assert!(apiserver.caller(&listed(&["kube-apiserver2"])).is_err());
        assert!(apiserver.caller(&listed(&["system:masters"])).is_err(), "a group is no name");
        let node = leaf(&["system:node:node1"], &["system:nodes"], &[]);
        assert!(node.caller(&[]).is_err());
        assert!(node.caller(&listed(&["system:node:node1"])).is_err());
    }

    #[test]
    fn garbage_is_no_certificate() {
        assert_eq!(Leaf::parse(b""), Err(NotThatOne::Unreadable));
        assert_eq!(Leaf::parse(b"\x30\x82\xff\xff\x00"), Err(NotThatOne::Unreadable));
    }
}
