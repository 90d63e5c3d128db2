//! Pods under the real cnitool: every verb, the orders in which runtimes really call them, and what the pod can reach.
//!
//! A sandbox is a network namespace; cnitool derives the container id from its path, so the same pod in another
//! namespace is the same pod in its next sandbox.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use integration::{
    cnitool::{CniTool, Pod},
    host::Host,
    leaks::Watch,
    link,
    plugin::Call,
    tools,
};
use serde_json::{Value, json};
use std::{collections::BTreeSet, time::Instant};

fn conflist(subnet: &str) -> Value {
    json!({
        "cniVersion": "1.1.0", "name": "pods",
        "plugins": [{
            "type": "edgeflannel", "ipMasq": true,
            "ipam": {"type": "ipam-sticky", "ranges": [[{"subnet": subnet}]]}
        }]
    })
}

/// The plugin's own object, as libcni would send it.
fn plugin_conf(subnet: &str) -> Value {
    let mut conf = conflist(subnet)["plugins"][0].clone();
    conf["cniVersion"] = json!("1.1.0");
    conf["name"] = json!("pods");
    conf
}

/// A call of our plugin by hand, for what cnitool cannot say.
fn call<'h>(host: &'h Host, verb: &str, conf: &Value) -> Call<'h> {
    let ours = tools::ours().unwrap();
    Call::new(host, ours.join("edgeflannel"), verb).path(&[&ours]).config(conf)
}

fn ping(host: &Host, from: &Pod, to: &str) {
    host.sh_in(&from.netns, &format!("ping -c1 -W2 -i0.2 {to}")).unwrap();
}

fn cannot_ping(host: &Host, from: &Pod, to: &str) {
    assert!(host.sh_in(&from.netns, &format!("ping -c1 -W1 {to}")).is_err(), "{to} answers");
}

fn mac(host: &Host, pod: &Pod) -> String {
    host.sh_in(&pod.netns, &format!("cat /sys/class/net/{}/address", pod.ifname))
        .or_else(|_| host.sh_in(&pod.netns, "ip -o link show eth0 | sed 's/.*ether //; s/ .*//'"))
        .unwrap()
        .trim()
        .to_owned()
}

#[test]
fn a_pods_whole_life() {
    let _watch = Watch::start();
    let host = Host::new("life").unwrap();
    let cni = CniTool::new(&host, &conflist("10.244.1.0/24")).unwrap();
    cni.status().unwrap();
    let (a, b) = (cni.pod("default", "a").unwrap(), cni.pod("default", "b").unwrap());
    let added = cni.add(&a).unwrap();
    assert_eq!(added.addresses(), ["10.244.1.2/24"]);
    assert_eq!(added.0["ips"][0]["gateway"], "10.244.1.1");
    let names: Vec<&str> =
        added.0["interfaces"].as_array().unwrap().iter().map(|i| i["name"].as_str().unwrap()).collect();
    assert_eq!((names[0], names[2], names.len()), ("cni0", "eth0", 3));
    let b_address = cni.add(&b).unwrap().address().unwrap();
    cni.check(&a).unwrap();
    ping(&host, &a, &b_address);
    ping(&host, &b, "10.244.1.2");
    ping(&host, &a, "10.244.1.1");
    host.sh("ping -c1 -W2 10.244.1.2").unwrap();
    // Hairpin: a pod reaches itself through what the bridge sends back to its own port.
    let hairpin = host.sh(&format!("cat /sys/class/net/{}/brport/hairpin_mode", names[1])).unwrap();
    assert_eq!(hairpin.trim(), "1");
    // The interface is there already: ADD must not take it over.
    assert!(cni.add(&a).is_err());
    cni.check(&a).unwrap();

    cni.del(&a).unwrap();
    assert!(host.sh_in(&a.netns, "ip link show eth0").is_err());
    cannot_ping(&host, &b, "10.244.1.2");
    cni.del(&a).unwrap();
    // The other pod noticed nothing, and its namespace may vanish before its DEL.
    cni.check(&b).unwrap();
    host.del_netns(&b.netns).unwrap();
    cni.del(&b).unwrap();
    assert_eq!(host.sh("ls /sys/class/net | grep -c ^veth || true").unwrap().trim(), "0");
}

