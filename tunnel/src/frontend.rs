//! Where callers come in: one module per kind of listener, all in front of one [`gate::Gate`].
//!
//! [`serve`] is what they share: read a CONNECT, let the gate connect or refuse, say 200 only then, copy until the end,
//! write the audit line. A caller that goes away meanwhile takes its dial with it.

pub mod egress;
pub mod gate;

use crate::{
    audit::{Audit, End},
    carrier::pipe::Lost,
    connect::{self, Progress, Request},
    refusal::{Reason, Refusal},
    relay::{self, Cut, Meter, Socket},
    target::Name,
};
use bytes::{BufMut, Bytes, BytesMut};
use gate::{Account, Far, Gate};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use std::{future::Future, io, os::fd::AsFd, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UnixStream},
    time::{Instant, timeout},
};
use tokio_rustls::server::TlsStream;

/// A head that has not ended by then is closed.
const HEAD: Duration = Duration::from_secs(10);

/// How long, and for how many bytes, a refused caller is listened to, so that it gets to read its answer.
const FAREWELL: Duration = Duration::from_secs(1);
const FAREWELL_BYTES: usize = 256 << 10;

/// A socket to a caller.
pub trait Caller: Socket + 'static {
    /// After the caller's half has ended: ready when the caller is gone altogether.
    fn hung_up(&mut self) -> impl Future<Output = ()> + Send;
}

impl Caller for TcpStream {
    /// TCP does not tell a half-close from going away; before the 200, apiserver's cancelled dials look like this.
    async fn hung_up(&mut self) {}
}

impl Caller for UnixStream {
    async fn hung_up(&mut self) {
        const LOOK: Duration = Duration::from_millis(250);
        let gone = |socket: &Self| {
            let mut fds = [PollFd::new(socket.as_fd(), PollFlags::empty())];
            nix::poll::poll(&mut fds, PollTimeout::ZERO).is_ok()
                && fds[0].revents().is_some_and(|events| events.contains(PollFlags::POLLHUP))
        };
        while !gone(self) {
            tokio::time::sleep(LOOK).await;
        }
    }
}

impl Caller for TlsStream<TcpStream> {
    /// close_notify alone is a half-close; the end of TCP is the end.
    async fn hung_up(&mut self) {
        let mut byte = [0];
        match self.get_ref().0.peek(&mut byte).await {
            Ok(0) | Err(_) => {}
            // Something after close_notify: nothing to learn here any more.
            Ok(_) => std::future::pending().await,
        }
    }
}

/// Serves one caller's connection from its first byte to its last.
pub async fn serve<S: Caller>(mut socket: S, caller: Arc<str>, gate: Arc<Gate>) {
    let start = Instant::now();
    let mut shown = String::new();
    let end = match gate.admit(&caller) {
        Err(refusal) => Err((None, refusal)),
        Ok(_slot) => {
            let mut reader = connect::Reader::new();
            match timeout(HEAD, read_head(&mut socket, &mut reader)).await {
                // A head that never ends, a caller that says nothing or goes: there is nobody to tell.
                Err(_) | Ok(None) => return,
                Ok(Some(Err(refusal))) => {
                    shown = reader.request_line();
                    Err((None, refusal))
                }
                Ok(Some(Ok(request))) => {
                    shown = request.target.to_string();
                    match connect_and_copy(socket, request, &caller, &gate, start).await {
                        Ok(()) => return,
                        Err((back, node, refusal)) => {
                            socket = back;
                            Err((node, refusal))
                        }
                    }
                }
            }
        }
    };
    let Err::<(), (Option<Name>, Refusal)>((node, refusal)) = end else { return };
    gate.refused(refusal.reason);
    let answer = refusal.response();
    let end = End::Refused(refusal);
    let (node, duration) = (node.as_ref().map(Name::as_str), start.elapsed());
    Audit { caller: &caller, node, target: &shown, bytes_in: 0, bytes_out: 0, duration, end: &end }.write();
    let _ = timeout(FAREWELL, farewell(&mut socket, &answer)).await;
}

/// Reads until the head has ended. None: the caller has gone.
async fn read_head(
    socket: &mut impl Caller,
    reader: &mut connect::Reader,
) -> Option<Result<Request, Refusal>> {
    loop {
        // Heads are small; nobody keeps a large buffer for slow ones.
        let mut buffer = [0; 2048];
        match socket.read(&mut buffer).await {
            Ok(0) | Err(_) => return None,
            Ok(read) => match reader.push(&buffer[..read]) {
                Progress::More => {}
                Progress::Done(request) => return Some(Ok(request)),
                Progress::Refused(refusal) => return Some(Err(refusal)),
            },
        }
    }
}

