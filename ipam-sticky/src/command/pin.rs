//! `pin NAMESPACE/POD ADDRESS`: keep an address for a pod, whatever happens.

use super::{
    Failure,
    options::{Options, address, key},
};
use crate::{ownership, view::View};

pub fn run(options: &Options) -> Result<String, Failure> {
    let [operand, written] = options.operands("NAMESPACE/POD ADDRESS")?;
    let key = key(operand, options.ifname.as_deref().unwrap_or("eth0"))?;
    let address = address(written)?;
    let store = options.store()?;
    let in_use = store.change(&|view: &dyn View| {
        let uses = |holds: fn(&crate::record::Binding) -> &Vec<_>| {
            view.binding(&key)
                .map(|binding| binding.is_some_and(|binding| holds(&binding).contains(&address)))
        };
        Ok((uses(|binding| &binding.addresses)?, ownership::pin(view, &key, address, &store.now())?))
    })?;
    let when =
        if in_use { "which it has" } else { "from its next start, if a range of the configuration holds it" };
    Ok(format!("{address} is pinned to {key}, {when}\n"))
}