#[test]
fn old_versions_of_the_protocol() {
    let host = Host::new("old").unwrap();
    for (version, name) in [("0.3.1", "v031"), ("0.4.0", "v040"), ("1.0.0", "v100")] {
        let mut conf = conflist("10.7.0.0/24");
        conf["cniVersion"] = json!(version);
        conf["name"] = json!(name);
        conf["plugins"][0]["bridge"] = json!(format!("br{name}"));
        let cni = CniTool::new(&host, &conf).unwrap();
        let pod = cni.pod("default", "a").unwrap();
        let added = cni.add(&pod).unwrap();
        assert_eq!(added.0["cniVersion"], version);
        assert_eq!(added.addresses(), ["10.7.0.2/24"]);
        assert_eq!(added.0["ips"][0].get("version").is_some(), version < "1.0.0");
        if version >= "0.4.0" {
            cni.check(&pod).unwrap();
        }
        cni.del(&pod).unwrap();
    }
}

#[test]
fn the_same_pod_gets_the_same_address_in_every_order_of_calls() {
    let host = Host::new("order").unwrap();
    let cni = CniTool::new(&host, &conflist("10.244.1.0/24")).unwrap();
    let other = cni.pod("default", "other").unwrap();
    let first = cni.pod("default", "web-0").unwrap();
    let address = cni.add(&first).unwrap().address().unwrap();
    let first_mac = mac(&host, &first);

    // DEL first, and somebody else asks in between.
    cni.del(&first).unwrap();
    assert_ne!(cni.add(&other).unwrap().address().unwrap(), address);
    let second = cni.pod("default", "web-0").unwrap();
    assert_eq!(cni.add(&second).unwrap().address().unwrap(), address);
    assert_eq!(mac(&host, &second), first_mac, "a sticky address has a sticky MAC");

    // The order after a reboot: the new sandbox is added, then the old one is deleted, twice (k8s#44100).
    host.del_netns(&second.netns).unwrap();
    let third = cni.pod("default", "web-0").unwrap();
    assert_eq!(cni.add(&third).unwrap().address().unwrap(), address);
    cni.del(&second).unwrap();
    cni.del(&second).unwrap();
    cni.check(&third).unwrap();
    ping(&host, &other, &address);

    // A StatefulSet makes the pod anew: same name, new UID.
    cni.del(&third).unwrap();
    let fourth = cni.pod("default", "web-0").unwrap().with_arg("K8S_POD_UID", "another");
    assert_eq!(cni.add(&fourth).unwrap().address().unwrap(), address);
    ping(&host, &fourth, "10.244.1.1");
}

#[test]
fn a_reboot_keeps_every_address() {
    let _watch = Watch::start();
    let mut host = Host::new("reboot").unwrap();
    let names = ["web-0", "web-1", "db-0", "cache"];
    let addresses = |host: &Host, order: &[&str]| -> BTreeSet<(String, String)> {
        let cni = CniTool::new(host, &conflist("10.244.1.0/24")).unwrap();
        let add = |name: &str| cni.add(&cni.pod("shop", name).unwrap()).unwrap().address().unwrap();
        order.iter().map(|name| ((*name).to_owned(), add(name))).collect()
    };
    let before = addresses(&host, &names);
    host.reboot().unwrap();
    // Nobody deleted the old sandboxes, and pods come back in another order.
    let after = addresses(&host, &["cache", "db-0", "web-1", "web-0"]);
    assert_eq!(after, before);
}

#[test]
fn names_tell_pods_apart() {
    let host = Host::new("names").unwrap();
    let cni = CniTool::new(&host, &conflist("10.244.1.0/24")).unwrap();
    let a = cni.pod("blue", "web-0").unwrap();
    let b = cni.pod("green", "web-0").unwrap();
    let a_address = cni.add(&a).unwrap().address().unwrap();
    let b_address = cni.add(&b).unwrap().address().unwrap();
    assert_ne!(a_address, b_address);
    // Two interfaces of one pod are two attachments with an address each.
    let a_second = a.clone().with_ifname("net1");
    let second_address = cni.add(&a_second).unwrap().address().unwrap();
    assert_eq!(BTreeSet::from([&a_address, &b_address, &second_address]).len(), 3);
    cni.del(&a_second).unwrap();
    cni.check(&a).unwrap();
    ping(&host, &b, &a_address);
    // Names of full length (RFC 1123: 63 and 253).
    let long = cni.pod(&"n".repeat(63), &"p".repeat(253)).unwrap();
    let long_address = cni.add(&long).unwrap().address().unwrap();
    cni.del(&long).unwrap();
    let again = cni.pod(&"n".repeat(63), &"p".repeat(253)).unwrap();
    assert_eq!(cni.add(&again).unwrap().address().unwrap(), long_address);
}

