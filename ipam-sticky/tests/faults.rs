//! The disk fails at every single operation, the power goes at every single operation, pages turn to garbage: what
//! was acknowledged survives, nobody's address is lost or given twice, and nothing panics.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests may fail loudly")]

mod support;

use ipam_sticky::{address::Address, identity::Key, record::Binding, store::Error};
use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::FileExt,
    path::Path,
    sync::{Arc, Mutex},
};
use support::{
    add, contents, del,
    disks::{Failing, Volatile},
    pod, pools,
    process::cache_entry,
    range, store,
};

fn one_pool() -> ipam_sticky::range::Pools {
    pools(vec![vec![range("10.0.0.0/16", "", "")], vec![range("fd00::/64", "", "")]])
}

/// Two active pods and an idle one.
fn prepare(dir: &Path) -> BTreeMap<Key, Binding> {
    let (store, pools) = (store(dir), one_pool());
    for (name, container) in [("a", "ca"), ("b", "cb"), ("idle", "cidle")] {
        add(&store, &pools, name, container).unwrap();
    }
    del(&store, "cidle").unwrap();
    contents(&store)
}

fn addresses(state: &BTreeMap<Key, Binding>, name: &str) -> Vec<Address> {
    state.get(&pod(name).key()).map(|binding| binding.addresses.clone()).unwrap_or_default()
}

fn damaged_files(dir: &Path) -> usize {
    let files = fs::read_dir(dir.join("data")).unwrap();
    files.filter(|file| file.as_ref().unwrap().file_name().to_string_lossy().contains("damaged")).count()
}

#[test]
fn the_disk_fails_at_every_operation() {
    let dir = support::scratch();
    let before = prepare(dir.path());
    let state = dir.path().join("data/net.redb");
    let image = fs::read(&state).unwrap();
    let pools = one_pool();
    let mut failed = 0;
    for operation in 0.. {
        fs::write(&state, &image).unwrap();
        let left = Arc::new(Mutex::new(Some(operation)));
        let failing = store(dir.path()).with_backend(Failing::make(&left));
        let added = add(&failing, &pools, "new", "cnew");
        let reached = *left.lock().unwrap() == Some(0);
        let after = contents(&store(dir.path()));
        for name in ["a", "b", "idle"] {
            assert_eq!(addresses(&after, name), addresses(&before, name), "operation {operation}");
        }
        match added {
            Ok(given) => assert_eq!(addresses(&after, "new"), given, "acknowledged, and gone"),
            Err(Error::Unwritable(why)) => {
                failed += 1;
                assert!(why.contains("No space left") && why.contains("net.redb"), "{why}");
            }
            Err(other) => panic!("operation {operation}: {other:?}"),
        }
        // A container that has an address already is served all the same, and so is its DEL.
        fs::write(&state, &image).unwrap();
        *left.lock().unwrap() = Some(operation);
        assert_eq!(add(&failing, &pools, "idle", "again").unwrap(), addresses(&before, "idle"));
        *left.lock().unwrap() = Some(operation);
        del(&failing, "again").unwrap();
        // Room was made: the next write has all of it.
        *left.lock().unwrap() = None;
        assert_eq!(add(&failing, &pools, "idle", "last").unwrap(), addresses(&before, "idle"));
        let after = contents(&store(dir.path()));
        assert_eq!(after[&pod("idle").key()].owner.as_ref().unwrap().container, "last");
        del(&failing, "last").unwrap();
        assert!(!dir.path().join("run/net.notes").exists(), "the notes are merged");
        if !reached {
            break;
        }
    }
    assert!(failed > 10, "only {failed} operations failed");
    assert_eq!(damaged_files(dir.path()), 0);
}

#[test]
fn a_new_file_fails_at_every_operation() {
    let pools = one_pool();
    for operation in 0.. {
        let dir = support::scratch();
        let left = Arc::new(Mutex::new(Some(operation)));
        let failing = store(dir.path()).with_backend(Failing::make(&left));
        let added = add(&failing, &pools, "a", "ca");
        *left.lock().unwrap() = None;
        match added {
            Ok(given) => {
                assert_eq!(addresses(&contents(&failing), "a"), given);
                if operation > 100 {
                    break;
                }
            }
            Err(Error::Unwritable(_)) => {}
            Err(other) => panic!("operation {operation}: {other:?}"),
        }
        assert_eq!(add(&failing, &pools, "b", "cb").unwrap().len(), 2);
        contents(&failing);
        assert_eq!(damaged_files(dir.path()), 0);
    }
}

#[test]
fn the_power_goes_at_every_operation() {
    let dir = support::scratch();
    let before = prepare(dir.path());
    let state = dir.path().join("data/net.redb");
    let image = fs::read(&state).unwrap();
    let pools = one_pool();
    let mut cuts = 0;
    for operation in 0.. {
        let mut survived = true;
        for seed in 0..24 {
            fs::write(&state, &image).unwrap();
            let volatile = store(dir.path()).with_backend(Volatile::make(operation, seed));
            let added = add(&volatile, &pools, "new", "cnew");
            survived &= added.is_ok();
            cuts += u32::from(added.is_err());
            let after = contents(&store(dir.path()));
            for name in ["a", "b", "idle"] {
                assert_eq!(
                    addresses(&after, name),
                    addresses(&before, name),
                    "operation {operation}, seed {seed}"
                );
            }
            if let Ok(given) = added {
                assert_eq!(addresses(&after, "new"), given, "acknowledged, and gone");
            }
            // The next boot goes on writing.
            assert_eq!(add(&store(dir.path()), &pools, "a", "ca2").unwrap(), addresses(&before, "a"));
            contents(&store(dir.path()));
        }
        if survived {
            break;
        }
    }
    assert!(cuts > 200, "only {cuts} power cuts");
    assert_eq!(damaged_files(dir.path()), 0);
}

