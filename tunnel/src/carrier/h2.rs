//! Streams over one HTTP/2 connection in reversed roles: the agent dialled, the server is the HTTP/2 client.
//!
//! So only the server can open streams, which is what is wanted, and HTTP/2 sees to it. One CONNECT whose `:authority`
//! is the target is one TCP connection on the node; 200 says that it stands. Beside it there are requests that
//! carry nothing: [`Request::Continue`] moves a running stream here from another connection, [`Request::Extra`] asks
//! for one more connection, [`Request::Move`] tells the agent that this server is going away; [`Request::Replicas`]
//! says how many servers there are to choose from.
//!
//! Both ends watch the path: after some quiet they ping, and without any byte for long ([`Watch`]) the connection is
//! dropped. A dropped connection resets its streams; it never ends them.
//!
//! Between replicas it is the same wire with other requests: [`peer`].

pub mod peer;

use super::{
    Ended, Kind, STREAM_WINDOW, Watch,
    link::Heard,
    pipe::{Mover, Pipe, RESET},
    stall::Stalls,
};
use crate::{
    refusal::{Reason, Refusal},
    target::Target,
};
use bytes::Bytes;
use futures_util::{FutureExt, future::poll_fn};
use h2::{Ping, PingPong, RecvStream, SendStream, client, server};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode, Uri, Version};
use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    task::Poll,
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::Instant,
};

/// The number of a stream within its session: what a [`Request::Continue`] names.
const STREAM: &str = "etun-stream";
/// How long the agent may take to dial, milliseconds.
const PATIENCE: &str = "etun-patience-ms";
/// How many replicas there are.
const REPLICAS: &str = "etun-replicas";
/// A refusal's reason word.
const REASON: &str = "etun-reason";
/// A refusal's sentence.
const SENTENCE: &str = "etun-sentence";

/// DATA frames: large enough that their cost does not show, small enough that others get in between.
const FRAME: u32 = 64 << 10;
/// Bytes a stream may queue before they are on the wire.
const SEND_BUFFER: usize = 256 << 10;
/// Streams an agent lets stand on one connection, whatever the server's own bounds.
const MAX_STREAMS: u32 = 16 << 10;
/// Streams that were reset and of which something may still be on its way. Callers that give up are no attack here: h2's
/// own bounds, counted over a connection's whole life, would end a session after a thousand of them.
const RESETS: usize = 1024;
/// The names and words in our headers need a fraction of this.
const MAX_HEADERS: u32 = 8 << 10;

/// What the two ends of a connection know of it.
#[derive(Debug)]
pub struct Path {
    /// The streams that read from it.
    pub stalls: Arc<Stalls>,
    kind: Kind,
    round_trip_us: AtomicU32,
}

impl Path {
    fn new(kind: Kind) -> Arc<Self> {
        let window = STREAM_WINDOW * kind.windows();
        Arc::new(Self { stalls: Stalls::new(window), kind, round_trip_us: AtomicU32::new(0) })
    }

    /// The last round trip that was measured, if any was.
    pub fn round_trip(&self) -> Option<Duration> {
        let us = self.round_trip_us.load(Relaxed);
        (us > 0).then(|| Duration::from_micros(us.into()))
    }
}

/// The server's hand on a connection: opens streams.
#[derive(Clone)]
pub struct Opener {
    h2: client::SendRequest<Bytes>,
    /// The connection's state.
    pub path: Arc<Path>,
}