#[test]
fn a_hundred_adds_at_once() {
    let host = Host::new("hundred").unwrap();
    let cni = CniTool::new(&host, &conflist("10.244.0.0/16")).unwrap();
    let pods: Vec<Pod> = (0..100).map(|n| cni.pod("load", &format!("p{n}")).unwrap()).collect();
    let add_all = || -> BTreeSet<(usize, String)> {
        std::thread::scope(|scope| {
            let adding: Vec<_> =
                pods.iter().map(|pod| scope.spawn(|| cni.add(pod).unwrap().address().unwrap())).collect();
            adding.into_iter().map(|add| add.join().unwrap()).enumerate().collect()
        })
    };
    let first = add_all();
    let distinct: BTreeSet<&String> = first.iter().map(|(_, address)| address).collect();
    assert_eq!(distinct.len(), 100);
    for n in [0, 49, 99] {
        let (_, address) = first.iter().nth(n).unwrap();
        ping(&host, &pods[(n + 1) % 100], address);
    }
    std::thread::scope(|scope| {
        for pod in &pods {
            scope.spawn(|| cni.del(pod).unwrap());
        }
    });
    assert_eq!(host.sh("ls /sys/class/net | grep -c ^veth || true").unwrap().trim(), "0");
    assert_eq!(add_all(), first, "the same hundred addresses for the same hundred names");
}

#[test]
fn the_new_sandbox_takes_over_while_the_old_one_lives() {
    // A force-deleted pod: the kubelet forgot it, its sandbox still runs, its successor has the same name.
    let host = Host::new("force").unwrap();
    let cni = CniTool::new(&host, &conflist("10.244.1.0/24")).unwrap();
    let (client, old) = (cni.pod("default", "client").unwrap(), cni.pod("default", "web-0").unwrap());
    cni.add(&client).unwrap();
    let address = cni.add(&old).unwrap().address().unwrap();
    ping(&host, &client, &address);
    let new = cni.pod("default", "web-0").unwrap();
    assert_eq!(cni.add(&new).unwrap().address().unwrap(), address);
    // Only one of the two answers: the one that hears the ping on a port of its own.
    host.sh_in(&old.netns, "ip addr show eth0 | grep -q 'inet '").unwrap();
    let heard = |pod: &Pod| -> u64 {
        let dev =
            host.sh_in(&pod.netns, "cat /proc/net/dev | grep eth0 | tr -s ' ' | sed 's/^ *//'").unwrap();
        dev.split(' ').nth(2).unwrap().parse().unwrap()
    };
    let (old_before, new_before) = (heard(&old), heard(&new));
    host.sh_in(&client.netns, &format!("ping -c3 -W2 -i0.2 {address}")).unwrap();
    assert!(heard(&new) >= new_before + 3, "the new sandbox answers");
    assert!(heard(&old) <= old_before + 1, "the old sandbox hears nothing");
    // When the old one is deleted at last, nothing changes.
    cni.del(&old).unwrap();
    ping(&host, &client, &address);
    cni.check(&new).unwrap();
}

#[test]
fn when_the_new_sandbox_fails_the_old_one_keeps_its_address() {
    let host = Host::new("rollback").unwrap();
    let cni = CniTool::new(&host, &conflist("10.244.1.0/24")).unwrap();
    let (client, old) = (cni.pod("default", "client").unwrap(), cni.pod("default", "web-0").unwrap());
    cni.add(&client).unwrap();
    let address = cni.add(&old).unwrap().address().unwrap();
    // IPAM succeeds and the veth is made; then a route cannot be: its gateway is in no subnet of the pod's.
    let mut broken = conflist("10.244.1.0/24");
    broken["plugins"][0]["ipam"]["routes"] = json!([{"dst": "10.9.0.0/16", "gw": "172.31.0.1"}]);
    let refused = CniTool::new(&host, &broken).unwrap().add(&cni.pod("default", "web-0").unwrap());
    assert!(format!("{:#}", refused.unwrap_err()).contains("10.9.0.0/16"), "the error names the route");
    let cni = CniTool::new(&host, &conflist("10.244.1.0/24")).unwrap();
    cni.check(&old).unwrap();
    ping(&host, &client, &address);
    let listed =
        host.run([tools::ours().unwrap().join("ipam-sticky").to_str().unwrap(), "list", "-o", "json"]);
    let listed: Value = serde_json::from_str(&listed.unwrap().ok().unwrap()).unwrap();
    let row = listed.as_array().unwrap().iter().find(|row| row["pod"] == "web-0").unwrap();
    assert_eq!((row["address"].as_str(), row["state"].as_str()), (Some(address.as_str()), Some("active")));
}

