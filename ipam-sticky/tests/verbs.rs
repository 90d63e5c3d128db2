//! The real binary, verb by verb: what a runtime may do to it in good and bad times.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests may fail loudly")]

mod support;

use ipam_sticky::store::Store;
use serde_json::{Value, json};
use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};
use support::process::{Node, begin, cache_entry, pod_args};

#[test]
fn a_pod_keeps_its_addresses_in_both_families() {
    let node = Node::new(json!({
        "ranges": [[{"subnet": "10.1.0.0/16", "gateway": "10.1.0.1"}], [{"subnet": "fd00:1::/64"}]],
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0", "gw": "fd00:1::9"}],
    }));
    let first = node.add("c1", "web-0");
    assert_eq!(
        first.json,
        json!({
            "cniVersion": "1.1.0", "dns": {},
            "ips": [{"address": "10.1.0.2/16", "gateway": "10.1.0.1"}, {"address": "fd00:1::2/64", "gateway": "fd00:1::1"}],
            "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0", "gw": "fd00:1::9"}],
        })
    );
    assert_eq!(node.add("c1", "web-0").json, first.json, "ADD twice is ADD once");
    assert_eq!(node.add("c2", "web-1").addresses(), ["10.1.0.3", "fd00:1::3"]);
    assert!(node.del("c1", "web-0").ok);
    assert!(node.del("c1", "web-0").ok);
    assert_eq!(node.add("c3", "web-2").addresses(), ["10.1.0.4", "fd00:1::4"]);
    assert_eq!(node.add("c4", "web-0").json, first.json, "the same name, the same addresses");
}

#[test]
fn the_order_after_a_reboot() {
    let node = Node::subnet("10.1.0.0/24");
    let before = node.add("old", "web-0").addresses();
    assert_eq!(node.add("new", "web-0").addresses(), before);
    assert!(node.del("old", "web-0").ok);
    assert!(node.del("old", "web-0").ok);
    assert_eq!(node.list()[0]["container"], "new");
    assert_eq!(node.list()[0]["state"], "active");
    assert_ne!(node.add("c2", "web-1").addresses(), before);
}

#[test]
fn a_failed_add_gives_the_address_back_to_the_sandbox_that_lives() {
    let node = Node::subnet("10.1.0.0/24");
    node.netns("old", true);
    let address = node.add("old", "web-0").addresses();
    node.add("new", "web-0");
    assert!(node.del("new", "web-0").ok);
    assert_eq!(node.list()[0]["container"], "old");
    // Its DEL makes the binding idle; with the namespace gone there is nobody to give it back to.
    node.add("new", "web-0");
    node.netns("old", false);
    assert!(node.del("new", "web-0").ok);
    assert_eq!(node.list()[0]["state"], "idle");
    assert_eq!(node.add("newer", "web-0").addresses(), address);
}

#[test]
fn same_names_in_two_namespaces_and_two_interfaces_of_a_pod() {
    let node = Node::subnet("10.1.0.0/24");
    let add = |container: &str, ifname: &str, namespace: &str| {
        node.call_with("ADD", container, ifname, &pod_args(namespace, "web-0"), &node.conf()).addresses()
    };
    let all = [add("c1", "eth0", "a"), add("c2", "eth0", "b"), add("c1", "net1", "a")];
    assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), 3, "{all:?}");
    let again = [add("c3", "eth0", "a"), add("c4", "eth0", "b"), add("c3", "net1", "a")];
    assert_eq!(all, again);
    // DEL of one interface leaves the other.
    assert!(node.call_with("DEL", "c3", "net1", &pod_args("a", "web-0"), &node.conf()).ok);
    let active: Vec<Value> = node.list().into_iter().filter(|row| row["state"] == "active").collect();
    assert_eq!(active.len(), 2);
}

#[test]
fn a_statefulset_pod_with_a_new_uid() {
    let node = Node::subnet("10.1.0.0/24");
    let add = |container: &str, uid: &str| {
        let args = format!("{};K8S_POD_UID={uid}", pod_args("default", "db-0"));
        node.call_with("ADD", container, "eth0", &args, &node.conf()).addresses()
    };
    let before = add("c1", "u1");
    node.del("c1", "db-0");
    assert_eq!(add("c2", "u2"), before);
}

