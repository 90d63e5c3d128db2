//! What the tunnel costs and gives, beside a plain rustls relay, konnectivity and rathole, in one interleaved run:
//! `scripts/bench.sh tunnel`.
//!
//! Everything happens in two network namespaces with a WAN between, made and removed here (root is needed). The relay
//! is the floor: one TLS connection for every stream, 64 KiB copies, nothing else. konnectivity takes part where
//! `ETUN_BENCH_KONNECTIVITY` names the folder of its programs, rathole where `ETUN_BENCH_RATHOLE` names its program. Words
//! on the command line choose parts: `throughput`, `wan`, `latency`, `memory`, `ha`; `rounds=N`, `seconds=N`, `agents=N`
//! change how long it takes.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    missing_docs,
    dead_code,
    reason = "a measuring program, made of the tests' parts"
)]

#[path = "../../tests/running/common.rs"]
mod common;
mod ha;
mod peers;
#[path = "../../tests/running/replicas.rs"]
mod replicas;
#[path = "../../tests/running/wan.rs"]
mod wan;

use common::World;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use peers::{Stream, Subject, Which};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    task::JoinSet,
    time::{sleep, timeout},
};
use wan::Wan;

/// Where the peers' programs are: a folder, a file.
const KONNECTIVITY: &str = "ETUN_BENCH_KONNECTIVITY";
const RATHOLE: &str = "ETUN_BENCH_RATHOLE";

struct Options {
    words: Vec<String>,
}

impl Options {
    fn part(&self, part: &str) -> bool {
        let parts: Vec<_> =
            self.words.iter().filter(|word| !word.contains('=') && !word.starts_with("--")).collect();
        parts.is_empty() || parts.iter().any(|word| *word == part)
    }

    fn number(&self, name: &str, usual: usize) -> usize {
        let given = self.words.iter().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
        given.map_or(usual, |number| number.parse().unwrap())
    }
}

fn main() {
    // Thousands of agents and streams. Those that are started here inherit it.
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
    if let Ok(role) = std::env::var("ETUN_BENCH_ROLE") {
        return peers::play(&role);
    }
    let options = Options { words: std::env::args().skip(1).collect() };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        println!(
            "{:56} {:>9} {:>12} {:>9} {:>9} {:>10} {:>9} {:>11}  goal",
            "", "floor", "konnectivity", "rathole", "ours", "to floor", "to konn.", "to rathole"
        );
        if ["throughput", "latency", "wan", "memory"].iter().any(|part| options.part(part)) {
            who();
        }
        if options.part("throughput") {
            throughput(&options, Duration::ZERO, 0).await;
        }
        if options.part("latency") {
            latency(&options, Duration::ZERO, 0).await;
        }
        if options.part("wan") {
            throughput(&options, Duration::from_millis(20), 0).await;
            throughput(&options, Duration::from_millis(100), 10_000).await;
            latency(&options, Duration::from_millis(20), 0).await;
            latency(&options, Duration::from_millis(100), 10_000).await;
        }
        if options.part("memory") {
            memory(&options).await;
        }
        if options.part("ha") {
            ha::measure(&options).await;
        }
    });
}

/// Says which peers take part, and how.
fn who() {
    for (variable, name) in [(KONNECTIVITY, "konnectivity"), (RATHOLE, "rathole")] {
        if std::env::var_os(variable).is_none() {
            println!("{name} does not take part: {variable} is not set (scripts/bench.sh sets it)");
        }
    }
    if std::env::var_os(RATHOLE).is_some() {
        println!(
            "rathole: its TLS is OpenSSL's, without client certificates (agents show a token); callers come by TCP"
        );
    }
}

/// Figures of one row, by [`Which`].
#[derive(Default, Clone)]
struct Row([Vec<f64>; 4]);

impl Row {
    fn add(&mut self, which: Which, figure: f64) {
        self.0[which as usize].push(figure);
    }

    fn print(&self, name: &str, goal: &str) {
        let median = |figures: &Vec<f64>| {
            let mut sorted = figures.clone();
            sorted.sort_by(f64::total_cmp);
            sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
        };
        let [floor, konnectivity, rathole, ours] = self.0.each_ref().map(median);
        let [to_floor, to_konnectivity, to_rathole] = [floor, konnectivity, rathole].map(|peer| ours / peer);
        println!(
            "{name:56} {floor:9.3} {konnectivity:12.3} {rathole:9.3} {ours:9.3} {to_floor:10.2} {to_konnectivity:9.2} {to_rathole:11.2}  {goal}"
        );
    }
}

/// A row of ours alone.
fn ours(name: &str, figure: f64, goal: &str) {
    println!("{name:56} {:>32} {figure:9.3} {:>32}  {goal}", "", "");
}

