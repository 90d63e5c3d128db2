//! What flanneld leaves behind on a node that is moved over from it.
//!
//! Its device, cni0, subnet.env and annotations are taken over as they are; its firewall rules are not, because
//! ours do the same and two sets of them masquerade twice. Those in nftables (its own tables, or iptables-nft's
//! chains) are removed; those of the old iptables cannot be seen from here and are only spoken of.

use crate::nft::Nft;
use std::fs;

/// Removes what can be removed, and says what was and what may be left. Never fails: the node works either way.
pub fn remove() {
    match Nft::open().and_then(|nft| nft.remove_flannels()) {
        Ok(removed) if removed.is_empty() => {}
        Ok(removed) => log::info!("removed what flanneld left: {}", removed.join(", ")),
        Err(e) => log::warn!("remove flanneld's rules from nftables: {e}"),
    }
    for (names, command) in
        [("/proc/net/ip_tables_names", "iptables-legacy"), ("/proc/net/ip6_tables_names", "ip6tables-legacy")]
    {
        if fs::read_to_string(names).is_ok_and(|tables| !tables.trim().is_empty()) {
            log::warn!(
                "this machine has legacy iptables rules; if flanneld ran here, look for its chains with \
                 `{command}-save | grep FLANNEL` and remove them"
            );
        }
    }
}
