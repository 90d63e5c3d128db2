//! What a change in the cluster alters in a kernel that is known to be as it should be.
//!
//! Looking at everything costs tens of milliseconds with 5,000 peers; a cluster in which a thousand nodes change
//! their addresses in a minute would cost seconds. While nobody has touched anything (the [`super::monitor`] would
//! have said so), what should be now and what should have been before say all that there is to do. Only entries
//! are compared; when anything else differs there is no answer, and everything is looked at. Pure.

use crate::{
    overlay::{Desired, Device, Entries, Hop, RouteSeen, Step},
    record::{Family, PerFamily},
};

/// The steps from one to the other; `None` when more than entries through the overlay differ.
#[must_use]
pub fn delta(before: &Desired, after: &Desired, indexes: &PerFamily<u32>) -> Option<Vec<Step>> {
    if before.direct.is_some() || after.direct.is_some() || rest(before) != rest(after) {
        return None;
    }
    let mut steps = Vec::new();
    for family in Family::ALL {
        match (before.devices.get(family), after.devices.get(family)) {
            (None, None) => {}
            (Some(before), Some(after)) if frame(before) == frame(after) => {
                entries(family, &before.entries, &after.entries, *indexes.get(family)?, &mut steps);
            }
            _ => return None,
        }
    }
    Some(steps)
}

/// All but the devices. Conflicts are only told.
fn rest(desired: &Desired) -> impl PartialEq {
    // Named one by one, so that a new field cannot be forgotten.
    let Desired { devices: _, unwanted, sysctls, accept_ra, chains, subnet_env, direct: _, conflicts: _ } =
        desired;
    (unwanted.clone(), sysctls.clone(), accept_ra.clone(), chains.clone(), subnet_env.clone())
}

/// All of a device but its entries.
fn frame(device: &Device) -> impl PartialEq {
    let Device {
        name,
        vni,
        port,
        link,
        local,
        learning,
        gbp,
        mac,
        mtu,
        address,
        disable_tx_checksum,
        entries: _,
    } = device;
    (
        name.clone(),
        (*vni, *port, *link, *local),
        (*learning, *gbp, *mac, *mtu),
        (*address, *disable_tx_checksum),
    )
}