/// A stream, and what it shall be.
async fn open(subject: &Subject, what: u8) -> Stream {
    let mut stream = subject.connect().await.unwrap();
    stream.write_all(&[what]).await.unwrap();
    stream
}

/// All that take part, on one WAN.
async fn subjects(world: &World, wan: &Wan) -> Vec<Subject> {
    let mut all = vec![Subject::floor(world, wan).await, Subject::ours(world, wan).await];
    if let Some(dir) = std::env::var_os(KONNECTIVITY) {
        all.push(Subject::konnectivity(world, wan, dir.as_ref()).await);
    }
    if let Some(program) = std::env::var_os(RATHOLE) {
        all.push(Subject::rathole(world, wan, program.to_str().unwrap()).await);
    }
    all
}

/// Moves bytes on some streams; Gbit/s and CPU seconds per GB at both ends.
async fn bulk(subject: &Subject, streams: usize, down: bool, seconds: u64) -> (f64, f64, f64) {
    let moved = Arc::new(AtomicU64::new(0));
    let mut tasks = JoinSet::new();
    for _ in 0..streams {
        let mut stream = open(subject, if down { b'D' } else { b'U' }).await;
        let moved = moved.clone();
        tasks.spawn(async move {
            let mut buffer = vec![0; 64 << 10];
            loop {
                let bytes = if down { stream.read(&mut buffer).await } else { stream.write(&buffer).await };
                match bytes {
                    Ok(bytes) if bytes > 0 => moved.fetch_add(bytes as u64, Relaxed),
                    _ => return,
                };
            }
        });
    }
    // Slow start and the way to connections of their own are not what is measured.
    sleep(Duration::from_secs(2)).await;
    let (start, before, cpu) = (Instant::now(), moved.load(Relaxed), subject.cpu());
    sleep(Duration::from_secs(seconds)).await;
    let (bytes, time) = ((moved.load(Relaxed) - before) as f64, start.elapsed().as_secs_f64());
    let after = subject.cpu();
    tasks.shutdown().await;
    sleep(Duration::from_millis(300)).await;
    let per_gb = |end: usize| (after[end] - cpu[end]) / (bytes / 1e9);
    (bytes * 8.0 / 1e9 / time, per_gb(0), per_gb(1))
}

async fn throughput(options: &Options, round_trip: Duration, loss: u32) {
    let (rounds, seconds) = (options.number("rounds", 3), options.number("seconds", 4) as u64);
    let world = World::new();
    let wan = Wan::new(round_trip, loss);
    let subjects = subjects(&world, &wan).await;
    let link = format!("{} ms, {} % loss", round_trip.as_millis(), loss / 10_000);
    for (streams, down) in [(1, true), (1, false), (8, true), (8, false)] {
        let mut rows: [Row; 3] = Default::default();
        for _ in 0..rounds {
            for subject in &subjects {
                let (rate, server, agent) = bulk(subject, streams, down, seconds).await;
                for (row, figure) in rows.iter_mut().zip([rate, server, agent]) {
                    row.add(subject.which, figure);
                }
            }
        }
        let way = if down { "down" } else { "up" };
        let goal = if loss > 0 && streams == 8 && down { ">= 0.8 Gbit/s" } else { ">= 0.8 x" };
        rows[0].print(&format!("{streams} stream {way}, {link}, Gbit/s"), goal);
        if round_trip.is_zero() {
            rows[1].print("  CPU at the server, s/GB", "<= 1.0");
            rows[2].print("  CPU at the agent, s/GB", "<= 1.0");
        }
    }
}

/// Who has not answered by then does not.
const NO_ANSWER: Duration = Duration::from_secs(10);

/// Median and 99th percentile, milliseconds.
fn percentiles(mut times: Vec<f64>) -> (f64, f64) {
    times.sort_by(f64::total_cmp);
    (times[times.len() / 2], times[times.len() * 99 / 100])
}

