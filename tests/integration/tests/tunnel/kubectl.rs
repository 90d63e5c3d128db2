//! What a person does with kubectl, each with what must come of it.

use crate::{answers, pod};
use integration::cluster::Cluster;
use integration::exec::{COMMAND_LIMIT, run, shown, wait_for, wait_until};
use integration::tunnel::{self, DAEMON};
use serde_json::json;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// What `kubectl cp` moves, bytes.
const BLOB: usize = 200_000_000;

pub fn command(cluster: &Cluster) -> Command {
    cluster.control_plane().kubectl_command(&cluster.network().cloud).unwrap()
}

/// kubectl while it runs, its output so far, and its stdin. Killed when it is dropped.
pub struct Talk {
    child: Child,
    stdin: Option<ChildStdin>,
    said: Arc<Mutex<Vec<u8>>>,
}

impl Talk {
    /// Starts it.
    pub fn start(command: &mut Command) -> Self {
        let pipes = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        // What script(1) starts is in its group, and ends with it.
        let mut child = pipes.process_group(0).spawn().unwrap();
        let said = Arc::new(Mutex::new(Vec::new()));
        let (mut stdout, heard) = (child.stdout.take().unwrap(), said.clone());
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length) = stdout.read(&mut buffer) {
                if length == 0 {
                    return;
                }
                heard.lock().unwrap().extend_from_slice(&buffer[..length]);
            }
        });
        Self { stdin: child.stdin.take(), child, said }
    }

    /// What it has said so far.
    pub fn said(&self) -> String {
        String::from_utf8_lossy(&self.said.lock().unwrap()).into_owned()
    }

    fn say(&mut self, text: &str) {
        self.stdin.as_mut().unwrap().write_all(text.as_bytes()).unwrap();
    }

    /// Waits until it has said this.
    pub fn hears(&self, text: &str) {
        let heard = wait_until(text, COMMAND_LIMIT, || self.said().contains(text));
        assert!(heard.is_ok(), "it never said {text:?}, but {:?}", self.said());
    }

    /// Waits for its end; whether it succeeded.
    pub fn ends(&mut self, limit: Duration) -> bool {
        wait_for("the end of kubectl", limit, || Ok(self.child.try_wait()?)).unwrap().success()
    }
}

impl Drop for Talk {
    fn drop(&mut self) {
        let group = nix::unistd::Pid::from_raw(self.child.id() as i32);
        let _ = nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL);
        let _ = self.child.wait();
    }
}

/// kubectl fails, and tells the person this.
pub fn refused(cluster: &Cluster, arguments: &[&str], sentence: &str) {
    let out = run(command(cluster).args(arguments), b"", COMMAND_LIMIT).unwrap();
    assert!(!out.status.success() && out.stderr.contains(sentence), "{out:?}");
}

/// `logs -f` shows lines as they are written, and ends with the container.
pub fn follows_a_log(cluster: &Cluster, node: &str) {
    let count = "for i in $(seq 1 10); do echo line $i; sleep 0.3; done";
    cluster.apply(&pod("counter", node, count, &json!({}))).unwrap();
    wait_for("the counter's first line", Duration::from_secs(60), || {
        Ok(cluster.kubectl(&["logs", "counter"])?.contains("line 1").then_some(()))
    })
    .unwrap();
    let mut follow = Talk::start(command(cluster).args(["logs", "-f", "counter"]));
    follow.hears("line 2\n");
    let early = follow.said();
    assert!(!early.contains("line 10"), "it came at once, not as it was written: {early}");
    assert!(follow.ends(COMMAND_LIMIT));
    let all: String = (1..=10).map(|i| format!("line {i}\n")).collect();
    wait_until("the last line", Duration::from_secs(5), || follow.said() == all).unwrap();
}

/// `exec -it` from a terminal: a shell with a prompt, whose programs ^C interrupts.
pub fn types(cluster: &Cluster, name: &str) {
    let line = format!("{} exec -it {name} -- sh", shown(&command(cluster)));
    // script(1) gives kubectl the terminal that it asks for.
    let mut shell = Talk::start(Command::new("script").args(["-qec", &line, "/dev/null"]));
    shell.hears("# ");
    shell.say("tty\r");
    shell.hears("/dev/pts/0");
    shell.say("sleep 1000; echo slept\r");
    shell.hears("echo slept");
    std::thread::sleep(Duration::from_millis(500));
    shell.say("\x03");
    shell.say("echo still $((40 + 2))\r");
    shell.hears("still 42");
    shell.say("exit 7\r");
    assert!(!shell.ends(COMMAND_LIMIT), "the shell's exit code is kubectl's: {}", shell.said());
}

