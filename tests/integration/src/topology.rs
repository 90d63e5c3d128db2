//! What was asked for (`--nodes 3 --site A:node1,node2 --nat node3`) turned into sites, networks and addresses. Pure.
//!
//! A site is one LAN behind one uplink; a node that no site names has a site of its own, called like the node.

use crate::node::Cni;
use crate::tunnel::Egress;
use crate::wan::Wan;
use anyhow::{Result, bail, ensure};
use serde::{Deserialize, Serialize};
use std::net::Ipv4Addr;

/// Where the API server is.
pub const CLOUD: Ipv4Addr = Ipv4Addr::new(10, 10, 0, 2);
/// The router's side of the cloud's cable.
pub const CLOUD_ROUTER: Ipv4Addr = Ipv4Addr::new(10, 10, 0, 1);
/// Pods' addresses; each node gets a /24 of it.
pub const POD_CIDR: &str = "10.244.0.0/16";
/// Services' addresses.
pub const SERVICE_CIDR: &str = "10.96.0.0/16";

/// What a person or a test asks for.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Options {
    /// How many nodes: node1, node2, ...
    pub nodes: usize,
    /// Named sites and their nodes.
    pub sites: Vec<(String, Vec<String>)>,
    /// Nodes whose site is behind a NAT: the cloud cannot open a connection to it.
    pub nat: Vec<String>,
    /// All sites behind a NAT use the same addresses.
    pub same_address: bool,
    /// Whose CNI plugins.
    pub cni: Cni,
    /// What the uplinks are like.
    pub wan: Wan,
    /// Disks are images, so that a power cut can lose what was not synced.
    pub disk_images: bool,
    /// kube-proxy on each node.
    pub kube_proxy: bool,
    /// Kubernetes' own tunnel, through which `kubectl logs` and `exec` reach nodes behind a NAT.
    pub konnectivity: bool,
    /// Our own tunnel instead, and how the API server calls it.
    pub tunnel: Option<Egress>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            nodes: 2,
            sites: Vec::new(),
            nat: Vec::new(),
            same_address: false,
            cni: Cni::Ours,
            wan: Wan::default(),
            disk_images: false,
            kube_proxy: false,
            konnectivity: false,
            tunnel: None,
        }
    }
}

/// One LAN behind one uplink.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Site {
    /// Its name.
    pub name: String,
    /// Which site it is; addresses come from it.
    index: u8,
    /// Behind a NAT?
    pub nat: bool,
    /// The LAN: x.y.z.0/24.
    lan: Ipv4Addr,
    /// Names of its nodes, in the order of their addresses.
    pub nodes: Vec<String>,
}

impl Site {
    fn lan_host(&self, host: u8) -> Ipv4Addr {
        let [a, b, c, _] = self.lan.octets();
        Ipv4Addr::new(a, b, c, host)
    }

    /// The LAN with its prefix.
    pub fn lan(&self) -> String {
        format!("{}/24", self.lan)
    }

    /// The gateway's address in the LAN.
    pub fn gateway(&self) -> Ipv4Addr {
        self.lan_host(1)
    }

    /// The router's and the gateway's address on the uplink.
    pub fn uplink(&self) -> (Ipv4Addr, Ipv4Addr) {
        (Ipv4Addr::new(10, 30, self.index, 1), Ipv4Addr::new(10, 30, self.index, 2))
    }

    /// The uplink's interface at the router.
    pub fn router_interface(&self) -> String {
        format!("wan{}", self.index)
    }

    /// A node's address in the LAN.
    pub fn address(&self, node: &str) -> Option<Ipv4Addr> {
        let position = self.nodes.iter().position(|name| name == node)?;
        Some(self.lan_host(u8::try_from(position).ok()? + 2))
    }
}

