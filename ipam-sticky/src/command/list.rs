//! `list`: one row per address.

use super::{
    Failure,
    options::{Options, bindings},
    table::{json, table},
};
use crate::{
    address::Address,
    identity::{Identity, Key},
    record::Binding,
};
use serde_json::{Value, json};

pub fn run(options: &Options) -> Result<String, Failure> {
    let [] = options.operands("no operand")?;
    let mut rows: Vec<Row> = Vec::new();
    for (key, binding) in bindings(&options.store()?)? {
        rows.extend(binding.held().into_iter().map(|address| Row::new(&key, &binding, address)));
    }
    rows.sort_by_key(|row| row.address);
    if options.json {
        return Ok(json(&rows.iter().map(Row::json).collect()));
    }
    let heading = ["ADDRESS", "NAMESPACE", "POD", "IFNAME", "STATE", "CONTAINER", "SEQUENCE"];
    Ok(table(heading, &rows.iter().map(Row::cells).collect::<Vec<_>>()))
}

/// One address.
pub struct Row {
    identity: Identity,
    address: Address,
    state: &'static str,
    pinned: bool,
    container: String,
    sequence: u64,
}

impl Row {
    /// The row of an address that a binding holds.
    pub fn new(key: &Key, binding: &Binding, address: Address) -> Self {
        let pinned = binding.pins.contains(&address);
        let in_use = binding.owner.is_some() && binding.addresses.contains(&address);
        Self {
            identity: key.identity(),
            address,
            state: if in_use {
                "active"
            } else if pinned {
                "pinned"
            } else {
                "idle"
            },
            pinned,
            container: binding.owner.as_ref().map(|owner| owner.container.clone()).unwrap_or_default(),
            sequence: binding.sequence,
        }
    }

    fn names(&self) -> (&str, &str, &str) {
        match &self.identity {
            Identity::Pod { namespace, pod, ifname } => (namespace, pod, ifname),
            Identity::Container { ifname, .. } => ("", "", ifname),
        }
    }

    /// The row as a program reads it.
    pub fn json(&self) -> Value {
        let (namespace, pod, ifname) = self.names();
        json!({
            "namespace": namespace, "pod": pod, "ifname": ifname, "address": self.address.to_string(),
            "state": self.state, "pinned": self.pinned, "container": self.container, "sequence": self.sequence,
        })
    }

    fn cells(&self) -> [String; 7] {
        let (namespace, pod, ifname) = self.names();
        let state = if self.pinned && self.state == "active" { "active, pinned" } else { self.state };
        [
            self.address.to_string(),
            namespace.into(),
            pod.into(),
            ifname.into(),
            state.into(),
            self.container.chars().take(13).collect(),
            self.sequence.to_string(),
        ]
    }
}
