//! The state of one network on disk: lock, open, one transaction, close. Everybody's way to it.
//!
//! A verb is a decision over a [`View`]. The store shows it the state as last committed and carries out the
//! changes it asks for, in one transaction that is on the disk before the verb is answered; a verb that changes
//! nothing writes nothing.
//!
//! | what is wrong | what happens |
//! |---|---|
//! | the lock is held by another | wait for `lockTimeout`, then [`Error::Busy`] |
//! | no file yet | made under another name, filled with what the node knows, renamed |
//! | the file is damaged | the same, and the damaged one is set aside as `NAME.redb.damaged-N` |
//! | a later version wrote it | [`Error::Newer`], untouched |
//! | the disk is full or read-only | the state is read through a shut gate, changes of owner go to /run |

use crate::{
    allocate::Refusal,
    config::Place,
    database::{Opened, ReadOnly, commit, file_backend, guarded, not_empty, nothing},
    disk::Gate,
    fault::Fault,
    identity::Key,
    lock::{Lock, Locked},
    notes::{self, Notes},
    tables::{SCHEMA, Snapshot},
    view::{Changes, Now, View},
};
use nix::unistd::{AccessFlags, access};
use redb::{Database, StorageBackend};
use std::{
    fmt,
    fs::{File, OpenOptions},
    io,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

/// Why a verb could not be served.
#[derive(Debug)]
pub enum Error {
    /// Another process has held the lock for all of the time given.
    Busy(PathBuf, Duration),
    /// A later version of this program wrote the state.
    Newer(PathBuf, u128),
    /// The state can be read, but what was asked for must be written, and cannot be.
    Unwritable(String),
    /// The state cannot be read.
    Storage(String),
    /// The decision was no.
    Refused(Refusal),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Busy(path, waited) => write!(
                f,
                "{} has been locked by another process for {waited:?}; if it hangs, end it (fuser {0} names it)",
                path.display()
            ),
            Self::Newer(path, version) => write!(
                f,
                "{} was written by a later version of ipam-sticky (format {version}; this one knows {SCHEMA}): \
                 install that version again, or move the file away to start without it",
                path.display()
            ),
            Self::Unwritable(what) | Self::Storage(what) => f.write_str(what),
            Self::Refused(refusal) => refusal.fmt(f),
        }
    }
}

impl std::error::Error for Error {}

/// A verb's decision: an answer and what must be written for it to be true.
pub type Decide<'a, T> = &'a dyn Fn(&dyn View) -> Result<(T, Changes), Refusal>;

/// What redb reads and writes. Tests put one in between that fails, or that forgets what was not synced.
pub type MakeBackend = Box<dyn Fn(File) -> Result<Box<dyn StorageBackend>, Fault>>;

/// The state of one network.
pub struct Store {
    pub(crate) place: Place,
    pub(crate) boot: String,
    pub(crate) backend: MakeBackend,
}

impl Store {
    /// The state of a network. Nothing is touched yet.
    #[must_use]
    pub fn new(place: Place, boot: String) -> Self {
        Self { place, boot, backend: Box::new(file_backend) }
    }

    /// The same over another storage.
    #[must_use]
    pub fn with_backend(self, backend: MakeBackend) -> Self {
        Self { backend, ..self }
    }

