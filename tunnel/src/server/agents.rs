//! The listener that agents dial: handshake, certificate, hello, and the session that follows.
//!
//! Everything up to the answer to the hello is one handshake of those in flight, within ten seconds. A connection ends
//! with its certificate, with its node, or when the path is dead; a session ends with its first connection.

use crate::{
    carrier::{Kind, WATCH_SERVER, h2, link},
    hello::{self, Answer, Hello, NotAHello},
    listen::{HANDSHAKE, Handshake, Handshakes},
    metrics::Metrics,
    nodes::Current,
    peers::Peers,
    sessions::{self, Admitted, Sessions, session::Session},
    target::Name,
    tls::{self, ServerTls, identity::Leaf},
};
use std::{future::Future, io, net::SocketAddr, sync::Arc};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

type Stream = TlsStream<link::Link<TcpStream>>;

/// What it takes to let agents in.
pub struct Agents {
    /// Where their sessions are kept.
    pub sessions: Arc<Sessions>,
    /// The nodes there are.
    pub nodes: Current,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// Who we are, and the other replicas.
    pub peers: Arc<Peers>,
}

/// An agent that has been let in.
struct Guest {
    stream: Stream,
    remote: SocketAddr,
    node: Name,
    not_after: i64,
    hello: Hello,
    admitted: Admitted,
}

impl Agents {
    /// Serves the listener.
    pub async fn listen(
        self: &Arc<Self>,
        listener: &TcpListener,
        handshakes: &Arc<Handshakes>,
        tls: &Arc<ServerTls>,
    ) {
        let greet = |socket, remote, handshake| {
            let (agents, tls) = (self.clone(), tls.clone());
            async move {
                match timeout(HANDSHAKE, agents.greet(socket, remote, &tls, handshake)).await {
                    Ok(Ok(Some(guest))) => agents.host(guest).await,
                    Ok(Ok(None)) => {}
                    Ok(Err(error)) => log::info!("agent at {remote}: {}", tls::explain(&error, "the agent")),
                    Err(_) => log::info!("agent at {remote}: no hello within {} s", HANDSHAKE.as_secs()),
                }
            }
        };
        handshakes.take_in(listener, greet).await;
    }

    /// From the first byte to the answer. None: turned away, and told so.
    async fn greet(
        &self,
        socket: TcpStream,
        remote: SocketAddr,
        tls: &ServerTls,
        handshake: Handshake,
    ) -> io::Result<Option<Guest>> {
        link::tune(&socket);
        handshake.talks(&socket).await?;
        let mut stream = TlsAcceptor::from(tls.get().config.clone())
            .accept_with(link::Link::new(socket), |connection| connection.set_buffer_limit(Some(tls::BUFFER)))
            .await?;
        if stream.get_ref().1.alpn_protocol() != Some(tls::ALPN) {
            return Err(io::Error::other("no agent of ours: it does not speak etun/1"));
        }
        let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
        let leaf = chain.first().map_or(Err(tls::identity::NotThatOne::Unreadable), |leaf| Leaf::parse(leaf));
        let who = leaf.and_then(|leaf| Ok((leaf.node()?, leaf.not_after)));
        let hello = read_hello(&mut stream).await?;
        let decided = match (who, hello) {
            (Err(why), _) => {
                log::warn!("agent at {remote}: {why}");
                Err((hello::TurnedAway::UnknownNode, why.to_string()))
            }
            (_, Err(NotAHello::Version)) => Err((hello::TurnedAway::Version, NotAHello::Version.to_string())),
            (_, Err(why)) => Err((hello::TurnedAway::Malformed, why.to_string())),
            (Ok((node, not_after)), Ok(hello)) => {
                let nodes = self.nodes.borrow().clone();
                match self.sessions.admit(&node, &hello, &nodes).await {
                    Ok(admitted) => Ok((node, not_after, hello, admitted)),
                    Err((why, sentence)) => {
                        // An agent that looks for another replica comes out here again and again.
                        let usual = why == hello::TurnedAway::Duplicate;
                        log::log!(
                            if usual { log::Level::Debug } else { log::Level::Info },
                            "node {node} at {remote}: {} turned away: {sentence}",
                            sessions::shown(&hello)
                        );
                        Err((why, sentence))
                    }
                }
            }
        };
        let replica = self.peers.me.replica.clone();
        match decided {
            Ok((node, not_after, hello, admitted)) => {
                let replicas = *self.peers.replicas().borrow();
                stream.write_all(&Answer::Welcome { replica, replicas }.encode()).await?;
                stream.flush().await?;
                Ok(Some(Guest { stream, remote, node, not_after, hello, admitted }))
            }
            Err((why, sentence)) => {
                log::debug!("agent at {remote} turned away: {}: {sentence}", why.word());
                stream.write_all(&Answer::TurnedAway { replica, why, sentence }.encode()).await?;
                stream.shutdown().await?;
                Ok(None)
            }
        }
    }

    /// From the answer to the end.
    async fn host(&self, guest: Guest) {
        let Guest { stream, remote, node, not_after, hello, admitted } = guest;
        let heard = stream.get_ref().0.heard();
        let kind = if matches!(admitted, Admitted::Extra(_)) { Kind::Extra } else { Kind::First };
        let (opener, live) = match h2::server_side(stream, heard, WATCH_SERVER, kind).await {
            Ok(connection) => connection,
            Err(error) => return log::info!("node {node} at {remote}: {error}"),
        };
        match admitted {
            Admitted::Session => {
                let session = Session::new(node, &hello, remote, opener);
                self.sessions.enter(&session);
                // The list may have changed since it was asked.
                self.sessions.keep_if_admitted(&session, &self.nodes.borrow().clone());
                self.metrics.sessions(self.sessions.len());
                let why = until(live, &session, not_after).await;
                self.sessions.leave(&session);
                self.metrics.sessions(self.sessions.len());
                session.close("its first connection has ended");
                log::info!("node {}: session {} ended: {why}", session.node, session.id);
            }
            Admitted::Extra(session) => {
                let Some(connection) = session.join(opener) else {
                    return log::info!("node {node} at {remote}: one connection too many");
                };
                let why = tokio::select! {
                    why = until(live, &session, not_after) => why,
                    () = session.idle(&connection) => "not needed any more".into(),
                };
                session.part(&connection);
                log::debug!("node {node}: extra connection ended: {why}");
            }
            // It asks nothing; it leaves when it has seen enough.
            Admitted::Probe => {
                let _ = timeout(HANDSHAKE, live).await;
            }
        }
    }
}

/// Lets a connection live until it, its session or its certificate ends.
async fn until(
    live: impl Future<Output = crate::carrier::Ended>,
    session: &Session,
    not_after: i64,
) -> std::borrow::Cow<'static, str> {
    tokio::select! {
        ended = live => ended.to_string().into(),
        why = session.closing() => why.into(),
        () = tls::expired(not_after) => "its certificate has expired".into(),
    }
}

/// Reads the one frame an agent sends before HTTP/2.
async fn read_hello(stream: &mut Stream) -> io::Result<Result<Hello, NotAHello>> {
    let mut header = [0; hello::HEADER];
    stream.read_exact(&mut header).await?;
    let length = match hello::body_length(header) {
        Ok(length) => length,
        Err(why) => return Ok(Err(why)),
    };
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await?;
    Ok(Hello::decode(&body))
}
