//! What the API server tells, and what is kept of it.

use super::*;
use crate::nodes::tests::node;
use watcher::Event::{Apply, Delete, Init, InitApply, InitDone};

/// A Node object with what real ones have and we do not want.
fn object(name: &str, address: &str, label: &str) -> Slim {
    serde_json::from_value(serde_json::json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {
            "name": name, "resourceVersion": "7", "labels": {"where": label},
            "managedFields": [{"manager": "kubelet", "fieldsV1": {"f:status": {}}}],
        },
        "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24", "fd01::/64"]},
        "status": {
            "addresses": [
                {"type": "InternalIP", "address": address},
                {"type": "Hostname", "address": name},
                {"type": "ExternalDNS", "address": "not a name"},
                {"type": "ExternalIP", "address": address},
            ],
            "images": [{"names": ["busybox"]}],
        },
    }))
    .unwrap()
}

fn told(events: Vec<watcher::Event<Slim>>) -> (Mirror, Vec<bool>) {
    let direct = Some(crate::nodes::selector::parse("where=cloud").unwrap());
    let mut mirror = Mirror { direct, ..Mirror::default() };
    let due = events.into_iter().map(|event| mirror.take(event)).collect();
    (mirror, due)
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_always_fails_at_once_is_tried_ever_more_rarely() {
    let mut waits = Waits::default();
    let mut took = Vec::new();
    for _ in 0..8 {
        // What kube does: an event comes, then the error.
        waits.reset();
        took.push(waits.next().unwrap());
    }
    assert!(took[0] <= TRY_AGAIN && took[0] >= TRY_AGAIN / 2, "{took:?}");
    assert!(took[7] <= TRY_AGAIN_AT_MOST && took[7] >= TRY_AGAIN_AT_MOST / 2, "{took:?}");
    tokio::time::sleep(CALM * 2).await;
    assert!(waits.next().unwrap() <= TRY_AGAIN);
}

#[test]
fn only_what_routes_need_is_kept() {
    let (mirror, due) = told(vec![
        Init,
        InitApply(object("node1", "10.0.0.1", "edge")),
        InitApply(object("cloud", "10.0.0.2", "cloud")),
        InitDone,
    ]);
    assert_eq!(due, [false, false, false, true]);
    assert_eq!(mirror.known["node1"], node("node1 10.0.0.1 node1 / 10.244.1.0/24 fd01::/64"));
    assert!(mirror.known["cloud"].direct);
    assert_eq!(mirror.nodes().len(), 2);
}

#[test]
fn a_heartbeat_is_no_change() {
    let (_, due) = told(vec![
        Init,
        InitApply(object("node1", "10.0.0.1", "edge")),
        InitDone,
        Apply(object("node1", "10.0.0.1", "edge")),
        Apply(object("node1", "10.0.0.9", "edge")),
        Delete(object("node1", "10.0.0.9", "edge")),
        Delete(object("node1", "10.0.0.9", "edge")),
    ]);
    assert_eq!(due, [false, false, true, false, true, true, false]);
}

/// A restored API server that has lost its nodes, or a watch begun anew against one that is just starting, must
/// not end every session there is.
#[test]
fn a_list_that_is_suddenly_empty_is_not_believed() {
    let edge = || object("node1", "10.0.0.1", "edge");
    let (mirror, _) = told(vec![Init, InitApply(edge()), InitDone, Init, InitDone]);
    assert_eq!(mirror.nodes().len(), 1);
    let (mirror, _) = told(vec![Init, InitApply(edge()), InitDone, Delete(edge()), Init, InitDone]);
    assert!(mirror.nodes().is_empty(), "the last one was deleted by word of the API server");
    let other = object("node2", "10.0.0.2", "edge");
    let (mirror, _) = told(vec![Init, InitApply(edge()), InitDone, Init, InitApply(other), InitDone]);
    assert_eq!(mirror.known.keys().collect::<Vec<_>>(), ["node2"]);
}

#[test]
fn a_half_told_list_is_not_in_force() {
    let edge = || object("node1", "10.0.0.1", "edge");
    let (mirror, due) = told(vec![Init, InitApply(edge()), Init, InitApply(edge())]);
    assert!(mirror.known.is_empty() && !due.contains(&true));
}
