//! Our plugins beside those of others: either half replaced, the stock ones chained after ours, and the move from
//! host-local with pods running.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use integration::{cnitool::CniTool, exec, host::Host, link, tools};
use serde_json::{Value, json};
use std::time::Duration;

fn path(dirs: &[&str]) -> String {
    let ours = tools::ours().unwrap().to_string_lossy().into_owned();
    std::iter::once(ours.as_str()).chain(dirs.iter().copied()).collect::<Vec<_>>().join(":")
}

/// Debian's packages, as an operator has them.
const DEBIAN: &str = "/usr/lib/cni";

fn list(plugins: &Value) -> Value {
    json!({"cniVersion": "1.0.0", "name": "pods", "plugins": plugins})
}

#[test]
fn debians_bridge_over_ipam_sticky() {
    let host = Host::new("bridge").unwrap();
    let conf = list(&json!([{
        "type": "bridge", "isDefaultGateway": true, "ipMasq": true, "hairpinMode": true,
        "ipam": {"type": "ipam-sticky", "ranges": [[{"subnet": "10.244.1.0/24"}]]}
    }]));
    let cni = CniTool::with_path(&host, &conf, &path(&[DEBIAN])).unwrap();
    let pod = cni.pod("default", "web-0").unwrap();
    let address = cni.add(&pod).unwrap().address().unwrap();
    cni.check(&pod).unwrap();
    cni.del(&pod).unwrap();
    cni.add(&cni.pod("default", "web-1").unwrap()).unwrap();
    let again = cni.pod("default", "web-0").unwrap();
    assert_eq!(cni.add(&again).unwrap().address().unwrap(), address);
    host.sh_in(&again.netns, "ping -c1 -W2 10.244.1.1").unwrap();
}

#[test]
fn edgeflannel_over_debians_host_local() {
    let host = Host::new("hostlocal").unwrap();
    let conf = list(&json!([{
        "type": "edgeflannel",
        "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.244.1.0/24"}], [{"subnet": "fd00:1::/64"}]]}
    }]));
    let cni = CniTool::with_path(&host, &conf, &path(&[DEBIAN])).unwrap();
    let pod = cni.pod("default", "web-0").unwrap();
    assert_eq!(cni.add(&pod).unwrap().addresses(), ["10.244.1.2/24", "fd00:1::2/64"]);
    host.sh_in(&pod.netns, "ping -c1 -W2 10.244.1.1; ping -c1 -W2 fd00:1::1").unwrap();
    cni.check(&pod).unwrap();
    cni.del(&pod).unwrap();
    assert!(host.sh("ls /var/lib/cni/networks/pods/10.244.1.2").is_err(), "host-local was told");
}