#[test]
fn names_of_full_length() {
    let node = Node::subnet("10.1.0.0/24");
    let (namespace, pod) = ("n".repeat(63), "p".repeat(253));
    let args = format!("{};K8S_POD_UID=76b8e3a4-0000-0000-0000-000000000000", pod_args(&namespace, &pod));
    let container = "c".repeat(64);
    let add = |container: &str| node.call_with("ADD", container, "eth012345678901", &args, &node.conf());
    let before = add(&container).addresses();
    assert_eq!(add(&"d".repeat(64)).addresses(), before);
    assert_eq!(node.list()[0]["pod"], pod);
    let longer = pod_args(&namespace, &"p".repeat(254));
    assert_eq!(node.call_with("ADD", "c", "eth0", &longer, &node.conf()).code(), 4);
    assert_eq!(add(&"e".repeat(513)).code(), 4);
}

#[test]
fn without_a_pod_the_container_is_the_identity_and_nothing_sticks() {
    let node = Node::subnet("10.1.0.0/24");
    let call = |verb: &str, container: &str| node.call_with(verb, container, "eth0", "", &node.conf());
    assert_eq!(call("ADD", "c1").addresses(), ["10.1.0.2"]);
    assert_eq!(call("ADD", "c1").addresses(), ["10.1.0.2"]);
    assert_eq!(call("ADD", "c2").addresses(), ["10.1.0.3"]);
    assert!(call("DEL", "c1").ok);
    assert_eq!(node.list().len(), 1);
}

#[test]
fn exhausted_reclaims_the_longest_idle_first_and_then_says_so() {
    let mut node = Node::subnet("10.1.0.0/29");
    // .1 is the gateway, so five pods fit.
    for number in 0..5 {
        node.add(&format!("c{number}"), &format!("p{number}"));
    }
    let full = node.add("c5", "p5");
    assert_eq!(full.code(), 100);
    assert!(full.json["msg"].as_str().unwrap().contains("10.1.0.1-10.1.0.6 of 10.1.0.0/29"), "{full:?}");
    let status = |node: &Node| node.call("STATUS", "", "");
    assert_eq!(status(&node).code(), 50);
    node.del("c3", "p3");
    node.del("c1", "p1");
    assert!(status(&node).ok);
    let order: Vec<Value> =
        serde_json::from_str(&node.told(&["reclaim", "--dry-run", "-o", "json"])).unwrap();
    assert_eq!(order[0]["binding"], "default/p3/eth0");
    assert_eq!(node.add("c5", "p5").addresses(), ["10.1.0.5"], "p3 was released first");
    assert_eq!(node.add("c1b", "p1").addresses(), ["10.1.0.3"], "p1 still has its own");
    assert_eq!(node.add("c6", "p6").code(), 100);
    // Dual stack with one family full: all or nothing.
    let mut ipam = node.ipam.clone();
    ipam["ranges"] = json!([[{"subnet": "fd00::/64"}], [{"subnet": "10.1.0.0/29"}]]);
    node.set(ipam);
    assert_eq!(node.add("c6", "p6").code(), 100);
    assert!(!node.list().iter().any(|row| row["pod"] == "p6"), "a failed ADD leaves no trace");
}

#[test]
fn an_owner_of_an_earlier_boot_does_not_hold_an_address_when_the_pool_is_empty() {
    let node = Node::subnet("10.1.0.0/29");
    let place = ipam_sticky::config::Place {
        data_dir: node.path("data"),
        run_dir: node.path("run"),
        cache_dir: node.path("cache"),
        ..support::place(node.dir.path())
    };
    let earlier = Store::new(place, "an earlier boot".into());
    let pools = support::pools(vec![vec![support::range("10.1.0.0/29", "", "")]]);
    for number in 0..5 {
        support::add(&earlier, &pools, &format!("lost{number}"), &format!("c{number}")).unwrap();
    }
    assert_eq!(node.add("n3", "lost3").addresses(), ["10.1.0.5"], "who comes back has its own");
    assert_eq!(node.add("n0", "new").addresses(), ["10.1.0.2"], "the oldest of those that never came");
    assert!(node.told(&["show", "default/lost1"]).contains("of an earlier boot"));
    assert!(node.told(&["reclaim", "--dry-run"]).contains("in an earlier boot"));
    for number in 1..4 {
        node.add(&format!("m{number}"), &format!("new{number}")).addresses();
    }
    assert_eq!(node.add("m4", "new4").code(), 100);
    assert_eq!(
        node.told(&["release", "--stale"]),
        "5 bindings whose container is gone are not active any more\n"
    );
}

