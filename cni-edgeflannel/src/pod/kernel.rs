//! Carries out the steps of a plan, and takes them back when one fails.
//!
//! Everything that can be decided has been decided in `plan`; here is one line per step. Looking is in `look`.

use super::{
    plan::{Former, Step, Undo, undo},
    wanted::Wanted,
};
use crate::{
    netlink::{self, Netlink, fine_if_gone, fine_if_there},
    netns::Netns,
    nft::Nft,
    sysctl::Sysctl,
};
use cni::Route;
use log::{debug, info, warn};
use std::{cell::Cell, fmt, io, thread, time::Duration};

/// How long a port may take until its bridge forwards to it. The kernel does it from a work queue, as a rule
/// within a millisecond.
const FORWARDING_LIMIT: Duration = Duration::from_millis(500);

/// Something that could not be done, with the operation.
#[derive(Debug)]
pub struct Error(pub(super) String);

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

impl From<netlink::Error> for Error {
    fn from(error: netlink::Error) -> Self {
        Self(error.to_string())
    }
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        Self(error.to_string())
    }
}

/// The node's side and the pod's, with a socket in each.
#[derive(Debug)]
pub struct Kernel {
    pub(super) node: Netlink,
    pub(super) pod: Netlink,
    netns: Netns,
    /// Numbers of the three devices, once known.
    pub(super) bridge: Cell<Option<u32>>,
    host: Cell<Option<u32>>,
    peer: Cell<Option<u32>>,
    /// The bridge had a carrier when it was looked at.
    pub(super) bridge_sends: Cell<bool>,
}

impl Kernel {
    /// Opens a socket on either side. Must be called in the node's namespace.
    ///
    /// # Errors
    /// When a socket cannot be had, or the namespace cannot be entered.
    pub fn open(netns: Netns) -> Result<Self, Error> {
        let node = Netlink::open()?;
        let pod = netns.within(Netlink::open)?;
        Ok(Self {
            node,
            pod,
            netns,
            bridge: Cell::default(),
            host: Cell::default(),
            peer: Cell::default(),
            bridge_sends: Cell::default(),
        })
    }

    /// Carries out the steps. When one fails, those before it are taken back, last first.
    ///
    /// # Errors
    /// The failure, after the way back.
    pub fn carry_out(&self, steps: &[Step], wanted: &Wanted) -> Result<(), Error> {
        for (done, step) in steps.iter().enumerate() {
            if let Err(error) = self.act(step, wanted) {
                for undo in steps[..done].iter().rev().filter_map(undo) {
                    self.take_back(&undo, wanted);
                }
                return Err(error);
            }
        }
        Ok(())
    }

    fn act(&self, step: &Step, wanted: &Wanted) -> Result<(), Error> {
        debug!("{step:?}");
        match step {
            Step::AddBridge(bridge) => {
                // Once a boot, not at every ADD.
                warn_without_br_netfilter();
                fine_if_there(self.node.add_bridge(bridge))?;
            }
            Step::SetBridge { mac, promiscuous } => {
                self.node.set_bridge(self.bridge(wanted)?, *mac, *promiscuous)?;
            }
            Step::DropGateway(cidr) => {
                info!(
                    "{}: {cidr} belongs to another subnet than this node's: taken away",
                    wanted.bridge.name
                );
                fine_if_gone(self.node.delete_address(self.bridge(wanted)?, *cidr))?;
            }
            Step::AddGateway(cidr) => fine_if_there(self.node.add_address(self.bridge(wanted)?, *cidr))?,
            Step::NodeSysctl(sysctl) => {
                if sysctl.ensure()? {
                    info!("set sysctl {sysctl}");
                }
            }
            Step::Masquerade(chain) => Nft::open()
                .and_then(|nft| nft.replace(chain))
                .map_err(|e| Error(format!("put masquerading rules into nftables: {e}")))?,
            Step::NoMasquerade(chain) => Nft::open()
                .and_then(|nft| nft.remove(chain))
                .map_err(|e| Error(format!("remove masquerading rules from nftables: {e}")))?,
            Step::DeleteLeftover(name) => fine_if_gone(self.node.delete_link(name))?,
            Step::Detach(former) => {
                warn!("{} still holds the address of this pod: taken off the bridge", former.name);
                fine_if_gone(self.node.detach(former.index))?;
            }
            Step::AddVeth(veth) => {
                let bridge = self.bridge(wanted)?;
                self.node.add_veth(veth, bridge, self.netns.as_raw_fd())?;
                // Lost to somebody who is faster than us: the next step says so.
                if let Some(host) = self.node.link(&veth.name).ok().flatten() {
                    self.host.set(Some(host.index));
                    self.peer.set(host.peer);
                }
            }
            Step::SetPort { hairpin, isolated, alias } => {
                let host = self.host(wanted)?;
                self.node.set_port(host, *hairpin, *isolated, alias.as_deref())?;
            }
            Step::Pin(mac) => self.node.pin(self.host(wanted)?, *mac)?,
            Step::PodSysctls(sysctls) => {
                self.netns.within(|| sysctls.iter().try_for_each(|sysctl| sysctl.ensure().map(drop)))?;
            }
            Step::PodUp => self.pod.up(self.peer(wanted)?)?,
            Step::PodAddress(cidr) => self.pod.add_address(self.peer(wanted)?, *cidr)?,
            Step::PodRoute(route) => self.add_route(self.peer(wanted)?, route)?,
            Step::Announce(mac) => {
                self.wait_until_forwarding(self.host(wanted)?, self.bridge(wanted)?)?;
                self.pod.set_mac(self.peer(wanted)?, *mac)?;
            }
        }
        Ok(())
    }