async fn pings(subject: &Subject, count: usize) -> (f64, f64) {
    let mut stream = open(subject, b'E').await;
    let (mut times, mut buffer) = (Vec::new(), [0; 64]);
    for _ in 0..count {
        let start = Instant::now();
        stream.write_all(&buffer).await.unwrap();
        match timeout(NO_ANSWER, stream.read_exact(&mut buffer)).await {
            Ok(read) => drop(read.unwrap()),
            Err(_) => return (f64::INFINITY, f64::INFINITY),
        }
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    percentiles(times)
}

async fn connects(subject: &Subject, count: usize) -> (f64, f64) {
    let mut times = Vec::new();
    for _ in 0..count {
        let start = Instant::now();
        let mut stream = open(subject, b'E').await;
        stream.write_all(&[1]).await.unwrap();
        stream.read_exact(&mut [0]).await.unwrap();
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    percentiles(times)
}

/// [`pings`] of one that may not even get a connection; infinite then.
async fn beside(subject: &Subject, count: usize) -> (f64, f64) {
    let one = async {
        let mut stream = subject.connect().await.ok()?;
        stream.write_all(b"E1").await.ok()?;
        stream.read_exact(&mut [0]).await.ok()
    };
    match timeout(NO_ANSWER, one).await {
        Ok(Some(_)) => pings(subject, count).await,
        _ => (f64::INFINITY, f64::INFINITY),
    }
}

async fn latency(options: &Options, round_trip: Duration, loss: u32) {
    let rounds = options.number("rounds", 3);
    let world = World::new();
    let wan = Wan::new(round_trip, loss);
    let subjects = subjects(&world, &wan).await;
    // A long link shows its round trip in few of them.
    let few = |many: usize| if round_trip.is_zero() { many } else { many / 40 };
    let mut rows: [Row; 8] = Default::default();
    for _ in 0..rounds {
        for subject in &subjects {
            let connect = connects(subject, few(400)).await;
            let alone = pings(subject, few(3000)).await;
            let still = open(subject, b'D').await;
            sleep(Duration::from_secs(1)).await;
            let beside_still = beside(subject, few(2000)).await;
            drop(still);
            let mut flow = open(subject, b'D').await;
            let drain = tokio::spawn(async move {
                let mut buffer = vec![0; 64 << 10];
                while flow.read(&mut buffer).await.is_ok_and(|read| read > 0) {}
            });
            sleep(Duration::from_secs(1)).await;
            let beside_bulk = beside(subject, few(2000)).await;
            drain.abort();
            sleep(Duration::from_millis(300)).await;
            let figures = [connect, alone, beside_still, beside_bulk].map(|(p50, p99)| [p50, p99]);
            for (row, figure) in rows.iter_mut().zip(figures.concat()) {
                row.add(subject.which, figure);
            }
        }
    }
    let near = round_trip.is_zero();
    let names = [
        (
            "new connection + 1 byte, ms p50",
            if near { "<= 0.5" } else { "2 round trips + 1 (one of them the byte's)" },
        ),
        ("                            p99", ""),
        ("ping-pong alone, ms p50", if near { "<= 0.13" } else { "" }),
        ("                    p99", if near { "<= 0.4" } else { "" }),
        ("ping-pong beside a stalled reader, ms p50", "unchanged"),
        ("                                      p99", "unchanged"),
        ("ping-pong beside a download, ms p50", if near { "<= 0.2" } else { "" }),
        ("                                p99", if near { "<= 5" } else { "" }),
    ];
    println!(
        "{} ms, {} % loss; inf: no answer within {} s",
        round_trip.as_millis(),
        loss / 10_000,
        NO_ANSWER.as_secs()
    );
    for (row, (name, goal)) in rows.iter().zip(names) {
        row.print(name, goal);
    }
}

async fn memory(options: &Options) {
    let (streams, agents) = (options.number("streams", 1000), options.number("agents", 1000));
    let world = World::new();
    let wan = Wan::new(Duration::ZERO, 0);
    let mut rows: [Row; 4] = Default::default();
    let mut empty = 0.0;
    let subjects = subjects(&world, &wan).await;
    for subject in &subjects {
        connects(subject, 50).await;
        let idle = subject.memory();
        let mut open_streams = Vec::new();
        for _ in 0..streams {
            open_streams.push(open(subject, b'E').await);
        }
        sleep(Duration::from_secs(2)).await;
        let busy = subject.memory();
        let each = |end: usize| (busy[end] - idle[end]) / streams as f64;
        for (row, bytes) in rows.iter_mut().zip([idle[0], idle[1], each(0), each(1)]) {
            row.add(subject.which, bytes / 1024.0);
        }
        if subject.which == Which::Ours {
            empty = idle[0];
        }
    }
    drop(subjects);
    let names = [
        ("server without a stream, KiB", ""),
        ("agent without a stream, KiB", "<= 8192"),
        ("server, each of the idle streams, KiB", "<= 10"),
        ("agent, each of the idle streams, KiB", "<= 10"),
    ];
    for (row, (name, goal)) in rows.iter().zip(names) {
        row.print(name, goal);
    }
    let subject = Subject::crowd(&world, &wan, agents).await;
    let memory = subject.memory()[0];
    ours(&format!("server with {agents} idle agents, MiB"), memory / 1024.0 / 1024.0, "<= 500 at 10000");
    ours("  each, KiB", (memory - empty) / agents as f64 / 1024.0, "<= 50");
    let (_subject, back) = subject.restart(&world, &wan, agents).await;
    ours("  all back after the server's restart, jitter included, s", back, "");
}
