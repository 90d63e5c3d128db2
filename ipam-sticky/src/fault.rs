//! What redb and the disk say, sorted by what can be done about it.

use std::{fmt, io};

/// Why the state could not be read or written.
#[derive(Debug)]
pub enum Fault {
    /// It holds what nobody wrote.
    Damaged(String),
    /// The disk says no.
    Io(io::Error),
    /// A later version of this program wrote it.
    Newer(u128),
    /// Another process has the file open, which the lock file should have kept out.
    InUse,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Damaged(what) => write!(f, "the state is damaged: {what}"),
            Self::Io(error) => error.fmt(f),
            Self::Newer(version) => {
                write!(f, "a later version of ipam-sticky wrote the state (format {version})")
            }
            Self::InUse => f.write_str("another process has the state open"),
        }
    }
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            // redb's words for "this is not my file" and "the file ends too early".
            io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof => Self::Damaged(error.to_string()),
            _ => Self::Io(error),
        }
    }
}

impl From<redb::Error> for Fault {
    fn from(error: redb::Error) -> Self {
        match error {
            redb::Error::Io(error) => error.into(),
            redb::Error::DatabaseAlreadyOpen | redb::Error::LockProtocolMismatch => Self::InUse,
            redb::Error::Backend(error) => Self::Io(io::Error::other(error)),
            redb::Error::PreviousIo | redb::Error::DatabaseClosed => {
                Self::Io(io::Error::other("an earlier write failed"))
            }
            redb::Error::Corrupted(what) => match newer_format(&what) {
                Some(version) => Self::Newer(version),
                None => Self::Damaged(what),
            },
            // A table that is missing or of another type, a page that is none: nobody wrote that.
            error => Self::Damaged(error.to_string()),
        }
    }
}

/// redb has an error type per phase; here the phase does not matter.
macro_rules! from_redb {
    ($($error:ident),*) => {$(
        impl From<redb::$error> for Fault {
            fn from(error: redb::$error) -> Self {
                redb::Error::from(error).into()
            }
        }
    )*};
}

from_redb!(
    DatabaseError,
    TransactionError,
    TableError,
    StorageError,
    CommitError,
    SetDurabilityError,
    BackendError
);

/// A later redb writes another format number; an impossible one is damage.
fn newer_format(said: &str) -> Option<u128> {
    let number = said.strip_prefix("Expected file format version")?.rsplit(' ').next()?;
    number.parse().ok().filter(|version| (4..=16).contains(version))
}
