//! The record on disks that are full or read-only: real ones, mounted in a namespace of the test's own.

use cni_edgeflannel::record::{Changes, Loaded, NodeRecord, Record, RecordStore, StoreError};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};
use std::{env, fs, path::Path, thread};

/// Runs a test with a small disk of its own. The mount is seen by the thread alone and goes with it.
fn with_disk(test: impl FnOnce(&Path) + Send + 'static) {
    let done = thread::spawn(move || {
        let private = || {
            unshare(CloneFlags::CLONE_NEWNS)?;
            mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
        };
        if let Err(e) = private() {
            assert!(env::var_os("CI").is_none(), "CI may not skip this: no mount namespace: {e}");
            println!("SKIPPED: no mount namespace: {e}");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        mount(Some("disk"), dir.path(), Some("tmpfs"), MsFlags::empty(), Some("size=600k")).unwrap();
        test(dir.path());
        umount2(dir.path(), MntFlags::MNT_DETACH).unwrap();
    });
    if let Err(panic) = done.join() {
        std::panic::resume_unwind(panic);
    }
}

fn record(text: &str) -> Record {
    let node = NodeRecord { node_name: "me".into(), annotation_prefix: text.into(), ..NodeRecord::default() };
    Record { node, ..Record::default() }
}

const NODE: Changes = Changes { node: true, peers: std::collections::BTreeSet::new() };

fn loaded(dir: &Path) -> Record {
    match RecordStore::new(dir).load().unwrap() {
        Loaded::Record(record) => *record,
        other => panic!("{other:?}"),
    }
}

fn fill(dir: &Path) {
    use std::io::Write;
    let mut file = fs::File::create(dir.join("ballast")).unwrap();
    while file.write_all(&[1; 4096]).is_ok() {}
}

#[test]
fn a_full_disk() {
    with_disk(|dir| {
        let mut store = RecordStore::new(dir);
        store.save(&record("one"), &NODE).unwrap();
        fill(dir);
        // It may or may not fit into pages that are free already; nothing is lost either way.
        let mut last = "one".to_owned();
        for n in 0..20 {
            let text = format!("{n}").repeat(3000);
            match store.save(&record(&text), &NODE) {
                Ok(()) => last = text,
                Err(StoreError::Io(_, e)) => assert_eq!(e.kind(), std::io::ErrorKind::StorageFull),
                Err(other) => panic!("{other}"),
            }
            assert_eq!(loaded(dir), record(&last), "nothing on disk is damaged");
        }
        fs::remove_file(dir.join("ballast")).unwrap();
        store.save(&record("room again"), &NODE).unwrap();
        assert_eq!(loaded(dir), record("room again"));
        assert!(
            fs::read_dir(dir).unwrap().all(|entry| !entry
                .unwrap()
                .file_name()
                .to_string_lossy()
                .contains("damaged"))
        );
    });
}

#[test]
fn a_disk_that_is_full_from_the_start() {
    with_disk(|dir| {
        fill(dir);
        let mut store = RecordStore::new(dir);
        assert!(matches!(store.load(), Ok(Loaded::Nothing)));
        assert!(matches!(store.save(&record("one"), &NODE), Err(StoreError::Io(..))));
        fs::remove_file(dir.join("ballast")).unwrap();
        store.save(&record("one"), &Changes::default()).unwrap();
        assert_eq!(loaded(dir), record("one"));
    });
}

#[test]
fn a_read_only_disk() {
    for with_lock in [true, false] {
        with_disk(move |dir| {
            RecordStore::new(dir).save(&record("one"), &NODE).unwrap();
            if !with_lock {
                fs::remove_file(dir.join("node.redb.lock")).unwrap();
            }
            let read_only = MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
            mount(None::<&str>, dir, None::<&str>, read_only, None::<&str>).unwrap();
            let mut store = RecordStore::new(dir);
            assert_eq!(store.load().unwrap(), Loaded::Record(Box::new(record("one"))));
            assert!(matches!(store.save(&record("two"), &NODE), Err(StoreError::Io(..))));
            mount(None::<&str>, dir, None::<&str>, MsFlags::MS_REMOUNT, None::<&str>).unwrap();
            store.save(&record("two"), &Changes::default()).unwrap();
            assert_eq!(loaded(dir), record("two"));
        });
    }
}
