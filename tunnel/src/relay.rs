//! Copies bytes both ways between a socket and a stream (or two of either), until both directions are done or one breaks.
//!
//! An end travels as an end: EOF becomes END_STREAM and back, each direction by itself. A break travels as a break: the
//! stream is reset, the socket is closed with a reset, and whoever drops a relay half-way resets both, so that a
//! truncated copy never looks complete. (A unix socket knows no reset; there the TLS inside has to tell.)
//!
//! Memory: one read buffer per thread, none per idle stream. What was read is given away to the stream when it is
//! large, and copied out of the buffer when it is small.

use crate::carrier::pipe::{self, Lost, Pipe, RecvHalf, SendHalf};
use bytes::{Bytes, BytesMut};
use futures_util::future::poll_fn;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use std::{
    cell::Cell,
    fmt,
    future::Future,
    io,
    os::fd::AsFd,
    pin::Pin,
    sync::{Mutex, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpStream, UnixStream},
    sync::Notify,
    time::sleep,
};
use tokio_rustls::server::TlsStream;

/// Bytes read at once.
const CHUNK: usize = 64 << 10;

/// From here on the buffer is given away rather than copied from.
const LARGE: usize = 24 << 10;

/// How often a socket is looked at whose stream takes nothing.
const LOOK: Duration = Duration::from_secs(1);

/// How long a caller may take to end its side once a kubelet has closed and all that it had sent is on its way: a
/// window's worth over a slow link.
const LINGER: Duration = Duration::from_secs(60);

/// A socket at this end of a relay.
pub trait Socket: AsyncRead + AsyncWrite + Unpin + Send {
    /// Closes so that the other end sees a reset, as far as the kind of socket can: takes effect when it is dropped.
    fn reset(&self);

    /// Whether the other end has gone altogether, both halves of it.
    fn is_gone(&self) -> bool;
}

/// Who is at the other end of a relay's socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// One who asked for the connection. It is looked for while its stream takes nothing, so that who vanishes then is
    /// noticed, and one that takes nothing any more is gone.
    Caller,
    /// A kubelet, or what else was dialled. What it sent before it went is passed on, and one that has answered in full
    /// and closed is no failure, whatever the caller goes on to say (kubectl pings).
    Target,
}

impl Socket for TcpStream {
    fn reset(&self) {
        // Fails only for a socket that is reset already.
        let _ = socket2::SockRef::from(self).set_linger(Some(Duration::ZERO));
    }

    fn is_gone(&self) -> bool {
        hung_up(self)
    }
}

impl Socket for UnixStream {
    fn reset(&self) {}

    fn is_gone(&self) -> bool {
        hung_up(self)
    }
}

impl Socket for TlsStream<TcpStream> {
    fn reset(&self) {
        self.get_ref().0.reset();
    }

    fn is_gone(&self) -> bool {
        hung_up(&self.get_ref().0)
    }
}

/// Whether the kernel knows that nobody is at the other end: a unix socket was closed there, TCP was reset (as the answer to a keepalive too, where
/// a machine has closed its socket without a word that we could read). A half-close is not enough.
pub fn hung_up(socket: &impl AsFd) -> bool {
    // Nothing asked for: these two are always told.
    let mut fds = [PollFd::new(socket.as_fd(), PollFlags::empty())];
    nix::poll::poll(&mut fds, PollTimeout::ZERO).is_ok()
        && fds[0].revents().is_some_and(|events| events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR))
}

/// Told of every byte that has been passed on.
pub trait Meter {
    /// From the socket into the stream.
    fn sent(&self, bytes: usize);
    /// From the stream into the socket.
    fn received(&self, bytes: usize);
}

/// Why a relay stopped before both directions were done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// The socket at this end broke.
    Socket,
    /// The other end of the socket at this end had said its last, and takes nothing any more.
    Closed,
    /// The stream broke, or the far end did.
    Stream(Lost),
}

impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Socket => f.write_str("socket"),
            Self::Closed => f.write_str("socket closed"),
            Self::Stream(lost) => lost.fmt(f),
        }
    }
}

