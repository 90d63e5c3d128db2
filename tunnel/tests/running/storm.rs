//! Many agents lose their server at one moment and come back, each through the agent's own code and a whole TLS
//! handshake.

use crate::common::*;
use std::{
    thread,
    time::{Duration, Instant},
};
use tokio::{sync::oneshot, time::sleep};

/// How many, unless the variable `AGENTS` says so.
const AGENTS: usize = 2000;

/// A machine that does other things meanwhile gets there too.
const PATIENCE: Duration = Duration::from_secs(180);

/// The story this guards against: a server restarts, every agent of a region dials at once, handshakes queue up behind
/// each other, time out, and are dialled again for nothing; meanwhile nobody's kubectl is answered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crowd_comes_back_at_once() {
    let agents = std::env::var("AGENTS").ok().and_then(|text| text.parse().ok()).unwrap_or(AGENTS);
    let world = World::new();
    let server = world.server();
    let kubelet = echo().await;
    let configs: Vec<_> = (0..agents)
        .map(|number| {
            let name = format!("node{number}");
            world.pki.node(&name);
            world.agent_config(&name, server.agents, kubelet)
        })
        .collect();
    // They are other machines: the server's threads are not theirs.
    let (stop, stopped) = oneshot::channel::<()>();
    let crowd = thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let _agents: Vec<Dropped> = configs.into_iter().map(spawn_agent).collect();
            let _ = stopped.await;
        });
    });
    let began = Instant::now();
    within(PATIENCE, async {
        while server.gate.sessions.len() < agents {
            sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    eprintln!("{agents} agents are there after {:.1} s", began.elapsed().as_secs_f32());

    let mut config = world.server_config();
    config.listen = server.agents;
    server.kill();
    sleep(Duration::from_millis(500)).await;
    let server = world.server_with(config);
    let began = Instant::now();
    let mut half = None;
    let mut slowest = Duration::ZERO;
    within(PATIENCE, async {
        while server.gate.sessions.len() < agents {
            if server.gate.sessions.len() >= agents / 2 {
                half.get_or_insert_with(|| began.elapsed());
            }
            // Whoever is back is served in the midst of it.
            if let Some(session) = server.gate.sessions.list().last() {
                let asked = Instant::now();
                ping(&mut server.connect(&format!("{}:10250", session.node)).await.unwrap()).await;
                slowest = slowest.max(asked.elapsed());
            }
            sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
    assert_eq!(server.gate.sessions.len(), agents);
    eprintln!(
        "half are back after {:.1} s, all after {:.1} s; the slowest connection meanwhile took {slowest:?}",
        half.unwrap_or_default().as_secs_f32(),
        began.elapsed().as_secs_f32()
    );
    for number in [0, agents / 2, agents - 1] {
        ping(&mut server.connect(&format!("NODE{number}:10250")).await.unwrap()).await;
    }
    drop(stop);
    crowd.join().unwrap();
}