/// Makes the server's end of a connection. Await the second part for as long as it shall live; what it says is how it
/// ended.
///
/// # Errors
/// When the preface cannot be sent.
pub async fn server_side<T>(
    io: T,
    heard: Arc<Heard>,
    watch: Watch,
    kind: Kind,
) -> Result<(Opener, impl Future<Output = Ended>), h2::Error>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let (h2, mut connection) = client::Builder::new()
        .enable_push(false)
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(STREAM_WINDOW * kind.windows())
        .max_frame_size(FRAME)
        .max_header_list_size(MAX_HEADERS)
        .max_send_buffer_size(SEND_BUFFER)
        .header_table_size(0)
        .initial_max_send_streams(MAX_STREAMS as usize)
        .max_concurrent_reset_streams(RESETS)
        .max_local_error_reset_streams(None)
        .handshake::<T, Bytes>(io)
        .await?;
    let path = Path::new(kind);
    let pings = connection.ping_pong();
    let opener = Opener { h2, path: path.clone() };
    let live = async move {
        let window = AtomicU32::new(0);
        let ends = poll_fn(|cx| {
            if let Some(window) = new_window(&window, &path) {
                connection.set_target_window_size(window * path.kind.windows());
                let _ = connection.set_initial_window_size(window);
            }
            Pin::new(&mut connection).poll(cx)
        });
        watched(ends, pings, &heard, &path, &window, watch).await
    };
    Ok((opener, live))
}

/// What the server asks of an agent.
#[derive(Debug)]
pub enum Request {
    /// Dial this.
    Dial(Incoming),
    /// Go on with a stream of another connection here.
    Continue(Continue),
    /// Open one more connection for this session.
    Extra,
    /// This server is going away: open a session elsewhere.
    Move,
    /// There are this many replicas now.
    Replicas(usize),
    /// Nothing: the server wants to know whether the agent is there.
    There,
}

/// Makes the agent's end of a connection. Await it for as long as it shall live: it calls `serve` for every request.
/// Once `leave` is ready it takes no new streams and ends when the last one has.
///
/// # Errors
/// When the other end does not speak HTTP/2.
pub async fn agent_side<T>(
    io: T,
    heard: Arc<Heard>,
    watch: Watch,
    kind: Kind,
    leave: impl Future<Output = ()>,
    mut serve: impl FnMut(Request),
) -> Result<(Arc<Path>, impl Future<Output = Ended>), h2::Error>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    answering_side(io, heard, watch, kind, leave, move |request, respond, path| {
        if let Some(request) = understand(request, respond, path) {
            serve(request);
        }
    })
    .await
}

/// The end of a connection that does not open streams, whatever the requests mean.
async fn answering_side<T>(
    io: T,
    heard: Arc<Heard>,
    watch: Watch,
    kind: Kind,
    leave: impl Future<Output = ()>,
    mut serve: impl FnMut(http::Request<RecvStream>, server::SendResponse<Bytes>, &Arc<Path>),
) -> Result<(Arc<Path>, impl Future<Output = Ended>), h2::Error>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let mut connection = server::Builder::new()
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(STREAM_WINDOW * kind.windows())
        .max_frame_size(FRAME)
        .max_header_list_size(MAX_HEADERS)
        .max_send_buffer_size(SEND_BUFFER)
        .header_table_size(0)
        .max_concurrent_streams(MAX_STREAMS)
        .max_concurrent_reset_streams(RESETS)
        .max_local_error_reset_streams(None)
        .max_pending_accept_reset_streams(MAX_STREAMS as usize)
        .handshake::<T, Bytes>(io)
        .await?;
    let path = Path::new(kind);
    let pings = connection.ping_pong();
    let live = {
        let path = path.clone();
        async move {
            let window = AtomicU32::new(0);
            let mut leave = std::pin::pin!(leave.fuse());
            let ends = poll_fn(|cx| {
                if leave.as_mut().poll(cx).is_ready() {
                    connection.graceful_shutdown();
                }
                if let Some(window) = new_window(&window, &path) {
                    connection.set_target_window_size(window * path.kind.windows());
                    let _ = connection.set_initial_window_size(window);
                }
                loop {
                    match connection.poll_accept(cx) {
                        Poll::Ready(Some(Ok((request, respond)))) => {
                            serve(request, respond, &path);
                        }
                        Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(error)),
                        Poll::Ready(None) => return Poll::Ready(Ok(())),
                        Poll::Pending => return Poll::Pending,
                    }
                }
            });
            watched(ends, pings, &heard, &path, &window, watch).await
        }
    };
    Ok((path, live))
}

/// The window that the last measured round trip asks for, once for every change.
fn new_window(wanted: &AtomicU32, path: &Path) -> Option<u32> {
    let window = wanted.swap(0, Relaxed);
    if window == 0 {
        return None;
    }
    path.stalls.set_window(window * path.kind.windows());
    Some(window)
}

