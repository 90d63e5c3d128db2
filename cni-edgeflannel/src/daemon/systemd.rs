//! Tells systemd that the daemon is ready and what it waits for (`sd_notify(3)`): one datagram, no library.

use std::{
    env, io,
    os::unix::net::{SocketAddr, UnixDatagram},
    os::{linux::net::SocketAddrExt, unix::ffi::OsStrExt},
};

/// Sends `READY=1`, `STATUS=...` and the like; nothing at all when systemd did not start us.
pub fn notify(state: &str) {
    let Some(path) = env::var_os("NOTIFY_SOCKET") else { return };
    let address = match path.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(&path),
    };
    if let Err(e) = address.and_then(|address| send(&address, state)) {
        log::warn!("tell systemd {state:?}: {e}");
    }
}

fn send(address: &SocketAddr, state: &str) -> io::Result<()> {
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    socket.send_to_addr(state.as_bytes(), address).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_datagram() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let systemd = UnixDatagram::bind(&path).unwrap();
        send(&SocketAddr::from_pathname(&path).unwrap(), "READY=1").unwrap();
        let mut text = [0; 16];
        assert_eq!(systemd.recv(&mut text).unwrap(), 7);
        assert_eq!(&text[..7], b"READY=1");
    }
}