fn entries(family: Family, before: &Entries, after: &Entries, index: u32, steps: &mut Vec<Step>) {
    for (ip, mac) in &after.neighbours {
        if before.neighbours.get(ip) != Some(mac) {
            steps.push(Step::PutNeighbour(family, *ip, *mac));
        }
    }
    for (mac, place) in &after.fdb {
        if before.fdb.get(mac) != Some(place) {
            steps.push(Step::PutFdb(family, *mac, *place));
        }
    }
    for (dst, hop) in &after.routes {
        if before.routes.get(dst) != Some(hop) {
            steps.push(Step::PutRoute(family, *dst, *hop));
        }
    }
    for (dst, hop) in before.routes.iter().filter(|(dst, _)| !after.routes.contains_key(dst)) {
        let (Hop::Vxlan(gateway) | Hop::Direct(gateway)) = *hop;
        steps.push(Step::RemoveRoute(Box::new(RouteSeen {
            dst: *dst,
            metric: RouteSeen::default_metric(family),
            gateway: Some(gateway),
            device: Some(index),
            onlink: true,
            protocol: RouteSeen::PROTOCOL,
            global: true,
        })));
    }
    for (mac, place) in before.fdb.iter().filter(|(mac, _)| !after.fdb.contains_key(mac)) {
        steps.push(Step::RemoveFdb(family, *mac, *place));
    }
    for (ip, mac) in before.neighbours.iter().filter(|(ip, _)| !after.neighbours.contains_key(ip)) {
        steps.push(Step::RemoveNeighbour(family, *ip, *mac));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        mac::Mac,
        overlay::{
            Observed, OnLink, desired,
            observed::{DeviceSeen, LinkSeen, VxlanSeen},
            plan,
        },
        record::{Changes, Peer, PeerEnd, Record, Underlay},
    };
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    const INDEXES: PerFamily<u32> = PerFamily { v4: Some(7), v6: None };

    fn record(peers: &BTreeMap<u8, (u8, u8)>) -> Record {
        let mut record = Record::default();
        record.node.node_name = "me".into();
        record.node.networks.v4 = "10.244.0.0/16".parse().ok();
        record.node.subnets.v4 = "10.244.255.0/24".parse().ok();
        record.node.vtep_macs.v4 = Some(Mac([2, 0, 0, 0, 9, 9]));
        for (subnet, (mac, ip)) in peers {
            let end = PeerEnd {
                subnet: format!("10.244.{subnet}.0/24").parse().unwrap(),
                public_ip: [192, 168, 0, *ip].into(),
                vtep_mac: Mac([2, 0, 0, 0, 0, *mac]),
                since: 0,
            };
            let peer = Peer { name: format!("n{subnet}"), ends: PerFamily { v4: Some(end), v6: None } };
            record.put_peer(peer, 1, &mut Changes::default());
        }
        record
    }

    fn wanted(peers: &BTreeMap<u8, (u8, u8)>) -> Desired {
        let local_ips = PerFamily { v4: Some([192, 168, 0, 250].into()), v6: None };
        let below = Underlay { ifindex: 2, name: "eth0".into(), mtu: 1500, local_ips };
        desired(&record(peers), Some(&below), &OnLink::default())
    }

    /// A kernel that is exactly so.
    fn kernel(wanted: &Desired) -> Observed {
        let device = wanted.devices.v4.as_ref().unwrap();
        let vxlan = VxlanSeen {
            vni: device.vni,
            port: device.port,
            link: device.link,
            local: Some(device.local),
            ..VxlanSeen::default()
        };
        let link = LinkSeen {
            index: 7,
            mac: Some(device.mac),
            mtu: device.mtu,
            up: true,
            vxlan: Some(vxlan),
            tx_checksum: None,
        };
        let routes = device.entries.routes.iter().map(|(dst, hop)| {
            let (Hop::Vxlan(gateway) | Hop::Direct(gateway)) = *hop;
            RouteSeen {
                dst: *dst,
                metric: 0,
                gateway: Some(gateway),
                device: Some(7),
                onlink: true,
                protocol: 3,
                global: true,
            }
        });
        let seen = DeviceSeen {
            addresses: [device.address].into(),
            neighbours: device.entries.neighbours.clone(),
            fdb: device.entries.fdb.iter().map(|(mac, place)| (*mac, *place)).collect(),
            link,
        };
        Observed {
            devices: PerFamily { v4: Some(seen), v6: None },
            routes: routes.collect(),
            sysctls: wanted
                .sysctls
                .iter()
                .map(|sysctl| (sysctl.key.clone(), sysctl.value.to_owned()))
                .collect(),
            chains: wanted
                .chains
                .iter()
                .map(|chain| (chain.name.clone(), chain.rules.iter().map(|rule| rule.comment()).collect()))
                .collect(),
            subnet_env: wanted.subnet_env.as_ref().map(ToString::to_string),
        }
    }

    fn sorted(steps: Vec<Step>) -> Vec<String> {
        let mut steps: Vec<String> = steps.iter().map(|step| format!("{step:?}")).collect();
        steps.sort();
        steps
    }

    fn peers() -> impl Strategy<Value = BTreeMap<u8, (u8, u8)>> {
        proptest::collection::btree_map(1u8..12, (1u8..16, 1u8..5), 0..10)
    }

    proptest! {
        /// The same steps as a look at everything would find.
        #[test]
        fn as_if_everything_had_been_looked_at(before in peers(), after in peers()) {
            let (before, after) = (wanted(&before), wanted(&after));
            prop_assert!(plan(&before, &kernel(&before)).is_empty());
            let steps = delta(&before, &after, &INDEXES).unwrap();
            prop_assert_eq!(sorted(steps), sorted(plan(&after, &kernel(&before))));
        }
    }

    #[test]
    fn anything_else_needs_a_look() {
        let before = wanted(&BTreeMap::from([(1, (1, 1))]));
        assert_eq!(delta(&before, &before, &INDEXES), Some(vec![]));
        assert_eq!(delta(&before, &before, &PerFamily::default()), None, "nobody knows the device");
        let alter = |how: fn(&mut Desired)| {
            let mut after = before.clone();
            how(&mut after);
            delta(&before, &after, &INDEXES)
        };
        assert_eq!(alter(|after| after.devices.v4 = None), None);
        assert_eq!(alter(|after| after.devices.v4.as_mut().unwrap().mtu = 1400), None);
        assert_eq!(alter(|after| after.devices.v4.as_mut().unwrap().local = [10, 0, 0, 1].into()), None);
        assert_eq!(alter(|after| after.chains.clear()), None);
        assert_eq!(alter(|after| after.subnet_env = None), None);
    }
}
