//! One CNI plugin called directly: environment and stdin in, exit code, JSON and stderr out. For what cnitool cannot say
//! (GC with a list, broken input, odd container ids) and to measure a single plugin.

use crate::exec::{COMMAND_LIMIT, Output, run};
use crate::host::Host;
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A call in the making.
#[derive(Debug, Clone)]
pub struct Call<'h> {
    host: &'h Host,
    plugin: PathBuf,
    env: BTreeMap<String, String>,
    stdin: Vec<u8>,
}

/// What came of it.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Exit code, both streams.
    pub output: Output,
}

impl<'h> Call<'h> {
    /// A call of the executable `plugin` inside `host`, with nothing in the environment but what is said here.
    pub fn new(host: &'h Host, plugin: impl AsRef<Path>, command: &str) -> Self {
        let call = Self { host, plugin: plugin.as_ref().to_owned(), env: BTreeMap::new(), stdin: Vec::new() };
        call.env("CNI_COMMAND", command)
    }

    /// Sets a variable.
    pub fn env(mut self, key: &str, value: &str) -> Self {
        self.env.insert(key.to_owned(), value.to_owned());
        self
    }

    /// Leaves a variable out.
    pub fn without(mut self, key: &str) -> Self {
        self.env.remove(key);
        self
    }

    /// The attachment: container id, interface, and namespace by its name in the host.
    pub fn attachment(self, container: &str, ifname: &str, netns: &str) -> Self {
        self.env("CNI_CONTAINERID", container)
            .env("CNI_IFNAME", ifname)
            .env("CNI_NETNS", &format!("/run/netns/{netns}"))
    }

    /// CNI_ARGS as containerd writes them for a pod.
    pub fn pod(self, namespace: &str, name: &str) -> Self {
        let args = format!("IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name}");
        self.env("CNI_ARGS", &args)
    }

    /// CNI_PATH.
    pub fn path(self, dirs: &[&Path]) -> Self {
        let joined = dirs.iter().map(|dir| dir.to_string_lossy()).collect::<Vec<_>>().join(":");
        self.env("CNI_PATH", &joined)
    }

    /// The configuration on stdin.
    pub fn config(self, config: &Value) -> Self {
        self.stdin(config.to_string())
    }

    /// Any bytes on stdin.
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = bytes.into();
        self
    }

    /// Makes the call.
    pub fn run(&self) -> Result<Answer> {
        let mut command = self.host.command(&self.plugin)?;
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").envs(&self.env);
        Ok(Answer { output: run(&mut command, &self.stdin, COMMAND_LIMIT)? })
    }
}

impl Answer {
    /// Did the plugin exit with 0?
    pub fn succeeded(&self) -> bool {
        self.output.status.success()
    }

    /// Stdout as JSON.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.output.stdout).with_context(|| {
            format!("stdout is no JSON: {:?}, stderr: {}", self.output.stdout, self.output.stderr)
        })
    }

    /// The JSON of a success.
    pub fn result(&self) -> Result<Value> {
        self.output.clone().ok()?;
        self.json()
    }

    /// The CNI error code of a failure.
    pub fn error_code(&self) -> Result<u64> {
        if self.succeeded() {
            bail!("the plugin succeeded: {}", self.output.stdout);
        }
        let json = self.json()?;
        json["code"].as_u64().with_context(|| format!("no code in {json}"))
    }
}
