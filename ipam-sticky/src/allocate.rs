//! Which addresses a pod gets, or why none: `choose(ranges, state, wish)`. Pure.
//!
//! In this order, for each range set: what was asked for; what is pinned to the pod; what it had; a fresh
//! address, round robin; the address of the idle binding released longest ago; that of an owner from an earlier
//! boot. All sets or none.
//!
//! Cost does not depend on how many bindings there are: held addresses are known as unbroken runs, so the search
//! for a fresh one jumps over a run in one step.

use crate::{
    address::Address,
    fault::Fault,
    identity::Key,
    range::{Pools, Range, RangeSet, Span},
    record::Binding,
    view::{Now, View},
};
use std::fmt;

/// What a pod asks for.
#[derive(Debug, Clone, Copy)]
pub struct Wish<'a> {
    /// Whose addresses they will be.
    pub key: &'a Key,
    /// Addresses it must get.
    pub requested: &'a [Address],
}

/// The answer.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Choice {
    /// One address per range set, in the order of the configuration.
    pub addresses: Vec<Address>,
    /// What others lose for it.
    pub losses: Vec<Loss>,
    /// Where the round robin of a set has come to.
    pub cursors: Vec<(usize, Address)>,
}

/// What a binding that is not in use gives up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Loss {
    /// All of it that is not pinned: the addresses ran out.
    Binding(Key),
    /// The one address that somebody asked for by name.
    Address(Key, Address),
}

/// Why there is no address.
#[derive(Debug)]
pub enum Refusal {
    /// Every address of a range set is in use or promised.
    Exhausted(String),
    /// A requested address cannot be had.
    NotAvailable {
        /// The address asked for.
        address: Address,
        /// Who has it, or what it is.
        why: String,
    },
    /// The state cannot be read.
    Fault(Fault),
}

impl From<Fault> for Refusal {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exhausted(ranges) => write!(
                f,
                "no address is left in {ranges}: every one is in use or pinned; \
                 enlarge the range, or see `ipam-sticky list` for who has them"
            ),
            Self::NotAvailable { address, why } => {
                write!(f, "the requested address {address} cannot be given: {why}")
            }
            Self::Fault(fault) => fault.fmt(f),
        }
    }
}

/// Chooses one address out of every range set.
///
/// # Errors
/// The first set that has none to give.
pub fn choose(pools: &Pools, view: &dyn View, wish: Wish, now: &Now) -> Result<Choice, Refusal> {
    let wanted = by_set(pools, wish.requested)?;
    let mine = view.binding(wish.key)?.unwrap_or_default();
    let mut choice = Choice::default();
    for (set, ranges) in pools.sets().iter().enumerate() {
        let within = |address: &Address| {
            pools.may_give(*address) && ranges.iter().any(|range| range.span.contains(*address))
        };
        let kept = mine.pins.iter().chain(&mine.addresses).copied().find(within);
        let address = if let Some(requested) = wanted.get(set).copied().flatten() {
            choice.losses.extend(take_over(view, wish.key, requested, now)?);
            requested
        } else if let Some(kept) = kept {
            kept
        } else if let Some(fresh) = fresh(pools, view, set, ranges)? {
            choice.cursors.push((set, fresh));
            fresh
        } else if let Some(given_up) = reclaim(view, wish.key, &mut choice.losses, &within, now)? {
            choice.cursors.push((set, given_up));
            given_up
        } else {
            return Err(Refusal::Exhausted(describe(ranges)));
        };
        choice.addresses.push(address);
    }
    Ok(choice)
}

/// The requested address of each set. Each must be one that can be given at all.
fn by_set(pools: &Pools, requested: &[Address]) -> Result<Vec<Option<Address>>, Refusal> {
    let mut wanted = vec![None; pools.sets().len()];
    for address in requested {
        let refuse = |why: &str| Err(Refusal::NotAvailable { address: *address, why: why.into() });
        let Some((set, range)) = pools.find(*address) else {
            return refuse("it is in none of the configured ranges");
        };
        if *address == range.gateway {
            return refuse("it is the gateway's");
        }
        if pools.never_until(*address).is_some() {
            return refuse(
                "it is a network or broadcast address, a gateway, or excluded by the configuration",
            );
        }
        match wanted.get_mut(set) {
            Some(Some(other)) if *other != *address => {
                return refuse("another address of the same range set is requested too, and a pod gets one");
            }
            Some(slot) => *slot = Some(*address),
            None => {}
        }
    }
    Ok(wanted)
}

