//! The cluster's networks: a router that is "the internet", the cloud's cable, and for each site a gateway with an uplink and a LAN.
//!
//! ```text
//!  cloud ──── router ══uplink══ gateway of A ── LAN ── node1
//! 10.10.0.2      ║                                 └── node2
//!                ╚═════uplink══ gateway of node3 ──── node3
//! ```
//! An uplink is a cable, or a [`crate::wan`] with delay, loss and rate. A cut is silence, not an unplugged cable: packets vanish.

use crate::daemons::{Daemons, DaemonsRecord};
use crate::exec::{COMMAND_LIMIT, run, wait_until};
use crate::host::{Host, HostRecord};
use crate::host_init::HostSpec;
use crate::link;
use crate::topology::{CLOUD, CLOUD_ROUTER, Site};
use crate::wan::Wan;
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

/// Router, cloud and gateways, joined.
#[derive(Debug)]
pub struct Network {
    /// Where the control plane runs.
    pub cloud: Host,
    router: Host,
    gateways: Vec<(Site, Host)>,
    wans: Daemons,
    cut: BTreeSet<String>,
}

/// What `rig` writes down to find it again.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NetworkRecord {
    cloud: HostRecord,
    router: HostRecord,
    gateways: Vec<(Site, HostRecord)>,
    wans: DaemonsRecord,
    cut: BTreeSet<String>,
}

