//! An API server that does what a real one does not do on demand: lists that are empty, cut off or refused, silence.
//!
//! Plain HTTP on 10.10.0.2:8080, in the cloud's network namespace. It knows Nodes: list, watch and patch.

use integration::host::Host;
use nix::sched::{CloneFlags, setns};
use serde_json::{Value, json};
use std::{
    fs::File,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex, MutexGuard},
    thread,
    time::Duration,
};

/// Versions of one history; a new one begins when the nodes or the mode are set.
const HISTORY: u64 = 1_000_000;

/// How it behaves.
#[derive(Debug, Clone, PartialEq)]
pub enum Mode {
    /// As it should; streamed lists are refused, as an older server refuses them.
    Good,
    /// As it should, streamed lists too.
    Streaming,
    /// As it should, but a streamed list is taken back after it has begun, as a server over etcd 3.4 does.
    TakenBack,
    /// Every request is answered with this status.
    Status(u16),
    /// Lists and watches begin well and are then cut off in the middle of a Node.
    Truncated,
    /// Takes the connection and says nothing.
    Silent,
    /// Hangs up.
    Closed,
}

#[derive(Debug)]
struct State {
    mode: Mode,
    nodes: Vec<Value>,
    /// Alters with the nodes and the mode: watches end, and an older version is gone (410).
    version: u64,
    events: Vec<(u64, Value)>,
    patches: Vec<(String, Value)>,
    requests: usize,
}

/// The server's handle.
#[derive(Debug, Clone)]
pub struct Fake {
    state: Arc<Mutex<State>>,
}

