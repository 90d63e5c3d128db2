//! `rig` as a person uses it: up, look, reboot, down, and nothing left on the machine.
#![allow(clippy::unwrap_used, reason = "a test may fail loudly, in its helpers too")]

use integration::cluster::rigs_dir;
use integration::exec::{Output, run, wait_until};
use integration::{leaks, proc, tools};
use std::process::{Command, Stdio};
use std::time::Duration;

/// A rig of a name that nobody else uses; removed whatever happens.
struct Rig {
    name: String,
}

impl Rig {
    fn try_run(&self, words: &[&str]) -> Output {
        // `--name` comes right after the command: what follows may be another program's.
        let mut command = Command::new(tools::rig().unwrap());
        command.args([words[0], "--name", &self.name]).args(&words[1..]);
        run(&mut command, b"", Duration::from_secs(180)).unwrap()
    }

    fn run(&self, words: &[&str]) -> String {
        self.try_run(words).ok().unwrap()
    }

    /// Processes on the machine that are this rig's.
    fn processes(&self) -> Vec<proc::Process> {
        let mark = format!("edgeflannel-rig-{}", self.name);
        let folder = format!("/rigs/{}/", self.name);
        let ours = |process: &proc::Process| {
            let line = proc::command_line(process.pid);
            line.contains(&mark) || line.contains(&folder)
        };
        proc::all().into_iter().filter(ours).collect()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        // Fails when the test has removed it already, and that is fine.
        let _ = self.try_run(&["down"]);
    }
}

#[test]
fn up_look_around_reboot_and_down_leaves_nothing() {
    let _watch = leaks::Watch::start();
    let rig = Rig { name: format!("test-{}", std::process::id()) };

    let up = rig.run(&["up", "--nodes", "2", "--site", "A:node1,node2", "--wan", "delay=5ms"]);
    assert!(up.contains("is up after") && up.contains("node2") && !up.contains("NotReady"), "{up}");
    // It takes 8 to 10 s on an idle machine of two cores; 15 are promised.
    let seconds: f64 = up.split_once("up after ").unwrap().1.split_once(" s").unwrap().0.parse().unwrap();
    assert!(seconds < 30.0, "{up}");
    let again = rig.try_run(&["up"]);
    assert!(again.stderr.contains("is there already"), "{again:?}");

    assert!(rig.run(&["kubectl", "get", "nodes"]).contains("node1"));
    assert_eq!(rig.run(&["enter", "node2", "hostname"]), "node2\n");
    assert_eq!(rig.try_run(&["enter", "node2", "sh", "-c", "exit 7"]).status.code(), Some(7));
    assert!(rig.try_run(&["enter", "nowhere", "true"]).stderr.contains("node1, node2, cloud"));

    rig.run(&["cut", "A"]);
    assert!(rig.run(&["status"]).contains("A is CUT"));
    assert!(!rig.try_run(&["enter", "node1", "ping", "-c1", "-W1", "10.10.0.2"]).status.success());
    rig.run(&["heal"]);
    rig.run(&["enter", "node1", "ping", "-c1", "-W2", "10.10.0.2"]);

    let reboot = rig.try_run(&["reboot", "--power-cut", "node1"]);
    assert!(reboot.stderr.contains("disk image"), "a folder cannot lose what was not synced: {reboot:?}");
    rig.run(&["reboot", "node1"]);
    let status = rig.run(&["status"]);
    assert!(!status.contains("OFF") && !status.contains("ENDED"), "{status}");
    assert!(status.contains("node1's overlay") && status.contains("1 of 1 peers"), "{status}");
    let logs = rig.run(&["logs", "node1"]);
    assert!(logs.contains("kubelet.log") && logs.contains("edgeflanneld.log"), "{logs}");

    let mine = rig.processes();
    assert!(mine.len() > 10, "a rig of this name runs: {}", leaks::list(&mine));
    rig.run(&["down"]);
    let left = rig.processes();
    assert!(left.is_empty(), "left: {}", leaks::list(&left));
    assert_eq!(leaks::named(&rig.name), [""; 0]);
    assert!(rig.try_run(&["status"]).stderr.contains("there is no rig"));
}

#[test]
fn a_rig_that_was_killed_while_it_came_up_is_removed_by_down() {
    let rig = Rig { name: format!("killed-{}", std::process::id()) };
    let mut up = Command::new(tools::rig().unwrap());
    let mut up =
        up.args(["up", "--name", &rig.name, "--cni", "bridge"]).stderr(Stdio::null()).spawn().unwrap();
    // As soon as the nodes boot: their hosts are not written down yet.
    let nodes = rigs_dir().join(&rig.name).join("nodes/node1/disk/host.log");
    wait_until("node1 to boot", Duration::from_secs(120), || nodes.exists()).unwrap();
    up.kill().unwrap();
    up.wait().unwrap();
    assert!(!rig.processes().is_empty(), "hosts of `rig up` outlive it");
    rig.run(&["down"]);
    let left = rig.processes();
    assert!(left.is_empty(), "left: {}", leaks::list(&left));
    assert_eq!(leaks::named(&rig.name), [""; 0]);
}

/// `down` removes a folder: of all words, the rig's name must not lead elsewhere.
#[test]
fn a_name_that_is_a_path_is_refused() {
    for name in ["", ".", "..", "../tools", "a/b", "A"] {
        let rig = tools::rig().unwrap();
        for command in ["up", "down", "status"] {
            let out =
                run(Command::new(rig).args([command, "--name", name]), b"", Duration::from_secs(10)).unwrap();
            assert!(out.stderr.contains("a rig's name is made of"), "{command} {name:?}: {out:?}");
        }
    }
}
