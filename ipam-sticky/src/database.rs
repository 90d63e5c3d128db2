//! redb, opened, written and let go of the way this program does it: one short-lived process after the other.

use crate::{disk::Gate, fault::Fault, tables, view::Changes};
use redb::{
    Builder, Database, StorageBackend,
    backends::{FileBackend, InMemoryBackend},
};
use std::{
    fs::File,
    io,
    mem::ManuallyDrop,
    os::unix::fs::FileExt,
    panic::{AssertUnwindSafe, catch_unwind},
};

/// The plain file.
///
/// # Errors
/// redb's.
pub fn file_backend(file: File) -> Result<Box<dyn StorageBackend>, Fault> {
    Ok(Box::new(FileBackend::new(file)?))
}

fn builder() -> Builder {
    let mut builder = Database::builder();
    builder.set_cache_size(8 << 20);
    builder
}

/// An empty state, in memory.
pub(crate) fn nothing() -> Result<Database, Fault> {
    let database = builder().create_with_backend(InMemoryBackend::new())?;
    commit(&database, &Changes::default(), None, true)?;
    Ok(database)
}

/// redb takes an empty file for a new one. Ours never is: it is made under another name.
pub(crate) fn not_empty(file: File) -> Result<File, Fault> {
    match file.metadata()?.len() {
        0 => Err(Fault::Damaged("the file is empty".into())),
        _ => Ok(file),
    }
}

/// One transaction, on the disk when this returns.
pub(crate) fn commit(
    database: &Database,
    changes: &Changes,
    note: Option<u128>,
    new: bool,
) -> Result<(), Fault> {
    let mut transaction = database.begin_write()?;
    // Records the allocator state, so that a process that ends without closing leaves nothing to repair.
    transaction.set_quick_repair(true);
    if new {
        tables::create(&transaction)?;
    }
    tables::write(&transaction, changes, note)?;
    Ok(transaction.commit()?)
}

/// An open database. While a panic of redb's unwinds it must not be dropped, because a second panic would end the
/// process: it is leaked then, and otherwise ended with [`Opened::end`].
pub(crate) struct Opened {
    pub database: ManuallyDrop<Database>,
    pub gate: Gate,
}

impl Opened {
    pub fn over(gate: Gate) -> Result<Self, Fault> {
        let database = builder().create_with_backend(gate.clone())?;
        Ok(Self { database: ManuallyDrop::new(database), gate })
    }

    /// Lets go of the file without the writes and syncs that redb would close it with.
    pub fn end(mut self) {
        self.gate.take_away();
        // The first failing access is what tells redb that there is nothing left to do when it is dropped.
        let ended = catch_unwind(AssertUnwindSafe(|| {
            let _ = self.database.check_integrity();
            drop(ManuallyDrop::into_inner(self.database));
        }));
        if ended.is_err() {
            log::debug!("redb panicked when it was dropped");
        }
    }
}

/// redb indexes into pages without looking: on a garbage page it panics. That is damage like any other.
pub(crate) fn guarded<T>(act: impl FnOnce() -> Result<T, Fault>) -> Result<T, Fault> {
    catch_unwind(AssertUnwindSafe(act)).unwrap_or_else(|panic| {
        let said = panic.downcast_ref::<String>().map(String::as_str);
        let said = said.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
        Err(Fault::Damaged(format!("reading it panicked: {said}")))
    })
}

/// A file that nobody writes to: it stays behind a shut gate.
#[derive(Debug)]
pub(crate) struct ReadOnly(pub File);

impl StorageBackend for ReadOnly {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(out, offset)
    }

    fn set_len(&self, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, _: u64, _: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }
}
