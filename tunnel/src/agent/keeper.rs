//! Keeps a session: the one loop of the agent that decides.
//!
//! It wants one session that takes new streams, dials for it with growing, jittered waits, and never gives up. A
//! session is left when the agent's certificate has been renewed: it takes no new streams, the next one is dialled at
//! once, and its streams go on until they end. When the server is going away the session is kept until there is
//! another: it is better than none.

use super::{
    Dialler, backoff,
    connect::{Connected, Failure, connect},
    session::{Session, Wish},
};
use crate::{
    carrier::{Ended, Kind},
    hello::{Hello, Id, Role, TurnedAway},
};
use std::{sync::Arc, time::Duration};
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::{Instant, sleep_until},
};

/// How often an extra connection is dialled again when it came out on another replica.
const EXTRA_TRIES: usize = 8;

/// A session that stood this long makes the next outage a new one.
const STABLE: Duration = Duration::from_secs(10);

/// What probes and people want to know.
#[derive(Debug, Clone, Default)]
pub struct State {
    /// The replica at the other end of the session that takes streams, if there is one.
    pub replica: Option<Id>,
    /// Why there is none.
    pub why_not: Option<String>,
}

/// The loop and what it knows.
pub struct Keeper {
    dialler: Arc<Dialler>,
    state: watch::Sender<State>,
    random: fastrand::Rng,
    tasks: JoinSet<()>,
    events: (mpsc::Sender<Event>, mpsc::Receiver<Event>),
    renewed: watch::Receiver<u64>,
    /// The session that takes new streams; others may be finishing.
    current: Option<Running>,
    sessions: u64,
    /// When to dial, unless a dial is under way.
    dial_at: Option<Instant>,
    dialling: bool,
    dials: usize,
    /// The last wait.
    wait: Duration,
    /// Since when there has been no session that stood.
    outage: Instant,
}

/// A session as the loop sees it.
struct Running {
    number: u64,
    leave: watch::Sender<bool>,
    started: Instant,
}

/// What happened.
enum Event {
    Dialled(Result<(Box<Connected>, Id), Failure>),
    Move(u64),
    Ended(u64, Ended),
}

impl Keeper {
    /// One that has not dialled yet.
    pub fn new(dialler: Arc<Dialler>, state: watch::Sender<State>) -> Self {
        let now = Instant::now();
        Self {
            renewed: dialler.tls.changes(),
            dialler,
            state,
            random: fastrand::Rng::new(),
            tasks: JoinSet::new(),
            events: mpsc::channel(64),
            current: None,
            sessions: 0,
            dial_at: Some(now),
            dialling: false,
            dials: 0,
            wait: Duration::ZERO,
            outage: now,
        }
    }

    /// Keeps a session, for ever.
    pub async fn keep(&mut self) {
        loop {
            let due = self.dial_at.filter(|_| !self.dialling);
            tokio::select! {
                Some(event) = self.events.1.recv() => self.take(event),
                Ok(()) = self.renewed.changed() => {
                    if self.current.is_some() {
                        log::info!("the certificate has been renewed: on to a new session");
                        self.leave();
                        self.dial_at = Some(Instant::now());
                    }
                }
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => self.dial(),
                Some(_) = self.tasks.join_next(), if !self.tasks.is_empty() => {}
            }
        }
    }

    /// The session takes no new streams; those that stand may finish.
    pub fn leave(&mut self) {
        if let Some(running) = self.current.take() {
            running.leave.send_replace(true);
        }
        self.disconnected("going away");
    }

