//! The listener that other replicas dial: tells them which agents are here, and opens streams to these for them.
//!
//! A forwarded stream ends here: it goes to a session of this replica or is refused, so none goes in circles. It counts
//! against the same caps as a caller of our own with that name, and leaves an audit line that says by which replica it
//! came.

use super::{Peers, news::Line};
use crate::{
    audit::{Audit, End},
    carrier::{
        Ended,
        h2::{
            Incoming,
            peer::{self, News, Order, Request},
        },
        link,
        pipe::Pipe,
    },
    frontend::{self, gate::Gate},
    hello::Id,
    listen::{HANDSHAKE, Handshake, Handshakes},
    refusal::{Reason, Refusal},
    relay,
    tls::{self, ServerTls, identity::Leaf},
};
use bytes::Bytes;
use futures_util::future::poll_fn;
use std::{
    io,
    net::SocketAddr,
    sync::{Arc, OnceLock},
    time::Duration,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::mpsc,
    time::{Instant, sleep, timeout},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

/// Changes are collected for so long, so that a crowd of agents is told in a few lines.
const COLLECT: Duration = Duration::from_millis(10);

/// Bytes of news that are sent at once.
const CHUNK: usize = 32 << 10;

/// What it takes to answer other replicas.
pub struct Listen {
    /// Who is connected.
    pub peers: Arc<Peers>,
    /// Our sessions, and the caps.
    pub gate: Arc<Gate>,
    /// Names of which a replica's certificate must carry one, beside those that ours has now.
    pub names: Arc<[String]>,
    /// Where to say who should be dialled back.
    pub back: mpsc::Sender<SocketAddr>,
}

impl Listen {
    /// Serves the listener.
    pub async fn listen(
        self: Arc<Self>,
        listener: &TcpListener,
        handshakes: &Arc<Handshakes>,
        tls: &Arc<ServerTls>,
    ) {
        let greet = |socket, remote, handshake| {
            let (listen, tls) = (self.clone(), tls.clone());
            async move {
                match timeout(HANDSHAKE, listen.greet(socket, &tls, handshake)).await {
                    Ok(Ok((stream, not_after))) => {
                        let ended = listen.serve(stream, remote, not_after).await;
                        log::debug!("the connection from the replica at {remote} has ended: {ended}");
                    }
                    Ok(Err(error)) => {
                        log::warn!("replica at {remote}: {}", tls::explain(&error, "the replica"))
                    }
                    Err(_) => {
                        log::warn!("replica at {remote}: no handshake within {} s", HANDSHAKE.as_secs())
                    }
                }
            }
        };
        handshakes.take_in(listener, greet).await;
    }

    async fn greet(
        &self,
        socket: TcpStream,
        tls: &ServerTls,
        handshake: Handshake,
    ) -> io::Result<(TlsStream<link::Link<TcpStream>>, i64)> {
        link::tune(&socket);
        handshake.talks(&socket).await?;
        let stream = TlsAcceptor::from(tls.get().config.clone())
            .accept_with(link::Link::new(socket), |connection| connection.set_buffer_limit(Some(tls::BUFFER)))
            .await?;
        let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
        let leaf = chain.first().map_or(Err(tls::identity::NotThatOne::Unreadable), |leaf| Leaf::parse(leaf));
        let own = &tls.get().leaf.alternative_names;
        let is_one = |leaf: &Leaf| leaf.replica(&self.names).or_else(|_| leaf.replica(own));
        let leaf = leaf.and_then(|leaf| is_one(&leaf).map(|()| leaf.not_after));
        let not_after = leaf.map_err(io::Error::other)?;
        Ok((stream, not_after))
    }

    async fn serve(
        self: &Arc<Self>,
        stream: TlsStream<link::Link<TcpStream>>,
        remote: SocketAddr,
        not_after: i64,
    ) -> Ended {
        let heard = stream.get_ref().0.heard();
        let who: Arc<OnceLock<Id>> = Arc::default();
        let serve = {
            let (listen, who) = (self.clone(), who.clone());
            move |request| match request {
                Request::News(news) => {
                    let _ = who.set(news.who.replica.clone());
                    tokio::spawn(listen.clone().tell(news, remote));
                }
                Request::Forward(order, incoming) => match who.get() {
                    Some(via) => drop(tokio::spawn(listen.clone().forward(order, incoming, via.clone()))),
                    None => incoming.refuse(&Reason::Malformed.into()),
                },
            }
        };
        match peer::answering(stream, heard, serve).await {
            Ok(live) => tokio::select! {
                ended = live => ended,
                () = tls::expired(not_after) => Ended::Broken("its certificate has expired".into()),
            },
            Err(error) => Ended::Broken(error.to_string()),
        }
    }

    /// Tells a replica what is here, from now on.
    async fn tell(self: Arc<Self>, news: News, remote: SocketAddr) {
        let me = &self.peers.me;
        if news.who.run != me.run && !self.peers.is_connected(&news.who.run) && news.who.port != 0 {
            let _ = self.back.try_send(SocketAddr::new(remote.ip(), news.who.port));
        }
        let Ok(mut pipe) = news.accept(me) else { return };
        let sessions = &self.gate.sessions;
        let mut changes = sessions.changes();
        let (mut told, mut draining_told) = (None, false);
        loop {
            changes.mark_unchanged();
            let (version, mut lines) = sessions.news(told);
            told = Some(version);
            if sessions.is_draining() && !draining_told {
                draining_told = true;
                lines.push(Line::Draining);
            }
            if send(&mut pipe, &lines).await.is_err() {
                return;
            }
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return },
                _ = poll_fn(|cx| pipe.send.poll_lost(cx)) => return,
            }
            sleep(COLLECT).await;
        }
    }

    /// Opens a stream for another replica, and copies until its end.
    async fn forward(self: Arc<Self>, order: Order, mut incoming: Incoming, via: Id) {
        let start = Instant::now();
        let deadline = start + incoming.patience.min(self.gate.limits.dial_timeout);
        let opened = async {
            let slot = self.gate.admit(&order.caller)?;
            let session = self.gate.sessions.of_instance(order.node.as_str(), &order.instance);
            let session = session.ok_or_else(|| {
                Refusal::new(Reason::NoSession, format_args!("the session of {} has just ended", order.node))
            })?;
            let opened = self.gate.open(&session, &order.target, Bytes::new(), deadline);
            Ok((opened.await?, slot))
        };
        let opened = tokio::select! {
            opened = opened => opened,
            () = incoming.given_up() => return self.audit(&order, &via, (0, 0), start, &End::Reset("caller")),
        };
        match opened {
            Err(refusal) => {
                incoming.refuse(&refusal);
                self.audit(&order, &via, (0, 0), start, &End::Refused(refusal));
            }
            Ok(((pipe, account), _slot)) => {
                let Ok((caller, _)) = incoming.accept() else {
                    return self.audit(&order, &via, (0, 0), start, &End::Reset("caller"));
                };
                let end = tokio::select! {
                    end = relay::bridge(caller, pipe, &account) => frontend::end(end),
                    () = self.gate.cut() => End::Reset("drain"),
                };
                self.audit(&order, &via, account.bytes(), start, &end);
            }
        }
    }

    fn audit(&self, order: &Order, via: &Id, (bytes_in, bytes_out): (u64, u64), start: Instant, end: &End) {
        let (target, duration) = (&order.target.to_string(), start.elapsed());
        let node = Some(order.node.as_str());
        Audit { caller: &order.caller, node, target, bytes_in, bytes_out, duration, end }.write_via(via);
    }
}

async fn send(pipe: &mut Pipe, lines: &[Line]) -> Result<(), crate::carrier::pipe::Lost> {
    let mut text = String::new();
    for line in lines {
        line.write(&mut text);
        if text.len() >= CHUNK {
            pipe.send.send(std::mem::take(&mut text).into()).await?;
        }
    }
    pipe.send.send(text.into()).await
}
