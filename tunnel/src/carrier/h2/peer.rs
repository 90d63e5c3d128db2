//! The requests between replicas. The one that dialled asks: once for the news ([`Request::News`]), and for every
//! stream whose node is at the other end ([`Request::Forward`]).
//!
//! A forwarded stream names node and agent instance, and is served from the other end's own sessions or refused; there
//! is no request that could make it go further.

use super::{
    Incoming, MAX_HEADERS, Opener, PATIENCE, Path, answering_side, malformed, number, server_side, text,
};
use crate::{
    audit::Escaped,
    carrier::{Ended, Kind, WATCH_PEER, link::Heard, pipe::Pipe},
    hello::Id,
    refusal::{Reason, Refusal},
    target::{Name, Target},
};
use bytes::Bytes;
use h2::{RecvStream, server::SendResponse};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode, Uri};
use std::{future::pending, sync::Arc, time::Duration};
use tokio::io::{AsyncRead, AsyncWrite};

/// The version of what replicas say to each other.
const VERSION: &str = "etun-version";
const OUR_VERSION: u64 = 1;
/// Which replica is speaking.
const REPLICA: &str = "etun-replica";
/// Which run of it.
const RUN: &str = "etun-run";
/// Where it listens for others.
const PORT: &str = "etun-port";
/// The node whose agent is meant.
const NODE: &str = "etun-node";
/// The agent that is meant.
const INSTANCE: &str = "etun-instance";
/// Who called.
const CALLER: &str = "etun-caller";

/// The longest name of a caller, bytes; what is longer is cut.
const CALLER_LIMIT: usize = MAX_HEADERS as usize / 4;

/// A replica says who it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Introduction {
    /// Its name, as people know it.
    pub replica: Id,
    /// This run of it: two replicas with one name are told apart by it, and we know ourselves by it.
    pub run: Id,
    /// The port where it listens for others.
    pub port: u16,
}

impl Introduction {
    fn write(&self, headers: &mut HeaderMap) {
        headers.insert(HeaderName::from_static(VERSION), HeaderValue::from(OUR_VERSION));
        headers.insert(HeaderName::from_static(PORT), HeaderValue::from(self.port));
        for (name, id) in [(REPLICA, &self.replica), (RUN, &self.run)] {
            if let Ok(value) = HeaderValue::from_str(id.as_str()) {
                headers.insert(HeaderName::from_static(name), value);
            }
        }
    }

    fn read(headers: &HeaderMap) -> Option<Self> {
        if number(headers, VERSION) != Some(OUR_VERSION) {
            return None;
        }
        Some(Self { replica: id(headers, REPLICA)?, run: id(headers, RUN)?, port: port(headers)? })
    }
}

fn id(headers: &HeaderMap, name: &str) -> Option<Id> {
    Id::parse(text(headers, name)?).ok()
}

fn port(headers: &HeaderMap) -> Option<u16> {
    number(headers, PORT)?.try_into().ok()
}

/// A stream for another replica to open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    /// The node.
    pub node: Name,
    /// Which of its agents.
    pub instance: Id,
    /// What that is asked for.
    pub target: Target,
    /// Who called, escaped.
    pub caller: Arc<str>,
}

/// Makes the asking end of a connection between replicas. Await the second part for as long as it shall live.
///
/// # Errors
/// When the preface cannot be sent.
pub async fn asking_side<T>(
    io: T,
    heard: Arc<Heard>,
) -> Result<(Opener, impl Future<Output = Ended>), h2::Error>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    server_side(io, heard, WATCH_PEER, Kind::First).await
}

impl Opener {
    /// Asks a replica for its news: who it is, and a stream of [`crate::peers::news`].
    ///
    /// # Errors
    /// In words, when it does not answer as one of ours.
    pub async fn ask_for_news(&self, me: &Introduction) -> Result<(Introduction, Pipe), String> {
        let mut request = http::Request::new(());
        *request.method_mut() = Method::POST;
        *request.uri_mut() = Uri::from_static("https://replica/news");
        me.write(request.headers_mut());
        let (send, response) = self.request(request).await.map_err(|error| error.to_string())?;
        let response = response.await.map_err(|error| error.to_string())?;
        let who = Introduction::read(response.headers())
            .filter(|_| response.status() == StatusCode::OK)
            .ok_or("it does not answer as a replica of this version does")?;
        Ok((who, Pipe::new(send, response.into_body(), &self.path.stalls).0))
    }

