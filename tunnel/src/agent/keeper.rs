//! Keeps sessions: the one loop of the agent that decides.
//!
//! It wants two sessions that take new streams, on two replicas, so that one replica can go without anybody noticing;
//! one is enough to work. It dials with growing, jittered waits and never gives up. Where a connection comes out is the
//! load balancer's choice: a replica that has a session of ours turns the second away, and it is dialled again, a few
//! times quickly and then ever more rarely ([`backoff::elsewhere`]).
//!
//! When the agent's certificate has been renewed its sessions are followed by new ones, one after the other: the old
//! takes no new streams, and its streams go on until they end. When a server is going away its session is kept until it
//! ends, and another is looked for at once.

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

/// Sessions that are wanted.
const WANTED: usize = 2;

/// What probes and people want to know.
#[derive(Debug, Clone, Default)]
pub struct State {
    /// The replicas at the other ends of the sessions that take streams.
    pub replicas: Vec<Id>,
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
    /// The sessions that take new streams; others may be finishing.
    running: Vec<Running>,
    sessions: u64,
    /// How many replicas there are, as the last one that said so knows.
    replicas: usize,
    /// Dials that came out on a replica that does not want us twice, since something changed.
    tries: u32,
    /// When to dial, unless a dial is under way.
    dial_at: Option<Instant>,
    dialling: bool,
    dials: usize,
    /// The last wait after a failure.
    wait: Duration,
    /// Since when there has been no session that stood.
    outage: Instant,
}

/// A session as the loop sees it.
struct Running {
    number: u64,
    replica: Id,
    leave: watch::Sender<bool>,
    started: Instant,
    /// Its server is going away: it takes streams, and does not count.
    going: bool,
    /// It was made with a certificate that has been renewed.
    stale: bool,
}

