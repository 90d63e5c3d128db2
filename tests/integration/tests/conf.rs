//! Every conflist that we ship, used as it is: by the real cnitool, with the plugins it names.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use integration::{cnitool::CniTool, host::Host, tools};
use serde_json::{Value, json};
use std::{collections::BTreeSet, fs, path::Path};

const SUBNET_ENV: &str = "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_IPV6_NETWORK=fd00:10:244::/48\n\
     FLANNEL_IPV6_SUBNET=fd00:10:244:1::1/64\nFLANNEL_MTU=1430\nFLANNEL_IPMASQ=true\n";

fn shipped() -> Vec<(String, Value)> {
    let conf = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../conf");
    let files = fs::read_dir(conf).unwrap().map(|entry| entry.unwrap().path());
    let conflists = files.filter(|file| file.extension().is_some_and(|ending| ending == "conflist"));
    let read = |file: std::path::PathBuf| {
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        (name, serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap())
    };
    conflists.map(read).collect()
}

#[test]
fn every_shipped_conflist_gives_pods_a_network() {
    let shipped = shipped();
    let names: BTreeSet<&str> = shipped.iter().map(|(name, _)| name.as_str()).collect();
    let known = ["10-edgeflannel-dual-stack.conflist", "10-edgeflannel.conflist", "10-flannel.conflist"];
    assert_eq!(names, BTreeSet::from(known), "a conflist that this test does not know");
    for (name, conflist) in &shipped {
        let host = Host::new("conf").unwrap();
        host.write("/run/flannel/subnet.env", SUBNET_ENV).unwrap();
        let cni = CniTool::new(&host, conflist).unwrap();
        let ports = json!({"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]});
        let first = cni.pod("default", "a").unwrap().with_capabilities(ports);
        let second = cni.pod("default", "b").unwrap();
        let addresses = cni.add(&first).unwrap().addresses();
        cni.add(&second).unwrap();
        let families = if name == "10-edgeflannel.conflist" { 1 } else { 2 };
        assert_eq!(addresses.len(), families, "{name}: {addresses:?}");
        for address in &addresses {
            let address = address.split('/').next().unwrap();
            host.sh_in(&second.netns, &format!("ping -c1 -W2 {address}")).unwrap();
        }
        if conflist["cniVersion"] != "0.3.1" {
            cni.check(&second).unwrap();
        }
        cni.del(&first).unwrap();
        let again = cni.pod("default", "a").unwrap();
        assert_eq!(cni.add(&again).unwrap().addresses(), addresses, "{name}");
    }
}

#[test]
fn a_flannel_nodes_conflist_needs_its_type_changed_and_nothing_else() {
    let host = Host::new("flannel").unwrap();
    host.write("/run/flannel/subnet.env", SUBNET_ENV).unwrap();
    let (_, ours) = shipped().into_iter().find(|(name, _)| name == "10-flannel.conflist").unwrap();
    let mut flannels = ours.clone();
    flannels["plugins"][0]["type"] = json!("flannel");
    let dirs = [tools::ours().unwrap(), tools::flannel_cni_dir().unwrap(), tools::cni_plugins_dir().unwrap()];
    let path = dirs.map(|dir| dir.to_string_lossy().into_owned()).join(":");
    let with = |conf: &Value| CniTool::with_path(&host, conf, &path).unwrap();

    // Pods made by flannel's plugin, the reference bridge and host-local.
    let cni = with(&flannels);
    let (stays, goes) = (cni.pod("default", "stays").unwrap(), cni.pod("default", "goes").unwrap());
    let stays_address = cni.add(&stays).unwrap().address().unwrap();
    let goes_address = cni.add(&goes).unwrap().address().unwrap();

    let cni = with(&ours);
    let new = cni.pod("default", "new").unwrap();
    let new_address = cni.add(&new).unwrap().address().unwrap();
    assert!(![&stays_address, &goes_address].contains(&&new_address));
    host.sh_in(&new.netns, &format!("ping -c1 -W2 {stays_address}")).unwrap();
    host.sh_in(&stays.netns, &format!("ping -c1 -W2 {new_address}")).unwrap();
    // One that flannel made is deleted, veth and note and all, and comes back on its address.
    cni.del(&goes).unwrap();
    assert!(host.sh_in(&goes.netns, "ip link show eth0").is_err());
    let notes = host.sh("ls /var/lib/cni/flannel | wc -l").unwrap();
    assert_eq!(notes.trim(), "1", "flannel's note about the pod that stays, and no other");
    let again = cni.pod("default", "goes").unwrap();
    assert_eq!(cni.add(&again).unwrap().address().unwrap(), goes_address);
    host.sh_in(&again.netns, &format!("ping -c1 -W2 {stays_address}")).unwrap();
}
