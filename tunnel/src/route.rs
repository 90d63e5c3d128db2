//! Which way a target goes: a direct node, an edge node by name or address, the pods of a node, a direct network, or a
//! refusal that says why not. Pure: a snapshot of nodes and a target in, a way out.
//!
//! The order is the contract's. Nodes the server dials itself come first, because kube-apiserver sends the traffic of
//! *all* kubelets here. An edge node's address is never dialled from here: it goes through that node's agent or is
//! refused. A real node name beats a name that some node merely says it has.

use crate::{
    network::{Network, never_direct},
    nodes::{Node, Nodes, Owner, Source},
    refusal::{Reason, Refusal},
    target::{Host, Name, Target},
};
use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

/// Where a target is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Way {
    /// Through the agent of this node, which is asked for `ask`: its own name with a port, or the address of one of
    /// its pods.
    Session {
        /// Whose agent.
        node: Name,
        /// What it is asked for.
        ask: Target,
    },
    /// Dialled from here: these addresses in this order, the first that answers.
    Direct {
        /// The cloud node it belongs to, where it is one.
        node: Option<Name>,
        /// Never empty.
        addresses: Vec<SocketAddr>,
    },
    /// A name that no node has: look it up, then ask [`Router::resolved`].
    Resolve(Name),
}

/// What a decision rests on.
pub struct Router<'a> {
    /// The nodes at this moment.
    pub nodes: &'a Nodes,
    /// `--direct-cidr`.
    pub direct: &'a [Network],
    /// Whether an agent of this node is connected, here or on another replica.
    pub present: &'a dyn Fn(&Name) -> bool,
}

impl Router<'_> {
    /// Decides about a target.
    ///
    /// # Errors
    /// `no-session`, `unknown-node`, `ambiguous-address` or `denied-by-server`.
    pub fn route(&self, target: &Target) -> Result<Way, Refusal> {
        if self.nodes.source() == Source::Pending {
            return Err(Refusal::new(
                Reason::NoSession,
                "the list of nodes has not been loaded yet; try again",
            ));
        }
        if let Host::Name(name) = &target.host {
            if let Some(node) = self.nodes.named(name) {
                return if node.direct {
                    direct_node(node, target)
                } else {
                    self.session(&node.name, target)
                };
            }
            if self.nodes.source() == Source::None && (self.present)(name) {
                return self.session(name, target);
            }
        }
        match (self.nodes.direct(&target.host), &target.host) {
            (Owner::Nobody, _) => {}
            // Whichever of them has it: it is the same address.
            (Owner::One(node), Host::Address(address)) => {
                return direct_address(Some(node), *address, target);
            }
            (Owner::Several(_), Host::Address(address)) => return direct_address(None, *address, target),
            (Owner::One(node), Host::Name(_)) => return direct_node(node, target),
            (Owner::Several(nodes), Host::Name(_)) => return Err(ambiguous(&nodes, &target.host)),
        }
        match self.nodes.edge(&target.host) {
            Owner::Nobody => {}
            Owner::One(node) if node.has(&target.host) => return self.session(&node.name, target),
            Owner::One(node) => return self.pod(&node.name, target),
            Owner::Several(nodes) => return Err(ambiguous(&nodes, &target.host)),
        }
        match &target.host {
            Host::Name(name) if self.direct.is_empty() => Err(unknown(name)),
            Host::Name(name) => Ok(Way::Resolve(name.clone())),
            Host::Address(address) if self.direct.iter().any(|net| net.contains(*address)) => {
                direct_address(None, *address, target)
            }
            Host::Address(address) => Err(Refusal::new(
                Reason::DeniedByServer,
                format_args!("{address} is neither a node's or its pods' address nor inside a --direct-cidr"),
            )),
        }
    }

    /// Decides about a name that no node has, now that it has been looked up. An address among them that a node has
    /// decides alone: a name must not lead past that node's agent.
    ///
    /// # Errors
    /// `unknown-node` without addresses, otherwise as [`Router::route`] for the addresses.
    pub fn resolved(&self, name: &Name, port: u16, addresses: &[IpAddr]) -> Result<Way, Refusal> {
        let mut direct = Vec::new();
        let mut refused = None;
        for address in addresses {
            match self.route(&Target { host: (*address).into(), port }) {
                Ok(Way::Direct { node: None, addresses }) => direct.extend(addresses),
                Ok(other) => return Ok(other),
                Err(refusal) if refusal.reason == Reason::DeniedByServer => refused = Some(refusal),
                Err(refusal) => return Err(refusal),
            }
        }
        match refused {
            _ if !direct.is_empty() => Ok(Way::Direct { node: None, addresses: direct }),
            Some(refusal) => Err(Refusal::new(
                Reason::DeniedByServer,
                format_args!("{name} is no node: {}", refusal.sentence()),
            )),
            None => Err(unknown(name)),
        }
    }

    fn session(&self, node: &Name, target: &Target) -> Result<Way, Refusal> {
        let ask = Target { host: Host::Name(node.clone()), port: target.port };
        self.through(node, ask)
    }

    fn pod(&self, node: &Name, target: &Target) -> Result<Way, Refusal> {
        self.through(node, target.clone())
    }

    fn through(&self, node: &Name, ask: Target) -> Result<Way, Refusal> {
        if (self.present)(node) {
            Ok(Way::Session { node: node.clone(), ask })
        } else {
            Err(Refusal::new(Reason::NoSession, format_args!("no agent of node {node} is connected")))
        }
    }
}

