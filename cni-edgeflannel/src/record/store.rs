//! `node.redb`, the record on the disk: read once, then written a little at a time.
//!
//! Nobody keeps the file open: each call takes `node.redb.lock` with a deadline, does one transaction and closes.
//! A damaged file is set aside under a name and a new one is written from what the program still knows; a file of
//! a later version is left as it is. When the disk refuses, the caller goes on from memory: what was not written
//! is written by the next call that can.

use super::{
    Changes, Record,
    tables::{self, Fault, guarded},
};
use fs2::FileExt;
use std::{
    fmt,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, ErrorKind},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

/// How long a call waits for another process. A transaction takes milliseconds; more means a disk that hangs.
const DEADLINE: Duration = Duration::from_secs(5);

/// The record's file. It keeps no handle, only what is still to be written.
#[derive(Debug)]
pub struct RecordStore {
    dir: PathBuf,
    deadline: Duration,
    /// What earlier calls could not write.
    pending: Changes,
    /// The file holds what this process read or wrote, so that changes are enough.
    known: bool,
}

/// What was found on the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Loaded {
    /// A record.
    Record(Box<Record>),
    /// None has been written yet.
    Nothing,
    /// It could not be read and was set aside, where the disk allowed that.
    Damaged {
        /// What was wrong with it.
        reason: String,
        /// Where it is now; `None` when it could not be moved.
        set_aside: Option<PathBuf>,
    },
}

/// Why the record could not be read or written.
#[derive(Debug)]
pub enum StoreError {
    /// Another process held the lock for longer than the deadline.
    Busy(PathBuf, Duration),
    /// A later version of this program wrote the file. It is left as it is.
    NewerSchema(PathBuf, u32),
    /// The disk is full, read-only or broken.
    Io(PathBuf, io::Error),
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Busy(path, waited) => {
                write!(f, "the node record {} was busy for {} s", path.display(), waited.as_secs_f32())
            }
            Self::NewerSchema(path, schema) => write!(
                f,
                "the node record {} has schema {schema}, this version knows up to {}: install the version that \
                 wrote it, or move the file away to start anew",
                path.display(),
                tables::SCHEMA
            ),
            Self::Io(path, e) => write!(f, "the node record {}: {e}", path.display()),
        }
    }
}

impl std::error::Error for StoreError {}