#[test]
fn ranges_that_change() {
    let mut node = Node::new(json!({"ranges": [[{"subnet": "10.1.0.0/24"}], [{"subnet": "fd00:1::/64"}]]}));
    for number in 0..4 {
        node.add(&format!("a{number}"), &format!("p{number}"));
    }
    // Shrunk: who is out of it gets another, and keeps the other family.
    let with = |ranges: Value| json!({"ranges": ranges});
    node.set(with(
        json!([[{"subnet": "10.1.0.0/24", "rangeStart": "10.1.0.4"}], [{"subnet": "fd00:1::/64"}]]),
    ));
    assert_eq!(node.add("b0", "p0").addresses(), ["10.1.0.6", "fd00:1::2"]);
    assert_eq!(node.add("b2", "p2").addresses(), ["10.1.0.4", "fd00:1::4"]);
    // The podCIDR is another one.
    node.set(with(json!([[{"subnet": "10.2.0.0/24"}], [{"subnet": "fd00:1::/64"}]])));
    assert_eq!(node.add("c2", "p2").addresses(), ["10.2.0.2", "fd00:1::4"]);
    // And has a family less: what is left stays.
    node.set(with(json!([[{"subnet": "10.2.0.0/24"}]])));
    assert_eq!(node.add("d2", "p2").addresses(), ["10.2.0.2"]);
    // The excluded ones move as well.
    node.set(json!({"ranges": [[{"subnet": "10.2.0.0/24"}]], "exclude": ["10.2.0.0/30"]}));
    assert_eq!(node.add("e2", "p2").addresses(), ["10.2.0.4"]);
    assert!(node.told(&["verify"]).contains("nothing wrong"));
}

#[test]
fn requested_addresses() {
    let node = Node::new(
        json!({"ranges": [[{"subnet": "10.1.0.0/24"}], [{"subnet": "fd00:1::/64"}]], "exclude": ["10.1.0.9"]}),
    );
    let ask = |container: &str, pod: &str, runtime: Value, conventions: Value, ip: &str| {
        let mut conf = node.conf();
        conf["runtimeConfig"] = json!({"ips": runtime});
        conf["args"] = json!({"cni": {"ips": conventions}});
        let args = format!("{};IP={ip}", pod_args("default", pod));
        node.call_with("ADD", container, "eth0", &args, &conf)
    };
    assert_eq!(
        ask("c1", "a", json!(["10.1.0.50/24"]), json!([]), "").addresses(),
        ["10.1.0.50", "fd00:1::2"]
    );
    assert_eq!(ask("c2", "b", json!([]), json!([]), "10.1.0.60").addresses(), ["10.1.0.60", "fd00:1::3"]);
    // args.cni.ips outranks IP in CNI_ARGS.
    assert_eq!(
        ask("c3", "c", json!([]), json!(["fd00:1::99"]), "10.1.0.70").addresses(),
        ["10.1.0.2", "fd00:1::99"]
    );
    for (address, part) in [
        ("10.1.0.50", "in use by pod default/a"),
        ("10.1.0.1", "gateway"),
        ("10.1.0.0", "none of the configured ranges"),
        ("10.1.0.255", "none of the configured ranges"),
        ("10.1.0.9", "excluded"),
        ("10.9.0.1", "none of the configured ranges"),
    ] {
        let refused = ask("c4", "d", json!([address]), json!([]), "");
        assert_eq!(refused.code(), 101, "{address}");
        assert!(refused.json["msg"].as_str().unwrap().contains(part), "{refused:?}");
    }
    assert_eq!(ask("c4", "d", json!(["10.1.0.80", "10.1.0.81"]), json!([]), "").code(), 101);
    assert_eq!(ask("c4", "d", json!(["ten"]), json!([]), "").code(), 7);
    assert_eq!(ask("c4", "d", json!([]), json!([]), "ten").code(), 4);
    // Idle is not taken: it is taken over, and its former holder gets another.
    node.del("c1", "a");
    assert_eq!(ask("c2", "b", json!(["10.1.0.50"]), json!([]), "").addresses(), ["10.1.0.50", "fd00:1::3"]);
    assert_eq!(node.add("c5", "a").addresses(), ["10.1.0.3", "fd00:1::2"]);
    assert_eq!(node.add("c6", "e").addresses()[0], "10.1.0.4", "10.1.0.60 is free, and its turn comes later");
}

