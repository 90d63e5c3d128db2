//! Listening sockets: a long backlog, an accept loop that nothing stops, and a bound on handshakes in flight.
//!
//! Accepting is quick; the handshake happens in a task of its own, within ten seconds. At the cap the connections that
//! have not sent a byte make room first, then the oldest ones ([`next_victim`]): silent connections lock nobody out, a
//! slow agent still gets in, and a crowd that all talks waits in the backlog instead.

use socket2::{Domain, Protocol, Socket, Type};
use std::{
    collections::BTreeMap,
    future::Future,
    io,
    net::SocketAddr,
    os::unix::fs::{FileTypeExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::{
    net::{TcpListener, TcpStream, UnixListener},
    sync::Notify,
    task::AbortHandle,
    time::Instant,
};

/// Connections the kernel keeps for us until we accept them.
const BACKLOG: i32 = 4096;

/// From the accepted connection to the end of the TLS handshake and the hello.
pub const HANDSHAKE: Duration = Duration::from_secs(10);

/// A connection that has sent nothing may be dropped for another after this.
const SILENT: Duration = Duration::from_millis(100);

/// Any connection may be dropped for another after this.
const SLOW: Duration = Duration::from_secs(2);

/// Rest after accept failed, so that being out of descriptors does not burn a core.
const REST: Duration = Duration::from_millis(50);

/// Opens a TCP listener.
///
/// # Errors
/// The address and what the kernel says to it.
pub fn tcp(address: SocketAddr) -> io::Result<TcpListener> {
    let open = || {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        TcpListener::from_std(socket.into())
    };
    open().map_err(|error| io::Error::new(error.kind(), format!("listen on {address}: {error}")))
}

/// A unix listener; its file goes when it is dropped.
#[derive(Debug)]
pub struct UnixSocket {
    /// The listener.
    pub listener: UnixListener,
    path: PathBuf,
}

impl Drop for UnixSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Opens a unix socket with mode 0660. A stale file is replaced, the socket of somebody who lives is not.
///
/// # Errors
/// The path and why not.
pub fn unix(path: &Path) -> io::Result<UnixSocket> {
    let open = || {
        match std::fs::symlink_metadata(path) {
            Ok(meta) if !meta.file_type().is_socket() => {
                return Err(io::Error::new(
                    io::ErrorKind::AlreadyExists,
                    "there is a file that is no socket",
                ));
            }
            Ok(_) => match knock(path) {
                // WouldBlock: it lives, and is busy.
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path)?,
                _ => return Err(io::Error::new(io::ErrorKind::AddrInUse, "somebody else is serving it")),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        socket.bind(&socket2::SockAddr::unix(path)?)?;
        // Nobody can connect before listen, so nobody connects with the wrong mode.
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))?;
        socket.listen(BACKLOG)?;
        let listener = UnixListener::from_std(socket.into())?;
        Ok(UnixSocket { listener, path: path.to_owned() })
    };
    open().map_err(|error| io::Error::new(error.kind(), format!("listen on {}: {error}", path.display())))
}

/// Tries whether somebody serves a unix socket, without waiting.
fn knock(path: &Path) -> io::Result<()> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.connect(&socket2::SockAddr::unix(path)?)
}

/// Accepts for ever, whatever accept says.
pub async fn accept<T, F: Future<Output = io::Result<T>>>(mut accept: impl FnMut() -> F) -> T {
    loop {
        match accept().await {
            Ok(accepted) => return accepted,
            Err(error) => {
                log::warn!("accept: {error}");
                tokio::time::sleep(REST).await;
            }
        }
    }
}

/// The handshakes of one listener that are in flight.
#[derive(Debug)]
pub struct Handshakes {
    cap: usize,
    flying: Mutex<(u64, BTreeMap<u64, Flying>)>,
    room: Notify,
}

#[derive(Debug)]
struct Flying {
    since: Instant,
    talks: Arc<AtomicBool>,
    task: Option<AbortHandle>,
}

/// A handshake's place among those in flight, left by dropping it.
#[derive(Debug)]
pub struct Handshake {
    all: Arc<Handshakes>,
    key: u64,
    talks: Arc<AtomicBool>,
}

impl Handshakes {
    /// At most this many.
    pub fn new(cap: usize) -> Arc<Self> {
        Arc::new(Self { cap: cap.max(1), flying: Mutex::default(), room: Notify::new() })
    }