#[test]
fn a_failed_add_leaves_no_trace() {
    let host = Host::new("trace").unwrap();
    let cni = CniTool::new(&host, &conflist("10.244.1.0/24")).unwrap();
    let pod = cni.pod("default", "web-0").unwrap();
    host.sh("touch /run/netns/none").unwrap();
    let add =
        |conf: &str, netns: &str| call(&host, "ADD", &plugin_conf(conf)).attachment("c1", "eth0", netns);
    let answer = add("10.244.1.0/24", "none").run().unwrap();
    assert_eq!(answer.error_code().unwrap(), 4, "no namespace: {answer:?}");
    let wrong = add("10.244.1.7/24", &pod.netns);
    let answer = wrong.run().unwrap();
    assert_eq!(answer.error_code().unwrap(), 7, "{answer:?}");
    for (stdin, code) in [("", 6), ("garbage", 6), ("{\"cniVersion\":\"1.1.0\"}", 7)] {
        let answer = wrong.clone().stdin(stdin).run().unwrap();
        assert_eq!(answer.error_code().unwrap(), code, "{stdin:?}");
    }
    let answer = wrong.without("CNI_CONTAINERID").without("CNI_IFNAME").run().unwrap();
    assert_eq!(answer.error_code().unwrap(), 4);
    assert_eq!(host.sh("ls /sys/class/net").unwrap().trim(), "lo", "neither veth nor bridge");
    assert!(host.sh("find /var/lib/cni -name '*.redb' | grep .").is_err(), "no state");
}

#[test]
fn a_range_that_changed_gives_a_new_address_and_heals_the_bridge() {
    // cni#306, kube-router#689: "cni0 already has an IP address different from ..." after a new podCIDR.
    let host = Host::new("range").unwrap();
    let cni = CniTool::new(&host, &conflist("10.244.1.0/24")).unwrap();
    let pod = cni.pod("default", "web-0").unwrap();
    assert_eq!(cni.add(&pod).unwrap().address().unwrap(), "10.244.1.2");
    cni.del(&pod).unwrap();
    let cni = CniTool::new(&host, &conflist("10.244.9.0/24")).unwrap();
    let pod = cni.pod("default", "web-0").unwrap();
    assert_eq!(cni.add(&pod).unwrap().address().unwrap(), "10.244.9.2");
    ping(&host, &pod, "10.244.9.1");
    cni.check(&pod).unwrap();
    let on_bridge = host.sh("ip -4 -o addr show cni0").unwrap();
    assert!(on_bridge.contains("10.244.9.1/24") && !on_bridge.contains("10.244.1.1"), "{on_bridge}");
}

#[test]
fn both_families_without_waiting_for_duplicate_address_detection() {
    let host = Host::new("dual").unwrap();
    let mut conf = conflist("10.244.1.0/24");
    conf["plugins"][0]["ipam"]["ranges"] =
        json!([[{"subnet": "10.244.1.0/24"}], [{"subnet": "fd00:244:1::/64"}]]);
    let cni = CniTool::new(&host, &conf).unwrap();
    let (a, b) = (cni.pod("default", "a").unwrap(), cni.pod("default", "b").unwrap());
    let started = Instant::now();
    let added = cni.add(&a).unwrap();
    assert!(started.elapsed().as_secs_f64() < 1.0, "an ADD that waits for DAD takes over a second");
    assert_eq!(added.addresses(), ["10.244.1.2/24", "fd00:244:1::2/64"]);
    let shown = host.sh_in(&a.netns, "ip -6 addr show dev eth0 scope global").unwrap();
    assert!(!shown.contains("tentative"), "{shown}");
    cni.add(&b).unwrap();
    ping(&host, &b, "10.244.1.2");
    ping(&host, &b, "fd00:244:1::2");
    ping(&host, &b, "fd00:244:1::1");
    cni.check(&a).unwrap();
    cni.del(&a).unwrap();
    let again = cni.pod("default", "a").unwrap();
    assert_eq!(cni.add(&again).unwrap().addresses(), added.addresses());
}

