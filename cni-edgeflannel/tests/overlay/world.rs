//! Machines for the tests: threads, each in a network namespace (and host name) of its own.
//!
//! A namespace that only a thread holds needs no name, and is gone when the thread is, also after a panic; the
//! host's network is never touched.

use cni_edgeflannel::{
    mac::Mac,
    overlay::{
        Step,
        kernel::Kernel,
        plan,
        reconcile::{Outcome, compare, find_underlay, reconcile},
    },
    record::{Changes, Family, NodeRecord, Peer, PeerEnd, PerFamily, Record},
};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    unistd::{gettid, sethostname},
};
use std::{
    env,
    net::IpAddr,
    path::Path,
    process::Command,
    sync::mpsc::{Sender, channel},
    thread::{self, JoinHandle},
};
use tempfile::TempDir;

type Job = Box<dyn FnOnce() + Send>;

/// A thread in a network namespace of its own, that does what it is told.
pub struct Machine {
    tid: i32,
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

impl Machine {
    /// `None` without the privilege to make one, which is a failure in CI.
    pub fn new(name: &str) -> Option<Self> {
        let (jobs, work) = channel::<Job>();
        let (told, born) = channel();
        let name = name.to_owned();
        let thread = thread::spawn(move || {
            let made = unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWUTS)
                .and_then(|()| sethostname(&name));
            told.send(made.map(|()| gettid().as_raw())).unwrap();
            work.into_iter().for_each(|job| job());
        });
        let tid = match born.recv().unwrap() {
            Ok(tid) => tid,
            Err(e) => {
                assert!(env::var_os("CI").is_none(), "CI may not skip this: no network namespace: {e}");
                println!("SKIPPED: no network namespace: {e}");
                return None;
            }
        };
        let machine = Self { tid, jobs: Some(jobs), thread: Some(thread) };
        // A link-local address would be of no use for the first second.
        machine.sh("ip link set lo up && echo 0 >/proc/sys/net/ipv6/conf/default/accept_dad");
        Some(machine)
    }

    /// Does something on the machine.
    pub fn run<T: Send + 'static>(&self, act: impl FnOnce() -> T + Send + 'static) -> T {
        let (done, result) = channel();
        let job =
            Box::new(move || done.send(std::panic::catch_unwind(std::panic::AssertUnwindSafe(act))).unwrap());
        self.jobs.as_ref().unwrap().send(job).unwrap();
        match result.recv().unwrap() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    /// A shell command that must succeed; what it printed.
    pub fn sh(&self, line: &str) -> String {
        let (ok, text) = self.try_sh(line);
        assert!(ok, "{line}: {text}");
        text
    }

    /// A shell command; whether it succeeded, and what it printed.
    pub fn try_sh(&self, line: &str) -> (bool, String) {
        let line = line.to_owned();
        self.run(move || {
            let output = Command::new("sh").args(["-c", &line]).output().unwrap();
            let text = [output.stdout, output.stderr].concat();
            (output.status.success(), String::from_utf8_lossy(&text).trim().to_owned())
        })
    }
}

impl Machine {
    /// The path of its network namespace, as a runtime would name it.
    pub fn netns(&self) -> String {
        format!("/proc/{}/task/{}/ns/net", std::process::id(), self.tid)
    }
}

/// Gives the calling thread's machine an empty /run of its own.
pub fn private_run() {
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
    mount(Some("run"), "/run", Some("tmpfs"), MsFlags::empty(), none).unwrap();
}