    /// What decisions need to know besides the state.
    #[must_use]
    pub fn now(&self) -> Now<'_> {
        Now { boot: &self.boot, lives: &|netns| Path::new(netns).exists(), max_idle: self.place.max_idle }
    }

    /// The state file.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.place.data_dir.join(format!("{}.redb", self.place.network))
    }

    fn lock_path(&self) -> PathBuf {
        self.place.data_dir.join(format!("{}.lock", self.place.network))
    }

    fn notes_path(&self) -> PathBuf {
        notes::path(&self.place.run_dir, &self.place.network)
    }

    fn lock(&self) -> Result<Lock, Error> {
        let fallback = self.place.run_dir.join(format!("{}.lock", self.place.network));
        Lock::take(&self.lock_path(), &fallback, self.place.lock_timeout).map_err(|locked| match locked {
            Locked::Busy(path, waited) => Error::Busy(path, waited),
            Locked::Io(path, error) => {
                Error::Storage(format!("open the lock file {}: {error}", path.display()))
            }
        })
    }

    /// Serves a CNI verb.
    ///
    /// # Errors
    /// See [`Error`]; nothing has changed then.
    pub fn serve<T>(&self, decide: Decide<T>) -> Result<T, Error> {
        let lock = self.lock()?;
        match self.write(&lock, decide) {
            Err(Fault::Io(error)) => self.serve_noting(decide, &error),
            result => self.explain(result, "write"),
        }
    }

    /// Carries out a person's command. On a disk that cannot be written it fails: a person can wait.
    ///
    /// # Errors
    /// See [`Error`]; nothing has changed then.
    pub fn change<T>(&self, decide: Decide<T>) -> Result<T, Error> {
        let lock = self.lock()?;
        let result = self.write(&lock, decide);
        self.explain(result, "write")
    }

    /// Looks at the state without writing anything. Without a file there is an empty state.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn look<T>(&self, look: &dyn Fn(&mut Database) -> Result<T, Fault>) -> Result<T, Error> {
        let there = self.path().exists();
        let _lock = there.then(|| self.lock()).transpose()?;
        let looked = guarded(|| {
            if !there {
                return look(&mut nothing()?).map(Ok);
            }
            let (mut opened, _) = self.open_shut()?;
            let looked = look(&mut opened.database);
            opened.end();
            looked.map(Ok)
        });
        self.explain(looked, "read")
    }

    /// Whether a new binding could be written, as far as that can be told without writing.
    ///
    /// # Errors
    /// [`Error::Unwritable`]
    pub fn can_write(&self) -> Result<(), Error> {
        access(&self.place.data_dir, AccessFlags::W_OK).map_err(|error| {
            Error::Unwritable(format!("{} cannot be written: {error}", self.place.data_dir.display()))
        })
    }

    fn explain<T>(&self, result: Result<Result<T, Refusal>, Fault>, what: &str) -> Result<T, Error> {
        let path = self.path();
        match result {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(Refusal::Fault(fault))) | Err(fault) => Err(match fault {
                Fault::Newer(version) => Error::Newer(path, version),
                Fault::InUse => Error::Busy(path, self.place.lock_timeout),
                Fault::Io(error) if is_unwritable(&error) => {
                    Error::Unwritable(format!("{what} {}: {error}", path.display()))
                }
                Fault::Io(error) => Error::Storage(format!("{what} {}: {error}", path.display())),
                Fault::Damaged(why) => Error::Storage(format!("{} is damaged: {why}", path.display())),
            }),
            Ok(Err(refusal)) => Err(Error::Refused(refusal)),
        }
    }

    /// Decides and commits, making or mending the file first if need be.
    fn write<T>(&self, lock: &Lock, decide: Decide<T>) -> Result<Result<T, Refusal>, Fault> {
        if !self.path().exists() {
            if let Some(answered) = self.without_file(decide)? {
                return Ok(answered);
            }
            self.create(None)?;
        }
        match guarded(|| self.transact(lock, decide)) {
            Err(Fault::Damaged(why)) => {
                self.create(Some(&why))?;
                guarded(|| self.transact(lock, decide))
            }
            result => result,
        }
    }

    /// What needs no file leaves none: a refusal, or the DEL of somebody we never heard of, where the node remembers
    /// nothing either. `None` when a file must be made.
    fn without_file<T>(&self, decide: Decide<T>) -> Result<Option<Result<T, Refusal>>, Fault> {
        if !self.known(false)?.is_empty() {
            return Ok(None);
        }
        match decide(&Snapshot::of(&nothing()?)?) {
            Ok((answer, changes)) => Ok(changes.is_empty().then_some(Ok(answer))),
            Err(Refusal::Fault(fault)) => Err(fault),
            Err(refusal) => Ok(Some(Err(refusal))),
        }
    }

    fn transact<T>(&self, lock: &Lock, decide: Decide<T>) -> Result<Result<T, Refusal>, Fault> {
        let opened = self.open(lock)?;
        let result = self.transact_in(&opened.database, &opened.gate, decide);
        opened.end();
        result
    }

    fn transact_in<T>(
        &self,
        database: &Database,
        gate: &Gate,
        decide: Decide<T>,
    ) -> Result<Result<T, Refusal>, Fault> {
        let mut snapshot = self.snapshot(database)?;
        let merged = snapshot.last_note()?;
        let notes = Notes::load(&self.notes_path(), &self.boot, merged);
        if let Some(notes) = &notes {
            drop(snapshot);
            gate.open()?;
            commit(database, &notes.changes, Some(notes.id), false)?;
            notes::remove(&self.notes_path());
            snapshot = self.snapshot(database)?;
        }
        let (answer, changes) = match decide(&snapshot) {
            Ok(decided) => decided,
            Err(Refusal::Fault(fault)) => return Err(fault),
            Err(refusal) => return Ok(Err(refusal)),
        };
        drop(snapshot);
        if !changes.is_empty() {
            gate.open()?;
            commit(database, &changes, None, false)?;
        }
        Ok(Ok(answer))
    }

    /// Serves a verb on a disk that cannot be written: an owner may change, and that is noted in /run.
    fn serve_noting<T>(&self, decide: Decide<T>, cause: &io::Error) -> Result<T, Error> {
        let path = self.path();
        let unwritable = |why: &str| Error::Unwritable(format!("write {}: {cause}; {why}", path.display()));
        if !path.exists() {
            return Err(unwritable("there is no state yet, and none can be made"));
        }
        let looked = guarded(|| {
            let (opened, merged) = self.open_shut()?;
            let decided = self.snapshot(&opened.database).and_then(|snapshot| match decide(&snapshot) {
                Ok((answer, changes)) => {
                    let gains = gains_address(&snapshot, &changes)?;
                    Ok(Ok((answer, changes, gains, merged)))
                }
                Err(Refusal::Fault(fault)) => Err(fault),
                Err(refusal) => Ok(Err(refusal)),
            });
            opened.end();
            decided
        });
        let (answer, changes, gains, merged) = self.explain(looked, "read")?;
        if let Some(key) = gains {
            return Err(unwritable(&format!(
                "{key} has no address yet, and a new one must be on the disk first"
            )));
        }
        if changes.is_empty() {
            return Ok(answer);
        }
        let notes = self.notes_path();
        let all =
            Notes::load(&notes, &self.boot, merged).unwrap_or_default().and(changes, &self.boot, merged);
        all.save(&notes).map_err(|error| {
            unwritable(&format!("nor can the change of owner be noted in {}: {error}", notes.display()))
        })?;
        log::warn!(
            "write {}: {cause}; the change of owner is noted in {} until it can be",
            path.display(),
            notes.display()
        );
        Ok(answer)
    }

    fn snapshot(&self, database: &Database) -> Result<Snapshot, Fault> {
        let snapshot = Snapshot::of(database)?;
        match snapshot.schema()? {
            0 => Err(Fault::Damaged("its schema version is 0".into())),
            version if version > SCHEMA => Err(Fault::Newer(version)),
            _ => Ok(snapshot),
        }
    }

    /// Opens the file for writing, behind a gate that is still shut.
    fn open(&self, lock: &Lock) -> Result<Opened, Fault> {
        loop {
            let file = not_empty(OpenOptions::new().read(true).write(true).open(self.path())?)?;
            match Opened::over(Gate::new((self.backend)(file)?)?) {
                // Whoever had the lock before is dying, and the kernel has not closed its files yet.
                Err(Fault::InUse) if Instant::now() < lock.deadline => {
                    thread::sleep(Duration::from_millis(1))
                }
                opened => return opened,
            }
        }
    }

    /// Opens the file for reading, with the notes merged in memory. Also tells which note the file has.
    fn open_shut(&self) -> Result<(Opened, Option<u128>), Fault> {
        let opened = Opened::over(Gate::new(Box::new(ReadOnly(not_empty(File::open(self.path())?)?)))?)?;
        let merged = self.snapshot(&opened.database)?.last_note()?;
        if let Some(notes) = Notes::load(&self.notes_path(), &self.boot, merged) {
            commit(&opened.database, &notes.changes, Some(notes.id), false)?;
        }
        Ok((opened, merged))
    }
}

fn is_unwritable(error: &io::Error) -> bool {
    use io::ErrorKind::{PermissionDenied, QuotaExceeded, ReadOnlyFilesystem, StorageFull};
    matches!(error.kind(), StorageFull | ReadOnlyFilesystem | QuotaExceeded | PermissionDenied)
}

/// A binding that would get an address it does not have.
fn gains_address(view: &dyn View, changes: &Changes) -> Result<Option<Key>, Fault> {
    for (key, new) in &changes.bindings {
        let had = view.binding(key)?.map(|binding| binding.held()).unwrap_or_default();
        if new.as_ref().is_some_and(|new| new.held().iter().any(|address| !had.contains(address))) {
            return Ok(Some(key.clone()));
        }
    }
    Ok(None)
}