#[test]
fn pods_leave_the_node_with_its_address_and_meet_each_other_with_their_own() {
    let node = Host::new("masq").unwrap();
    let world = Host::new("world").unwrap();
    link::connect((&node, "uplink"), (&world, "eth0")).unwrap();
    node.sh("ip addr add 192.0.2.1/24 dev uplink; ip route add default via 192.0.2.2").unwrap();
    // The world has no route to pods: only a masqueraded packet is answered.
    world.sh("ip addr add 192.0.2.2/24 dev eth0").unwrap();
    let cni = CniTool::new(&node, &conflist("10.244.1.0/24")).unwrap();
    let (a, b) = (cni.pod("default", "a").unwrap(), cni.pod("default", "b").unwrap());
    let a_address = cni.add(&a).unwrap().address().unwrap();
    cni.add(&b).unwrap();
    ping(&node, &a, "192.0.2.2");
    // From pod to pod nothing is rewritten: the peer sees the pod's own address.
    let seen = node.spawn_listener(&b, 9000, || {
        node.sh_in(&a.netns, "echo hello | socat -t1 - TCP:10.244.1.3:9000").unwrap();
    });
    assert_eq!(seen, a_address);
    let before = node.sh("nft list table inet edgeflannel").unwrap();
    for n in 0..5 {
        cni.add(&cni.pod("default", &format!("more{n}")).unwrap()).unwrap();
    }
    assert_eq!(node.sh("nft list table inet edgeflannel").unwrap(), before, "no rule per pod");
}

/// Who connected, as the listener in a pod sees it.
trait Listener {
    fn spawn_listener(&self, pod: &Pod, port: u16, connect: impl FnOnce()) -> String;
}

impl Listener for Host {
    fn spawn_listener(&self, pod: &Pod, port: u16, connect: impl FnOnce()) -> String {
        let line = format!("socat -u TCP-LISTEN:{port},reuseaddr SYSTEM:'echo $SOCAT_PEERADDR >/run/seen'");
        let mut command = self.command("nsenter").unwrap();
        command.args([&format!("--net=/run/netns/{}", pod.netns), "--", "sh", "-c", &line]);
        let log = tempfile::NamedTempFile::new().unwrap();
        let mut daemon = self.spawn(&mut command, log.path()).unwrap();
        integration::exec::wait_until("the listener", std::time::Duration::from_secs(5), || {
            self.sh_in(&pod.netns, &format!("ss -Hltn sport = :{port} | grep -q .")).is_ok()
        })
        .unwrap();
        connect();
        let seen = integration::exec::wait_for("who connected", std::time::Duration::from_secs(5), || {
            Ok(self.read("/run/seen").ok().filter(|seen| seen.ends_with('\n')))
        });
        daemon.kill().unwrap();
        seen.unwrap().trim().to_owned()
    }
}

#[test]
fn a_pool_that_is_full_says_so_and_frees_the_longest_idle() {
    let host = Host::new("full").unwrap();
    // .1 is the gateway: five addresses for pods.
    let cni = CniTool::new(&host, &conflist("10.244.1.0/29")).unwrap();
    let pods: Vec<Pod> = (0..5).map(|n| cni.pod("default", &format!("p{n}")).unwrap()).collect();
    let addresses: Vec<String> = pods.iter().map(|pod| cni.add(pod).unwrap().address().unwrap()).collect();
    let sixth = cni.pod("default", "sixth").unwrap();
    let full = call(&host, "ADD", &plugin_conf("10.244.1.0/29"))
        .attachment("sixth", "eth0", &sixth.netns)
        .pod("default", "sixth");
    let answer = full.run().unwrap();
    assert_eq!(answer.error_code().unwrap(), 100, "{answer:?}");
    assert!(cni.status().is_err(), "STATUS knows that the next ADD would fail");
    cni.del(&pods[3]).unwrap();
    cni.del(&pods[1]).unwrap();
    cni.status().unwrap();
    // p3 has been idle for longer than p1.
    assert_eq!(cni.add(&sixth).unwrap().address().unwrap(), addresses[3]);
    let again = cni.pod("default", "p1").unwrap();
    assert_eq!(cni.add(&again).unwrap().address().unwrap(), addresses[1]);
}

