//! Readers that stand still, and the window they hold.
//!
//! A connection's receive window is shared by its streams. Each stream can hold at most its own window of it, so one
//! reader that stands still costs nobody anything; many of them together would. When the streams whose reader has
//! stood still for a second hold half of the connection's window, those that have stood longest are reset until the
//! others hold less.

use super::pipe::Lost;
use futures_util::task::AtomicWaker;
use h2::FlowControl;
use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    task::Context,
    time::Duration,
};
use tokio::{sync::Notify, time::Instant};

/// How often a connection with streams is looked at, and how long a reader has to stand still to count.
const LOOK: Duration = Duration::from_secs(1);

/// The streams of one connection, seen from the receiving side.
#[derive(Debug)]
pub struct Stalls {
    start: Instant,
    /// The connection's window, bytes.
    window: AtomicU32,
    readers: Mutex<(u64, HashMap<u64, Held>)>,
    first: Notify,
}

/// A stream's share of the window and its reader.
struct Held {
    flow: FlowControl,
    reader: Arc<Reader>,
}

impl std::fmt::Debug for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.reader.fmt(f)
    }
}

/// The reader of one stream: whether it stands still, and whether it has been given up.
#[derive(Debug, Default)]
pub struct Reader {
    /// Milliseconds after the connection's start, plus one; 0 while it reads.
    since: AtomicU64,
    fate: AtomicU8,
    waker: AtomicWaker,
}

/// The reader is waited for.
const WAITED_FOR: u8 = 0;
/// Its stream is given up because it stood still.
const GIVEN_UP: u8 = 1;
/// Its stream's connection is gone.
const LOST: u8 = 2;

/// A reader's place among a connection's, left by dropping it.
#[derive(Debug)]
pub struct Place {
    stalls: Arc<Stalls>,
    key: u64,
    reader: Arc<Reader>,
}

impl Stalls {
    /// For a connection with this window, bytes.
    pub fn new(window: u32) -> Arc<Self> {
        Arc::new(Self {
            start: Instant::now(),
            window: AtomicU32::new(window),
            readers: Mutex::default(),
            first: Notify::new(),
        })
    }

    /// The connection's window has become this large.
    pub fn set_window(&self, window: u32) {
        self.window.store(window, Relaxed);
    }

    /// Enters a stream.
    pub fn enter(self: &Arc<Self>, flow: FlowControl) -> Place {
        let reader = Arc::new(Reader::default());
        let mut readers = self.readers.lock().unwrap_or_else(PoisonError::into_inner);
        let key = readers.0;
        readers.0 += 1;
        readers.1.insert(key, Held { flow, reader: reader.clone() });
        if readers.1.len() == 1 {
            self.first.notify_one();
        }
        drop(readers);
        Place { stalls: self.clone(), key, reader }
    }

    /// Looks after the connection's readers for as long as it is polled. Sleeps while there are none.
    pub async fn watch(&self) {
        loop {
            if self.readers.lock().unwrap_or_else(PoisonError::into_inner).1.is_empty() {
                self.first.notified().await;
            }
            tokio::time::sleep(LOOK).await;
            for reader in self.look() {
                reader.waker.wake();
            }
        }
    }

    /// Gives up the readers that have stood still longest, as many as it takes for the others to hold less than half.
    fn look(&self) -> Vec<Arc<Reader>> {
        let still_since = self.millis().saturating_sub(LOOK.as_millis() as u64);
        let readers = self.readers.lock().unwrap_or_else(PoisonError::into_inner);
        let stands_still = |held: &&Held| (1..=still_since).contains(&held.reader.since.load(Relaxed));
        let mut still: Vec<_> = readers.1.values().filter(stands_still).collect();
        still.sort_by_key(|held| held.reader.since.load(Relaxed));
        let mut held: usize = still.iter().map(|held| held.flow.used_capacity()).sum();
        let half = self.window.load(Relaxed) as usize / 2;
        let mut given_up = Vec::new();
        for longest in still {
            if held < half {
                break;
            }
            held -= longest.flow.used_capacity().min(held);
            longest.reader.fate.store(GIVEN_UP, Relaxed);
            given_up.push(longest.reader.clone());
        }
        given_up
    }

    /// The connection is gone: those who wait for their reader are woken.
    pub fn lost(&self) {
        let readers = self.readers.lock().unwrap_or_else(PoisonError::into_inner);
        for held in readers.1.values() {
            held.reader.fate.store(LOST, Relaxed);
            held.reader.waker.wake();
        }
    }

    fn millis(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

impl Place {
    /// The reader does not take what there is for it; wakes the task when there is no more use in waiting.
    ///
    /// # Errors
    /// When there is none already.
    pub fn stands_still(&self, cx: &Context<'_>) -> Result<(), Lost> {
        if self.reader.since.load(Relaxed) == 0 {
            self.reader.since.store(self.stalls.millis().max(1), Relaxed);
        }
        self.reader.waker.register(cx.waker());
        match self.reader.fate.load(Relaxed) {
            WAITED_FOR => Ok(()),
            GIVEN_UP => Err(Lost::Stalled),
            _ => Err(Lost::Connection),
        }
    }

    /// The reader took something.
    pub fn reads(&self) {
        self.reader.since.store(0, Relaxed);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.stalls.readers.lock().unwrap_or_else(PoisonError::into_inner).1.remove(&self.key);
    }
}
