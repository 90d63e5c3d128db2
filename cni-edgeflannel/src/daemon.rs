//! The node daemon: restores the overlay from the record, then keeps it and follows the cluster.
//!
//! One loop (only /healthz has a thread of its own): it waits for the API server ([`crate::cluster::watch`]), the kernel ([`monitor`]), the
//! clock or a signal, lets the [`keeper`] take it in, and lets it act when something is due. Asked to stop it
//! stops, and leaves the overlay standing, so that pods go on talking while it is replaced.

pub mod apistate;
pub mod board;
pub mod delta;
pub mod identity;
pub mod keeper;
pub mod leftovers;
pub mod lock;
pub mod logging;
pub mod monitor;
pub mod pace;
pub mod repairs;
pub mod result_cache;
pub mod systemd;

use crate::{
    cluster::{publish::publish, watch::watch},
    flags::Flags,
    http,
    overlay::restore::host_name,
};
use board::Board;
use keeper::Keeper;
use monitor::Monitor;
use std::{
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::{Notify, mpsc},
    time::{MissedTickBehavior, interval, sleep_until, timeout},
};

/// How often everything is looked at, touched or not.
const TICK: Duration = Duration::from_secs(8);
/// How long READY waits for libcni's records to be looked through.
const CLEARED_WITHIN: Duration = Duration::from_secs(5);
/// What the API server may say before the loop has taken it in.
const QUEUE: usize = 256;

/// Runs until asked to stop.
///
/// # Errors
/// A sentence, when it cannot or must not run: another daemon, a record of a later version, no name.
pub async fn run(flags: Flags, run_dir: &Path) -> Result<(), String> {
    let mut stop = Stop::listen()?;
    let _lock = lock::take(&flags.state_dir, run_dir)?;
    let board = Arc::new(Board::default());
    if let Some(port) = flags.healthz_port {
        http::start(SocketAddr::new(flags.healthz_ip, port), Arc::clone(&board))?;
    }
    // Before the kernel is looked at, so that nothing goes unheard in between.
    let mut monitor = Monitor::open().map_err(|e| format!("listen to the kernel: {e}"))?;
    let api = flags.api.clone();
    let cni_cache = flags.cni_cache_dir.clone();
    let cleared = tokio::task::spawn_blocking(move || result_cache::clear(&cni_cache));
    let mut keeper = tokio::select! {
        keeper = Keeper::start(flags, host_name(), run_dir, Arc::clone(&board)) => keeper?,
        () = stop.asked() => return Ok(()),
    };
    // The kubelet is ordered after READY, and its runtime gets past no unreadable record. A disk that hangs holds nobody up.
    tokio::select! {
        _ = timeout(CLEARED_WITHIN, cleared) => {}
        () = stop.asked() => return Ok(()),
    }
    systemd::notify(&format!("READY=1\nSTATUS={}", keeper.status()));

    let again = Arc::new(Notify::new());
    let (to, mut heard) = mpsc::channel(QUEUE);
    tokio::spawn(watch(api.clone(), Arc::clone(&again), to));
    tokio::spawn(publish(api, keeper.node_name().to_owned(), keeper.publications()));

    let mut tick = interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    tick.reset();
    let (mut batch, mut status) = (Vec::with_capacity(QUEUE), keeper.status());
    keeper.show(&mut monitor);
    loop {
        let due = keeper.due();
        tokio::select! {
            biased;
            () = stop.asked() => break,
            () = sleep_until(due.unwrap_or_else(far_away).into()), if due.is_some() => {
                keeper.act();
                keeper.show(&mut monitor);
            }
            touched = monitor.next(keeper.wanted()) => keeper.touched(touched.overlay, touched.underlay),
            count = heard.recv_many(&mut batch, QUEUE) => {
                if count == 0 {
                    return Err("nobody watches the API server any more".into());
                }
                for heard in batch.drain(..) {
                    keeper.hear(heard);
                }
            }
            _ = tick.tick() => keeper.tick(&again),
        }
        board.turned(Instant::now());
        let now = keeper.status();
        if status != now {
            systemd::notify(&format!("STATUS={now}"));
            status = now;
        }
    }
    log::info!("stopped; the overlay stays");
    systemd::notify("STOPPING=1");
    Ok(())
}

fn far_away() -> Instant {
    Instant::now() + Duration::from_secs(3600)
}

/// SIGTERM and SIGINT.
struct Stop {
    terminate: Signal,
    interrupt: Signal,
}

impl Stop {
    fn listen() -> Result<Self, String> {
        let listen = |kind| signal(kind).map_err(|e| format!("listen to signals: {e}"));
        Ok(Self { terminate: listen(SignalKind::terminate())?, interrupt: listen(SignalKind::interrupt())? })
    }

    async fn asked(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
