//! Where callers come in: one module per kind of listener, all in front of one [`gate::Gate`].
//!
//! What they share: a handshake ([`shake_hands`]), a head that is read within a time ([`read_head`]), then
//! [`connect_and_copy`]: let the gate connect or refuse, answer only then, copy until the end, write the audit line. A
//! caller that goes away meanwhile takes its dial with it. [`serve`] is all of it for a plain CONNECT.

pub mod answer;
pub mod egress;
pub mod gate;
pub mod passthrough;
pub mod proxy;

use crate::{
    audit::{Audit, End},
    carrier::pipe::Lost,
    connect::{self, Progress, Request},
    listen::Handshake,
    refusal::{Reason, Refusal},
    relay::{self, Cut, Meter, Side, Socket},
    target::{Name, Target},
    tls::ServerTls,
};
use bytes::{BufMut, Bytes, BytesMut};
use gate::{Account, Far, Gate};
use socket2::{SockRef, TcpKeepalive};
use std::{future::Future, io, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UnixStream},
    time::{Instant, timeout},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

/// A head that has not ended by then is closed.
const HEAD: Duration = Duration::from_secs(10);

/// A caller's machine that has vanished is noticed some time after this.
const KEEPALIVE: Duration = Duration::from_secs(60);

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
        while !relay::hung_up(self) {
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

/// What a caller wants, as far as it concerns the connection to the target.
struct Wish {
    /// Where to.
    target: Target,
    /// Whether only nodes will do, and not a `--direct-cidr`.
    only_nodes: bool,
    /// What has come for the target, and may ride with the request for it.
    early: Bytes,
    /// What the caller hears once the target's connection stands.
    told: &'static [u8],
    /// What the target hears first.
    first: Bytes,
}

/// What is known of a caller's connection, for the audit line.
struct Visit<'a> {
    gate: &'a Gate,
    caller: &'a Arc<str>,
    start: Instant,
}

impl Visit<'_> {
    /// Writes the audit line.
    fn ended(&self, node: Option<&Name>, target: &str, (bytes_in, bytes_out): (u64, u64), end: &End) {
        let (caller, node, duration) = (self.caller, node.map(Name::as_str), self.start.elapsed());
        Audit { caller, node, target, bytes_in, bytes_out, duration, end }.write();
    }

    /// Counts a refusal and writes the audit line; gives the answer.
    fn refused(&self, node: Option<&Name>, target: &str, refusal: Refusal) -> Vec<u8> {
        self.gate.refused(refusal.reason);
        let answer = refusal.response();
        self.ended(node, target, (0, 0), &End::Refused(refusal));
        answer
    }

    /// Serves one CONNECT. Gives the socket back with the answer to a refusal.
    async fn served<S: Caller>(&self, mut socket: S) -> Option<(S, Vec<u8>)> {
        let _slot = match self.gate.admit(self.caller) {
            Ok(slot) => slot,
            Err(refusal) => return Some((socket, self.refused(None, "", refusal))),
        };
        let mut reader = connect::Reader::new();
        let head = read_head(&mut socket, |bytes| match reader.push(bytes) {
            Progress::More => Ok(None),
            Progress::Done(request) => Ok(Some(request)),
            Progress::Refused(refusal) => Err(refusal),
        });
        let head = timeout(HEAD, head).await;
        match head {
            // A head that never ends, a caller that says nothing or goes: there is nobody to tell.
            Err(_) | Ok(None) => None,
            Ok(Some(Err(refusal))) => Some((socket, self.refused(None, &reader.request_line(), refusal))),
            Ok(Some(Ok(Request { target, early }))) => {
                // A stream may be long; it keeps no head.
                drop(reader);
                let (told, first) = (connect::ESTABLISHED, Bytes::new());
                let wish = Wish { target, only_nodes: false, early, told, first };
                connect_and_copy(socket, wish, self).await
            }
        }
    }
}

