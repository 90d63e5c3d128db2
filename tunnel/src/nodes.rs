//! The nodes the server knows: one immutable snapshot with indexes by name, address and pod network.
//!
//! [`api`] and [`file`] make snapshots and replace them whole; the router looks at one snapshot from beginning to end.
//! Addresses are what kubelets say of themselves, so an address that two edge nodes claim belongs to nobody
//! ([`Owner::Several`]), and nodes the server dials itself are kept apart from the others.

pub mod api;
pub mod file;
pub mod selector;

use crate::{
    network::Network,
    target::{Host, Name},
};
use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};
use tokio::sync::watch;

/// A node, as the API server or the nodes file has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Its name.
    pub name: Name,
    /// The addresses and names of its status, in their order.
    pub addresses: Vec<Host>,
    /// The networks its pods get addresses from.
    pub pods: Vec<Network>,
    /// The server dials it itself.
    pub direct: bool,
}

/// Where the list of nodes comes from, and whether it has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Source {
    /// There is none: every agent's certificate is believed.
    None,
    /// There is one, and nothing came from it yet.
    #[default]
    Pending,
    /// The list is here.
    Listed,
}

/// Who an address or name belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Owner<'a> {
    /// No node.
    Nobody,
    /// One node.
    One(&'a Arc<Node>),
    /// More than one, in the order of their names.
    Several(Vec<&'a Arc<Node>>),
}

/// A snapshot.
#[derive(Debug, Default)]
pub struct Nodes {
    source: Source,
    by_name: HashMap<Name, Arc<Node>>,
    edge: Index,
    direct: Index,
}

/// The snapshot in force, and how to hear of the next.
pub type Current = watch::Receiver<Arc<Nodes>>;

/// Nodes by what they say of themselves.
#[derive(Debug, Default)]
struct Index {
    by_host: HashMap<Host, Vec<Arc<Node>>>,
    by_network: HashMap<Network, Vec<Arc<Node>>>,
    /// The prefix lengths in `by_network`, of IPv4 and of IPv6.
    prefixes: (BTreeSet<u8>, BTreeSet<u8>),
}

impl Nodes {
    /// A snapshot of a list that is there. Of two nodes with one name the first counts: names are unique in the API.
    pub fn new(list: Vec<Node>) -> Self {
        let mut nodes = Self { source: Source::Listed, ..Self::default() };
        for node in list {
            let node = Arc::new(node);
            if nodes.by_name.contains_key(node.name.as_str()) {
                log::warn!("node {} is listed twice; the first counts", node.name);
                continue;
            }
            nodes.by_name.insert(node.name.clone(), node.clone());
            let index = if node.direct { &mut nodes.direct } else { &mut nodes.edge };
            index.add(node);
        }
        nodes
    }

    /// What is known where there is no source of nodes.
    pub fn without_source() -> Self {
        Self { source: Source::None, ..Self::default() }
    }

    /// Where this list comes from.
    pub fn source(&self) -> Source {
        self.source
    }

    /// Whether an agent with a certificate for this node may have a session: it is listed, or there is no list.
    pub fn admits(&self, name: &Name) -> bool {
        self.source == Source::None || self.by_name.contains_key(name.as_str())
    }

    /// The node of this name.
    pub fn named(&self, name: &Name) -> Option<&Arc<Node>> {
        self.by_name.get(name.as_str())
    }

    /// The direct nodes that have this address or other name, or whose pods do.
    pub fn direct(&self, host: &Host) -> Owner<'_> {
        self.direct.owner(host)
    }

    /// The edge nodes that have this address or other name, or whose pods do.
    pub fn edge(&self, host: &Host) -> Owner<'_> {
        self.edge.owner(host)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.by_name.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }
}

impl Node {
    /// Whether the node itself, not one of its pods, has this address or name.
    pub fn has(&self, host: &Host) -> bool {
        self.hosts().any(|own| own == *host)
    }

    /// The addresses among [`Node::addresses`].
    pub fn ips(&self) -> impl Iterator<Item = IpAddr> {
        self.hosts().filter_map(|host| match host {
            Host::Address(address) => Some(address),
            Host::Name(_) => None,
        })
    }

    /// Everything the node is called: its addresses, other names, and its name where that is an address.
    fn hosts(&self) -> impl Iterator<Item = Host> {
        let named = self.name.as_str().parse::<IpAddr>().ok().map(Host::from);
        self.addresses.iter().cloned().chain(named)
    }
}

impl Index {
    fn add(&mut self, node: Arc<Node>) {
        for host in node.hosts() {
            push(self.by_host.entry(host).or_default(), &node);
        }
        for network in &node.pods {
            push(self.by_network.entry(*network).or_default(), &node);
            let prefixes = if network.is_ipv4() { &mut self.prefixes.0 } else { &mut self.prefixes.1 };
            prefixes.insert(network.prefix());
        }
    }