/// Who must give up a requested address; an error when they need not.
pub(crate) fn take_over(
    view: &dyn View,
    key: &Key,
    address: Address,
    now: &Now,
) -> Result<Option<Loss>, Refusal> {
    let Some(holder) = view.holder(address)?.filter(|holder| holder != key) else {
        return Ok(None);
    };
    let binding = existing(view, &holder)?;
    let refuse = |why| Err(Refusal::NotAvailable { address, why });
    if binding.pins.contains(&address) {
        return refuse(format!("it is pinned to {holder}"));
    }
    match &binding.owner {
        Some(owner) if !now.is_stale(owner) => {
            refuse(format!("it is in use by {holder}, container {}", owner.container))
        }
        _ => Ok(Some(Loss::Address(holder, address))),
    }
}

/// The next free address after the one given last, going around once.
fn fresh(pools: &Pools, view: &dyn View, set: usize, ranges: &RangeSet) -> Result<Option<Address>, Fault> {
    for span in going_around(ranges, view.cursor(set)?) {
        let mut next = Some(span.first);
        while let Some(address) = next.filter(|address| *address <= span.last) {
            let occupied = match pools.never_until(address) {
                Some(last) => Some(last),
                None => view.held_until(address)?,
            };
            match occupied {
                None => return Ok(Some(address)),
                Some(last) => next = last.next(),
            }
        }
    }
    Ok(None)
}

/// The ranges as spans, beginning after the cursor and ending with it.
fn going_around(ranges: &RangeSet, cursor: Option<Address>) -> Vec<Span> {
    let spans: Vec<Span> = ranges.iter().map(|range| range.span).collect();
    let at = cursor.and_then(|cursor| Some((spans.iter().position(|span| span.contains(cursor))?, cursor)));
    let Some((at, cursor)) = at else {
        return spans;
    };
    let (before, from) = spans.split_at(at);
    let mut around = Vec::with_capacity(spans.len() + 1);
    if let Some((current, after)) = from.split_first() {
        around.extend(cursor.next().map(|first| Span { first, ..*current }));
        around.extend(after);
        around.extend(before);
        around.push(Span { last: cursor, ..*current });
    }
    around
}

/// An address of a binding that nobody uses: given up already for another set, or idle longest, or owned in an
/// earlier boot.
fn reclaim(
    view: &dyn View,
    key: &Key,
    losses: &mut Vec<Loss>,
    within: &dyn Fn(&Address) -> bool,
    now: &Now,
) -> Result<Option<Address>, Fault> {
    for loss in losses.iter() {
        if let Loss::Binding(loser) = loss
            && let Some(address) = existing(view, loser)?.spare().find(within)
        {
            return Ok(Some(address));
        }
    }
    let mut candidates = Candidates::new(view, now);
    while let Some((loser, binding, _)) = candidates.advance()? {
        if loser == *key {
            continue;
        }
        if let Some(address) = binding.spare().find(within)
            && !losses.contains(&Loss::Address(loser.clone(), address))
        {
            losses.push(Loss::Binding(loser));
            return Ok(Some(address));
        }
    }
    Ok(None)
}

/// Why a binding may be reclaimed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// Its pod's container is gone.
    Idle,
    /// Its owner was made in an earlier boot.
    EarlierBoot,
}

/// The bindings that may be reclaimed, in the order in which they would be.
pub struct Candidates<'a> {
    view: &'a dyn View,
    now: &'a Now<'a>,
    reason: Reason,
    after: u64,
}

impl<'a> Candidates<'a> {
    /// From the first.
    #[must_use]
    pub fn new(view: &'a dyn View, now: &'a Now<'a>) -> Self {
        Self { view, now, reason: Reason::Idle, after: 0 }
    }

    /// The next one.
    ///
    /// # Errors
    /// The view's.
    pub fn advance(&mut self) -> Result<Option<(Key, Binding, Reason)>, Fault> {
        if self.reason == Reason::Idle {
            if let Some((sequence, key)) = self.view.idle_after(self.after)? {
                self.after = sequence;
                let binding = existing(self.view, &key)?;
                return Ok(Some((key, binding, Reason::Idle)));
            }
            (self.reason, self.after) = (Reason::EarlierBoot, 0);
        }
        let Some((sequence, key)) = self.view.active_after(self.after)? else {
            return Ok(None);
        };
        self.after = sequence;
        let binding = existing(self.view, &key)?;
        // Numbers only grow, so after the first owner of this boot there is none of an earlier one.
        let stale = binding.owner.as_ref().is_some_and(|owner| self.now.is_stale(owner));
        Ok(stale.then_some((key, binding, Reason::EarlierBoot)))
    }
}

fn existing(view: &dyn View, key: &Key) -> Result<Binding, Fault> {
    view.binding(key)?.ok_or_else(|| Fault::Damaged(format!("the binding of {key} is missing")))
}

fn describe(ranges: &[Range]) -> String {
    let range = |range: &Range| format!("{}-{} of {}", range.span.first, range.span.last, range.subnet);
    ranges.iter().map(range).collect::<Vec<_>>().join(", ")
}
