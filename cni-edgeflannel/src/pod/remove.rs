//! Takes pods' interfaces away: one for DEL, those of forgotten attachments for GC.
//!
//! The names say everything, so nothing has to be remembered. What is already gone is fine.

use super::{kernel::Error, names};
use crate::{
    netlink::{Kind, Link, Netlink, fine_if_gone},
    netns::Netns,
};
use cni::{AttachmentId, NetworkName};
use log::{info, warn};
use std::path::Path;

/// Deletes the attachment's veth; the pod's end, its addresses and routes go with it.
///
/// # Errors
/// When the kernel refuses.
pub fn attachment(
    network: &NetworkName,
    at: &AttachmentId,
    bridge: &str,
    netns: Option<&Path>,
) -> Result<(), Error> {
    let node = Netlink::open()?;
    match node.delete_link(&names::host_veth(network, at)) {
        Ok(()) => Ok(()),
        Err(e) if e.is_gone() => stranger(&node, at, bridge, netns),
        Err(e) => Err(e.into()),
    }
}

/// Deletes the pod's interface if another plugin (flannel with the reference bridge, before a migration) made it:
/// the host's end has a name that we do not know, so it is found from inside the pod. The path may by now lead
/// to somebody else's namespace, so only a veth whose other end is a port of our bridge, and is not marked as
/// ours, will do.
fn stranger(node: &Netlink, at: &AttachmentId, bridge: &str, netns: Option<&Path>) -> Result<(), Error> {
    let Some(netns) = netns.and_then(|path| Netns::open(path).ok()) else { return Ok(()) };
    if netns.is_current()? {
        return Ok(());
    }
    // No namespace at all: the path is a plain file that was left behind.
    let Ok(pod) = netns.within(Netlink::open) else { return Ok(()) };
    let ifname = at.ifname.as_str();
    let Some(Link { kind: Kind::Veth, peer: Some(peer), .. }) = pod.link(ifname)? else {
        return Ok(());
    };
    let (Some(bridge), Some(host)) = (node.link(bridge)?, node.link_at(peer)?) else {
        return Ok(());
    };
    let ours = host.alias.as_deref().is_some_and(|alias| alias.starts_with(names::OWNER));
    if host.kind != Kind::Veth || host.controller != Some(bridge.index) || ours {
        return Ok(());
    }
    info!("{} was not made by us: deleted from inside the pod", host.name);
    Ok(fine_if_gone(pod.delete_link(ifname))?)
}

/// Deletes the veths of this network's attachments that are not in `valid`. The alias says whose a veth is.
///
/// # Errors
/// The first refusal, after all have been tried.
pub fn all_but(network: &NetworkName, valid: &[AttachmentId]) -> Result<(), Error> {
    let node = Netlink::open()?;
    let mut failure = None;
    for link in node.links()? {
        let Some(at) = link.alias.as_deref().and_then(|alias| names::attachment_of(network, alias)) else {
            continue;
        };
        if valid.contains(&at) {
            continue;
        }
        warn!("{}: the runtime does not know container {} any more: deleted", link.name, at.container_id);
        if let Err(e) = fine_if_gone(node.delete_link(&link.name)) {
            failure.get_or_insert(e);
        }
    }
    failure.map_or(Ok(()), |e| Err(e.into()))
}
