//! One stream, and how it changes connections while it runs.
//!
//! A stream begins on its session's first connection, where opening costs one round trip and nothing bulky lives. Once
//! it has shown to be bulk it is moved, both directions separately, so that nobody waits: the server opens a second
//! HTTP/2 stream on the other connection that names the first; each sender then ends its old half with the trailer
//! `etun-moved` and goes on in the new; each receiver reads the old half up to that trailer and goes on in the new. No
//! byte is lost, none overtakes another, and an end without the trailer still means the end.

use super::stall::{Place, Stalls};
use bytes::Bytes;
use futures_util::future::poll_fn;
use h2::{Reason, RecvStream, SendStream};
use http::{HeaderMap, HeaderValue};
use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, Waker, ready},
};

/// The trailer that says: go on reading in the stream that continues this one.
const MOVED: &str = "etun-moved";

/// A stream that is open both ways.
#[derive(Debug)]
pub struct Pipe {
    /// What we send.
    pub send: SendHalf,
    /// What we receive.
    pub recv: RecvHalf,
}

/// Why a stream is no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lost {
    /// The other end reset it.
    Reset,
    /// The other end gave it up because its reader stood still.
    Stalled,
    /// Its connection is gone.
    Connection,
}

impl fmt::Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Reset => "reset",
            Self::Stalled => "stalled",
            Self::Connection => "session lost",
        })
    }
}

/// What a stream is reset with when its reader stood still; anything else is an ordinary reset.
pub const STALLED: Reason = Reason::ENHANCE_YOUR_CALM;

/// What an ordinary reset carries.
pub const RESET: Reason = Reason::CONNECT_ERROR;

impl From<h2::Error> for Lost {
    fn from(error: h2::Error) -> Self {
        match error.reason() {
            Some(STALLED) if error.is_reset() => Self::Stalled,
            Some(_) if error.is_reset() => Self::Reset,
            _ => Self::Connection,
        }
    }
}

/// A place where the next connection's half is put for the one that is running.
#[derive(Debug)]
struct Slot<T>(Mutex<(Next<T>, Option<Waker>)>);

#[derive(Debug)]
enum Next<T> {
    None,
    There(T),
    /// Nobody will put anything here any more.
    Never,
}

impl<T> Slot<T> {
    fn new() -> Self {
        Self(Mutex::new((Next::None, None)))
    }

    fn put(&self, next: Next<T>) {
        let mut slot = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        slot.0 = next;
        let waker = slot.1.take();
        drop(slot);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// The next half, or none when there will be none.
    fn poll_take(&self, cx: &Context<'_>) -> Poll<Option<T>> {
        let mut slot = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match std::mem::replace(&mut slot.0, Next::None) {
            Next::There(next) => Poll::Ready(Some(next)),
            Next::Never => {
                slot.0 = Next::Never;
                Poll::Ready(None)
            }
            Next::None => {
                if slot.1.as_ref().is_none_or(|waker| !waker.will_wake(cx.waker())) {
                    slot.1 = Some(cx.waker().clone());
                }
                Poll::Pending
            }
        }
    }
}

/// Where a running stream is told to go on. Dropping the last one says that it stays where it is.
#[derive(Debug)]
pub struct Mover(Arc<Slots>);

#[derive(Debug)]
struct Slots {
    send: Slot<SendStream<Bytes>>,
    recv: Slot<(RecvStream, Place)>,
}

impl Mover {
    /// Both halves go on here, on a connection with these stalls.
    pub fn go_on(&self, send: SendStream<Bytes>, mut recv: RecvStream, stalls: &Arc<Stalls>) {
        let place = stalls.enter(recv.flow_control().clone());
        self.0.recv.put(Next::There((recv, place)));
        self.0.send.put(Next::There(send));
    }
}

impl Mover {
    /// There is no half to go on in. A receiver that was told to go on has lost its stream; one that was not stays
    /// where it is, and may be moved later.
    pub fn stays(&self) {
        let mut slot = self.0.recv.0.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(slot.0, Next::None) {
            slot.0 = Next::Never;
            if let Some(waker) = slot.1.take() {
                waker.wake();
            }
        }
    }
}

impl Drop for Mover {
    fn drop(&mut self) {
        self.stays();
    }
}

impl Pipe {
    /// The stream's two halves put together, and the way to move them later.
    pub fn new(send: SendStream<Bytes>, mut recv: RecvStream, stalls: &Arc<Stalls>) -> (Self, Mover) {
        let slots = Arc::new(Slots { send: Slot::new(), recv: Slot::new() });
        let place = stalls.enter(recv.flow_control().clone());
        let pipe = Self {
            send: SendHalf { h2: send, slots: slots.clone(), finished: false },
            recv: RecvHalf { h2: recv, place, slots: slots.clone(), moved: false },
        };
        (pipe, Mover(slots))
    }

