//! The tables of the state file: how they are read, and how a binding is written into all of them at once.
//!
//! | table | key | value |
//! |---|---|---|
//! | `bindings` | namespace/pod/ifname | record (see `record.rs`) |
//! | `addresses` | address | whose binding it is in |
//! | `runs` | first address of an unbroken run of held ones | its last |
//! | `idle`, `active` | sequence | key of a binding with an address that is not pinned |
//! | `owners` | container/ifname | key of the binding it owns, or owned and may still use |
//! | `meta` | `schema`, `sequence`, `note`, `cursor/N` | number |
//!
//! All but the first and the last follow from `bindings`; only [`write()`] touches them.

use crate::{
    address::Address,
    fault::Fault,
    identity::Key,
    record::Binding,
    view::{Attachment, Changes, View},
};
use redb::{
    Database, ReadTransaction, ReadableDatabase, ReadableTable, ReadableTableMetadata, Table,
    TableDefinition, WriteTransaction,
};
use std::collections::BTreeMap;

const BINDINGS: TableDefinition<&str, &[u8]> = TableDefinition::new("bindings");
const ADDRESSES: TableDefinition<u128, &str> = TableDefinition::new("addresses");
const RUNS: TableDefinition<u128, u128> = TableDefinition::new("runs");
const IDLE: TableDefinition<u64, &str> = TableDefinition::new("idle");
const ACTIVE: TableDefinition<u64, &str> = TableDefinition::new("active");
const OWNERS: TableDefinition<&str, &str> = TableDefinition::new("owners");
const META: TableDefinition<&str, u128> = TableDefinition::new("meta");

/// The layout above. A file with a greater number is left alone.
pub const SCHEMA: u128 = 1;

/// Which of the indexes by sequence a binding is in.
pub(crate) fn place(binding: &Binding) -> Option<(bool, u64)> {
    binding.spare().next().map(|_| (binding.owner.is_some(), binding.sequence))
}

fn owner_key(at: &Attachment) -> String {
    format!("{}/{}", at.container, at.ifname)
}

/// What the tables beside `bindings` say, all of it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Indexes {
    pub addresses: BTreeMap<u128, String>,
    pub runs: BTreeMap<u128, u128>,
    pub idle: BTreeMap<u64, String>,
    pub active: BTreeMap<u64, String>,
    pub owners: BTreeMap<String, String>,
}

/// A snapshot of the state.
pub struct Snapshot(ReadTransaction);

impl Snapshot {
    /// The state as last committed.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn of(database: &Database) -> Result<Self, Fault> {
        Ok(Self(database.begin_read()?))
    }

    /// The schema of the file.
    ///
    /// # Errors
    /// Damage, when it has none.
    pub fn schema(&self) -> Result<u128, Fault> {
        self.meta("schema")?.ok_or_else(|| Fault::Damaged("it has no schema version".into()))
    }

    /// The note that was merged last.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn last_note(&self) -> Result<Option<u128>, Fault> {
        self.meta("note")
    }

    /// Picks the records that pass their check sum out of a damaged file, from the first on and from the last
    /// back, until redb gives up. Two calls, because redb may panic in either.
    pub(crate) fn salvage(&self, backwards: bool, found: &mut BTreeMap<Key, Binding>) -> Result<(), Fault> {
        let table = self.0.open_table(BINDINGS)?;
        let mut entries = table.iter()?;
        while let Some(entry) = if backwards { entries.next_back() } else { entries.next() } {
            let (key, record) = entry?;
            if let Ok(key) = parse(key.value())
                && let Ok(binding) = decode(&key, record.value())
            {
                found.insert(key, binding);
            }
        }
        Ok(())
    }

    pub(crate) fn indexes(&self) -> Result<Indexes, Fault> {
        let mut all = Indexes::default();
        for entry in self.0.open_table(ADDRESSES)?.iter()? {
            let (address, key) = entry?;
            all.addresses.insert(address.value(), key.value().into());
        }
        for entry in self.0.open_table(RUNS)?.iter()? {
            let (first, last) = entry?;
            all.runs.insert(first.value(), last.value());
        }
        for (table, order) in [(IDLE, &mut all.idle), (ACTIVE, &mut all.active)] {
            for entry in self.0.open_table(table)?.iter()? {
                let (sequence, key) = entry?;
                order.insert(sequence.value(), key.value().into());
            }
        }
        for entry in self.0.open_table(OWNERS)?.iter()? {
            let (owner, key) = entry?;
            all.owners.insert(owner.value().into(), key.value().into());
        }
        Ok(all)
    }

    fn meta(&self, name: &str) -> Result<Option<u128>, Fault> {
        Ok(self.0.open_table(META)?.get(name)?.map(|value| value.value()))
    }

    fn after(
        &self,
        table: TableDefinition<u64, &'static str>,
        sequence: u64,
    ) -> Result<Option<(u64, Key)>, Fault> {
        let Some(from) = sequence.checked_add(1) else { return Ok(None) };
        let table = self.0.open_table(table)?;
        let next = table.range(from..)?.next().transpose()?;
        next.map(|(sequence, key)| Ok((sequence.value(), parse(key.value())?))).transpose()
    }
}

