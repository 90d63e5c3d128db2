//! HTTP CONNECT as kube-apiserver's EgressSelectorConfiguration speaks it: over mTLS, or over a unix socket.
//!
//! Over TLS the caller is who its certificate says, once `--caller-name` has let it in; a node is never a caller. On
//! the unix socket the file's mode decides who may connect, and the caller is `unix`.

use super::{gate::Gate, serve};
use crate::{
    audit::Escaped,
    listen::{HANDSHAKE, Handshake, Handshakes, UnixSocket, accept},
    refusal::{Reason, Refusal},
    tls::{self, ServerTls, identity::Leaf},
};
use socket2::{SockRef, TcpKeepalive};
use std::{io, net::SocketAddr, sync::Arc, time::Duration};
use tokio::{
    net::{TcpListener, TcpStream},
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

/// A caller's machine that has vanished is noticed some time after this.
const KEEPALIVE: Duration = Duration::from_secs(60);

/// The caller on the unix socket, as the audit line has it.
const UNIX: &str = "unix";

/// Serves the unix socket.
pub async fn unix(socket: &UnixSocket, gate: &Arc<Gate>) {
    let caller: Arc<str> = UNIX.into();
    loop {
        let (connection, _) = accept(|| socket.listener.accept()).await;
        tokio::spawn(serve(connection, caller.clone(), gate.clone()));
    }
}

/// Serves the TLS listener. `names` are those of `--caller-name`.
pub async fn tls(
    listener: &TcpListener,
    handshakes: &Arc<Handshakes>,
    tls: &Arc<ServerTls>,
    names: &Arc<[String]>,
    gate: &Arc<Gate>,
) {
    let greet = |socket, remote, handshake| {
        let (tls, names, gate) = (tls.clone(), names.clone(), gate.clone());
        async move {
            match timeout(HANDSHAKE, shake_hands(socket, &tls, handshake)).await {
                Ok(Ok(stream)) => introduce(stream, remote, &names, gate).await,
                Ok(Err(error)) => log::info!("caller at {remote}: {}", tls::explain(&error, "the caller")),
                Err(_) => log::info!("caller at {remote}: no TLS handshake within {} s", HANDSHAKE.as_secs()),
            }
        }
    };
    handshakes.take_in(listener, greet).await;
}

/// The server's part of a TLS handshake, one of those in flight.
///
/// # Errors
/// What [`tls::explain`] puts into words.
async fn shake_hands(
    socket: TcpStream,
    tls: &ServerTls,
    handshake: Handshake,
) -> io::Result<TlsStream<TcpStream>> {
    socket.set_nodelay(true)?;
    let keepalive = TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE / 4);
    SockRef::from(&socket).set_tcp_keepalive(&keepalive)?;
    handshake.talks(&socket).await?;
    TlsAcceptor::from(tls.get().config.clone()).accept(socket).await
}

async fn introduce(mut stream: TlsStream<TcpStream>, remote: SocketAddr, names: &[String], gate: Arc<Gate>) {
    let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
    let caller = match chain.first().map(|leaf| Leaf::parse(leaf)) {
        Some(Ok(leaf)) => leaf.caller(names),
        _ => Err(tls::identity::NotThatOne::Unreadable),
    };
    match caller {
        Ok(caller) => serve(stream, Escaped::new(caller.as_bytes()).to_string().into(), gate).await,
        Err(why) => {
            log::warn!("caller at {remote}: {why}");
            gate.refused(Reason::DeniedByServer);
            let answer = Refusal::new(Reason::DeniedByServer, why).response();
            let _ = timeout(super::FAREWELL, super::farewell(&mut stream, &answer)).await;
        }
    }
}
