//! The node daemon in a cluster with a real API server, beside stock flanneld, and on the way from it and back to it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod edge;

use edge::{KUBECONFIG, Node, SECOND, World, conf, peer, proxy::SiteProxy};
use integration::{
    exec::{COMMAND_LIMIT, run, wait_until},
    host::Host,
};
use serde_json::{Value, json};
use std::thread::sleep;

const DUAL: [[&str; 2]; 3] = [
    ["10.244.1.0/24", "fd00:10:244:1::/64"],
    ["10.244.2.0/24", "fd00:10:244:2::/64"],
    ["10.244.3.0/24", "fd00:10:244:3::/64"],
];

fn dual_conf(direct: bool) -> Value {
    json!({"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:10:244::/56",
        "Backend": {"Type": "vxlan", "DirectRouting": direct}})
}

/// Nodes that exist and have their certificates; nothing runs on them yet.
fn cluster(count: u8) -> (World, Vec<Node>) {
    let mut world = World::new();
    world.start_api(usize::from(count));
    let nodes: Vec<Node> = (1..=count).map(|index| world.node(index)).collect();
    for (node, cidrs) in nodes.iter().zip(DUAL) {
        world.equip(node);
        world.create_node(&node.name(), &cidrs);
        // flanneld panics on a Node without any annotation; a controller manager always sets this one.
        world.kubectl(&["annotate", "node", &node.name(), "node.alpha.kubernetes.io/ttl=0"]);
        node.net_conf(&dual_conf(false));
        node.add_pod_network();
    }
    (world, nodes)
}

fn start_flanneld(node: &mut Node, direct: bool) {
    node.start_flanneld(&dual_conf(direct));
    node.within("flanneld's subnet.env", 30 * SECOND, |node| {
        node.host.read("/run/flannel/subnet.env").is_ok()
    });
}

/// SHA-256 of 3,000,000 zero bytes.
const DIGEST_OF_ZEROS: &str = "35bce4eae54ec8e6cc2868baa8d157914d6ae2858811b4cc0c078c94460fa26f";

/// Pod to pod, both families, with small and with large packets.
fn talks(from: &Node, to: &Node) {
    let (own, other) = (from.index, to.index);
    from.within(&format!("node{own} to reach node{other}"), 10 * SECOND, |node| {
        node.host.sh(&format!("ping -c1 -W1 -I 10.244.{own}.1 10.244.{other}.1")).is_ok()
            && node.host.sh(&format!("ping -c1 -W1 -I fd00:10:244:{own}::1 fd00:10:244:{other}::1")).is_ok()
    });
    from.sh(&format!("ping -c1 -W2 -s 1400 -M do -I 10.244.{own}.1 10.244.{other}.1"));
    for (family, server) in
        [("TCP4", format!("10.244.{other}.1")), ("TCP6", format!("[fd00:10:244:{other}::1]"))]
    {
        let mut listener = to.host.command("socat").unwrap();
        listener.args(["-u", &format!("{family}-LISTEN:7777,reuseaddr"), "EXEC:sha256sum"]);
        let listener = std::thread::spawn(move || run(&mut listener, b"", COMMAND_LIMIT).unwrap());
        let send = format!("head -c 3000000 /dev/zero | socat -u - {family}:{server}:7777,connect-timeout=2");
        from.within("a large transfer", 10 * SECOND, |node| node.host.sh(&send).is_ok());
        let received = listener.join().unwrap().stdout;
        assert!(received.contains(DIGEST_OF_ZEROS), "what arrived is not what was sent: {received}");
    }
}

