//! Random verbs against a plain map: what must be true of every answer and of the state after it, and that the
//! store on disk gives the same answers as the map.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests may fail loudly")]

mod support;

use ipam_sticky::{
    address::Address,
    allocate::Refusal,
    identity::Identity,
    ownership,
    range::{Pools, Span},
    record::Owner,
    store::{Error, Store},
    view::{Attachment, Changes, Now, View},
};
use proptest::prelude::*;
use std::collections::HashSet;
use support::{Model, at, attachment, pod, range};

/// What happens on a node.
#[derive(Debug, Clone)]
enum Verb {
    Add {
        who: u8,
        container: u8,
        requested: Option<u8>,
    },
    AddPlain {
        container: u8,
    },
    Del {
        container: u8,
    },
    Gc {
        valid: Vec<u8>,
    },
    Pin {
        who: u8,
        last_byte: u8,
    },
    Unpin {
        who: u8,
    },
    Free,
    Reboot,
    /// The configuration changes to another of the list.
    Configure(u8),
}

fn verbs() -> impl Strategy<Value = Vec<Verb>> {
    let verb = prop_oneof![
        8 => (0..9_u8, 0..14_u8, prop::option::weighted(0.1, 0..20_u8))
            .prop_map(|(who, container, requested)| Verb::Add { who, container, requested }),
        2 => (0..14_u8).prop_map(|container| Verb::AddPlain { container }),
        6 => (0..14_u8).prop_map(|container| Verb::Del { container }),
        1 => prop::collection::vec(0..14_u8, 0..10).prop_map(|valid| Verb::Gc { valid }),
        1 => (0..9_u8, 0..20_u8).prop_map(|(who, last_byte)| Verb::Pin { who, last_byte }),
        1 => (0..9_u8).prop_map(|who| Verb::Unpin { who }),
        1 => Just(Verb::Free),
        1 => Just(Verb::Reboot),
        1 => (0..4_u8).prop_map(Verb::Configure),
    ];
    prop::collection::vec(verb, 1..60)
}

/// Small, so that they run out: eight addresses, less the never-given ones.
fn configurations() -> Vec<Pools> {
    let v4 = || vec![range("10.0.0.0/28", "", "10.0.0.9")];
    let v6 = || vec![range("fd00::/64", "", "fd00::9")];
    let excluded = [Span::from(at("10.0.0.4")), Span { first: at("fd00::2"), last: at("fd00::3") }];
    vec![
        Pools::new(vec![v4()], &excluded[..1]).unwrap(),
        Pools::new(vec![v4(), v6()], &excluded).unwrap(),
        Pools::new(vec![v6(), vec![range("10.0.0.0/28", "10.0.0.3", "10.0.0.6")]], &[]).unwrap(),
        Pools::new(vec![vec![range("10.0.0.0/28", "", "10.0.0.3"), range("10.9.0.0/29", "", "")]], &[])
            .unwrap(),
    ]
}

/// The world around the state.
struct World {
    pools: Vec<Pools>,
    configured: usize,
    boot: u32,
    max_idle: u64,
}

impl World {
    fn pools(&self) -> &Pools {
        &self.pools[self.configured]
    }

    fn boot(&self) -> String {
        format!("boot {}", self.boot)
    }

    fn owner(&self, container: u8) -> Owner {
        // Every third container's namespace never goes away within its boot.
        let netns = if container.is_multiple_of(3) { "alive" } else { "gone" };
        Owner::new(&format!("c{container}"), netns, &self.boot(), "")
    }
}

fn lives(netns: &str) -> bool {
    netns == "alive"
}

type Answer = Result<(Vec<Address>, Changes), Refusal>;

/// One decision over any view.
fn decide(world: &World, verb: &Verb, view: &dyn View) -> Answer {
    let boot = world.boot();
    let now = Now { boot: &boot, lives: &lives, max_idle: world.max_idle };
    let nothing = |changes| Ok((Vec::new(), changes));
    match verb {
        Verb::Add { who, container, requested } => {
            let requested: Vec<Address> =
                requested.iter().map(|byte| at(&format!("10.0.0.{byte}"))).collect();
            let identity = pod(&format!("p{who}"));
            ownership::acquire(world.pools(), view, &identity, world.owner(*container), &requested, &now)
        }
        Verb::AddPlain { container } => {
            let identity = Identity::Container { id: format!("c{container}"), ifname: "eth0".into() };
            ownership::acquire(world.pools(), view, &identity, world.owner(*container), &[], &now)
        }
        Verb::Del { container } => {
            nothing(ownership::release(view, &attachment(&format!("c{container}")), &now)?)
        }
        Verb::Gc { valid } => {
            let valid: HashSet<Attachment> = valid.iter().map(|c| attachment(&format!("c{c}"))).collect();
            nothing(ownership::collect(view, &valid, &now)?)
        }
        Verb::Pin { who, last_byte } => {
            let address = at(&format!("10.0.0.{last_byte}"));
            nothing(ownership::pin(view, &pod(&format!("p{who}")).key(), address, &now)?)
        }
        Verb::Unpin { who } => nothing(ownership::unpin(view, &pod(&format!("p{who}")).key(), None, &now)?),
        Verb::Free => nothing(ownership::free_gone(view, &now)?),
        Verb::Reboot | Verb::Configure(_) => nothing(Changes::default()),
    }
}