/// A cloud node by name: whichever of its addresses may be dialled.
fn direct_node(node: &Node, target: &Target) -> Result<Way, Refusal> {
    let addresses: Vec<SocketAddr> = node
        .ips()
        .filter(|address| never_direct(*address).is_none())
        .map(|address| SocketAddr::new(address, target.port))
        .collect();
    if addresses.is_empty() {
        let why = format_args!("node {} is dialled directly and has no address for that", node.name);
        return Err(Refusal::new(Reason::Unreachable, why));
    }
    Ok(Way::Direct { node: Some(node.name.clone()), addresses })
}

fn direct_address(node: Option<&Node>, address: IpAddr, target: &Target) -> Result<Way, Refusal> {
    if let Some(kind) = never_direct(address) {
        let why = format_args!("{address} is {kind}, which is never dialled");
        return Err(Refusal::new(Reason::DeniedByServer, why));
    }
    let node = node.map(|node| node.name.clone());
    Ok(Way::Direct { node, addresses: vec![SocketAddr::new(address, target.port)] })
}

fn unknown(name: &Name) -> Refusal {
    Refusal::new(Reason::UnknownNode, format_args!("there is no node {name}, and no such name either"))
}

fn ambiguous(nodes: &[&Arc<Node>], host: &Host) -> Refusal {
    const NAMED: usize = 4;
    let names: Vec<&str> = nodes.iter().take(NAMED).map(|node| node.name.as_str()).collect();
    let more = match nodes.len().saturating_sub(NAMED) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let names = names.join(" and ");
    Refusal::new(Reason::AmbiguousAddress, format_args!("{host} belongs to {names}{more}; ask by node name"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nodes::tests::node;
    use proptest::prelude::*;

    /// Two edge nodes behind NATs with one address, two in the cloud, and a liar each.
    fn cluster() -> Nodes {
        Nodes::new(vec![
            node("edge1 192.168.50.2 10.20.1.2 Edge1.lan / 10.244.1.0/24 fd01::/64"),
            node("edge2 192.168.50.2 edge2.lan / 10.244.2.0/24"),
            node("gone 10.20.9.9 / 10.244.9.0/24"),
            node("cloud1 10.10.0.1 fd00::1 / 10.244.100.0/24 / direct"),
            node("cloud2 127.0.0.1 169.254.1.1 /  / direct"),
            // Claims a cloud node's address, the service network, and a cloud node's name.
            node("liar 10.10.0.1 10.96.0.1 cloud1"),
        ])
    }

    fn route(target: &str) -> String {
        let direct = ["10.96.0.0/12".parse().unwrap(), "0.0.0.0/1".parse().unwrap()];
        told(&cluster(), &direct, |router| router.route(&target.parse().unwrap()))
    }

    fn told(
        nodes: &Nodes,
        direct: &[Network],
        ask: impl FnOnce(&Router<'_>) -> Result<Way, Refusal>,
    ) -> String {
        let present = |name: &Name| name.as_str() != "gone";
        match ask(&Router { nodes, direct, present: &present }) {
            Ok(Way::Session { node, ask }) => format!("{node}: {ask}"),
            Ok(Way::Direct { node, addresses }) => {
                let node = node.map(|node| format!("{node} ")).unwrap_or_default();
                format!("direct {node}{addresses:?}")
            }
            Ok(Way::Resolve(name)) => format!("resolve {name}"),
            Err(refusal) => refusal.to_string(),
        }
    }

    #[test]
    fn the_order_of_the_contract() {
        for (target, way) in [
            ("EDGE1:10250", "edge1: edge1:10250"),
            ("edge1:9100", "edge1: edge1:9100"),
            ("10.20.1.2:10250", "edge1: edge1:10250"),
            ("edge1.lan:10250", "edge1: edge1:10250"),
            ("[::ffff:10.20.1.2]:10250", "edge1: edge1:10250"),
            (
                "192.168.50.2:10250",
                "ambiguous-address: 192.168.50.2 belongs to edge1 and edge2; ask by node name",
            ),
            ("10.244.1.7:8080", "edge1: 10.244.1.7:8080"),
            ("[fd01::7]:8080", "edge1: [fd01::7]:8080"),
            ("gone:10250", "no-session: no agent of node gone is connected"),
            ("10.20.9.9:10250", "no-session: no agent of node gone is connected"),
            ("10.244.9.1:80", "no-session: no agent of node gone is connected"),
            ("cloud1:10250", "direct cloud1 [10.10.0.1:10250, [fd00::1]:10250]"),
            ("10.10.0.1:10250", "direct cloud1 [10.10.0.1:10250]"),
            ("10.244.100.5:443", "direct cloud1 [10.244.100.5:443]"),
            ("cloud2:10250", "unreachable: node cloud2 is dialled directly and has no address for that"),
            ("127.0.0.1:10250", "denied-by-server: 127.0.0.1 is a loopback address, which is never dialled"),
            ("10.96.0.10:443", "direct [10.96.0.10:443]"),
            ("10.96.0.1:443", "liar: liar:443"),
            ("127.0.0.2:443", "denied-by-server: 127.0.0.2 is a loopback address, which is never dialled"),
            ("webhook.ns.svc:443", "resolve webhook.ns.svc"),
            (
                "203.0.113.1:80",
                "denied-by-server: 203.0.113.1 is neither a node's or its pods' address nor inside a --direct-cidr",
            ),
        ] {
            assert_eq!(route(target), way, "{target}");
        }
    }

    #[test]
    fn names_are_looked_up_first_and_judged_then() {
        let direct: [Network; 1] = ["10.96.0.0/12".parse().unwrap()];
        let resolved = |addresses: &[&str]| {
            let addresses: Vec<IpAddr> = addresses.iter().map(|text| text.parse().unwrap()).collect();
            told(&cluster(), &direct, |router| {
                router.resolved(&"x.example".parse().unwrap(), 443, &addresses)
            })
        };
        assert_eq!(resolved(&[]), "unknown-node: there is no node x.example, and no such name either");
        assert_eq!(resolved(&["10.96.0.7", "8.8.8.8", "10.97.0.7"]), "direct [10.96.0.7:443, 10.97.0.7:443]");
        assert!(resolved(&["127.0.0.1"]).starts_with("denied-by-server: x.example is no node: 127.0.0.1 is"));
        assert!(resolved(&["169.254.169.254"]).starts_with("denied-by-server: "));
        // A name does not lead past an agent, nor around the doubt whose an address is.
        assert_eq!(resolved(&["10.96.0.7", "10.20.1.2"]), "edge1: edge1:443");
        assert!(resolved(&["10.96.0.7", "192.168.50.2"]).starts_with("ambiguous-address: "));
        assert_eq!(resolved(&["10.96.0.7", "10.10.0.1"]), "direct cloud1 [10.10.0.1:443]");
    }

    #[test]
    fn without_direct_networks_names_are_not_looked_up() {
        let ask = |target: &str| told(&cluster(), &[], |router| router.route(&target.parse().unwrap()));
        assert_eq!(ask("nowhere:443"), "unknown-node: there is no node nowhere, and no such name either");
    }

    #[test]
    fn without_a_list_sessions_are_the_nodes() {
        let ask =
            |nodes: &Nodes, target: &str| told(nodes, &[], |router| router.route(&target.parse().unwrap()));
        let none = Nodes::without_source();
        assert_eq!(ask(&none, "any:10250"), "any: any:10250");
        assert_eq!(ask(&none, "gone:10250"), "unknown-node: there is no node gone, and no such name either");
        let pending = Nodes::default();
        assert!(
            ask(&pending, "edge1:10250").starts_with("no-session: the list of nodes has not been loaded")
        );
    }

    #[test]
    fn a_name_that_two_cloud_nodes_claim() {
        let nodes = Nodes::new(vec![
            node("a 10.0.0.1 lb.example /  / direct"),
            node("b 10.0.0.1 lb.example /  / direct"),
        ]);
        let ask = |target: &str| told(&nodes, &[], |router| router.route(&target.parse().unwrap()));
        assert_eq!(ask("10.0.0.1:10250"), "direct [10.0.0.1:10250]");
        assert_eq!(
            ask("lb.example:10250"),
            "ambiguous-address: lb.example belongs to a and b; ask by node name"
        );
    }

    proptest! {
        /// Whatever is asked: an edge node's or its pods' address is never dialled from here, nor is loopback, and what
        /// is dialled is inside a direct network or a direct node's.
        #[test]
        fn never_direct_to_the_edge(a in any::<u8>(), b in 0u8..4, port in 1u16.., mapped in any::<bool>()) {
            for net in ["10.20.9", "10.244.1", "10.244.9", "192.168.50", "127.0.0", "169.254.169", "10.96.0"] {
                let last = if b == 0 { 2 } else { a };
                let text = if mapped { format!("[::ffff:{net}.{last}]:{port}") } else { format!("{net}.{last}:{port}") };
                let all: [Network; 2] = ["0.0.0.0/0".parse().unwrap(), "::/0".parse().unwrap()];
                let nodes = cluster();
                let router = Router { nodes: &nodes, direct: &all, present: &|_| true };
                if let Ok(Way::Direct { addresses, .. }) = router.route(&text.parse().unwrap()) {
                    for address in addresses {
                        prop_assert!(never_direct(address.ip()).is_none());
                        prop_assert_eq!(nodes.edge(&address.ip().into()), Owner::Nobody);
                    }
                }
            }
        }
    }
}