#[test]
fn pins() {
    let node = Node::subnet("10.1.0.0/29");
    assert_eq!(node.add("c1", "a").addresses(), ["10.1.0.2"]);
    node.told(&["pin", "default/a", "10.1.0.5"]);
    node.told(&["pin", "default/unseen", "10.1.0.6"]);
    assert!(!node.person(&["pin", "default/b", "10.1.0.5"]).status.success());
    assert!(!node.person(&["pin", "default/b", "10.1.0.2"]).status.success(), "it is in use");
    for (container, pod, address) in [("c2", "b", "10.1.0.3"), ("c3", "c", "10.1.0.4")] {
        assert_eq!(node.add(container, pod).addresses(), [address]);
    }
    assert_eq!(node.add("c4", "d").code(), 100, "pinned addresses are nobody else's");
    assert_eq!(node.add("c1b", "a").addresses(), ["10.1.0.5"], "from its next start");
    assert_eq!(node.add("c4", "d").addresses(), ["10.1.0.2"]);
    assert_eq!(node.add("c5", "unseen").addresses(), ["10.1.0.6"]);
    node.del("c5", "unseen");
    assert!(!node.person(&["release", "default/unseen"]).status.success());
    node.told(&["unpin", "default/unseen"]);
    assert_eq!(node.add("c6", "e").addresses(), ["10.1.0.6"]);
}