/// What happened.
enum Event {
    Dialled(Result<(Box<Connected>, Id), Failure>),
    Move(u64),
    Replicas(usize),
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
            running: Vec::new(),
            sessions: 0,
            replicas: 1,
            tries: 0,
            dial_at: Some(now),
            dialling: false,
            dials: 0,
            wait: Duration::ZERO,
            outage: now,
        }
    }

    /// Keeps sessions, for ever.
    pub async fn keep(&mut self) {
        loop {
            let due = self.dial_at.filter(|_| !self.dialling);
            tokio::select! {
                Some(event) = self.events.1.recv() => self.take(event),
                Ok(()) = self.renewed.changed() => {
                    log::info!("the certificate has been renewed: on to new sessions");
                    self.running.iter_mut().for_each(|running| running.stale = true);
                    self.replace_stale();
                }
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => self.dial(),
                Some(_) = self.tasks.join_next(), if !self.tasks.is_empty() => {}
            }
        }
    }

    /// No session takes new streams any more; those that stand may finish.
    pub fn leave(&mut self) {
        for running in self.running.drain(..) {
            running.leave.send_replace(true);
        }
        self.tell(Some("going away"));
    }

    /// Leaves a session whose certificate is not the newest, and looks for the one that follows it.
    fn replace_stale(&mut self) {
        if let Some(at) = self.running.iter().position(|running| running.stale) {
            self.running.remove(at).leave.send_replace(true);
            self.tell(Some("on to a new session"));
            self.tries = 0;
            self.dial_at = Some(Instant::now());
        }
    }

    /// Shows how things stand.
    fn tell(&self, why_not: Option<&str>) {
        let metrics = &self.dialler.node.metrics;
        metrics.sessions(self.running.len());
        metrics.connected(!self.running.is_empty());
        let replicas: Vec<_> = self.running.iter().map(|running| running.replica.clone()).collect();
        let why_not = why_not.filter(|_| replicas.is_empty()).map(str::to_owned);
        self.state.send_replace(State { replicas, why_not });
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Dialled(Ok((connected, id))) => self.begin(*connected, id),
            Event::Dialled(Err(failure)) => {
                self.dialling = false;
                self.failed(&failure);
            }
            Event::Move(number) => {
                if let Some(running) = self.running.iter_mut().find(|running| running.number == number) {
                    running.going = true;
                    log::info!("replica {} is going away: looking for another", running.replica);
                    self.look_again();
                    if self.staying() > 0 {
                        // Every agent of that replica looks now; those that have another are in no hurry.
                        self.dial_at = Some(Instant::now() + backoff::first(&mut self.random) * 2);
                    }
                }
            }
            Event::Replicas(count) => {
                let more = count > self.replicas;
                self.replicas = count;
                if more && self.staying() < WANTED {
                    self.look_again();
                }
            }
            Event::Ended(number, ended) => {
                log::info!("a session has ended: {ended}");
                if let Some(at) = self.running.iter().position(|running| running.number == number) {
                    let lost = self.running.remove(at);
                    self.lost(&lost, &ended);
                }
            }
        }
    }

    /// Sessions whose server stays.
    fn staying(&self) -> usize {
        self.running.iter().filter(|running| !running.going).count()
    }

    /// Something has changed that makes it likely to come out elsewhere.
    fn look_again(&mut self) {
        self.tries = 0;
        self.dial_at = Some(Instant::now() + backoff::elsewhere(0, true, &mut self.random));
    }

    /// When to look for another replica.
    fn look_later(&mut self) {
        let several = self.replicas > 1 || self.dialler.config.servers.len() > 1;
        let mut wait = backoff::elsewhere(self.tries, several || self.staying() == 0, &mut self.random);
        if self.staying() == 0 {
            // Those that still stand will not for long.
            wait = wait.min(backoff::MOST_SHORT);
        }
        self.dial_at = Some(Instant::now() + wait);
    }

    fn failed(&mut self, failure: &Failure) {
        // A load balancer has its own idea of who is there.
        let elsewhere = matches!(
            failure,
            Failure::TurnedAway(TurnedAway::Duplicate | TurnedAway::Draining, _) if !self.running.is_empty()
        );
        if elsewhere {
            log::debug!("no other replica: {failure}");
            self.tries += 1;
            self.look_later();
            // The one that follows a stale session may have to be where that is.
            self.replace_stale();
            return;
        }
        self.wait = backoff::next(self.wait, self.outage.elapsed(), &mut self.random);
        self.dial_at = Some(Instant::now() + self.wait);
        log::warn!("no session: {failure}; next try in {:.1} s", self.wait.as_secs_f32());
        self.tell(Some(&failure.to_string()));
    }

    fn lost(&mut self, lost: &Running, ended: &Ended) {
        if !self.running.is_empty() || lost.started.elapsed() >= STABLE {
            self.outage = Instant::now();
            self.wait = backoff::first(&mut self.random);
        } else {
            self.wait = backoff::next(self.wait, self.outage.elapsed(), &mut self.random);
        }
        self.tries = 0;
        if self.staying() < WANTED {
            self.dial_at = Some(Instant::now() + self.wait);
        }
        self.tell(Some(&format!("the session has ended: {ended}")));
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
        self.replicas = connected.replicas;
        self.sessions += 1;
        let (number, replica) = (self.sessions, connected.replica.clone());
        let leave = watch::Sender::new(false);
        let (dialler, leaves, events) = (self.dialler.clone(), leave.subscribe(), self.events.0.clone());
        self.tasks.spawn(async move {
            let ended = serve(dialler, number, connected, id, leaves, &events).await;
            let _ = events.send(Event::Ended(number, ended)).await;
        });
        // One we had there shows no sign of life, or the server would have turned this one away.
        self.running.retain(|running| running.replica != replica);
        let started = Instant::now();
        self.running.push(Running { number, replica, leave, started, going: false, stale: false });
        self.tell(None);
        self.tries = 0;
        self.dial_at = None;
        if self.staying() < WANTED {
            self.look_later();
        }
        self.replace_stale();
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
                Wish::Replicas(count) => drop(events.send(Event::Replicas(count)).await),
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
