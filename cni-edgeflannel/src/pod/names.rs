//! How the host side of a pod is named, so that DEL and GC need no memory.
//!
//! The veth's name and hardware address follow from network, container and interface; the alias says the
//! same three things in the open, for GC and for a person who runs `ip link`.

use crate::mac::{Mac, first_bytes};
use cni::{AttachmentId, ContainerId, IfName, NetworkName};

/// Every alias of ours starts with this and the network's name.
pub(super) const OWNER: &str = "edgeflannel";

/// IFALIASZ of `linux/if.h`, less the closing zero byte.
const ALIAS_MAX: usize = 255;

/// The host end of an attachment's veth: `veth` and eleven hexadecimal digits, 15 bytes in all, as long as a
/// name may be.
#[must_use]
pub fn host_veth(network: &NetworkName, at: &AttachmentId) -> String {
    let digest: [u8; 6] = first_bytes(format!("{network}\0{}\0{}", at.container_id, at.ifname).as_bytes());
    let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("veth{}", &hex[..11])
}

/// The hardware address of that end. The kernel would choose a random one, unknown until the veth is there.
#[must_use]
pub fn host_mac(host_veth: &str) -> Mac {
    Mac::of_name(host_veth)
}

/// The alias of that end, by which GC knows whose it is. `None` when the names are too long for the kernel;
/// such a veth is removed by its DEL, but not by GC.
#[must_use]
pub fn alias(network: &NetworkName, at: &AttachmentId) -> Option<String> {
    let alias = format!("{OWNER}:{network}:{}:{}", at.container_id, at.ifname);
    (alias.len() <= ALIAS_MAX).then_some(alias)
}

/// The attachment that an alias names, if it is one of this network's. None of the names may contain a `:`.
#[must_use]
pub fn attachment_of(network: &NetworkName, alias: &str) -> Option<AttachmentId> {
    let [owner, of, container, ifname] = alias.split(':').collect::<Vec<_>>()[..] else {
        return None;
    };
    if owner != OWNER || of != network.as_str() {
        return None;
    }
    let container_id = ContainerId::parse(container).ok()?;
    Some(AttachmentId { container_id, ifname: IfName::parse(ifname).ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(container: &str, ifname: &str) -> AttachmentId {
        AttachmentId {
            container_id: ContainerId::parse(container).unwrap(),
            ifname: IfName::parse(ifname).unwrap(),
        }
    }

    fn net(name: &str) -> NetworkName {
        NetworkName::parse(name).unwrap()
    }

    #[test]
    fn names_must_never_change() {
        // A DEL after an upgrade has to find what the version before made.
        assert_eq!(host_veth(&net("cbr0"), &at("abc", "eth0")), "veth422afc73dbf");
        assert_eq!(alias(&net("cbr0"), &at("abc", "eth0")).unwrap(), "edgeflannel:cbr0:abc:eth0");
    }

    #[test]
    fn each_part_counts() {
        let one = host_veth(&net("a"), &at("b", "c"));
        assert_eq!(one.len(), IfName::MAX);
        for other in [("x", "b", "c"), ("a", "x", "c"), ("a", "b", "x"), ("ab", "b", "c")] {
            assert_ne!(one, host_veth(&net(other.0), &at(other.1, other.2)));
        }
    }

    #[test]
    fn too_long_for_an_alias() {
        assert_eq!(alias(&net(&"n".repeat(200)), &at(&"c".repeat(64), "eth0")), None);
        assert!(alias(&net(&"n".repeat(160)), &at(&"c".repeat(64), "eth0")).is_some());
    }

    #[test]
    fn aliases_of_others() {
        for foreign in [
            "",
            "edgeflannel",
            "edgeflannel:cbr1:abc:eth0",
            "other:cbr0:abc:eth0",
            "edgeflannel:cbr0:a:b:c",
            "edgeflannel:cbr0::eth0",
            "edgeflannel:cbr0:abc:",
        ] {
            assert_eq!(attachment_of(&net("cbr0"), foreign), None, "{foreign}");
        }
    }

    proptest! {
        #[test]
        fn an_alias_leads_back(network in "[a-z0-9][a-z0-9_.-]{0,20}", container in "[a-f0-9]{1,64}",
                               ifname in "[a-z0-9.@-]{3,15}") {
            let (network, at) = (net(&network), at(&container, &ifname));
            prop_assert_eq!(attachment_of(&network, &alias(&network, &at).unwrap()), Some(at));
        }
    }
}
