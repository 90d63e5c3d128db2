//! Who owns which binding after ADD, DEL, GC and a person's commands. Pure: a view in, changes out.
//!
//! Ownership is by container id and interface, never by address. ADD of a new container before DEL of the old
//! one is the normal order after a reboot, and DEL comes twice. A former owner whose network namespace is still
//! there is remembered: if the new container's ADD fails, its DEL hands the binding back.

use crate::{
    address::Address,
    allocate::{Loss, Refusal, Wish, choose, take_over},
    fault::Fault,
    identity::{Identity, Key},
    range::Pools,
    record::{Binding, Owner},
    view::{Attachment, Changes, Draft, Now, View},
};
use std::collections::HashSet;

/// Former owners remembered per binding; a kubelet that fails again and again makes more.
const FORMER: usize = 4;

/// Idle bindings forgotten by one verb, so that lowering `maxIdle` does not stall a pod.
const TRIM: usize = 64;

/// ADD: the addresses of an identity, owned by this container from now on.
///
/// # Errors
/// Why it gets none; then nothing changes.
pub fn acquire(
    pools: &Pools,
    view: &dyn View,
    identity: &Identity,
    owner: Owner,
    requested: &[Address],
    now: &Now,
) -> Result<(Vec<Address>, Changes), Refusal> {
    let key = identity.key();
    let mut draft = Draft::new(view);
    let choice = choose(pools, view, Wish { key: &key, requested }, now)?;
    let old = view.binding(&key)?.unwrap_or_default();
    if old.addresses == choice.addresses && old.owner.as_ref() == Some(&owner) {
        return Ok((choice.addresses, draft.changes));
    }
    // The same container under another name: what it had is not its any more.
    let at = Attachment { container: owner.container.clone(), ifname: identity.ifname().into() };
    if view.key_of(&at)?.is_some_and(|had| had != key) {
        drop_container(&mut draft, view, &at, now)?;
    }
    for loss in &choice.losses {
        lose(&mut draft, loss)?;
    }
    let mut former = old.former;
    former.extend(old.owner);
    former.retain(|former| former.container != owner.container && now.may_live(former));
    former.drain(..former.len().saturating_sub(FORMER));
    let sequence = draft.next_sequence()?;
    let addresses = choice.addresses.clone();
    draft.put(&key, Binding { sequence, addresses, pins: old.pins, owner: Some(owner), former });
    draft.changes.cursors.extend(choice.cursors);
    trim(&mut draft, view, now)?;
    Ok((choice.addresses, draft.changes))
}

/// DEL: the binding becomes its former owner's, or idle, if this container owns it; otherwise nothing.
///
/// # Errors
/// The view's.
pub fn release(view: &dyn View, at: &Attachment, now: &Now) -> Result<Changes, Fault> {
    let mut draft = Draft::new(view);
    drop_container(&mut draft, view, at, now)?;
    trim(&mut draft, view, now)?;
    Ok(draft.changes)
}

fn drop_container(draft: &mut Draft, view: &dyn View, at: &Attachment, now: &Now) -> Result<(), Fault> {
    let Some(key) = view.key_of(at)? else {
        return Ok(());
    };
    let mut binding = draft.existing(&key)?;
    let owns = binding.owner.as_ref().is_some_and(|owner| owner.container == at.container);
    if !owns {
        binding.former.retain(|former| former.container != at.container);
        draft.put(&key, binding);
        return Ok(());
    }
    binding.former.retain(|former| now.may_live(former));
    let heir = binding.former.pop();
    pass_on(draft, &key, binding, heir)
}

/// Gives the binding to another owner, or to none.
fn pass_on(draft: &mut Draft, key: &Key, binding: Binding, heir: Option<Owner>) -> Result<(), Fault> {
    if heir.is_none() && binding.pins.is_empty() && !key.identity().is_sticky() {
        draft.forget(key);
        return Ok(());
    }
    let sequence = draft.next_sequence()?;
    draft.put(key, Binding { sequence, owner: heir, ..binding });
    Ok(())
}

/// GC: every owner that is not listed is gone.
///
/// # Errors
/// The view's.
pub fn collect(view: &dyn View, valid: &HashSet<Attachment>, now: &Now) -> Result<Changes, Fault> {
    let mut draft = Draft::new(view);
    for (key, mut binding) in view.bindings()? {
        let ifname = key.identity().ifname().to_owned();
        let is_valid = |owner: &Owner| {
            valid.contains(&Attachment { container: owner.container.clone(), ifname: ifname.clone() })
        };
        let before = binding.former.len();
        binding.former.retain(|former| is_valid(former));
        if binding.owner.as_ref().is_some_and(|owner| !is_valid(owner)) {
            let heir = binding.former.pop();
            pass_on(&mut draft, &key, binding, heir)?;
        } else if binding.former.len() != before {
            draft.put(&key, binding);
        }
    }
    trim(&mut draft, view, now)?;
    Ok(draft.changes)
}

