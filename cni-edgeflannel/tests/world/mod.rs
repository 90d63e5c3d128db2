//! A node of its own for one test: a network namespace that the test's thread moves into, pods that are network
//! namespaces kept alive by a file descriptor, and an IPAM plugin of shell that gives what it is told to.
//!
//! Nothing is mounted or named, so nothing can be left behind: the namespaces go with the test, also when it panics.

#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "each test file uses its part; a test fails by panicking"
)]

use nix::sched::{CloneFlags, setns, unshare};
use serde_json::{Value, json};
use std::{
    fs::{self, File},
    io::Write,
    os::{fd::AsRawFd, unix::fs::PermissionsExt},
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
    thread,
};
use tempfile::TempDir;

/// The IPAM plugin: notes what it is asked, answers with what lies ready for the container.
const IPAM: &str = r#"#!/bin/sh
cd "$(dirname "$0")"
cat > "stdin.$CNI_COMMAND.$CNI_CONTAINERID"
echo "$CNI_COMMAND $CNI_CONTAINERID" >> calls
if [ -e "fail.$CNI_COMMAND" ]; then cat "fail.$CNI_COMMAND"; exit 1; fi
if [ "$CNI_COMMAND" = ADD ]; then cat "result.$CNI_CONTAINERID" 2>/dev/null || cat result; fi
"#;

pub struct World {
    dir: TempDir,
}

pub struct Pod {
    pub container: String,
    namespace: File,
    pub path: PathBuf,
}

/// What the plugin answered.
#[derive(Debug)]
pub struct Answer {
    pub success: bool,
    pub stdout: String,
    pub stderr: String,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    #[track_caller]
    pub fn ok(self) -> Value {
        assert!(self.success, "{self:?}");
        if self.stdout.is_empty() { Value::Null } else { self.json() }
    }

    /// Code and message of the error.
    #[track_caller]
    pub fn error(self) -> (u64, String) {
        assert!(!self.success, "{self:?}");
        let error = self.json();
        (error["code"].as_u64().unwrap(), error["msg"].as_str().unwrap().to_owned())
    }
}

impl World {
    /// Moves this thread into a fresh network namespace. Needs root: without, the test fails.
    pub fn new() -> Self {
        unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace of one's own (needs root)");
        let world = Self { dir: tempfile::tempdir().unwrap() };
        world.sh("ip link set lo up");
        for name in ["ipam-sticky", "host-local"] {
            let file = world.file(name);
            fs::write(&file, IPAM).unwrap();
            fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        }
        world
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// What IPAM gives to a container (or to every one).
    pub fn ipam_gives(&self, container: Option<&str>, result: &Value) {
        let name = container.map_or("result".into(), |container| format!("result.{container}"));
        let mut result = result.clone();
        result["cniVersion"] = json!("1.0.0");
        fs::write(self.file(&name), result.to_string()).unwrap();
    }

    pub fn ipam_gives_addresses(&self, container: &str, addresses: &[&str]) {
        let ips: Vec<Value> = addresses.iter().map(|address| json!({"address": address})).collect();
        self.ipam_gives(Some(container), &json!({"ips": ips}));
    }

    pub fn ipam_fails(&self, verb: &str, code: u32, msg: &str) {
        let error = json!({"cniVersion": "1.0.0", "code": code, "msg": msg});
        fs::write(self.file(&format!("fail.{verb}")), error.to_string()).unwrap();
    }

    pub fn ipam_works(&self, verb: &str) {
        fs::remove_file(self.file(&format!("fail.{verb}"))).unwrap();
    }

    /// What IPAM was asked since the last time, as "VERB container" lines.
    pub fn ipam_calls(&self) -> Vec<String> {
        let calls = fs::read_to_string(self.file("calls")).unwrap_or_default();
        let _ = fs::remove_file(self.file("calls"));
        calls.lines().map(str::to_owned).collect()
    }

    pub fn ipam_stdin(&self, verb: &str, container: &str) -> String {
        fs::read_to_string(self.file(&format!("stdin.{verb}.{container}"))).unwrap()
    }

    pub fn pod(&self, container: &str) -> Pod {
        let namespace = thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).unwrap();
            File::open("/proc/thread-self/ns/net").unwrap()
        });
        let namespace = namespace.join().unwrap();
        let path = PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), namespace.as_raw_fd()));
        Pod { container: container.into(), namespace, path }
    }

    /// Runs a shell line on the node and returns what it printed.
    #[track_caller]
    pub fn sh(&self, line: &str) -> String {
        let output = Command::new("sh").args(["-c", line]).output().unwrap();
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    pub fn conf(&self, keys: Value) -> Value {
        let mut conf = json!({"cniVersion": "1.1.0", "name": "net", "type": "edgeflannel",
            "subnetFile": self.file("subnet.env"), "dataDir": self.file("flannel"),
            "ipam": {"type": "ipam-sticky", "ranges": [[{"subnet": "10.1.0.0/24"}]]}});
        for (key, value) in keys.as_object().unwrap() {
            conf[key] = value.clone();
        }
        conf
    }

    pub fn command(&self, verb: &str, container: &str, netns: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_edgeflannel"));
        command
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("CNI_PATH", self.dir.path())
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", container)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_NETNS", netns)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    pub fn start(&self, command: &mut Command, conf: &Value) -> Child {
        let mut child = command.spawn().unwrap();
        // A plugin that is killed first never reads.
        let _ = child.stdin.take().unwrap().write_all(conf.to_string().as_bytes());
        child
    }

    pub fn call(&self, verb: &str, pod: &Pod, conf: &Value) -> Answer {
        self.call_at(verb, &pod.container, pod.path.to_str().unwrap(), conf)
    }

    pub fn call_at(&self, verb: &str, container: &str, netns: &str, conf: &Value) -> Answer {
        let child = self.start(&mut self.command(verb, container, netns), conf);
        child.wait_with_output().unwrap().into()
    }

    /// ADD with these addresses.
    #[track_caller]
    pub fn add(&self, pod: &Pod, addresses: &[&str], conf: &Value) -> Value {
        self.ipam_gives_addresses(&pod.container, addresses);
        self.call("ADD", pod, conf).ok()
    }

    /// Names of the veths on the node.
    pub fn veths(&self) -> Vec<String> {
        self.sh("ip -o link show type veth | sed 's/^[0-9]*: //; s/[@:].*//'")
            .lines()
            .map(str::to_owned)
            .collect()
    }

    pub fn reaches(&self, address: &str) -> bool {
        ping(address)
    }
}

impl Pod {
    /// Does something inside the pod, on a thread that ends there.
    pub fn within<T: Send>(&self, act: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                setns(&self.namespace, CloneFlags::CLONE_NEWNET).unwrap();
                act()
            });
            inside.join().unwrap()
        })
    }

    #[track_caller]
    pub fn sh(&self, line: &str) -> String {
        let output = self.within(|| Command::new("sh").args(["-c", line]).output().unwrap());
        assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    pub fn reaches(&self, address: &str) -> bool {
        self.within(|| ping(address))
    }

    pub fn has_eth0(&self) -> bool {
        self.within(|| Command::new("ip").args(["link", "show", "eth0"]).output().unwrap().status.success())
    }
}

/// One echo request that is answered within a second.
fn ping(address: &str) -> bool {
    Command::new("ping").args(["-c1", "-W1", address]).output().unwrap().status.success()
}

impl From<Output> for Answer {
    fn from(output: Output) -> Self {
        Self {
            success: output.status.success(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}
