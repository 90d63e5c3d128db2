//! The real cnitool in a host: what a container runtime does to our plugins, through the CNI project's own library.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! use integration::{cnitool::CniTool, host::Host};
//! let host = Host::new("edge1")?;
//! let cni = CniTool::new(&host, &serde_json::json!({
//!     "cniVersion": "1.1.0", "name": "pods",
//!     "plugins": [{"type": "edgeflannel", "ipam": {"type": "ipam-sticky", "subnet": "10.244.1.0/24"}}]
//! }))?;
//! let pod = cni.pod("default", "web-0")?;
//! let address = cni.add(&pod)?.address()?; // "10.244.1.2"
//! cni.check(&pod)?;
//! host.sh(&format!("ping -c1 -W1 {address}"))?;
//! cni.del(&pod)?;
//! # Ok(()) }
//! ```

use crate::exec::{COMMAND_LIMIT, Output, run};
use crate::host::Host;
use crate::tools;
use anyhow::{Context, Result};
use serde_json::Value;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

/// cnitool with one network configuration, in one host.
#[derive(Debug)]
pub struct CniTool<'h> {
    host: &'h Host,
    network: String,
    cni_path: String,
    cnitool: PathBuf,
}

/// A network namespace with a pod's name: what an attachment is made for.
#[derive(Debug, Clone)]
pub struct Pod {
    /// The namespace's name in the host, for [`Host::sh_in`].
    pub netns: String,
    /// The interface's name inside; `eth0` unless changed.
    pub ifname: String,
    /// CNI_ARGS.
    pub args: Vec<(String, String)>,
    /// Capability arguments (`CAP_ARGS`), e.g. `{"portMappings": [...]}`.
    pub capabilities: Option<Value>,
}

impl Pod {
    /// One more CNI_ARGS pair.
    pub fn with_arg(mut self, key: &str, value: &str) -> Self {
        self.args.push((key.to_owned(), value.to_owned()));
        self
    }

    /// With capability arguments.
    pub fn with_capabilities(mut self, capabilities: Value) -> Self {
        self.capabilities = Some(capabilities);
        self
    }

    /// With another interface name.
    pub fn with_ifname(mut self, ifname: &str) -> Self {
        ifname.clone_into(&mut self.ifname);
        self
    }
}

/// What an ADD gave, as the runtime got it.
#[derive(Debug, Clone)]
pub struct Added(pub Value);

impl Added {
    /// All addresses with their prefix, in the result's order: "10.244.1.2/24".
    pub fn addresses(&self) -> Vec<String> {
        let ips = self.0["ips"].as_array().map(Vec::as_slice).unwrap_or_default();
        ips.iter().filter_map(|ip| ip["address"].as_str()).map(str::to_owned).collect()
    }

    /// The first address, without its prefix.
    pub fn address(&self) -> Result<String> {
        let first =
            self.addresses().into_iter().next().with_context(|| format!("no address in {}", self.0))?;
        Ok(first.split('/').next().unwrap_or_default().to_owned())
    }
}

impl<'h> CniTool<'h> {
    /// Writes `conflist` into the host's /etc/cni/net.d; plugins are ours and the reference ones.
    pub fn new(host: &'h Host, conflist: &Value) -> Result<Self> {
        let dirs = [tools::ours()?, tools::cni_plugins_dir()?];
        let path = dirs.map(|dir| dir.to_string_lossy().into_owned()).join(":");
        Self::with_path(host, conflist, &path)
    }

    /// The same with another CNI_PATH.
    pub fn with_path(host: &'h Host, conflist: &Value, cni_path: &str) -> Result<Self> {
        let network = conflist["name"].as_str().context("the conflist has no name")?.to_owned();
        host.write(&format!("/etc/cni/net.d/10-{network}.conflist"), conflist.to_string())?;
        Ok(Self { host, network, cni_path: cni_path.to_owned(), cnitool: tools::cnitool()? })
    }

    /// A new network namespace for a pod of this name, with the CNI_ARGS that containerd gives. Call it again for
    /// the same pod's next sandbox: each namespace has its own container id.
    pub fn pod(&self, namespace: &str, name: &str) -> Result<Pod> {
        let pod = self.plain_pod()?;
        Ok(pod
            .with_arg("IgnoreUnknown", "1")
            .with_arg("K8S_POD_NAMESPACE", namespace)
            .with_arg("K8S_POD_NAME", name))
    }

    /// A new network namespace with no CNI_ARGS, as plain cnitool or podman would call.
    pub fn plain_pod(&self) -> Result<Pod> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let netns = format!("sandbox{}", COUNT.fetch_add(1, Ordering::Relaxed));
        self.host.add_netns(&netns)?;
        Ok(Pod { netns, ifname: "eth0".to_owned(), args: Vec::new(), capabilities: None })
    }

    /// One call of cnitool, whatever comes of it.
    pub fn call(&self, verb: &str, pod: &Pod) -> Result<Output> {
        let args: Vec<String> = pod.args.iter().map(|(key, value)| format!("{key}={value}")).collect();
        let mut command = self.host.command(&self.cnitool)?;
        command
            .args([verb, &self.network, &format!("/run/netns/{}", pod.netns)])
            .env("CNI_PATH", &self.cni_path)
            .env("CNI_IFNAME", &pod.ifname);
        if !args.is_empty() {
            command.env("CNI_ARGS", args.join(";"));
        }
        if let Some(capabilities) = &pod.capabilities {
            command.env("CAP_ARGS", capabilities.to_string());
        }
        run(&mut command, b"", COMMAND_LIMIT)
    }

    /// ADD.
    pub fn add(&self, pod: &Pod) -> Result<Added> {
        let text = self.call("add", pod)?.ok()?;
        Ok(Added(
            serde_json::from_str(&text).with_context(|| format!("cnitool add printed no JSON: {text}"))?,
        ))
    }

    /// CHECK.
    pub fn check(&self, pod: &Pod) -> Result<()> {
        self.call("check", pod)?.ok().map(drop)
    }

    /// DEL.
    pub fn del(&self, pod: &Pod) -> Result<()> {
        self.call("del", pod)?.ok().map(drop)
    }

    /// GC with an empty list: every attachment of the network goes (that is all cnitool can ask for).
    pub fn gc_all(&self) -> Result<()> {
        self.call_without_pod("gc")
    }

    /// STATUS.
    pub fn status(&self) -> Result<()> {
        self.call_without_pod("status")
    }

    fn call_without_pod(&self, verb: &str) -> Result<()> {
        let nobody =
            Pod { netns: "none".into(), ifname: "eth0".into(), args: Vec::new(), capabilities: None };
        self.call(verb, &nobody)?.ok().map(drop)
    }
}