/// Forgets the idle bindings released longest ago when there would be more than `maxIdle`.
fn trim(draft: &mut Draft, view: &dyn View, now: &Now) -> Result<(), Fault> {
    let is_idle = |binding: &Option<Binding>| binding.as_ref().is_some_and(Binding::is_idle);
    let mut idle = view.idle_count()?;
    let mut fresh = Vec::new();
    for (key, new) in &draft.changes.bindings {
        match (is_idle(&view.binding(key)?), is_idle(new)) {
            (true, false) => idle = idle.saturating_sub(1),
            (false, true) => {
                idle = idle.saturating_add(1);
                fresh.push(key.clone());
            }
            _ => {}
        }
    }
    let mut surplus = usize::try_from(idle.saturating_sub(now.max_idle)).unwrap_or(TRIM).min(TRIM);
    let mut after = 0;
    while surplus > 0 {
        let Some((sequence, key)) = view.idle_after(after)? else {
            // Only those are left that this very verb made idle.
            for key in fresh.iter().take(surplus) {
                let binding = draft.existing(key)?;
                draft.strip(key, binding);
            }
            break;
        };
        after = sequence;
        if let Some(binding) = draft.binding(&key)?.filter(Binding::is_idle) {
            draft.strip(&key, binding);
            surplus -= 1;
        }
    }
    Ok(())
}

fn lose(draft: &mut Draft, loss: &Loss) -> Result<(), Fault> {
    match loss {
        Loss::Binding(key) => {
            // Gone already when it was this very container's under another name.
            if let Some(binding) = draft.binding(key)? {
                draft.strip(key, binding);
            }
        }
        Loss::Address(key, address) => {
            // Forgotten already when another set took the whole binding.
            if let Some(mut binding) = draft.binding(key)? {
                binding.addresses.retain(|held| held != address);
                // Who loses an address is idle, or of an earlier boot; with the last one goes the owner.
                binding.owner = binding.owner.filter(|_| !binding.addresses.is_empty());
                draft.put(key, binding);
            }
        }
    }
    Ok(())
}

/// Promises an address to a pod: nobody else gets it, idle or not yet seen.
///
/// # Errors
/// When it is in use by, or pinned to, another.
pub fn pin(view: &dyn View, key: &Key, address: Address, now: &Now) -> Result<Changes, Refusal> {
    let mut draft = Draft::new(view);
    let mut binding = view.binding(key)?.unwrap_or_default();
    if binding.pins.contains(&address) {
        return Ok(draft.changes);
    }
    if let Some(loss) = take_over(view, key, address, now)? {
        lose(&mut draft, &loss)?;
    }
    if binding.sequence == 0 {
        binding.sequence = draft.next_sequence()?;
    }
    binding.pins.push(address);
    draft.put(key, binding);
    Ok(draft.changes)
}

/// Takes the promise back: one address, or all. The pod keeps what it has, like any other.
///
/// # Errors
/// The view's.
pub fn unpin(view: &dyn View, key: &Key, address: Option<Address>, now: &Now) -> Result<Changes, Fault> {
    let mut draft = Draft::new(view);
    if let Some(mut binding) = view.binding(key)? {
        let before = binding.pins.len();
        binding.pins.retain(|pin| address.is_some_and(|address| address != *pin));
        if binding.pins.len() != before {
            draft.put(key, binding);
        }
    }
    trim(&mut draft, view, now)?;
    Ok(draft.changes)
}

/// Whether the container of an active binding is certainly gone: of an earlier boot, or its namespace vanished.
#[must_use]
pub fn is_gone(owner: &Owner, now: &Now) -> bool {
    now.is_stale(owner) || (!owner.netns.is_empty() && !(now.lives)(&owner.netns))
}

/// Makes bindings idle whose container is certainly gone.
///
/// # Errors
/// The view's.
pub fn free_gone(view: &dyn View, now: &Now) -> Result<Changes, Fault> {
    let mut draft = Draft::new(view);
    for (key, mut binding) in view.bindings()? {
        if binding.owner.as_ref().is_some_and(|owner| is_gone(owner, now)) {
            binding.former.retain(|former| now.may_live(former));
            let heir = binding.former.pop();
            pass_on(&mut draft, &key, binding, heir)?;
        }
    }
    trim(&mut draft, view, now)?;
    Ok(draft.changes)
}
