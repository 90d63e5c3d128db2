//! Ports that look like the nodes' own: a connection goes to the node whose name its TLS ClientHello or its Host has,
//! unopened.
//!
//! Nobody is authenticated here, the kubelet at the other end does that; so nothing but nodes can be reached, on one
//! port per listener, and only by their names.

use super::{FAREWELL, HEAD, Visit, Wish, connect_and_copy, farewell, gate::Gate, read_head};
use crate::{
    listen::{Handshake, Handshakes},
    server_name::{Reader, UNRECOGNIZED_NAME},
    target::{Host, Target},
};
use bytes::Bytes;
use std::{io, sync::Arc};
use tokio::{
    net::{TcpListener, TcpStream},
    time::{Instant, timeout},
};

/// The caller in the audit line, and in the caps: nobody says who it is.
const CALLER: &str = "passthrough";

/// Serves a listener whose connections go to `port` of the nodes.
pub async fn listen(listener: &TcpListener, handshakes: &Arc<Handshakes>, port: u16, gate: &Arc<Gate>) {
    let greet = |socket, _, handshake| {
        let gate = gate.clone();
        async move {
            let caller: Arc<str> = CALLER.into();
            let visit = Visit { gate: &gate, caller: &caller, start: Instant::now() };
            serve(socket, handshake, port, &visit, &caller).await;
        }
    };
    handshakes.take_in(listener, greet).await;
}

async fn serve(mut socket: TcpStream, handshake: Handshake, port: u16, visit: &Visit<'_>, caller: &Arc<str>) {
    let mut reader = Reader::new();
    let begun = async {
        super::tune(&socket)?;
        handshake.talks(&socket).await?;
        Ok::<_, io::Error>(read_head(&mut socket, |bytes| reader.push(bytes)).await)
    };
    let begun = timeout(HEAD, begun).await;
    // A stream may be long; it keeps no ClientHello.
    let is_tls = reader.is_tls();
    drop((handshake, reader));
    // One that never ends, or says nothing, or goes: there is nobody to tell.
    let Ok(Ok(Some(meant))) = begun else { return };
    let admitted = meant.and_then(|meant| Ok((meant, visit.gate.admit(caller)?)));
    let refused = match admitted {
        Ok((meant, _slot)) => {
            let target = Target { host: Host::Name(meant.name), port };
            let (early, told, first) = (Bytes::new(), &b""[..], meant.bytes);
            connect_and_copy(socket, Wish { target, only_nodes: true, early, told, first }, visit).await
        }
        Err(refusal) => Some((socket, visit.refused(None, "", refusal))),
    };
    if let Some((mut socket, answer)) = refused {
        // In the caller's own language.
        let answer = if is_tls { UNRECOGNIZED_NAME } else { &answer };
        let _ = timeout(FAREWELL, farewell(&mut socket, answer)).await;
    }
}