impl View for Snapshot {
    fn binding(&self, key: &Key) -> Result<Option<Binding>, Fault> {
        let found = self.0.open_table(BINDINGS)?.get(key.as_str())?;
        found.map(|record| decode(key, record.value())).transpose()
    }

    fn holder(&self, address: Address) -> Result<Option<Key>, Fault> {
        let found = self.0.open_table(ADDRESSES)?.get(address.0)?;
        found.map(|key| parse(key.value())).transpose()
    }

    fn held_until(&self, address: Address) -> Result<Option<Address>, Fault> {
        let runs = self.0.open_table(RUNS)?;
        let run = runs.range(..=address.0)?.next_back().transpose()?;
        Ok(run.map(|(_, last)| Address(last.value())).filter(|last| *last >= address))
    }

    fn cursor(&self, set: usize) -> Result<Option<Address>, Fault> {
        Ok(self.meta(&format!("cursor/{set}"))?.map(Address))
    }

    fn idle_after(&self, sequence: u64) -> Result<Option<(u64, Key)>, Fault> {
        self.after(IDLE, sequence)
    }

    fn active_after(&self, sequence: u64) -> Result<Option<(u64, Key)>, Fault> {
        self.after(ACTIVE, sequence)
    }

    fn idle_count(&self) -> Result<u64, Fault> {
        Ok(self.0.open_table(IDLE)?.len()?)
    }

    fn key_of(&self, at: &Attachment) -> Result<Option<Key>, Fault> {
        let found = self.0.open_table(OWNERS)?.get(owner_key(at).as_str())?;
        found.map(|key| parse(key.value())).transpose()
    }

    fn sequence(&self) -> Result<u64, Fault> {
        let sequence = self.meta("sequence")?.unwrap_or_default();
        u64::try_from(sequence).map_err(|_| Fault::Damaged(format!("sequence number {sequence}")))
    }

    fn bindings(&self) -> Result<Vec<(Key, Binding)>, Fault> {
        let mut bindings = Vec::new();
        for entry in self.0.open_table(BINDINGS)?.iter()? {
            let (key, record) = entry?;
            let key = parse(key.value())?;
            bindings.push((key.clone(), decode(&key, record.value())?));
        }
        Ok(bindings)
    }
}

fn parse(key: &str) -> Result<Key, Fault> {
    Key::parse(key).ok_or_else(|| Fault::Damaged(format!("{key:?} is no binding's key")))
}

fn decode(key: &Key, record: &[u8]) -> Result<Binding, Fault> {
    Binding::decode(key, record)
        .ok_or_else(|| Fault::Damaged(format!("the record of {key} fails its check sum")))
}

/// Writes the tables of a new file.
///
/// # Errors
/// When redb refuses.
pub fn create(transaction: &WriteTransaction) -> Result<(), Fault> {
    transaction.open_table(BINDINGS)?;
    transaction.open_table(ADDRESSES)?;
    transaction.open_table(RUNS)?;
    transaction.open_table(IDLE)?;
    transaction.open_table(ACTIVE)?;
    transaction.open_table(OWNERS)?;
    transaction.open_table(META)?.insert("schema", SCHEMA)?;
    Ok(())
}

/// Carries out changes. `note` is the last note they contain.
///
/// # Errors
/// When redb refuses, or when an address would belong to two: then nothing must be committed.
pub fn write(transaction: &WriteTransaction, changes: &Changes, note: Option<u128>) -> Result<(), Fault> {
    let mut writer = Writer {
        bindings: transaction.open_table(BINDINGS)?,
        addresses: transaction.open_table(ADDRESSES)?,
        runs: transaction.open_table(RUNS)?,
        idle: transaction.open_table(IDLE)?,
        active: transaction.open_table(ACTIVE)?,
        owners: transaction.open_table(OWNERS)?,
    };
    // First everything that goes, then everything that comes: an address may move between two of them.
    let mut before = Vec::with_capacity(changes.bindings.len());
    for (key, new) in &changes.bindings {
        let old = writer.bindings.get(key.as_str())?.map(|record| decode(key, record.value())).transpose()?;
        writer.remove(key, old.as_ref(), new.as_ref())?;
        before.push(old);
    }
    for ((key, new), old) in changes.bindings.iter().zip(before) {
        writer.add(key, old.as_ref(), new.as_ref())?;
    }
    let mut meta = transaction.open_table(META)?;
    for (set, address) in &changes.cursors {
        meta.insert(format!("cursor/{set}").as_str(), address.0)?;
    }
    for (name, value) in [("sequence", changes.sequence.map(u128::from)), ("note", note)] {
        if let Some(value) = value {
            meta.insert(name, value)?;
        }
    }
    Ok(())
}

