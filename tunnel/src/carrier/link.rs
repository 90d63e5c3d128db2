//! The socket below a carrier: its options, and when anything was last heard on it.

use nix::libc;
use std::{
    io,
    os::fd::AsRawFd,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::Instant,
};

/// From linux/tcp.h; libc has no name for it yet.
const TCP_RTO_MAX_MS: i32 = 44;

/// The longest wait between two retransmissions, milliseconds.
static RTO_MAX: libc::c_uint = 1500;

/// Unacknowledged bytes for this long break the socket.
const USER_TIMEOUT: Duration = Duration::from_secs(28);

/// Sets what a tunnel's connection needs. What the kernel does not have is left as it is.
pub fn tune(socket: &TcpStream) {
    let tcp = socket2::SockRef::from(socket);
    let optional = [
        ("TCP_NODELAY", tcp.set_tcp_nodelay(true)),
        ("TCP_USER_TIMEOUT", tcp.set_tcp_user_timeout(Some(USER_TIMEOUT))),
        ("TCP_CONGESTION bbr", tcp.set_tcp_congestion(b"bbr")),
        ("TCP_RTO_MAX_MS", set_rto_max(socket)),
    ];
    for (name, result) in optional {
        if let Err(error) = result {
            log::debug!("{name}: {error}");
        }
    }
}

/// The longest wait before TCP sends again (Linux 6.15 and later): after a cut, the first byte comes this soon.
#[allow(
    unsafe_code,
    reason = "neither std, socket2 nor nix knows this option, and nix exports no safe way to add one"
)]
fn set_rto_max(socket: &TcpStream) -> io::Result<()> {
    let length = libc::socklen_t::try_from(size_of_val(&RTO_MAX)).map_err(io::Error::other)?;
    // SAFETY: the descriptor is open while `socket` is borrowed; value and length describe one c_uint.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            TCP_RTO_MAX_MS,
            (&raw const RTO_MAX).cast(),
            length,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// When a socket last brought a byte.
#[derive(Debug)]
pub struct Heard {
    start: Instant,
    millis: AtomicU64,
}

impl Heard {
    fn new() -> Arc<Self> {
        Arc::new(Self { start: Instant::now(), millis: AtomicU64::new(0) })
    }

    fn now(&self) {
        self.millis.store(u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX), Relaxed);
    }

    /// The moment of the last byte.
    pub fn last(&self) -> Instant {
        self.start + Duration::from_millis(self.millis.load(Relaxed))
    }
}

/// A socket that remembers when it last brought a byte.
#[derive(Debug)]
pub struct Link<T> {
    socket: T,
    heard: Arc<Heard>,
}

impl<T> Link<T> {
    /// Begins to listen.
    pub fn new(socket: T) -> Self {
        Self { socket, heard: Heard::new() }
    }

    /// Its ear, to keep.
    pub fn heard(&self) -> Arc<Heard> {
        self.heard.clone()
    }

    /// The socket itself.
    pub fn socket(&self) -> &T {
        &self.socket
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Link<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let result = Pin::new(&mut self.socket).poll_read(cx, buf);
        if buf.filled().len() != before {
            self.heard.now();
        }
        result
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Link<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(cx)
    }
}
