//! Which steps may be taken when it is somebody else who made them necessary.
//!
//! Each object has its own bound ([`super::pace`]), but what hangs on a device goes and comes with it: a deleted
//! flannel.1 is one repair, not one for each of its five thousand routes.

use super::{
    board::Board,
    pace::{Pace, Turn},
};
use crate::{overlay::Step, record::Family};
use std::{collections::BTreeSet, time::Instant};

/// The repairs of one reconcile.
#[derive(Debug)]
pub struct Repairs<'k> {
    pace: &'k mut Pace,
    board: &'k Board,
    now: Instant,
    /// Families whose device is made or waits for its turn: whether the rest of it may be put right.
    devices: [Option<bool>; 2],
    allowed: BTreeSet<String>,
    again: Option<Instant>,
}

impl<'k> Repairs<'k> {
    /// None yet.
    pub fn new(pace: &'k mut Pace, board: &'k Board, now: Instant) -> Self {
        Self { pace, board, now, devices: [None; 2], allowed: BTreeSet::new(), again: None }
    }

    /// When something that has to wait may be put right.
    #[must_use]
    pub fn again(&self) -> Option<Instant> {
        self.again
    }

    /// Whether a step may be taken now. Counts what is put right, once.
    pub fn allow(&mut self, step: &Step) -> bool {
        let family = family_of(step);
        if let Some(follows) = family.and_then(|family| self.devices[family as usize]) {
            return follows;
        }
        let turn = self.turn(step);
        if let Step::CreateDevice(_, family) = step {
            self.devices[*family as usize] = Some(turn);
        }
        turn
    }

    fn turn(&mut self, step: &Step) -> bool {
        let object = step.object();
        if self.allowed.contains(&object) {
            return true;
        }
        match self.pace.turn(&object, self.now) {
            Turn::Now => {
                self.board.drifted(step.kind());
                self.allowed.insert(object);
                true
            }
            Turn::Later { at, wait, first } => {
                if first {
                    log::warn!("{step}, again and again: somebody undoes it; waiting {} s", wait.as_secs());
                }
                self.again = Some(self.again.map_or(at, |again| again.min(at)));
                false
            }
        }
    }
}

fn family_of(step: &Step) -> Option<Family> {
    match step {
        Step::CreateDevice(_, family)
        | Step::ChangeVxlan(_, family)
        | Step::SetMac(family, _)
        | Step::SetMtu(family, _)
        | Step::SetUp(family)
        | Step::TxChecksumOff(family)
        | Step::AddAddress(family, _)
        | Step::RemoveAddress(family, _)
        | Step::PutNeighbour(family, ..)
        | Step::RemoveNeighbour(family, ..)
        | Step::PutFdb(family, ..)
        | Step::RemoveFdb(family, ..)
        | Step::PutRoute(family, ..) => Some(*family),
        Step::DeleteDevice { .. }
        | Step::SetSysctl(_)
        | Step::RemoveRoute(_)
        | Step::PutChain(_)
        | Step::RemoveChain(_)
        | Step::WriteSubnetEnv(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        mac::Mac,
        overlay::{Device, Entries, Hop},
    };
    use std::time::Duration;

    fn device() -> Step {
        let device = Device {
            name: "flannel.1".into(),
            vni: 1,
            port: 8472,
            link: 2,
            local: [192, 168, 0, 1].into(),
            learning: false,
            gbp: false,
            mac: Mac([2, 0, 0, 0, 0, 1]),
            mtu: 1450,
            address: "10.244.1.0/32".parse().unwrap(),
            disable_tx_checksum: false,
            entries: Entries::default(),
        };
        Step::CreateDevice(Box::new(device), Family::V4)
    }

    fn route(last: u8) -> Step {
        let via = [10, 244, last, 0].into();
        Step::PutRoute(Family::V4, format!("10.244.{last}.0/24").parse().unwrap(), Hop::Vxlan(via))
    }

    #[test]
    fn a_deleted_device_is_one_repair() {
        let (mut pace, board, start) = (Pace::default(), Board::default(), Instant::now());
        for second in 0..5 {
            let mut repairs = Repairs::new(&mut pace, &board, start + Duration::from_millis(second));
            let delete = Step::DeleteDevice { name: "flannel.1".into(), index: 7 };
            assert!(repairs.allow(&delete) && repairs.allow(&device()));
            assert!((2..9).all(|last| repairs.allow(&route(last))));
        }
        let metrics = board.metrics();
        assert!(
            metrics.contains("{kind=\"link\"} 5\n") && metrics.contains("{kind=\"route\"} 0\n"),
            "{metrics}"
        );
        let mut repairs = Repairs::new(&mut pace, &board, start + Duration::from_millis(6));
        assert!(!repairs.allow(&device()) && !repairs.allow(&route(2)), "what hangs on it waits with it");
        assert!(repairs.again().is_some());
    }

    #[test]
    fn one_fought_over_route_does_not_hold_up_others() {
        let (mut pace, board, start) = (Pace::default(), Board::default(), Instant::now());
        for ms in 0..6 {
            let mut repairs = Repairs::new(&mut pace, &board, start + Duration::from_millis(ms));
            assert_eq!(repairs.allow(&route(2)), ms < 5);
        }
        assert!(Repairs::new(&mut pace, &board, start).allow(&route(3)));
        assert!(board.metrics().contains("{kind=\"route\"} 6\n"));
    }
}