    /// Takes TCP connections in, each in a task of its own, within the cap. `greet` does the handshake and drops the
    /// place when it is done; what it goes on to do is not counted.
    pub async fn take_in<F>(
        self: &Arc<Self>,
        listener: &TcpListener,
        mut greet: impl FnMut(TcpStream, SocketAddr, Handshake) -> F,
    ) where
        F: Future<Output = ()> + Send + 'static,
    {
        loop {
            let (socket, remote) = accept(|| listener.accept()).await;
            // A listener for both families shows IPv4 in IPv6 clothes.
            let remote = SocketAddr::new(remote.ip().to_canonical(), remote.port());
            let handshake = self.make_room().await;
            let key = handshake.key;
            let task = tokio::spawn(greet(socket, remote, handshake)).abort_handle();
            if let Some(flying) = self.flying().1.get_mut(&key) {
                flying.task = Some(task);
            }
        }
    }

    /// Waits for a place, or clears one.
    async fn make_room(self: &Arc<Self>) -> Handshake {
        loop {
            let wait = {
                let mut flying = self.flying();
                let now = Instant::now();
                let ages = flying.1.iter().map(|(key, one)| (*key, one.talks.load(Relaxed), now - one.since));
                match next_victim(self.cap, ages) {
                    None => {
                        let key = flying.0;
                        flying.0 += 1;
                        let talks = Arc::new(AtomicBool::new(false));
                        flying.1.insert(key, Flying { since: now, talks: talks.clone(), task: None });
                        return Handshake { all: self.clone(), key, talks };
                    }
                    Some((key, Duration::ZERO)) => {
                        if let Some(task) = flying.1.remove(&key).and_then(|one| one.task) {
                            task.abort();
                        }
                        continue;
                    }
                    Some((_, wait)) => wait,
                }
            };
            let _ = tokio::time::timeout(wait, self.room.notified()).await;
        }
    }

    fn flying(&self) -> MutexGuard<'_, (u64, BTreeMap<u64, Flying>)> {
        self.flying.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Which of the handshakes (key, whether it has sent a byte, age) makes room for the next, and how long from now; none
/// while there is room.
fn next_victim(
    cap: usize,
    flying: impl ExactSizeIterator<Item = (u64, bool, Duration)>,
) -> Option<(u64, Duration)> {
    if flying.len() < cap {
        return None;
    }
    flying
        .map(|(key, talks, age)| (key, if talks { SLOW } else { SILENT }.saturating_sub(age), talks, age))
        .min_by_key(|(_, wait, talks, age)| (*wait, *talks, std::cmp::Reverse(*age)))
        .map(|(key, wait, ..)| (key, wait))
}

impl Handshake {
    /// Waits until it has sent something.
    ///
    /// # Errors
    /// When it is gone instead.
    pub async fn talks(&self, socket: &TcpStream) -> io::Result<()> {
        // Readiness alone may be a false alarm.
        if socket.peek(&mut [0]).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.talks.store(true, Relaxed);
        Ok(())
    }
}

impl Drop for Handshake {
    fn drop(&mut self) {
        if self.all.flying().1.remove(&self.key).is_some() {
            self.all.room.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_silent_make_room_first_then_the_oldest() {
        let ms = Duration::from_millis;
        let victim = |flying: &[(u64, bool, u64)]| {
            next_victim(
                2,
                flying.iter().map(|&(key, talks, age)| (key, talks, ms(age))).collect::<Vec<_>>().into_iter(),
            )
        };
        assert_eq!(victim(&[(1, false, 9999)]), None, "there is room");
        assert_eq!(victim(&[(1, true, 9000), (2, false, 150)]), Some((2, ms(0))));
        assert_eq!(
            victim(&[(1, false, 200), (2, false, 150)]),
            Some((1, ms(0))),
            "the older of two silent ones"
        );
        assert_eq!(victim(&[(1, true, 2500), (2, false, 10)]), Some((1, ms(0))));
        assert_eq!(victim(&[(1, true, 500), (2, false, 40)]), Some((2, ms(60))), "it has just come");
        assert_eq!(
            victim(&[(1, true, 500), (2, true, 1500)]),
            Some((2, ms(500))),
            "a crowd that talks waits"
        );
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let socket = unix(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
        let error = unix(&path).err().unwrap();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse, "{error}");
        drop(socket);
        assert!(!path.exists());
        std::fs::write(&path, "not a socket").unwrap();
        assert!(unix(&path).is_err());
        assert!(path.exists());
    }
}
