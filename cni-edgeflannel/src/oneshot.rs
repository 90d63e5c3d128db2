//! `edgeflanneld restore` and `edgeflanneld remove`: one thing, once, with nobody to ask.

use crate::{
    daemon::{identity, lock, result_cache},
    flags::Flags,
    nft,
    overlay::{
        Step, device_name,
        kernel::Kernel,
        reconcile::{find_underlay, reconcile},
        restore::{Mark, host_name, restore_from},
    },
    record::{Family, Loaded, Record, RecordStore},
};
use std::{fs, io::ErrorKind, path::Path};

/// Makes the kernel as the record says, whatever it has, and clears libcni's cache of what a power cut broke.
///
/// # Errors
/// A sentence on what is missing.
pub fn restore(flags: &Flags, run_dir: &Path) -> Result<String, String> {
    result_cache::clear(&flags.cni_cache_dir);
    let record = read(flags)?;
    let host_name = host_name();
    if !record.node.is_of_host(&host_name) {
        return Err(format!(
            "the node record in {} was written on host {}, and this is {host_name}: a cloned disk?",
            flags.state_dir.display(),
            record.node.host_name
        ));
    }
    let kernel = Kernel::open().map_err(|e| e.to_string())?;
    let mark = Mark::new(run_dir);
    let _lock = mark.lock().map_err(|e| e.to_string())?;
    let outcome = restore_from(&record, &kernel, &mark).map_err(|e| e.to_string())?;
    if let Some(failure) = outcome.failures.first() {
        return Err(format!("{}: {}", failure.step, failure.error));
    }
    if !outcome.is_settled() || !mark.holds() {
        let found = find_underlay(&kernel, &record.node).map_err(|e| e.to_string())?;
        return Err(found.err().map_or_else(
            || "the interface below has no address of every family in use".to_owned(),
            |absent| format!("the overlay has to wait: {absent}"),
        ));
    }
    Ok(format!("the overlay is up, with {} peers", record.peers.len()))
}

/// Takes away everything of ours but the pods' own devices and addresses.
///
/// # Errors
/// A sentence on what would not go; the rest is gone.
pub fn remove(flags: &Flags, run_dir: &Path) -> Result<String, String> {
    if let Some(pid) = lock::holder(&flags.state_dir) {
        return Err(format!(
            "edgeflanneld runs (process {pid}) and would put everything back: stop it first"
        ));
    }
    let mut failures = Vec::new();
    let mut record = read(flags).unwrap_or_else(|why| {
        log::warn!("{why}; going by the defaults");
        let mut record = Record::default();
        record.node = identity::with_flags(&record.node, flags);
        record
    });
    let kernel = Kernel::open().map_err(|e| e.to_string())?;
    // First, so that no pod's ADD restores what is being taken away.
    let store = RecordStore::new(&flags.state_dir);
    forget(&store.path(), &mut failures);
    forget(&flags.state_dir.join("node.redb.lock"), &mut failures);
    forget(&flags.state_dir.join("daemon.lock"), &mut failures);
    let mark = Mark::new(run_dir);
    if let Err(e) = mark.clear() {
        failures.push(format!("the mark of the restored overlay: {e}"));
    }
    forget(&run_dir.join("daemon.json"), &mut failures);

    // Direct routes are on somebody else's device: a node without peers wants none of them.
    record.peers.clear();
    let found = find_underlay(&kernel, &record.node).map_err(|e| e.to_string())?;
    let prune = |step: &Step| matches!(step, Step::RemoveRoute(_));
    match reconcile(&kernel, &record, found.as_ref().ok(), prune) {
        Ok(outcome) => failures.extend(outcome.failures.into_iter().map(|failure| failure.error.to_string())),
        Err(e) => failures.push(e.to_string()),
    }
    let mut steps = Vec::new();
    for family in Family::ALL {
        let name = device_name(family, record.node.backend.vni);
        steps.push(Step::DeleteDevice { name, index: 0 });
    }
    let failed = kernel.carry_out(&steps, &record.node);
    failures.extend(failed.into_iter().map(|failure| failure.error.to_string()));
    if let Err(e) = nft::Nft::open().and_then(|nft| nft.remove_own_table()) {
        failures.push(format!("nftables table {}: {e}", nft::TABLE));
    }
    forget(&record.node.subnet_file, &mut failures);
    if failures.is_empty() {
        Ok("removed the overlay, the record and subnet.env; the annotations and the pods' devices stay"
            .to_owned())
    } else {
        Err(format!("not everything could be removed: {}", failures.join("; ")))
    }
}

fn read(flags: &Flags) -> Result<Record, String> {
    let mut store = RecordStore::new(&flags.state_dir);
    let mut record = match store.load().map_err(|e| e.to_string())? {
        Loaded::Record(record) => *record,
        Loaded::Nothing => return Err(format!("there is no node record in {}", flags.state_dir.display())),
        Loaded::Damaged { reason, set_aside } => {
            let place = set_aside.unwrap_or_else(|| store.path());
            return Err(format!("the node record was damaged ({reason}); it is {}", place.display()));
        }
    };
    let given = flags.node_name.as_ref().filter(|name| **name != record.node.node_name);
    if let Some(name) = given {
        return Err(format!(
            "the node record is of node {}, and this is {name}: a cloned disk?",
            record.node.node_name
        ));
    }
    record.node = identity::with_flags(&record.node, flags);
    Ok(record)
}

fn forget(path: &Path, failures: &mut Vec<String>) {
    match fs::remove_file(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => failures.push(format!("remove {}: {e}", path.display())),
        _ => {}
    }
}
