//! `verify`: read everything, say what is wrong and what to do. Exit code 1 if anything is.

use super::{Failure, options::Options, table::json};
use crate::{audit::audit, fault::Fault, tables::Snapshot, view::View};
use serde_json::json;

pub fn run(options: &Options) -> Result<String, Failure> {
    let [] = options.operands("no operand")?;
    let store = options.store()?;
    // The file is checked behind a shut gate: what redb would mend stays in memory.
    let (bindings, wrong) = store.look(&|database| {
        let mut wrong = Vec::new();
        match database.check_integrity() {
            Ok(true) => {}
            Ok(false) => wrong.push("redb finds its pages inconsistent, and can mend them".to_owned()),
            Err(error) => return Err(Fault::from(error)),
        }
        let snapshot = Snapshot::of(database)?;
        wrong.extend(audit(&snapshot)?);
        Ok((snapshot.bindings()?.len(), wrong))
    })?;
    if options.json {
        let document = json(&json!({"bindings": bindings, "wrong": wrong}));
        return if wrong.is_empty() { Ok(document) } else { Err(Failure::new(document)) };
    }
    if wrong.is_empty() {
        let mut out = format!("{bindings} bindings in {}, nothing wrong\n", store.path().display());
        for file in store.set_aside() {
            out.push_str(&format!("{} was damaged and is not used any more\n", file.display()));
        }
        return Ok(out);
    }
    Err(Failure::new(format!(
        "{} is wrong:\n  {}\nmove the file away: the next ADD builds a new one out of what the node knows",
        store.path().display(),
        wrong.join("\n  ")
    )))
}