    /// Has another replica open a stream; 200 means that the target's connection stands.
    ///
    /// # Errors
    /// The other replica's refusal, or `no-session` when the connection to it is gone.
    pub async fn forward(&self, order: &Order, patience: Duration, early: Bytes) -> Result<Pipe, Refusal> {
        let mut headers = HeaderMap::new();
        let caller = &order.caller[..order.caller.floor_char_boundary(CALLER_LIMIT)];
        for (name, value) in
            [(NODE, order.node.as_str()), (INSTANCE, order.instance.as_str()), (CALLER, caller)]
        {
            let value = HeaderValue::from_str(value).map_err(|_| Reason::Malformed)?;
            headers.insert(HeaderName::from_static(name), value);
        }
        let opened = self.connect(&order.target, headers, patience, early, gone, Refusal::from_peer).await;
        opened.map(|(pipe, _)| pipe)
    }
}

fn gone() -> Refusal {
    Refusal::new(
        Reason::NoSession,
        "the replica that has the node's session was lost while opening the stream",
    )
}

/// What another replica asks.
#[derive(Debug)]
pub enum Request {
    /// What there is to tell, from now on.
    News(News),
    /// Open a stream.
    Forward(Order, Incoming),
}

/// Another replica wants to be told.
#[derive(Debug)]
pub struct News {
    /// Who asks.
    pub who: Introduction,
    respond: SendResponse<Bytes>,
    recv: RecvStream,
    path: Arc<Path>,
}

impl News {
    /// Says who we are; what is to be told goes into the pipe.
    ///
    /// # Errors
    /// When the stream is no more.
    pub fn accept(mut self, me: &Introduction) -> Result<Pipe, h2::Error> {
        let mut response = Response::new(());
        me.write(response.headers_mut());
        let send = self.respond.send_response(response, false)?;
        Ok(Pipe::new(send, self.recv, &self.path.stalls).0)
    }
}

/// Makes the answering end of a connection between replicas. Await it for as long as it shall live: it calls `serve`
/// for every request.
///
/// # Errors
/// When the other end does not speak HTTP/2.
pub async fn answering<T>(
    io: T,
    heard: Arc<Heard>,
    mut serve: impl FnMut(Request),
) -> Result<impl Future<Output = Ended>, h2::Error>
where
    T: AsyncRead + AsyncWrite + Unpin,
{
    let serve = move |request, respond, path: &Arc<Path>| {
        if let Some(request) = understand(request, respond, path) {
            serve(request);
        }
    };
    let (_path, live) = answering_side(io, heard, WATCH_PEER, Kind::First, pending(), serve).await?;
    Ok(live)
}

/// Sorts a request; one that is none of ours is answered here.
fn understand(
    request: http::Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
    path: &Arc<Path>,
) -> Option<Request> {
    let (head, recv) = request.into_parts();
    let path = path.clone();
    match (head.method, head.uri.path()) {
        (Method::CONNECT, _) => {
            let authority = head.uri.authority().map_or("", |authority| authority.as_str());
            if let Some((order, patience)) = order(authority, &head.headers) {
                let target = order.target.clone();
                let incoming = Incoming { target, stream: 0, patience, respond, recv, path };
                return Some(Request::Forward(order, incoming));
            }
        }
        (Method::POST, "/news") => {
            if let Some(who) = Introduction::read(&head.headers) {
                return Some(Request::News(News { who, respond, recv, path }));
            }
        }
        _ => {}
    }
    let _ = respond.send_response(malformed(), true);
    None
}

fn order(authority: &str, headers: &HeaderMap) -> Option<(Order, Duration)> {
    let order = Order {
        node: Name::parse(text(headers, NODE)?.as_bytes()).ok()?,
        instance: id(headers, INSTANCE)?,
        target: Target::parse(authority.as_bytes()).ok()?,
        caller: Escaped::sentence(text(headers, CALLER)?).to_string().into(),
    };
    Some((order, Duration::from_millis(number(headers, PATIENCE)?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replica_of_another_version_is_none() {
        let me = Introduction { replica: Id::parse("a").unwrap(), run: Id::parse("b").unwrap(), port: 9443 };
        let mut headers = HeaderMap::new();
        me.write(&mut headers);
        assert_eq!(Introduction::read(&headers), Some(me));
        headers.insert(VERSION, HeaderValue::from(2));
        assert_eq!(Introduction::read(&headers), None);
    }

    #[test]
    fn an_order_lacks_nothing() {
        let all = [(NODE, "Node1"), (INSTANCE, "i"), (CALLER, "kube-apiserver"), (PATIENCE, "500")];
        for missing in [NODE, INSTANCE, CALLER, PATIENCE, ""] {
            let kept = all.iter().filter(|(name, _)| *name != missing);
            let headers: HeaderMap = kept
                .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
                .collect();
            match order("node1:10250", &headers) {
                Some((order, patience)) => {
                    assert_eq!(missing, "");
                    assert_eq!((order.node.as_str(), patience), ("node1", Duration::from_millis(500)));
                }
                None => assert_ne!(missing, ""),
            }
        }
    }
}
