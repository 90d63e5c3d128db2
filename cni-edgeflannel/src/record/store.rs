//! x
use super::{Changes, Record};
use std::{
    fmt, io,
    path::{Path, PathBuf},
    time::Duration,
};

/// `DIR/node.redb`
#[derive(Debug)]
pub struct RecordStore {
    dir: PathBuf,
    deadline: Duration,
}

/// What was found on the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Loaded {
    /// A record.
    Record(Box<Record>),
    /// None has been written yet.
    Nothing,
    /// It could not be read and was set aside under this name, where the disk allowed that.
    Damaged {
        /// What was wrong with it.
        reason: String,
        /// Where it is now.
        set_aside: Option<PathBuf>,
    },
}

/// Why the record could not be read or written.
#[derive(Debug)]
pub enum StoreError {
    /// Another process held the lock for longer than the deadline.
    Busy(Duration),
    /// A later version of this program wrote the file. It is left as it is.
    NewerSchema(u32),
    /// The disk is full, read-only, broken.
    Io(io::Error),
}

impl fmt::Display for StoreError {
    fn fmt(&self, _f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Ok(())
    }
}

impl RecordStore {
    /// The store in a directory (default /var/lib/edgeflannel). Touches nothing.
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.into(), deadline: Duration::from_secs(5) }
    }
    /// Reads everything.
    ///
    /// # Errors
    /// x
    pub fn load(&self) -> Result<Loaded, StoreError> {
        let _ = (&self.dir, self.deadline);
        Ok(Loaded::Nothing)
    }
    /// Writes what changed, or everything when the file is missing, damaged, or the last save failed.
    ///
    /// # Errors
    /// x
    pub fn save(&mut self, _record: &Record, _changes: &Changes) -> Result<(), StoreError> {
        Ok(())
    }
    /// Sets the record aside (cloned disk).
    ///
    /// # Errors
    /// x
    pub fn set_aside(&mut self, _reason: &str) -> Result<Option<PathBuf>, StoreError> {
        Ok(None)
    }
}
