//! HTTP CONNECT as kube-apiserver's EgressSelectorConfiguration speaks it: over mTLS, or over a unix socket.
//!
//! Over TLS the caller is who its certificate says, once `--caller-name` has let it in; a node is never a caller. On
//! the unix socket the file's mode decides who may connect, and the caller is `unix`.

use super::{gate::Gate, serve, shake_hands};
use crate::{
    audit::Escaped,
    listen::{HANDSHAKE, Handshakes, UnixSocket, accept},
    refusal::{Reason, Refusal},
    tls::{self, ServerTls, identity::Leaf},
};
use std::{net::SocketAddr, sync::Arc};
use tokio::{
    net::{TcpListener, TcpStream},
    time::timeout,
};
use tokio_rustls::server::TlsStream;

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
            let shaken = timeout(HANDSHAKE, shake_hands(socket, &tls, &handshake)).await;
            drop(handshake);
            match shaken {
                Ok(Ok(stream)) => introduce(stream, remote, &names, gate).await,
                Ok(Err(error)) => log::info!("caller at {remote}: {}", tls::explain(&error, "the caller")),
                Err(_) => log::info!("caller at {remote}: no TLS handshake within {} s", HANDSHAKE.as_secs()),
            }
        }
    };
    handshakes.take_in(listener, greet).await;
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