/// Lets a connection live until it ends by itself or nothing is heard of it any more.
async fn watched(
    ends: impl Future<Output = Result<(), h2::Error>>,
    pings: Option<PingPong>,
    heard: &Heard,
    path: &Path,
    window: &AtomicU32,
    watch: Watch,
) -> Ended {
    let pings = async {
        match pings {
            Some(pings) => ask(pings, heard, path, window, watch).await,
            None => std::future::pending().await,
        }
    };
    // However this ends, dropped half-way too: nobody waits for a reader of a connection that is gone.
    let _lost = Lost(&path.stalls);
    tokio::select! {
        biased;
        result = ends => match result {
            Ok(()) => Ended::Closed,
            Err(error) => why_broken(&error),
        },
        () = pings => Ended::Silent(watch.dead),
        () = path.stalls.watch() => Ended::Silent(watch.dead),
    }
}

struct Lost<'a>(&'a Stalls);

impl Drop for Lost<'_> {
    fn drop(&mut self) {
        self.0.lost();
    }
}

fn why_broken(error: &h2::Error) -> Ended {
    match error.get_io() {
        Some(io) if io.kind() == io::ErrorKind::UnexpectedEof => {
            Ended::Broken("cut without a goodbye".into())
        }
        _ => Ended::Broken(error.to_string()),
    }
}

/// Pings: once at the beginning, to know the round trip, then whenever it has been quiet. Returns when the path is
/// dead.
async fn ask(mut pings: PingPong, heard: &Heard, path: &Path, window: &AtomicU32, watch: Watch) {
    let quiet = watch.quiet.mul_f32(0.8 + 0.4 * fastrand::f32());
    let mut asked = pings.send_ping(Ping::opaque()).is_ok().then(Instant::now);
    let mut size = STREAM_WINDOW;
    loop {
        let wake = heard.last() + if asked.is_some() { watch.dead } else { quiet };
        let pong = poll_fn(|cx| if asked.is_some() { pings.poll_pong(cx) } else { Poll::Pending });
        tokio::select! {
            pong = pong => {
                let Some(at) = asked.take() else { continue };
                if pong.is_err() {
                    // The connection is ending; it says how itself.
                    std::future::pending::<()>().await;
                }
                let round_trip = at.elapsed();
                path.round_trip_us.store(u32::try_from(round_trip.as_micros()).unwrap_or(u32::MAX).max(1), Relaxed);
                // Windows only grow: taking room back would stop streams that stand.
                if path.kind.window(round_trip) > size {
                    size = path.kind.window(round_trip);
                    window.store(size, Relaxed);
                }
            }
            () = tokio::time::sleep_until(wake) => {
                let silent = heard.last().elapsed();
                if silent >= watch.dead {
                    return;
                }
                if silent >= quiet && asked.is_none() {
                    asked = pings.send_ping(Ping::opaque()).is_ok().then(Instant::now);
                }
            }
        }
    }
}

impl Opener {
    /// Opens a stream to `target` through the agent; 200 means that the target's connection stands. `early` rides
    /// along. `patience` is how long the agent may try. Dropping the future tells the agent to give up.
    ///
    /// # Errors
    /// The agent's refusal, or `no-session` when the connection is gone.
    pub async fn open(
        &self,
        target: &Target,
        stream: u64,
        patience: Duration,
        early: Bytes,
    ) -> Result<(Pipe, Mover), Refusal> {
        let mut headers = HeaderMap::new();
        headers.insert(HeaderName::from_static(STREAM), HeaderValue::from(stream));
        self.connect(target, headers, patience, early, gone, Refusal::from_agent).await
    }

