//! The state as the decisions see it, and the changes they ask for. No disk in sight: the store answers from a
//! transaction, tests from a map.

use crate::{
    address::Address,
    fault::Fault,
    identity::Key,
    record::{Binding, Owner},
};
use std::collections::BTreeMap;

/// A container's interface: who ADD and DEL are about.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Attachment {
    /// `CNI_CONTAINERID`
    pub container: String,
    /// `CNI_IFNAME`
    pub ifname: String,
}

/// Questions that are answered without walking through all bindings, but for the two that ask for all.
pub trait View {
    /// The binding of an identity.
    fn binding(&self, key: &Key) -> Result<Option<Binding>, Fault>;
    /// Whose binding an address is in.
    fn holder(&self, address: Address) -> Result<Option<Key>, Fault>;
    /// The last address of the unbroken run of held addresses that this one is in; `None` if it is not held.
    fn held_until(&self, address: Address) -> Result<Option<Address>, Fault>;
    /// The address that was given last out of a range set.
    fn cursor(&self, set: usize) -> Result<Option<Address>, Fault>;
    /// The idle binding that became idle next after this point and has an address that is not pinned.
    fn idle_after(&self, sequence: u64) -> Result<Option<(u64, Key)>, Fault>;
    /// The same of owned bindings, by the time they were taken.
    fn active_after(&self, sequence: u64) -> Result<Option<(u64, Key)>, Fault>;
    /// How many there are of those.
    fn idle_count(&self) -> Result<u64, Fault>;
    /// The binding that an attachment owns, or owned and may still use.
    fn key_of(&self, at: &Attachment) -> Result<Option<Key>, Fault>;
    /// The last number given out by [`Draft::next_sequence`].
    fn sequence(&self) -> Result<u64, Fault>;
    /// Every binding, by key.
    fn bindings(&self) -> Result<Vec<(Key, Binding)>, Fault>;
}

/// What a verb wants changed. Everything happens in one transaction or not at all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// New contents; `None` forgets the binding.
    pub bindings: BTreeMap<Key, Option<Binding>>,
    /// The address given last, by range set.
    pub cursors: BTreeMap<usize, Address>,
    /// The last sequence number used, if any was.
    pub sequence: Option<u64>,
}

impl Changes {
    /// Whether there is nothing to write.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.bindings.is_empty() && self.cursors.is_empty()
    }
}

/// Changes in the making: reads its own writes.
pub struct Draft<'v> {
    view: &'v dyn View,
    /// What has been decided so far.
    pub changes: Changes,
}

impl<'v> Draft<'v> {
    /// Nothing decided yet.
    #[must_use]
    pub fn new(view: &'v dyn View) -> Self {
        Self { view, changes: Changes::default() }
    }

    /// The binding as it will be.
    ///
    /// # Errors
    /// The view's.
    pub fn binding(&self, key: &Key) -> Result<Option<Binding>, Fault> {
        match self.changes.bindings.get(key) {
            Some(changed) => Ok(changed.clone()),
            None => self.view.binding(key),
        }
    }

    /// The binding that an index of the state points to.
    ///
    /// # Errors
    /// Damage, when it is not there.
    pub fn existing(&self, key: &Key) -> Result<Binding, Fault> {
        self.binding(key)?.ok_or_else(|| Fault::Damaged(format!("the binding of {key} is missing")))
    }

    /// Writes a binding. One without owner, address and pin says nothing, and is forgotten.
    pub fn put(&mut self, key: &Key, binding: Binding) {
        let empty = binding.owner.is_none() && binding.held().is_empty();
        self.changes.bindings.insert(key.clone(), (!empty).then_some(binding));
    }

    /// Takes from a binding what is not pinned; without a pin it is forgotten.
    pub fn strip(&mut self, key: &Key, mut binding: Binding) {
        let Binding { addresses, pins, .. } = &mut binding;
        addresses.retain(|address| pins.contains(address));
        // Only those without a container, or with one of an earlier boot, are stripped.
        binding.owner = None;
        self.put(key, binding);
    }

    /// Forgets a binding.
    pub fn forget(&mut self, key: &Key) {
        self.changes.bindings.insert(key.clone(), None);
    }

    /// A number greater than every one before it.
    ///
    /// # Errors
    /// The view's.
    pub fn next_sequence(&mut self) -> Result<u64, Fault> {
        let last = match self.changes.sequence {
            Some(sequence) => sequence,
            None => self.view.sequence()?,
        };
        let next = last.saturating_add(1);
        self.changes.sequence = Some(next);
        Ok(next)
    }
}

/// What the node knows besides the state.
pub struct Now<'a> {
    /// This boot's id; empty when it cannot be read.
    pub boot: &'a str,
    /// Whether a network namespace is still there.
    pub lives: &'a dyn Fn(&str) -> bool,
    /// How many idle bindings are kept.
    pub max_idle: u64,
}

impl Now<'_> {
    /// Whether the owner is of an earlier boot: its container is gone, and its DEL may never come.
    #[must_use]
    pub fn is_stale(&self, owner: &Owner) -> bool {
        !self.boot.is_empty() && owner.boot != self.boot
    }

    /// Whether the container may still run.
    #[must_use]
    pub fn may_live(&self, owner: &Owner) -> bool {
        !self.is_stale(owner) && !owner.netns.is_empty() && (self.lives)(&owner.netns)
    }
}