impl RecordStore {
    /// The store in a directory (default /var/lib/edgeflannel). Touches nothing.
    #[must_use]
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.into(), deadline: DEADLINE, pending: Changes::default(), known: false }
    }

    /// Another deadline for the lock.
    #[must_use]
    pub fn with_deadline(self, deadline: Duration) -> Self {
        Self { deadline, ..self }
    }

    /// `DIR/node.redb`
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.dir.join("node.redb")
    }

    /// Reads everything. A damaged file is set aside.
    ///
    /// # Errors
    /// Each of [`StoreError`]; the file is then as it was.
    pub fn load(&mut self) -> Result<Loaded, StoreError> {
        let _lock = self.lock_to_read()?;
        let bytes = match fs::read(self.path()) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Loaded::Nothing),
            other => other.map_err(|e| self.io(e))?,
        };
        match guarded(|| if bytes.is_empty() { Err(empty()) } else { tables::read(&bytes) }) {
            Ok(record) => {
                self.known = true;
                Ok(Loaded::Record(Box::new(record)))
            }
            Err(Fault::Damaged(reason)) => {
                let set_aside = self.move_away("damaged").inspect_err(|e| log::warn!("{e}")).ok();
                Ok(Loaded::Damaged { reason, set_aside })
            }
            Err(fault) => Err(self.error(fault)),
        }
    }

    /// Writes what changed; everything, when the file is missing, damaged, or not the one that was read.
    ///
    /// # Errors
    /// Each of [`StoreError`]. The file then holds what it held before; `changes` are remembered and
    /// written by the next call that can.
    pub fn save(&mut self, record: &Record, changes: &Changes) -> Result<(), StoreError> {
        self.pending.node |= changes.node;
        self.pending.peers.extend(changes.peers.iter().cloned());
        let _lock = self.lock_to_write()?;
        let path = self.path();
        match guarded(|| self.check_schema()) {
            Ok(true) if self.known => match guarded(|| tables::write_changes(&path, record, &self.pending)) {
                Ok(()) => {}
                Err(Fault::Damaged(reason)) => self.replace_damaged(record, &reason)?,
                Err(fault) => return Err(self.error(fault)),
            },
            Ok(_) => self.replace(record)?,
            Err(Fault::Damaged(reason)) => self.replace_damaged(record, &reason)?,
            Err(fault) => return Err(self.error(fault)),
        }
        self.known = true;
        self.pending = Changes::default();
        Ok(())
    }

    /// Moves the file to `node.redb.SUFFIX-N`, because it is another node's.
    ///
    /// # Errors
    /// When the disk or another process refuses.
    pub fn set_aside(&mut self, suffix: &str) -> Result<PathBuf, StoreError> {
        let _lock = self.lock_to_write()?;
        self.known = false;
        self.move_away(suffix)
    }

    /// True when there is a file, of a schema that may be written.
    fn check_schema(&self) -> Result<bool, Fault> {
        let path = self.path();
        match fs::metadata(&path) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(Fault::Io(e)),
            Ok(file) if file.len() == 0 => return Err(empty()),
            Ok(_) => {}
        }
        match tables::check_schema_of(&path) {
            Err(Fault::NeedsRepair) => tables::read(&fs::read(&path).map_err(Fault::Io)?).map(|_| true),
            other => other.map(|()| true),
        }
    }

    fn replace_damaged(&self, record: &Record, reason: &str) -> Result<(), StoreError> {
        let set_aside = self.move_away("damaged")?;
        log::warn!(
            "the node record {} was damaged ({reason}); it is now {}, a new one is written",
            self.path().display(),
            set_aside.display()
        );
        self.replace(record)
    }

    /// Writes everything beside the file and puts it in its place, so that no moment has half a record.
    fn replace(&self, record: &Record) -> Result<(), StoreError> {
        let new = self.dir.join("node.redb.new");
        let written = guarded(|| {
            match fs::remove_file(&new) {
                Err(e) if e.kind() != ErrorKind::NotFound => return Err(Fault::Io(e)),
                _ => {}
            }
            tables::write_new(&new, record)?;
            fs::rename(&new, self.path()).map_err(Fault::Io)?;
            File::open(&self.dir).and_then(|dir| dir.sync_all()).map_err(Fault::Io)
        });
        written.map_err(|fault| {
            // The room it takes may be what the next try lacks.
            let _ = fs::remove_file(&new);
            self.error(fault)
        })
    }

    fn move_away(&self, suffix: &str) -> Result<PathBuf, StoreError> {
        let mut places = (1..).map(|n: u32| self.dir.join(format!("node.redb.{suffix}-{n}")));
        let place = places.find(|place| !place.exists()).unwrap_or_else(|| self.dir.join("node.redb.lost"));
        fs::rename(self.path(), &place).map_err(|e| self.io(e))?;
        Ok(place)
    }

    /// The lock, or none where the disk does not even allow the lock's file: then nobody writes.
    fn lock_to_read(&self) -> Result<Option<File>, StoreError> {
        match self.lock() {
            Ok(lock) => Ok(Some(lock)),
            Err(StoreError::Io(_, e))
                if matches!(
                    e.kind(),
                    ErrorKind::NotFound
                        | ErrorKind::ReadOnlyFilesystem
                        | ErrorKind::PermissionDenied
                        | ErrorKind::StorageFull
                ) =>
            {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn lock_to_write(&self) -> Result<File, StoreError> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.dir).map_err(|e| self.io(e))?;
        self.lock()
    }

    fn lock(&self) -> Result<File, StoreError> {
        let path = self.dir.join("node.redb.lock");
        // An existing lock on a read-only disk can still be locked.
        let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
        let file = file.or_else(|e| File::open(&path).map_err(|_| e)).map_err(|e| self.io(e))?;
        let started = Instant::now();
        let mut pause = Duration::from_millis(1);
        loop {
            match file.try_lock_exclusive() {
                Ok(()) => return Ok(file),
                Err(e) if e.kind() != ErrorKind::WouldBlock => return Err(self.io(e)),
                Err(_) if started.elapsed() >= self.deadline => {
                    return Err(StoreError::Busy(self.path(), self.deadline));
                }
                Err(_) => thread::sleep(pause),
            }
            pause = (pause * 2).min(Duration::from_millis(20));
        }
    }

    fn error(&self, fault: Fault) -> StoreError {
        match fault {
            Fault::Newer(schema) => StoreError::NewerSchema(self.path(), schema),
            Fault::Io(e) => self.io(e),
            Fault::Damaged(why) => self.io(io::Error::new(ErrorKind::InvalidData, why)),
            Fault::NeedsRepair => self.io(io::Error::other("it was not closed and cannot be repaired")),
        }
    }

    fn io(&self, e: io::Error) -> StoreError {
        StoreError::Io(self.path(), e)
    }
}