    /// A CONNECT with these headers. `refused` makes a refusal of the word and the sentence in the answer.
    async fn connect(
        &self,
        target: &Target,
        mut headers: HeaderMap,
        patience: Duration,
        early: Bytes,
        gone: fn() -> Refusal,
        refused: fn(&str, &str) -> Refusal,
    ) -> Result<(Pipe, Mover), Refusal> {
        let mut request = http::Request::new(());
        *request.method_mut() = Method::CONNECT;
        *request.uri_mut() = authority(target).ok_or(Reason::Malformed)?;
        let patience = u64::try_from(patience.as_millis()).unwrap_or(u64::MAX);
        headers.insert(HeaderName::from_static(PATIENCE), HeaderValue::from(patience));
        *request.headers_mut() = headers;
        let (mut send, response) = self.request(request).await.map_err(|_| gone())?;
        if !early.is_empty() {
            send.send_data(early, false).map_err(|_| gone())?;
        }
        let response = response.await.map_err(|_| gone())?;
        if response.status() != StatusCode::OK {
            let text = |name| text(response.headers(), name).unwrap_or_default();
            return Err(refused(text(REASON), text(SENTENCE)));
        }
        Ok(Pipe::new(send, response.into_body(), &self.path.stalls))
    }

    /// Moves a running stream of the session to this connection.
    ///
    /// # Errors
    /// When it cannot be moved; it then goes on where it is.
    pub async fn go_on(&self, stream: u64, mover: &Mover) -> Result<(), h2::Error> {
        let mut request = http::Request::new(());
        *request.method_mut() = Method::POST;
        *request.uri_mut() = Uri::from_static("https://agent/continue");
        request.headers_mut().insert(HeaderName::from_static(STREAM), HeaderValue::from(stream));
        let (send, response) = self.request(request).await?;
        let response = response.await?;
        if response.status() != StatusCode::OK {
            return Err(h2::Reason::REFUSED_STREAM.into());
        }
        mover.go_on(send, response.into_body(), &self.path.stalls);
        Ok(())
    }

    /// Asks the agent for one more connection.
    ///
    /// # Errors
    /// When the connection is gone.
    pub async fn ask_for_extra(&self) -> Result<(), h2::Error> {
        self.tell("https://agent/extra").await
    }

    /// Tells the agent that this server is going away.
    ///
    /// # Errors
    /// When the connection is gone.
    pub async fn ask_to_move(&self) -> Result<(), h2::Error> {
        self.tell("https://agent/move").await
    }

    /// Whether the agent answers.
    ///
    /// # Errors
    /// When the connection is gone.
    pub async fn is_there(&self) -> Result<(), h2::Error> {
        self.tell("https://agent/there").await
    }

    /// Tells the agent how many replicas there are.
    ///
    /// # Errors
    /// When the connection is gone.
    pub async fn tell_replicas(&self, replicas: usize) -> Result<(), h2::Error> {
        let mut request = http::Request::new(());
        request.headers_mut().insert(HeaderName::from_static(REPLICAS), HeaderValue::from(replicas));
        self.post("https://agent/replicas", request).await
    }

    async fn tell(&self, uri: &'static str) -> Result<(), h2::Error> {
        self.post(uri, http::Request::new(())).await
    }

    async fn post(&self, uri: &'static str, mut request: http::Request<()>) -> Result<(), h2::Error> {
        *request.method_mut() = Method::POST;
        *request.uri_mut() = Uri::from_static(uri);
        let (_send, response) = self.request(request).await?;
        response.await.map(|_| ())
    }

    async fn request(
        &self,
        mut request: http::Request<()>,
    ) -> Result<(SendStream<Bytes>, client::ResponseFuture), h2::Error> {
        *request.version_mut() = Version::HTTP_2;
        let mut h2 = self.h2.clone().ready().await?;
        let (response, send) = h2.send_request(request, false)?;
        Ok((send, response))
    }
}

fn gone() -> Refusal {
    Refusal::new(Reason::NoSession, "the agent's connection was lost while opening the stream")
}

fn authority(target: &Target) -> Option<Uri> {
    let mut parts = http::uri::Parts::default();
    parts.authority = Some(target.to_string().parse().ok()?);
    Uri::from_parts(parts).ok()
}

/// A header's value, where it is text.
fn text<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// A header's value, where it is a number.
fn number(headers: &HeaderMap, name: &str) -> Option<u64> {
    text(headers, name)?.parse().ok()
}

