//! `edgeflanneld` beside stock flanneld: how soon all peers are in the kernel, what that takes, and what is healed.
//!
//! A real etcd and kube-apiserver hold all the nodes, for both sides alike; of the nodes two are there, each in namespaces of its own.
//! Who is started takes turns; then both run, and hear of the same changes.

mod crowd;
mod gauge;

use crate::{
    edge::{KUBECONFIG, NUMBERED_NETWORK, Node, World},
    measure::median,
    table,
};
use anyhow::{Context, Result, bail, ensure};
use crowd::Crowd;
use serde_json::json;
use std::{
    thread::sleep,
    time::{Duration, Instant},
};

/// How many nodes, how often.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sizes {
    /// Nodes in the cluster, ascending.
    pub nodes: Vec<u16>,
    /// Starts of each daemon at each size.
    pub rounds: usize,
    /// Node updates that are listened to.
    pub updates: u16,
}

impl Default for Sizes {
    fn default() -> Self {
        Self { nodes: vec![100, 1_000, 5_000], rounds: 3, updates: 1_000 }
    }
}

impl Sizes {
    /// Reads `--nodes=100,1000 --rounds=1 --updates=100`.
    pub fn parse(words: &[&str]) -> Result<Self> {
        let mut sizes = Self::default();
        for word in words {
            let whole = |value: &str| value.parse().with_context(|| format!("{word}: not a number"));
            match word.split_once('=') {
                Some(("--nodes", list)) => sizes.nodes = list.split(',').map(whole).collect::<Result<_>>()?,
                Some(("--rounds", value)) => sizes.rounds = usize::from(whole(value)?),
                Some(("--updates", value)) => sizes.updates = whole(value)?,
                _ => bail!("overlay knows --nodes=N,N, --rounds=N and --updates=N, not {word:?}"),
            }
        }
        let ascending = sizes.nodes.windows(2).all(|pair| pair[0] < pair[1]);
        let fits = sizes.nodes.iter().all(|nodes| (10..=15_000).contains(nodes));
        ensure!(ascending && fits && !sizes.nodes.is_empty(), "--nodes: ascending, each from 10 to 15000");
        ensure!(sizes.rounds > 0 && sizes.updates > 0, "--rounds and --updates: at least 1");
        Ok(sizes)
    }
}

/// How long a start may take.
const START: Duration = Duration::from_secs(120);
/// How long is waited for what flanneld is not known to do.
const HOPELESS: Duration = Duration::from_secs(20);

/// What was measured of one of the two, at one size.
#[derive(Debug, Default)]
struct Figures {
    /// From the start to all peers: nothing on the disk.
    cold: Vec<Duration>,
    /// The same, with the node's record.
    warm: Vec<Duration>,
    /// The same, with the record and no API server.
    alone: Option<Duration>,
    /// Resident memory, MiB: with all peers there, and the most that it came to by the end of all updates.
    memory: (f64, f64),
    /// From a node's creation, answered, to its route.
    added: Vec<Duration>,
    heartbeats: Duration,
    changes: Duration,
    /// From the deletion of flannel.1 to all peers.
    healed: Option<Duration>,
}

/// One of the two daemons on its node.
struct Side {
    node: Node,
    is_ours: bool,
}

impl Side {
    fn new(world: &World, index: u8, is_ours: bool) -> Self {
        let node = world.node(index);
        world.equip(&node);
        let conf = json!({"Network": NUMBERED_NETWORK, "Backend": {"Type": "vxlan"}});
        node.net_conf(&conf);
        let cidr = format!("100.127.{index}.0/24");
        world.create_node(&node.name(), &[&cidr]);
        // flanneld panics on a Node without any annotation.
        world.kubectl(&["annotate", "node", &node.name(), "node.alpha.kubernetes.io/ttl=0"]);
        Self { node, is_ours }
    }

