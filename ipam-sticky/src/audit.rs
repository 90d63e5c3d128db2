//! What must be true of the state: every index says exactly what the bindings say, and no address is held twice.

use crate::{
    address::Address,
    fault::Fault,
    identity::Key,
    tables::{Indexes, Snapshot, owner_keys, place},
    view::View,
};
use std::{collections::BTreeMap, fmt};

/// Compares all tables. Each difference is a sentence.
///
/// # Errors
/// When the state cannot be read at all.
pub fn audit(snapshot: &Snapshot) -> Result<Vec<String>, Fault> {
    let mut wrong = Vec::new();
    let bindings = snapshot.bindings()?;
    let last = snapshot.sequence()?;
    let mut expected = Indexes::default();
    for (key, binding) in &bindings {
        for address in binding.held() {
            if let Some(other) = expected.addresses.insert(address.0, key.as_str().into()) {
                wrong.push(format!("{address} is in the bindings of {other} and of {key}"));
            }
        }
        for owner in owner_keys(key, Some(binding)) {
            if let Some(other) = expected.owners.insert(owner.clone(), key.as_str().into()) {
                wrong.push(format!("{owner} is in the bindings of {other} and of {key}"));
            }
        }
        if let Some((active, sequence)) = place(binding) {
            let order = if active { &mut expected.active } else { &mut expected.idle };
            if order.insert(sequence, key.as_str().into()).is_some() {
                wrong.push(format!("two bindings have the sequence number {sequence}"));
            }
        }
        if binding.sequence > last {
            wrong.push(format!(
                "{key} has sequence number {}, and the counter is at {last}",
                binding.sequence
            ));
        }
        if binding.owner.is_none() && binding.held().is_empty() {
            wrong.push(format!("the binding of {key} is empty"));
        }
    }
    let mut run: Option<(u128, u128)> = None;
    for address in expected.addresses.keys() {
        run = match run {
            Some((first, last)) if last.checked_add(1) == Some(*address) => Some((first, *address)),
            before => {
                expected.runs.extend(before);
                Some((*address, *address))
            }
        };
    }
    expected.runs.extend(run);
    let found = snapshot.indexes()?;
    let ip = |address: &u128| Address(*address).to_string();
    compare(&mut wrong, "addresses", &expected.addresses, &found.addresses, ip, Clone::clone);
    compare(&mut wrong, "runs", &expected.runs, &found.runs, ip, ip);
    compare(&mut wrong, "idle", &expected.idle, &found.idle, u64::to_string, Clone::clone);
    compare(&mut wrong, "active", &expected.active, &found.active, u64::to_string, Clone::clone);
    compare(&mut wrong, "owners", &expected.owners, &found.owners, Clone::clone, Clone::clone);
    wrong.extend(
        found.owners.values().filter(|key| Key::parse(key).is_none()).map(|key| format!("{key:?} is no key")),
    );
    Ok(wrong)
}

fn compare<K: Ord, V: PartialEq + fmt::Debug>(
    wrong: &mut Vec<String>,
    table: &str,
    expected: &BTreeMap<K, V>,
    found: &BTreeMap<K, V>,
    name: impl Fn(&K) -> String,
    say: impl Fn(&V) -> String,
) {
    for (key, value) in expected {
        match found.get(key) {
            Some(there) if there == value => {}
            Some(there) => wrong.push(format!(
                "table {table} says {} of {}, and the bindings say {}",
                say(there),
                name(key),
                say(value)
            )),
            None => wrong.push(format!("table {table} lacks {}", name(key))),
        }
    }
    let surplus = found.keys().filter(|key| !expected.contains_key(key));
    wrong.extend(surplus.map(|key| format!("table {table} has {}, and no binding does", name(key))));
}