fn empty() -> Fault {
    Fault::Damaged("the file is empty".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{NodeRecord, Peer, PeerEnd, PerFamily};
    use redb::{Database, TableDefinition};
    use std::io::Write as _;
    use tempfile::TempDir;

    fn dir() -> TempDir {
        tempfile::tempdir().unwrap()
    }

    fn record_of(peers: usize) -> Record {
        let peer = |n: usize| {
            let [a, b] = u16::try_from(n).unwrap().to_be_bytes();
            let end = PeerEnd {
                subnet: format!("10.{}.{b}.0/24", 100 + a).parse().unwrap(),
                public_ip: [192, 168, a, b].into(),
                vtep_mac: crate::mac::Mac([2, 0, 0, 0, a, b]),
                since: 1,
            };
            Peer { name: format!("node-{n}"), ends: PerFamily { v4: Some(end), v6: None } }
        };
        let peers = (0..peers).map(peer).map(|peer| (peer.name.clone(), peer)).collect();
        Record { node: NodeRecord { node_name: "me".into(), ..NodeRecord::default() }, peers }
    }

    fn everything(record: &Record) -> Changes {
        Changes { node: true, peers: record.peers.keys().cloned().collect() }
    }

    fn written(dir: &TempDir, record: &Record) -> RecordStore {
        let mut store = RecordStore::new(dir.path());
        store.save(record, &everything(record)).unwrap();
        store
    }

    fn loaded(dir: &TempDir) -> Record {
        match RecordStore::new(dir.path()).load().unwrap() {
            Loaded::Record(record) => *record,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_was_saved_is_loaded() {
        let dir = dir();
        assert_eq!(RecordStore::new(&dir.path().join("none")).load().unwrap(), Loaded::Nothing);
        assert_eq!(RecordStore::new(dir.path()).load().unwrap(), Loaded::Nothing);
        let mut record = record_of(10);
        let mut store = written(&dir, &record);
        assert_eq!(loaded(&dir), record);

        let mut changes = Changes::default();
        record.remove_peer("node-3", &mut changes);
        record.put_node(NodeRecord { ip_masq: true, ..record.node.clone() }, &mut changes);
        store.save(&record, &changes).unwrap();
        assert_eq!(loaded(&dir), record);
    }

    #[test]
    fn damage_is_set_aside_with_a_name() {
        type Damage = fn(&mut Vec<u8>);
        let kinds: [Damage; 5] = [
            |bytes| bytes.fill(0),
            |bytes| bytes.truncate(bytes.len() / 2),
            |bytes| bytes.clear(),
            |bytes| *bytes = b"hello".to_vec(),
            |bytes| bytes[4096..].iter_mut().for_each(|byte| *byte ^= 0x5a),
        ];
        for (kind, damage) in kinds.into_iter().enumerate() {
            let dir = dir();
            let mut record = record_of(20);
            let mut store = written(&dir, &record);
            let mut bytes = fs::read(store.path()).unwrap();
            damage(&mut bytes);
            fs::write(store.path(), &bytes).unwrap();

            let Loaded::Damaged { set_aside, .. } = RecordStore::new(dir.path()).load().unwrap() else {
                panic!("damage {kind} went unnoticed")
            };
            assert_eq!(set_aside, Some(dir.path().join("node.redb.damaged-1")));
            assert_eq!(fs::read(set_aside.unwrap()).unwrap(), bytes, "it is kept as it was");
            assert_eq!(RecordStore::new(dir.path()).load().unwrap(), Loaded::Nothing);

            // The same while the program runs: everything is written anew, not only the change.
            fs::write(store.path(), &bytes).unwrap();
            let mut changes = Changes::default();
            record.remove_peer("node-3", &mut changes);
            store.save(&record, &changes).unwrap();
            assert!(dir.path().join("node.redb.damaged-2").exists(), "damage {kind}");
            assert_eq!(loaded(&dir), record, "damage {kind}");
        }
    }

    /// Power cuts leave redb's file whole, but a bad card may return any page as garbage.
    #[test]
    fn any_garbage_page_is_noticed_or_harmless() {
        let dir = dir();
        let record = record_of(50);
        let path = written(&dir, &record).path();
        let good = fs::read(&path).unwrap();
        for (round, at) in (0..good.len()).step_by(1531).enumerate() {
            let mut bytes = good.clone();
            let end = bytes.len().min(at + 64);
            bytes[at..end].iter_mut().enumerate().for_each(|(i, byte)| *byte ^= (i * 37 + round) as u8 | 1);
            fs::write(&path, &bytes).unwrap();
            match RecordStore::new(dir.path()).load() {
                Ok(Loaded::Record(read)) => assert_eq!(*read, record, "garbage at {at} was believed"),
                Ok(Loaded::Damaged { .. }) | Err(StoreError::NewerSchema(..)) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn a_later_schema_is_left_alone() {
        let dir = dir();
        let record = record_of(2);
        let mut store = written(&dir, &record);
        let database = Database::open(store.path()).unwrap();
        let write = database.begin_write().unwrap();
        let meta: TableDefinition<&str, u32> = TableDefinition::new("meta");
        write.open_table(meta).unwrap().insert("schema", 7).unwrap();
        write.commit().unwrap();
        drop(database);

        let bytes = fs::read(store.path()).unwrap();
        let newer = |result: Result<(), StoreError>| matches!(result, Err(StoreError::NewerSchema(_, 7)));
        assert!(newer(store.load().map(drop)));
        assert!(newer(store.save(&record, &everything(&record))));
        assert!(newer(RecordStore::new(dir.path()).save(&record, &everything(&record))));
        assert_eq!(fs::read(store.path()).unwrap(), bytes);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "the file and its lock");
    }

    #[test]
    fn a_file_that_was_not_closed_is_read_and_written() {
        let dir = dir();
        let mut record = record_of(5);
        let store = written(&dir, &record);
        // Half a write, as a killed process leaves it: copied while the database is open.
        let database = Database::open(store.path()).unwrap();
        let write = database.begin_write().unwrap();
        let peers: TableDefinition<&str, &[u8]> = TableDefinition::new("peers");
        write.open_table(peers).unwrap().remove("node-1").unwrap();
        write.commit().unwrap();
        let bytes = fs::read(store.path()).unwrap();
        drop(database);
        fs::write(store.path(), bytes).unwrap();

        let mut store = RecordStore::new(dir.path());
        let Loaded::Record(read) = store.load().unwrap() else { panic!() };
        record.peers.remove("node-1");
        assert_eq!(*read, record);
        let mut changes = Changes::default();
        record.remove_peer("node-2", &mut changes);
        store.save(&record, &changes).unwrap();
        assert_eq!(loaded(&dir), record);
    }

    #[test]
    fn a_busy_lock_is_waited_for_with_a_deadline() {
        let dir = dir();
        let record = record_of(1);
        let mut store = written(&dir, &record).with_deadline(Duration::from_millis(50));
        let lock = File::open(dir.path().join("node.redb.lock")).unwrap();
        lock.lock_exclusive().unwrap();
        assert!(matches!(store.load(), Err(StoreError::Busy(..))));
        assert!(matches!(store.save(&record, &everything(&record)), Err(StoreError::Busy(..))));
        drop(lock);
        assert!(store.load().is_ok());
    }

    #[test]
    fn what_could_not_be_written_is_written_later() {
        let dir = dir();
        let mut record = record_of(3);
        let mut store = written(&dir, &record).with_deadline(Duration::ZERO);
        let lock = File::open(dir.path().join("node.redb.lock")).unwrap();
        lock.lock_exclusive().unwrap();
        let mut changes = Changes::default();
        record.remove_peer("node-1", &mut changes);
        assert!(store.save(&record, &changes).is_err());
        drop(lock);
        store.save(&record, &Changes::default()).unwrap();
        assert_eq!(loaded(&dir), record);
    }

    #[test]
    fn a_vanished_file_is_written_whole() {
        let dir = dir();
        let record = record_of(3);
        let mut store = written(&dir, &record);
        fs::remove_file(store.path()).unwrap();
        store.save(&record, &Changes::default()).unwrap();
        assert_eq!(loaded(&dir), record);
    }

    #[test]
    fn another_nodes_record_is_set_aside() {
        let dir = dir();
        let mut store = written(&dir, &record_of(1));
        assert_eq!(store.set_aside("other-node").unwrap(), dir.path().join("node.redb.other-node-1"));
        assert_eq!(store.load().unwrap(), Loaded::Nothing);
    }

    /// A disk that refuses; full and read-only ones are mounted in `tests/overlay_disk.rs`.
    #[test]
    fn a_refusing_disk_is_reported_and_made_up_for() {
        let dir = dir();
        let blocked = dir.path().join("state");
        File::create(&blocked).unwrap().write_all(b"not a directory").unwrap();
        let record = record_of(1);
        let mut store = RecordStore::new(&blocked);
        assert!(matches!(store.save(&record, &everything(&record)), Err(StoreError::Io(..))));
        assert!(store.load().is_err() || matches!(store.load(), Ok(Loaded::Nothing)));
        fs::remove_file(&blocked).unwrap();
        store.save(&record, &Changes::default()).unwrap();
        assert_eq!(RecordStore::new(&blocked).load().unwrap(), Loaded::Record(Box::new(record)));
    }

    #[test]
    fn timing() {
        let dir = dir();
        let mut record = record_of(5000);
        let started = Instant::now();
        let mut store = written(&dir, &record);
        let wrote = started.elapsed();
        let started = Instant::now();
        let read = loaded(&dir);
        let loaded = started.elapsed();
        let mut changes = Changes::default();
        record.remove_peer("node-7", &mut changes);
        let started = Instant::now();
        store.save(&record, &changes).unwrap();
        println!(
            "5,000 peers: {} bytes, written in {wrote:?}, read in {loaded:?}, one changed in {:?}",
            fs::metadata(store.path()).unwrap().len(),
            started.elapsed()
        );
        assert_eq!(read.peers.len(), 5000);
    }
}