    fn owner(&self, host: &Host) -> Owner<'_> {
        let mut owners: Vec<&Arc<Node>> = self.by_host.get(host).into_iter().flatten().collect();
        if let Host::Address(address) = *host {
            let prefixes = if address.is_ipv4() { &self.prefixes.0 } else { &self.prefixes.1 };
            for prefix in prefixes {
                owners.extend(self.by_network.get(&Network::around(address, *prefix)).into_iter().flatten());
            }
        }
        owners.sort_by(|a, b| a.name.cmp(&b.name));
        owners.dedup_by(|a, b| a.name == b.name);
        match owners[..] {
            [] => Owner::Nobody,
            [one] => Owner::One(one),
            _ => Owner::Several(owners),
        }
    }
}

fn push(owners: &mut Vec<Arc<Node>>, node: &Arc<Node>) {
    if !owners.iter().any(|owner| Arc::ptr_eq(owner, node)) {
        owners.push(node.clone());
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// `name addresses… / networks… [/ direct]`, the way tests write a node.
    pub(crate) fn node(text: &str) -> Node {
        let mut parts = text.split(" / ");
        let mut words = parts.next().unwrap().split_whitespace();
        Node {
            name: words.next().unwrap().parse().unwrap(),
            addresses: words.map(|word| Host::parse(word.as_bytes()).unwrap()).collect(),
            pods: parts.next().unwrap_or("").split_whitespace().map(|net| net.parse().unwrap()).collect(),
            direct: parts.next() == Some("direct"),
        }
    }

    fn owner(nodes: &Nodes, host: &str) -> Vec<String> {
        match nodes.edge(&Host::parse(host.as_bytes()).unwrap()) {
            Owner::Nobody => Vec::new(),
            Owner::One(node) => vec![node.name.to_string()],
            Owner::Several(nodes) => nodes.iter().map(|node| node.name.to_string()).collect(),
        }
    }

    #[test]
    fn who_has_what() {
        let nodes = Nodes::new(vec![
            node("node1 10.0.0.1 fd00::1 one.example / 10.244.1.0/24 fd01::/64"),
            node("node2 10.0.0.2 192.168.50.2 10.244.1.9 / 10.244.2.0/24"),
            node("node3 10.0.0.3 ::ffff:192.168.50.2 / 10.244.0.0/16"),
            node("10.0.0.4"),
        ]);
        for (host, owners) in [
            ("10.0.0.1", &["node1"][..]),
            ("::ffff:10.0.0.1", &["node1"]),
            ("FD00:0::1", &["node1"]),
            ("ONE.example.", &["node1"]),
            ("node1", &[]),
            ("192.168.50.2", &["node2", "node3"]),
            ("fd01::77", &["node1"]),
            ("10.244.3.1", &["node3"]),
            ("10.244.2.1", &["node2", "node3"]),
            // A node may not take a pod of another by claiming its address.
            ("10.244.1.9", &["node1", "node2", "node3"]),
            ("10.0.0.4", &["10.0.0.4"]),
            ("10.9.9.9", &[]),
        ] {
            assert_eq!(owner(&nodes, host), owners, "{host}");
        }
    }

    #[test]
    fn without_a_list_every_node_is_believed() {
        let name: Name = "node1".parse().unwrap();
        assert!(Nodes::without_source().admits(&name));
        assert!(!Nodes::default().admits(&name), "the list has not come yet");
        assert!(!Nodes::new(vec![]).admits(&name));
        assert!(Nodes::new(vec![node("NODE1")]).admits(&name));
    }

    proptest! {
        /// The index finds exactly those that a look at every node finds.
        #[test]
        fn the_index_is_the_list(
            list in proptest::collection::vec((0u8..4, 0u8..4, 8u8..33), 0..6),
            asked in 0u8..4,
        ) {
            let list: Vec<Node> = list.iter().enumerate().map(|(i, (address, net, prefix))| {
                node(&format!("n{i} 10.0.0.{address} / 10.0.0.{net}/{prefix}"))
            }).collect();
            let host = Host::parse(format!("10.0.0.{asked}").as_bytes()).unwrap();
            let Host::Address(address) = host else { unreachable!() };
            let expected: Vec<String> = list.iter()
                .filter(|node| node.has(&host) || node.pods.iter().any(|net| net.contains(address)))
                .map(|node| node.name.to_string()).collect();
            prop_assert_eq!(owner(&Nodes::new(list), &host.to_string()), expected);
        }
    }
}
