//! Two replicas of the server behind a load balancer: what a person notices when one is killed, and when the other is upgraded.

use crate::kubectl::{Talk, command};
use crate::{pod, serves};
use integration::cluster::Cluster;
use integration::daemons::Daemon;
use integration::exec::{wait_for, wait_until};
use integration::tools;
use integration::topology::{CLOUD, Options};
use integration::tunnel::{self, Egress};
use serde_json::{Value, json};
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::thread::{self, sleep};
use std::time::{Duration, Instant};

const NODES: [&str; 2] = ["node1", "node2"];
/// The replicas' addresses, beside the load balancer's.
const A: &str = "10.10.0.11";
const B: &str = "10.10.0.12";
const DRAIN: Duration = Duration::from_secs(12);
/// How long execs may fail after a replica was killed.
const FAILOVER: Duration = Duration::from_secs(5);
/// For what comes at once when the machine is not busy.
const SOON: Duration = Duration::from_secs(60);

fn start_replica(cluster: &Cluster, address: &str) -> Daemon {
    let cloud = &cluster.network().cloud;
    let mut server = tunnel::server(cloud, cluster.dir(), Egress::Several).unwrap();
    for (flag, port) in
        [("listen", 8443), ("egress-listen", 8131), ("peer-listen", 9443), ("metrics-listen", 10267)]
    {
        server.arg(format!("--{flag}={address}:{port}"));
    }
    server.arg(format!("--peers={A}:9443,{B}:9443")).arg(format!("--replica-id={address}"));
    server.arg(format!("--peer-ca={}", cluster.dir().join("pki/ca.crt").display()));
    server.arg(format!("--drain={}s", DRAIN.as_secs()));
    cloud.spawn(&mut server, &cluster.dir().join(format!("logs/replica-{address}.log"))).unwrap()
}

/// Waits until these replicas are ready, and every agent has a session with each.
fn complete(cluster: &Cluster, replicas: &[&str]) {
    for address in replicas {
        wait_for(&format!("the sessions of {address}"), SOON, || {
            let page = |name: &str| {
                cluster.network().cloud.sh(&format!("busybox wget -qO- http://{address}:10267/{name}"))
            };
            page("readyz")?;
            let sessions: Value = serde_json::from_str(&page("sessions")?)?;
            Ok((sessions["sessions"].as_array().map(Vec::len) == Some(NODES.len())).then_some(()))
        })
        .unwrap();
    }
}

/// A load balancer at the address that agents or kube-apiserver know.
struct Balancer {
    behind: PathBuf,
    _daemon: Daemon,
}

impl Balancer {
    fn start(cluster: &Cluster, port: u16) -> Self {
        let behind = cluster.dir().join(format!("behind-{port}"));
        fs::write(&behind, "").unwrap();
        let cloud = &cluster.network().cloud;
        let mut balance = cloud.command(tools::rig().unwrap()).unwrap();
        balance.arg("balance").arg(format!("{CLOUD}:{port}")).arg(&behind);
        let log = cluster.dir().join(format!("logs/balance-{port}.log"));
        Self { behind, _daemon: cloud.spawn(&mut balance, &log).unwrap() }
    }

    /// Whom it asks from now on.
    fn to(&self, replicas: &[&str]) {
        let new = self.behind.with_extension("new");
        fs::write(&new, replicas.join("\n")).unwrap();
        fs::rename(new, &self.behind).unwrap();
    }
}

/// `kubectl logs -f` of a node's clock, which has shown something.
fn follow(cluster: &Cluster, node: &str) -> Talk {
    let talk = Talk::start(command(cluster).args(["logs", "-f", "--tail=1", &clock(node)]));
    talk.hears("tick");
    talk
}

/// The name of the pod there that writes to its log for ever.
fn clock(node: &str) -> String {
    format!("clock-{node}")
}

/// More is written to the log, and comes.
fn goes_on(log: &Talk) {
    let seen = log.said().len();
    wait_until("a further line of the log", Duration::from_secs(10), || log.said().len() > seen + 20)
        .unwrap();
}

/// It ends. kubectl calls that a success, with a tunnel or without: whatever ends the kubelet's answer, kube-apiserver ends its own in good order
/// (StreamObject in its responsewriters looks at no error). So a person who follows a log sees the prompt, and asks again.
fn is_cut(log: &mut Talk) {
    assert!(log.ends(SOON), "kube-apiserver tells kubectl now when a log was cut");
}

/// One `kubectl exec`.
#[derive(Debug)]
struct Exec {
    node: &'static str,
    began: Instant,
    ended: Instant,
    failed: Option<String>,
}

