//! `release`: forget an idle pod, or let go of owners whose containers are certainly gone.

use super::{
    Failure,
    options::{Options, of_pod, pod},
};
use crate::{
    ownership::{free_gone, is_gone},
    view::{Draft, View},
};

pub fn run(options: &Options) -> Result<String, Failure> {
    let store = options.store()?;
    let now = store.now();
    if options.stale && options.operands.is_empty() {
        let freed = store.change(&|view: &dyn View| {
            let changes = free_gone(view, &now)?;
            Ok((changes.bindings.len(), changes))
        })?;
        return Ok(format!("{freed} bindings whose container is gone are not active any more\n"));
    }
    let [operand] = options.operands("NAMESPACE/POD, or --stale")?;
    pod(operand)?;
    let released = store.change(&|view: &dyn View| {
        let mut draft = Draft::new(view);
        let mut released = Vec::new();
        for (key, binding) in of_pod(view.bindings()?, operand, options.ifname.as_deref()) {
            let gone = |owner| options.stale && is_gone(owner, &now);
            if let Some(owner) = binding.owner.as_ref().filter(|owner| !gone(owner)) {
                let why = if is_gone(owner, &now) {
                    "it is gone, so `--stale` releases it"
                } else {
                    "delete the pod first"
                };
                return Ok((
                    Err(format!("{key} is in use by container {}: {why}", owner.container)),
                    draft.changes,
                ));
            }
            if !binding.pins.is_empty() {
                return Ok((
                    Err(format!("{key} has a pinned address: `unpin {operand}` first")),
                    draft.changes,
                ));
            }
            released.extend(binding.held().iter().map(ToString::to_string));
            draft.forget(&key);
        }
        Ok((Ok(released), draft.changes))
    })?;
    match released {
        Err(refused) => Err(Failure::new(refused)),
        Ok(addresses) if addresses.is_empty() => {
            Err(Failure::new(format!("pod {operand} has no address here")))
        }
        Ok(addresses) => Ok(format!("{} free\n", addresses.join(", "))),
    }
}
