//! From what is heard of the nodes to what the record says about the peers.
//!
//! Additions and alterations are taken as they come, even from a list that breaks off; removals only when the API
//! server states them or a complete list is believed ([`super::believe`]). A node that is merely unclear about
//! itself keeps what was known. Pure: the record is altered in memory, the caller writes it and acts.

use super::{
    annotations::{Claim, Keys, Node, read_peer},
    believe::Belief,
    watch::Heard,
};
use crate::record::{Changes, Peer, PeerEnd, Record};
use std::{
    collections::{BTreeMap, HashSet},
    time::Instant,
};

/// What is known about the cluster beside the record.
#[derive(Debug)]
pub struct Follower {
    keys: Keys,
    own_name: String,
    /// Our own Node, as last heard.
    own: Option<Node>,
    /// The list that is being told.
    listing: Option<Listing>,
    belief: Belief,
    ask_again: Option<Instant>,
    unclear: BTreeMap<String, String>,
}

#[derive(Debug, Default)]
struct Listing {
    names: HashSet<String>,
    claim: u64,
}

/// What the caller has to look at.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Noted {
    /// Our own Node was heard.
    pub own: bool,
    /// A list was completed.
    pub listed: bool,
}

impl Follower {
    /// Nothing heard yet.
    #[must_use]
    pub fn new(keys: Keys, own_name: &str) -> Self {
        Self {
            keys,
            own_name: own_name.to_owned(),
            own: None,
            listing: None,
            belief: Belief::default(),
            ask_again: None,
            unclear: BTreeMap::new(),
        }
    }

    /// Our own Node, as last heard.
    #[must_use]
    pub fn own(&self) -> Option<&Node> {
        self.own.as_ref()
    }

    /// When a complete list should be asked for, to confirm what the last one said.
    #[must_use]
    pub fn ask_again(&self) -> Option<Instant> {
        self.ask_again
    }

    /// Whether that time has come; asked once.
    pub fn take_question(&mut self, now: Instant) -> bool {
        self.ask_again.take_if(|at| *at <= now).is_some()
    }

    /// A list has begun and is not complete: what it adds can wait for its end.
    #[must_use]
    pub fn is_listing(&self) -> bool {
        self.listing.is_some()
    }

    /// Nodes that are unclear about themselves, and in what way.
    #[must_use]
    pub fn unclear(&self) -> &BTreeMap<String, String> {
        &self.unclear
    }

    /// Takes in one thing that was heard.
    pub fn hear(&mut self, heard: Heard, record: &mut Record, changes: &mut Changes, now: Instant) -> Noted {
        let mut noted = Noted::default();
        match heard {
            Heard::Listing => {
                self.listing = Some(Listing { names: HashSet::new(), claim: record.next_claim() });
            }
            Heard::Node(node) => {
                if let Some(listing) = &mut self.listing {
                    listing.names.insert(node.name.clone());
                }
                if node.name == self.own_name {
                    self.own = Some(*node);
                    noted.own = true;
                } else {
                    self.belief.seen(&node.name);
                    self.peer(&node, record, changes);
                }
            }
            Heard::Listed => {
                if let Some(listing) = self.listing.take() {
                    self.complete(&listing, record, changes, now);
                    noted.listed = true;
                }
            }
            Heard::Deleted(name) => {
                self.unclear.remove(&name);
                if name == self.own_name {
                    log::warn!("the API server has deleted our Node {name}; the overlay stays");
                    self.own = None;
                } else if record.peers.contains_key(&name) {
                    log::info!("peer {name} is deleted");
                    record.remove_peer(&name, changes);
                }
            }
            Heard::Contact => {}
            Heard::Lost(_) => self.listing = None,
        }
        noted
    }

    fn peer(&mut self, node: &Node, record: &mut Record, changes: &mut Changes) {
        let known = record.peers.get(&node.name);
        match read_peer(&self.keys, node, &record.node.networks) {
            Claim::Peer { mut ends, unclear } => {
                for (family, _) in unclear.iter() {
                    *ends.slot(family) = known.and_then(|known| known.ends.get(family)).copied();
                }
                let why: Vec<String> =
                    unclear.iter().map(|(family, why)| format!("{family}: {why}")).collect();
                self.note_unclear(&node.name, (!why.is_empty()).then(|| why.join("; ")));
                if !ends.is_empty() {
                    // Asking all peers for the latest claim is dear, and heartbeats claim nothing.
                    let claims = |(family, end): (_, &PeerEnd)| {
                        let before = known.and_then(|known| known.ends.get(family));
                        before.is_none_or(|before| before.subnet != end.subnet)
                    };
                    let claim = match &self.listing {
                        Some(listing) => listing.claim,
                        None if ends.iter().any(claims) => record.next_claim(),
                        None => 0,
                    };
                    record.put_peer(Peer { name: node.name.clone(), ends }, claim, changes);
                } else if known.is_some() {
                    log::info!("peer {} has no subnet of our families any more", node.name);
                    record.remove_peer(&node.name, changes);
                }
            }
            Claim::NotOurs(why) => {
                self.note_unclear(&node.name, None);
                if known.is_some() {
                    log::info!("peer {} takes part no more: {why}", node.name);
                    record.remove_peer(&node.name, changes);
                }
            }
            Claim::Silent => {
                let why = known.map(|_| "its annotations are gone; what they said before stays".to_owned());
                self.note_unclear(&node.name, why);
            }
        }
    }

