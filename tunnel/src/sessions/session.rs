//! One agent's session: its connections, the streams on them, and which stream is on which.
//!
//! New streams begin on the first connection, where opening costs one round trip. A stream that moves 256 KiB within
//! ten seconds is bulk, and bulk is moved to connections of its own ([`place`] decides), so that the first connection
//! stays free for those who type, and loss on one connection stops one stream. The agent is asked for more connections
//! as they are needed; one that has been without a stream for 30 s is closed.

use crate::{
    carrier::{
        h2::Opener,
        pipe::{Mover, Pipe},
    },
    hello::{Hello, Id},
    peers::news::Hold,
    refusal::{Reason, Refusal},
    relay::Meter,
    target::{Name, Target},
};
use bytes::Bytes;
use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, SystemTime},
};
use tokio::{
    sync::watch,
    time::{Instant, timeout},
};

/// Connections a session has at most.
pub const CONNECTIONS_LIMIT: usize = 8;

/// A stream is bulk that moves this many bytes …
const BULK: u64 = 256 << 10;
/// … within this time.
const BULK_TIME: Duration = Duration::from_secs(10);

/// An extra connection without a stream is closed after this.
const IDLE: Duration = Duration::from_secs(30);

/// An agent that was asked for a connection is asked again after this.
const ASK_AGAIN: Duration = Duration::from_secs(10);

/// One agent's session.
#[derive(Debug)]
pub struct Session {
    /// Whose.
    pub node: Name,
    /// Which run of the agent.
    pub instance: Id,
    /// What extra connections name to join.
    pub id: Id,
    /// Where the first connection comes from.
    pub remote: SocketAddr,
    /// When it began, for people.
    pub since: SystemTime,
    /// Bytes from callers to the node, over all streams.
    pub bytes_in: AtomicU64,
    /// Bytes from the node to callers.
    pub bytes_out: AtomicU64,
    /// How old its agent is among the node's: the highest counts.
    epoch: AtomicU64,
    start: Instant,
    next_stream: AtomicU64,
    /// Streams, those that are being opened too.
    count: Arc<AtomicUsize>,
    closing: watch::Sender<Option<&'static str>>,
    leaving: AtomicBool,
    pool: Mutex<Pool>,
}

#[derive(Debug, Default)]
struct Pool {
    /// The first connection is the session's own; the others come and go.
    connections: Vec<Arc<Connection>>,
    streams: HashMap<u64, Arc<Live>>,
    asked: Option<Instant>,
}

/// One connection of a session.
pub struct Connection {
    opener: Opener,
    streams: AtomicUsize,
    bulk: AtomicUsize,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection")
            .field("streams", &self.streams)
            .field("bulk", &self.bulk)
            .finish_non_exhaustive()
    }
}

/// A stream while it runs.
#[derive(Debug)]
struct Live {
    number: u64,
    mover: Mover,
    connection: Mutex<Arc<Connection>>,
    bulk: AtomicBool,
    moving: AtomicBool,
    ended: AtomicBool,
    /// When the bytes in `burst` began to be counted, milliseconds of the session.
    burst_start: AtomicU64,
    burst: AtomicU64,
}

/// How much a connection has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Load {
    /// Streams on it.
    pub streams: usize,
    /// Those of them that are bulk.
    pub bulk: usize,
}

/// Where a bulk stream belongs.
#[derive(Debug, PartialEq, Eq)]
pub enum Place {
    /// Where it is.
    Here,
    /// On this connection.
    There(usize),
    /// On a connection that is not there yet.
    More,
}

/// Decides where a bulk stream belongs that is now on connection `now`. The first connection is for everybody.
pub fn place(loads: &[Load], now: usize) -> Place {
    if now > 0 && loads[now].bulk <= 1 {
        return Place::Here;
    }
    if let Some(free) = (1..loads.len()).find(|&i| loads[i].bulk == 0) {
        return Place::There(free);
    }
    if loads.len() < CONNECTIONS_LIMIT {
        return Place::More;
    }
    let least = (1..loads.len()).min_by_key(|&i| loads[i].bulk);
    match least {
        // Alone on the first connection it is in nobody's way.
        Some(least) if now == 0 && loads[0].streams > 1 => Place::There(least),
        _ => Place::Here,
    }
}

