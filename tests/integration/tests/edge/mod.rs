//! Edge nodes on one LAN with a cloud: each node a host of its own, `edgeflanneld` from the build, and an API server that
//! is either the real one ([`World::start_api`]) or one that misbehaves on purpose ([`fake`]).
//!
//! ```text
//! cloud 10.10.0.2 ─┐
//! node1 10.10.0.11 ├─ switch (one bridge)
//! node2 10.10.0.12 ┘
//! ```

#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "each test file (and the bench of the overlay) uses its part, and a test fails by panicking"
)]

pub mod fake;
pub mod proxy;

use integration::{
    control_plane::ControlPlane,
    daemons::{Daemon, Daemons},
    exec::{COMMAND_LIMIT, run, wait_until},
    host::Host,
    link, tools,
    topology::{self, Options},
};
use serde_json::{Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

pub const SECOND: Duration = Duration::from_secs(1);

/// The kubelet's credential, as the daemon's flag names it.
pub const KUBECONFIG: &str = "--kubeconfig-file=/etc/kubernetes/kubelet.kubeconfig";

/// The LAN, the cloud, and a place for logs.
pub struct World {
    pub switch: Host,
    pub cloud: Host,
    pub dir: tempfile::TempDir,
    api: Option<ControlPlane>,
}

impl World {
    pub fn new() -> Self {
        let (switch, cloud) = (Host::new("switch").unwrap(), Host::new("cloud").unwrap());
        switch.sh("ip link add br0 type bridge && ip link set br0 up").unwrap();
        let world = Self { switch, cloud, dir: tempfile::tempdir().unwrap(), api: None };
        world.attach(&world.cloud, "cloud", "eth0");
        world.cloud.sh("ip addr add 10.10.0.2/24 dev eth0").unwrap();
        world
    }

    /// Plugs an interface of a host into the switch.
    pub fn attach(&self, host: &Host, port: &str, interface: &str) {
        let _ = self.switch.sh(&format!("ip link del {port} 2>/dev/null"));
        link::connect((&self.switch, port), (host, interface)).unwrap();
        self.switch.sh(&format!("ip link set {port} master br0")).unwrap();
    }

    /// A node with its address, its certificates if there are any, and net-conf.json.
    pub fn node(&self, index: u8) -> Node {
        let host = Host::new(&format!("node{index}")).unwrap();
        let node = Node { host, index, log: self.dir.path().join(format!("node{index}.log")), daemon: None };
        node.net_conf(&json!({"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}));
        self.plug(&node);
        node
    }

    /// Gives a node its cable and address: after its making, and after each reboot.
    pub fn plug(&self, node: &Node) {
        self.attach(&node.host, &format!("p{}", node.index), "eth0");
        let address = node.address();
        let (index, v6) = (node.index, format!("fd00:1::{}", 10 + node.index));
        node.host
            .sh(&format!(
                // A machine's card keeps its address over a reboot, so that nobody's ARP cache is wrong.
                "ip link set eth0 address 0a:00:00:00:00:{index:02x}; ip addr add {address}/24 dev eth0; ip route add default via 10.10.0.1; \
                 ip addr add {v6}/64 dev eth0 nodad; ip -6 route add default via fd00:1::1"
            ))
            .unwrap();
    }

    /// Power off and on again, with the cable.
    pub fn reboot(&self, node: &mut Node) {
        node.daemon = None;
        node.host.reboot().unwrap();
        self.plug(node);
    }

    /// Starts etcd and kube-apiserver, with certificates for `nodes` nodes, and lets kubelets read all Nodes.
    pub fn start_api(&mut self, nodes: usize) {
        let daemons = Daemons::new(self.dir.path()).unwrap();
        let mut api = ControlPlane::new(self.dir.path(), daemons);
        let sites = topology::plan(&Options { nodes, ..Options::default() }).unwrap();
        api.make_certificates(&sites).unwrap();
        api.start_api(&self.cloud, None).unwrap();
        self.api = Some(api);
        self.wait_api();
        self.apply_file("rbac/edgeflanneld-kubelet.yaml");
    }

    pub fn wait_api(&self) {
        let ready = || self.try_kubectl(&["get", "--raw=/readyz"]).is_ok_and(|answer| answer == "ok");
        wait_until("the API server to be ready", Duration::from_secs(120), ready).unwrap();
    }

    pub fn equip(&self, node: &Node) {
        self.api.as_ref().unwrap().equip(&node.host).unwrap();
    }

    pub fn try_kubectl(&self, arguments: &[&str]) -> anyhow::Result<String> {
        self.api.as_ref().unwrap().kubectl(&self.cloud, arguments)
    }

    pub fn kubectl(&self, arguments: &[&str]) -> String {
        self.try_kubectl(arguments).unwrap()
    }

    pub fn kubectl_in(&self, arguments: &[&str], stdin: &str) -> String {
        let mut command = self.api.as_ref().unwrap().kubectl_command(&self.cloud).unwrap();
        run(command.args(arguments), stdin.as_bytes(), COMMAND_LIMIT).unwrap().ok().unwrap()
    }

    /// Applies a file of conf/.
    pub fn apply_file(&self, name: &str) -> String {
        self.kubectl_in(&["apply", "--validate=strict", "-f", "-"], &conf(name))
    }

    /// Registers a Node with its pod CIDRs, as the kubelet and the controller manager would.
    pub fn create_node(&self, name: &str, pod_cidrs: &[&str]) {
        let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name},
            "spec": {"podCIDR": pod_cidrs.first(), "podCIDRs": pod_cidrs}});
        self.kubectl_in(&["create", "-f", "-"], &node.to_string());
    }

    /// A Node with the annotations of a running flannel.
    pub fn create_peer(&self, peer: &Value) {
        self.kubectl_in(&["create", "-f", "-"], &peer.to_string());
    }

    pub fn get_node(&self, name: &str) -> Value {
        serde_json::from_str(&self.kubectl(&["get", "node", name, "-o", "json"])).unwrap()
    }

    pub fn annotate(&self, name: &str, annotation: &str) {
        self.kubectl(&[
            "annotate",
            "--overwrite",
            "node",
            name,
            &format!("flannel.alpha.coreos.com/{annotation}"),
        ]);
    }

    /// From now on the cloud's packets vanish: SYNs are dropped, not refused.
    pub fn blackhole(&self) {
        self.cloud
            .sh(
                "nft 'table inet cut { chain i { type filter hook input priority -300; iifname eth0 drop; }; \
                 chain o { type filter hook output priority -300; oifname eth0 drop; }; }'",
            )
            .unwrap();
    }

    pub fn heal(&self) {
        self.cloud.sh("nft delete table inet cut").unwrap();
    }
}

/// A file of conf/.
pub fn conf(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../conf").join(name);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// A Node object as flanneld publishes it.
pub fn peer(name: &str, index: u8) -> Value {
    let key = |name: &str| format!("flannel.alpha.coreos.com/{name}");
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": name, "annotations": {
            key("kube-subnet-manager"): "true",
            key("backend-type"): "vxlan",
            key("backend-data"): format!(r#"{{"VNI":1,"VtepMAC":"02:00:00:00:00:{index:02x}"}}"#),
            key("public-ip"): format!("10.10.0.{index}"),
        }},
        "spec": {"podCIDR": format!("10.244.{index}.0/24"), "podCIDRs": [format!("10.244.{index}.0/24")]},
    })
}