#[test]
fn gc_removes_what_is_not_listed_of_its_own_network_only() {
    let host = Host::new("gc").unwrap();
    let cni = CniTool::new(&host, &conflist("10.244.1.0/24")).unwrap();
    let mut other = conflist("10.99.0.0/24");
    other["name"] = json!("other");
    other["plugins"][0]["bridge"] = json!("br-other");
    let other = CniTool::new(&host, &other).unwrap();
    let conf = plugin_conf("10.244.1.0/24");
    let (keep, lost) = (cni.pod("default", "keep").unwrap(), cni.pod("default", "lost").unwrap());
    let foreign = other.pod("default", "foreign").unwrap();
    let foreign_address = other.add(&foreign).unwrap().address().unwrap();
    for (id, pod) in [("keep", &keep), ("lost", &lost)] {
        let added = call(&host, "ADD", &conf).attachment(id, "eth0", &pod.netns).pod("default", id);
        added.run().unwrap().result().unwrap();
    }
    let gc = |extra: Value| {
        let mut conf = conf.clone();
        conf.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let answer = call(&host, "GC", &conf).run().unwrap();
        assert!(answer.succeeded(), "{answer:?}");
        assert_eq!(answer.output.stdout, "");
    };
    // Without a list nothing is known, so nothing is freed.
    gc(json!({}));
    ping(&host, &keep, "10.244.1.3");
    gc(json!({"cni.dev/valid-attachments": [{"containerID": "keep", "ifname": "eth0"}]}));
    assert!(host.sh_in(&lost.netns, "ip link show eth0").is_err());
    ping(&host, &keep, "10.244.1.1");
    ping(&host, &foreign, "10.99.0.1");
    assert_eq!(foreign_address, "10.99.0.2");
    // The binding is idle, not gone.
    let again = call(&host, "ADD", &conf).attachment("again", "eth0", &lost.netns).pod("default", "lost");
    assert_eq!(again.run().unwrap().result().unwrap()["ips"][0]["address"], "10.244.1.3/24");
    // cnitool knows all attachments as garbage.
    other.gc_all().unwrap();
    assert!(host.sh_in(&foreign.netns, "ip link show eth0").is_err());
}

#[test]
fn check_finds_each_kind_of_drift() {
    let host = Host::new("drift").unwrap();
    let cni = CniTool::new(&host, &conflist("10.244.1.0/24")).unwrap();
    let in_pod = |line: &str| format!("nsenter --net=/run/netns/NETNS -- {line}");
    let drifts = [
        ("address", in_pod("ip addr flush dev eth0")),
        ("default route", in_pod("ip route del default")),
        ("MAC", in_pod("ip link set eth0 address 02:00:00:00:00:01")),
        ("down", in_pod("ip link set eth0 down")),
        ("renamed", in_pod("sh -c 'ip link set eth0 down; ip link set eth0 name eth9; ip link set eth9 up'")),
        ("off the bridge", "ip link set HOSTVETH nomaster".to_owned()),
        ("host veth down", "ip link set HOSTVETH down".to_owned()),
        ("hairpin", "ip link set HOSTVETH type bridge_slave hairpin off".to_owned()),
        ("bridge down", "ip link set cni0 down".to_owned()),
        ("gateway", "ip addr flush dev cni0".to_owned()),
        ("masquerade", "nft delete table inet edgeflannel".to_owned()),
        ("bridge gone", "ip link del cni0".to_owned()),
    ];
    for (kind, break_it) in drifts {
        let pod = cni.pod("default", "web-0").unwrap();
        let added = cni.add(&pod).unwrap();
        cni.check(&pod).unwrap();
        let veth = added.0["interfaces"][1]["name"].as_str().unwrap();
        host.sh(&break_it.replace("NETNS", &pod.netns).replace("HOSTVETH", veth)).unwrap();
        let found = cni.check(&pod);
        assert!(found.is_err(), "{kind}: CHECK found nothing after `{break_it}`");
        // The next ADD puts everything right again, whatever was broken.
        cni.del(&pod).unwrap();
    }
    let pod = cni.pod("default", "web-0").unwrap();
    cni.add(&pod).unwrap();
    cni.check(&pod).unwrap();
    // The address is no longer this container's. (Deleting the state would not do: it is made again from the
    // runtime's result cache, which is named NETWORK-CONTAINER-INTERFACE.)
    let cached = host.sh("ls /var/lib/cni/results").unwrap();
    let container = cached.trim().strip_prefix("pods-").unwrap().strip_suffix("-eth0").unwrap();
    let released = Call::new(&host, tools::ours().unwrap().join("ipam-sticky"), "DEL")
        .attachment(container, "eth0", &pod.netns)
        .env("CNI_PATH", "/none")
        .config(&plugin_conf("10.244.1.0/24"));
    assert!(released.run().unwrap().succeeded());
    assert!(cni.check(&pod).is_err(), "lease");
}