#[test]
fn check_gc_and_status() {
    let node = Node::subnet("10.1.0.0/24");
    let added = node.add("c1", "a").json;
    node.add("c2", "b");
    let check = |container: &str, result: &Value| {
        let mut conf = node.conf();
        conf["prevResult"] = result.clone();
        node.call_with("CHECK", container, "eth0", &pod_args("default", "a"), &conf)
    };
    assert!(check("c1", &added).ok);
    for wrong in
        [check("c2", &added), check("c3", &added), check("c1", &json!({"cniVersion": "1.1.0", "ips": []}))]
    {
        assert_eq!(wrong.code(), 102);
    }
    let gc = |valid: Option<Value>| {
        let mut conf = node.conf();
        if let Some(valid) = valid {
            conf["cni.dev/valid-attachments"] = valid;
        }
        assert!(node.call_with("GC", "", "", "", &conf).ok);
        node.list().iter().map(|row| row["state"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(gc(None), ["active", "active"], "no list frees nothing");
    assert_eq!(gc(Some(json!([{"containerID": "c2", "ifname": "eth0"}]))), ["idle", "active"]);
    assert_eq!(gc(Some(json!([{"containerID": "c2", "ifname": "net1"}]))), ["idle", "idle"]);
    assert_eq!(node.add("c3", "a").json, added, "idle is not free");
    assert!(node.call("STATUS", "", "").ok);
}

#[test]
fn a_hundred_at_once() {
    let node = Node::subnet("10.1.0.0/24");
    let started: Vec<_> = (0..100).map(|n| node.start("ADD", &format!("c{n}"), &format!("p{n}"))).collect();
    let answers: Vec<_> = started
        .into_iter()
        .map(|child| support::process::answer(child.wait_with_output().unwrap()))
        .collect();
    let given: BTreeSet<String> = answers.iter().flat_map(support::process::Answer::addresses).collect();
    assert_eq!(given.len(), 100);
    let started: Vec<_> = (0..100).map(|n| node.start("DEL", &format!("c{n}"), &format!("p{n}"))).collect();
    assert!(started.into_iter().all(|child| child.wait_with_output().unwrap().status.success()));
    assert!(node.list().iter().all(|row| row["state"] == "idle"));
    assert!(node.told(&["verify"]).contains("100 bindings"));
}

#[test]
fn whoever_has_the_lock_and_stopped_is_not_waited_for_for_ever() {
    let node = Node::new(json!({"subnet": "10.1.0.0/24", "lockTimeout": "300ms"}));
    node.add("c1", "a");
    let lock = node.path("data/net.lock");
    let mut holder = std::process::Command::new("flock").arg(&lock).args(["sleep", "60"]).spawn().unwrap();
    let held = || {
        let file = std::fs::File::open(&lock).unwrap();
        fs2::FileExt::try_lock_exclusive(&file).is_err()
    };
    while !held() {
        std::thread::sleep(Duration::from_millis(5));
    }
    let pid = nix::unistd::Pid::from_raw(holder.id().try_into().unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::SIGSTOP).unwrap();
    let began = Instant::now();
    for busy in [node.add("c2", "b"), node.del("c1", "a")] {
        assert_eq!(busy.code(), 11);
        assert!(busy.json["msg"].as_str().unwrap().contains("net.lock"), "{busy:?}");
    }
    assert!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    assert_eq!(node.call("STATUS", "", "").code(), 50);
    // flock gave its lock to sleep as well; both end.
    let _ = std::process::Command::new("pkill").args(["-P", &holder.id().to_string()]).status();
    holder.kill().unwrap();
    holder.wait().unwrap();
    assert_eq!(node.add("c2", "b").addresses(), ["10.1.0.3"]);
}

/// Two hundred processes killed at random moments; whatever was acknowledged stays true.
#[test]
fn killed_at_any_moment() {
    let node = Node::subnet("10.1.0.0/24");
    node.add("warm", "warm");
    let began = Instant::now();
    node.add("warm2", "warm");
    let usual = u64::try_from(began.elapsed().as_micros()).unwrap();
    let mut random = 7_u64;
    let mut next = |below: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % below
    };
    let mut known: std::collections::BTreeMap<u64, Vec<String>> = std::collections::BTreeMap::new();
    let (mut killed, mut finished) = (0, 0);
    for round in 0..5_000 {
        if killed >= 200 {
            break;
        }
        let who = next(30);
        let (verb, container) = if next(3) == 0 {
            ("DEL", format!("c{who}"))
        } else {
            ("ADD", format!("c{}", who + 100 * (round % 3)))
        };
        let mut command = node.command(verb, &container, "eth0", &pod_args("default", &format!("p{who}")));
        let mut child = begin(&mut command, &node.conf());
        std::thread::sleep(Duration::from_micros(next(usual)));
        child.kill().unwrap();
        let output = child.wait_with_output().unwrap();
        if output.status.success() {
            finished += 1;
            if verb == "ADD" {
                let addresses = support::process::answer(output).addresses();
                assert_eq!(*known.entry(who).or_insert_with(|| addresses.clone()), addresses);
            }
        } else {
            killed += 1;
        }
    }
    assert!(node.told(&["verify"]).contains("nothing wrong"));
    for (who, addresses) in &known {
        assert_eq!(node.add("after", &format!("p{who}")).addresses(), *addresses);
        node.del("after", "");
    }
    assert!(
        killed >= 200 && finished >= 10,
        "{killed} killed, {finished} finished: the moments are not random"
    );
    assert_eq!(std::fs::read_dir(node.path("data")).unwrap().count(), 2, "nothing was set aside");
}

#[test]
fn bad_input_changes_nothing_and_says_what_to_do() {
    let node = Node::subnet("10.1.0.0/24");
    for (ipam, code) in
        [(json!({}), 7), (json!({"ranges": [[{"subnet": "10.1.0.0/31"}]]}), 7), (json!({"ranges": 7}), 6)]
    {
        let mut conf = node.conf();
        conf["ipam"] = ipam;
        conf["ipam"]["dataDir"] = json!(node.path("data"));
        let answer = node.call_with("ADD", "c", "eth0", "", &conf);
        assert_eq!(answer.code(), code, "{answer:?}");
        assert!(!node.path("data").exists());
    }
    assert_eq!(node.call_with("ADD", "c", "eth0", "WHAT=1", &node.conf()).code(), 4);
    let mut conf = node.conf();
    conf["ipam"]["resolvConf"] = json!("/does/not/exist");
    assert_eq!(node.call_with("ADD", "c", "eth0", "", &conf).code(), 7);
    assert!(!node.path("data").exists());
    // DEL must get along without ranges.
    node.add("c1", "a");
    let mut conf = node.conf();
    conf["ipam"] = json!({"dataDir": node.path("data"), "runDir": node.path("run")});
    assert!(node.call_with("DEL", "c1", "eth0", "", &conf).ok);
    assert_eq!(node.list()[0]["state"], "idle");
}

#[test]
fn a_del_of_nobody_and_a_refusal_make_no_state() {
    // edgeflannel follows the spec and sends DEL when its IPAM plugin refused the ADD, for a mistake in the
    // configuration too: that left an empty state behind.
    let node = Node::subnet("10.1.0.0/24");
    let state = node.path("data/net.redb");
    assert!(node.del("c1", "a").ok);
    assert!(!state.exists());
    let mut conf = node.conf();
    conf["runtimeConfig"] = json!({"ips": ["10.9.9.9"]});
    assert_eq!(node.call_with("ADD", "c1", "eth0", "", &conf).code(), 101);
    assert!(!state.exists());
    node.add("c1", "a");
    assert!(state.exists());
}

#[test]
fn resolv_conf_and_old_versions() {
    let mut node = Node::subnet("10.1.0.0/24");
    node.write("resolv.conf", "nameserver 10.0.0.2\nsearch a.lan\n");
    node.ipam["resolvConf"] = json!(node.path("resolv.conf"));
    assert_eq!(node.add("c1", "a").json["dns"], json!({"nameservers": ["10.0.0.2"], "search": ["a.lan"]}));
    let mut conf = node.conf();
    conf["cniVersion"] = json!("0.2.0");
    let old = node.call_with("ADD", "c1", "eth0", &pod_args("default", "a"), &conf);
    assert_eq!(old.json["ip4"]["ip"], "10.1.0.2/24");
    conf["ipam"]["ranges"] = json!([[{"subnet": "10.1.0.0/24"}], [{"subnet": "10.2.0.0/24"}]]);
    assert_eq!(node.call_with("ADD", "c2", "eth0", "", &conf).code(), 7);
}

#[test]
fn idle_bindings_do_not_grow_for_ever() {
    let node = Node::new(json!({"subnet": "fd00::/64", "maxIdle": 5}));
    for number in 0..20 {
        node.add(&format!("c{number}"), &format!("p{number}"));
        node.del(&format!("c{number}"), &format!("p{number}"));
    }
    let left: BTreeSet<String> =
        node.list().iter().map(|row| row["pod"].as_str().unwrap().to_owned()).collect();
    assert_eq!(left, ["p15", "p16", "p17", "p18", "p19"].map(String::from).into());
}

#[test]
fn damage_is_mended_from_libcnis_cache() {
    let node = Node::subnet("10.1.0.0/24");
    node.netns("c1", true);
    let address = node.add("c1", "a").addresses();
    node.add("c2", "b");
    node.del("c2", "b");
    let entry = |pod: &str, container: &str, address: &str| {
        cache_entry("net", container, pod, &node.path(&format!("netns-{container}")), &[address])
    };
    node.write("cache/results/net-c1-eth0", entry("a", "c1", "10.1.0.2/24"));
    node.write("cache/results/net-c9-eth0", entry("z", "c9", "10.1.0.77/24"));
    node.write("cache/results/other-c9-eth0", entry("y", "c9", "10.1.0.78/24"));
    node.write("cache/results/net-torn-eth0", "");
    node.write("data/net.redb", "torn");
    let answer = node.add("c3", "c");
    assert!(answer.ok && answer.stderr.contains("set aside as"), "{answer:?}");
    assert_ne!(answer.addresses(), address);
    let rows = node.list();
    let row = |pod: &str| rows.iter().find(|row| row["pod"] == pod);
    assert_eq!(row("a").unwrap()["state"], "active");
    assert_eq!(row("z").unwrap()["state"], "idle", "its namespace is gone");
    assert!(row("y").is_none(), "another network");
    assert_eq!(node.add("c4", "a").addresses(), address);
    assert!(node.told(&["verify"]).contains("nothing wrong"));
}

#[test]
fn moving_over_from_host_local_with_pods_running_and_back() {
    let node = Node::subnet("10.1.0.0/24");
    node.netns("run1", true);
    node.write("data/net/10.1.0.5", "run1\r\neth0");
    node.write("data/net/10.1.0.6", "unknown\neth0");
    node.write("data/net/10.1.0.7", "");
    node.write("data/net/last_reserved_ip.0", "10.1.0.6");
    node.write("data/net/lock", "");
    node.write(
        "cache/results/net-run1-eth0",
        cache_entry("net", "run1", "web-0", &node.path("netns-run1"), &["10.1.0.5/24"]),
    );
    // By itself, at first use; round robin goes on where host-local stopped.
    assert_eq!(node.add("c1", "new").addresses(), ["10.1.0.7"]);
    let row = |address: &str| node.list().into_iter().find(|row| row["address"] == address).unwrap();
    assert_eq!(
        (row("10.1.0.5")["pod"].as_str(), row("10.1.0.5")["state"].as_str()),
        (Some("web-0"), Some("active"))
    );
    assert_eq!(
        (row("10.1.0.6")["container"].as_str(), row("10.1.0.6")["pod"].as_str()),
        (Some("unknown"), Some(""))
    );
    // The pod made by host-local is deleted, and comes back with its address.
    assert!(node.del("run1", "web-0").ok);
    assert_eq!(node.add("run2", "web-0").addresses(), ["10.1.0.5"]);
    let exported = node.path("back");
    node.told(&["export", "--host-local", exported.to_str().unwrap()]);
    let read = |name: &str| std::fs::read_to_string(exported.join(name)).unwrap();
    assert_eq!(read("10.1.0.5"), "run2\r\neth0");
    assert_eq!(read("last_reserved_ip.0"), "10.1.0.7");
    // By hand, into a state that is not new.
    let other = Node::subnet("10.1.0.0/24");
    other.add("x", "x");
    let said = other.told(&["import", "--host-local", exported.to_str().unwrap()]);
    assert!(said.contains("3 of 3 containers"), "{said}");
    assert!(other.told(&["verify"]).contains("4 bindings"));
    let again = other.told(&["import", "--host-local", exported.to_str().unwrap()]);
    assert!(again.contains("0 of 3 containers") && again.contains("3 known already"), "{again}");
}

#[test]
fn what_a_person_sees() {
    let node = Node::subnet("10.1.0.0/24");
    assert!(!node.person(&["list"]).status.success());
    node.add("c1", "web-0");
    node.add("c2", "web-1");
    node.del("c2", "web-1");
    let table = node.told(&["list"]);
    assert!(table.starts_with("ADDRESS") && table.contains("web-0") && table.contains("idle"), "{table}");
    assert!(node.told(&["show", "default/web-0"]).contains("container c1"));
    assert!(node.told(&["list", "--network", "net"]).contains("10.1.0.3"));
    let refused = node.person(&["release", "default/web-0"]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("in use by container c1"), "{refused:?}");
    assert_eq!(node.told(&["release", "default/web-1"]), "10.1.0.3 free\n");
    assert_eq!(
        node.told(&["release", "--stale", "default/web-0"]),
        "10.1.0.2 free\n",
        "its namespace is gone"
    );
    for wrong in [
        &["lists"][..],
        &["show"],
        &["show", "web-0"],
        &["pin", "a/b", "x"],
        &["list", "-o", "yaml"],
        &["reclaim"],
    ] {
        let output = node.person(wrong);
        assert_eq!(output.status.code(), Some(2), "{wrong:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("--help"), "{output:?}");
    }
    assert!(node.person(&["show", "default/web-0"]).status.code() == Some(1));
}