/// Ours first, then what operators chain after it.
fn chained(cni_path: &str, their_check_works: bool) {
    let node = Host::new("chain").unwrap();
    let world = Host::new("outside").unwrap();
    link::connect((&node, "uplink"), (&world, "eth0")).unwrap();
    node.sh("ip addr add 192.0.2.1/24 dev uplink").unwrap();
    world.sh("ip addr add 192.0.2.2/24 dev eth0").unwrap();
    let conf = list(&json!([
        {"type": "edgeflannel", "ipMasq": true, "ipam": {"ranges": [[{"subnet": "10.244.1.0/24"}]]}},
        {"type": "portmap", "capabilities": {"portMappings": true}},
        {"type": "bandwidth", "capabilities": {"bandwidth": true}},
        {"type": "tuning", "sysctl": {"net.core.somaxconn": "500"}, "mtu": 1300},
    ]));
    let cni = CniTool::with_path(&node, &conf, cni_path).unwrap();
    let wishes = json!({
        "portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}],
        "bandwidth": {"ingressRate": 8_000_000, "ingressBurst": 800_000},
    });
    let pod = cni.pod("default", "web-0").unwrap().with_capabilities(wishes);
    let added = cni.add(&pod).unwrap();
    let inside = node.sh_in(&pod.netns, "cat /proc/sys/net/core/somaxconn; ip link show eth0").unwrap();
    assert!(inside.contains("500\n") && inside.contains("mtu 1300"), "{inside}");
    let veth = added.0["interfaces"][1]["name"].as_str().unwrap().to_owned();
    assert!(node.sh(&format!("tc qdisc show dev {veth}")).unwrap().contains("tbf"));
    // The later plugins changed things within their rights: our CHECK must not mind.
    let checked = cni.call("check", &pod).unwrap();
    assert_eq!(checked.status.success(), their_check_works, "{checked:?}");
    assert!(!checked.stderr.contains("edgeflannel"), "{checked:?}");

    let mut server = node.command("nsenter").unwrap();
    let serve = "while :; do echo served | socat -u - TCP-LISTEN:80,reuseaddr; done";
    server.args([&format!("--net=/run/netns/{}", pod.netns), "--", "sh", "-c", serve]);
    let log = tempfile::NamedTempFile::new().unwrap();
    let mut server = node.spawn(&mut server, log.path()).unwrap();
    let fetched = exec::wait_for("the pod's answer on the host port", Duration::from_secs(10), || {
        Ok(Some(world.sh("socat -u TCP:192.0.2.1:8080,connect-timeout=1 - | grep served")?))
    });
    server.kill().unwrap();
    assert_eq!(fetched.unwrap().trim(), "served");
    cni.del(&pod).unwrap();
    assert!(world.sh("socat -u TCP:192.0.2.1:8080,connect-timeout=1 -").is_err());
}

#[test]
fn debians_portmap_bandwidth_and_tuning_after_ours() {
    // CHECK of its portmap (1.1.1) looks for IPv6 chains that it never made.
    chained(&path(&[DEBIAN]), false);
}

#[test]
fn todays_portmap_bandwidth_and_tuning_after_ours() {
    chained(&path(&[&tools::cni_plugins_dir().unwrap().to_string_lossy()]), true);
}

#[test]
fn from_host_local_with_pods_running_and_back() {
    let host = Host::new("move").unwrap();
    let ipam = |kind: &str| json!({"type": kind, "ranges": [[{"subnet": "10.244.1.0/24"}]]});
    let stock = list(&json!([{"type": "bridge", "isDefaultGateway": true, "ipam": ipam("host-local")}]));
    let ours = list(&json!([{"type": "edgeflannel", "ipam": ipam("ipam-sticky")}]));
    let with = |conf: &Value| CniTool::with_path(&host, conf, &path(&[DEBIAN])).unwrap();

    let cni = with(&stock);
    let running = cni.pod("default", "web-0").unwrap();
    let kept = cni.pod("default", "db-0").unwrap();
    let address = cni.add(&running).unwrap().address().unwrap();
    let kept_address = cni.add(&kept).unwrap().address().unwrap();

    // The conflist changes while the pods run.
    let cni = with(&ours);
    let newcomer = cni.pod("default", "new-0").unwrap();
    let new_address = cni.add(&newcomer).unwrap().address().unwrap();
    assert!(![&address, &kept_address].contains(&&new_address), "an address of a running pod was given away");
    host.sh_in(&newcomer.netns, &format!("ping -c1 -W2 {address}; ping -c1 -W2 {kept_address}")).unwrap();
    // A pod of before is deleted properly, and comes back on its address: libcni's cache knew its name.
    cni.del(&running).unwrap();
    assert!(host.sh_in(&running.netns, "ip link show eth0").is_err());
    let again = cni.pod("default", "web-0").unwrap();
    assert_eq!(cni.add(&again).unwrap().address().unwrap(), address);

    // And back: host-local honours what ours had given out.
    let ipam_sticky = tools::ours().unwrap().join("ipam-sticky");
    let export = [ipam_sticky.to_str().unwrap(), "export", "--host-local", "/var/lib/cni/networks/pods"];
    host.run(export).unwrap().ok().unwrap();
    let cni = with(&stock);
    let last = cni.pod("default", "last").unwrap();
    let last_address = cni.add(&last).unwrap().address().unwrap();
    assert!(![&address, &kept_address, &new_address].contains(&&last_address));
}
