//! Real file systems that are full or read-only, each in a mount namespace of the test's own.
//!
//! Needs root. That it is missing must not look like success where it counts: with CI=true it fails.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests may fail loudly")]

mod support;

use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use serde_json::json;
use std::{fs, path::Path};
use support::process::Node;

/// A mount namespace for this thread and the processes that it starts.
fn own_mounts() -> bool {
    let private = unshare(CloneFlags::CLONE_NEWNS).and_then(|()| {
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
    });
    match private {
        Ok(()) => true,
        Err(error) if std::env::var("CI").is_ok_and(|ci| ci == "true") => {
            panic!("a mount namespace is needed: {error}")
        }
        Err(_) => false,
    }
}

fn tmpfs(at: &Path, size: &str) {
    fs::create_dir_all(at).unwrap();
    let options = format!("size={size}");
    mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), Some(options.as_str())).unwrap();
}

fn remount(at: &Path, flags: MsFlags) {
    mount(None::<&str>, at, None::<&str>, MsFlags::MS_REMOUNT | flags, None::<&str>).unwrap();
}

#[test]
fn a_read_only_disk() {
    if !own_mounts() {
        return;
    }
    let node = Node::subnet("10.1.0.0/24");
    let data = node.path("data");
    tmpfs(&data, "4m");
    let before = node.add("c1", "a").addresses();
    node.add("c2", "b");
    node.del("c2", "b");
    remount(&data, MsFlags::MS_RDONLY);

    assert_eq!(node.add("c3", "a").addresses(), before, "who has an address gets it");
    assert!(node.path("run/net.notes").exists());
    assert_eq!(node.add("c3", "a").addresses(), before);
    assert_eq!(node.list()[0]["container"], "c3");
    assert!(node.del("c1", "a").ok);
    assert_eq!(node.list()[0]["state"], "active", "c1 does not own it any more");
    assert_eq!(node.add("c4", "b").addresses(), ["10.1.0.3"]);
    assert!(node.del("c3", "a").ok);
    assert_eq!(node.list()[0]["state"], "idle");
    let refused = node.add("c5", "new");
    assert_eq!(refused.code(), 11);
    let said = refused.json["msg"].as_str().unwrap();
    assert!(
        said.contains("Read-only") && said.contains("pod default/new") && said.contains("net.redb"),
        "{said}"
    );
    assert_eq!(node.call("STATUS", "", "").code(), 50);
    let pinned = node.person(&["pin", "default/a", "10.1.0.9"]);
    assert!(String::from_utf8_lossy(&pinned.stderr).contains("Read-only"), "{pinned:?}");
    assert!(node.told(&["verify"]).contains("nothing wrong"));

    // /run cannot be written either: nothing is promised.
    let run = node.path("run");
    let notes = fs::read(run.join("net.notes")).unwrap();
    fs::remove_dir_all(&run).unwrap();
    fs::write(&run, "in the way").unwrap();
    assert_eq!(node.add("c6", "a").code(), 11);
    fs::remove_file(&run).unwrap();
    fs::create_dir(&run).unwrap();
    fs::write(run.join("net.notes"), notes).unwrap();

    remount(&data, MsFlags::empty());
    assert_eq!(node.add("c5", "new").addresses(), ["10.1.0.4"]);
    assert!(!run.join("net.notes").exists(), "merged");
    let rows = node.list();
    assert_eq!(rows[0]["state"], "idle");
    assert_eq!(rows[1]["container"], "c4");
    assert!(node.told(&["verify"]).contains("nothing wrong"));
}

#[test]
fn a_full_disk() {
    if !own_mounts() {
        return;
    }
    let node = Node::new(json!({"ranges": [[{"subnet": "10.1.0.0/16"}], [{"subnet": "fd00::/64"}]]}));
    let data = node.path("data");
    tmpfs(&data, "600k");
    let before = node.add("c", "first").addresses();
    // First other files fill it, then our own would have to grow.
    let mut filler = Vec::new();
    for number in 0.. {
        let path = data.join(format!("filler{number}"));
        if fs::write(&path, vec![1; 4096]).is_err() {
            fs::remove_file(path).unwrap();
            break;
        }
        filler.push(path);
    }
    let mut fitted = 0;
    let refused = loop {
        let answer = node.add(&format!("c{fitted}"), &format!("p{fitted}"));
        if !answer.ok {
            break answer;
        }
        fitted += 1;
        assert!(fitted < 2_000, "the disk never fills");
    };
    assert_eq!(refused.code(), 11, "{refused:?}");
    assert!(refused.json["msg"].as_str().unwrap().contains("No space left"), "{refused:?}");
    assert_eq!(node.add("again", "first").addresses(), before);
    assert!(node.del("again", "first").ok);
    assert_eq!(node.add("once more", "first").code(), 4, "not a container id");
    assert_eq!(node.add("more", "first").addresses(), before);
    assert!(node.told(&["verify"]).contains("nothing wrong"));
    filler.iter().for_each(|path| fs::remove_file(path).unwrap());
    assert_eq!(node.add("cn", &format!("p{fitted}")).addresses().len(), 2);
    assert_eq!(node.list().iter().find(|row| row["pod"] == "first").unwrap()["container"], "more");
    assert!(node.told(&["verify"]).contains(&format!("{} bindings", fitted + 2)));
}

#[test]
fn a_disk_that_was_never_writable() {
    if !own_mounts() {
        return;
    }
    let node = Node::subnet("10.1.0.0/24");
    let data = node.path("data");
    tmpfs(&data, "1m");
    remount(&data, MsFlags::MS_RDONLY);
    let refused = node.add("c1", "a");
    assert_eq!(refused.code(), 11);
    assert!(refused.json["msg"].as_str().unwrap().contains("there is no state yet"), "{refused:?}");
}
