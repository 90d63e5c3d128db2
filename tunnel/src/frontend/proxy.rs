//! The HTTP proxy for scrapers: metrics-server by `HTTPS_PROXY`, Prometheus by `proxy_url`.
//!
//! Over TLS without a client certificate, or plainly on loopback; either way every connection shows user and password.
//! Until they have been found right a connection is one of those in flight, of which there are few; after that it is
//! its user's, and may ask for its user's ports.

use super::{
    Caller, FAREWELL, HEAD, Visit, Wish, answer::Answering, connect_and_copy, farewell, gate::Gate,
    read_head, shake_hands,
};
use crate::{
    connect,
    head::Reader,
    listen::{HANDSHAKE, Handshake, Handshakes},
    proxy::{
        request::{self, METHODS, What},
        users::Users,
    },
    refusal::{Reason, Refusal},
    target::Target,
    tls::{self, ServerTls},
};
use bytes::Bytes;
use std::sync::Arc;
use tokio::{
    net::TcpListener,
    time::{Instant, timeout},
};

/// The caller in the audit line until it is known who it is.
const SOMEBODY: &str = "proxy";

/// What the listeners of the proxy share.
pub struct Proxy {
    /// Where targets are reached.
    pub gate: Arc<Gate>,
    /// Who may ask.
    pub users: Users,
}

/// Serves the TLS listener.
pub async fn tls(
    listener: &TcpListener,
    handshakes: &Arc<Handshakes>,
    tls: &Arc<ServerTls>,
    proxy: &Arc<Proxy>,
) {
    let greet = |socket, remote, handshake| {
        let (tls, proxy) = (tls.clone(), proxy.clone());
        async move {
            match timeout(HANDSHAKE, shake_hands(socket, &tls, &handshake)).await {
                Ok(Ok(stream)) => proxy.serve(stream, handshake).await,
                Ok(Err(error)) => log::info!("scraper at {remote}: {}", tls::explain(&error, "the scraper")),
                Err(_) => {
                    log::info!("scraper at {remote}: no TLS handshake within {} s", HANDSHAKE.as_secs())
                }
            }
        }
    };
    handshakes.take_in(listener, greet).await;
}

/// Serves the plain listener.
pub async fn plain(listener: &TcpListener, handshakes: &Arc<Handshakes>, proxy: &Arc<Proxy>) {
    let greet = |socket, _, handshake: Handshake| {
        let proxy = proxy.clone();
        async move {
            let talks = async {
                super::tune(&socket)?;
                handshake.talks(&socket).await
            };
            // Whoever says nothing, or goes, is not worth a word.
            if let Ok(Ok(())) = timeout(HANDSHAKE, talks).await {
                proxy.serve(socket, handshake).await;
            }
        }
    };
    handshakes.take_in(listener, greet).await;
}

impl Proxy {
    /// Serves one connection: one request.
    async fn serve<S: Caller>(&self, mut socket: S, handshake: Handshake) {
        let start = Instant::now();
        let mut reader = Reader::new(METHODS);
        let somebody = SOMEBODY.into();
        let nobody = Visit { gate: &self.gate, caller: &somebody, start };
        let asked = async {
            // A head that never ends, a caller that says nothing or goes: there is nobody to tell.
            let head = timeout(HEAD, read_head(&mut socket, |bytes| reader.push(bytes))).await.ok()??;
            let asked = match head.and_then(|head| request::read(&head)) {
                Ok(asked) => asked,
                Err(refusal) => return Some(Err(nobody.refused(None, &reader.request_line(), refusal))),
            };
            let user = match timeout(HEAD, self.users.authenticate(asked.credentials.as_ref())).await {
                Ok(user) => user,
                Err(_) => Err(Refusal::new(Reason::TooMany, "too many passwords are being tried; try again")),
            };
            match user {
                Ok(user) => Some(Ok((asked.target, asked.what, user))),
                Err(refusal) => Some(Err(nobody.refused(None, &asked.target.to_string(), refusal))),
            }
        };
        let asked = asked.await;
        // From here on it is not one of those that anybody can open, and keeps neither head nor password.
        drop((handshake, reader));
        let refused = match asked {
            None => return,
            Some(Err(answer)) => Some((socket, answer)),
            Some(Ok((target, what, user))) => {
                let caller: Arc<str> = format!("{SOMEBODY}:{}", user.name).into();
                let visit = Visit { gate: &self.gate, caller: &caller, start };
                let admitted = user.may_reach(target.port).and_then(|()| self.gate.admit(&caller));
                match admitted {
                    Ok(_slot) => fetch(socket, target, what, &visit).await,
                    Err(refusal) => Some((socket, visit.refused(None, &target.to_string(), refusal))),
                }
            }
        };
        if let Some((mut socket, answer)) = refused {
            let _ = timeout(FAREWELL, farewell(&mut socket, &answer)).await;
        }
    }
}

/// Does what is asked. Gives the socket back with the answer to a refusal.
async fn fetch<S: Caller>(socket: S, target: Target, what: What, visit: &Visit<'_>) -> Option<(S, Vec<u8>)> {
    let only_nodes = false;
    match what {
        What::Tunnel(early) => {
            let (told, first) = (connect::ESTABLISHED, Bytes::new());
            connect_and_copy(socket, Wish { target, only_nodes, early, told, first }, visit).await
        }
        What::Page(first) => {
            let (told, early) = (&b""[..], Bytes::new());
            let wish = Wish { target, only_nodes, early, told, first };
            let refused = connect_and_copy(Answering::new(socket), wish, visit).await;
            refused.map(|(socket, answer)| (socket.into_inner(), answer))
        }
    }
}
