//! `reclaim --dry-run`: who would lose an address next, in order, and why.

use super::{
    Failure,
    options::Options,
    table::{json, table},
};
use crate::{
    allocate::{Candidates, Reason},
    identity::Key,
    record::Binding,
    tables::Snapshot,
};
use serde_json::{Value, json};

pub fn run(options: &Options) -> Result<String, Failure> {
    let [] = options.operands("--dry-run and no operand")?;
    if !options.dry_run {
        return Err(Failure::usage(
            "reclaim takes --dry-run: addresses are reclaimed when a pod needs one and none is free",
        ));
    }
    let store = options.store()?;
    let now = store.now();
    let candidates = store.look(&|database| {
        let snapshot = Snapshot::of(database)?;
        let mut candidates = Candidates::new(&snapshot, &now);
        let mut all = Vec::new();
        while let Some(candidate) = candidates.advance()? {
            all.push(candidate);
        }
        Ok(all)
    })?;
    let addresses =
        |binding: &Binding| -> Vec<String> { binding.addresses.iter().map(ToString::to_string).collect() };
    let why = |binding: &Binding, reason: &Reason| match reason {
        Reason::Idle => format!("idle since {}", binding.sequence),
        Reason::EarlierBoot => format!("owned since {}, in an earlier boot", binding.sequence),
    };
    if options.json {
        let row = |(place, (key, binding, reason)): (usize, &(Key, Binding, Reason))| -> Value {
            json!({
                "order": place + 1, "binding": key.as_str(), "addresses": addresses(binding),
                "sequence": binding.sequence, "reason": why(binding, reason),
            })
        };
        return Ok(json(&candidates.iter().enumerate().map(row).collect()));
    }
    let row = |(place, (key, binding, reason)): (usize, &(Key, Binding, Reason))| {
        [(place + 1).to_string(), key.to_string(), addresses(binding).join(", "), why(binding, reason)]
    };
    let rows: Vec<_> = candidates.iter().enumerate().map(row).collect();
    Ok(table(["ORDER", "WHO", "ADDRESSES", "WHY"], &rows))
}