    /// When a pod's second interface has the default route too, the first keeps the traffic: IPv4 by order, IPv6
    /// by metric (1024 is the kernel's own).
    fn add_route(&self, peer: u32, route: &Route) -> Result<(), Error> {
        const INTERFACES: u32 = 16;
        let mut added = self.pod.add_route(peer, route);
        for behind in 1..INTERFACES {
            match added {
                Err(e) if e.is_there() && route.dst.is_ipv6() && route.priority.is_none() => {
                    let later = Route { priority: Some(1024 + behind), ..route.clone() };
                    added = self.pod.add_route(peer, &later);
                }
                _ => break,
            }
        }
        added.map_err(Error::from)
    }

    fn take_back(&self, undo: &Undo, wanted: &Wanted) {
        let taken_back = match undo {
            Undo::DeleteVeth(name) => fine_if_gone(self.node.delete_link(name)).map_err(Error::from),
            Undo::Attach(former) => self.attach(former, wanted),
        };
        if let Err(error) = taken_back {
            warn!("taking back a failed ADD: {error}");
        }
    }

    fn attach(&self, former: &Former, wanted: &Wanted) -> Result<(), Error> {
        self.node.attach(former.index, self.bridge(wanted)?)?;
        self.node.set_port(former.index, former.port.hairpin, former.port.isolated, None)?;
        self.node.pin(former.index, former.mac)?;
        Ok(())
    }

    /// Until then a frame from the pod is dropped, the announcement of its addresses first of all. What a chained
    /// plugin or the container does next finds the way open.
    fn wait_until_forwarding(&self, host: u32, bridge: u32) -> Result<(), Error> {
        const STEP: Duration = Duration::from_micros(100);
        let mut waited = Duration::ZERO;
        while waited < FORWARDING_LIMIT {
            if self.forwards(host)? && self.sends(bridge)? {
                debug!("forwarding after {waited:?}");
                return Ok(());
            }
            thread::sleep(STEP);
            waited += STEP;
        }
        // With spanning tree on, a port takes 30 s: not a reason to fail.
        warn!("the bridge does not forward to device {host} yet");
        Ok(())
    }

    /// A fresh port counts as forwarding until the kernel's work queue finds that the other end was not up yet, and
    /// again once it finds that it is: hence both.
    fn forwards(&self, host: u32) -> Result<bool, Error> {
        let link = self.node.link_at(host)?;
        Ok(link.is_some_and(|link| link.operational && link.port.is_some_and(|port| port.forwarding)))
    }

    /// With its first port the bridge itself gets a carrier; until the work queue has noticed, it drops what the
    /// node sends.
    fn sends(&self, bridge: u32) -> Result<bool, Error> {
        Ok(self.bridge_sends.get() || self.node.link_at(bridge)?.is_some_and(|link| link.operational))
    }

    fn bridge(&self, wanted: &Wanted) -> Result<u32, Error> {
        known(&self.bridge, &self.node, &wanted.bridge.name)
    }

    fn host(&self, wanted: &Wanted) -> Result<u32, Error> {
        known(&self.host, &self.node, &wanted.veth.name)
    }

    fn peer(&self, wanted: &Wanted) -> Result<u32, Error> {
        known(&self.peer, &self.pod, &wanted.veth.peer)
    }
}

/// The number of a device, looked up once.
fn known(number: &Cell<Option<u32>>, side: &Netlink, name: &str) -> Result<u32, Error> {
    if let Some(index) = number.get() {
        return Ok(index);
    }
    let link = side.link(name)?.ok_or_else(|| Error(format!("device {name} has vanished")))?;
    number.set(Some(link.index));
    Ok(link.index)
}

/// Whether the kernel passes bridged packets to netfilter, without which a pod cannot reach a service whose
/// backend is on its own node. A note in the log, since kube-proxy or the distribution may load the module yet.
fn warn_without_br_netfilter() {
    for key in ["net/bridge/bridge-nf-call-iptables", "net/bridge/bridge-nf-call-ip6tables"] {
        match Sysctl::new(key, "1").holds() {
            Ok(true) => {}
            Ok(false) => warn!("{key} is off: services with a backend on the same node may not answer"),
            Err(_) => {
                warn!("br_netfilter is not loaded: services with a backend on the same node may not answer");
                return;
            }
        }
    }
}