    fn start(&mut self) -> Result<Instant> {
        let started = Instant::now();
        if self.is_ours {
            let mut command = self.node.command(&[KUBECONFIG, "--ip-masq", "--iface=eth0"]);
            self.node.daemon = Some(self.node.host.spawn(&mut command, &self.node.log)?);
        } else {
            self.node.start_flanneld(&json!({"Network": NUMBERED_NETWORK, "Backend": {"Type": "vxlan"}}));
        }
        Ok(started)
    }

    /// Boots the node anew, starts the daemon, and waits until so many peers are there.
    fn boot(
        &mut self,
        world: &World,
        keep_record: bool,
        peers: usize,
        limit: Duration,
    ) -> Result<Option<Duration>> {
        world.reboot(&mut self.node);
        if !keep_record {
            self.node.sh("rm -rf /var/lib/edgeflannel");
        }
        // The kernel takes a moment to be done with the namespace that was.
        sleep(Duration::from_secs(2));
        let started = self.start()?;
        gauge::peers(&self.node.host, peers, started, limit)
    }

    fn process(&self) -> Result<i32> {
        let daemon = self.node.daemon.as_ref().context("not started")?;
        Ok(daemon.process().children().first().with_context(|| daemon.log_end())?.pid)
    }
}

/// Makes the world and measures at each size.
pub fn run(sizes: &Sizes) -> Result<()> {
    let mut world = World::new();
    world.start_api(2);
    let mut sides = [Side::new(&world, 1, true), Side::new(&world, 2, false)];
    let mut crowd = Crowd::new(&world)?;
    for nodes in &sizes.nodes {
        // The two are nodes themselves.
        crowd.grow(nodes - 2)?;
        let figures = at(&world, &mut sides, &mut crowd, sizes)?;
        show(*nodes, sizes, &figures);
    }
    Ok(())
}

fn at(world: &World, sides: &mut [Side; 2], crowd: &mut Crowd, sizes: &Sizes) -> Result<[Figures; 2]> {
    let peers = usize::from(crowd.len());
    let mut figures = [Figures::default(), Figures::default()];
    for _ in 0..sizes.rounds {
        for (side, figures) in sides.iter_mut().zip(&mut figures) {
            let cold = side.boot(world, false, peers, START)?;
            figures.cold.push(cold.with_context(|| format!("{} has not started", side.node.name()))?);
            if side.is_ours {
                let warm = side.boot(world, true, peers, START)?;
                figures.warm.push(warm.context("edgeflanneld has not started")?);
            }
        }
    }
    for (side, figures) in sides.iter().zip(&mut figures) {
        gauge::quiet(side.process()?);
        gauge::complete(&side.node.host, peers)?;
        figures.memory.0 = gauge::memory(side.process()?, "VmRSS:")?;
    }
    added(sides, crowd, &mut figures)?;
    let cpu_of = |sides: &[Side; 2], act: &mut dyn FnMut() -> Result<()>| -> Result<[Duration; 2]> {
        let processes = [sides[0].process()?, sides[1].process()?];
        let before = processes.map(gauge::cpu);
        act()?;
        processes.iter().for_each(|process| gauge::quiet(*process));
        let after = processes.map(gauge::cpu);
        Ok([after[0].saturating_sub(before[0]), after[1].saturating_sub(before[1])])
    };
    let heartbeats = cpu_of(sides, &mut || crowd.beat(sizes.updates))?;
    let mut moved = Vec::new();
    let changes = cpu_of(sides, &mut || {
        moved = crowd.relocate(sizes.updates)?;
        Ok(())
    })?;
    for (index, side) in sides.iter_mut().enumerate() {
        gauge::forwards_to(&side.node.host, &moved)?;
        figures[index].heartbeats = heartbeats[index];
        figures[index].changes = changes[index];
        figures[index].memory.1 = gauge::memory(side.process()?, "VmHWM:")?;
        let deleted = Instant::now();
        side.node.sh("ip link del flannel.1");
        figures[index].healed = gauge::peers(&side.node.host, peers, deleted, limit(side))?;
    }
    world.blackhole();
    for (side, figures) in sides.iter_mut().zip(&mut figures) {
        figures.alone = side.boot(world, true, peers, limit(side))?;
    }
    world.heal();
    Ok(figures)
}

