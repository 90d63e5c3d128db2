//! `import --host-local DIR`: take over host-local's reservations, with pods running. Those of pods that libcni
//! knows become the pods'; the others stay with their containers.

use super::{Failure, options::Options};
use crate::{recover, view::View};

pub fn run(options: &Options) -> Result<String, Failure> {
    let [] = options.operands("--host-local DIR and no operand")?;
    let given = options.host_local.as_ref();
    let given = given.ok_or_else(|| Failure::usage("import takes --host-local DIR"))?;
    let place = options.place()?;
    let below = given.join(&place.network);
    let directory = if below.is_dir() { &below } else { given };
    let store = options.store()?;
    let now = store.now();
    let known = recover::result_cache(&place, now.boot, now.lives);
    let (traces, _) = recover::host_local(directory, &known, now.boot)
        .map_err(|error| Failure::new(format!("read {}: {error}", directory.display())))?;
    let (bindings, known, conflicts) = store.change(&|view: &dyn View| {
        let import = recover::import(view, &traces)?;
        Ok(((import.bindings, import.known, import.conflicts), import.changes))
    })?;
    // A state that is new has taken them over by itself, when this command opened it.
    let mut out = format!(
        "{bindings} of {} containers in {} imported, {known} known already\n",
        traces.len(),
        directory.display()
    );
    for conflict in &conflicts {
        out.push_str(&format!("left out: {conflict}\n"));
    }
    if conflicts.is_empty() { Ok(out) } else { Err(Failure::new(out.trim_end())) }
}