/// Every other pod is known to libcni as well; then any page of the file turns to garbage. Those are safe; of the
/// others, all but the few whose record was on that very page.
#[test]
fn garbage_pages() {
    let dir = support::scratch();
    let pools = one_pool();
    let healthy = store(dir.path());
    let names: Vec<String> = (0..120).map(|number| format!("p{number}")).collect();
    let results = dir.path().join("cache/results");
    fs::create_dir_all(&results).unwrap();
    let netns = dir.path().join("netns");
    fs::write(&netns, "").unwrap();
    for (number, name) in names.iter().enumerate() {
        let given = add(&healthy, &pools, name, &format!("c-{name}")).unwrap();
        if number % 2 == 0 {
            continue;
        }
        let written: Vec<String> = given.iter().map(|address| format!("{address}/16")).collect();
        let written: Vec<&str> = written.iter().map(String::as_str).collect();
        let entry = cache_entry("net", &format!("c-{name}"), name, &netns, &written);
        fs::write(results.join(format!("net-c-{name}-eth0")), entry).unwrap();
    }
    let before = contents(&healthy);
    let state = healthy.path();
    let image = fs::read(&state).unwrap();
    let pages = image.len() / 4096;
    let mut random = 42_u64;
    let mut next = || {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(random >> 33).unwrap()
    };
    let (mut set_aside, mut asked_again, mut lost) = (0, 0, 0);
    for trial in 0..200 {
        for entry in fs::read_dir(dir.path().join("data")).unwrap() {
            let path = entry.unwrap().path();
            if path.to_string_lossy().contains("damaged") {
                fs::remove_file(path).unwrap();
            }
        }
        fs::write(&state, &image).unwrap();
        let file = fs::File::options().write(true).open(&state).unwrap();
        match trial % 10 {
            0 => file.set_len((next() % image.len()) as u64).unwrap(),
            1 => file.write_all_at(&vec![0; 4096], (next() % pages * 4096) as u64).unwrap(),
            _ => {
                let garbage: Vec<u8> = (0..4096).map(|_| u8::try_from(next() & 255).unwrap()).collect();
                file.write_all_at(&garbage, (next() % pages * 4096) as u64).unwrap();
            }
        }
        drop(file);
        let store = store(dir.path());
        for _ in 0..4 {
            let number = next() % names.len();
            let name = &names[number];
            let again = add(&store, &pools, name, &format!("c2-{name}")).unwrap();
            asked_again += 1;
            if again != addresses(&before, name) {
                assert_eq!(number % 2, 0, "trial {trial}: {name} lost its address");
                lost += 1;
            }
            del(&store, &format!("c2-{name}")).unwrap();
        }
        let fresh = add(&store, &pools, "fresh", "c-fresh").unwrap();
        let is_known = |key: &Key| names.iter().skip(1).step_by(2).any(|name| pod(name).key() == *key);
        let taken = before.iter().filter(|(key, _)| is_known(key));
        let taken = taken.flat_map(|(_, binding)| &binding.addresses).any(|held| fresh.contains(held));
        assert!(!taken, "trial {trial}: {fresh:?} are given twice");
        set_aside += usize::from(damaged_files(dir.path()) > 0);
    }
    assert!(lost * 5 < asked_again, "{lost} of {asked_again} lost their addresses");
    assert!(set_aside > 30, "only {set_aside} of 200 were noticed");
}

#[test]
fn files_that_are_none() {
    let pools = one_pool();
    for content in [&b""[..], b"x", b"not a database at all, but longer than a header", &[0; 8192]] {
        let dir = support::scratch();
        fs::create_dir_all(dir.path().join("data")).unwrap();
        fs::write(dir.path().join("data/net.redb"), content).unwrap();
        let store = store(dir.path());
        assert_eq!(add(&store, &pools, "a", "ca").unwrap().len(), 2);
        assert_eq!(damaged_files(dir.path()), 1, "{} bytes", content.len());
        contents(&store);
        let kept = fs::read(dir.path().join("data/net.redb.damaged-1")).unwrap();
        assert_eq!(kept, content);
    }
}

#[test]
fn a_newer_schema_is_left_alone() {
    let dir = support::scratch();
    prepare(dir.path());
    let state = dir.path().join("data/net.redb");
    let database = redb::Database::open(&state).unwrap();
    let transaction = database.begin_write().unwrap();
    let meta = redb::TableDefinition::<&str, u128>::new("meta");
    transaction.open_table(meta).unwrap().insert("schema", 2).unwrap();
    transaction.commit().unwrap();
    drop(database);
    let image = fs::read(&state).unwrap();
    let store = store(dir.path());
    for error in [add(&store, &one_pool(), "a", "cx").unwrap_err(), del(&store, "ca").unwrap_err()] {
        assert!(matches!(error, Error::Newer(_, 2)), "{error:?}");
        assert!(error.to_string().contains("later version"), "{error}");
    }
    assert_eq!(fs::read(&state).unwrap(), image);
}