/// What the pods of [`numbered_peer`]s have their addresses from.
pub const NUMBERED_NETWORK: &str = "100.64.0.0/10";

/// One of up to 16,000 nodes.
pub fn numbered_peer(n: u16) -> Value {
    let (a, b) = (n / 256, n % 256);
    let mut node = peer(&format!("peer{n}"), 0);
    let annotations = &mut node["metadata"]["annotations"];
    annotations["flannel.alpha.coreos.com/backend-data"] =
        json!(format!(r#"{{"VNI":1,"VtepMAC":"02:00:00:01:{a:02x}:{b:02x}"}}"#));
    annotations["flannel.alpha.coreos.com/public-ip"] = json!(format!("172.16.{a}.{b}"));
    let cidr = format!("100.{}.{b}.0/24", 64 + a);
    node["spec"] = json!({"podCIDR": cidr, "podCIDRs": [cidr]});
    node
}

/// A node and its daemon.
pub struct Node {
    pub host: Host,
    pub index: u8,
    pub log: PathBuf,
    pub daemon: Option<Daemon>,
}

impl Node {
    pub fn name(&self) -> String {
        format!("node{}", self.index)
    }

    pub fn address(&self) -> String {
        format!("10.10.0.{}", 10 + self.index)
    }

    pub fn net_conf(&self, conf: &Value) {
        self.host.write("/etc/kube-flannel/net-conf.json", conf.to_string()).unwrap();
    }

    pub fn command(&self, flags: &[&str]) -> std::process::Command {
        let mut command = self.host.command(tools::ours().unwrap().join("edgeflanneld")).unwrap();
        command.args(flags);
        command
    }

    /// Starts the daemon with these flags beside those that all have.
    pub fn start_with(&mut self, flags: &[&str]) {
        self.start_where(flags, &[]);
    }

    /// The same, with variables in its environment.
    pub fn start_where(&mut self, flags: &[&str], environment: &[(&str, &str)]) {
        let mut command = self.command(&["--ip-masq", "--healthz-port=8081", "--log-level=debug"]);
        command.args(flags).envs(environment.iter().copied());
        self.daemon = Some(self.host.spawn(&mut command, &self.log).unwrap());
    }

    /// Against the real API server, with the kubelet's credential.
    pub fn start(&mut self) {
        self.start_with(&[KUBECONFIG]);
    }

    /// Against the fake one.
    pub fn start_fake(&mut self) {
        self.start_with(&["--kube-api-url=http://10.10.0.2:8080"]);
    }

    /// Stock flanneld with this net-conf.json, under the admin's credential: it has no identity of its own here.
    pub fn start_flanneld(&mut self, conf: &Value) {
        let mut conf = conf.clone();
        // Its check for br_netfilter looks at a file that shows only where a bridge's namespace has the module.
        conf["EnableNFTables"] = json!(true);
        self.host.write("/etc/flanneld/net-conf.json", conf.to_string()).unwrap();
        let mut command = self.host.command(tools::flanneld().unwrap()).unwrap();
        command.args(["--kube-subnet-mgr", "--ip-masq", "--iface=eth0"]);
        command.args(["--kubeconfig-file=/etc/kubernetes/admin.kubeconfig"]);
        command.arg("--net-config-path=/etc/flanneld/net-conf.json");
        command.env("NODE_NAME", self.name());
        self.daemon = Some(self.host.spawn(&mut command, &self.log).unwrap());
    }

    pub fn stop(&mut self) {
        self.daemon.take().unwrap().terminate().unwrap();
    }

    pub fn kill(&mut self) {
        let mut daemon = self.daemon.take().unwrap();
        // However early that is: there must be somebody to kill.
        wait_until("the daemon to be started", 10 * SECOND, || !daemon.process().children().is_empty())
            .unwrap();
        daemon.kill().unwrap();
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    pub fn clear_log(&self) {
        fs::write(&self.log, "").unwrap();
    }

    pub fn http(&self, path: &str) -> (u16, String) {
        let output = self
            .host
            .run(["curl", "-s", "-m", "3", "-w", "\n%{http_code}", &format!("http://127.0.0.1:8081{path}")])
            .unwrap();
        let text = output.stdout;
        let (body, code) = text.rsplit_once('\n').unwrap_or(("", "0"));
        (code.trim().parse().unwrap_or(0), body.to_owned())
    }

    pub fn is_ready(&self) -> bool {
        self.http("/readyz").0 == 200
    }

    pub fn metric(&self, line: &str) -> f64 {
        let text = self.http("/metrics").1;
        let value = text.lines().find_map(|one| one.strip_prefix(line)?.trim().parse().ok());
        value.unwrap_or_else(|| panic!("no {line} in {text}"))
    }

    pub fn wait_ready(&self) {
        self.within("to be ready", 30 * SECOND, |node| node.is_ready());
    }

    /// `edgeflanneld status -o json`, and its exit code.
    pub fn status(&self) -> (Value, bool) {
        let output = run(&mut self.command(&["status", "-o", "json"]), b"", COMMAND_LIMIT).unwrap();
        let json = serde_json::from_str(&output.stdout);
        (json.unwrap_or_else(|e| panic!("{e}: {output:?}")), output.status.code() == Some(0))
    }

    /// Waits; on failure shows the daemon's log.
    pub fn within(&self, what: &str, limit: Duration, condition: impl Fn(&Self) -> bool) {
        if let Err(e) = wait_until(what, limit, || condition(self)) {
            let routes =
                self.host.sh("ip -d link show type vxlan; ip route; ip -6 route").unwrap_or_default();
            let log = self.log();
            let end: Vec<&str> = log.lines().rev().take(60).collect();
            let end: Vec<&str> = end.into_iter().rev().collect();
            panic!("{}: {e:#}\n{routes}\n{}", self.name(), end.join("\n"));
        }
    }

    pub fn sh(&self, line: &str) -> String {
        self.host.sh(line).unwrap()
    }

    /// The MAC of flannel.1; empty when there is none.
    pub fn mac(&self) -> String {
        self.host.sh("cat /sys/class/net/flannel.1/address").unwrap_or_default().trim().to_owned()
    }

    /// Subnets that are routed through the overlay, in order.
    pub fn routed(&self) -> Vec<String> {
        let text = self.host.sh("ip route show dev flannel.1").unwrap_or_default();
        let onlink = text.lines().filter(|line| line.contains("onlink"));
        let mut routes: Vec<String> =
            onlink.filter_map(|line| Some(line.split_whitespace().next()?.to_owned())).collect();
        routes.sort();
        routes
    }

    /// `10.244.N.0/24` for each.
    pub fn routes_exactly(&self, peers: &[u8]) -> bool {
        let mut wanted: Vec<String> = peers.iter().map(|index| format!("10.244.{index}.0/24")).collect();
        wanted.sort();
        self.routed() == wanted
    }

    /// A bridge with the address of the node's pods, so that something answers.
    pub fn add_pod_network(&self) {
        let subnet = format!("10.244.{}.1/24", self.index);
        let v6 = format!("fd00:10:244:{}::1/64", self.index);
        self.sh(&format!(
            "ip link add cni0 type bridge; ip link set cni0 up; ip addr add {subnet} dev cni0; \
             ip addr add {v6} dev cni0 nodad"
        ));
    }
}