struct Writer<'t> {
    bindings: Table<'t, &'static str, &'static [u8]>,
    addresses: Table<'t, u128, &'static str>,
    runs: Table<'t, u128, u128>,
    idle: Table<'t, u64, &'static str>,
    active: Table<'t, u64, &'static str>,
    owners: Table<'t, &'static str, &'static str>,
}

/// What is in the first list and not in the second.
fn without<T: PartialEq>(all: Vec<T>, other: &[T]) -> Vec<T> {
    all.into_iter().filter(|item| !other.contains(item)).collect()
}

fn held(binding: Option<&Binding>) -> Vec<Address> {
    binding.map(Binding::held).unwrap_or_default()
}

pub(crate) fn owner_keys(key: &Key, binding: Option<&Binding>) -> Vec<String> {
    let Some(binding) = binding else { return Vec::new() };
    let ifname = key.identity().ifname().to_owned();
    let at = |container: &str| Attachment { container: container.into(), ifname: ifname.clone() };
    binding.containers().map(|container| owner_key(&at(container))).collect()
}

impl<'t> Writer<'t> {
    fn remove(&mut self, key: &Key, old: Option<&Binding>, new: Option<&Binding>) -> Result<(), Fault> {
        for address in without(held(old), &held(new)) {
            self.addresses.remove(address.0)?;
            self.split_run(address)?;
        }
        for owner in without(owner_keys(key, old), &owner_keys(key, new)) {
            self.owners.remove(owner.as_str())?;
        }
        let (old_order, new_order) = (old.and_then(place), new.and_then(place));
        if let Some((active, sequence)) = old_order.filter(|_| old_order != new_order) {
            self.order(active).remove(sequence)?;
        }
        if new.is_none() {
            self.bindings.remove(key.as_str())?;
        }
        Ok(())
    }

    fn add(&mut self, key: &Key, old: Option<&Binding>, new: Option<&Binding>) -> Result<(), Fault> {
        let Some(binding) = new else { return Ok(()) };
        for address in without(held(new), &held(old)) {
            let other = self.addresses.insert(address.0, key.as_str())?.map(|other| other.value().to_owned());
            if let Some(other) = other {
                return Err(Fault::Damaged(format!("{address} would belong to {other} and to {key}")));
            }
            self.join_run(address)?;
        }
        for owner in without(owner_keys(key, new), &owner_keys(key, old)) {
            self.owners.insert(owner.as_str(), key.as_str())?;
        }
        let (old_order, new_order) = (old.and_then(place), place(binding));
        if let Some((active, sequence)) = new_order.filter(|_| old_order != new_order) {
            self.order(active).insert(sequence, key.as_str())?;
        }
        self.bindings.insert(key.as_str(), binding.encode(key).as_slice())?;
        Ok(())
    }

    fn order(&mut self, active: bool) -> &mut Table<'t, u64, &'static str> {
        if active { &mut self.active } else { &mut self.idle }
    }

    /// Takes an address out of the run it is in.
    fn split_run(&mut self, address: Address) -> Result<(), Fault> {
        let run = self.runs.range(..=address.0)?.next_back().transpose()?;
        let run = run.map(|(first, last)| (first.value(), last.value()));
        let Some((first, last)) = run.filter(|(_, last)| *last >= address.0) else {
            return Err(Fault::Damaged(format!("{address} is in no run of held addresses")));
        };
        if first == address.0 {
            self.runs.remove(first)?;
        } else {
            self.runs.insert(first, address.0 - 1)?;
        }
        if last > address.0 {
            self.runs.insert(address.0 + 1, last)?;
        }
        Ok(())
    }

    /// Puts an address into the runs, joining those that it touches.
    fn join_run(&mut self, address: Address) -> Result<(), Fault> {
        let before = self.runs.range(..=address.0)?.next_back().transpose()?;
        let before = before.map(|(first, last)| (first.value(), last.value()));
        if before.is_some_and(|(_, last)| last >= address.0) {
            return Err(Fault::Damaged(format!("{address} is in a run of held addresses already")));
        }
        let touches = before.filter(|(_, last)| last.checked_add(1) == Some(address.0));
        let first = touches.map_or(address.0, |(first, _)| first);
        let after = match address.next() {
            Some(next) => self.runs.remove(next.0)?.map(|last| last.value()),
            None => None,
        };
        self.runs.insert(first, after.unwrap_or(address.0))?;
        Ok(())
    }
}
