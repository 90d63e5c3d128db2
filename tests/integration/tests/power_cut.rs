//! What a disk keeps when the power goes: only what was synced. Our bindings are; a plugin that syncs nothing is found out.
#![allow(clippy::unwrap_used, reason = "a test may fail loudly, in its helpers too")]

use integration::cnitool::CniTool;
use integration::host::Host;
use integration::tools;
use serde_json::{Value, json};

fn conflist(main: &str, ipam: &str) -> Value {
    json!({"cniVersion": "1.0.0", "name": "pods", "plugins": [
        {"type": main, "ipam": {"type": ipam, "ranges": [[{"subnet": "10.244.1.0/24"}]]}}]})
}

#[test]
fn only_what_was_synced_outlives_a_power_cut() {
    let mut host = Host::with_disk_image("edge1").unwrap();
    host.sh("cd /var/lib; echo synced >synced; sync synced; echo not >unsynced").unwrap();
    assert_eq!(host.read("/var/lib/unsynced").unwrap(), "not\n");
    host.power_cut().unwrap();
    host.power_on().unwrap();
    assert_eq!(host.read("/var/lib/synced").unwrap(), "synced\n");
    assert!(host.read("/var/lib/unsynced").unwrap_or_default().is_empty());
}

#[test]
fn a_pods_address_is_on_the_disk_when_add_returns() {
    let mut host = Host::with_disk_image("edge1").unwrap();
    let conflist = conflist("edgeflannel", "ipam-sticky");
    let names = ["a", "b", "c"];
    let mut before = Vec::new();
    for round in 0..3 {
        let cni = CniTool::new(&host, &conflist).unwrap();
        if round == 0 {
            before = names
                .map(|name| cni.add(&cni.pod("default", name).unwrap()).unwrap().address().unwrap())
                .to_vec();
        } else {
            // Another order than before, so that "the next free address" would be wrong.
            for (name, old) in names.iter().zip(&before).rev() {
                let address = cni.add(&cni.pod("default", name).unwrap()).unwrap().address().unwrap();
                assert_eq!(address, *old, "pod {name}");
            }
        }
        // The power goes at once after the last ADD returned.
        host.power_cut().unwrap();
        host.power_on().unwrap();
    }
}

/// The cut is a hard one: host-local, which syncs nothing, forgets and gives an address away again.
#[test]
fn a_plugin_that_syncs_nothing_forgets() {
    let mut host = Host::with_disk_image("edge1").unwrap();
    let reference = tools::cni_plugins_dir().unwrap();
    let conflist = conflist("bridge", "host-local");
    let add = |host: &Host, name: &str| {
        let cni = CniTool::with_path(host, &conflist, &reference.to_string_lossy()).unwrap();
        cni.add(&cni.pod("default", name).unwrap()).unwrap().address().unwrap()
    };
    assert_eq!(add(&host, "a"), "10.244.1.2");
    host.power_cut().unwrap();
    host.power_on().unwrap();
    assert_eq!(add(&host, "b"), "10.244.1.2", "host-local kept what it did not sync");
}
