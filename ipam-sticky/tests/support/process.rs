//! The real binary, with a state of its own.
use serde_json::{Value, json};
use std::{
    io::Write,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};
use tempfile::TempDir;

/// A node: a directory with data, run and cache directories.
pub struct Node {
    pub dir: TempDir,
    pub ipam: Value,
    pub network: String,
}

/// What the plugin answered.
#[derive(Debug)]
pub struct Answer {
    pub ok: bool,
    pub json: Value,
    pub stderr: String,
}

impl Answer {
    pub fn addresses(&self) -> Vec<String> {
        assert!(self.ok, "{self:?}");
        let ips = self.json["ips"].as_array().unwrap().iter();
        ips.map(|ip| ip["address"].as_str().unwrap().split('/').next().unwrap().to_owned()).collect()
    }

    pub fn code(&self) -> u64 {
        assert!(!self.ok, "{self:?}");
        self.json["code"].as_u64().unwrap()
    }
}

impl Node {
    pub fn new(ipam: Value) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut node = Self { ipam: json!({}), network: "net".into(), dir };
        node.set(ipam);
        node
    }

    pub fn subnet(subnet: &str) -> Self {
        Self::new(json!({"ranges": [[{"subnet": subnet}]]}))
    }

    /// Another configuration of the same state.
    pub fn set(&mut self, mut ipam: Value) {
        for (key, name) in [("dataDir", "data"), ("runDir", "run"), ("cacheDir", "cache")] {
            if ipam.get(key).is_none() {
                ipam[key] = json!(self.dir.path().join(name));
            }
        }
        ipam["type"] = json!("ipam-sticky");
        self.ipam = ipam;
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn conf(&self) -> Value {
        json!({"cniVersion": "1.1.0", "name": self.network, "type": "bridge", "ipam": self.ipam})
    }

    pub fn command(&self, verb: &str, container: &str, ifname: &str, args: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ipam-sticky"));
        command
            .env_clear()
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", container)
            .env("CNI_IFNAME", ifname)
            .env("CNI_NETNS", self.path(&format!("netns-{container}")))
            .env("CNI_PATH", "/nowhere")
            .env("CNI_ARGS", args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    pub fn start(&self, verb: &str, container: &str, pod: &str) -> Child {
        begin(&mut self.command(verb, container, "eth0", &pod_args("default", pod)), &self.conf())
    }

    pub fn call(&self, verb: &str, container: &str, pod: &str) -> Answer {
        answer(self.start(verb, container, pod).wait_with_output().unwrap())
    }

    pub fn add(&self, container: &str, pod: &str) -> Answer {
        self.call("ADD", container, pod)
    }

    pub fn del(&self, container: &str, pod: &str) -> Answer {
        self.call("DEL", container, pod)
    }

    pub fn call_with(&self, verb: &str, container: &str, ifname: &str, args: &str, conf: &Value) -> Answer {
        let child = begin(&mut self.command(verb, container, ifname, args), conf);
        answer(child.wait_with_output().unwrap())
    }

    /// A person's command.
    pub fn person(&self, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ipam-sticky"));
        command.env_remove("CNI_COMMAND").args(args);
        for (option, name) in [("--data-dir", "data"), ("--run-dir", "run"), ("--cache-dir", "cache")] {
            command.arg(option).arg(self.path(name));
        }
        command.output().unwrap()
    }

    /// A person's command that works.
    pub fn told(&self, args: &[&str]) -> String {
        let output = self.person(args);
        assert!(output.status.success(), "{args:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    pub fn list(&self) -> Vec<Value> {
        serde_json::from_str(&self.told(&["list", "-o", "json"])).unwrap()
    }

    /// The network namespace of a container appears, or goes.
    pub fn netns(&self, container: &str, there: bool) {
        let path = self.path(&format!("netns-{container}"));
        if there { std::fs::write(path, "").unwrap() } else { std::fs::remove_file(path).unwrap() }
    }

    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }
}

pub fn pod_args(namespace: &str, pod: &str) -> String {
    format!("IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={pod}")
}

pub fn begin(command: &mut Command, conf: &Value) -> Child {
    let mut child = command.spawn().unwrap();
    // One that was killed already does not read.
    let _ = child.stdin.take().unwrap().write_all(conf.to_string().as_bytes());
    child
}

pub fn answer(output: Output) -> Answer {
    let text = String::from_utf8(output.stdout).unwrap();
    Answer {
        ok: output.status.success(),
        json: if text.is_empty() { Value::Null } else { serde_json::from_str(&text).expect(&text) },
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// What libcni would have cached of an attachment.
pub fn cache_entry(network: &str, container: &str, pod: &str, netns: &Path, addresses: &[&str]) -> String {
    let ips: Vec<Value> = addresses.iter().map(|address| json!({"address": address})).collect();
    json!({
        "kind": "cniCacheV1", "containerId": container, "ifName": "eth0", "networkName": network,
        "netns": netns, "config": "e30=",
        "cniArgs": [["IgnoreUnknown", "1"], ["K8S_POD_NAMESPACE", "default"], ["K8S_POD_NAME", pod], ["K8S_POD_UID", "u"]],
        "result": {"cniVersion": "1.0.0", "ips": ips, "interfaces": [{"name": "eth0", "sandbox": netns}], "dns": {}}
    })
    .to_string()
}
