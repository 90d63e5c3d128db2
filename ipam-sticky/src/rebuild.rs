//! A new state file: the first one of a network, or the one after damage. Filled with what the node still knows.

use crate::{
    database::{Opened, ReadOnly, commit, guarded, nothing},
    disk::Gate,
    fault::Fault,
    lock::make_directory,
    recover,
    store::Store,
    tables::Snapshot,
    view::Changes,
};
use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

impl Store {
    /// Files of this network that were set aside because they were damaged.
    #[must_use]
    pub fn set_aside(&self) -> Vec<PathBuf> {
        let prefix = format!("{}.redb.damaged-", self.place.network);
        let listing = fs::read_dir(&self.place.data_dir).into_iter().flatten();
        let files = listing.filter_map(|entry| Some(entry.ok()?.path()));
        let is_ours =
            |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&prefix));
        files.filter(is_ours).collect()
    }

    /// Makes a new file out of what the node knows, beside the old one, and puts it in its place.
    pub(crate) fn create(&self, damage: Option<&str>) -> Result<(), Fault> {
        let path = self.path();
        make_directory(&self.place.data_dir)?;
        let new = path.with_extension("redb.new");
        match fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        let options = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).clone();
        let changes = self.known(damage.is_some())?;
        let gate = Gate::new((self.backend)(options.open(&new)?)?)?;
        gate.open()?;
        let opened = Opened::over(gate)?;
        let committed = commit(&opened.database, &changes, None, true);
        opened.end();
        committed?;
        if let Some(why) = damage {
            let aside = self.free_name(&path);
            fs::rename(&path, &aside)?;
            log::warn!(
                "{} is damaged ({why}); it is set aside as {}, and {} bindings are rebuilt from what the node knows",
                path.display(),
                aside.display(),
                changes.bindings.len()
            );
        }
        fs::rename(&new, &path)?;
        for directory in self.place.data_dir.ancestors().take(2) {
            File::open(directory)?.sync_all()?;
        }
        Ok(())
    }

    fn free_name(&self, path: &Path) -> PathBuf {
        let name = |number: u32| path.with_extension(format!("redb.damaged-{number}"));
        (1..).map(name).find(|path| !path.exists()).unwrap_or_else(|| name(0))
    }

    /// The bindings that a new state begins with. After damage, what can be read of the old state and every pod
    /// that the node remembers; otherwise the pods that run, or that host-local has.
    pub(crate) fn known(&self, damaged: bool) -> Result<Changes, Fault> {
        let lives = |netns: &str| Path::new(netns).exists();
        let cached = recover::result_cache(&self.place, &self.boot, &lives);
        let mut traces: Vec<recover::Trace> =
            cached.iter().filter(|trace| damaged || trace.alive).cloned().collect();
        let mut known = if damaged { self.salvage() } else { Changes::default() };
        for directory in &self.place.host_local {
            if let Ok((reserved, last)) = recover::host_local(directory, &cached, &self.boot) {
                log::info!("{} reservations found in {}", reserved.len(), directory.display());
                traces.extend(reserved);
                known.cursors.extend(last);
            }
        }
        let memory = nothing()?;
        commit(&memory, &known, None, false)?;
        let import = recover::import(&Snapshot::of(&memory)?, &traces)?;
        import.conflicts.iter().for_each(|conflict| log::warn!("import: {conflict}"));
        known.bindings.extend(import.changes.bindings);
        known.sequence = import.changes.sequence.or(known.sequence);
        Ok(known)
    }

    /// What can still be read of a damaged state: each record vouches for itself.
    fn salvage(&self) -> Changes {
        let mut found = BTreeMap::new();
        for backwards in [false, true] {
            let read = guarded(|| {
                let gate = Gate::new(Box::new(ReadOnly(File::open(self.path())?)))?;
                let opened = Opened::over(gate)?;
                let read = Snapshot::of(&opened.database)?.salvage(backwards, &mut found);
                opened.end();
                read
            });
            if let Err(fault) = read {
                log::debug!("salvage: {fault}");
            }
        }
        let sequence = found.values().map(|binding| binding.sequence).max();
        let bindings = found.into_iter().map(|(key, binding)| (key, Some(binding))).collect();
        let salvaged = Changes { bindings, sequence, ..Changes::default() };
        // They come from one state, so they agree with each other; if not, none is believed.
        let agree = nothing().and_then(|memory| commit(&memory, &salvaged, None, false));
        match agree {
            Ok(()) => salvaged,
            Err(fault) => {
                log::warn!("what can be read of {} contradicts itself: {fault}", self.path().display());
                Changes::default()
            }
        }
    }
}
