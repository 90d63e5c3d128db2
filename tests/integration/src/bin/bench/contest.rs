//! Who competes: chains of plugins with their configuration, called as a runtime calls them.

use crate::measure::{Cost, measure};
use anyhow::{Context, Result, bail};
use integration::tools;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::path::PathBuf;

/// Where the executables are.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Dirs {
    /// Ours: static release binaries.
    pub ours: PathBuf,
    /// Debian's package.
    pub debian: PathBuf,
    /// The newest reference plugins.
    pub newest: PathBuf,
    /// flannel's CNI plugin.
    pub flannel: PathBuf,
}

impl Dirs {
    /// Finds or builds them.
    pub fn find() -> Result<Self> {
        Ok(Self {
            ours: tools::ours()?,
            debian: "/usr/lib/cni".into(),
            newest: tools::cni_plugins_dir()?,
            flannel: tools::flannel_cni_dir()?,
        })
    }
}

/// A plugin and its configuration.
#[derive(Debug, Clone)]
pub struct Step {
    /// The executable.
    pub plugin: PathBuf,
    /// Its object of the network configuration.
    pub conf: Value,
}

/// A network as somebody would configure it.
#[derive(Debug, Clone)]
pub struct Contestant {
    /// For the table.
    pub name: &'static str,
    /// Plugins in the order of ADD.
    pub chain: Vec<Step>,
    /// CNI_PATH.
    pub path: String,
}

/// One attachment of a contestant.
#[derive(Debug, Clone)]
pub struct Attachment {
    /// CNI_CONTAINERID
    pub container: String,
    /// Path of the network namespace.
    pub netns: String,
    /// Name of the pod, in namespace "bench".
    pub pod: String,
}

impl Contestant {
    /// A contestant whose plugins are looked up in `dirs`, in order.
    pub fn new(name: &'static str, dirs: &[&PathBuf], chain: &[Value]) -> Result<Self> {
        let find = |conf: &Value| -> Result<Step> {
            let kind = conf["type"].as_str().context("a plugin without type")?;
            let found = dirs.iter().map(|dir| dir.join(kind)).find(|file| file.exists());
            let mut conf = conf.clone();
            conf["cniVersion"] = json!("0.4.0");
            conf["name"] = json!(format!("bench-{}", name.replace(|c: char| !c.is_alphanumeric(), "-")));
            Ok(Step { plugin: found.with_context(|| format!("no plugin {kind}"))?, conf })
        };
        let path = dirs.iter().map(|dir| dir.to_string_lossy()).collect::<Vec<_>>().join(":");
        Ok(Self { name, chain: chain.iter().map(find).collect::<Result<_>>()?, path })
    }

    /// ADD of the whole chain; each result is the next one's prevResult.
    pub fn add(&self, at: &Attachment) -> Result<(Cost, Value)> {
        let mut cost = Cost::default();
        let mut result = Value::Null;
        for step in &self.chain {
            let (one, printed) = self.call("ADD", step, &result, at)?;
            cost += one;
            result = serde_json::from_slice(&printed)?;
        }
        Ok((cost, result))
    }

    /// DEL of the whole chain, last plugin first.
    pub fn del(&self, at: &Attachment, result: &Value) -> Result<Cost> {
        let mut cost = Cost::default();
        for step in self.chain.iter().rev() {
            cost += self.call("DEL", step, result, at)?.0;
        }
        Ok(cost)
    }

    fn call(&self, verb: &str, step: &Step, prev: &Value, at: &Attachment) -> Result<(Cost, Vec<u8>)> {
        let mut conf = step.conf.clone();
        if !prev.is_null() {
            conf["prevResult"] = prev.clone();
        }
        let env = self.environment(verb, at);
        let (cost, output) = measure(&step.plugin, &env, conf.to_string().as_bytes())?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            bail!("{verb} of {} ({}): {said}", step.plugin.display(), self.name);
        }
        Ok((cost, output.stdout))
    }

    /// The variables of a call.
    pub fn environment(&self, verb: &str, at: &Attachment) -> Vec<(String, String)> {
        let args = format!("IgnoreUnknown=1;K8S_POD_NAMESPACE=bench;K8S_POD_NAME={}", at.pod);
        [
            ("CNI_COMMAND", verb),
            ("CNI_CONTAINERID", &at.container),
            ("CNI_NETNS", &at.netns),
            ("CNI_IFNAME", "eth0"),
            ("CNI_PATH", &self.path),
            ("CNI_ARGS", &args),
            // The reference plugins look for iptables there.
            ("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .to_vec()
    }
}
