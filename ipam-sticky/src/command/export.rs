//! `export`: everything as JSON, or as reservations that host-local honours, for going back to it.

use super::{
    Failure,
    list::Row,
    options::{Options, bindings},
    table::json,
};
use crate::{tables::Snapshot, view::View};
use serde_json::json;
use std::{
    fs::{self, File},
    io::{self, Write},
    path::Path,
};

pub fn run(options: &Options) -> Result<String, Failure> {
    let [] = options.operands("-o json or --host-local DIR, and no operand")?;
    match &options.host_local {
        Some(directory) => host_local(options, directory),
        None if options.json => everything(options),
        None => Err(Failure::usage("export takes -o json or --host-local DIR")),
    }
}

fn everything(options: &Options) -> Result<String, Failure> {
    let place = options.place()?;
    let bindings = bindings(&options.store()?)?;
    let rows = bindings.iter().flat_map(|(key, binding)| {
        binding.held().into_iter().map(move |address| Row::new(key, binding, address).json())
    });
    Ok(json(&json!({"network": place.network, "addresses": rows.collect::<Vec<_>>()})))
}

/// Only addresses in use: host-local knows no others.
fn host_local(options: &Options, directory: &Path) -> Result<String, Failure> {
    let store = options.store()?;
    let (bindings, cursors) = store.look(&|database| {
        let snapshot = Snapshot::of(database)?;
        let mut cursors = Vec::new();
        while let Some(cursor) = snapshot.cursor(cursors.len())? {
            cursors.push(cursor);
        }
        Ok((snapshot.bindings()?, cursors))
    })?;
    let failed = |path: &Path, error: io::Error| Failure::new(format!("write {}: {error}", path.display()));
    fs::create_dir_all(directory).map_err(|error| failed(directory, error))?;
    let (mut written, mut kept) = (0, String::new());
    for (key, binding) in &bindings {
        let Some(owner) = &binding.owner else { continue };
        let content = format!("{}\r\n{}", owner.container, key.identity().ifname());
        for address in &binding.addresses {
            let path = directory.join(address.to_string());
            match fs::read_to_string(&path) {
                Ok(other) if other.trim() != content => {
                    kept.push_str(&format!("; {address} is reserved for another container there already"));
                }
                _ => {
                    write_synced(&path, &content).map_err(|error| failed(&path, error))?;
                    written += 1;
                }
            }
        }
    }
    for (set, cursor) in cursors.iter().enumerate() {
        let path = directory.join(format!("last_reserved_ip.{set}"));
        write_synced(&path, &cursor.to_string()).map_err(|error| failed(&path, error))?;
    }
    let synced = File::open(directory).and_then(|directory| directory.sync_all());
    synced.map_err(|error| failed(directory, error))?;
    let said = format!("{written} reservations written to {}{kept}", directory.display());
    if kept.is_empty() { Ok(said + "\n") } else { Err(Failure::new(said)) }
}

fn write_synced(path: &Path, content: &str) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(content.as_bytes())?;
    file.sync_all()
}