impl From<Lost> for Cut {
    fn from(lost: Lost) -> Self {
        Self::Stream(lost)
    }
}

impl From<io::Error> for Cut {
    /// A reset that comes after the end is a broken pipe, one that comes before it is a reset (`tcp_reset`).
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe { Self::Closed } else { Self::Socket }
    }
}

/// Resets its socket when it is dropped before the end.
struct Whole<S: Socket> {
    socket: S,
    done: bool,
}

impl<S: Socket> Drop for Whole<S> {
    fn drop(&mut self) {
        if !self.done {
            self.socket.reset();
        }
    }
}

/// A socket that both directions use, and that is looked at meanwhile. All of them are one task: nobody waits for the lock.
struct Shared<'a, S>(Mutex<&'a mut S>);

impl<S: Socket> Shared<'_, S> {
    fn with<T>(&self, poll: impl FnOnce(Pin<&mut S>) -> T) -> T {
        let mut socket = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        poll(Pin::new(&mut **socket))
    }

    /// Ready when the other end has gone altogether.
    async fn gone(&self) {
        loop {
            sleep(LOOK).await;
            if self.with(|socket| socket.is_gone()) {
                return;
            }
        }
    }
}

impl<S: Socket> AsyncRead for &Shared<'_, S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.with(|socket| socket.poll_read(cx, buf))
    }
}

impl<S: Socket> AsyncWrite for &Shared<'_, S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.with(|socket| socket.poll_write(cx, buf))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.with(|socket| socket.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.with(|socket| socket.poll_shutdown(cx))
    }
}

/// Copies between a socket and a stream.
///
/// # Errors
/// What broke; socket and stream have been reset.
pub async fn relay(socket: impl Socket, side: Side, mut pipe: Pipe, meter: &impl Meter) -> Result<(), Cut> {
    let mut whole = Whole { socket, done: false };
    let socket = Shared(Mutex::new(&mut whole.socket));
    let (mut reader, mut writer) = (&socket, &socket);
    let drained = Notify::new();
    let result = tokio::try_join!(
        async {
            let caller = (side == Side::Caller).then_some(&socket);
            forward(&mut reader, caller, &mut pipe.send, meter).await?;
            drained.notify_one();
            Ok(())
        },
        async {
            match backward(&mut pipe.recv, &mut writer, meter).await {
                Err(Cut::Closed) if side == Side::Target => {
                    let discard = async {
                        while let Some(chunk) = pipe.recv.recv().await? {
                            pipe.recv.release(chunk.len());
                        }
                        Ok(())
                    };
                    linger(discard, &drained).await
                }
                other => other,
            }
        },
    );
    match result {
        Ok(_) => {
            whole.done = true;
            Ok(())
        }
        Err(cut) => {
            let stalled = cut == Cut::Stream(Lost::Stalled);
            pipe.reset(if stalled { pipe::STALLED } else { pipe::RESET });
            Err(cut)
        }
    }
}

