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

/// Only addresses in use: host-local knows no others. What the directory says of an address that is bound here is
/// from before the move to us, and our state has seen every DEL since: its reservation is replaced, or removed when
/// the address is idle. Reservations of other addresses stay.
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
    let (mut written, mut replaced) = (0, 0);
    for (key, binding) in &bindings {
        let content =
            binding.owner.as_ref().map(|owner| format!("{}\r\n{}", owner.container, key.identity().ifname()));
        for address in &binding.addresses {
            let path = directory.join(address.to_string());
            let former = fs::read_to_string(&path).ok().filter(|former| Some(former) != content.as_ref());
            replaced += usize::from(former.is_some());
            match &content {
                Some(content) => {
                    write_synced(&path, content).map_err(|error| failed(&path, error))?;
                    written += 1;
                }
                None if former.is_some() => fs::remove_file(&path).map_err(|error| failed(&path, error))?,
                None => {}
            }
        }
    }
    for (set, cursor) in cursors.iter().enumerate() {
        let path = directory.join(format!("last_reserved_ip.{set}"));
        write_synced(&path, &cursor.to_string()).map_err(|error| failed(&path, error))?;
    }
    let synced = File::open(directory).and_then(|directory| directory.sync_all());
    synced.map_err(|error| failed(directory, error))?;
    let directory = directory.display();
    Ok(format!(
        "{written} reservations written to {directory}; {replaced} older ones were replaced or removed\n"
    ))
}

fn write_synced(path: &Path, content: &str) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(content.as_bytes())?;
    file.sync_all()
}
