//! The hardware address of a VXLAN device: the one thing that every peer keeps about this node, so it must
//! survive whatever happens to the node (flannel#1155, #1795, #1828: peers holding a MAC that is gone).

use crate::{
    mac::{Mac, first_bytes},
    record::Family,
};

/// What is known about a device's address.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Known {
    /// In the node's record.
    pub recorded: Option<Mac>,
    /// On the running device.
    pub running: Option<Mac>,
    /// In the node's own annotation, when the API server has been asked.
    pub published: Option<Mac>,
}

/// The address that the device shall have: recorded, else running, else published, else derived.
///
/// A running address that differs from the record is adopted only when it is also the published one: then flanneld
/// ran in between and peers use it. Otherwise somebody altered the device, which is put right.
#[must_use]
pub fn choose(known: Known, node_name: &str, family: Family) -> Mac {
    match (known.recorded, known.running, known.published) {
        (Some(_), Some(running), Some(published)) if running == published => running,
        (recorded, running, published) => {
            recorded.or(running).or(published).unwrap_or_else(|| derive(node_name, family))
        }
    }
}

/// The address of a node that has none yet: follows from its name, so that it is the same after a reinstallation
/// and another on every clone. Locally administered, unicast; 46 bits are enough for a cluster.
#[must_use]
pub fn derive(node_name: &str, family: Family) -> Mac {
    let device = match family {
        Family::V4 => "flannel",
        Family::V6 => "flannel-v6",
    };
    let mut bytes = first_bytes::<6>(format!("edgeflannel\0{device}\0{node_name}").as_bytes());
    bytes[0] = bytes[0] & 0xfc | 0x02;
    Mac(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const R: Mac = Mac([2, 0, 0, 0, 0, 1]);
    const K: Mac = Mac([2, 0, 0, 0, 0, 2]);
    const A: Mac = Mac([2, 0, 0, 0, 0, 3]);

    #[test]
    fn precedence() {
        let table = [
            (Some(R), Some(R), Some(R), R),
            (Some(R), None, None, R),
            (Some(R), Some(K), None, R),
            (Some(R), None, Some(A), R),
            (Some(R), Some(K), Some(A), R),
            // flanneld ran in between: it made the device and published it.
            (Some(R), Some(K), Some(K), K),
            (None, Some(K), Some(A), K),
            (None, Some(K), None, K),
            (None, None, Some(A), A),
            (None, None, None, derive("edge-1", Family::V4)),
        ];
        for (recorded, running, published, wanted) in table {
            let known = Known { recorded, running, published };
            assert_eq!(choose(known, "edge-1", Family::V4), wanted, "{known:?}");
        }
    }

    #[test]
    fn derived_addresses_never_change() {
        // Peers remember it across an upgrade and a reinstallation.
        assert_eq!(derive("edge-1", Family::V4).to_string(), "d6:81:a9:ab:80:81");
        assert_eq!(derive("edge-1", Family::V6).to_string(), "d2:56:ee:d7:c2:f6");
        for n in 0..1000 {
            let Mac([first, ..]) = derive(&format!("node-{n}"), Family::V4);
            assert_eq!(first & 3, 2, "locally administered, unicast");
        }
    }
}
