//! A pod's network namespace, and how to do something inside it.
//!
//! A netlink socket belongs for ever to the namespace it was opened in, so the thread enters only for a
//! moment: to open a socket, or to write sysctls, which go by the calling thread's namespace.

use nix::{
    sched::{CloneFlags, setns},
    sys::statfs::{NSFS_MAGIC, fstatfs},
};
use std::{
    fs::File,
    io,
    os::{
        fd::{AsRawFd, RawFd},
        unix::fs::MetadataExt,
    },
    path::Path,
};

/// An open network namespace. It cannot vanish while this is held.
#[derive(Debug)]
pub struct Netns {
    file: File,
}

impl Netns {
    /// Opens the namespace at a path, usually /var/run/netns/NAME or /proc/PID/ns/net.
    ///
    /// # Errors
    /// When the path cannot be opened; [`io::ErrorKind::InvalidInput`] when it is an ordinary file, such as the mount
    /// point of a namespace that is gone.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        if fstatfs(&file)?.filesystem_type() != NSFS_MAGIC {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a namespace, but an ordinary file"));
        }
        Ok(Self { file })
    }

    /// The namespace that this thread is in.
    ///
    /// # Errors
    /// When /proc is not there.
    pub fn current() -> io::Result<Self> {
        Self::open(Path::new("/proc/thread-self/ns/net"))
    }

    /// Whether this thread is in it.
    ///
    /// # Errors
    /// When /proc is not there.
    pub fn is_current(&self) -> io::Result<bool> {
        let (this, current) = (self.file.metadata()?, Self::current()?.file.metadata()?);
        Ok((this.dev(), this.ino()) == (current.dev(), current.ino()))
    }

    /// For `IFLA_NET_NS_FD`.
    #[must_use]
    pub fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// Runs `act` inside the namespace, on this thread, and comes back.
    ///
    /// # Errors
    /// When the way in or back fails, or `act` does. If the way back fails, nothing more may be done on this
    /// thread: the caller gives up.
    pub fn within<T>(&self, act: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let home = Self::current()?;
        setns(&self.file, CloneFlags::CLONE_NEWNET).map_err(|e| {
            io::Error::new(io::Error::from(e).kind(), format!("enter the network namespace: {e}"))
        })?;
        let done = act();
        setns(&home.file, CloneFlags::CLONE_NEWNET)
            .map_err(|e| io::Error::other(format!("return from the pod's network namespace: {e}")))?;
        done
    }
}