#[test]
fn three_nodes_one_of_them_stock_flanneld() {
    let (world, mut nodes) = cluster(3);
    let (ours, stock) = nodes.split_at_mut(2);
    let stock = &mut stock[0];
    for node in ours.iter_mut() {
        node.start();
    }
    start_flanneld(stock, false);
    for node in ours.iter() {
        node.wait_ready();
        let others: Vec<u8> = [1, 2, 3].into_iter().filter(|index| *index != node.index).collect();
        node.within("its peers", 20 * SECOND, |node| node.routes_exactly(&others));
        let said = world.get_node(&node.name());
        let condition = &said["status"]["conditions"][0];
        assert_eq!(
            (&condition["type"], &condition["status"]),
            (&json!("NetworkUnavailable"), &json!("False"))
        );
        assert_eq!(
            said["metadata"]["annotations"]["flannel.alpha.coreos.com/public-ip"],
            json!(node.address())
        );
    }
    for (a, b) in [(0, 1), (1, 0)] {
        talks(&ours[a], &ours[b]);
    }
    for node in ours.iter() {
        talks(node, stock);
        talks(stock, node);
    }
    // The same key set and spelling as flanneld's.
    let keys = |name: &str| {
        let node = world.get_node(name);
        let annotations = node["metadata"]["annotations"].as_object().unwrap();
        annotations.keys().filter(|key| key.starts_with("flannel")).cloned().collect::<Vec<_>>()
    };
    assert_eq!(keys("node1"), keys("node3"));

    // One of ours loses power while the API server is out of reach. Nothing else moves.
    let mac = ours[0].mac();
    world.blackhole();
    world.reboot(&mut ours[0]);
    ours[0].add_pod_network();
    ours[0].start();
    ours[0].within("readiness", 5 * SECOND, Node::is_ready);
    assert_eq!(ours[0].mac(), mac);
    talks(&ours[0], stock);
    talks(stock, &ours[0]);
    talks(&ours[1], &ours[0]);
    world.heal();

    // Direct routes instead, on ours alone: the way there differs from the way back.
    for node in ours.iter_mut() {
        node.stop();
        node.net_conf(&dual_conf(true));
        node.start();
        node.wait_ready();
        let direct =
            |node: &Node| node.sh("ip route; ip -6 route").contains("10.244.3.0/24 via 10.10.0.13 dev eth0");
        node.within("direct routes", 10 * SECOND, direct);
        assert!(node.routed().is_empty(), "{:?}", node.routed());
    }
    talks(&ours[0], &ours[1]);
    talks(&ours[1], stock);
    talks(stock, &ours[1]);
    // And on all of them.
    stock.stop();
    start_flanneld(stock, true);
    stock.within("flanneld's direct routes", 20 * SECOND, |node| {
        let routes = node.sh("ip route; ip -6 route");
        routes.contains("10.244.1.0/24 via 10.10.0.11 dev eth0")
            && routes.contains("fd00:10:244:1::/64 via fd00:1::11 dev eth0")
    });
    for node in ours.iter() {
        talks(node, stock);
        talks(stock, node);
    }
}