impl Network {
    /// Makes all of it. `spec` says what a host of a name is to be.
    pub fn up(sites: &[Site], wan: Wan, logs: &Path, spec: impl Fn(&str) -> HostSpec) -> Result<Self> {
        let router = Host::boot(spec("router"))?;
        router.sh("sysctl -qw net.ipv4.ip_forward=1")?;
        router.sh(
            "nft 'table inet rig { set cut { type ifname; }; chain forward { type filter hook forward priority 0;
             iifname @cut drop; oifname @cut drop; }; }'",
        )?;
        let cloud = Host::boot(spec("cloud"))?;
        link::connect((&router, "cloud"), (&cloud, "eth0"))?;
        router.sh(&format!("ip addr add {CLOUD_ROUTER}/24 dev cloud"))?;
        cloud.sh(&format!("ip addr add {CLOUD}/24 dev eth0; ip route add default via {CLOUD_ROUTER}"))?;
        let mut network =
            Self { cloud, router, gateways: Vec::new(), wans: Daemons::new(logs)?, cut: BTreeSet::new() };
        for site in sites {
            let gateway = Host::boot(spec(&format!("gateway-{}", site.name)))?;
            network
                .join(site, &gateway, wan)
                .with_context(|| format!("cannot connect site {}", site.name))?;
            network.gateways.push((site.clone(), gateway));
        }
        Ok(network)
    }

    /// Uplink, LAN and, if asked for, NAT of one site.
    fn join(&mut self, site: &Site, gateway: &Host, wan: Wan) -> Result<()> {
        let port = site.router_interface();
        if wan.is_plain() {
            link::connect((&self.router, &port), (gateway, "wan"))?;
        } else {
            self.start_wan(&port, gateway, wan)?;
        }
        let (near, far) = site.uplink();
        self.router.sh(&format!("ip addr add {near} peer {far} dev {port}"))?;
        gateway.sh(&format!(
            "sysctl -qw net.ipv4.ip_forward=1
             ip addr add {far} peer {near} dev wan
             ip route add default via {near}
             ip link add lan type bridge
             ip addr add {}/24 dev lan
             ip link set lan up",
            site.gateway()
        ))?;
        if site.nat {
            gateway.sh(
                "nft 'table ip nat { chain post { type nat hook postrouting priority 100; oifname wan masquerade; }; }'",
            )?;
        } else {
            self.router.sh(&format!("ip route add {} via {far}", site.lan()))?;
        }
        Ok(())
    }

    /// Both ends of the link are made at the router, where its forwarder lives; then one is handed to the gateway.
    fn start_wan(&mut self, port: &str, gateway: &Host, wan: Wan) -> Result<()> {
        let far = format!("{port}far");
        let mut forwarder = self.router.command(crate::tools::rig()?)?;
        forwarder.args(["wan", port, &far, &serde_json::to_string(&wan)?]);
        self.wans.start(port, forwarder)?;
        wait_until(&format!("tun devices {port} and {far}"), Duration::from_secs(10), || {
            self.router.sh(&format!("ip link show {port}; ip link show {far}")).is_ok()
        })?;
        let (router_pid, gateway_pid) =
            (self.router.init_pid()?.to_string(), gateway.init_pid()?.to_string());
        let mut command = Command::new("nsenter");
        command.args([
            "-t",
            &router_pid,
            "-n",
            "ip",
            "link",
            "set",
            &far,
            "netns",
            &gateway_pid,
            "name",
            "wan",
        ]);
        run(&mut command, b"", COMMAND_LIMIT)?.ok()?;
        self.router.sh(&format!("ip link set {port} up"))?;
        gateway.sh("ip link set wan up").map(drop)
    }

    fn at(&self, node: &str) -> Result<&(Site, Host)> {
        let found = self.gateways.iter().find(|(site, _)| site.nodes.iter().any(|name| name == node));
        found.with_context(|| format!("no site has a node {node}"))
    }

    /// Plugs a node that has just got power into its LAN: address, default route, and the same MAC as ever.
    pub fn attach(&self, node: &Host) -> Result<()> {
        let (site, gateway) = self.at(node.name())?;
        let name = node.name();
        let address = site.address(name).with_context(|| format!("{name} has no address"))?;
        // After a power loss the old port may still be there: the dead namespace is taken down a little later.
        gateway.sh(&format!("ip link del {name} 2>/dev/null || true"))?;
        link::connect((gateway, name), (node, "eth0"))?;
        let [a, b, c, d] = address.octets();
        node.sh(&format!(
            "ip link set eth0 address 02:01:{a:02x}:{b:02x}:{c:02x}:{d:02x}
             ip addr add {address}/24 dev eth0
             ip route add default via {}",
            site.gateway()
        ))?;
        gateway.sh(&format!("ip link set {name} master lan"))?;
        self.set_port(gateway, name, !self.cut.contains(name))
    }

    /// A node's port at its switch: open, or silently dropping everything.
    fn set_port(&self, gateway: &Host, node: &str, open: bool) -> Result<()> {
        let state = if open { 3 } else { 0 };
        gateway.sh(&format!("bridge link set dev {node} state {state}")).map(drop)
    }

    /// Silences "cloud" (its cable), a site (its uplink; the LAN stays whole), or a node (its port).
    pub fn cut(&mut self, what: &str) -> Result<()> {
        self.set(what, false)?;
        self.cut.insert(what.to_owned());
        Ok(())
    }

    /// Undoes a cut.
    pub fn heal(&mut self, what: &str) -> Result<()> {
        self.cut.remove(what);
        self.set(what, true)
    }

    /// Undoes every cut.
    pub fn heal_all(&mut self) -> Result<()> {
        for what in self.cut.clone() {
            self.heal(&what)?;
        }
        Ok(())
    }

    /// What is cut now.
    pub fn cuts(&self) -> impl Iterator<Item = &str> {
        self.cut.iter().map(String::as_str)
    }

    fn set(&self, what: &str, open: bool) -> Result<()> {
        let interface = if what == "cloud" {
            "cloud".to_owned()
        } else if let Some((site, gateway)) = self.gateways.iter().find(|(site, _)| site.name == what) {
            if site.nodes.iter().any(|node| node == what) {
                // A site called like its only node: cutting the node is more, and is what was meant.
                return self.set_port(gateway, what, open);
            }
            site.router_interface()
        } else if let Ok((_, gateway)) = self.at(what) {
            return self.set_port(gateway, what, open);
        } else {
            let sites: Vec<&str> = self.gateways.iter().map(|(site, _)| site.name.as_str()).collect();
            bail!("{what} is neither \"cloud\", nor a node, nor one of the sites {}", sites.join(", "));
        };
        let verb = if open { "delete" } else { "add" };
        // Deleting what is not there is fine: healing twice changes nothing.
        let quiet = if open { " 2>/dev/null || true" } else { "" };
        self.router.sh(&format!("nft {verb} element inet rig cut '{{ \"{interface}\" }}'{quiet}")).map(drop)
    }

    /// Every host of it that should be on, with whether it is.
    pub fn hosts(&self) -> Vec<&Host> {
        [&self.cloud, &self.router].into_iter().chain(self.gateways.iter().map(|(_, host)| host)).collect()
    }

    /// The gateway's host of a node's site, for tests that look at what goes by.
    pub fn gateway_of(&self, node: &str) -> Result<&Host> {
        self.at(node).map(|(_, host)| host)
    }

    /// Everything off and removed; every step is tried, the first error is given.
    pub fn down(&mut self) -> Result<()> {
        let hosts = [&mut self.cloud, &mut self.router];
        let hosts = hosts.into_iter().chain(self.gateways.iter_mut().map(|(_, host)| host));
        let results: Vec<Result<()>> = hosts.map(Host::remove).collect();
        self.wans.reap()?;
        results.into_iter().collect()
    }

    /// One that another run of `rig` made.
    pub fn found(record: NetworkRecord) -> Self {
        let gateways = record.gateways.into_iter().map(|(site, host)| (site, Host::found(host))).collect();
        Self {
            cloud: Host::found(record.cloud),
            router: Host::found(record.router),
            gateways,
            wans: Daemons::found(record.wans),
            cut: record.cut,
        }
    }

    /// What to write down so that [`Network::found`] finds it.
    pub fn record(&self) -> NetworkRecord {
        NetworkRecord {
            cloud: self.cloud.record(),
            router: self.router.record(),
            gateways: self.gateways.iter().map(|(site, host)| (site.clone(), host.record())).collect(),
            wans: self.wans.record(),
            cut: self.cut.clone(),
        }
    }
}