impl Session {
    /// A session that begins on this connection.
    pub fn new(node: Name, hello: &Hello, remote: SocketAddr, opener: Opener) -> Arc<Self> {
        let first = Connection::new(opener);
        Arc::new(Self {
            node,
            instance: hello.instance.clone(),
            id: hello.session.clone(),
            remote,
            since: SystemTime::now(),
            bytes_in: AtomicU64::new(0),
            bytes_out: AtomicU64::new(0),
            epoch: AtomicU64::new(0),
            start: Instant::now(),
            next_stream: AtomicU64::new(1),
            count: Arc::default(),
            closing: watch::Sender::new(None),
            leaving: AtomicBool::new(false),
            pool: Mutex::new(Pool { connections: vec![first], ..Pool::default() }),
        })
    }

    /// Ends it.
    pub fn close(&self, why: &'static str) {
        self.closing.send_if_modified(|closing| closing.replace(why).is_none());
    }

    /// Ready when it is to end, and why.
    pub async fn closing(&self) -> &'static str {
        let mut closing = self.closing.subscribe();
        let why = closing.wait_for(Option::is_some).await.ok().and_then(|why| *why);
        why.unwrap_or("closed")
    }

    /// Whether its agent takes new streams, as far as is known.
    pub fn is_leaving(&self) -> bool {
        self.leaving.load(Relaxed)
    }

    /// Its agent's age among the node's.
    pub fn epoch(&self) -> u64 {
        self.epoch.load(Relaxed)
    }

    /// Raises that age; whether it was lower.
    pub fn raise(&self, epoch: u64) -> bool {
        self.epoch.fetch_max(epoch, Relaxed) < epoch
    }

    /// What other replicas are told of it.
    pub fn hold(&self) -> Hold {
        Hold { epoch: self.epoch(), instance: self.instance.clone() }
    }

    /// How many streams it has, those that are being opened too.
    pub fn streams(&self) -> usize {
        self.count.load(Relaxed)
    }

    /// How many connections it has.
    pub fn connections(&self) -> usize {
        self.pool().connections.len()
    }

    /// The last round trip that was measured on its first connection.
    pub fn round_trip(&self) -> Option<Duration> {
        self.first()?.opener.path.round_trip()
    }

    /// Whether its agent answers.
    pub async fn is_there(&self) -> bool {
        match self.first() {
            Some(first) => first.opener.is_there().await.is_ok(),
            None => false,
        }
    }

    /// Tells its agent that this server is going away.
    pub async fn ask_to_move(&self) {
        if let Some(first) = self.first() {
            let _ = first.opener.ask_to_move().await;
        }
    }

    /// Tells its agent how many replicas there are.
    pub async fn tell_replicas(&self, replicas: usize) {
        if let Some(first) = self.first() {
            let _ = first.opener.tell_replicas(replicas).await;
        }
    }

    /// Opens a stream to a target on the node, unless it has `most` already.
    ///
    /// # Errors
    /// `too-many`, what the agent says, or `no-session` when its connection is lost meanwhile.
    pub async fn open(
        self: &Arc<Self>,
        target: &Target,
        most: usize,
        patience: Duration,
        early: Bytes,
    ) -> Result<(Pipe, Stream), Refusal> {
        // Dials under way count: a kubelet that does not answer must not collect them.
        let place = Counted::take(&self.count, most).ok_or_else(|| {
            Refusal::new(Reason::TooMany, format_args!("node {} has {most} streams already", self.node))
        })?;
        let first = self.first().ok_or(Reason::NoSession)?;
        let number = self.next_stream.fetch_add(1, Relaxed);
        let opened = first.opener.open(target, number, patience, early).await;
        if opened.as_ref().is_err_and(|refusal| refusal.reason == Reason::NoSession) {
            self.leaving.store(true, Relaxed);
        }
        let (pipe, mover) = opened?;
        let live = Arc::new(Live {
            number,
            mover,
            connection: Mutex::new(first.clone()),
            bulk: AtomicBool::new(false),
            moving: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            burst_start: AtomicU64::new(self.millis()),
            burst: AtomicU64::new(0),
        });
        first.streams.fetch_add(1, Relaxed);
        self.pool().streams.insert(number, live.clone());
        if first.bulk.load(Relaxed) > 0 {
            self.settle();
        }
        Ok((pipe, Stream { session: self.clone(), live, _place: place }))
    }

    /// Adds a connection, and moves to it what belongs there; none when the session has as many as it may have.
    pub fn join(self: &Arc<Self>, opener: Opener) -> Option<Arc<Connection>> {
        let connection = Connection::new(opener);
        let mut pool = self.pool();
        if pool.connections.len() >= CONNECTIONS_LIMIT {
            return None;
        }
        pool.asked = None;
        pool.connections.push(connection.clone());
        drop(pool);
        self.settle();
        Some(connection)
    }

    /// Removes a connection.
    pub fn part(&self, connection: &Arc<Connection>) {
        self.pool().connections.retain(|other| !Arc::ptr_eq(other, connection));
    }

    /// Ready when an extra connection has been without a stream for long; it is removed then.
    pub async fn idle(&self, connection: &Arc<Connection>) {
        const LOOK: Duration = Duration::from_secs(2);
        let mut idle = Duration::ZERO;
        loop {
            tokio::time::sleep(LOOK).await;
            let mut pool = self.pool();
            idle = if connection.streams.load(Relaxed) == 0 { idle + LOOK } else { Duration::ZERO };
            if idle >= IDLE {
                pool.connections.retain(|other| !Arc::ptr_eq(other, connection));
                return;
            }
        }
    }

    /// Puts every bulk stream where it belongs, as far as that is possible now.
    fn settle(self: &Arc<Self>) {
        let mut pool = self.pool();
        let streams: Vec<_> = pool.streams.values().filter(|live| live.bulk.load(Relaxed)).cloned().collect();
        for live in streams {
            let here = live.connection();
            let loads: Vec<_> = pool.connections.iter().map(|connection| connection.load()).collect();
            let now = pool.connections.iter().position(|other| Arc::ptr_eq(other, &here));
            let Some(now) = now.filter(|_| !live.moving.load(Relaxed)) else { continue };
            match place(&loads, now) {
                Place::Here => {}
                Place::There(there) => {
                    let there = pool.connections[there].clone();
                    live.moving.store(true, Relaxed);
                    live.sit(&there);
                    tokio::spawn(self.clone().carry(live, here, there));
                }
                Place::More => {
                    if pool.asked.is_none_or(|asked| asked.elapsed() >= ASK_AGAIN) {
                        pool.asked = Some(Instant::now());
                        let first = pool.connections[0].clone();
                        tokio::spawn(async move { timeout(ASK_AGAIN, first.opener.ask_for_extra()).await });
                    }
                }
            }
        }
    }

    /// Carries a stream over, or leaves it where it was.
    async fn carry(self: Arc<Self>, live: Arc<Live>, from: Arc<Connection>, to: Arc<Connection>) {
        let moved = to.opener.go_on(live.number, &live.mover).await;
        if let Err(error) = moved {
            log::debug!("node {}: stream {} stays where it is: {error}", self.node, live.number);
            live.mover.stays();
            live.sit(&from);
        }
        live.moving.store(false, Relaxed);
    }

    fn first(&self) -> Option<Arc<Connection>> {
        self.pool().connections.first().cloned()
    }

    fn pool(&self) -> MutexGuard<'_, Pool> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn millis(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

