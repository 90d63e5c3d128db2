//! What the tests share: a model of the state in a map, shorthands, and storages that fail or forget.
#![allow(dead_code, reason = "each test file uses its own part")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests may fail loudly")]

pub mod disks;
pub mod process;

use ipam_sticky::{
    address::Address,
    allocate::Refusal,
    config::Place,
    fault::Fault,
    identity::{Identity, Key},
    ownership,
    range::{Pools, Range},
    record::{Binding, Owner},
    store::Store,
    view::{Attachment, Changes, Now, View},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    time::Duration,
};

/// The state as a plain map; every question is answered by looking at everything.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Model {
    pub bindings: BTreeMap<Key, Binding>,
    pub cursors: BTreeMap<usize, Address>,
    pub sequence: u64,
}

impl Model {
    pub fn apply(&mut self, changes: &Changes) {
        for (key, binding) in &changes.bindings {
            match binding {
                Some(binding) => self.bindings.insert(key.clone(), binding.clone()),
                None => self.bindings.remove(key),
            };
        }
        self.cursors.extend(&changes.cursors);
        self.sequence = changes.sequence.unwrap_or(self.sequence);
    }

    pub fn held(&self) -> BTreeSet<Address> {
        self.bindings.values().flat_map(Binding::held).collect()
    }

    fn after(&self, active: bool, sequence: u64) -> Option<(u64, Key)> {
        let ordered = self.bindings.iter().filter(|(_, binding)| {
            binding.spare().next().is_some()
                && binding.owner.is_some() == active
                && binding.sequence > sequence
        });
        ordered.map(|(key, binding)| (binding.sequence, key.clone())).min()
    }

    /// What must be true whatever happened.
    pub fn assert_sound(&self, pools: &Pools, given: &[Address]) {
        let all: Vec<Address> = self.bindings.values().flat_map(Binding::held).collect();
        assert_eq!(all.len(), self.held().len(), "an address is in two bindings: {self:#?}");
        for address in given {
            assert!(pools.may_give(*address), "{address} may never be given");
        }
        let mut sequences: Vec<u64> = self.bindings.values().map(|binding| binding.sequence).collect();
        sequences.sort_unstable();
        assert!(sequences.is_sorted_by(|a, b| a < b), "a sequence number twice: {self:#?}");
    }
}

impl View for Model {
    fn binding(&self, key: &Key) -> Result<Option<Binding>, Fault> {
        Ok(self.bindings.get(key).cloned())
    }

    fn holder(&self, address: Address) -> Result<Option<Key>, Fault> {
        let holds = |(_, binding): &(&Key, &Binding)| binding.held().contains(&address);
        Ok(self.bindings.iter().find(holds).map(|(key, _)| key.clone()))
    }

    fn held_until(&self, address: Address) -> Result<Option<Address>, Fault> {
        let held = self.held();
        let mut last = None;
        let mut next = Some(address);
        while let Some(address) = next.filter(|address| held.contains(address)) {
            last = Some(address);
            next = address.next();
        }
        Ok(last)
    }

    fn cursor(&self, set: usize) -> Result<Option<Address>, Fault> {
        Ok(self.cursors.get(&set).copied())
    }

    fn idle_after(&self, sequence: u64) -> Result<Option<(u64, Key)>, Fault> {
        Ok(self.after(false, sequence))
    }

    fn active_after(&self, sequence: u64) -> Result<Option<(u64, Key)>, Fault> {
        Ok(self.after(true, sequence))
    }

    fn idle_count(&self) -> Result<u64, Fault> {
        Ok(self.bindings.values().filter(|binding| binding.is_idle()).count() as u64)
    }

    fn key_of(&self, at: &Attachment) -> Result<Option<Key>, Fault> {
        let is_it = |(key, binding): &(&Key, &Binding)| {
            key.identity().ifname() == at.ifname
                && binding.containers().any(|container| container == at.container)
        };
        Ok(self.bindings.iter().find(is_it).map(|(key, _)| key.clone()))
    }

    fn sequence(&self) -> Result<u64, Fault> {
        Ok(self.sequence)
    }

    fn bindings(&self) -> Result<Vec<(Key, Binding)>, Fault> {
        Ok(self.bindings.clone().into_iter().collect())
    }
}

pub fn at(written: &str) -> Address {
    written.parse().unwrap()
}

pub fn range(subnet: &str, start: &str, end: &str) -> Range {
    let optional = |written: &str| (!written.is_empty()).then(|| at(written));
    Range::new(subnet.parse().unwrap(), optional(start), optional(end), None).unwrap()
}

pub fn pools(sets: Vec<Vec<Range>>) -> Pools {
    Pools::new(sets, &[]).unwrap()
}

pub fn pod(name: &str) -> Identity {
    Identity::pod("default", name, "eth0").unwrap()
}

pub fn owner(container: &str, boot: &str) -> Owner {
    Owner::new(container, "/gone", boot, "")
}

pub fn attachment(container: &str) -> Attachment {
    Attachment { container: container.into(), ifname: "eth0".into() }
}

pub const BOOT: &str = "this boot";

/// Nothing lives; ten thousand idle bindings.
pub fn now() -> Now<'static> {
    Now { boot: BOOT, lives: &|_| false, max_idle: 10_000 }
}

/// A directory of its own; in memory where it can be had, since these tests bring their own disks.
pub fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

/// A place of its own.
pub fn place(dir: &Path) -> Place {
    let mut place = Place::new("net", dir.join("data"));
    place.run_dir = dir.join("run");
    place.cache_dir = dir.join("cache");
    place.lock_timeout = Duration::from_secs(5);
    place
}

pub fn store(dir: &Path) -> Store {
    Store::new(place(dir), BOOT.into())
}

/// ADD through the store.
pub fn add(
    store: &Store,
    pools: &Pools,
    name: &str,
    container: &str,
) -> Result<Vec<Address>, ipam_sticky::store::Error> {
    let identity = pod(name);
    let decide = |view: &dyn View| {
        ownership::acquire(pools, view, &identity, owner(container, store.now().boot), &[], &store.now())
    };
    store.serve(&decide)
}

/// DEL through the store.
pub fn del(store: &Store, container: &str) -> Result<(), ipam_sticky::store::Error> {
    let decide = |view: &dyn View| -> Result<_, Refusal> {
        Ok(((), ownership::release(view, &attachment(container), &store.now())?))
    };
    store.serve(&decide)
}

/// Everything in the state, and that it is consistent.
pub fn contents(store: &Store) -> BTreeMap<Key, Binding> {
    let read = |database: &mut _| {
        let snapshot = ipam_sticky::tables::Snapshot::of(database)?;
        Ok((ipam_sticky::audit::audit(&snapshot)?, snapshot.bindings()?))
    };
    let (wrong, bindings) = store.look(&read).unwrap();
    assert_eq!(wrong, Vec::<String>::new());
    bindings.into_iter().collect()
}