    /// Reports each unclear peer once, and again when it is unclear in another way.
    fn note_unclear(&mut self, name: &str, why: Option<String>) {
        match why {
            Some(why) => {
                let before = self.unclear.insert(name.to_owned(), why.clone());
                if before.as_deref() != Some(why.as_str()) {
                    log::warn!("peer {name} is unclear about itself: {why}");
                }
            }
            None => {
                self.unclear.remove(name);
            }
        }
    }

    fn complete(&mut self, listing: &Listing, record: &mut Record, changes: &mut Changes, now: Instant) {
        let had_own = listing.names.contains(&self.own_name);
        if !had_own {
            log::warn!("the API server's list lacks our own Node {}; nothing is removed", self.own_name);
            self.own = None;
        }
        let known = record.peers.keys().map(String::as_str);
        let verdict = self.belief.complete_list(known, |name| listing.names.contains(name), had_own, now);
        if verdict.ask_again.is_some() {
            log::warn!(
                "the API server's list lacks {} of {} known peers; they stay until a second list says the same",
                verdict.doubted,
                record.peers.len()
            );
        }
        self.ask_again = verdict.ask_again;
        for name in &verdict.remove {
            log::info!("peer {name} is gone from the list");
            record.remove_peer(name, changes);
        }
        self.unclear.retain(|name, _| listing.names.contains(name));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::PerFamily;
    use std::time::Duration;

    fn node(name: &str, index: u8) -> Node {
        let key = |name: &str| format!("flannel.alpha.coreos.com/{name}");
        Node {
            name: name.into(),
            annotations: [
                (key("kube-subnet-manager"), "true".into()),
                (key("backend-type"), "vxlan".into()),
                (key("backend-data"), format!(r#"{{"VNI":1,"VtepMAC":"02:00:00:00:00:{index:02x}"}}"#)),
                (key("public-ip"), format!("192.168.0.{index}")),
            ]
            .into(),
            pod_cidrs: vec![format!("10.244.{index}.0/24")],
            network_unavailable: None,
        }
    }

    fn annotate(mut node: Node, name: &str, value: Option<&str>) -> Node {
        let key = format!("flannel.alpha.coreos.com/{name}");
        match value {
            Some(value) => node.annotations.insert(key, value.into()),
            None => node.annotations.remove(&key),
        };
        node
    }

    struct World {
        follower: Follower,
        record: Record,
        start: Instant,
        seconds: u64,
    }

    impl World {
        fn new() -> Self {
            let mut record = Record::default();
            record.node.node_name = "me".into();
            record.node.networks = PerFamily { v4: "10.244.0.0/16".parse().ok(), v6: None };
            let keys = Keys::new("flannel.alpha.coreos.com").unwrap();
            Self { follower: Follower::new(keys, "me"), record, start: Instant::now(), seconds: 0 }
        }

        fn hear(&mut self, heard: Heard) -> (Noted, usize) {
            let mut changes = Changes::default();
            let now = self.start + Duration::from_secs(self.seconds);
            let noted = self.follower.hear(heard, &mut self.record, &mut changes, now);
            (noted, changes.peers.len())
        }

        fn node(&mut self, node: Node) -> usize {
            self.hear(Heard::Node(Box::new(node))).1
        }

        fn list(&mut self, names: &[(&str, u8)]) -> usize {
            self.hear(Heard::Listing);
            let heard: usize = names.iter().map(|(name, index)| self.node(node(name, *index))).sum();
            heard + self.hear(Heard::Listed).1
        }

        fn peers(&self) -> String {
            self.record.peers.keys().cloned().collect::<Vec<_>>().join(" ")
        }
    }

    #[test]
    fn list_then_changes() {
        let mut world = World::new();
        world.list(&[("me", 1), ("a", 2), ("b", 3)]);
        assert_eq!(world.peers(), "a b");
        assert_eq!(world.follower.own().unwrap().name, "me");
        assert_eq!(world.node(node("a", 2)), 0, "a heartbeat changes nothing");
        assert_eq!(world.node(annotate(node("a", 2), "public-ip", Some("192.168.0.99"))), 1);
        assert_eq!(
            world.record.peers["a"].ends.v4.unwrap().public_ip,
            "192.168.0.99".parse::<std::net::IpAddr>().unwrap()
        );
        assert_eq!(world.hear(Heard::Deleted("a".into())).1, 1);
        assert_eq!(world.hear(Heard::Deleted("nobody".into())).1, 0);
        assert_eq!(world.peers(), "b");
        let (noted, _) = world.hear(Heard::Node(Box::new(node("me", 1))));
        assert!(noted.own && !world.follower.is_listing());
    }

    #[test]
    fn three_nodes_replaced_while_we_were_away() {
        let mut world = World::new();
        world.list(&[("me", 1), ("a", 2), ("b", 3), ("c", 4), ("d", 5), ("e", 6)]);
        world.hear(Heard::Lost("away".into()));
        world.seconds = 24 * 3600;
        // The new ones got the old ones' subnets.
        world.list(&[("me", 1), ("d", 5), ("e", 6), ("x", 2), ("y", 3), ("z", 4)]);
        assert_eq!(world.peers(), "d e x y z");
    }

    #[test]
    fn what_is_unclear_stays_and_what_is_said_counts() {
        for broken in [Some("{"), None] {
            let mut world = World::new();
            world.list(&[("me", 1), ("a", 2)]);
            let before = world.record.clone();
            assert_eq!(world.node(annotate(node("a", 2), "backend-data", broken)), 0);
            assert_eq!(world.record, before);
            assert!(world.follower.unclear().contains_key("a"));
            world.node(node("a", 2));
            assert!(world.follower.unclear().is_empty());
        }
        for (name, value) in [("kube-subnet-manager", "false"), ("backend-type", "host-gw")] {
            let mut world = World::new();
            world.list(&[("me", 1), ("a", 2)]);
            world.node(annotate(node("a", 2), name, Some(value)));
            assert_eq!(world.peers(), "", "{name}");
        }
        let mut world = World::new();
        world.list(&[("me", 1), ("a", 2)]);
        world.node(Node { annotations: BTreeMap::new(), ..node("a", 2) });
        assert_eq!(world.peers(), "a", "annotations that vanish say nothing");
        world.node(annotate(node("b", 3), "backend-data", Some("{")));
        assert_eq!(world.peers(), "a", "nothing was known of b");
    }

    #[test]
    fn a_list_that_breaks_off_removes_nothing() {
        let mut world = World::new();
        world.list(&[("me", 1), ("a", 2), ("b", 3)]);
        world.hear(Heard::Listing);
        world.node(node("c", 4));
        world.hear(Heard::Lost("truncated".into()));
        assert_eq!(world.peers(), "a b c");
        assert!(!world.hear(Heard::Listed).0.listed, "an end without a beginning is none");
        assert_eq!(world.peers(), "a b c");
    }

    #[test]
    fn an_empty_list_and_a_list_of_one() {
        let mut world = World::new();
        world.list(&[("me", 1), ("a", 2), ("b", 3)]);
        for seconds in [10, 100, 1000] {
            world.seconds = seconds;
            world.list(&[]);
            assert_eq!((world.peers().as_str(), world.follower.ask_again()), ("a b", None));
        }
        world.seconds = 2000;
        world.list(&[("me", 1)]);
        assert_eq!(world.follower.ask_again(), Some(world.start + Duration::from_secs(2060)));
        assert_eq!(world.peers(), "a b");
        world.seconds = 2060;
        world.list(&[("me", 1)]);
        assert_eq!((world.peers().as_str(), world.follower.ask_again()), ("", None));
    }

    #[test]
    fn our_own_node_deleted() {
        let mut world = World::new();
        world.list(&[("me", 1), ("a", 2)]);
        let before = world.record.clone();
        world.hear(Heard::Deleted("me".into()));
        assert!(world.follower.own().is_none());
        assert_eq!(world.record, before);
    }

    /// flanneld drops such an update, because the other family is as it was (flannel#1788, k3s#9957).
    #[test]
    fn only_one_family_changes() {
        let mut world = World::new();
        world.record.node.networks.v6 = "fd00:10:244::/56".parse().ok();
        let mut dual = annotate(node("a", 2), "public-ipv6", Some("fd00:1::2"));
        dual = annotate(dual, "backend-v6-data", Some(r#"{"VNI":1,"VtepMAC":"02:00:00:00:06:02"}"#));
        dual.pod_cidrs.push("fd00:10:244:2::/64".into());
        world.node(dual.clone());
        let v4 = world.record.peers["a"].ends.v4;
        assert_eq!(world.node(annotate(dual.clone(), "public-ipv6", Some("fd00:1::99"))), 1);
        let ends = world.record.peers["a"].ends;
        assert_eq!((ends.v4, ends.v6.unwrap().public_ip), (v4, "fd00:1::99".parse().unwrap()));
        // A family that becomes unclear does not hold the other one up.
        let broken = annotate(dual, "backend-v6-data", Some("null"));
        assert_eq!(world.node(annotate(broken, "public-ip", Some("192.168.0.77"))), 1);
        let ends = world.record.peers["a"].ends;
        assert_eq!(ends.v4.unwrap().public_ip, "192.168.0.77".parse::<std::net::IpAddr>().unwrap());
        assert_eq!(ends.v6.unwrap().public_ip, "fd00:1::99".parse::<std::net::IpAddr>().unwrap());
    }

    #[test]
    fn claims_of_one_list_are_equally_old() {
        let mut world = World::new();
        world.list(&[("me", 1), ("b", 3), ("a", 2)]);
        world.node(node("c", 4));
        let since = |name: &str| world.record.peers[name].ends.v4.unwrap().since;
        assert_eq!((since("a"), since("b"), since("c")), (1, 1, 2));
    }
}
