//! The record as tables of a redb database: what is in `node.redb`, whatever lies below it.
//!
//! `meta` holds the schema's number; `node` and `peers` hold one JSON document per row, so that a change of one
//! peer writes one peer, and a field added later is no new schema. redb panics on garbage, so everything here
//! runs under [`guarded`].

use super::{Changes, NodeRecord, Peer, Record};
use redb::{
    Database, ReadOnlyDatabase, ReadTransaction, ReadableDatabase, ReadableTable, StorageBackend,
    TableDefinition, TableError, WriteTransaction, backends::InMemoryBackend,
};
use std::{
    io,
    panic::{AssertUnwindSafe, catch_unwind},
};

/// The schema that this version writes. A new one is for what an older program would misunderstand.
pub(super) const SCHEMA: u32 = 1;

const META: TableDefinition<&str, u32> = TableDefinition::new("meta");
const NODE: TableDefinition<&str, &[u8]> = TableDefinition::new("node");
const PEERS: TableDefinition<&str, &[u8]> = TableDefinition::new("peers");

/// The only row of `node`.
const SELF: &str = "self";

/// The whole record fits many times over; redb's own default is a gigabyte.
const CACHE: usize = 8 << 20;

/// Why a database could not be read or written.
#[derive(Debug)]
pub(super) enum Fault {
    /// It was not left by power loss but altered, or is none of ours.
    Damaged(String),
    /// A later version wrote it.
    Newer(u32),
    /// Closed uncleanly, and opened read-only, so that it cannot be put right.
    NeedsRepair,
    /// The disk's error; the file may be good.
    Io(io::Error),
}

/// The error of every redb call, sorted.
impl<E: Into<redb::Error>> From<E> for Fault {
    fn from(error: E) -> Self {
        match error.into() {
            // These two kinds are how redb reports content, not a disk: "Not a redb database", too short.
            redb::Error::Io(e)
                if matches!(e.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof) =>
            {
                Self::Damaged(e.to_string())
            }
            redb::Error::Io(e) => Self::Io(e),
            redb::Error::RepairAborted => Self::NeedsRepair,
            // A file of a later redb. It has no error of its own.
            redb::Error::Corrupted(why) if why.starts_with("Expected file format version") => {
                Self::Newer(SCHEMA + 1)
            }
            other @ (redb::Error::DatabaseAlreadyOpen | redb::Error::PreviousIo) => {
                Self::Io(io::Error::other(other))
            }
            other => Self::Damaged(other.to_string()),
        }
    }
}

/// Runs what uses redb; a panic becomes [`Fault::Damaged`].
pub(super) fn guarded<T>(act: impl FnOnce() -> Result<T, Fault>) -> Result<T, Fault> {
    catch_unwind(AssertUnwindSafe(act)).unwrap_or_else(|panic| {
        let said = panic.downcast_ref::<String>().map(String::as_str);
        let said = said.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
        Err(Fault::Damaged(format!("reading it panicked: {said}")))
    })
}

/// Reads everything from the bytes of a file, checking all of it.
///
/// From memory, because what has to be repaired after a power cut can then be read on a read-only or full disk,
/// and a file of a later version is never opened for writing. A record of 5,000 peers takes two megabytes.
pub(super) fn read(bytes: &[u8]) -> Result<Record, Fault> {
    let memory = InMemoryBackend::new();
    memory.set_len(bytes.len() as u64)?;
    memory.write(0, bytes)?;
    let database = builder().set_check_integrity_on_open(true).create_with_backend(memory)?;
    let read = database.begin_read()?;
    check_schema(&read)?;
    let node = match read.open_table(NODE)?.get(SELF)? {
        Some(row) => {
            serde_json::from_slice::<NodeRecord>(row.value()).map_err(|e| Fault::Damaged(e.to_string()))?
        }
        None => NodeRecord::default(),
    };
    let mut record = Record { node, ..Record::default() };
    for row in read.open_table(PEERS)?.iter()? {
        let (name, row) = row?;
        match serde_json::from_slice::<Peer>(row.value()) {
            Ok(peer) => drop(record.peers.insert(name.value().to_owned(), peer)),
            Err(e) => log::warn!("the record of peer {} cannot be read and is left out: {e}", name.value()),
        }
    }
    Ok(record)
}

/// Reads only the schema's number, leaving the file as it is.
pub(super) fn check_schema_of(path: &std::path::Path) -> Result<(), Fault> {
    let database: ReadOnlyDatabase = builder().open_read_only(path)?;
    check_schema(&database.begin_read()?)
}

/// Writes what changed into a file that is there.
pub(super) fn write_changes(path: &std::path::Path, record: &Record, changes: &Changes) -> Result<(), Fault> {
    transact(builder().set_check_integrity_on_open(true).open(path)?, record, changes)
}

/// Writes everything into a file that is not there yet.
pub(super) fn write_new(path: &std::path::Path, record: &Record) -> Result<(), Fault> {
    let changes = Changes { node: true, peers: record.peers.keys().cloned().collect() };
    transact(builder().create(path)?, record, &changes)
}

fn transact(database: Database, record: &Record, changes: &Changes) -> Result<(), Fault> {
    let mut write = database.begin_write()?;
    // After a power cut the next open need not read the whole file, and a read-only open works.
    write.set_quick_repair(true);
    fill(&write, record, changes)?;
    write.commit()?;
    Ok(database.close()?)
}

fn fill(write: &WriteTransaction, record: &Record, changes: &Changes) -> Result<(), Fault> {
    write.open_table(META)?.insert("schema", SCHEMA)?;
    let mut node = write.open_table(NODE)?;
    if changes.node {
        node.insert(SELF, json(&record.node)?.as_slice())?;
    }
    let mut peers = write.open_table(PEERS)?;
    for name in &changes.peers {
        match record.peers.get(name) {
            Some(peer) => drop(peers.insert(name.as_str(), json(peer)?.as_slice())?),
            None => drop(peers.remove(name.as_str())?),
        }
    }
    Ok(())
}

fn json(value: &impl serde::Serialize) -> Result<Vec<u8>, Fault> {
    serde_json::to_vec(value).map_err(|e| Fault::Io(io::Error::other(e)))
}

fn builder() -> redb::Builder {
    let mut builder = Database::builder();
    builder.set_cache_size(CACHE);
    builder
}

fn check_schema(read: &ReadTransaction) -> Result<(), Fault> {
    let table = match read.open_table(META) {
        Err(TableError::TableDoesNotExist(_)) => {
            return Err(Fault::Damaged("it has no schema number".into()));
        }
        other => other?,
    };
    match table.get("schema")?.map(|row| row.value()) {
        Some(newer) if newer > SCHEMA => Err(Fault::Newer(newer)),
        Some(_) => Ok(()),
        None => Err(Fault::Damaged("it has no schema number".into())),
    }
}
