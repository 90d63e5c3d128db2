//! Against what flanneld 0.28.10 writes and accepts (facts D2).

use super::*;

const PREFIX: &str = "flannel.alpha.coreos.com";

fn keys() -> Keys {
    Keys::new(PREFIX).unwrap()
}

fn node(pod_cidrs: &[&str], annotations: &[(&str, &str)]) -> Node {
    Node {
        name: "n".into(),
        annotations: annotations
            .iter()
            .map(|(name, value)| (format!("{PREFIX}/{name}"), (*value).into()))
            .collect(),
        pod_cidrs: pod_cidrs.iter().map(|cidr| (*cidr).into()).collect(),
        network_unavailable: None,
    }
}

fn networks() -> PerFamily<IpNetwork> {
    PerFamily { v4: "10.244.0.0/16".parse().ok(), v6: "fd00:10:244::/56".parse().ok() }
}

/// As `kubectl get node -o yaml` showed it under flanneld.
fn dual() -> Node {
    node(
        &["10.244.2.0/24", "fd00:10:244:2::/64"],
        &[
            ("kube-subnet-manager", "true"),
            ("backend-type", "vxlan"),
            ("backend-data", r#"{"VNI":1,"VtepMAC":"12:c6:65:89:b4:e3"}"#),
            ("backend-v6-data", r#"{"VNI":1,"VtepMAC":"12:c6:65:89:b4:e4"}"#),
            ("public-ip", "192.168.0.2"),
            ("public-ipv6", "fd00:1::2"),
        ],
    )
}

fn without(mut node: Node, name: &str) -> Node {
    node.annotations.remove(&format!("{PREFIX}/{name}")).unwrap();
    node
}

fn with(mut node: Node, name: &str, value: &str) -> Node {
    node.annotations.insert(format!("{PREFIX}/{name}"), value.into());
    node
}

fn read(node: &Node) -> (PerFamily<PeerEnd>, PerFamily<String>) {
    match read_peer(&keys(), node, &networks()) {
        Claim::Peer { ends, unclear } => (ends, unclear),
        other => panic!("{other:?}"),
    }
}

#[test]
fn prefixes() {
    let key = |prefix: &str| Keys::new(prefix).map(|keys| keys.key("public-ip"));
    assert_eq!(key("flannel.alpha.coreos.com").unwrap(), "flannel.alpha.coreos.com/public-ip");
    assert_eq!(key("flannel.alpha.coreos.com/").unwrap(), "flannel.alpha.coreos.com/public-ip");
    assert_eq!(key("example.com/edge").unwrap(), "example.com/edge-public-ip");
    assert_eq!(key("example.com/edge-").unwrap(), "example.com/edge-public-ip");
    for bad in ["", "flannel", "a.b/c/d", "A.b", "a..b", "a.b/c d", "/x"] {
        assert!(key(bad).is_err(), "{bad}");
    }
}

#[test]
fn only_what_may_be_flannels_is_kept() {
    for key in dual().annotations.keys() {
        assert!(may_matter(key), "{key}");
    }
    assert!(may_matter("example.com/edge-public-ip") && may_matter("a.b/node-public-ipv6"));
    for other in
        ["node.alpha.kubernetes.io/ttl", "public-ip", "a.b/my-public-ip-list", "k8s.io/initial-events-end"]
    {
        assert!(!may_matter(other), "{other}");
    }
}

#[test]
fn a_peer_of_two_families() {
    let (ends, unclear) = read(&dual());
    assert!(unclear.is_empty());
    let v4 = ends.v4.unwrap();
    assert_eq!((v4.subnet, v4.public_ip), ("10.244.2.0/24".parse().unwrap(), "192.168.0.2".parse().unwrap()));
    assert_eq!(v4.vtep_mac.to_string(), "12:c6:65:89:b4:e3");
    assert_eq!(ends.v6.unwrap().vtep_mac.to_string(), "12:c6:65:89:b4:e4");
}

#[test]
fn only_families_of_ours_are_read() {
    let networks = PerFamily { v6: None, ..networks() };
    let Claim::Peer { ends, unclear } = read_peer(&keys(), &without(dual(), "backend-v6-data"), &networks)
    else {
        panic!()
    };
    assert!(ends.v4.is_some() && ends.v6.is_none() && unclear.is_empty());
}

#[test]
fn what_a_known_peer_says_is_gone_and_what_is_only_unclear() {
    let unclear_v4 = |node: Node| {
        let (ends, unclear) = read(&node);
        assert!(ends.v4.is_none() && ends.v6.is_some(), "{node:?}");
        unclear.v4.unwrap()
    };
    for broken in [
        "",
        "null",
        "{}",
        "{",
        r#"{"VtepMAC":"x"}"#,
        r#"{"VtepMAC":"ff:ff:ff:ff:ff:ff"}"#,
        "[]",
        r#"{"VtepMAC":1}"#,
    ] {
        unclear_v4(with(dual(), "backend-data", broken));
    }
    for broken in ["", "x", "fd00::1", "0.0.0.0", "127.0.0.1", "224.0.0.1"] {
        unclear_v4(with(dual(), "public-ip", broken));
    }
    unclear_v4(without(dual(), "public-ip"));
    unclear_v4(without(dual(), "backend-data"));

    // It has subnets, none of them IPv6: that family is gone. No subnet at all: it is not known yet.
    let (ends, unclear) = read(&Node { pod_cidrs: vec!["10.244.2.0/24".into()], ..dual() });
    assert!(ends.v4.is_some() && ends.v6.is_none() && unclear.is_empty());
    for cidrs in [&[][..], &["10.244.2.0/24", "10.244.3.0/24"], &["10.244.2.0"], &["x/24"]] {
        let (ends, unclear) =
            read(&Node { pod_cidrs: cidrs.iter().map(|c| (*c).into()).collect(), ..dual() });
        assert!(ends.is_empty() && unclear.v4.is_some() && unclear.v6.is_some(), "{cidrs:?}");
    }
}

#[test]
fn who_takes_part() {
    let claim = |node: &Node| read_peer(&keys(), node, &networks());
    assert!(matches!(claim(&with(dual(), "kube-subnet-manager", "false")), Claim::NotOurs(_)));
    assert!(matches!(claim(&with(dual(), "backend-type", "host-gw")), Claim::NotOurs(_)));
    assert_eq!(claim(&without(dual(), "kube-subnet-manager")), Claim::Silent);
    assert_eq!(claim(&without(dual(), "backend-type")), Claim::Silent);
    assert_eq!(claim(&Node { annotations: BTreeMap::new(), ..dual() }), Claim::Silent);
    assert_eq!(read_peer(&Keys::new("example.com").unwrap(), &dual(), &networks()), Claim::Silent);
}

#[test]
fn go_reads_keys_in_any_case_and_ignores_the_rest() {
    let node = with(dual(), "backend-data", r#"{"vtepmac":"AA-BB-CC-DD-EE-F0","VNI":7,"x":[1]}"#);
    assert_eq!(read(&node).0.v4.unwrap().vtep_mac.to_string(), "aa:bb:cc:dd:ee:f0");
}

fn record() -> NodeRecord {
    let peer = read(&dual()).0;
    NodeRecord {
        subnets: peer.map(|_, end| end.subnet),
        vtep_macs: peer.map(|_, end| end.vtep_mac),
        public_ips: peer.map(|_, end| end.public_ip),
        ..NodeRecord::default()
    }
}

#[test]
fn written_as_flanneld_writes_it() {
    assert_eq!(written(&keys(), &record()), dual().annotations);
    let v4_only = NodeRecord { subnets: PerFamily { v6: None, ..record().subnets }, ..record() };
    assert_eq!(written(&keys(), &v4_only).len(), 4);
    assert!(written(&keys(), &NodeRecord::default()).is_empty(), "nothing known, nothing said");
}

#[test]
fn patched_only_where_it_differs() {
    let want = written(&keys(), &record());
    let now = "2026-01-01T00:00:00Z";
    let there = Node { network_unavailable: Some("False".into()), ..dual() };
    assert_eq!(patch(&there, &want, true, now), None);
    assert_eq!(patch(&Node { network_unavailable: None, ..there.clone() }, &want, false, now), None);
    let moved = with(there.clone(), "public-ip", "192.168.0.9");
    assert_eq!(
        patch(&moved, &want, true, now),
        Some(json!({"metadata": {"annotations": {"flannel.alpha.coreos.com/public-ip": "192.168.0.2"}}}))
    );
    // A Node without any annotation, on which flanneld panics.
    let bare = Node { annotations: BTreeMap::new(), network_unavailable: Some("True".into()), ..there };
    let patch = patch(&bare, &want, true, now).unwrap();
    assert_eq!(patch["metadata"]["annotations"].as_object().unwrap().len(), 6);
    assert_eq!(patch["status"]["conditions"][0]["reason"], "FlannelIsUp");
    assert_eq!(patch["status"]["conditions"][0]["lastTransitionTime"], now);
}

#[test]
fn our_own_node() {
    let node = with(with(dual(), "public-ip-overwrite", "203.0.113.7"), "node-public-ip", "192.168.0.2");
    let own = read_own(&keys(), &node, &networks());
    assert_eq!(own.subnets, record().subnets);
    assert_eq!(own.vtep_macs, record().vtep_macs);
    assert_eq!(own.overwrite.v4, "203.0.113.7".parse().ok());
    assert_eq!(own.node_public_ips, PerFamily { v4: "192.168.0.2".parse().ok(), v6: None });
    assert!(own.problems.is_empty());

    let node = with(with(node, "public-ip-overwrite", "here"), "node-public-ip", "");
    let node = Node { pod_cidrs: vec!["10.245.0.0/24".into(), "fd00:10:244:2::/64".into()], ..node };
    let own = read_own(&keys(), &node, &networks());
    assert!(own.subnets.v4.is_none() && own.subnets.v6.is_some() && own.overwrite.is_empty());
    assert_eq!(own.problems.len(), 2, "{:?}", own.problems);
}