    fn disconnected(&self, why: &str) {
        self.dialler.node.metrics.sessions(0);
        self.dialler.node.metrics.connected(false);
        self.state.send_replace(State { replica: None, why_not: Some(why.to_owned()) });
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Dialled(Ok((connected, id))) => self.begin(*connected, id),
            Event::Dialled(Err(failure)) => {
                self.dialling = false;
                self.wait = backoff::next(self.wait, self.outage.elapsed(), &mut self.random);
                self.dial_at = Some(Instant::now() + self.wait);
                log::warn!("no session: {failure}; next try in {:.1} s", self.wait.as_secs_f32());
                if self.current.is_none() {
                    self.disconnected(&failure.to_string());
                }
            }
            Event::Move(number) => {
                if self.is_current(number) && self.dial_at.is_none() {
                    log::info!("the server is going away: looking for another session");
                    self.dial_at = Some(Instant::now());
                }
            }
            Event::Ended(number, ended) => {
                log::info!("a session has ended: {ended}");
                if self.is_current(number) {
                    self.lost(&ended);
                }
            }
        }
    }

    fn is_current(&self, number: u64) -> bool {
        self.current.as_ref().is_some_and(|running| running.number == number)
    }

    fn lost(&mut self, ended: &Ended) {
        let stood = self.current.take().is_some_and(|running| running.started.elapsed() >= STABLE);
        self.wait = if stood {
            self.outage = Instant::now();
            backoff::first(&mut self.random)
        } else {
            backoff::next(self.wait, self.outage.elapsed(), &mut self.random)
        };
        self.dial_at = Some(Instant::now() + self.wait);
        self.disconnected(&format!("the session has ended: {ended}"));
    }

    fn dial(&mut self) {
        self.dial_at = None;
        self.dialling = true;
        let (dialler, events) = (self.dialler.clone(), self.events.0.clone());
        let server = self.dials % dialler.config.servers.len();
        self.dials += 1;
        let id = Id::random(&mut self.random);
        self.tasks.spawn(async move {
            let dialled = dialler.dial(server, &id, Role::Session).await;
            let _ = events.send(Event::Dialled(dialled.map(|connected| (Box::new(connected), id)))).await;
        });
    }

    fn begin(&mut self, connected: Connected, id: Id) {
        log::info!("session {id} with replica {}", connected.replica);
        self.dialling = false;
        self.dial_at = None;
        let metrics = &self.dialler.node.metrics;
        metrics.sessions(1);
        metrics.connected(true);
        self.state.send_replace(State { replica: Some(connected.replica.clone()), why_not: None });
        self.sessions += 1;
        let number = self.sessions;
        let leave = watch::Sender::new(false);
        let (dialler, leaves, events) = (self.dialler.clone(), leave.subscribe(), self.events.0.clone());
        self.tasks.spawn(async move {
            let ended = serve(dialler, number, connected, id, leaves, &events).await;
            let _ = events.send(Event::Ended(number, ended)).await;
        });
        self.current = Some(Running { number, leave, started: Instant::now() });
    }
}

/// Serves a session from its first connection to its end.
async fn serve(
    dialler: Arc<Dialler>,
    number: u64,
    first: Connected,
    id: Id,
    leave: watch::Receiver<bool>,
    events: &mpsc::Sender<Event>,
) -> Ended {
    let (wishes, mut wished) = mpsc::channel(4);
    let session = Session::new(dialler.clone(), wishes, leave);
    let mut extras = JoinSet::new();
    let mut first = std::pin::pin!(session.serve(first, Kind::First));
    loop {
        tokio::select! {
            ended = &mut first => return ended,
            Some(wish) = wished.recv() => match wish {
                Wish::Extra => drop(extras.spawn(extra(dialler.clone(), session.clone(), id.clone()))),
                Wish::Move => drop(events.send(Event::Move(number)).await),
            },
            Some(_) = extras.join_next(), if !extras.is_empty() => {}
        }
    }
}

/// Dials one more connection for a session, until it comes out on the right replica, and serves it.
async fn extra(dialler: Arc<Dialler>, session: Arc<Session>, id: Id) {
    for attempt in 0..EXTRA_TRIES {
        match dialler.dial(attempt % dialler.config.servers.len(), &id, Role::Extra).await {
            Ok(connected) => {
                let ended = session.serve(connected, Kind::Extra).await;
                return log::debug!("an extra connection has ended: {ended}");
            }
            Err(Failure::TurnedAway(TurnedAway::NotHere, _)) => {}
            Err(failure) => return log::debug!("no extra connection: {failure}"),
        }
    }
}

impl Dialler {
    /// Makes a connection for a session to one of the servers.
    async fn dial(&self, server: usize, session: &Id, role: Role) -> Result<Connected, Failure> {
        let hello = Hello { instance: self.instance.clone(), session: session.clone(), role };
        connect(&self.config, &self.config.servers[server], &self.tls, &hello).await
    }
}