/// The server's part of a TLS handshake, one of those in flight.
///
/// # Errors
/// What [`crate::tls::explain`] puts into words.
async fn shake_hands(
    socket: TcpStream,
    tls: &ServerTls,
    handshake: &Handshake,
) -> io::Result<TlsStream<TcpStream>> {
    tune(&socket)?;
    handshake.talks(&socket).await?;
    TlsAcceptor::from(tls.get().config.clone()).accept(socket).await
}

/// A caller's socket as we like it.
fn tune(socket: &TcpStream) -> io::Result<()> {
    socket.set_nodelay(true)?;
    let keepalive = TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE / 4);
    SockRef::from(socket).set_tcp_keepalive(&keepalive)
}

/// Serves one caller's connection from its first byte to its last.
pub async fn serve<S: Caller>(socket: S, caller: Arc<str>, gate: Arc<Gate>) {
    let visit = Visit { gate: &gate, caller: &caller, start: Instant::now() };
    if let Some((mut socket, answer)) = visit.served(socket).await {
        let _ = timeout(FAREWELL, farewell(&mut socket, &answer)).await;
    }
}

/// Reads until `push` has made something of what came, or refuses it. None: the caller has gone.
async fn read_head<T>(
    socket: &mut (impl AsyncRead + Unpin),
    mut push: impl FnMut(&[u8]) -> Result<Option<T>, Refusal>,
) -> Option<Result<T, Refusal>> {
    loop {
        // Heads are small; nobody keeps a large buffer for slow ones.
        let mut buffer = [0; 2048];
        match socket.read(&mut buffer).await {
            Ok(0) | Err(_) => return None,
            Ok(read) => match push(&buffer[..read]).transpose() {
                None => {}
                decided => return decided,
            },
        }
    }
}

/// Connects, tells the caller, copies. Gives the socket back with the answer to a refusal.
async fn connect_and_copy<S: Caller>(mut socket: S, wish: Wish, visit: &Visit<'_>) -> Option<(S, Vec<u8>)> {
    let mut late = BytesMut::new();
    let Wish { target, only_nodes, early, told, first } = wish;
    let shown = target.to_string();
    let room = connect::READ_LIMIT.saturating_sub(early.len());
    let mut node = None;
    let connecting = async {
        if only_nodes {
            return visit
                .gate
                .connect_to_node(visit.caller, &target, early.clone(), visit.start, &mut node)
                .await;
        }
        visit.gate.connect(visit.caller, &target, early.clone(), visit.start, &mut node).await
    };
    let connected = tokio::select! {
        biased;
        connected = connecting => connected,
        () = goes_away(&mut socket, &mut late, room) => {
            visit.ended(node.as_ref(), &shown, (0, 0), &End::Reset("caller"));
            return None;
        }
    };
    let (far, account) = match connected {
        Ok(connected) => connected,
        Err(refusal) => return Some((socket, visit.refused(node.as_ref(), &shown, refusal))),
    };
    let end = tokio::select! {
        end = copy(socket, far, told, [early, first, late.freeze()], &account) => end,
        () = visit.gate.cut() => End::Reset("drain"),
    };
    if end == End::Reset("stalled") {
        visit.gate.refused(Reason::Stalled);
    }
    visit.ended(node.as_ref(), &shown, account.bytes(), &end);
    None
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
async fn copy(
    mut socket: impl Caller,
    far: Far,
    told: &[u8],
    [early, first, late]: [Bytes; 3],
    account: &Account,
) -> End {
    let tell = async {
        socket.write_all(told).await?;
        socket.flush().await
    };
    if tell.await.is_err() {
        return End::Reset("caller");
    }
    account.sent(early.len() + first.len() + late.len());
    let copied = match far {
        // What came early has gone out with the request.
        Far::Session(mut pipe) => {
            let sent = async {
                pipe.send.send(first).await?;
                pipe.send.send(late).await
            };
            match sent.await {
                Ok(()) => relay::relay(socket, Side::Caller, pipe, account).await,
                Err(lost) => {
                    socket.reset();
                    Err(lost.into())
                }
            }
        }
        Far::Direct(mut far) => {
            let sent = async {
                far.write_all(&early).await?;
                far.write_all(&first).await?;
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
        Err(Cut::Socket | Cut::Closed) => End::Reset("caller"),
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
