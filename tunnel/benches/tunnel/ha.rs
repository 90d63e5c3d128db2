//! What several replicas cost and give: the forwarded hop, the time after a crash, the memory of many agents.

use crate::{
    Options, ours,
    replicas::{Balance, Cloud, Load},
};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::sleep,
};

/// The figure at this share of the sorted ones.
fn at(figures: &mut [f64], share: f64) -> f64 {
    figures.sort_by(f64::total_cmp);
    figures[((figures.len() - 1) as f64 * share) as usize]
}

pub async fn measure(options: &Options) {
    hop(options.number("dials", 2000)).await;
    for _ in 0..options.number("rounds", 3) {
        failover().await;
    }
    memory(options.number("agents", 10_000)).await;
}

/// Ping-pong and new connections through the replica that has the sessions, and through the one that forwards.
async fn hop(rounds: usize) {
    let cloud = Cloud::with(Balance::Affine, 2, 1).await;
    cloud.everywhere(&[1, 2], 1, Duration::from_secs(20)).await;
    let mut pings: [Vec<f64>; 2] = Default::default();
    let mut dials: [Vec<f64>; 2] = Default::default();
    let mut streams = [cloud.connect(1, "node0").await.unwrap(), cloud.connect(2, "node0").await.unwrap()];
    let mut word = [7; 64];
    for _ in 0..rounds {
        for which in [0, 1] {
            let start = Instant::now();
            streams[which].write_all(&word).await.unwrap();
            streams[which].read_exact(&mut word).await.unwrap();
            pings[which].push(start.elapsed().as_secs_f64() * 1e3);
            let start = Instant::now();
            let mut stream = cloud.connect(which as u8 + 1, "node0").await.unwrap();
            stream.write_all(b"x").await.unwrap();
            stream.read_exact(&mut word[..1]).await.unwrap();
            dials[which].push(start.elapsed().as_secs_f64() * 1e3);
        }
    }
    for (name, figures) in [("ping-pong 64 B", &mut pings), ("new connection + 1 byte", &mut dials)] {
        for share in [0.5, 0.99] {
            let [own, forwarded] = figures.each_mut().map(|figures| at(figures, share));
            let goal = if share == 0.5 { "added <= 0.15" } else { "added <= 1" };
            ours(&format!("{name}, own session, ms p{}", share * 100.0), own, "");
            ours(&format!("{name}, forwarded, ms p{}", share * 100.0), forwarded, "");
            ours(&format!("{name}, added by the hop, ms p{}", share * 100.0), forwarded - own, goal);
        }
    }
}

/// kill -9 of one of three replicas, and of the only one that has sessions.
async fn failover() {
    const NODES: usize = 30;
    for (balance, replicas, name) in [
        (Balance::Round, 3, "last failed dial after kill -9, two sessions each, s"),
        (Balance::Affine, 2, "last failed dial after kill -9, source affinity, s"),
    ] {
        let cloud = Arc::new(Cloud::with(balance, replicas, NODES).await);
        let all: Vec<u8> = (1..=replicas).collect();
        cloud.everywhere(&all, NODES, Duration::from_secs(30)).await;
        sleep(Duration::from_secs(10)).await;
        let load = Load::start(&cloud, 5, Duration::from_millis(90), NODES);
        load.more(50, Duration::from_secs(20)).await;
        let killed = tokio::time::Instant::now();
        cloud.kill(1).await;
        sleep(Duration::from_secs(10)).await;
        let last = load.end().await.iter().map(|(when, _)| when.duration_since(killed)).max();
        ours(name, last.unwrap_or_default().as_secs_f64(), "<= 5");
    }
}

/// Many agents on three replicas.
async fn memory(agents: usize) {
    let start = Instant::now();
    let cloud = Cloud::with(Balance::Round, 3, agents).await;
    let mut first = None;
    loop {
        let mut sessions = 0;
        let mut least = usize::MAX;
        for replica in [1, 2, 3] {
            let here = cloud.sessions(replica).await;
            sessions += here;
            least = least.min(here);
        }
        if sessions >= agents {
            first.get_or_insert(start.elapsed());
        }
        if sessions >= 2 * agents || start.elapsed() > Duration::from_secs(600) {
            break;
        }
        sleep(Duration::from_millis(500)).await;
    }
    let first = first.unwrap_or_default().as_secs_f64();
    ours(&format!("{agents} agents have as many sessions after, s (their keys too)"), first, "");
    ours("all of them have two after, s", start.elapsed().as_secs_f64(), "<= 30 after their start");
    ours("dials per agent", cloud.dials() as f64 / agents as f64, "konnectivity: n * H(n) = 5.5 for 3");
    for (number, replica) in cloud.replicas.lock().unwrap().iter() {
        let status = std::fs::read_to_string(format!("/proc/{}/status", replica.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        let kib: f64 = line.trim().split(' ').next().unwrap().parse().unwrap();
        ours(&format!("replica r{number}, MiB"), kib / 1024.0, "");
    }
}
