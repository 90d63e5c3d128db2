//! Whose address is this: the pod's, by namespace, name and interface, or, for want of a pod, the container's.

use cni::{Args, Error};
use std::fmt;

/// Kubernetes allows 253 bytes for the longest name it has.
const LONGEST: usize = 253;

/// Who a binding belongs to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Identity {
    /// A pod's interface. Sticky: the address outlives the container.
    Pod {
        /// `K8S_POD_NAMESPACE`
        namespace: String,
        /// `K8S_POD_NAME`
        pod: String,
        /// `CNI_IFNAME`
        ifname: String,
    },
    /// A container that nobody called a pod (podman, plain cnitool). Not sticky: DEL frees the address.
    Container {
        /// `CNI_CONTAINERID`
        id: String,
        /// `CNI_IFNAME`
        ifname: String,
    },
}

impl Identity {
    /// The identity of an attachment. A pod needs both its namespace and its name.
    ///
    /// # Errors
    /// Code 4 when a name is longer than Kubernetes allows, or has bytes no name has.
    pub fn of(container: &str, ifname: &str, args: &Args) -> Result<Self, Error> {
        let given = |key| args.get(key).filter(|value| !value.is_empty());
        let (Some(namespace), Some(pod)) = (given("K8S_POD_NAMESPACE"), given("K8S_POD_NAME")) else {
            return Ok(Self::Container { id: container.into(), ifname: ifname.into() });
        };
        Self::pod(namespace, pod, ifname).map_err(|why| {
            Error::invalid_environment(format!("CNI_ARGS: K8S_POD_NAMESPACE or K8S_POD_NAME {why}"))
        })
    }

    /// A pod's interface.
    ///
    /// # Errors
    /// What is wrong with the names.
    pub fn pod(namespace: &str, pod: &str, ifname: &str) -> Result<Self, String> {
        for name in [namespace, pod] {
            if name.is_empty() || name.len() > LONGEST {
                return Err(format!("has {} bytes, and Kubernetes allows 1 to {LONGEST}", name.len()));
            }
            if name.contains(|c: char| c == '/' || c.is_control() || c.is_whitespace()) {
                return Err(format!("is {name:?}, with '/', white space or control characters"));
            }
        }
        Ok(Self::Pod { namespace: namespace.into(), pod: pod.into(), ifname: ifname.into() })
    }

    /// Whether the address is kept after DEL.
    #[must_use]
    pub fn is_sticky(&self) -> bool {
        matches!(self, Self::Pod { .. })
    }

    /// The interface.
    #[must_use]
    pub fn ifname(&self) -> &str {
        match self {
            Self::Pod { ifname, .. } | Self::Container { ifname, .. } => ifname,
        }
    }

    /// The binding's key in the state.
    #[must_use]
    pub fn key(&self) -> Key {
        match self {
            Self::Pod { namespace, pod, ifname } => Key(format!("{namespace}/{pod}/{ifname}")),
            Self::Container { id, ifname } => Key(format!("/{id}/{ifname}")),
        }
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pod { namespace, pod, ifname } => write!(f, "pod {namespace}/{pod} {ifname}"),
            Self::Container { id, ifname } => write!(f, "container {id} {ifname}"),
        }
    }
}

/// An identity as one string: `namespace/pod/ifname`, or `/container/ifname`. No name has a `/`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(String);

impl Key {
    /// A key read from the state. `None` when it is none.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        Self(text.into()).try_identity().map(|_| Self(text.into()))
    }

    /// The key as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Who it stands for.
    #[must_use]
    pub fn identity(&self) -> Identity {
        // Both constructors have seen the two slashes.
        self.try_identity()
            .unwrap_or_else(|| Identity::Container { id: self.0.clone(), ifname: String::new() })
    }

    fn try_identity(&self) -> Option<Identity> {
        let mut parts = self.0.split('/').map(String::from);
        let (first, second, ifname) = (parts.next()?, parts.next()?, parts.next()?);
        if parts.next().is_some() || second.is_empty() || ifname.is_empty() {
            return None;
        }
        Some(match first.is_empty() {
            true => Identity::Container { id: second, ifname },
            false => Identity::Pod { namespace: first, pod: second, ifname },
        })
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.identity().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(args: &str) -> Result<Identity, Error> {
        Identity::of("c1", "eth0", &Args::parse(args).unwrap())
    }

    #[test]
    fn a_pod_needs_both_names() {
        let pod = of("K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0;K8S_POD_UID=1").unwrap();
        assert_eq!(pod, Identity::pod("default", "web-0", "eth0").unwrap());
        assert!(pod.is_sticky());
        for args in
            ["", "K8S_POD_NAMESPACE=default", "K8S_POD_NAME=web-0", "K8S_POD_NAME=;K8S_POD_NAMESPACE=a"]
        {
            let container = of(args).unwrap();
            assert_eq!(container, Identity::Container { id: "c1".into(), ifname: "eth0".into() }, "{args}");
            assert!(!container.is_sticky());
        }
    }

    #[test]
    fn names_of_full_length_pass_and_longer_ones_do_not() {
        let args = |namespace: usize, pod: usize| {
            format!("K8S_POD_NAMESPACE={};K8S_POD_NAME={}", "n".repeat(namespace), "p".repeat(pod))
        };
        assert_eq!(of(&args(63, 253)).unwrap().key().as_str().len(), 63 + 253 + 4 + 2);
        assert_eq!(of(&args(63, 254)).unwrap_err().code, 4);
        for bad in ["a/b", "a b", "a\tb", "a\0b"] {
            let error = of(&format!("K8S_POD_NAMESPACE=x;K8S_POD_NAME={bad}")).unwrap_err();
            assert_eq!(error.code, 4, "{bad:?}");
        }
    }

    #[test]
    fn keys_are_different_and_read_back() {
        let identities = [
            Identity::pod("a", "b", "eth0").unwrap(),
            Identity::pod("b", "a", "eth0").unwrap(),
            Identity::pod("a", "b", "net1").unwrap(),
            Identity::Container { id: "a".into(), ifname: "eth0".into() },
        ];
        for one in &identities {
            assert_eq!(Key::parse(one.key().as_str()).unwrap().identity(), *one);
            assert_eq!(identities.iter().filter(|other| other.key() == one.key()).count(), 1);
        }
        for bad in ["", "a", "a/b", "//eth0", "a/b/", "a/b/c/d", "/x"] {
            assert_eq!(Key::parse(bad), None, "{bad}");
        }
    }
}
