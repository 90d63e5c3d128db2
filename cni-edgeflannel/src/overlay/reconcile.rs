//! The reconcile: look, plan, act, and look again, until nothing is left to do.

use super::{
    Conflict, Desired, Observed, OnLink, Step, desired,
    kernel::{Error, Failure, Kernel},
    plan,
};
use crate::{
    record::{NodeRecord, PerFamily, Record, Underlay},
    underlay::{self, Absent, Wish},
};

/// A device that the kernel could not change is made anew in a second round; a third one is for what others did
/// meanwhile. More would be a fight.
const ROUNDS: usize = 3;

/// What a reconcile came to.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Steps that were taken.
    pub taken: Vec<Step>,
    /// Steps that the caller did not allow this time.
    pub held_back: Vec<Step>,
    /// Steps that failed in the last round.
    pub failures: Vec<Failure>,
    /// Peers that are not obeyed.
    pub conflicts: Vec<Conflict>,
    /// Our devices, as they were seen last.
    pub indexes: PerFamily<u32>,
    /// What should be, to compare later events with.
    pub wanted: Desired,
}

impl Outcome {
    /// The kernel is as it should be.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.held_back.is_empty() && self.failures.is_empty()
    }
}

/// What should be, and what is.
///
/// # Errors
/// When the kernel refuses to say.
pub fn compare(
    kernel: &Kernel,
    record: &Record,
    underlay: Option<&Underlay>,
) -> Result<(Desired, Observed), Error> {
    // Only direct routing asks the routing table before it knows what it wants.
    let on_link = if record.node.backend.direct_routing {
        let ours: Vec<u32> =
            kernel.links(record.node.backend.vni)?.iter().map(|(_, link)| link.index).collect();
        OnLink::new(&kernel.routes()?, &ours)
    } else {
        OnLink::default()
    };
    let wanted = desired(record, underlay, &on_link);
    let seen = kernel.observe(&record.node, &wanted)?;
    Ok((wanted, seen))
}

/// Makes the kernel as it should be. `allow` is asked for every step; those that it refuses are left for later.
///
/// # Errors
/// When the kernel refuses to say what it has. Steps that fail are in the outcome.
pub fn reconcile(
    kernel: &Kernel,
    record: &Record,
    underlay: Option<&Underlay>,
    mut allow: impl FnMut(&Step) -> bool,
) -> Result<Outcome, Error> {
    let mut outcome = Outcome::default();
    for round in 0.. {
        let (wanted, seen) = compare(kernel, record, underlay)?;
        outcome.conflicts.clone_from(&wanted.conflicts);
        outcome.indexes = seen.devices.map(|_, device| device.link.index);
        let steps = plan(&wanted, &seen);
        outcome.wanted = wanted;
        if steps.is_empty() {
            outcome.failures.clear();
            outcome.held_back.clear();
            break;
        }
        if round == ROUNDS {
            break;
        }
        let (steps, held_back): (Vec<Step>, Vec<Step>) = steps.into_iter().partition(&mut allow);
        outcome.held_back = held_back;
        outcome.failures = kernel.carry_out(&steps, &record.node);
        let nothing_done = steps.len() == outcome.failures.len();
        outcome.taken.extend(steps);
        if nothing_done {
            break;
        }
    }
    Ok(outcome)
}

/// The interface below, as the record's choice finds it in the kernel now.
///
/// # Errors
/// When the kernel refuses to say.
pub fn find_underlay(kernel: &Kernel, node: &NodeRecord) -> Result<Result<Underlay, Absent>, Error> {
    let machine = kernel.machine(node.underlay.can_reach)?;
    let wish = Wish {
        choice: &node.underlay,
        families: &node.networks,
        pods: &node.subnets,
        before: &node.local_ips,
    };
    Ok(underlay::choose(&machine, wish))
}
