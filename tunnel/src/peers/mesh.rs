//! Dialling the other replicas: who there is, and a connection to each of them.
//!
//! `--peers` is looked up every second; an address that is gone from there keeps its connection and is not dialled
//! again. Beside those, whoever dials us is dialled back, so that a new replica is known at once and not when some cache
//! of the cluster's DNS expires. The address that turns out to be ourselves, or a replica we are connected to, is left
//! alone for a while.

use super::{Entered, Peer, Peers, SETTLED, news, soon};
use crate::{
    carrier::{
        h2::peer,
        link::{self, Link},
    },
    sessions::Sessions,
    target::{Host, Target},
    tls::{self, ClientTls, identity::Leaf},
};
use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::{
    net::TcpStream,
    sync::{mpsc, watch},
    task::JoinSet,
    time::{Instant, sleep, sleep_until},
};
use tokio_rustls::TlsConnector;

/// Time between two looks at `--peers`.
const LOOK_UP: Duration = Duration::from_secs(1);

/// Connecting, TLS, and the first answer, each.
const PATIENCE: Duration = Duration::from_secs(3);

/// Between two tries, grown and jittered.
const LEAST: Duration = Duration::from_millis(200);
const MOST: Duration = Duration::from_secs(2);

/// An address that is ourselves or a second one of another replica is tried again after this.
const KNOWN: Duration = Duration::from_secs(5);

/// For how long whoever dialled us is dialled back.
const BACK: Duration = Duration::from_secs(30);

/// What it takes to be connected to the other replicas.
pub struct Mesh {
    /// Those that are.
    pub peers: Arc<Peers>,
    /// Our own sessions.
    pub sessions: Arc<Sessions>,
    /// `--peers`.
    pub names: Vec<Target>,
    /// The TLS towards them.
    pub tls: Arc<ClientTls>,
}

/// How a try ended.
#[derive(Debug, PartialEq, Eq)]
enum Tried {
    /// There was a connection.
    Was(String),
    /// That is ourselves.
    Ourselves,
    /// There is one already.
    Already,
    /// It could not be reached, or is none of ours.
    Failed(String),
}

/// What has become of an address for the first time.
struct First(SocketAddr);

impl Mesh {
    /// Keeps the connections, for as long as it is polled. `back` are the addresses of those who dialled us.
    pub async fn keep(self, mut back: mpsc::Receiver<SocketAddr>) {
        let (wanted, told) = (watch::Sender::new(HashSet::new()), mpsc::channel(16));
        let (tell, mut told) = told;
        let mesh = Arc::new(self);
        let (mut listed, mut learned) = (HashSet::new(), HashMap::<SocketAddr, Instant>::new());
        // The addresses of the first look that nothing has been heard of; none before that look.
        let mut awaited = (mesh.names.is_empty()).then(HashSet::new);
        let settled = Instant::now() + SETTLED;
        let mut tasks = JoinSet::new();
        let mut under_way = HashSet::new();
        let (found, mut find) = mpsc::channel(1);
        let mut looking = JoinSet::new();
        looking.spawn(mesh.clone().keep_looking_up(found));
        loop {
            if awaited.as_ref().is_some_and(HashSet::is_empty) || Instant::now() >= settled {
                mesh.peers.settled.send_if_modified(|settled| !std::mem::replace(settled, true));
            }
            tokio::select! {
                Some(found) = find.recv() => {
                    awaited.get_or_insert_with(|| HashSet::clone(&found));
                    listed = found;
                }
                Some(address) = back.recv() => drop(learned.insert(address, Instant::now())),
                Some(First(address)) = told.recv() => {
                    if let Some(awaited) = &mut awaited {
                        awaited.remove(&address);
                    }
                }
                Some(ended) = tasks.join_next(), if !tasks.is_empty() => {
                    if let Ok(address) = ended {
                        under_way.remove(&address);
                    }
                }
                () = sleep_until(settled), if !mesh.peers.is_settled() => {}
            }
            learned.retain(|_, since| since.elapsed() < BACK);
            let now: HashSet<_> = listed.iter().chain(learned.keys()).copied().collect();
            wanted.send_replace(now.clone());
            for &address in now.difference(&under_way) {
                tasks.spawn(mesh.clone().keep_one(address, wanted.subscribe(), tell.clone()));
            }
            under_way.extend(&now);
        }
    }

    /// Looks `--peers` up again and again; however long a name server takes, nothing else waits for it.
    async fn keep_looking_up(self: Arc<Self>, found: mpsc::Sender<HashSet<SocketAddr>>) {
        loop {
            if let Some(addresses) = self.look_up().await
                && found.send(addresses).await.is_err()
            {
                return;
            }
            sleep(LOOK_UP).await;
        }
    }

    /// Every address of every name; none when a name could not be looked up.
    async fn look_up(&self) -> Option<HashSet<SocketAddr>> {
        let mut found = HashSet::new();
        for target in &self.names {
            match &target.host {
                Host::Address(address) => drop(found.insert(SocketAddr::new(*address, target.port))),
                Host::Name(name) => match tokio::net::lookup_host((name.as_str(), target.port)).await {
                    Ok(addresses) => found.extend(addresses),
                    Err(error) => {
                        log::debug!("--peers {target}: {error}");
                        return None;
                    }
                },
            }
        }
        Some(found)
    }