#[test]
fn peers_that_change_while_we_are_up_and_while_we_are_down() {
    let (world, mut nodes) = cluster(1);
    let node = &mut nodes[0];
    node.net_conf(&json!({"Network": "10.244.0.0/16"}));
    for index in [22, 23, 24, 25] {
        world.create_peer(&peer(&format!("peer{index}"), index));
    }
    node.start();
    node.wait_ready();
    node.within("all", 5 * SECOND, |node| node.routes_exactly(&[22, 23, 24, 25]));
    // A streaming list, not pages: the server counts those that it has served.
    assert!(!node.log().contains("reading pages"), "{}", node.log());
    let metrics = world.kubectl(&["get", "--raw=/metrics"]);
    let served = |line: &&str| {
        line.starts_with("apiserver_watch_list_duration_seconds_count") && line.contains("resource=\"nodes\"")
    };
    assert!(metrics.lines().any(|line| served(&line)), "no streaming list of nodes");
    let leads = |node: &Node, mac: &str, ip: &str| {
        node.sh("bridge fdb show dev flannel.1").contains(&format!("{mac} dst {ip} "))
    };

    world.annotate("peer22", "public-ip=10.10.0.122");
    node.within("the address", 3 * SECOND, |node| leads(node, "02:00:00:00:00:16", "10.10.0.122"));
    world.annotate("peer23", r#"backend-data={"VNI":1,"VtepMAC":"02:00:00:00:01:17"}"#);
    node.within("the MAC", 3 * SECOND, |node| {
        leads(node, "02:00:00:00:01:17", "10.10.0.23")
            && !leads(node, "02:00:00:00:00:17", "10.10.0.23")
            && node.sh("ip neigh show dev flannel.1").contains("10.244.23.0 lladdr 02:00:00:00:01:17")
    });
    // Broken, half written, taken back: what was known stays, and it is said.
    world.annotate("peer24", "backend-data=nonsense");
    world.annotate("peer25", "kube-subnet-manager=false");
    node.within("the one that left", 3 * SECOND, |node| node.routes_exactly(&[22, 23, 24]));
    assert!(node.log().contains("peer24 is unclear about itself"));

    // A day off: everything that can change does.
    node.stop();
    world.kubectl(&["delete", "node", "peer22", "peer23", "peer24"]);
    world.annotate("peer25", "kube-subnet-manager=true");
    world.annotate("peer25", "public-ip=10.10.0.125");
    for (name, index) in [("new22", 22), ("new23", 23), ("new26", 26)] {
        let mut new = peer(name, index);
        new["metadata"]["annotations"]["flannel.alpha.coreos.com/public-ip"] =
            json!(format!("10.10.0.2{index}"));
        world.create_peer(&new);
    }
    node.start();
    node.within("the new ones", 15 * SECOND, |node| {
        node.is_ready() && node.routes_exactly(&[22, 23, 25, 26])
    });
    assert!(
        leads(node, "02:00:00:00:00:16", "10.10.0.222") && leads(node, "02:00:00:00:00:19", "10.10.0.125")
    );
    assert!(node.status().1, "{}", node.status().0);

    // Our annotations, removed or overruled by a person.
    world.annotate("node1", "public-ip-overwrite=203.0.113.7");
    let said = |key: &str| {
        world.get_node("node1")["metadata"]["annotations"][format!("flannel.alpha.coreos.com/{key}")].clone()
    };
    node.within("the overwritten address", 30 * SECOND, |_| said("public-ip") == "203.0.113.7");
    assert!(node.sh("ip -d link show flannel.1").contains("local 10.10.0.11"));
    world.annotate("node1", "public-ip-overwrite-");
    node.within("our own again", 30 * SECOND, |_| said("public-ip") == json!(node.address()));
    world.annotate("node1", "backend-data-");
    node.within("the MAC again", 30 * SECOND, |node| {
        said("backend-data").as_str().is_some_and(|data| data.contains(&node.mac()))
    });
    // An address that the node has beside the first: used as local address and published.
    node.sh("ip addr add 10.10.0.77/24 dev eth0");
    world.annotate("node1", "node-public-ip=10.10.0.77");
    node.within("the other address", 30 * SECOND, |node| {
        node.sh("ip -d link show flannel.1").contains("local 10.10.0.77") && said("public-ip") == "10.10.0.77"
    });
}

/// flannel -> edgeflanneld -> flannel, with something that keeps talking through all of it.
#[test]
fn from_flannel_and_back() {
    let (world, mut nodes) = cluster(2);
    for node in &mut nodes {
        start_flanneld(node, false);
    }
    let [a, b] = nodes.as_mut_slice() else { panic!() };
    talks(a, b);
    let (mac, annotations) = (a.mac(), world.get_node("node1")["metadata"]["annotations"].clone());
    let env = a.host.read("/run/flannel/subnet.env").unwrap();
    // Leftovers of iptables-nft, as flanneld without EnableNFTables makes them.
    a.sh("iptables-nft -t nat -N FLANNEL-POSTRTG; iptables-nft -t nat -A FLANNEL-POSTRTG -s 10.244.0.0/16 -j MASQUERADE; \
        iptables-nft -t nat -A POSTROUTING -m comment --comment 'flanneld masq' -j FLANNEL-POSTRTG; \
        iptables-nft -N FLANNEL-FWD; iptables-nft -A FLANNEL-FWD -s 10.244.0.0/16 -j ACCEPT; iptables-nft -A FORWARD -j FLANNEL-FWD; \
        iptables-nft -t nat -A POSTROUTING -s 192.0.2.0/24 -j MASQUERADE");
    // And of the old iptables, which nftables does not show.
    let legacy = "iptables-legacy -N FLANNEL-FWD; iptables-legacy -A FLANNEL-FWD -s 10.244.0.0/16 -j ACCEPT; \
        iptables-legacy -A FORWARD -m comment --comment 'flanneld forward' -j FLANNEL-FWD";
    a.sh(legacy);
    let legacy = a.sh("iptables-legacy -S");
    let mut pinging = b.host.command("sh").unwrap();
    pinging.args(["-c", "ping -i 0.1 -W 1 -I 10.244.2.1 10.244.1.1 > /run/pings"]);
    let mut pinging = b.host.spawn(&mut pinging, &world.dir.path().join("ping.log")).unwrap();
    sleep(SECOND);
    a.stop();
    a.start();
    a.wait_ready();
    assert_eq!(a.mac(), mac);
    a.within("flannel's leftovers to go", 5 * SECOND, |node| {
        !node.sh("nft list ruleset").to_lowercase().contains("flannel-")
    });
    assert!(a.sh("nft list ruleset").contains("192.0.2.0/24"), "somebody else's rule stays");
    assert!(
        a.log().contains("look for its chains with `iptables-legacy-save | grep FLANNEL`"),
        "a person is told what cannot be removed from here:\n{}",
        a.log()
    );
    assert_eq!(a.sh("iptables-legacy -S"), legacy);
    assert_eq!(world.get_node("node1")["metadata"]["annotations"], annotations);
    let mtu =
        |env: &str| env.lines().filter(|line| !line.contains("MTU")).map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(mtu(&a.host.read("/run/flannel/subnet.env").unwrap()), mtu(&env));
    talks(a, b);
    talks(b, a);
    a.stop();
    let removed = run(&mut a.command(&["remove"]), b"", COMMAND_LIMIT).unwrap();
    assert!(removed.status.success(), "{removed:?}");
    start_flanneld(a, false);
    assert_eq!(a.mac(), mac);
    assert!(!a.sh("nft list ruleset").contains("table inet edgeflannel"));
    talks(b, a);
    sleep(SECOND);
    pinging.terminate().unwrap();
    let lost = b.host.read("/run/pings").unwrap();
    let seen: Vec<u32> = lost
        .lines()
        .filter_map(|line| line.split("icmp_seq=").nth(1)?.split(' ').next()?.parse().ok())
        .collect();
    let gap = seen.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap();
    println!("longest gap: {gap} pings of 0.1 s");
    assert!(gap < 50, "a gap of {gap} pings");
}

/// What we ship is accepted by a real API server, strictly, and in force there.
#[test]
fn manifests_and_the_policy() {
    let mut world = World::new();
    world.start_api(2);
    world.kubectl(&["create", "serviceaccount", "default", "-n", "kube-system"]);
    let files = [
        "daemonset/edgeflanneld.yaml",
        "static-pod/edgeflanneld.yaml",
        "rbac/edgeflanneld.yaml",
        "rbac/own-node-only.yaml",
        "rbac/edgeflanneld-kubelet.yaml",
    ];
    world.apply_file("rbac/edgeflanneld.yaml");
    for file in files {
        world.kubectl_in(&["apply", "--dry-run=server", "--validate=strict", "-f", "-"], &conf(file));
    }
    world.apply_file("rbac/own-node-only.yaml");
    world.create_node("node1", &["10.244.1.0/24"]);
    world.create_node("node2", &["10.244.2.0/24"]);
    let token = |node: &[&str]| {
        let words = ["create", "token", "edgeflanneld", "-n", "kube-system"];
        world.kubectl(&[&words[..], node].concat()).trim().to_owned()
    };
    let bound = token(&["--bound-object-kind=Node", "--bound-object-name=node1"]);
    let unbound = token(&[]);
    let patch = |token: &str, node: &str, patch: &Value| {
        let url = format!("https://10.10.0.2:6443/api/v1/nodes/{node}/status");
        let ca = world.dir.path().join("pki/ca.crt");
        let words = [
            "curl",
            "-s",
            "-o",
            "/dev/null",
            "-w",
            "%{http_code}",
            "-X",
            "PATCH",
            "--cacert",
            ca.to_str().unwrap(),
        ];
        let headers = [
            format!("Authorization: Bearer {token}"),
            "Content-Type: application/strategic-merge-patch+json".into(),
        ];
        let body = patch.to_string();
        let more = ["-H", &headers[0], "-H", &headers[1], "-d", &body, &url];
        world.cloud.run(words.iter().chain(&more)).unwrap().stdout
    };
    let ours = json!({"metadata": {"annotations": {"flannel.alpha.coreos.com/public-ip": "10.10.0.11"}},
        "status": {"conditions": [{"type": "NetworkUnavailable", "status": "False", "reason": "FlannelIsUp"}]}});
    // A new policy takes a moment to be heard of.
    let refused = || patch(&bound, "node2", &ours) == "403";
    wait_until("the policy to be in force", 20 * SECOND, refused).unwrap();
    assert_eq!(patch(&bound, "node1", &ours), "200");
    assert_eq!(patch(&unbound, "node1", &ours), "403");
    for more in [
        json!({"metadata": {"annotations": {"other.io/x": "y"}}}),
        json!({"metadata": {"labels": {"x": "y"}}}),
        json!({"metadata": {"finalizers": ["other.io/x"]}}),
    ] {
        assert_eq!(patch(&bound, "node1", &more), "403", "{more}");
    }
    // With a kubelet's certificate: its own Node, and all may be read.
    let mut nodes = [world.node(1), world.node(2)];
    for node in &mut nodes {
        world.equip(node);
        node.start();
    }
    for node in &nodes {
        node.wait_ready();
    }
    nodes[0].within("its peer", 20 * SECOND, |node| node.routes_exactly(&[2]));
    let theirs = "curl -s -o /dev/null -w '%{http_code}' -X PATCH --cacert /etc/kubernetes/pki/ca.crt --cert /etc/kubernetes/pki/kubelet.crt \
        --key /etc/kubernetes/pki/kubelet.key -H 'Content-Type: application/merge-patch+json' -d '{}' https://10.10.0.2:6443/api/v1/nodes/node2/status";
    assert_eq!(nodes[0].sh(theirs), "403");
}

/// What stands between a node and the API server: each is said and tried again, with nothing restarted.
#[test]
fn what_stands_between_a_node_and_the_api_server() {
    let mut world = World::new();
    world.start_api(1);
    let mut node = world.node(1);
    world.equip(&node);
    world.create_node("node1", &["10.244.1.0/24"]);
    credentials_that_come_late(&mut node);
    world.create_peer(&peer("peer22", 22));
    node.within("its peer", 20 * SECOND, |node| node.routes_exactly(&[22]));
    a_clock_at_1970(&world, &mut node);
    the_sites_proxy(&world, &mut node);
}

/// Credentials that are not there yet, or somebody else's.
fn credentials_that_come_late(node: &mut Node) {
    node.sh("cd /etc/kubernetes; mv pki late; mv kubelet.kubeconfig late.kubeconfig");
    node.start();
    node.within("life", 5 * SECOND, |node| node.http("/healthz").0 == 200);
    sleep(SECOND);
    assert_eq!(node.http("/readyz").0, 503);
    node.sh("cd /etc/kubernetes; mv late.kubeconfig kubelet.kubeconfig");
    sleep(SECOND);
    // Somebody else's authority: what a wrong server looks like.
    node.sh("cd /etc/kubernetes; cp -r late pki; openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes \
        -keyout pki/ca.key -out pki/ca.crt -subj /CN=other 2>/dev/null");
    node.within("to say so", 20 * SECOND, |node| node.log().contains("certificate"));
    node.sh("cd /etc/kubernetes; cp late/ca.crt pki/ca.crt");
    node.within("to join", 20 * SECOND, Node::is_ready);
}

/// A board without a battery boots in 1970: to its clock, the API server's certificate is not valid yet. Here the clock is
/// right and the certificate tomorrow's, which is the same comparison.
fn a_clock_at_1970(world: &World, node: &mut Node) {
    let mac = node.mac();
    node.stop();
    let pki = world.dir.path().join("pki");
    let pki = pki.display();
    let conf = "[ca]\ndefault_ca = d\n[d]\ndatabase = young/index\nnew_certs_dir = young\nrand_serial = yes\n\
        default_md = sha256\npolicy = p\ncopy_extensions = copy\n[p]\ncommonName = supplied\n";
    let (begin, end) = ("$(date -u -d '+1 day' +%Y%m%d%H%M%SZ)", "$(date -u -d '+9 days' +%Y%m%d%H%M%SZ)");
    let ours = world.cloud.sh(&format!(
        "cd {pki}; mkdir young; : > young/index; printf '{conf}' > young/conf; cp apiserver.crt young/right.crt; \
         openssl req -new -config /dev/null -key apiserver.key -subj /CN=kube-apiserver -addext subjectAltName=IP:10.10.0.2 -out young/csr; \
         openssl ca -batch -notext -config young/conf -cert ca.crt -keyfile ca.key -in young/csr -out young/crt \
             -startdate {begin} -enddate {end} 2>&1; mv young/crt apiserver.crt"
    ));
    ours.unwrap();
    // 60: the server's certificate is not good.
    let refused = || {
        let line = format!("curl -s -m 3 --cacert {pki}/ca.crt https://10.10.0.2:6443/readyz || [ $? = 60 ]");
        world.cloud.sh(&line).is_ok_and(|body| body.is_empty())
    };
    wait_until("the API server to show the certificate of tomorrow", 90 * SECOND, refused).unwrap();

    world.reboot(node);
    node.clear_log();
    node.start();
    node.within("readiness", 5 * SECOND, Node::is_ready);
    assert!(node.routes_exactly(&[22]) && node.mac() == mac);
    let sentence = "its certificate is not valid yet by this node's clock, only from ";
    node.within("the sentence", 20 * SECOND, |node| node.log().contains(sentence));
    sleep(5 * SECOND);
    let log = node.log();
    let warned = log.lines().filter(|line| line.contains("WARN") && line.contains(sentence)).count();
    assert_eq!(warned, 1, "said once:\n{log}");

    world.cloud.sh(&format!("cd {pki}; mv young/right.crt apiserver.crt")).unwrap();
    wait_until("the certificate of today", 90 * SECOND, || {
        world.try_kubectl(&["get", "--raw=/readyz"]).is_ok()
    })
    .unwrap();
    world.create_peer(&peer("peer23", 23));
    node.within("to follow", 30 * SECOND, |node| node.routes_exactly(&[22, 23]));
}

/// The only way out of the site is an HTTP proxy that wants a password.
fn the_sites_proxy(world: &World, node: &mut Node) {
    let site = Host::new("site").unwrap();
    world.attach(&site, "site", "eth0");
    site.sh("ip addr add 10.10.0.3/24 dev eth0").unwrap();
    let proxy = SiteProxy::start(&site);
    node.stop();
    node.sh(
        "nft 'table inet wall { chain o { type filter hook output priority 0; ip daddr 10.10.0.2 drop; }; }'",
    );
    for (url, said) in [
        ("https://10.10.0.3:3128", "the proxy https://10.10.0.3:3128/ cannot be used"),
        (
            "http://10.10.0.3:3128",
            "through the proxy http://10.10.0.3:3128/: tunnel error: proxy authorization required",
        ),
        ("http://10.10.0.3:9", "through the proxy http://10.10.0.3:9/"),
    ] {
        node.clear_log();
        node.start_where(&[KUBECONFIG], &[("HTTPS_PROXY", url)]);
        node.within(said, 20 * SECOND, |node| node.log().contains(said) && node.is_ready());
        node.stop();
    }
    node.start_where(
        &[KUBECONFIG],
        &[("HTTPS_PROXY", "http://edge:secret@10.10.0.3:3128"), ("NO_PROXY", "10.96.0.0/12,example.com")],
    );
    world.create_peer(&peer("peer24", 24));
    node.within("to follow", 30 * SECOND, |node| node.routes_exactly(&[22, 23, 24]));
    let asked = proxy.asked();
    assert!(asked.iter().all(|head| head.starts_with("CONNECT 10.10.0.2:6443 HTTP/1.1\r\n")), "{asked:?}");
    assert!(!node.log().contains("secret"), "{}", node.log());
}
