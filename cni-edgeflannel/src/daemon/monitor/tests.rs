//! Which events matter, and that the kernel's are read rightly.

use super::*;
use crate::overlay::{Device, Entries};

const MAC: Mac = Mac([2, 0, 0, 0, 0, 2]);
const OTHER: Mac = Mac([2, 0, 0, 0, 0, 9]);

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// One peer, 10.244.2.0/24 at 192.168.0.2; our device has number 7, the interface below 2.
fn wanted() -> Desired {
    let entries = Entries {
        neighbours: [(ip("10.244.2.0"), MAC)].into(),
        fdb: [(MAC, ip("192.168.0.2"))].into(),
        routes: [("10.244.2.0/24".parse().unwrap(), Hop::Vxlan(ip("10.244.2.0")))].into(),
    };
    let device = Device {
        name: "flannel.1".into(),
        vni: 1,
        port: 8472,
        link: 2,
        local: ip("192.168.0.1"),
        learning: false,
        gbp: false,
        mac: Mac([2, 0, 0, 0, 0, 1]),
        mtu: 1450,
        address: "10.244.1.0/32".parse().unwrap(),
        disable_tx_checksum: false,
        entries,
    };
    Desired {
        devices: PerFamily { v4: Some(device), v6: None },
        unwanted: PerFamily { v4: None, v6: Some("flannel-v6.1".into()) },
        ..Desired::default()
    }
}

fn view() -> View {
    View { devices: PerFamily { v4: Some(7), v6: None }, underlay: Some(2), ports: BTreeSet::new() }
}

fn link(index: u32, name: &str, port: bool, gone: bool) -> Event {
    Event::Link { index, name: name.into(), port, gone }
}

fn route(dst: &str, gateway: &str, device: u32, onlink: bool, gone: bool) -> Event {
    let dst = (dst != "default").then(|| dst.parse().unwrap());
    Event::Route { dst, gateway: Some(ip(gateway)), device: Some(device), onlink, gone }
}

fn neighbour(index: u32, address: &str, mac: Mac, permanent: bool, gone: bool) -> Event {
    Event::Neighbour { index, ip: ip(address), mac: Some(mac), permanent, gone }
}

fn fdb(index: u32, mac: Mac, place: &str, permanent: bool, gone: bool) -> Event {
    Event::Fdb { index, mac, place: Some(ip(place)), permanent, gone }
}

#[test]
fn what_matters() {
    let nothing = [
        // Our own work, told back to us.
        route("10.244.2.0/24", "10.244.2.0", 7, true, false),
        neighbour(7, "10.244.2.0", MAC, true, false),
        fdb(7, MAC, "192.168.0.2", true, false),
        // Removal of what is not wanted.
        route("10.244.9.0/24", "10.244.9.0", 7, true, true),
        neighbour(7, "10.244.9.0", OTHER, true, true),
        fdb(7, OTHER, "192.168.0.9", true, true),
        fdb(7, MAC, "192.168.0.77", true, true),
        link(8, "flannel-v6.1", false, true),
        // Other people's affairs.
        route("10.9.0.0/24", "192.168.0.254", 2, false, false),
        route("10.244.77.0/24", "10.244.77.1", 7, false, false),
        neighbour(2, "192.168.0.254", OTHER, false, false),
        neighbour(7, "10.244.9.1", OTHER, false, false),
        fdb(5, OTHER, "0.0.0.0", true, false),
        link(12, "veth1234", true, false),
    ];
    for event in nothing {
        assert_eq!(touches(&event, &mut view(), &wanted()), Touched::default(), "{event:?}");
    }
    let overlay = [
        route("10.244.2.0/24", "10.244.2.0", 7, true, true),
        route("10.244.2.0/24", "192.168.0.254", 2, false, false),
        route("10.244.2.0/24", "10.244.2.0", 7, false, false),
        route("10.244.9.0/24", "10.244.9.0", 7, true, false),
        neighbour(7, "10.244.2.0", MAC, true, true),
        neighbour(7, "10.244.2.0", OTHER, true, false),
        neighbour(7, "10.244.2.0", MAC, false, false),
        neighbour(7, "10.244.9.0", OTHER, true, false),
        fdb(7, MAC, "192.168.0.2", true, true),
        fdb(7, MAC, "192.168.0.9", true, false),
        fdb(7, OTHER, "192.168.0.9", true, false),
        link(7, "flannel.1", false, true),
        link(7, "flannel.1", false, false),
        link(8, "flannel-v6.1", false, false),
        Event::Address { index: 7 },
    ];
    for event in overlay {
        assert_eq!(
            touches(&event, &mut view(), &wanted()),
            Touched { overlay: true, underlay: false },
            "{event:?}"
        );
    }
    let underlay = [
        route("default", "192.168.0.254", 2, false, true),
        link(2, "eth0", false, false),
        link(3, "wwan0", false, false),
        link(2, "eth0", true, false),
        Event::Address { index: 2 },
        Event::Address { index: 3 },
    ];
    for event in underlay {
        assert_eq!(
            touches(&event, &mut view(), &wanted()),
            Touched { overlay: false, underlay: true },
            "{event:?}"
        );
    }
}

#[test]
fn a_device_made_anew_is_known_by_its_name() {
    let (mut view, wanted) = (view(), wanted());
    let _ = touches(&link(7, "flannel.1", false, true), &mut view, &wanted);
    let again = route("10.244.2.0/24", "10.244.2.0", 9, true, false);
    assert!(touches(&again, &mut view, &wanted).overlay, "not ours yet");
    let _ = touches(&link(9, "flannel.1", false, false), &mut view, &wanted);
    assert!(!touches(&again, &mut view, &wanted).overlay);
}

#[test]
fn pods_addresses_do_not_matter() {
    let (mut view, wanted) = (view(), wanted());
    let _ = touches(&link(12, "veth1", true, false), &mut view, &wanted);
    assert_eq!(touches(&Event::Address { index: 12 }, &mut view, &wanted), Touched::default());
    let _ = touches(&link(12, "veth1", true, true), &mut view, &wanted);
    assert!(view.ports.is_empty());
}

#[test]
fn tables_by_name() {
    let message = |kind: u16, name: &[u8]| {
        let length = u16::try_from(4 + name.len()).unwrap();
        let mut bytes = vec![0; 20];
        bytes.extend(length.to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(name);
        let whole = u32::try_from(bytes.len()).unwrap();
        bytes[..4].copy_from_slice(&whole.to_ne_bytes());
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    };
    let ours = message(1, b"edgeflannel\0");
    let other = message(1, b"kube-proxy\0");
    assert!(names_table(&ours, "edgeflannel"));
    assert!(names_table(&[other.clone(), ours.clone()].concat(), "edgeflannel"));
    assert!(!names_table(&other, "edgeflannel"));
    assert!(!names_table(&message(2, b"edgeflannel\0"), "edgeflannel"));
    for cut in 0..ours.len() {
        let _ = names_table(&ours[..cut], "edgeflannel");
    }
}