impl Drop for Machine {
    fn drop(&mut self) {
        drop(self.jobs.take());
        // The namespace, and what is in it, goes with the thread.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Number `n` of a cluster: eth0 on a common wire, and what its record says.
pub struct Node {
    pub machine: Machine,
    pub n: u8,
    pub record: Record,
    pub disk: TempDir,
}

/// Nodes on one wire.
pub struct Cluster {
    pub wire: Machine,
    pub nodes: Vec<Node>,
}

impl Cluster {
    pub fn new(count: u8) -> Option<Self> {
        let wire = Machine::new("wire")?;
        wire.sh(
            "ip link add br0 type bridge && ip link set br0 up && ip addr add 192.168.77.254/24 dev br0 && \
             ip addr add fd00:77::fe/64 dev br0 nodad",
        );
        let mut nodes = Vec::new();
        for n in 1..=count {
            let machine = Machine::new(&format!("node{n}"))?;
            let disk = tempfile::tempdir().unwrap();
            let mut node = Node { machine, n, record: record(n, count), disk };
            node.record.node.subnet_file = node.disk.path().join("run/flannel/subnet.env");
            plug_in(&wire, &node.machine, n, "eth0");
            nodes.push(node);
        }
        Some(Self { wire, nodes })
    }
}

/// Connects a machine to the wire.
pub fn plug_in(wire: &Machine, machine: &Machine, n: u8, device: &str) {
    wire.sh(&format!(
        "ip link add {device}p{n} type veth peer name {device} netns {} && ip link set {device}p{n} master br0 up",
        machine.tid
    ));
    machine.sh(&format!(
        "ip addr add 192.168.77.{n}/24 dev {device} && ip addr add fd00:77::{n}/64 dev {device} nodad && \
         ip link set {device} up && ip route add default via 192.168.77.254 && \
         ip -6 route add default via fd00:77::fe"
    ));
}

pub fn mac(family: Family, n: u8) -> Mac {
    Mac([2, 0, 0, 0, family.bits(), n])
}

pub fn subnet(family: Family, n: u8) -> ipnetwork::IpNetwork {
    match family {
        Family::V4 => format!("10.244.{n}.0/24"),
        Family::V6 => format!("fd00:10:244:{n:x}::/64"),
    }
    .parse()
    .unwrap()
}

pub fn public_ip(family: Family, n: u8) -> IpAddr {
    match family {
        Family::V4 => format!("192.168.77.{n}"),
        Family::V6 => format!("fd00:77::{n:x}"),
    }
    .parse()
    .unwrap()
}

pub fn peer(n: u8) -> Peer {
    let end = |family| PeerEnd {
        subnet: subnet(family, n),
        public_ip: public_ip(family, n),
        vtep_mac: mac(family, n),
        since: 0,
    };
    Peer {
        name: format!("node{n}"),
        ends: PerFamily { v4: Some(end(Family::V4)), v6: Some(end(Family::V6)) },
    }
}

pub fn record(n: u8, count: u8) -> Record {
    let node = NodeRecord {
        node_name: format!("node{n}"),
        host_name: format!("node{n}"),
        networks: ["10.244.0.0/16", "fd00:10:244::/56"].map(|net| net.parse().unwrap()).into_iter().collect(),
        subnets: Family::ALL.map(|family| subnet(family, n)).into_iter().collect(),
        vtep_macs: PerFamily { v4: Some(mac(Family::V4, n)), v6: Some(mac(Family::V6, n)) },
        ip_masq: true,
        ..NodeRecord::default()
    };
    let mut record = Record { node, ..Record::default() };
    let mut changes = Changes::default();
    (1..=count).filter(|other| *other != n).for_each(|other| record.put_peer(peer(other), 1, &mut changes));
    record
}

impl Node {
    /// Makes the kernel as the record says.
    pub fn reconcile(&self) -> Outcome {
        let record = self.record.clone();
        self.machine.run(move || {
            let kernel = Kernel::open().unwrap();
            let below = find_underlay(&kernel, &record.node).unwrap().ok();
            reconcile(&kernel, &record, below.as_ref(), |_| true).unwrap()
        })
    }

    /// Reconciles, and nothing may be left to do.
    pub fn settle(&self) -> Vec<Step> {
        let outcome = self.reconcile();
        assert!(outcome.is_settled(), "failed: {:?}", outcome.failures);
        let left = self.plan();
        assert!(left.is_empty(), "left to do: {left:?}");
        outcome.taken
    }

    /// What would be done.
    pub fn plan(&self) -> Vec<Step> {
        let record = self.record.clone();
        self.machine.run(move || {
            let kernel = Kernel::open().unwrap();
            let below = find_underlay(&kernel, &record.node).unwrap().ok();
            let (wanted, seen) = compare(&kernel, &record, below.as_ref()).unwrap();
            plan(&wanted, &seen)
        })
    }

    pub fn state_dir(&self) -> std::path::PathBuf {
        self.disk.path().join("var")
    }

    pub fn run_dir(&self) -> std::path::PathBuf {
        self.disk.path().join("run/edgeflannel")
    }

    /// Something that answers at a pod's address.
    pub fn add_pod(&self) {
        let n = self.n;
        self.machine.sh(&format!(
            "ip addr add 10.244.{n}.5/32 dev lo && ip addr add fd00:10:244:{n:x}::5/128 dev lo nodad"
        ));
    }

    pub fn index(&self, device: &str) -> u32 {
        let text = self.machine.sh(&format!("ip -o link show {device}"));
        text.split(':').next().unwrap().parse().unwrap()
    }
}

/// Writes a record where a store will find it.
pub fn save(record: &Record, dir: &Path) {
    let changes = Changes { node: true, peers: record.peers.keys().cloned().collect() };
    cni_edgeflannel::record::RecordStore::new(dir).save(record, &changes).unwrap();
}

pub fn kinds(steps: &[Step]) -> Vec<&'static str> {
    let mut kinds: Vec<_> = steps.iter().map(|step| step.kind().as_str()).collect();
    kinds.dedup();
    kinds
}