/// Execs on every node, one after the other, for as long as `act` runs.
fn execs_while(cluster: &Cluster, act: impl FnOnce()) -> Vec<Exec> {
    let over = AtomicBool::new(false);
    let caller = |node: &'static str| {
        let mut execs = Vec::new();
        while !over.load(SeqCst) {
            let began = Instant::now();
            let said = cluster.kubectl(&["exec", node, "--", "hostname"]);
            let failed = match said {
                Ok(name) => (name.trim() != node).then_some(name),
                Err(error) => Some(format!("{error:#}")),
            };
            execs.push(Exec { node, began, ended: Instant::now(), failed });
            sleep(Duration::from_millis(100));
        }
        execs
    };
    thread::scope(|scope| {
        let callers = NODES.map(|node| scope.spawn(move || caller(node)));
        // The callers end also when it panics.
        let acted = catch_unwind(AssertUnwindSafe(act));
        over.store(true, SeqCst);
        let execs = callers.into_iter().flat_map(|caller| caller.join().unwrap()).collect();
        acted.map_or_else(|panic| resume_unwind(panic), |()| execs)
    })
}

#[test]
fn one_of_two_replicas_is_killed_and_the_other_upgraded() {
    let nat = NODES.map(str::to_owned).to_vec();
    let options = Options { nodes: 2, nat, tunnel: Some(Egress::Several), ..Options::default() };
    let cluster = Cluster::up(options).unwrap();
    cluster.network().cloud.sh(&format!("ip addr add {A}/24 dev eth0; ip addr add {B}/24 dev eth0")).unwrap();
    let (agents, callers) = (Balancer::start(&cluster, 8443), Balancer::start(&cluster, 8131));
    let [mut a, mut b] = [A, B].map(|address| start_replica(&cluster, address));
    agents.to(&[A, B]);
    complete(&cluster, &[A, B]);

    // kube-apiserver keeps its connection to a kubelet for logs: node1's goes through one replica, node2's through the other.
    let mut logs = [("node1", A), ("node2", B)].map(|(node, replica)| {
        callers.to(&[replica]);
        let tick = "while :; do echo tick; sleep 0.2; done";
        cluster.apply(&pod(&clock(node), node, tick, &json!({}))).unwrap();
        cluster.wait_pod("default", &clock(node)).unwrap();
        serves(&cluster, node);
        follow(&cluster, node)
    });
    callers.to(&[A, B]);

    let mut killed = Instant::now();
    let execs = execs_while(&cluster, || {
        sleep(Duration::from_secs(2));
        killed = Instant::now();
        a.kill().unwrap();
        let [through_a, through_b] = &mut logs;
        is_cut(through_a);
        goes_on(through_b);
        // Nobody is sent there again before it is ready.
        agents.to(&[B]);
        callers.to(&[B]);
        wait_for("node1's log", SOON, || cluster.kubectl(&["logs", "--tail=1", &clock("node1")]).map(Some))
            .unwrap();
        drop(follow(&cluster, "node1"));
        sleep((killed + FAILOVER + Duration::from_secs(4)).saturating_duration_since(Instant::now()));
        goes_on(through_b);
    });
    for node in NODES {
        let begun = |late: bool| {
            execs.iter().filter(move |exec| exec.node == node && (exec.began > killed + FAILOVER) == late)
        };
        assert!(begun(false).count() > 0 && begun(true).count() > 0, "{node}: {execs:?}");
    }
    let failed = || execs.iter().filter(|exec| exec.failed.is_some());
    let last = failed().map(|exec| exec.ended.duration_since(killed)).max().unwrap_or_default();
    eprintln!("kill -9: of {} execs {} failed, the last after {last:.1?}", execs.len(), failed().count());
    for exec in failed() {
        assert!(exec.ended > killed && exec.began < killed + FAILOVER, "killed at {killed:?}: {exec:?}");
    }

    let execs = execs_while(&cluster, || {
        a = start_replica(&cluster, A);
        agents.to(&[A, B]);
        complete(&cluster, &[A, B]);
        callers.to(&[A, B]);
        let through_b = &mut logs[1];
        let told = Instant::now();
        thread::scope(|scope| {
            let upgrade = scope.spawn(|| b.terminate().unwrap());
            // Endpoints follow a pod's end with a delay.
            sleep(Duration::from_secs(1));
            agents.to(&[A]);
            callers.to(&[A]);
            // Long after its agents have gone elsewhere.
            sleep((told + DRAIN - Duration::from_secs(3)).saturating_duration_since(Instant::now()));
            goes_on(through_b);
            upgrade.join().unwrap();
        });
        is_cut(through_b);
        drop(follow(&cluster, "node2"));
        b = start_replica(&cluster, B);
        agents.to(&[A, B]);
        complete(&cluster, &[A, B]);
        callers.to(&[A, B]);
        sleep(Duration::from_secs(2));
    });
    eprintln!("upgrade: {} execs", execs.len());
    assert!(execs.len() > 20, "{} execs say little", execs.len());
    let failed: Vec<_> = execs.iter().filter(|exec| exec.failed.is_some()).collect();
    assert!(failed.is_empty(), "{failed:?}");
    for replica in [&a, &b] {
        replica.check_alive().unwrap();
    }
}