impl Fake {
    pub fn start(cloud: &Host) -> Self {
        let state = State {
            mode: Mode::Good,
            nodes: Vec::new(),
            version: HISTORY,
            events: Vec::new(),
            patches: Vec::new(),
            requests: 0,
        };
        let fake = Self { state: Arc::new(Mutex::new(state)) };
        let netns = File::open(format!("/proc/{}/ns/net", cloud.init_pid().unwrap())).unwrap();
        let server = fake.clone();
        // The thread stays in the namespace and ends with the test; a socket keeps no namespace's processes alive.
        thread::spawn(move || {
            setns(&netns, CloneFlags::CLONE_NEWNET).unwrap();
            drop(netns);
            let listener = TcpListener::bind("0.0.0.0:8080").unwrap();
            for stream in listener.incoming().flatten() {
                let server = server.clone();
                thread::spawn(move || server.serve(stream));
            }
        });
        fake
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Behaves so from now on; whoever watches is cut off.
    pub fn mode(&self, mode: Mode) {
        let mut state = self.state();
        state.mode = mode;
        state.version += HISTORY;
        state.events.clear();
    }

    /// These are the Nodes from now on, without a word about what changed: whoever watches has to list anew.
    pub fn nodes(&self, nodes: Vec<Value>) {
        let mut state = self.state();
        state.nodes = nodes;
        state.version += HISTORY;
        state.events.clear();
    }

    /// A Node is new or altered, and whoever watches is told.
    pub fn put(&self, node: &Value) {
        let mut state = self.state();
        let name = node["metadata"]["name"].clone();
        let known = state.nodes.iter_mut().find(|known| known["metadata"]["name"] == name);
        let kind = if known.is_some() { "MODIFIED" } else { "ADDED" };
        match known {
            Some(known) => *known = node.clone(),
            None => state.nodes.push(node.clone()),
        }
        state.tell(kind, node.clone());
    }

    /// A Node is deleted, and whoever watches is told.
    pub fn delete(&self, name: &str) {
        let mut state = self.state();
        let at = state.nodes.iter().position(|node| node["metadata"]["name"] == name).unwrap();
        let node = state.nodes.remove(at);
        state.tell("DELETED", node);
    }

    /// The patches that were made, by Node.
    pub fn patches(&self) -> Vec<(String, Value)> {
        self.state().patches.clone()
    }

    /// How many requests there were.
    pub fn requests(&self) -> usize {
        self.state().requests
    }

    fn serve(&self, mut stream: TcpStream) {
        let _ = stream.set_read_timeout(Some(Duration::from_secs(30)));
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        let (mut first, mut length) = (String::new(), 0);
        if reader.read_line(&mut first).is_err() {
            return;
        }
        loop {
            let mut line = String::new();
            match reader.read_line(&mut line) {
                Ok(read) if read > 2 => {
                    if let Some(value) = line.to_lowercase().strip_prefix("content-length:") {
                        length = value.trim().parse().unwrap_or(0);
                    }
                }
                _ => break,
            }
        }
        let mut body = vec![0; length];
        let _ = reader.read_exact(&mut body);
        let mut words = first.split_whitespace();
        let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let (mode, version) = {
            let mut state = self.state();
            state.requests += 1;
            (state.mode.clone(), state.version)
        };
        let answer = match mode {
            Mode::Closed => Ok(()),
            Mode::Silent => self.wait_for_change(version),
            Mode::Status(code) => status(&mut stream, code, "on purpose"),
            _ if method == "PATCH" => self.patch(&mut stream, target, &body),
            _ if target.contains("watch=true") => self.watch(&mut stream, target, &mode),
            _ => self.list(&mut stream, &mode),
        };
        drop(answer);
    }

    fn wait_for_change(&self, version: u64) -> std::io::Result<()> {
        while self.state().version == version {
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn patch(&self, stream: &mut TcpStream, target: &str, body: &[u8]) -> std::io::Result<()> {
        let name = target.trim_start_matches("/api/v1/nodes/").split('/').next().unwrap_or_default();
        let patch: Value = serde_json::from_slice(body).unwrap_or_default();
        let mut state = self.state();
        state.patches.push((name.to_owned(), patch.clone()));
        let known = state.nodes.iter_mut().find(|node| node["metadata"]["name"] == name);
        let Some(known) = known else {
            drop(state);
            return status(stream, 404, "no such node");
        };
        for (key, value) in patch["metadata"]["annotations"].as_object().into_iter().flatten() {
            known["metadata"]["annotations"][key] = value.clone();
        }
        if let Some(conditions) = patch["status"].get("conditions") {
            known["status"]["conditions"] = conditions.clone();
        }
        let node = known.clone();
        state.tell("MODIFIED", node.clone());
        drop(state);
        json_answer(stream, 200, &node)
    }

    fn list(&self, stream: &mut TcpStream, mode: &Mode) -> std::io::Result<()> {
        let (nodes, version) = {
            let state = self.state();
            (state.nodes.clone(), state.version)
        };
        let list = json!({"kind": "NodeList", "apiVersion": "v1",
            "metadata": {"resourceVersion": version.to_string()}, "items": nodes});
        let text = list.to_string();
        if *mode == Mode::Truncated {
            head(stream, 200)?;
            return stream.write_all(&text.as_bytes()[..text.len() * 2 / 3]);
        }
        json_answer(stream, 200, &list)
    }

    fn watch(&self, stream: &mut TcpStream, target: &str, mode: &Mode) -> std::io::Result<()> {
        let streamed = target.contains("sendInitialEvents=true");
        if streamed && *mode == Mode::Good {
            return status(
                stream,
                422,
                "sendInitialEvents is forbidden for watch unless the WatchList feature gate is enabled",
            );
        }
        let (nodes, history) = {
            let state = self.state();
            (state.nodes.clone(), state.history())
        };
        let mut sent = if streamed {
            head(stream, 200)?;
            let mut text = String::new();
            for node in &nodes {
                text += &format!("{}\n", json!({"type": "ADDED", "object": with_version(node.clone(), 1)}));
            }
            if *mode == Mode::Truncated {
                return stream.write_all(&text.as_bytes()[..text.len() * 2 / 3]);
            }
            if *mode == Mode::TakenBack {
                text += &json!({"type": "ERROR", "object": {"kind": "Status", "apiVersion": "v1", "status": "Failure",
                    "message": "the required storage feature RequestWatchProgress is disabled", "code": 500}})
                .to_string();
                return stream.write_all(text.as_bytes());
            }
            let version = self.state().version;
            text += &format!(
                "{}\n",
                json!({"type": "BOOKMARK", "object": {"kind": "Node", "apiVersion": "v1",
                "metadata": {"resourceVersion": version.to_string(), "annotations": {"k8s.io/initial-events-end": "true"}}}})
            );
            stream.write_all(text.as_bytes())?;
            version
        } else {
            let from =
                target.split(['?', '&']).find_map(|part| part.strip_prefix("resourceVersion=")?.parse().ok());
            let from: u64 = from.unwrap_or(0);
            head(stream, 200)?;
            if from / HISTORY < history {
                let gone = json!({"type": "ERROR", "object": {"kind": "Status", "apiVersion": "v1", "status": "Failure",
                    "message": "too old resource version", "reason": "Expired", "code": 410}});
                return stream.write_all(format!("{gone}\n").as_bytes());
            }
            from
        };
        loop {
            let news: Vec<(u64, Value)> = {
                let state = self.state();
                if state.history() != history {
                    return Ok(());
                }
                state.events.iter().filter(|(version, _)| *version > sent).cloned().collect()
            };
            for (version, event) in news {
                stream.write_all(format!("{event}\n").as_bytes())?;
                sent = version;
            }
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl State {
    fn history(&self) -> u64 {
        self.version / HISTORY
    }

    fn tell(&mut self, kind: &str, node: Value) {
        let version = self.events.last().map_or(self.version, |(version, _)| *version) + 1;
        self.events.push((version, json!({"type": kind, "object": with_version(node, version)})));
    }
}

fn with_version(mut node: Value, version: u64) -> Value {
    node["metadata"]["resourceVersion"] = json!(version.to_string());
    node
}

fn head(stream: &mut TcpStream, code: u16) -> std::io::Result<()> {
    stream.write_all(
        format!("HTTP/1.1 {code} X\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n")
            .as_bytes(),
    )
}

fn json_answer(stream: &mut TcpStream, code: u16, value: &Value) -> std::io::Result<()> {
    head(stream, code)?;
    stream.write_all(value.to_string().as_bytes())
}

fn status(stream: &mut TcpStream, code: u16, message: &str) -> std::io::Result<()> {
    let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": "OnPurpose", "code": code});
    json_answer(stream, code, &status)
}
