//! `show NAMESPACE/POD`: everything about one pod.

use super::{
    Failure,
    options::{Options, bindings, of_pod, pod},
    table::json,
};
use crate::{identity::Key, record::Binding, record::Owner, view::Now};
use serde_json::{Value, json};
use std::fmt::Write;

pub fn run(options: &Options) -> Result<String, Failure> {
    let [operand] = options.operands("NAMESPACE/POD")?;
    pod(operand)?;
    let store = options.store()?;
    let found = of_pod(bindings(&store)?, operand, options.ifname.as_deref());
    if found.is_empty() {
        return Err(Failure::new(format!("pod {operand} has no address here; `list` shows who has")));
    }
    let now = store.now();
    if options.json {
        return Ok(json(&found.iter().map(|(key, binding)| describe(key, binding, &now)).collect()));
    }
    let mut out = String::new();
    for (key, binding) in &found {
        let words = |addresses: &[crate::address::Address]| {
            let words: Vec<String> = addresses.iter().map(ToString::to_string).collect();
            if words.is_empty() { "none".to_owned() } else { words.join(", ") }
        };
        // Writing to a string does not fail.
        let _ = writeln!(out, "{key}");
        let _ = writeln!(out, "  addresses  {}", words(&binding.addresses));
        let _ = writeln!(out, "  pinned     {}", words(&binding.pins));
        let _ = writeln!(out, "  sequence   {}", binding.sequence);
        match &binding.owner {
            Some(owner) => sentence(&mut out, "owner", owner, &now),
            None => out.push_str("  owner      none: idle\n"),
        }
        binding.former.iter().for_each(|former| sentence(&mut out, "former", former, &now));
    }
    Ok(out)
}

fn sentence(out: &mut String, role: &str, owner: &Owner, now: &Now) {
    let boot = if now.is_stale(owner) { "an earlier boot" } else { "this boot" };
    let netns = match owner.netns.as_str() {
        "" => "network namespace unknown".to_owned(),
        netns if (now.lives)(netns) => format!("network namespace {netns}"),
        netns => format!("network namespace {netns}, which is gone"),
    };
    let uid = if owner.uid.is_empty() { String::new() } else { format!(", pod uid {}", owner.uid) };
    let _ = writeln!(out, "  {role:<9}  container {}, of {boot}, {netns}{uid}", owner.container);
}

fn describe(key: &Key, binding: &Binding, now: &Now) -> Value {
    let owner = |owner: &Owner| {
        json!({
            "container": owner.container, "netns": owner.netns, "netnsExists": (now.lives)(&owner.netns),
            "earlierBoot": now.is_stale(owner), "uid": owner.uid,
        })
    };
    let texts = |addresses: &[crate::address::Address]| -> Vec<String> {
        addresses.iter().map(ToString::to_string).collect()
    };
    json!({
        "ifname": key.identity().ifname(), "addresses": texts(&binding.addresses), "pins": texts(&binding.pins),
        "sequence": binding.sequence, "owner": binding.owner.as_ref().map(owner),
        "former": binding.former.iter().map(owner).collect::<Vec<_>>(),
    })
}
