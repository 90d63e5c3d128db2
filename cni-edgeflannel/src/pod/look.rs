//! What the kernel shows of a pod and its node: for a plan, for CHECK, for STATUS. Changes nothing.

use super::{
    check::{Expected, Observed},
    kernel::{Error, Kernel},
    plan::{Former, Seen, SeenBridge},
    wanted::Wanted,
};
use crate::{
    mac::Mac,
    netlink::{Kind, Link, Netlink},
    nft::Nft,
};
use log::debug;

impl Kernel {
    /// Whether the pod has a device of this name.
    ///
    /// # Errors
    /// When the kernel refuses to say.
    pub fn pod_has(&self, name: &str) -> Result<bool, Error> {
        Ok(self.pod.link(name)?.is_some())
    }

    /// The bridge.
    ///
    /// # Errors
    /// When the name belongs to another kind of device, or the kernel refuses to say.
    pub fn see_bridge(&self, name: &str) -> Result<Option<SeenBridge>, Error> {
        let link = self.node.link(name)?;
        refuse_other_kind(name, link.as_ref())?;
        let Some(link) = link else { return Ok(None) };
        self.bridge.set(Some(link.index));
        self.bridge_sends.set(link.operational);
        let addresses = self.node.addresses(link.index)?;
        let Link { index, mac, mtu, up, promiscuous, .. } = link;
        Ok(Some(SeenBridge { index, mac, mtu, up, promiscuous, addresses }))
    }

    /// The rest of what a plan needs to know.
    ///
    /// # Errors
    /// When the kernel refuses to say, or another pod has the hardware address that was asked for.
    pub fn see(&self, wanted: &Wanted, bridge: Option<SeenBridge>) -> Result<Seen, Error> {
        let leftover = self.node.link(&wanted.veth.name)?.is_some();
        let former = match &bridge {
            Some(bridge) => self.former(wanted, bridge.index)?,
            None => None,
        };
        // A kernel without nftables has no rules. If some are wanted, putting them there will say so.
        let rules = Nft::open().and_then(|nft| nft.rules(&wanted.masquerade_chain)).unwrap_or_else(|e| {
            debug!("nftables: {e}");
            Vec::new()
        });
        Ok(Seen { bridge, leftover, former, rules })
    }

    /// The port that holds the pod's address. Whoever has a hardware address that follows from the IP address
    /// has that IP address, which IPAM has just given to us, so it is the pod's former sandbox. A former sandbox
    /// that another plugin made has another one: the node's neighbour table knows it.
    fn former(&self, wanted: &Wanted, bridge: u32) -> Result<Option<Former>, Error> {
        let mac = wanted.veth.peer_mac;
        let by_mac = match self.node.port_of(bridge, mac) {
            Ok(port) => port.map(|port| (port, mac)),
            Err(e) if e.errno() == nix::libc::EOPNOTSUPP => None, // before kernel 5.0
            Err(e) => return Err(e.into()),
        };
        let mut by_address = None;
        for cidr in &wanted.addresses {
            let Some(mac) = self.node.neighbour_mac(bridge, cidr.ip())? else { continue };
            if let Some(port) = self.node.port_of(bridge, mac)? {
                by_address = Some((port, mac));
            }
        }
        let (index, mac) = match (by_mac, by_address) {
            (Some((port, mac)), Some((other, _))) if wanted.mac_asked && port != other => {
                return Err(self.taken(port, mac));
            }
            (Some((port, mac)), None) if wanted.mac_asked => return Err(self.taken(port, mac)),
            (Some(found), _) | (None, Some(found)) => found,
            (None, None) => return Ok(None),
        };
        let Some(Link { name, port: Some(port), kind: Kind::Veth, .. }) = self.node.link_at(index)? else {
            return Ok(None);
        };
        // What is left of this very attachment is deleted, not detached.
        Ok((name != wanted.veth.name).then_some(Former { index, name, port, mac }))
    }

    fn taken(&self, port: u32, mac: Mac) -> Error {
        let name = self.node.link_at(port).ok().flatten().map_or_else(|| port.to_string(), |link| link.name);
        Error(format!("the hardware address {mac} that was asked for is in use behind {name}"))
    }

    /// Everything that CHECK compares.
    ///
    /// # Errors
    /// When the kernel refuses to say.
    pub fn observe(&self, expected: &Expected) -> Result<Observed, Error> {
        let pod = self.pod.link(&expected.pod.0)?;
        let (mut addresses, mut routes) = (Vec::new(), Vec::new());
        if let Some(pod) = &pod {
            addresses = self.pod.addresses(pod.index)?.into_iter().map(|address| address.cidr).collect();
            for v4 in [true, false] {
                if expected.addresses.iter().any(|cidr| cidr.is_ipv4() == v4) {
                    routes.extend(self.pod.routes(pod.index, v4)?);
                }
            }
        }
        let rules = match &expected.masquerade {
            Some(chain) => Nft::open()
                .and_then(|nft| nft.rules(&chain.name))
                .map_err(|e| Error(format!("read nftables rules: {e}")))?,
            None => Vec::new(),
        };
        let mut unset = Vec::new();
        for sysctl in &expected.forwarding {
            if !sysctl.holds()? {
                unset.push(sysctl.clone());
            }
        }
        Ok(Observed {
            bridge: self.see_bridge(&expected.bridge.0)?,
            host: self.node.link(&expected.host)?,
            pod,
            addresses,
            routes,
            rules,
            unset,
        })
    }
}

/// Whether pods could become ports of the bridge: it is one, or can be made.
///
/// # Errors
/// When the name belongs to another kind of device, or the kernel refuses to say.
pub fn bridge_is_usable(name: &str) -> Result<(), Error> {
    refuse_other_kind(name, Netlink::open()?.link(name)?.as_ref())
}

fn refuse_other_kind(name: &str, link: Option<&Link>) -> Result<(), Error> {
    match link {
        Some(link) if link.kind != Kind::Bridge => {
            Err(Error(format!("{name} exists and is not a bridge; name another in \"bridge\"")))
        }
        _ => Ok(()),
    }
}
