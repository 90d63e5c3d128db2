//! `edgeflanneld status`: this node, its peers, and what the kernel has against what is wanted.
//!
//! Needs no daemon: the record and the kernel are read, and what only a daemon knows of the API server it left in
//! /run. A [`Report`] is data; it is rendered as a table for people or as JSON for programs.

use crate::{
    daemon::{apistate, identity},
    flags::Flags,
    overlay::{
        Kind,
        diff::in_kernel,
        kernel::{Kernel, foreign_drops},
        plan,
        reconcile::{compare, find_underlay},
    },
    record::{Loaded, PerFamily, Record, RecordStore},
};
use serde::Serialize;
use std::{
    fmt::{self, Display},
    path::Path,
};

/// What is said. The names are an interface: others parse them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// This node's name.
    pub node: String,
    /// Its part of the cluster's network; IPv4 first, as in all these lists.
    #[serde(rename = "podCIDRs")]
    pub pod_cidrs: Vec<String>,
    /// The hardware addresses of its VXLAN devices.
    #[serde(rename = "vtepMACs")]
    pub vtep_macs: Vec<String>,
    /// What it publishes as its addresses.
    #[serde(rename = "publicIPs")]
    pub public_ips: Vec<String>,
    /// What the daemon knows of the API server.
    pub api: Api,
    /// The other nodes.
    pub peers: Vec<PeerReport>,
    /// What is other than it should be.
    pub drift: Vec<Drift>,
}

/// See [`Report`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Api {
    /// The daemon's last try to reach it worked.
    pub reachable: bool,
    /// When it last said anything, RFC 3339.
    pub last_contact: Option<String>,
}

/// Another node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PeerReport {
    /// Its name.
    pub name: String,
    /// Its part of the cluster's network.
    #[serde(rename = "podCIDRs")]
    pub pod_cidrs: Vec<String>,
    /// Its addresses.
    #[serde(rename = "publicIPs")]
    pub public_ips: Vec<String>,
    /// The hardware addresses of its VXLAN devices.
    #[serde(rename = "vtepMACs")]
    pub vtep_macs: Vec<String>,
    /// All that leads to it is in the kernel.
    pub in_kernel: bool,
}

/// Something that is other than it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Drift {
    /// As in the metric `edgeflannel_drift_total`.
    pub kind: &'static str,
    /// In words.
    pub what: String,
}

impl Drift {
    fn new(kind: Kind, what: impl Display) -> Self {
        Self { kind: kind.as_str(), what: what.to_string() }
    }
}

/// Looks at the record, the kernel, and what the daemon left in /run.
///
/// # Errors
/// When the record or the kernel cannot be read at all.
pub fn look(flags: &Flags, run_dir: &Path) -> Result<Report, String> {
    let mut store = RecordStore::new(&flags.state_dir);
    let record = match store.load().map_err(|e| e.to_string())? {
        Loaded::Record(record) => Some(*record),
        Loaded::Nothing => None,
        Loaded::Damaged { reason, set_aside } => {
            let place = set_aside.unwrap_or_else(|| store.path());
            return Err(format!("the node record was damaged ({reason}); it is {}", place.display()));
        }
    };
    let told = apistate::read(run_dir, &flags.state_dir);
    let api = Api { reachable: told.reachable, last_contact: told.last_contact };
    let Some(mut record) = record else {
        let drift =
            vec![Drift::new(Kind::Link, "there is no node record yet: nothing is known about this node")];
        let node = flags.node_name.clone().unwrap_or_default();
        return Ok(Report { node, api, drift, ..Report::default() });
    };
    record.node = identity::with_flags(&record.node, flags);
    let kernel = Kernel::open().map_err(|e| e.to_string())?;
    let underlay = find_underlay(&kernel, &record.node).map_err(|e| e.to_string())?;
    let mut drift = Vec::new();
    if let Err(absent) = &underlay {
        drift.push(Drift::new(Kind::Link, absent));
    }
    let (wanted, seen) = compare(&kernel, &record, underlay.as_ref().ok()).map_err(|e| e.to_string())?;
    let steps = plan(&wanted, &seen);
    drift.extend(steps.iter().map(|step| Drift::new(step.kind(), step)));
    drift.extend(wanted.conflicts.iter().map(|conflict| Drift::new(Kind::Conflict, conflict)));
    drift.extend(foreign_drops().into_iter().map(|what| Drift::new(Kind::ForeignDrop, what)));
    Ok(report(&record, api, drift, |peer| in_kernel(peer, &record, &wanted, &steps)))
}

/// Puts together what was found.
fn report(record: &Record, api: Api, drift: Vec<Drift>, in_kernel: impl Fn(&str) -> bool) -> Report {
    let peers = record.peers.values().map(|peer| PeerReport {
        name: peer.name.clone(),
        pod_cidrs: list(&peer.ends.map(|_, end| end.subnet)),
        public_ips: list(&peer.ends.map(|_, end| end.public_ip)),
        vtep_macs: list(&peer.ends.map(|_, end| end.vtep_mac)),
        in_kernel: in_kernel(&peer.name),
    });
    let node = &record.node;
    // A MAC of a family that is not in use is kept, but it is on no device.
    let macs = node.subnets.map(|family, _| node.vtep_macs.get(family).copied());
    Report {
        node: node.node_name.clone(),
        pod_cidrs: list(&node.subnets),
        vtep_macs: macs.iter().filter_map(|(_, mac)| Some(mac.as_ref()?.to_string())).collect(),
        public_ips: list(&node.public_ips),
        api,
        peers: peers.collect(),
        drift,
    }
}