impl Connection {
    fn new(opener: Opener) -> Arc<Self> {
        Arc::new(Self { opener, streams: AtomicUsize::new(0), bulk: AtomicUsize::new(0) })
    }

    fn load(&self) -> Load {
        Load { streams: self.streams.load(Relaxed), bulk: self.bulk.load(Relaxed) }
    }
}

impl Live {
    fn connection(&self) -> Arc<Connection> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Counts this stream on another connection from now on.
    fn sit(&self, there: &Arc<Connection>) {
        let mut here = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        if self.ended.load(Relaxed) {
            return;
        }
        let bulk = usize::from(self.bulk.load(Relaxed));
        there.streams.fetch_add(1, Relaxed);
        there.bulk.fetch_add(bulk, Relaxed);
        here.streams.fetch_sub(1, Relaxed);
        here.bulk.fetch_sub(bulk, Relaxed);
        *here = there.clone();
    }
}

/// A stream's account: counts its bytes, and leaves the session when it is dropped.
#[derive(Debug)]
pub struct Stream {
    session: Arc<Session>,
    live: Arc<Live>,
    _place: Counted,
}

/// Counts one for as long as it lives.
#[derive(Debug)]
struct Counted(Arc<AtomicUsize>);

impl Counted {
    fn take(count: &Arc<AtomicUsize>, most: usize) -> Option<Self> {
        let more = |now: usize| (now < most).then_some(now + 1);
        count.fetch_update(Relaxed, Relaxed, more).ok().map(|_| Self(count.clone()))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

impl Stream {
    /// Whether this many more bytes make it bulk.
    fn count(&self, bytes: usize) {
        let live = &self.live;
        if live.bulk.load(Relaxed) {
            return;
        }
        let now = self.session.millis();
        let limit = BULK_TIME.as_millis() as u64;
        if now.saturating_sub(live.burst_start.load(Relaxed)) > limit {
            live.burst_start.store(now, Relaxed);
            live.burst.store(0, Relaxed);
        }
        if live.burst.fetch_add(bytes as u64, Relaxed) + bytes as u64 >= BULK {
            let here = live.connection.lock().unwrap_or_else(PoisonError::into_inner);
            if !live.bulk.swap(true, Relaxed) {
                here.bulk.fetch_add(1, Relaxed);
            }
            drop(here);
            self.session.settle();
        }
    }
}

impl Meter for Stream {
    fn sent(&self, bytes: usize) {
        self.session.bytes_in.fetch_add(bytes as u64, Relaxed);
        self.count(bytes);
    }

    fn received(&self, bytes: usize) {
        self.session.bytes_out.fetch_add(bytes as u64, Relaxed);
        self.count(bytes);
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.session.pool().streams.remove(&self.live.number);
        let here = self.live.connection.lock().unwrap_or_else(PoisonError::into_inner);
        self.live.ended.store(true, Relaxed);
        here.streams.fetch_sub(1, Relaxed);
        here.bulk.fetch_sub(usize::from(self.live.bulk.load(Relaxed)), Relaxed);
        drop(here);
        if self.live.bulk.load(Relaxed) {
            self.session.settle();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bulk_gets_connections_of_its_own() {
        let load = |streams, bulk| Load { streams, bulk };
        // (connections, where it is now, where it belongs)
        let table: [(&[Load], usize, Place); 7] = [
            (&[load(1, 1)], 0, Place::More),
            (&[load(5, 1), load(0, 0)], 0, Place::There(1)),
            (&[load(5, 1), load(1, 1)], 0, Place::More),
            (&[load(5, 0), load(1, 1)], 1, Place::Here),
            (&[load(5, 0), load(2, 2), load(0, 0)], 1, Place::There(2)),
            (
                &[
                    load(1, 1),
                    load(1, 1),
                    load(1, 1),
                    load(1, 1),
                    load(1, 1),
                    load(1, 1),
                    load(1, 1),
                    load(1, 1),
                ],
                0,
                Place::Here,
            ),
            (
                &[
                    load(2, 1),
                    load(2, 2),
                    load(1, 1),
                    load(1, 1),
                    load(1, 1),
                    load(1, 1),
                    load(1, 1),
                    load(1, 1),
                ],
                0,
                Place::There(2),
            ),
        ];
        for (loads, now, belongs) in table {
            assert_eq!(place(loads, now), belongs, "{loads:?} {now}");
        }
    }
}