/// The sites that `options` describe; every mistake in them is reported.
pub fn plan(options: &Options) -> Result<Vec<Site>> {
    ensure!((1..=20).contains(&options.nodes), "--nodes {}: 1 to 20 nodes fit on one machine", options.nodes);
    let all: Vec<String> = (1..=options.nodes).map(|i| format!("node{i}")).collect();
    let known = |name: &String| {
        ensure!(
            all.contains(name),
            "there is no {name}: with --nodes {} they are {}",
            all.len(),
            all.join(", ")
        );
        Ok(())
    };
    options.nat.iter().try_for_each(known)?;

    let mut groups: Vec<(String, Vec<String>)> = Vec::new();
    for (site, nodes) in &options.sites {
        nodes.iter().try_for_each(known)?;
        ensure!(!nodes.is_empty(), "site {site} has no nodes: write --site {site}:node1,node2");
        ensure!(!groups.iter().any(|(name, _)| name == site), "site {site} is named twice");
        ensure!(!all.contains(site) && site != "cloud", "a site cannot be called {site}: that name is taken");
        if let Some(twice) = nodes.iter().find(|n| groups.iter().any(|(_, nodes)| nodes.contains(n))) {
            bail!("{twice} cannot be at two sites");
        }
        groups.push((site.clone(), nodes.clone()));
    }
    for node in &all {
        if !groups.iter().any(|(_, nodes)| nodes.contains(node)) {
            groups.push((node.clone(), vec![node.clone()]));
        }
    }
    let site = |(i, (name, nodes)): (usize, (String, Vec<String>))| {
        let index = u8::try_from(i + 1)?;
        let nat = nodes.iter().any(|node| options.nat.contains(node));
        let lan = match (nat, options.same_address) {
            (false, _) => Ipv4Addr::new(10, 20, index, 0),
            (true, false) => Ipv4Addr::new(192, 168, 50 + index, 0),
            (true, true) => Ipv4Addr::new(192, 168, 50, 0),
        };
        Ok(Site { name, index, nat, lan, nodes })
    };
    groups.into_iter().enumerate().map(site).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(nodes: usize) -> Options {
        Options { nodes, ..Options::default() }
    }

    fn address(sites: &[Site], node: &str) -> String {
        sites.iter().find_map(|site| site.address(node)).unwrap().to_string()
    }

    #[test]
    fn nodes_without_a_site_have_one_each() {
        let sites = plan(&options(2)).unwrap();
        assert_eq!(sites.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(), ["node1", "node2"]);
        assert_eq!(
            (address(&sites, "node1"), address(&sites, "node2")),
            ("10.20.1.2".into(), "10.20.2.2".into())
        );
    }

    #[test]
    fn a_site_is_one_lan() {
        let asked = Options { sites: vec![("A".into(), vec!["node1".into(), "node3".into()])], ..options(3) };
        let sites = plan(&asked).unwrap();
        assert_eq!(sites.len(), 2);
        assert_eq!(address(&sites, "node1"), "10.20.1.2");
        assert_eq!(address(&sites, "node3"), "10.20.1.3");
        assert_eq!(address(&sites, "node2"), "10.20.2.2");
    }

    #[test]
    fn nat_sites_may_have_the_same_addresses() {
        let asked = Options { nat: vec!["node2".into(), "node3".into()], ..options(3) };
        let sites = plan(&asked).unwrap();
        assert_eq!(
            (address(&sites, "node2"), address(&sites, "node3")),
            ("192.168.52.2".into(), "192.168.53.2".into())
        );
        let sites = plan(&Options { same_address: true, ..asked }).unwrap();
        assert_eq!(address(&sites, "node2"), address(&sites, "node3"));
        assert_ne!(sites[1].uplink(), sites[2].uplink(), "their uplinks differ all the same");
        assert_eq!(address(&sites, "node1"), "10.20.1.2");
    }

    #[test]
    fn mistakes_are_named() {
        let site =
            |name: &str, nodes: &[&str]| (name.to_owned(), nodes.iter().map(|n| (*n).to_owned()).collect());
        for (asked, word) in [
            (options(0), "1 to 20"),
            (Options { nat: vec!["node9".into()], ..options(2) }, "no node9"),
            (Options { sites: vec![site("A", &["nodeX"])], ..options(2) }, "no nodeX"),
            (
                Options { sites: vec![site("A", &["node1"]), site("B", &["node1"])], ..options(2) },
                "two sites",
            ),
            (Options { sites: vec![site("node2", &["node1"])], ..options(2) }, "taken"),
            (Options { sites: vec![site("A", &[])], ..options(2) }, "has no nodes"),
        ] {
            let error = plan(&asked).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