/// `attach -i` speaks with a process that has been running.
pub fn attach(cluster: &Cluster, node: &str) {
    let parrot = "while read -r line; do echo got $line; done";
    cluster.apply(&pod("parrot", node, parrot, &json!({"stdin": true, "stdinOnce": true}))).unwrap();
    cluster.wait_pod("default", "parrot").unwrap();
    let mut talk = Talk::start(command(cluster).args(["attach", "-i", "parrot"]));
    for word in ["one", "two"] {
        talk.say(&format!("{word}\n"));
        talk.hears(&format!("got {word}\n"));
    }
    // The end of our half is the end of its input.
    drop(talk.stdin.take());
    assert!(talk.ends(COMMAND_LIMIT));
}

/// `port-forward`: several connections, one after the other.
pub fn forwards_a_port(cluster: &Cluster, name: &str) {
    let talk = Talk::start(command(cluster).args(["port-forward", name, "18080:80"]));
    talk.hears("Forwarding from 127.0.0.1:18080");
    for _ in 0..3 {
        let page =
            cluster.network().cloud.sh("timeout 10 busybox wget -qO- http://127.0.0.1:18080/").unwrap();
        assert_eq!(page.trim(), name);
    }
}

fn sha256(file: &str) -> String {
    let sum = run(Command::new("sha256sum").arg(file), b"", COMMAND_LIMIT).unwrap().ok().unwrap();
    sum.split_whitespace().next().unwrap().to_owned()
}

/// `cp` of 200 MB there and back, every byte; then one whose tunnel breaks in the middle, which must not look complete.
pub fn copies(cluster: &mut Cluster, node: &str) {
    const LIMIT: Duration = Duration::from_secs(180);
    let place = |name: &str| cluster.dir().join(name).display().to_string();
    let (blob, back, part) = (place("blob"), place("back"), place("part"));
    let random = File::open("/dev/urandom").unwrap().take(BLOB as u64);
    std::io::copy(&mut { random }, &mut File::create(&blob).unwrap()).unwrap();
    let sum = sha256(&blob);
    let there = format!("{node}:/tmp/blob");
    let start = Instant::now();
    run(command(cluster).args(["cp", &blob, &there]), b"", LIMIT).unwrap().ok().unwrap();
    let up = start.elapsed();
    let inside = cluster.kubectl(&["exec", node, "--", "sha256sum", "/tmp/blob"]).unwrap();
    assert!(inside.starts_with(&sum), "{inside} is not {sum}");
    // Without a tunnel too, kubelet's end can break a download at its last bytes: it closes its socket while they are on their way, and
    // kubectl's ping, every 5 s, makes its kernel throw them away. kubectl notices, and goes on from where it was.
    let retried = ["cp", "--retries=3", &there, &back];
    run(command(cluster).args(retried), b"", LIMIT).unwrap().ok().unwrap();
    assert_eq!(sha256(&back), sum);
    eprintln!("200 MB to {node} in {up:.1?}, there and back in {:.1?}", start.elapsed());

    let mut copy = Talk::start(command(cluster).args(["cp", &there, &part]));
    wait_until("a part of the file", COMMAND_LIMIT, || {
        fs::metadata(&part).is_ok_and(|file| file.len() > 20_000_000)
    })
    .unwrap();
    cluster.node(node).unwrap().get().unwrap().daemons.kill(DAEMON).unwrap();
    assert!(
        !copy.ends(Duration::from_secs(60)),
        "kubectl calls a copy complete that is {:?}",
        fs::metadata(&part)
    );
    let length = fs::metadata(&part).unwrap().len();
    assert!((20_000_000..BLOB as u64).contains(&length), "{length}");
    tunnel::start_agent(cluster.node(node).unwrap().get().unwrap()).unwrap();
    answers(cluster, node);
    for file in [blob, back, part] {
        fs::remove_file(file).unwrap();
    }
}
