//! `unpin NAMESPACE/POD [ADDRESS]`: the pod keeps what it has, like any other.

use super::{
    Failure,
    options::{Options, address, of_pod, pod},
};
use crate::{ownership, view::View};

pub fn run(options: &Options) -> Result<String, Failure> {
    let (operand, address) = match options.operands.as_slice() {
        [pod] => (pod, None),
        [pod, written] => (pod, Some(address(written)?)),
        _ => return Err(Failure::usage("unpin takes NAMESPACE/POD and perhaps an ADDRESS")),
    };
    pod(operand)?;
    let store = options.store()?;
    let unpinned = store.change(&|view: &dyn View| {
        let mut all = crate::view::Changes::default();
        for (key, _) in of_pod(view.bindings()?, operand, options.ifname.as_deref()) {
            all.bindings.extend(ownership::unpin(view, &key, address, &store.now())?.bindings);
        }
        Ok((all.bindings.len(), all))
    })?;
    match unpinned {
        0 => Err(Failure::new(format!("pod {operand} has no such pin; `show {operand}` lists its pins"))),
        _ => Ok(format!("pod {operand} is not pinned any more\n")),
    }
}
