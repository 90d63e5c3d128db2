//! Plans, and what they leave behind, on a kernel made of maps.

use super::*;
use crate::{
    config::Config,
    pod::{names, wanted::Subject},
};
use cni::{AttachmentId, ContainerId, IfName, Ip, NetConf, NetworkName, Success, Version};
use proptest::prelude::*;
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::Path,
};

fn cidr(text: &str) -> IpNetwork {
    text.parse().unwrap()
}

fn ip(text: &str) -> Ip {
    Ip { address: cidr(text), gateway: None, interface: None }
}

fn config(keys: &str) -> Config {
    let comma = if keys.is_empty() { "" } else { "," };
    let text = format!(r#"{{"cniVersion":"1.0.0","name":"n","type":"edgeflannel"{comma}{keys}}}"#);
    Config::new(&NetConf::parse(text.into(), &mut Version::V1_1_0).unwrap(), None).unwrap()
}

fn attachment(container: &str) -> AttachmentId {
    AttachmentId {
        container_id: ContainerId::parse(container).unwrap(),
        ifname: IfName::parse("eth0").unwrap(),
    }
}

fn wanted_for(container: &str, keys: &str, given: &Success, bridge: Option<&SeenBridge>) -> Wanted {
    let network = NetworkName::parse("n").unwrap();
    let at = attachment(container);
    let of = Subject { network: &network, at: &at, netns: Path::new("/ns/x") };
    Wanted::new(of, &config(keys), None, given, bridge).unwrap()
}

fn dual() -> Success {
    Success { ips: vec![ip("10.1.0.5/24"), ip("fd00::5/64")], ..Success::default() }
}

fn seen_bridge(mac: Mac, addresses: &[&str]) -> SeenBridge {
    let address =
        |text: &&str| Address { cidr: cidr(text), global: !text.starts_with("fe80"), permanent: true };
    SeenBridge {
        index: 1,
        mac: Some(mac),
        mtu: 1400,
        up: true,
        promiscuous: false,
        addresses: addresses.iter().map(address).collect(),
    }
}

const OURS: Mac = Mac([0x0a, 0x58, 10, 1, 0, 1]);
const FOREIGN: Mac = Mac([2, 0, 0, 0, 0, 7]);

#[test]
fn the_result_is_known_beforehand() {
    let wanted = wanted_for("c", r#""mtu":1450"#, &dual(), None);
    let told = |i: usize| {
        let interface = &wanted.result.interfaces[i];
        (
            interface.name.as_str(),
            interface.mac.clone().unwrap(),
            interface.mtu.unwrap(),
            interface.sandbox.clone(),
        )
    };
    assert_eq!(told(0), ("cni0", "0a:58:0a:01:00:01".into(), 1450, None));
    assert_eq!((told(1).0, told(1).3), (wanted.veth.name.as_str(), None));
    assert_eq!(told(2), ("eth0", "0a:58:0a:01:00:05".into(), 1450, Some("/ns/x".into())));
    assert!(wanted.result.ips.iter().all(|ip| ip.interface == Some(2) && ip.gateway.is_some()));
    let routes: Vec<String> =
        wanted.result.routes.iter().map(|route| format!("{} {}", route.dst, route.gw.unwrap())).collect();
    assert_eq!(routes, ["0.0.0.0/0 10.1.0.1", "::/0 fd00::1"]);
    assert_eq!(wanted.gateways, [cidr("10.1.0.1/24"), cidr("fd00::1/64")]);
}

#[test]
fn no_address_no_plan() {
    let network = NetworkName::parse("n").unwrap();
    let at = attachment("c");
    let of = Subject { network: &network, at: &at, netns: Path::new("/ns/x") };
    let refused = Wanted::new(of, &config(""), None, &Success::default(), None);
    assert_eq!(refused, Err(Refusal::NoAddress));
}

#[test]
fn mtu_and_mac_of_a_bridge_that_is_there() {
    let bridge = seen_bridge(FOREIGN, &[]);
    let wanted = wanted_for("c", "", &dual(), Some(&bridge));
    assert_eq!(wanted.veth.mtu, 1400);
    assert_eq!(wanted.result.interfaces[0].mac.as_deref(), Some("02:00:00:00:00:07"));
    let steps = steps(&wanted, &Seen { bridge: Some(bridge), ..Seen::default() }).unwrap();
    assert!(steps.contains(&Step::SetBridge { mac: Some(FOREIGN), promiscuous: false }), "{steps:?}");
}

#[test]
fn a_gateway_that_ipam_names_is_taken() {
    let mut given = dual();
    given.ips[0].gateway = Some("10.1.0.254".parse().unwrap());
    let wanted = wanted_for("c", "", &given, None);
    assert_eq!(wanted.gateways[0], cidr("10.1.0.254/24"));
    assert_eq!(wanted.bridge.mac.unwrap().to_string(), "0a:58:0a:01:00:fe");
}

#[test]
fn routes_of_ipam_and_the_default_route() {
    let via = |text: &str| Some(text.parse().unwrap());
    let routes_with = |keys: &str, routes: &[Route]| -> Vec<(String, Option<IpAddr>)> {
        let given = Success { routes: routes.to_vec(), ..dual() };
        wanted_for("c", keys, &given, None).routes.iter().map(|r| (r.dst.to_string(), r.gw)).collect()
    };
    let cluster = Route::new(cidr("10.0.0.0/8"), None);
    assert_eq!(
        routes_with("", std::slice::from_ref(&cluster)),
        [
            ("10.0.0.0/8".into(), via("10.1.0.1")),
            ("0.0.0.0/0".into(), via("10.1.0.1")),
            ("::/0".into(), via("fd00::1"))
        ]
    );
    // IPAM's own default route wins; a bare one means the same as ours and is not made twice.
    let own = Route::new(cidr("0.0.0.0/0"), via("10.1.0.9"));
    assert_eq!(routes_with("", &[own])[0], ("0.0.0.0/0".into(), via("10.1.0.9")));
    assert_eq!(routes_with("", &[Route::new(cidr("0.0.0.0/0"), None)]).len(), 2);
    assert_eq!(routes_with(r#""isDefaultGateway":false"#, &[cluster]).len(), 1);
    assert_eq!(routes_with(r#""isGateway":false"#, &[]), []);
}

#[test]
fn which_addresses_are_old_gateways() {
    let wanted = wanted_for("c", "", &Success { ips: vec![ip("10.1.0.5/24")], ..Success::default() }, None);
    let addresses = ["10.1.0.1/24", "10.9.0.1/24", "192.168.7.7/32", "fd00::1/64", "fe80::1/64"];
    let mut bridge = seen_bridge(OURS, &addresses);
    let leased = Address { cidr: cidr("172.16.0.2/24"), global: true, permanent: false };
    bridge.addresses.push(leased);
    let seen = Seen { bridge: Some(bridge), ..Seen::default() };
    let node: Vec<Step> = steps(&wanted, &seen).unwrap().into_iter().filter(is_nodes).collect();
    assert_eq!(node, [Step::DropGateway(cidr("10.9.0.1/24"))]);

    let strict = wanted_for("c", r#""forceAddress":false"#, &dual(), None);
    assert_eq!(steps(&strict, &seen), Err(Refusal::OtherGateway(cidr("10.9.0.1/24"))));
}

#[test]
fn doing_it_again_changes_nothing_of_the_node() {
    let wanted = wanted_for("c", r#""ipMasq":true,"ipam":{"subnet":"10.1.0.0/24"}"#, &dual(), None);
    let chain = wanted.masquerade.clone().unwrap();
    let mut seen = Seen {
        bridge: Some(seen_bridge(OURS, &["10.1.0.1/24", "fd00::1/64", "fe80::1/64"])),
        rules: chain.rules.iter().map(ToString::to_string).collect(),
        ..Seen::default()
    };
    assert!(!steps(&wanted, &seen).unwrap().iter().any(is_nodes));
    seen.rules.pop();
    assert!(steps(&wanted, &seen).unwrap().contains(&Step::Masquerade(chain)));
    let without = wanted_for("c", "", &dual(), None);
    assert!(steps(&without, &seen).unwrap().contains(&Step::NoMasquerade("masquerade-n".into())));
}

/// Steps that change what belongs to the node, settings aside: they are compared when they are written.
fn is_nodes(step: &Step) -> bool {
    matches!(
        step,
        Step::AddBridge(_)
            | Step::SetBridge { .. }
            | Step::AddGateway(_)
            | Step::DropGateway(_)
            | Step::Masquerade(_)
            | Step::NoMasquerade(_)
    )
}

/// A kernel made of maps.
#[derive(Debug, Clone, Default, PartialEq)]
struct Model {
    bridge: Option<ModelBridge>,
    ports: BTreeMap<String, ModelVeth>,
    chains: BTreeMap<String, Vec<String>>,
    settings: BTreeMap<String, &'static str>,
}

#[derive(Debug, Clone, PartialEq)]
struct ModelBridge {
    mac: Option<Mac>,
    fixed: bool,
    up: bool,
    promiscuous: bool,
    addresses: BTreeSet<IpNetwork>,
}

#[derive(Debug, Clone, Default, PartialEq)]
struct ModelVeth {
    attached: bool,
    hairpin: bool,
    alias: Option<String>,
    pinned: Option<Mac>,
    pod_mac: Option<Mac>,
    pod_up: bool,
    addresses: Vec<IpNetwork>,
    routes: Vec<IpNetwork>,
    announced: bool,
}

impl Model {
    /// Carries out a step as the kernel would, which refuses what makes no sense.
    fn act(&mut self, step: &Step, wanted: &Wanted) {
        let own = wanted.veth.name.clone();
        match step {
            Step::AddBridge(new) => {
                assert!(self.bridge.is_none());
                self.bridge = Some(ModelBridge {
                    mac: new.mac,
                    fixed: new.mac.is_some(),
                    up: true,
                    promiscuous: new.promiscuous,
                    addresses: BTreeSet::new(),
                });
            }
            Step::SetBridge { mac, promiscuous } => {
                let bridge = self.bridge.as_mut().unwrap();
                bridge.up = true;
                bridge.promiscuous = *promiscuous;
                if mac.is_some() {
                    (bridge.mac, bridge.fixed) = (*mac, true);
                }
            }
            Step::DropGateway(cidr) => assert!(self.bridge.as_mut().unwrap().addresses.remove(cidr)),
            Step::AddGateway(cidr) => assert!(self.bridge.as_mut().unwrap().addresses.insert(*cidr)),
            Step::NodeSysctl(sysctl) => {
                self.settings.insert(sysctl.key.clone(), sysctl.value);
            }
            Step::Masquerade(chain) => {
                let rules = chain.rules.iter().map(ToString::to_string).collect();
                self.chains.insert(chain.name.clone(), rules);
            }
            Step::NoMasquerade(chain) => assert!(self.chains.remove(chain).is_some()),
            Step::DeleteLeftover(name) => assert!(self.ports.remove(name).is_some()),
            Step::Detach(former) => {
                let port = self.ports.get_mut(&former.name).unwrap();
                assert!(port.attached);
                (port.attached, port.pinned, port.hairpin) = (false, None, false);
            }
            Step::AddVeth(veth) => {
                assert!(self.bridge.as_ref().is_some_and(|bridge| bridge.up));
                let made = ModelVeth { attached: true, pod_mac: Some(veth.peer_mac), ..ModelVeth::default() };
                assert_eq!(self.ports.insert(veth.name.clone(), made), None);
            }
            Step::SetPort { hairpin, alias, .. } => {
                let port = self.ports.get_mut(&own).unwrap();
                (port.hairpin, port.alias) = (*hairpin, alias.clone());
            }
            Step::Pin(mac) => {
                let port = self.ports.get_mut(&own).unwrap();
                assert!(port.attached && !port.pod_up, "pinned before the pod can send");
                port.pinned = Some(*mac);
            }
            Step::PodSysctls(_) => {
                assert!(!self.ports[&own].pod_up, "settings come before the interface is up")
            }
            Step::PodUp => self.ports.get_mut(&own).unwrap().pod_up = true,
            Step::PodAddress(cidr) => self.ports.get_mut(&own).unwrap().addresses.push(*cidr),
            Step::PodRoute(route) => {
                let port = self.ports.get_mut(&own).unwrap();
                assert!(port.pod_up, "the network is down");
                let gw = route.gw.unwrap();
                assert!(port.addresses.iter().any(|cidr| cidr.contains(gw)), "the gateway is unreachable");
                assert!(!port.routes.contains(&route.dst), "file exists");
                port.routes.push(route.dst);
            }
            Step::Announce(_) => self.ports.get_mut(&own).unwrap().announced = true,
        }
        let mut macs = BTreeSet::new();
        for port in self.ports.values().filter(|port| port.attached) {
            assert!(macs.insert(port.pod_mac), "{step:?}: a hardware address is on the bridge twice");
        }
    }

    fn take_back(&mut self, undo: &Undo) {
        match undo {
            Undo::DeleteVeth(name) => {
                self.ports.remove(name);
            }
            Undo::Attach(former) => {
                let port = self.ports.get_mut(&former.name).unwrap();
                (port.attached, port.pinned, port.hairpin) = (true, Some(former.mac), former.port.hairpin);
            }
        }
    }

    fn seen_bridge(&self) -> Option<SeenBridge> {
        self.bridge.as_ref().map(|bridge| SeenBridge {
            index: 1,
            mac: bridge.mac,
            mtu: 1500,
            up: bridge.up,
            promiscuous: bridge.promiscuous,
            addresses: bridge
                .addresses
                .iter()
                .map(|cidr| Address { cidr: *cidr, global: true, permanent: true })
                .collect(),
        })
    }

    fn seen(&self, wanted: &Wanted) -> Seen {
        let holds = |(name, port): &(&String, &ModelVeth)| {
            port.attached && port.pod_mac == Some(wanted.veth.peer_mac) && **name != wanted.veth.name
        };
        Seen {
            bridge: self.seen_bridge(),
            leftover: self.ports.contains_key(&wanted.veth.name),
            former: self.ports.iter().find(holds).map(|(name, port)| Former {
                index: 9,
                name: name.clone(),
                port: Port { hairpin: port.hairpin, isolated: false, forwarding: true },
                mac: port.pod_mac.unwrap(),
            }),
            rules: self.chains.get(&wanted.masquerade_chain).cloned().unwrap_or_default(),
        }
    }
}

/// Configurations, nodes in every state that an ADD may meet, and the addresses that IPAM gives.
fn scene() -> impl Strategy<Value = (String, Model, Success)> {
    let flag = |name: &'static str| {
        prop_oneof![Just(String::new()), any::<bool>().prop_map(move |on| format!(",\"{name}\":{on}"))]
    };
    let keys = (flag("isGateway"), flag("isDefaultGateway"), flag("ipMasq"), flag("promiscMode"))
        .prop_map(|(a, b, c, d)| format!(r#""mtu":1450{a}{b}{c}{d}"#));
    let addresses = prop_oneof![
        Just(BTreeSet::new()),
        Just(BTreeSet::from([cidr("10.1.0.1/24"), cidr("fd00::1/64")])),
        Just(BTreeSet::from([cidr("10.7.0.1/16"), cidr("fd07::1/64"), cidr("192.168.0.1/32")])),
    ];
    let mac = prop_oneof![Just(OURS), Just(FOREIGN)];
    let bridge = (mac, any::<bool>(), any::<bool>(), any::<bool>(), addresses).prop_map(
        |(mac, fixed, up, promiscuous, addresses)| ModelBridge {
            mac: Some(mac),
            fixed: fixed || mac == OURS,
            up,
            promiscuous,
            addresses,
        },
    );
    let pod = |addresses: &'static [&'static str]| {
        let mac = Mac::of_address(cidr(addresses[0]).ip());
        ModelVeth {
            attached: true,
            hairpin: true,
            pinned: Some(mac),
            pod_mac: Some(mac),
            pod_up: true,
            addresses: addresses.iter().copied().map(cidr).collect(),
            ..ModelVeth::default()
        }
    };
    let own = names::host_veth(&NetworkName::parse("n").unwrap(), &attachment("c"));
    let former = pod(&["10.1.0.5/24"]);
    let bystander = pod(&["10.1.0.6/24"]);
    let leftover = ModelVeth { pod_mac: Some(Mac([2, 9, 9, 9, 9, 9])), ..ModelVeth::default() };
    let ports = (any::<bool>(), any::<bool>(), any::<bool>()).prop_map(move |(a, b, c)| {
        let all = [("vethformer", a, &former), ("vethother", b, &bystander), (own.as_str(), c, &leftover)];
        all.into_iter()
            .filter(|(_, is, _)| *is)
            .map(|(name, _, port)| (name.to_owned(), port.clone()))
            .collect()
    });
    let model =
        (proptest::option::of(bridge), ports, any::<bool>()).prop_map(|(bridge, ports, stale)| Model {
            ports: if bridge.is_some() { ports } else { BTreeMap::new() },
            bridge,
            chains: if stale {
                BTreeMap::from([("masquerade-n".into(), vec!["old".into()])])
            } else {
                BTreeMap::new()
            },
            settings: BTreeMap::new(),
        });
    let given = prop_oneof![
        Just(vec![ip("10.1.0.5/24")]),
        Just(vec![ip("10.1.0.5/24"), ip("fd00::5/64")]),
        Just(vec![ip("10.1.0.5/24"), ip("10.2.0.5/24")]),
    ];
    let given = given.prop_map(|ips| Success { ips, ..Success::default() });
    (keys, model, given)
}

proptest! {
    #[test]
    fn a_plan_gives_what_is_wanted_and_again_changes_nothing((keys, mut model, given) in scene()) {
        let before = model.clone();
        let wanted = wanted_for("c", &keys, &given, model.seen_bridge().as_ref());
        for step in steps(&wanted, &model.seen(&wanted)).unwrap() {
            model.act(&step, &wanted);
        }
        let bridge = model.bridge.clone().unwrap();
        prop_assert!(bridge.up && bridge.fixed && bridge.promiscuous == wanted.bridge.promiscuous);
        prop_assert!(wanted.gateways.iter().all(|cidr| bridge.addresses.contains(cidr)));
        if let Some(host) = before.bridge.filter(|b| b.addresses.contains(&cidr("192.168.0.1/32"))) {
            prop_assert!(host.addresses.contains(&cidr("192.168.0.1/32")), "a person's address stays");
        }
        prop_assert_eq!(bridge.mac.map(|mac| mac.to_string()), wanted.result.interfaces[0].mac.clone());
        let port = &model.ports[&wanted.veth.name];
        prop_assert!(port.attached && port.pod_up && port.announced);
        prop_assert_eq!(port.pinned, Some(wanted.veth.peer_mac));
        prop_assert_eq!(&port.addresses, &wanted.addresses);
        prop_assert_eq!(port.routes.len(), wanted.routes.len());
        prop_assert_eq!(model.chains.contains_key("masquerade-n"), wanted.masquerade.is_some());
        if let Some(bystander) = before.ports.get("vethother") {
            prop_assert_eq!(&model.ports["vethother"], bystander);
        }

        let other = Success { ips: vec![Ip { address: cidr("10.1.0.77/24"), ..given.ips[0].clone() }], ..Success::default() };
        let other = Success { ips: other.ips.into_iter().chain(given.ips[1..].iter().cloned()).collect(), ..other };
        let next = wanted_for("d", &keys, &other, model.seen_bridge().as_ref());
        let again = steps(&next, &model.seen(&next)).unwrap();
        let changes: Vec<&Step> = again.iter().filter(|step| is_nodes(step)).collect();
        // A foreign bridge is told to keep its address each time; that changes nothing.
        let freeze = Step::SetBridge { mac: bridge.mac, promiscuous: bridge.promiscuous };
        prop_assert!(changes.iter().all(|step| **step == freeze), "{:?}", changes);
    }

    #[test]
    fn undoing_any_prefix_leaves_nothing((keys, model, given) in scene(), count in 0_usize..40) {
        let wanted = wanted_for("c", &keys, &given, model.seen_bridge().as_ref());
        let steps = steps(&wanted, &model.seen(&wanted)).unwrap();
        let done = &steps[..count.min(steps.len())];
        let mut after = model.clone();
        for step in done {
            after.act(step, &wanted);
        }
        for undo in done.iter().rev().filter_map(undo) {
            after.take_back(&undo);
        }
        // What a killed ADD of the same attachment had left may be gone; nothing else of any pod differs.
        let mut before = model.ports;
        before.remove(&wanted.veth.name);
        after.ports.remove(&wanted.veth.name).inspect(|left| assert!(left.pinned.is_none(), "only what was left"));
        prop_assert_eq!(after.ports, before);
    }
}