/// What must be true of an answer, given the state before it.
fn assert_answer(world: &World, verb: &Verb, before: &Model, answer: &Answer) {
    let boot = world.boot();
    let now = Now { boot: &boot, lives: &lives, max_idle: world.max_idle };
    let in_use = |address: &Address, key: &ipam_sticky::identity::Key| {
        before.bindings.iter().any(|(other, binding)| {
            let owned = binding.owner.as_ref().is_some_and(|owner| !now.is_stale(owner));
            other != key && (binding.pins.contains(address) || (owned && binding.held().contains(address)))
        })
    };
    let key = match verb {
        Verb::Add { who, .. } => pod(&format!("p{who}")).key(),
        Verb::AddPlain { container } => {
            Identity::Container { id: format!("c{container}"), ifname: "eth0".into() }.key()
        }
        _ => return,
    };
    match answer {
        Ok((addresses, _)) => {
            assert_eq!(addresses.len(), world.pools().sets().len(), "all sets or none");
            for (address, set) in addresses.iter().zip(world.pools().sets()) {
                assert!(set.iter().any(|range| range.span.contains(*address)));
                assert!(!in_use(address, &key), "{address} is another's");
            }
            // A kept address that may still be given is given, unless a pin or a request is stronger.
            let mine = before.bindings.get(&key).cloned().unwrap_or_default();
            let requested = matches!(verb, Verb::Add { requested: Some(_), .. });
            if mine.pins.is_empty() && !requested {
                for (index, set) in world.pools().sets().iter().enumerate() {
                    let within = |address: &&Address| {
                        world.pools().may_give(**address)
                            && set.iter().any(|range| range.span.contains(**address))
                    };
                    if let Some(kept) = mine.addresses.iter().find(within) {
                        assert_eq!(addresses[index], *kept, "the address is not sticky");
                    }
                }
            }
        }
        Err(Refusal::Exhausted(_)) => {
            let full = world.pools().sets().iter().any(|set| {
                let mut all =
                    set.iter().flat_map(|range| (range.span.first.0..=range.span.last.0).map(Address));
                all.all(|address| !world.pools().may_give(address) || in_use(&address, &key))
            });
            assert!(full, "refused, and no set is full: {before:#?}");
        }
        Err(Refusal::NotAvailable { address, .. }) => {
            let fits = world.pools().may_give(*address) && !in_use(address, &key);
            assert!(!fits, "{address} was refused and is free");
        }
        Err(Refusal::Fault(fault)) => panic!("{fault}"),
    }
}

fn play(verbs: &[Verb], max_idle: u64, mut also: impl FnMut(&World, &Verb, &Model, &Answer)) {
    let mut world = World { pools: configurations(), configured: 0, boot: 1, max_idle };
    let mut model = Model::default();
    for verb in verbs {
        match verb {
            Verb::Reboot => world.boot += 1,
            Verb::Configure(index) => world.configured = usize::from(*index),
            _ => {}
        }
        let answer = decide(&world, verb, &model);
        assert_answer(&world, verb, &model, &answer);
        let given = answer.as_ref().map(|(addresses, _)| addresses.clone()).unwrap_or_default();
        if let Ok((_, changes)) = &answer {
            model.apply(changes);
        }
        model.assert_sound(world.pools(), &given);
        assert!(model.idle_count().unwrap() <= max_idle, "{model:#?}");
        // Again changes nothing and answers the same.
        if let (Verb::Add { requested: None, .. } | Verb::AddPlain { .. }, Ok((addresses, _))) =
            (verb, &answer)
        {
            let (again, changes) = decide(&world, verb, &model).unwrap();
            assert_eq!((&again, changes), (addresses, Changes::default()));
        }
        also(&world, verb, &model, &answer);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn decisions_over_a_map(verbs in verbs(), max_idle in prop_oneof![Just(10_000_u64), 0..4_u64]) {
        play(&verbs, max_idle, |_, _, _, _| {});
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    /// Released, then reserved by another container of the same pod: the same address, whatever others did that
    /// did not run out of addresses.
    #[test]
    fn release_then_reserve_gives_the_same(others in prop::collection::vec((0..200_u8, any::<bool>()), 0..100)) {
        let pools = support::pools(vec![vec![range("10.0.0.0/16", "", "")], vec![range("fd00::/64", "", "")]]);
        let now = support::now();
        let mut model = Model::default();
        let add = |model: &mut Model, name: &str, container: &str| {
            let owner = support::owner(container, support::BOOT);
            let (addresses, changes) = ownership::acquire(&pools, model, &pod(name), owner, &[], &now).unwrap();
            model.apply(&changes);
            addresses
        };
        let before = add(&mut model, "mine", "mine-1");
        model.apply(&ownership::release(&model, &attachment("mine-1"), &now).unwrap());
        for (who, gone) in others {
            add(&mut model, &format!("p{who}"), &format!("c{who}"));
            if gone {
                model.apply(&ownership::release(&model, &attachment(&format!("c{who}")), &now).unwrap());
            }
        }
        prop_assert_eq!(add(&mut model, "mine", "mine-2"), before);
    }

    #[test]
    fn the_store_answers_like_the_map(verbs in verbs(), max_idle in prop_oneof![Just(10_000_u64), 0..4_u64]) {
        let dir = support::scratch();
        let store = |world: &World| {
            let place = ipam_sticky::config::Place { max_idle, ..support::place(dir.path()) };
            Store::new(place, world.boot())
        };
        play(&verbs, max_idle, |world, verb, model, expected| {
            let store = store(world);
            let answered = store.serve(&|view: &dyn View| decide(world, verb, view));
            match (expected, answered) {
                (Ok((expected, _)), Ok(answered)) => assert_eq!(*expected, answered),
                (Err(Refusal::Exhausted(_)), Err(Error::Refused(Refusal::Exhausted(_)))) => {}
                (Err(Refusal::NotAvailable { address, .. }),
                    Err(Error::Refused(Refusal::NotAvailable { address: same, .. }))) => assert_eq!(*address, same),
                (expected, answered) => panic!("the map says {expected:?}, the store {answered:?}"),
            }
            assert_eq!(support::contents(&store), model.bindings);
        });
    }
}
