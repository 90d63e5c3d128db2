//! The hosts that every other test stands on: own view, own network, a disk that outlives the power, and nothing left.

use integration::exec::wait_until;
use integration::host::Host;
use integration::proc::Namespaces;
use integration::sweep::sweep_killed_tests;
use integration::{leaks, link, proc, tools};
use std::fs;
use std::io::{BufRead, BufReader};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Command, Stdio};
use std::time::Duration;

#[test]
fn a_host_has_its_own_view_of_the_machine() {
    let host = Host::new("edge1").unwrap();
    assert_eq!(host.sh("hostname").unwrap().trim(), "edge1");
    assert_eq!(host.sh("ls /sys/class/net").unwrap().trim(), "lo", "no link of the machine is visible");
    assert_eq!(host.sh("cat /proc/1/comm").unwrap().trim(), "rig", "PID 1 is ours");
    assert_eq!(host.sh("ls /etc/cni/net.d /run/netns").unwrap().trim(), "/etc/cni/net.d:\n\n/run/netns:");
    host.write("/var/lib/cni/mark", "mine").unwrap();
    host.write("/etc/mark", "mine").unwrap();
    assert!(
        !std::path::Path::new("/var/lib/cni/mark").exists() && !std::path::Path::new("/etc/mark").exists()
    );
}

#[test]
fn a_reboot_loses_all_but_the_disk() {
    let mut host = Host::new("edge1").unwrap();
    let boot = host.boot_id().unwrap();
    assert_eq!(host.boot_id().unwrap(), boot, "stable during one boot");
    host.write("/var/lib/kept", "v").unwrap();
    host.write("/etc/kept", "e").unwrap();
    host.write("/run/lost", "r").unwrap();
    host.add_netns("pod").unwrap();
    host.sh("ip link add d0 type bridge").unwrap();
    let daemon =
        host.spawn(host.command("sleep").unwrap().arg("1000"), &host.spec().disk.join("sleep.log")).unwrap();
    daemon.check_alive().unwrap();

    host.reboot().unwrap();

    assert_ne!(host.boot_id().unwrap(), boot);
    assert_eq!(host.read("/var/lib/kept").unwrap() + &host.read("/etc/kept").unwrap(), "ve");
    assert_eq!(
        host.sh("ls /run/netns; ls /sys/class/net; ls /run | grep lost || true").unwrap().trim(),
        "lo"
    );
    wait_until("the daemon to be dead", Duration::from_secs(5), || daemon.check_alive().is_err()).unwrap();
    assert_eq!(host.sh("ps ax | grep -c '[s]leep 1000' || true").unwrap().trim(), "0");
}

#[test]
fn two_hosts_talk_over_a_cable() {
    let (a, b) = (Host::new("a").unwrap(), Host::new("b").unwrap());
    link::connect((&a, "eth0"), (&b, "eth0")).unwrap();
    a.sh("ip addr add 192.0.2.1/24 dev eth0").unwrap();
    b.sh("ip addr add 192.0.2.2/24 dev eth0").unwrap();
    a.sh("ping -c1 -W2 192.0.2.2").unwrap();
}

#[test]
fn a_dropped_host_leaves_nothing_even_after_a_panic() {
    let watch = leaks::Watch::start();
    let mut namespaces = None;
    let mut id = String::new();
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let host = Host::new("edge1").unwrap();
        namespaces = Some(Namespaces::of(host.init_pid().unwrap()).unwrap());
        id = host.spec().id.clone();
        host.add_netns("pod").unwrap();
        // A process that ignores everything but the end of the world.
        let _daemon = host
            .spawn(
                host.command("sh").unwrap().args(["-c", "trap '' TERM HUP INT; sleep 1000"]),
                &host.spec().disk.join("log"),
            )
            .unwrap();
        panic!("on purpose");
    }));
    assert!(panicked.is_err());
    assert!(
        namespaces.unwrap().inhabitants().iter().all(|p| !proc::command_line(p.pid).contains("sleep 1000"))
    );
    assert_eq!(leaks::named(&id), [""; 0]);
    assert!(!std::env::temp_dir().join(&id).exists());
    drop(watch);
}

/// A test runner that is killed runs no `Drop`: the hosts die because the pipe that they hold is closed.
#[test]
fn a_killed_maker_takes_its_hosts_with_it() {
    let mut maker = Command::new(tools::rig().unwrap())
        .arg("hold-host")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(maker.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let init = proc::Process::find(line.trim().parse().unwrap()).unwrap();
    let namespaces = Namespaces::of(init.pid).unwrap();
    assert!(init.alive());

    maker.kill().unwrap();
    maker.wait().unwrap();

    wait_until("the host's end", Duration::from_secs(10), || namespaces.inhabitants().is_empty()).unwrap();
    // Its disk folder could not die with it: `rig down --all` sweeps up such.
    sweep_killed_tests().unwrap();
    let folder = format!("edgeflannel-{}-", maker.id());
    let left = fs::read_dir(std::env::temp_dir()).unwrap().flatten();
    assert!(left.into_iter().all(|entry| !entry.file_name().to_string_lossy().starts_with(&folder)));
}

/// The check that guards all other tests must itself be able to fail.
#[test]
fn a_leak_is_seen() {
    // A netns kept alive by a bind mount on the machine.
    let mut host = Host::new("leaky").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let pin = dir.path().join("pin");
    fs::write(&pin, "").unwrap();
    let mount = Command::new("mount")
        .args(["--bind", &format!("/proc/{}/ns/net", host.init_pid().unwrap())])
        .arg(&pin)
        .status()
        .unwrap();
    assert!(mount.success());
    let error = format!("{:#}", host.power_off().unwrap_err());
    assert!(Command::new("umount").arg(&pin).status().unwrap().success());
    assert!(error.contains("netns mount"), "{error}");
    host.remove().unwrap();

    // A mount that appears on the machine during a watch.
    let watch = leaks::Watch::start();
    assert!(Command::new("mount").args(["-t", "tmpfs", "leak"]).arg(dir.path()).status().unwrap().success());
    let new = watch.new_things();
    assert!(Command::new("umount").arg(dir.path()).status().unwrap().success());
    assert!(new.iter().any(|thing| thing.contains(&*dir.path().to_string_lossy())), "{new:?}");
}