/// The time for what only one of the two is known to do.
fn limit(side: &Side) -> Duration {
    if side.is_ours { START } else { HOPELESS }
}

/// Ten nodes, one by one; each is heard of by both.
fn added(sides: &[Side; 2], crowd: &mut Crowd, figures: &mut [Figures; 2]) -> Result<()> {
    for _ in 0..10 {
        let subnet = crowd.add()?;
        let answered = Instant::now();
        let mut waiting = vec![0, 1];
        while !waiting.is_empty() {
            ensure!(answered.elapsed() < START, "no route to {subnet} on both");
            waiting.retain(|side: &usize| {
                let there = gauge::routed(&sides[*side].node.host, subnet);
                if there {
                    figures[*side].added.push(answered.elapsed());
                }
                !there
            });
        }
        crowd.remove()?;
        // Each alone: edgeflanneld gathers what comes in quick succession, for half a second at most.
        sleep(Duration::from_secs(1));
    }
    Ok(())
}

fn show(nodes: u16, sizes: &Sizes, [ours, stock]: &[Figures; 2]) {
    let head = ["", "edgeflanneld", "flanneld", "goal"];
    let mut rows = vec![head.map(String::from).to_vec()];
    // The table of goals knows three sizes; others are held against the next larger one.
    let by_size = |goals: [f64; 3]| goals[usize::from(nodes > 100) + usize::from(nodes > 1_000)];
    let mut row = |what: &str, ours: Option<f64>, stock: Option<f64>, goal: Option<(f64, &str)>| {
        let shown = |figure: Option<f64>| figure.map_or("never".into(), |figure| format!("{figure:.2}"));
        let theirs = match (ours, stock) {
            (Some(ours), Some(stock)) => table::ratio(stock, ours),
            (_, stock) => shown(stock),
        };
        let goal = goal.map(|(goal, unit)| table::goal(ours.unwrap_or(f64::INFINITY), goal, unit));
        rows.push(vec![what.into(), shown(ours), theirs, goal.unwrap_or_default()]);
    };
    let seconds = |all: &[Duration]| median(all) / 1000.0;
    let whole = |one: Option<Duration>| one.map(|time| time.as_secs_f64());
    let start = by_size([0.2, 0.4, 1.5]);
    row("start, first time, s", Some(seconds(&ours.cold)), Some(seconds(&stock.cold)), Some((start, "s")));
    row("start, with record, s", Some(seconds(&ours.warm)), Some(seconds(&stock.cold)), Some((0.2, "s")));
    row("start, no API server, s", whole(ours.alone), whole(stock.alone), Some((0.2, "s")));
    let memory = by_size([10.0, 12.0, 20.0]);
    row("memory, MiB", Some(ours.memory.0), Some(stock.memory.0), Some((memory, "MiB")));
    row("memory, peak after updates, MiB", Some(ours.memory.1), Some(stock.memory.1), None);
    row("node added to route, ms", Some(median(&ours.added)), Some(median(&stock.added)), None);
    let cpu = |time: Duration| Some(time.as_secs_f64());
    let goal = |seconds: f64| Some((seconds * f64::from(sizes.updates) / 1000.0, "s"));
    row(
        &format!("CPU of {} heartbeats, s", sizes.updates),
        cpu(ours.heartbeats),
        cpu(stock.heartbeats),
        goal(0.2),
    );
    row(&format!("CPU of {} moves, s", sizes.updates), cpu(ours.changes), cpu(stock.changes), goal(0.4));
    row("deleted flannel.1 healed, s", whole(ours.healed), whole(stock.healed), Some((1.0, "s")));
    let rounds = sizes.rounds;
    let waited = HOPELESS.as_secs();
    table::print(
        &format!(
            "{nodes} nodes, real API server, medians of {rounds} starts in turn (xN: times ours; never: not in {waited} s)"
        ),
        &rows,
    );
}