/// Copies between a caller's socket and a target's.
///
/// # Errors
/// [`Cut::Socket`] when the caller's broke, a reset of the stream when the target's did; both have been reset.
pub async fn splice(caller: impl Socket, target: impl Socket, meter: &impl Meter) -> Result<(), Cut> {
    const TARGETS: Cut = Cut::Stream(Lost::Reset);
    let mut caller = Whole { socket: caller, done: false };
    let mut target = Whole { socket: target, done: false };
    let (mut from_caller, mut to_caller) = tokio::io::split(&mut caller.socket);
    let (mut from_target, mut to_target) = tokio::io::split(&mut target.socket);
    let drained = Notify::new();
    tokio::try_join!(
        async {
            match between(&mut from_caller, &mut to_target, |n| meter.sent(n)).await {
                Err(Broke::Writer(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
                    let discard = async {
                        while !poll_fn(|cx| poll_chunk(Pin::new(&mut from_caller), cx)).await?.is_empty() {}
                        Ok(())
                    };
                    linger(discard, &drained).await
                }
                Err(Broke::Writer(_)) => Err(TARGETS),
                Err(Broke::Reader) => Err(Cut::Socket),
                Ok(()) => Ok(()),
            }
        },
        async {
            let copied = between(&mut from_target, &mut to_caller, |n| meter.received(n)).await;
            copied.map_err(|broke| if matches!(broke, Broke::Reader) { TARGETS } else { Cut::Socket })?;
            drained.notify_one();
            Ok(())
        },
    )?;
    caller.done = true;
    target.done = true;
    Ok(())
}

/// Copies between two streams: a caller's, forwarded by another replica, and a node's.
///
/// # Errors
/// [`Cut::Socket`] when the caller's broke, [`Cut::Stream`] when the node's did; both have been reset.
pub async fn bridge(mut caller: Pipe, mut node: Pipe, meter: &impl Meter) -> Result<(), Cut> {
    let result = tokio::try_join!(
        through(&mut caller.recv, &mut node.send, |n| meter.sent(n), callers, Cut::Stream),
        through(&mut node.recv, &mut caller.send, |n| meter.received(n), Cut::Stream, callers),
    );
    result.map(drop).inspect_err(|cut| {
        let stalled = *cut == Cut::Stream(Lost::Stalled);
        for pipe in [&mut caller, &mut node] {
            pipe.reset(if stalled { pipe::STALLED } else { pipe::RESET });
        }
    })
}

/// What a caller's stream that was lost is to a relay. One whose reader stood still is that, wherever it stands.
fn callers(lost: Lost) -> Cut {
    if lost == Lost::Stalled { Cut::Stream(lost) } else { Cut::Socket }
}

async fn through(
    from: &mut RecvHalf,
    to: &mut SendHalf,
    passed: impl Fn(usize),
    from_broke: impl Fn(Lost) -> Cut,
    to_broke: impl Fn(Lost) -> Cut,
) -> Result<(), Cut> {
    loop {
        let chunk = tokio::select! {
            biased;
            chunk = from.recv() => chunk.map_err(&from_broke)?,
            lost = poll_fn(|cx| to.poll_lost(cx)) => return Err(to_broke(lost)),
        };
        let Some(chunk) = chunk else { return to.finish().map_err(to_broke) };
        let length = chunk.len();
        let sent = {
            let mut sending = std::pin::pin!(to.send(chunk));
            poll_fn(|cx| match sending.as_mut().poll(cx) {
                Poll::Ready(sent) => Poll::Ready(sent.map_err(&to_broke)),
                Poll::Pending => match from.stands_still(cx) {
                    Ok(()) => Poll::Pending,
                    Err(lost) => Poll::Ready(Err(from_broke(lost))),
                },
            })
            .await
        };
        sent?;
        passed(length);
        from.release(length);
    }
}

/// Which side of a copy between sockets broke.
#[derive(Debug)]
enum Broke {
    Reader,
    Writer(io::Error),
}

async fn between(
    reader: &mut (impl AsyncRead + Unpin),
    writer: &mut (impl AsyncWrite + Unpin),
    passed: impl Fn(usize),
) -> Result<(), Broke> {
    loop {
        let chunk = poll_fn(|cx| poll_chunk(Pin::new(reader), cx)).await.map_err(|_| Broke::Reader)?;
        if chunk.is_empty() {
            return shut(writer).await.map_err(Broke::Writer);
        }
        passed(chunk.len());
        let mut rest = &chunk[..];
        while !rest.is_empty() {
            let written = poll_fn(|cx| Pin::new(&mut *writer).poll_write(cx, rest)).await;
            rest = &rest[nonzero(written).map_err(Broke::Writer)?..];
        }
        poll_fn(|cx| Pin::new(&mut *writer).poll_flush(cx)).await.map_err(Broke::Writer)?;
    }
}

async fn forward(
    reader: &mut (impl AsyncRead + Unpin),
    caller: Option<&Shared<'_, impl Socket>>,
    send: &mut SendHalf,
    meter: &impl Meter,
) -> Result<(), Cut> {
    loop {
        let chunk = poll_fn(|cx| {
            if let Poll::Ready(chunk) = poll_chunk(Pin::new(reader), cx) {
                return Poll::Ready(chunk.map_err(Cut::from));
            }
            send.poll_lost(cx).map(|lost| Err(lost.into()))
        })
        .await?;
        if chunk.is_empty() {
            return Ok(send.finish()?);
        }
        meter.sent(chunk.len());
        tokio::select! {
            biased;
            sent = send.send(chunk) => sent?,
            () = gone(caller) => return Err(Cut::Socket),
        }
    }
}

/// Ready when a caller that is to be looked for has gone.
async fn gone(caller: Option<&Shared<'_, impl Socket>>) {
    match caller {
        Some(caller) => caller.gone().await,
        None => std::future::pending().await,
    }
}

async fn backward(
    recv: &mut RecvHalf,
    writer: &mut (impl AsyncWrite + Unpin),
    meter: &impl Meter,
) -> Result<(), Cut> {
    while let Some(chunk) = recv.recv().await? {
        let mut at = 0;
        while at < chunk.len() {
            at += waited_for(recv, |cx| Pin::new(&mut *writer).poll_write(cx, &chunk[at..]).map(nonzero))
                .await?;
        }
        // TLS keeps what the socket did not take.
        waited_for(recv, |cx| Pin::new(&mut *writer).poll_flush(cx)).await?;
        meter.received(chunk.len());
        recv.release(chunk.len());
    }
    shut(writer).await.map_err(Cut::from)
}

/// Throws away what comes for a socket that takes no more, until the far end has no more either. The time for that
/// counts from when all that the socket had sent has been passed on.
async fn linger(discard: impl Future<Output = Result<(), Cut>>, drained: &Notify) -> Result<(), Cut> {
    let patience = async {
        drained.notified().await;
        sleep(LINGER).await;
    };
    tokio::select! {
        biased;
        ended = discard => ended,
        () = patience => Err(Cut::Closed),
    }
}

/// Waits for the socket to take something, unless the stream is given up meanwhile.
async fn waited_for<T>(
    recv: &RecvHalf,
    mut poll: impl FnMut(&mut Context<'_>) -> Poll<io::Result<T>>,
) -> Result<T, Cut> {
    poll_fn(|cx| match poll(cx) {
        Poll::Pending => match recv.stands_still(cx) {
            Ok(()) => Poll::Pending,
            Err(lost) => Poll::Ready(Err(lost.into())),
        },
        Poll::Ready(result) => {
            recv.reads();
            Poll::Ready(result.map_err(Cut::from))
        }
    })
    .await
}

fn nonzero(written: io::Result<usize>) -> io::Result<usize> {
    match written {
        Ok(0) => Err(io::ErrorKind::WriteZero.into()),
        other => other,
    }
}

/// Says that nothing more comes. A socket whose other end is gone already has been told.
async fn shut(writer: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
    match poll_fn(|cx| Pin::new(&mut *writer).poll_shutdown(cx)).await {
        Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(()),
        other => other,
    }
}

thread_local! {
    /// The read buffer that is not in use.
    static SPARE: Cell<BytesMut> = Cell::default();
}

/// The next bytes of a socket; none at its end. Holds no memory while it waits.
fn poll_chunk(reader: Pin<&mut impl AsyncRead>, cx: &mut Context<'_>) -> Poll<io::Result<Bytes>> {
    let mut buffer = SPARE.take();
    if buffer.capacity() < CHUNK {
        buffer = BytesMut::with_capacity(CHUNK);
    }
    let polled = tokio_util::io::poll_read_buf(reader, cx, &mut buffer);
    if buffer.len() >= LARGE {
        ready!(polled)?;
        return Poll::Ready(Ok(buffer.freeze()));
    }
    let chunk = Bytes::copy_from_slice(&buffer);
    buffer.clear();
    SPARE.set(buffer);
    ready!(polled)?;
    Poll::Ready(Ok(chunk))
}