fn list<T: Display>(both: &PerFamily<T>) -> Vec<String> {
    both.iter().map(|(_, one)| one.to_string()).collect()
}

/// The table for people.
impl Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let or_none = |list: &[String]| if list.is_empty() { "-".to_owned() } else { list.join(", ") };
        writeln!(f, "node        {}", if self.node.is_empty() { "-" } else { &self.node })?;
        writeln!(f, "pod CIDRs   {}", or_none(&self.pod_cidrs))?;
        writeln!(f, "VTEP MACs   {}", or_none(&self.vtep_macs))?;
        writeln!(f, "public IPs  {}", or_none(&self.public_ips))?;
        let reachable = if self.api.reachable { "reachable" } else { "not reachable" };
        match &self.api.last_contact {
            Some(at) => writeln!(f, "API server  {reachable}, last heard {at}")?,
            None => writeln!(f, "API server  {reachable}, never heard since boot")?,
        }
        let head = ["PEER", "POD CIDRS", "PUBLIC IPS", "VTEP MACS", "IN KERNEL"].map(str::to_owned);
        let row = |peer: &PeerReport| {
            let in_kernel = if peer.in_kernel { "yes" } else { "NO" }.to_owned();
            [
                peer.name.clone(),
                or_none(&peer.pod_cidrs),
                or_none(&peer.public_ips),
                or_none(&peer.vtep_macs),
                in_kernel,
            ]
        };
        let rows: Vec<[String; 5]> = [head].into_iter().chain(self.peers.iter().map(row)).collect();
        let width =
            |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or_default();
        let widths: [usize; 5] = std::array::from_fn(width);
        writeln!(f)?;
        for row in &rows {
            let cells =
                row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect::<Vec<_>>();
            writeln!(f, "{}", cells.join("  ").trim_end())?;
        }
        writeln!(f)?;
        match self.drift.len() {
            0 => writeln!(f, "The kernel is as it should be."),
            count => {
                writeln!(f, "{count} differences:")?;
                self.drift.iter().try_for_each(|drift| writeln!(f, "  {:12}  {}", drift.kind, drift.what))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        mac::Mac,
        record::{Peer, PeerEnd},
    };
    use std::collections::BTreeMap;

    fn sample() -> Report {
        let mut record = Record::default();
        record.node.node_name = "edge-1".into();
        record.node.subnets.v4 = "10.244.1.0/24".parse().ok();
        record.node.vtep_macs =
            PerFamily { v4: Some(Mac([2, 0, 0, 0, 0, 1])), v6: Some(Mac([2, 0, 0, 0, 0, 9])) };
        record.node.public_ips.v4 = "192.168.0.1".parse().ok();
        let end = PeerEnd {
            subnet: "10.244.2.0/24".parse().unwrap(),
            public_ip: "192.168.0.2".parse().unwrap(),
            vtep_mac: Mac([2, 0, 0, 0, 0, 2]),
            since: 1,
        };
        let peer = Peer { name: "edge-2".into(), ends: PerFamily { v4: Some(end), v6: None } };
        record.peers = BTreeMap::from([(peer.name.clone(), peer)]);
        let api = Api { reachable: true, last_contact: Some("2026-11-24T14:00:00Z".into()) };
        let drift = vec![Drift::new(Kind::SubnetEnv, "subnet.env is missing")];
        report(&record, api, drift, |name| name == "edge-2")
    }

    #[test]
    fn the_json_that_others_rely_on() {
        let expected = r#"{"node":"edge-1","podCIDRs":["10.244.1.0/24"],"vtepMACs":["02:00:00:00:00:01"],"publicIPs":["192.168.0.1"],"api":{"reachable":true,"lastContact":"2026-11-24T14:00:00Z"},"peers":[{"name":"edge-2","podCIDRs":["10.244.2.0/24"],"publicIPs":["192.168.0.2"],"vtepMACs":["02:00:00:00:00:02"],"inKernel":true}],"drift":[{"kind":"subnet-env","what":"subnet.env is missing"}]}"#;
        assert_eq!(serde_json::to_string(&sample()).unwrap(), expected);
        let never = serde_json::to_string(&Report::default()).unwrap();
        assert!(
            never.contains(r#""lastContact":null"#) && never.contains(r#""peers":[],"drift":[]"#),
            "{never}"
        );
    }

    #[test]
    fn the_table() {
        let text = sample().to_string();
        for line in [
            "pod CIDRs   10.244.1.0/24",
            "API server  reachable, last heard 2026-11-24T14:00:00Z",
            "PEER    POD CIDRS      PUBLIC IPS   VTEP MACS          IN KERNEL",
            "edge-2  10.244.2.0/24  192.168.0.2  02:00:00:00:00:02  yes",
            "  subnet-env    subnet.env is missing",
        ] {
            assert!(text.lines().any(|one| one == line), "{line:?} in\n{text}");
        }
    }
}
