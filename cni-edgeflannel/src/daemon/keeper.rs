//! What the daemon knows and does, one thing at a time: the loop in [`super`] says when.
//!
//! Four sources change what should be: the record, the API server, the kernel's events and the interface below.
//! All of them end in the same three steps: write the record, reconcile the kernel, publish. What somebody else
//! altered is put right at a bounded pace; what the cluster altered is carried out at once.

use super::{
    apistate::ApiState,
    board::Board,
    delta::delta,
    identity::{self, Known},
    leftovers,
    monitor::Monitor,
    pace::Pace,
    repairs::Repairs,
};
use crate::{
    cluster::{
        annotations::{self, Keys, Own},
        follow::{Follower, Noted},
        netconf::{self, NetConf},
        watch::Heard,
    },
    flags::Flags,
    overlay::{
        Conflict, Desired, Kind, OnLink, Step, desired, device_name,
        kernel::{Kernel, foreign_drops},
        reconcile::{Outcome, find_underlay, reconcile},
        restore::{Mark, restore_from},
    },
    record::{Changes, Family, Loaded, NodeRecord, PerFamily, Record, RecordStore, StoreError, Underlay},
};
use jiff::Timestamp;
use serde_json::Value;
use std::{
    collections::BTreeSet,
    fs,
    io::ErrorKind,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::{Notify, watch};

/// The kernel may be busy with us for a twentieth of the time.
const DUTY: u32 = 20;
/// But a change never waits longer than this for the one before it.
const LONGEST_REST: Duration = Duration::from_millis(500);
/// A list that is being told may hold its additions back for so long.
const LIST_HOLD: Duration = Duration::from_secs(2);
/// What was published and is still not there is published again.
const PUBLISH_AGAIN: Duration = Duration::from_secs(10);

/// See the module.
#[derive(Debug)]
pub struct Keeper {
    flags: Flags,
    node_name: String,
    host_name: String,
    board: Arc<Board>,
    kernel: Kernel,
    mark: Mark,
    store: RecordStore,
    record: Record,
    changes: Changes,
    /// The record on the disk or a complete list has told who the peers are; before that nothing is pruned.
    knows_peers: bool,
    netconf: Option<NetConf>,
    keys: Keys,
    follower: Follower,
    own: Option<Own>,
    underlay: Option<Underlay>,
    absent: Option<String>,
    pace: Pace,
    due: Due,
    /// What the kernel should have, to compare events with.
    wanted: Desired,
    indexes: PerFamily<u32>,
    settled: bool,
    /// What flanneld left behind has been removed.
    tidied: bool,
    reported: BTreeSet<String>,
    api: ApiState,
    publish: watch::Sender<Option<Value>>,
    published: Option<(Value, Instant)>,
}

/// What is to be done, and since when.
#[derive(Debug, Default)]
struct Due {
    changed: Option<Instant>,
    touched: Option<Instant>,
    underlay: Option<Instant>,
    not_before: Option<Instant>,
    /// Something failed or was held back: look again then.
    again: Option<Instant>,
    /// It failed, that is.
    failed: bool,
    failures: u32,
}

impl Keeper {
    /// Reads the record and restores the overlay from it, if there is one.
    ///
    /// # Errors
    /// A sentence, when this node must not be touched: a record of a later version, or no name.
    pub async fn start(
        flags: Flags,
        host_name: String,
        run_dir: &Path,
        board: Arc<Board>,
    ) -> Result<Self, String> {
        let kernel = Kernel::open().map_err(|e| e.to_string())?;
        let mut store = RecordStore::new(&flags.state_dir);
        let (record, knows_peers) = load(&mut store, flags.node_name.as_deref(), &host_name)?;
        let own_name = flags.node_name.clone().or_else(|| crate::flags::name_of_host(&host_name));
        let node_name = own_name.unwrap_or_else(|| record.node.node_name.clone());
        if node_name.is_empty() {
            return Err(format!(
                "this node's name is not known: give --node-name or NODE_NAME (the host name is {host_name:?})"
            ));
        }
        let default = NodeRecord::default().annotation_prefix;
        let keys = Keys::new(flags.annotation_prefix.as_ref().unwrap_or(&default))?;
        let mut keeper = Self {
            follower: Follower::new(keys.clone(), &node_name),
            api: ApiState::new(run_dir),
            mark: Mark::new(run_dir),
            node_name,
            host_name,
            board,
            kernel,
            store,
            record,
            changes: Changes::default(),
            knows_peers,
            netconf: None,
            keys,
            own: None,
            underlay: None,
            absent: None,
            pace: Pace::default(),
            due: Due::default(),
            wanted: Desired::default(),
            indexes: PerFamily::default(),
            settled: false,
            tidied: false,
            reported: BTreeSet::new(),
            publish: watch::Sender::new(None),
            published: None,
            flags,
        };
        keeper.read_netconf();
        keeper.identify();
        keeper.restore().await;
        Ok(keeper)
    }

    /// This node's name in the cluster.
    #[must_use]
    pub fn node_name(&self) -> &str {
        &self.node_name
    }

    /// What is to be published.
    #[must_use]
    pub fn publications(&self) -> watch::Receiver<Option<Value>> {
        self.publish.subscribe()
    }

    /// What the kernel should have.
    #[must_use]
    pub fn wanted(&self) -> &Desired {
        &self.wanted
    }

    /// Tells the monitor which devices are ours, and which is the one below.
    pub fn show(&self, monitor: &mut Monitor) {
        monitor.see(self.indexes, self.underlay.as_ref().map(|underlay| underlay.ifindex));
    }

    /// One line on what is awaited, for systemd.
    #[must_use]
    pub fn status(&self) -> String {
        match self.board.not_ready() {
            None => format!("{} peers", self.record.peers.len()),
            Some(why) => why,
        }
    }

    /// From the record, before anybody is asked.
    async fn restore(&mut self) {
        if !self.may_act() {
            let waits = if self.netconf.is_none() && self.record.node.networks.is_empty() {
                format!("waiting for {} (there is no node record)", self.flags.net_config_path.display())
            } else {
                "waiting for the API server (there is no node record)".to_owned()
            };
            log::info!("{waits}");
            self.board.set_not_ready(Some(waits));
            return;
        }
        let was_up = self.mark.holds();
        let mark = self.mark.clone();
        let lock = tokio::task::spawn_blocking(move || mark.lock()).await;
        let _lock = match lock {
            Ok(Ok(lock)) => Some(lock),
            Ok(Err(e)) => {
                log::warn!("{e}; restoring all the same");
                None
            }
            Err(_) => None,
        };
        self.look_below();
        self.save();
        match restore_from(&self.record, &self.kernel, &self.mark) {
            Ok(outcome) => {
                if !was_up && outcome.is_settled() && self.is_whole(&outcome) {
                    self.board.restored();
                }
                self.conclude(outcome, Instant::now());
            }
            Err(e) => self.failed(&format!("restore the overlay: {e}"), Instant::now()),
        }
    }

    /// Whether enough is known to alter the kernel at all.
    fn may_act(&self) -> bool {
        self.knows_peers && !self.record.node.subnets.is_empty() && !self.record.node.networks.is_empty()
    }

    fn read_netconf(&mut self) {
        let path = &self.flags.net_config_path;
        match fs::read_to_string(path) {
            Ok(text) => match netconf::parse(&text) {
                Ok(conf) => self.netconf = Some(conf),
                Err(mistakes) => self.report(format!("{}: {}", path.display(), mistakes.join("; "))),
            },
            Err(e) if e.kind() == ErrorKind::NotFound && !self.record.node.networks.is_empty() => {
                log::debug!("{} is missing; using the record's", path.display());
            }
            Err(e) => self.report(format!("read {}: {e}", path.display())),
        }
    }

    /// Says something once, until it is said no more.
    fn report(&mut self, what: String) {
        if self.reported.insert(what.clone()) {
            log::warn!("{what}");
        }
    }

    /// Brings our own part of the record up to date with everything that is known.
    fn identify(&mut self) {
        let vni = self.netconf.as_ref().map_or(self.record.node.backend.vni, |conf| conf.backend.vni);
        let running = match self.kernel.links(vni) {
            Ok(links) => {
                links.iter().filter_map(|(family, link)| Some((family, link.mac?))).collect::<Vec<_>>()
            }
            Err(e) => {
                self.report(e.to_string());
                Vec::new()
            }
        };
        let mut macs = PerFamily::default();
        for (family, mac) in running {
            *macs.slot(family) = Some(mac);
        }
        let known = Known {
            node_name: &self.node_name,
            host_name: &self.host_name,
            flags: &self.flags,
            netconf: self.netconf.as_ref(),
            own: self.own.as_ref(),
            underlay: self.underlay.as_ref(),
            running: macs,
        };
        let node = identity::update(&self.record.node, known);
        if node.subnets != self.record.node.subnets && !self.record.node.subnets.is_empty() {
            log::warn!(
                "this node's subnets change from {:?} to {:?}",
                self.record.node.subnets,
                node.subnets
            );
        }
        let vni = self.record.node.backend.vni;
        if vni != node.backend.vni && !self.record.node.subnets.is_empty() {
            self.forget_devices(vni);
        }
        let mut changes = Changes::default();
        self.record.put_node(node, &mut changes);
        self.altered(changes);
    }

    /// The record was altered: it is to be saved, and the kernel to follow at once, whether or not the disk has taken
    /// (or was to take) what was altered before.
    fn altered(&mut self, changes: Changes) {
        if !changes.is_empty() {
            self.due.changed.get_or_insert_with(Instant::now);
            self.changes.merge(changes);
        }
    }

    /// net-conf.json has another VNI than last time: the devices of the old one lead nowhere.
    fn forget_devices(&mut self, vni: u32) {
        let names = Family::ALL.map(|family| device_name(family, vni));
        log::warn!("the VXLAN's number is no longer {vni}; removing {}", names.join(" and "));
        let steps = names.map(|name| Step::DeleteDevice { name, index: 0 });
        for failure in self.kernel.carry_out(&steps, &self.record.node) {
            self.report(failure.error.to_string());
        }
    }

    /// Looks for the interface below, and follows it.
    fn look_below(&mut self) {
        self.due.underlay = None;
        if self.record.node.networks.is_empty() {
            return;
        }
        let found = match find_underlay(&self.kernel, &self.record.node) {
            Ok(Ok(underlay)) => Some(underlay),
            Ok(Err(absent)) => {
                let absent = absent.to_string();
                if self.absent.as_ref() != Some(&absent) {
                    log::warn!("the overlay waits for its interface: {absent}");
                    self.absent = Some(absent);
                }
                None
            }
            Err(e) => {
                self.report(e.to_string());
                self.due.underlay = Some(Instant::now());
                return;
            }
        };
        if found == self.underlay {
            return;
        }
        if let Some(underlay) = &found {
            let ips =
                underlay.local_ips.iter().map(|(_, ip)| ip.to_string()).collect::<Vec<_>>().join(" and ");
            log::info!("the overlay uses interface {} with {ips}", underlay.name);
            self.absent = None;
        }
        self.underlay = found;
        self.identify();
        self.due.changed.get_or_insert_with(Instant::now);
    }

    /// Takes in what the API server says.
    pub fn hear(&mut self, heard: Heard) {
        let now = Instant::now();
        match &heard {
            Heard::Lost(why) => {
                if self.api.lost(why) {
                    log::warn!("the API server: {why}; going on with the record");
                } else {
                    log::debug!("the API server: {why}");
                }
            }
            _ => {
                self.board.contact(now);
                if self.api.heard() {
                    log::info!("the API server is there");
                }
            }
        }
        let mut changes = Changes::default();
        let Noted { own, listed } = self.follower.hear(heard, &mut self.record, &mut changes, now);
        self.altered(changes);
        if own {
            self.hear_own();
        }
        if listed {
            log::info!("the API server lists {} peers", self.record.peers.len());
            if !self.knows_peers {
                self.knows_peers = true;
                self.due.changed.get_or_insert(now);
            }
            if self.follower.own().is_none() {
                self.own = None;
            }
        }
    }

    fn hear_own(&mut self) {
        let Some(node) = self.follower.own() else { return };
        let own = annotations::read_own(&self.keys, node, &self.networks());
        if self.own.as_ref() != Some(&own) {
            for problem in &own.problems {
                self.report(format!("our own Node: {problem}"));
            }
            self.own = Some(own);
            self.identify();
            self.look_below();
        }
        self.publish();
    }

    fn networks(&self) -> PerFamily<ipnetwork::IpNetwork> {
        self.netconf.as_ref().map_or(self.record.node.networks, |conf| conf.networks)
    }

    /// Something in the kernel is other than it was.
    pub fn touched(&mut self, overlay: bool, underlay: bool) {
        let now = Instant::now();
        if overlay {
            self.due.touched.get_or_insert(now);
        }
        if underlay {
            self.due.underlay.get_or_insert(now);
        }
    }

    /// Looks at everything now and then: there are things that nobody tells about.
    pub fn tick(&mut self, again: &Notify) {
        let now = Instant::now();
        if self.netconf.is_none() {
            self.read_netconf();
            if self.netconf.is_some() {
                self.reported.clear();
                // The peers that were listed meanwhile were read without knowing the networks.
                again.notify_one();
                self.identify();
                self.hear_own();
            }
        }
        if self.follower.take_question(now) {
            again.notify_one();
        }
        self.pace.forget(now);
        self.touched(true, true);
        let drops: BTreeSet<String> = foreign_drops().into_iter().collect();
        for drop in &drops {
            if self.reported.insert(drop.clone()) {
                log::warn!("{drop}");
                self.board.drifted(Kind::ForeignDrop);
            }
        }
        self.api.write();
        self.publish();
    }

    /// When [`Self::act`] has something to do.
    #[must_use]
    pub fn due(&self) -> Option<Instant> {
        let due = &self.due;
        let changed = due.changed.map(|since| match self.follower.is_listing() && self.knows_peers {
            true => since + LIST_HOLD,
            false => since,
        });
        let first = [changed, due.touched, due.underlay, due.again].into_iter().flatten().min()?;
        Some(due.not_before.map_or(first, |not_before| first.max(not_before)))
    }

    /// Does what is due: the interface below, the record, the kernel, the cluster.
    pub fn act(&mut self) {
        if self.due.underlay.is_some() {
            // What hangs on the interface goes when it goes, without a word about each.
            self.due.touched.get_or_insert_with(Instant::now);
            self.look_below();
        }
        // What the cluster altered, and what failed before, is done at once; what somebody undid has its pace.
        let drift_only = self.due.changed.take().is_none() & !std::mem::take(&mut self.due.failed);
        let touched = self.due.touched.take().is_some();
        self.due.again = None;
        self.save();
        self.board.set_peers(self.record.peers.len());
        if !self.may_act() {
            return;
        }
        let started = Instant::now();
        if !drift_only && !touched && self.settled && self.follow_change() {
            self.rest(started);
            self.publish();
            return;
        }
        let mut repairs = Repairs::new(&mut self.pace, &self.board, started);
        let allow = |step: &Step| !drift_only || repairs.allow(step);
        let outcome = reconcile(&self.kernel, &self.record, self.underlay.as_ref(), allow);
        let again = repairs.again();
        match outcome {
            Ok(outcome) => {
                for step in &outcome.taken {
                    log::debug!("{}: {step}", if drift_only { "put right" } else { "done" });
                }
                if drift_only && !outcome.taken.is_empty() {
                    let shown: Vec<String> = outcome.taken.iter().take(3).map(ToString::to_string).collect();
                    let more = outcome.taken.len().saturating_sub(shown.len());
                    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
                    log::warn!("put right: {}{more}", shown.join(", "));
                }
                self.due.again = again;
                self.conclude(outcome, started);
            }
            Err(e) => self.failed(&format!("compare the kernel with the record: {e}"), started),
        }
        self.rest(started);
        self.publish();
    }

    /// What the cluster changed, in a kernel that nobody has touched. False when that is not enough.
    fn follow_change(&mut self) -> bool {
        if self.record.node.backend.direct_routing {
            return false;
        }
        let wanted = desired(&self.record, self.underlay.as_ref(), &OnLink::default());
        let Some(steps) = delta(&self.wanted, &wanted, &self.indexes) else { return false };
        let failures = self.kernel.carry_out(&steps, &self.record.node);
        if let Some(failure) = failures.first() {
            // Somebody was quicker than the monitor.
            log::debug!("{}; looking at everything", failure.error);
            return false;
        }
        self.report_conflicts(&wanted.conflicts);
        self.wanted = wanted;
        true
    }

    /// Bounds the share of time that the kernel is busy with us.
    fn rest(&mut self, started: Instant) {
        let took = started.elapsed();
        self.board.reconciled(took);
        self.due.not_before = Some(Instant::now() + (took * DUTY).min(LONGEST_REST));
    }

    /// Takes in what a reconcile came to.
    fn conclude(&mut self, mut outcome: Outcome, started: Instant) {
        self.wanted = std::mem::take(&mut outcome.wanted);
        self.indexes = outcome.indexes;
        let whole = self.is_whole(&outcome);
        self.settled = outcome.is_settled() && whole;
        self.report_conflicts(&outcome.conflicts);
        if self.settled && !self.mark.holds() {
            let set = self.mark.set(self.record.node.backend.vni, &outcome.indexes);
            if let Err(e) = set {
                self.report(format!("write the mark of the restored overlay: {e}"));
            }
        }
        if self.settled && !std::mem::replace(&mut self.tidied, true) {
            // Only now: ours are in place, so nothing goes unmasqueraded in between.
            leftovers::remove();
        }
        let not_ready = match (outcome.failures.first(), outcome.held_back.first(), &self.absent) {
            (Some(failure), ..) => Some(format!("{}: {}", failure.step, failure.error)),
            (_, Some(held), _) => Some(format!("{held}, and somebody keeps undoing it")),
            (_, _, Some(absent)) if self.underlay.is_none() => {
                Some(format!("waiting for an interface: {absent}"))
            }
            _ if !whole => Some("waiting for an address of the interface below".to_owned()),
            _ => None,
        };
        if let Some(failure) = outcome.failures.first() {
            self.failed(
                &format!(
                    "{} of {} steps failed: {}",
                    outcome.failures.len(),
                    outcome.taken.len(),
                    failure.error
                ),
                started,
            );
        } else {
            self.due.failures = 0;
        }
        if self.board.set_not_ready(not_ready.clone()) {
            match not_ready {
                None => log::info!("ready, with {} peers", self.record.peers.len()),
                Some(why) => log::warn!("not ready: {why}"),
            }
        }
    }

    /// Tries again, later each time.
    fn failed(&mut self, why: &str, now: Instant) {
        if self.board.set_not_ready(Some(why.to_owned())) {
            log::warn!("{why}");
        }
        self.settled = false;
        let wait = Duration::from_millis(500).saturating_mul(1 << self.due.failures.min(6));
        self.due.failures = self.due.failures.saturating_add(1);
        let at = now + wait.min(Duration::from_secs(15));
        self.due.failed = true;
        self.due.again = Some(self.due.again.map_or(at, |again| again.min(at)));
    }

    fn report_conflicts(&mut self, conflicts: &[Conflict]) {
        for conflict in conflicts {
            let text = conflict.to_string();
            if self.reported.insert(text.clone()) {
                log::warn!("{text}");
                self.board.drifted(Kind::Conflict);
            }
        }
    }

    /// Every family in use has its device.
    fn is_whole(&self, outcome: &Outcome) -> bool {
        let node = &self.record.node;
        let in_use =
            |family: &Family| node.subnets.get(*family).is_some() && node.networks.get(*family).is_some();
        Family::ALL.into_iter().filter(in_use).all(|family| outcome.indexes.get(family).is_some())
    }

    /// Writes what changed. When the disk refuses, memory must do; the store remembers what it owes.
    fn save(&mut self) {
        // A node without a subnet has nothing to come back to, and half of the peers are not to come back to.
        if self.changes.is_empty() || !self.may_act() {
            return;
        }
        let changes = std::mem::take(&mut self.changes);
        match self.store.save(&self.record, &changes) {
            Ok(()) => {}
            Err(e) => {
                self.board.record_write_failed();
                self.report(format!("{e}; going on from memory"));
                self.changes = changes;
            }
        }
    }

    /// Says what the cluster should hear, if it does not show it yet.
    fn publish(&mut self) {
        let Some(node) = self.follower.own() else { return };
        if self.underlay.is_none() || self.indexes.is_empty() {
            return;
        }
        let written = annotations::written(&self.keys, &self.record.node);
        let condition = self.flags.set_network_unavailable && self.settled;
        let untimed = annotations::patch(node, &written, condition, "");
        let Some(untimed) = untimed else {
            self.published = None;
            self.publish.send_if_modified(|waiting| waiting.take().is_some());
            return;
        };
        let fresh = |(patch, at): &(Value, Instant)| *patch == untimed && at.elapsed() < PUBLISH_AGAIN;
        if self.published.as_ref().is_some_and(fresh) {
            return;
        }
        let now = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        self.publish.send_replace(annotations::patch(node, &written, condition, &now));
        self.published = Some((untimed, Instant::now()));
    }
}

/// The record on the disk, if it is this node's, and whether its peers can be relied upon.
fn load(store: &mut RecordStore, given: Option<&str>, host_name: &str) -> Result<(Record, bool), String> {
    let record = match store.load() {
        Ok(Loaded::Record(record)) => *record,
        Ok(Loaded::Nothing) => return Ok((Record::default(), false)),
        Ok(Loaded::Damaged { reason, set_aside }) => {
            let place =
                set_aside.map_or_else(|| "left where it is".into(), |path| format!("now {}", path.display()));
            log::error!("the node record {} is damaged ({reason}); {place}", store.path().display());
            return Ok((Record::default(), false));
        }
        Err(e @ StoreError::NewerSchema(..)) => return Err(e.to_string()),
        Err(e) => {
            log::error!("{e}; going on without it");
            return Ok((Record::default(), false));
        }
    };
    let name = given.map(str::to_owned).or_else(|| crate::flags::name_of_host(host_name));
    match name.filter(|name| *name != record.node.node_name) {
        None => Ok((record, true)),
        Some(name) => {
            let why = format!("it is of node {}, and this is {name}: a cloned disk?", record.node.node_name);
            match store.set_aside(&record.node.node_name) {
                Ok(place) => log::warn!("the node record is now {}: {why}", place.display()),
                Err(e) => log::warn!("the node record is not used ({why}), and cannot be set aside: {e}"),
            }
            Ok((Record::default(), false))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use redb::{Database, TableDefinition};

    fn saved(dir: &Path, node: &str) -> RecordStore {
        let mut record = Record::default();
        node.clone_into(&mut record.node.node_name);
        let changes = Changes { node: true, ..Changes::default() };
        RecordStore::new(dir).save(&record, &changes).unwrap();
        RecordStore::new(dir)
    }

    #[test]
    fn the_record_of_this_node_and_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = RecordStore::new(dir.path());
        assert_eq!(load(&mut store, None, "edge-1").unwrap(), (Record::default(), false));
        let mut store = saved(dir.path(), "edge-1");
        let (record, knows_peers) = load(&mut store, None, "Edge-1").unwrap();
        assert!(record.node.node_name == "edge-1" && knows_peers);
        // Nobody has set the host name yet: the record knows who this is.
        assert!(load(&mut store, None, "localhost").unwrap().1);
        // The name is given, whatever the host is called.
        assert!(load(&mut store, Some("edge-1"), "other").unwrap().1);
        assert_eq!(load(&mut store, Some("edge-2"), "edge-1").unwrap(), (Record::default(), false));
        assert!(!store.path().exists(), "set aside");
        let names: Vec<String> = fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .collect();
        assert!(names.iter().any(|name| name.starts_with("node.redb.edge-1")), "{names:?}");
    }

    #[test]
    fn a_record_of_a_later_version_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = saved(dir.path(), "edge-1");
        let database = Database::open(store.path()).unwrap();
        let writing = database.begin_write().unwrap();
        let meta: TableDefinition<'_, &str, u32> = TableDefinition::new("meta");
        writing.open_table(meta).unwrap().insert("schema", 4_000_000).unwrap();
        writing.commit().unwrap();
        drop(database);
        let before = fs::read(store.path()).unwrap();
        let refused = load(&mut store, None, "edge-1").unwrap_err();
        assert!(refused.contains("schema 4000000"), "{refused}");
        assert_eq!(fs::read(store.path()).unwrap(), before);
    }
}