    /// Keeps a connection to an address for as long as it is wanted.
    async fn keep_one(
        self: Arc<Self>,
        address: SocketAddr,
        wanted: watch::Receiver<HashSet<SocketAddr>>,
        tell: mpsc::Sender<First>,
    ) -> SocketAddr {
        let mut wait = LEAST;
        let mut last = None;
        while wanted.borrow().contains(&address) {
            let tried = self.try_one(address, &tell).await;
            let _ = tell.send(First(address)).await;
            wait = match &tried {
                Tried::Was(_) => LEAST,
                Tried::Ourselves | Tried::Already => KNOWN,
                Tried::Failed(_) => (wait * 2).min(MOST),
            };
            match &tried {
                Tried::Was(why) => log::info!("the connection to the replica at {address} has ended: {why}"),
                Tried::Failed(why) if last.as_ref() != Some(&tried) => {
                    log::warn!("replica at {address}: {why}")
                }
                _ => {}
            }
            last = Some(tried);
            sleep(wait.mul_f32(0.5 + fastrand::f32())).await;
        }
        address
    }

    async fn try_one(&self, address: SocketAddr, tell: &mpsc::Sender<First>) -> Tried {
        match self.connect(address, tell).await {
            Ok(tried) => tried,
            Err(why) => Tried::Failed(why),
        }
    }

    /// Connects, and stays as long as the connection does.
    async fn connect(&self, address: SocketAddr, tell: &mpsc::Sender<First>) -> Result<Tried, String> {
        let socket = soon(PATIENCE, "connect", async {
            TcpStream::connect(address).await.map_err(|error| format!("connect: {error}"))
        })
        .await?;
        link::tune(&socket);
        let client = self.tls.get();
        let name = address.ip().into();
        let stream = soon(PATIENCE, "TLS", async {
            let connector = TlsConnector::from(client.config.clone());
            let buffer = |connection: &mut rustls::ClientConnection| {
                connection.set_buffer_limit(Some(tls::BUFFER));
            };
            let connected = connector.connect_with(name, Link::new(socket), buffer).await;
            connected.map_err(|error| tls::explain(&error, "the replica"))
        })
        .await?;
        let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
        let leaf = chain.first().and_then(|leaf| Leaf::parse(leaf).ok()).ok_or("it shows no certificate")?;
        // Its name and CA have been checked in the handshake; a node is never a replica, whatever names it has.
        if leaf.is_nodes() {
            return Err("its certificate is a node's (O=system:nodes)".into());
        }
        let heard = stream.get_ref().0.heard();
        let entered_once = AtomicBool::new(false);
        let (opener, live) =
            peer::asking_side(stream, heard.clone()).await.map_err(|error| error.to_string())?;
        let follow = async {
            let (who, pipe) =
                soon(PATIENCE, "hello", async { opener.ask_for_news(&self.peers.me).await }).await?;
            if who.run == self.peers.me.run {
                return Ok(Tried::Ourselves);
            }
            if who.replica == self.peers.me.replica {
                log::error!(
                    "the replica at {address} calls itself {} as we do: give each its own --replica-id",
                    who.replica
                );
            }
            let table = Default::default();
            let peer = Peer { who, remote: address, opener: opener.clone(), heard, table };
            let Some(entered) = self.peers.enter(Arc::new(peer)) else { return Ok(Tried::Already) };
            log::info!("connected to replica {} at {address}", entered.peer.who.replica);
            entered_once.store(true, Relaxed);
            self.listen_to(&entered, pipe, tell).await.map(Tried::Was)
        };
        tokio::select! {
            tried = follow => tried,
            // TLS 1.3 refuses our certificate only after the handshake: that is no connection that was.
            ended = live => match entered_once.load(Relaxed) {
                true => Ok(Tried::Was(ended.to_string())),
                false => Err(format!("it ends the connection: {ended}")),
            },
            () = tls::expired(leaf.not_after.min(client.leaf.not_after)) => Ok(Tried::Was("a certificate has expired".into())),
        }
    }

    /// Takes in what a replica tells, until it stops.
    async fn listen_to(
        &self,
        entered: &Entered,
        mut pipe: crate::carrier::pipe::Pipe,
        tell: &mpsc::Sender<First>,
    ) -> Result<String, String> {
        let mut reader = news::Reader::default();
        let mut complete = false;
        while let Some(bytes) = pipe.recv.recv().await.map_err(|lost| lost.to_string())? {
            pipe.recv.release(bytes.len());
            reader.push(&bytes);
            while let Some(line) = reader.line().map_err(|why| why.to_string())? {
                if let news::Line::Node(node, holds) = &line {
                    holds.iter().for_each(|hold| self.sessions.see(node, hold));
                }
                if entered.take(line).map_err(|why| why.to_string())? && !complete {
                    complete = true;
                    let _ = tell.send(First(entered.peer.remote)).await;
                }
            }
        }
        Ok("it tells nothing any more".into())
    }
}