/// Connects, says 200, copies. Gives the socket back with a refusal.
async fn connect_and_copy<S: Caller>(
    mut socket: S,
    request: Request,
    caller: &str,
    gate: &Arc<Gate>,
    start: Instant,
) -> Result<(), (S, Option<Name>, Refusal)> {
    let mut late = BytesMut::new();
    let Request { target, early } = request;
    let room = connect::READ_LIMIT.saturating_sub(early.len());
    let mut node = None;
    let connected = tokio::select! {
        biased;
        connected = gate.connect(caller, &target, early.clone(), start, &mut node) => connected,
        () = goes_away(&mut socket, &mut late, room) => {
            let end = End::Reset("caller");
            let (node, target) = (node.as_ref().map(Name::as_str), &target.to_string());
            Audit { caller, node, target, bytes_in: 0, bytes_out: 0, duration: start.elapsed(), end: &end }.write();
            return Ok(());
        }
    };
    let (far, account) = match connected {
        Ok(connected) => connected,
        Err(refusal) => return Err((socket, node, refusal)),
    };
    let end = tokio::select! {
        end = copy(socket, far, [early, late.freeze()], &account) => end,
        () = gate.cut() => End::Reset("drain"),
    };
    if end == End::Reset("stalled") {
        gate.refused(Reason::Stalled);
    }
    let (node, target) = (node.as_ref().map(Name::as_str), &target.to_string());
    let (bytes_in, bytes_out) = account.bytes();
    Audit { caller, node, target, bytes_in, bytes_out, duration: start.elapsed(), end: &end }.write();
    Ok(())
}

/// Ready when the caller has gone away; collects what it sends meanwhile, up to `room` bytes.
async fn goes_away(socket: &mut impl Caller, late: &mut BytesMut, room: usize) {
    while late.len() < room {
        match socket.read_buf(&mut late.limit(room - late.len())).await {
            Ok(0) => return socket.hung_up().await,
            Err(_) => return,
            Ok(_) => {}
        }
    }
    std::future::pending().await
}

/// From the 200 to the end.
async fn copy(mut socket: impl Caller, far: Far, before: [Bytes; 2], account: &Account) -> End {
    let told = async {
        socket.write_all(connect::ESTABLISHED).await?;
        socket.flush().await
    };
    if told.await.is_err() {
        return End::Reset("caller");
    }
    let [early, late] = before;
    let copied = match far {
        // What came early has gone out with the request.
        Far::Session(mut pipe) => {
            account.sent(early.len() + late.len());
            match pipe.send.send(late).await {
                Ok(()) => relay::relay(socket, pipe, account).await,
                Err(lost) => {
                    socket.reset();
                    Err(lost.into())
                }
            }
        }
        Far::Direct(mut far) => {
            account.sent(early.len() + late.len());
            let sent = async {
                far.write_all(&early).await?;
                far.write_all(&late).await
            };
            match sent.await {
                Ok(()) => relay::splice(socket, far, account).await,
                Err(_) => {
                    socket.reset();
                    Err(Cut::Stream(Lost::Reset))
                }
            }
        }
    };
    end(copied)
}

/// How a stream ended whose copying ended so.
pub fn end(copied: Result<(), Cut>) -> End {
    match copied {
        Ok(()) => End::Finished,
        Err(Cut::Socket) => End::Reset("caller"),
        Err(Cut::Stream(Lost::Reset)) => End::Reset("node"),
        Err(Cut::Stream(Lost::Stalled)) => End::Reset("stalled"),
        Err(Cut::Stream(Lost::Connection)) => End::Reset("session lost"),
    }
}

/// Lets the caller read its answer: closing on bytes that nobody read would destroy it.
async fn farewell(socket: &mut impl Caller, answer: &[u8]) -> io::Result<()> {
    socket.write_all(answer).await?;
    socket.shutdown().await?;
    let mut read = 0;
    let mut buffer = [0; 2048];
    while read < FAREWELL_BYTES {
        match socket.read(&mut buffer).await? {
            0 => break,
            more => read += more,
        }
    }
    Ok(())
}