/// A stream that the server wants to a target on this node.
#[derive(Debug)]
pub struct Incoming {
    /// Where to.
    pub target: Target,
    /// Its number within the session.
    pub stream: u64,
    /// How long to try at most.
    pub patience: Duration,
    respond: server::SendResponse<Bytes>,
    recv: RecvStream,
    path: Arc<Path>,
}

impl Incoming {
    /// Ready when the server has given up waiting.
    pub async fn given_up(&mut self) {
        let _ = poll_fn(|cx| self.respond.poll_reset(cx)).await;
    }

    /// Says 200: the target's connection stands.
    ///
    /// # Errors
    /// When the stream is no more.
    pub fn accept(mut self) -> Result<(Pipe, Mover), h2::Error> {
        let send = self.respond.send_response(Response::new(()), false)?;
        Ok(Pipe::new(send, self.recv, &self.path.stalls))
    }

    /// Says why not.
    pub fn refuse(mut self, refusal: &Refusal) {
        let mut response = Response::new(());
        *response.status_mut() =
            StatusCode::from_u16(refusal.reason.code()).unwrap_or(StatusCode::BAD_GATEWAY);
        response
            .headers_mut()
            .insert(HeaderName::from_static(REASON), HeaderValue::from_static(refusal.reason.word()));
        if let Ok(sentence) = HeaderValue::from_str(refusal.sentence()) {
            response.headers_mut().insert(HeaderName::from_static(SENTENCE), sentence);
        }
        let _ = self.respond.send_response(response, true);
    }
}

/// A stream of another connection of the session that is to go on in this one.
#[derive(Debug)]
pub struct Continue {
    /// Its number within the session.
    pub stream: u64,
    respond: server::SendResponse<Bytes>,
    recv: RecvStream,
    path: Arc<Path>,
}

impl Continue {
    /// Goes on here with the stream of this mover.
    pub fn accept(mut self, mover: &Mover) {
        if let Ok(send) = self.respond.send_response(Response::new(()), false) {
            mover.go_on(send, self.recv, &self.path.stalls);
        }
    }

    /// There is no such stream any more.
    pub fn refuse(mut self) {
        self.respond.send_reset(RESET);
    }
}

/// Sorts a request; one that is none of ours is answered here.
fn understand(
    request: http::Request<RecvStream>,
    mut respond: server::SendResponse<Bytes>,
    path: &Arc<Path>,
) -> Option<Request> {
    let (head, recv) = request.into_parts();
    let number = |name| number(&head.headers, name);
    let path = path.clone();
    let understood = match (head.method, head.uri.path()) {
        (Method::CONNECT, _) => {
            let authority = head.uri.authority().map_or("", |authority| authority.as_str());
            match (Target::parse(authority.as_bytes()), number(STREAM), number(PATIENCE)) {
                (Ok(target), Some(stream), Some(ms)) => {
                    let patience = Duration::from_millis(ms);
                    return Some(Request::Dial(Incoming { target, stream, patience, respond, recv, path }));
                }
                _ => None,
            }
        }
        (Method::POST, "/continue") => match number(STREAM) {
            Some(stream) => return Some(Request::Continue(Continue { stream, respond, recv, path })),
            None => None,
        },
        (Method::POST, "/extra") => Some(Request::Extra),
        (Method::POST, "/move") => Some(Request::Move),
        (Method::POST, "/replicas") => {
            number(REPLICAS).and_then(|replicas| usize::try_from(replicas).ok()).map(Request::Replicas)
        }
        (Method::POST, "/there") => Some(Request::There),
        _ => None,
    };
    let response = if understood.is_some() { Response::new(()) } else { malformed() };
    let _ = respond.send_response(response, true);
    understood
}

/// The answer to a request that is none of ours.
fn malformed() -> Response<()> {
    let mut response = Response::new(());
    *response.status_mut() = StatusCode::BAD_REQUEST;
    let reason = HeaderValue::from_static(Reason::Malformed.word());
    response.headers_mut().insert(HeaderName::from_static(REASON), reason);
    response
}