    /// Resets the stream, whatever state it is in.
    pub fn reset(&mut self, why: Reason) {
        self.send.h2.send_reset(why);
    }
}

/// The half that sends.
#[derive(Debug)]
pub struct SendHalf {
    h2: SendStream<Bytes>,
    slots: Arc<Slots>,
    finished: bool,
}

impl SendHalf {
    /// Sends all of it, as the other end's window permits.
    ///
    /// # Errors
    /// When the stream is no more.
    pub async fn send(&mut self, mut data: Bytes) -> Result<(), Lost> {
        while !data.is_empty() {
            let room = poll_fn(|cx| self.poll_room(cx, data.len())).await?;
            let piece = data.split_to(room.min(data.len()));
            self.h2.send_data(piece, false)?;
        }
        Ok(())
    }

    fn poll_room(&mut self, cx: &mut Context<'_>, wanted: usize) -> Poll<Result<usize, Lost>> {
        self.poll_move(cx)?;
        self.h2.reserve_capacity(wanted);
        // poll_capacity tells only of room that is new.
        let room = self.h2.capacity();
        if room > 0 {
            return Poll::Ready(Ok(room));
        }
        match ready!(self.h2.poll_capacity(cx)) {
            Some(room) => Poll::Ready(Ok(room?)),
            None => Poll::Ready(Err(self.why_gone(cx))),
        }
    }

    /// Ready when the other end has reset the stream; moves it meanwhile when it is told to.
    pub fn poll_lost(&mut self, cx: &mut Context<'_>) -> Poll<Lost> {
        if let Err(lost) = self.poll_move(cx) {
            return Poll::Ready(lost);
        }
        match ready!(self.h2.poll_reset(cx)) {
            Ok(STALLED) => Poll::Ready(Lost::Stalled),
            Ok(_) => Poll::Ready(Lost::Reset),
            Err(error) => Poll::Ready(error.into()),
        }
    }

    /// Says that nothing more comes.
    ///
    /// # Errors
    /// When the stream is no more.
    pub fn finish(&mut self) -> Result<(), Lost> {
        self.finished = true;
        Ok(self.h2.send_data(Bytes::new(), true)?)
    }

    fn poll_move(&mut self, cx: &Context<'_>) -> Result<(), Lost> {
        while let Poll::Ready(Some(next)) = self.slots.send.poll_take(cx) {
            let mut old = std::mem::replace(&mut self.h2, next);
            if self.finished {
                // The end has been said in the old stream; the new one has nothing to add.
                self.h2.send_data(Bytes::new(), true)?;
            } else {
                let moved = HeaderMap::from_iter([(
                    http::HeaderName::from_static(MOVED),
                    HeaderValue::from_static("1"),
                )]);
                old.send_trailers(moved)?;
            }
        }
        Ok(())
    }

    /// The stream can send no more: the other end said why, or its connection is gone.
    fn why_gone(&mut self, cx: &mut Context<'_>) -> Lost {
        match self.h2.poll_reset(cx) {
            Poll::Ready(Ok(STALLED)) => Lost::Stalled,
            Poll::Ready(Ok(_)) => Lost::Reset,
            _ => Lost::Connection,
        }
    }
}

/// The half that receives.
#[derive(Debug)]
pub struct RecvHalf {
    h2: RecvStream,
    place: Place,
    slots: Arc<Slots>,
    /// The other end has gone on in the next half, which is not here yet.
    moved: bool,
}

impl RecvHalf {
    /// The next bytes; none at the end.
    ///
    /// # Errors
    /// When the stream is no more.
    pub async fn recv(&mut self) -> Result<Option<Bytes>, Lost> {
        poll_fn(|cx| self.poll_recv(cx)).await
    }

    fn poll_recv(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Lost>> {
        loop {
            // The trailer is said once: that it has been heard must outlast the wait for the next half.
            if !self.moved {
                if let Some(data) = ready!(self.h2.poll_data(cx)) {
                    return Poll::Ready(Ok(Some(data?)));
                }
                let trailers = ready!(self.h2.poll_trailers(cx))?;
                if !trailers.is_some_and(|trailers| trailers.contains_key(MOVED)) {
                    return Poll::Ready(Ok(None));
                }
                self.moved = true;
            }
            match ready!(self.slots.recv.poll_take(cx)) {
                Some((h2, place)) => (self.h2, self.place, self.moved) = (h2, place, false),
                None => return Poll::Ready(Err(Lost::Connection)),
            }
        }
    }

    /// These bytes have reached the socket: the other end may send as many more.
    pub fn release(&mut self, bytes: usize) {
        self.place.reads();
        // Fails only when the stream is no more, which the next recv says.
        let _ = self.h2.flow_control().release_capacity(bytes);
    }

    /// The socket took some of what was received.
    pub fn reads(&self) {
        self.place.reads();
    }

    /// The socket takes nothing now; wakes the task when there is no more use in waiting for it.
    ///
    /// # Errors
    /// When there is none already.
    pub fn stands_still(&self, cx: &Context<'_>) -> Result<(), Lost> {
        self.place.stands_still(cx)
    }
}
