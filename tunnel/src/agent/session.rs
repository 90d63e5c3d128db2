//! A session as the agent has it: what the server asks for, judged, dialled and copied.

use super::{Dialler, connect::Connected};
use crate::{
    carrier::{
        Ended, Kind, WATCH_AGENT,
        h2::{self, Incoming, Request},
        pipe::Mover,
    },
    dial,
    metrics::Metrics,
    policy::Policy,
    refusal::{Reason, Refusal},
    relay::{self, Meter, Side},
    target::Name,
};
use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::{
    net::TcpStream,
    sync::{mpsc, watch},
    time::{Instant, timeout},
};

/// The longest a dial may take, whatever the server says.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the agent knows and counts, for all its sessions.
#[derive(Debug)]
pub struct Node {
    /// Its name.
    pub name: Name,
    /// Its last word.
    pub policy: Policy,
    /// Streams that stand or are being dialled.
    pub streams: AtomicUsize,
    /// What is counted.
    pub metrics: Arc<Metrics>,
}

/// What a session tells the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// One more connection.
    Extra,
    /// A session elsewhere.
    Move,
    /// To know that there are this many replicas.
    Replicas(usize),
}

/// One session: the streams on all its connections.
pub struct Session {
    dialler: Arc<Dialler>,
    streams: Mutex<HashMap<u64, Mover>>,
    wishes: mpsc::Sender<Wish>,
    leave: watch::Receiver<bool>,
}

impl Session {
    /// A session without connections. `wishes` hears what the server wants beside streams; when `leave` becomes true
    /// it takes no new streams.
    pub fn new(dialler: Arc<Dialler>, wishes: mpsc::Sender<Wish>, leave: watch::Receiver<bool>) -> Arc<Self> {
        Arc::new(Self { dialler, streams: Mutex::default(), wishes, leave })
    }

    /// Serves one of its connections until that ends.
    pub async fn serve(self: &Arc<Self>, connected: Connected, kind: Kind) -> Ended {
        let heard = connected.stream.get_ref().0.heard();
        let mut leave = self.leave.clone();
        let leave = async move {
            if leave.wait_for(|leave| *leave).await.is_err() {
                std::future::pending().await
            }
        };
        let serve = |request| self.answer(request);
        match h2::agent_side(connected.stream, heard, WATCH_AGENT, kind, leave, serve).await {
            Ok((_path, live)) => tokio::select! {
                ended = live => ended,
                () = crate::tls::expired(connected.not_after) => Ended::Broken("our certificate has expired".into()),
            },
            Err(error) => Ended::Broken(error.to_string()),
        }
    }

    fn answer(self: &Arc<Self>, request: Request) {
        match request {
            Request::Dial(incoming) => {
                tokio::spawn(self.clone().dial(incoming));
            }
            Request::Continue(there) => match self.movers().get(&there.stream) {
                Some(mover) => there.accept(mover),
                None => there.refuse(),
            },
            // A full queue holds the same wish already.
            Request::Extra => drop(self.wishes.try_send(Wish::Extra)),
            Request::Move => drop(self.wishes.try_send(Wish::Move)),
            Request::Replicas(count) => drop(self.wishes.try_send(Wish::Replicas(count))),
            Request::There => {}
        }
    }

    async fn dial(self: Arc<Self>, mut incoming: Incoming) {
        let _counted = Counted::new(&self.dialler.node.streams);
        let address = match self.dialler.node.policy.judge(&self.dialler.node.name, &incoming.target) {
            Ok(address) => address,
            Err(refusal) => {
                log::warn!("{refusal}");
                return self.refuse(incoming, &refusal);
            }
        };
        let start = Instant::now();
        let dialled = tokio::select! {
            dialled = timeout(incoming.patience.min(PATIENCE), TcpStream::connect(address)) => dialled,
            () = incoming.given_up() => return,
        };
        match dialled {
            Ok(Ok(socket)) => {
                self.dialler.node.metrics.dialled(start.elapsed());
                self.copy(incoming, socket).await;
            }
            Ok(Err(error)) => {
                let refusal = dial::refusal(&error, &shown(&incoming, address));
                self.refuse(incoming, &refusal);
            }
            Err(_) => {
                let refusal =
                    Refusal::new(Reason::Timeout, format!("{} did not answer", shown(&incoming, address)));
                self.refuse(incoming, &refusal);
            }
        }
    }

    fn refuse(&self, incoming: Incoming, refusal: &Refusal) {
        self.dialler.node.metrics.refused(refusal.reason);
        incoming.refuse(refusal);
    }

    async fn copy(&self, incoming: Incoming, socket: TcpStream) {
        let _ = socket.set_nodelay(true);
        let stream = incoming.stream;
        let Ok((pipe, mover)) = incoming.accept() else { return };
        self.movers().insert(stream, mover);
        self.dialler.node.metrics.stream_opened();
        let ended = relay::relay(socket, Side::Target, pipe, &self.dialler.node).await;
        self.movers().remove(&stream);
        self.dialler.node.metrics.stream_closed();
        if let Err(cut) = ended {
            log::debug!("stream {stream} was cut: {cut}");
        }
    }

    fn movers(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Mover>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The target as it was asked for, and as it was dialled.
fn shown(incoming: &Incoming, address: SocketAddr) -> String {
    let asked = incoming.target.to_string();
    if asked == address.to_string() { asked } else { format!("{asked} (dialled as {address})") }
}

impl Meter for Node {
    fn sent(&self, bytes: usize) {
        self.metrics.bytes_out(bytes as u64);
    }

    fn received(&self, bytes: usize) {
        self.metrics.bytes_in(bytes as u64);
    }
}

/// Counts one for as long as it lives.
struct Counted<'a>(&'a AtomicUsize);

impl<'a> Counted<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Relaxed);
        Self(count)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}