#[test]
fn requested_address_and_mac() {
    let host = Host::new("wish").unwrap();
    let mut conf = conflist("10.244.1.0/24");
    conf["plugins"][0]["capabilities"] = json!({"ips": true, "mac": true});
    let cni = CniTool::new(&host, &conf).unwrap();
    let wish = json!({"ips": ["10.244.1.77/24"], "mac": "02:11:22:33:44:55"});
    let pod = cni.pod("default", "fixed").unwrap().with_capabilities(wish);
    assert_eq!(cni.add(&pod).unwrap().addresses(), ["10.244.1.77/24"]);
    assert_eq!(mac(&host, &pod), "02:11:22:33:44:55");
    cni.check(&pod).unwrap();
    // Somebody else cannot have it; nor can anybody have the gateway's.
    for (address, name) in [("10.244.1.77", "thief"), ("10.244.1.1", "gateway"), ("10.244.1.255", "all")] {
        let other = cni.pod("default", name).unwrap().with_capabilities(json!({"ips": [address]}));
        assert!(cni.add(&other).is_err(), "{address}");
    }
    let by_args = cni.pod("default", "args").unwrap().with_arg("IP", "10.244.1.88");
    assert_eq!(cni.add(&by_args).unwrap().address().unwrap(), "10.244.1.88");
}

#[test]
fn the_nodes_subnet_from_flannels_file() {
    let host = Host::new("subnet").unwrap();
    let conf = json!({"cniVersion": "1.1.0", "name": "cbr0", "plugins": [{"type": "edgeflannel"}]});
    let cni = CniTool::new(&host, &conf).unwrap();
    let pod = cni.pod("default", "web-0").unwrap();
    // Not known yet is a passing state: code 11, and no trace.
    let plugin = json!({"cniVersion": "1.1.0", "name": "cbr0", "type": "edgeflannel"});
    let early = call(&host, "ADD", &plugin).attachment("c1", "eth0", &pod.netns).pod("default", "web-0");
    let answer = early.run().unwrap();
    assert_eq!(answer.error_code().unwrap(), 11, "{answer:?}");
    assert!(answer.output.stdout.contains("subnet is not known yet"), "{answer:?}");
    assert!(host.sh("ip link show cni0").is_err());
    assert!(cni.status().is_err());
    let env = "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.3.1/24\nFLANNEL_MTU=1400\nFLANNEL_IPMASQ=true\n";
    host.write("/run/flannel/subnet.env", env).unwrap();
    cni.status().unwrap();
    let added = cni.add(&pod).unwrap();
    assert_eq!(added.addresses(), ["10.244.3.2/24"]);
    let link = host.sh_in(&pod.netns, "ip link show eth0; ip route").unwrap();
    assert!(link.contains("mtu 1400"), "{link}");
    assert!(link.contains("default via 10.244.3.1"), "{link}");
    assert!(link.contains("10.244.0.0/16 via 10.244.3.1"), "{link}");
    // FLANNEL_IPMASQ=true: flanneld masquerades, so we do not.
    assert!(host.sh("nft list table inet edgeflannel").is_err());
    cni.check(&pod).unwrap();
    cni.del(&pod).unwrap();
}
