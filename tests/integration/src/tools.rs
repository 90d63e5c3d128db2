//! Every program that tests drive and that Debian has not got: what it is called, and which tool set it comes from.
//! Each function builds its own set on first use (see [`crate::go`]) and gives a path.

use crate::go::{ToolSet, module_dir};
use crate::node::Cni;
use crate::topology::Options;
use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, OnceLock};

const KUBERNETES_VERSION: &str = "1.37.2";
const FLANNEL_VERSION: &str = "0.28.10";

static CNI: ToolSet = ToolSet { name: "cni", ldflags: String::new, prepare: None };
static CNI_FLANNEL: ToolSet = ToolSet { name: "cni-flannel", ldflags: String::new, prepare: None };
static K8S: ToolSet = ToolSet { name: "k8s", ldflags: kubernetes_version, prepare: None };
static FLANNEL: ToolSet = ToolSet { name: "flannel", ldflags: flannel_version, prepare: Some(flannel_main) };
static KONNECTIVITY: ToolSet = ToolSet { name: "konn", ldflags: String::new, prepare: None };
static ETCD: ToolSet = ToolSet { name: "etcd", ldflags: String::new, prepare: None };
static METRICS: ToolSet = ToolSet { name: "metrics", ldflags: String::new, prepare: None };

/// The reference plugins' Go packages.
const REFERENCE_PLUGINS: [(&str, &str); 8] = [
    ("bridge", "github.com/containernetworking/plugins/plugins/main/bridge"),
    ("loopback", "github.com/containernetworking/plugins/plugins/main/loopback"),
    ("ptp", "github.com/containernetworking/plugins/plugins/main/ptp"),
    ("host-local", "github.com/containernetworking/plugins/plugins/ipam/host-local"),
    ("bandwidth", "github.com/containernetworking/plugins/plugins/meta/bandwidth"),
    ("firewall", "github.com/containernetworking/plugins/plugins/meta/firewall"),
    ("portmap", "github.com/containernetworking/plugins/plugins/meta/portmap"),
    ("tuning", "github.com/containernetworking/plugins/plugins/meta/tuning"),
];

/// The CNI project's own command-line runtime.
pub fn cnitool() -> Result<PathBuf> {
    CNI.program("cnitool", "github.com/containernetworking/cni/cnitool")
}

/// The folder with the reference plugins, fit for CNI_PATH: bridge, host-local, loopback, ptp, bandwidth, firewall, portmap, tuning.
pub fn cni_plugins_dir() -> Result<PathBuf> {
    CNI.programs(&REFERENCE_PLUGINS)
}

/// The folder with flannel's CNI plugin (`flannel`); it delegates to the reference plugins, so put both on CNI_PATH.
pub fn flannel_cni_dir() -> Result<PathBuf> {
    CNI_FLANNEL.programs(&[("flannel", "github.com/containernetworking/plugins/plugins/meta/flannel")])
}

/// flannel's daemon.
pub fn flanneld() -> Result<PathBuf> {
    FLANNEL.program("flanneld", ".")
}

fn kubernetes(name: &str) -> Result<PathBuf> {
    K8S.program(name, &format!("k8s.io/kubernetes/cmd/{name}"))
}

/// The node agent of Kubernetes.
pub fn kubelet() -> Result<PathBuf> {
    kubernetes("kubelet")
}

/// The API server's store. Not Debian's 3.4: with one older than 3.5.13 the API server serves no streaming lists.
pub fn etcd() -> Result<PathBuf> {
    ETCD.program("etcd", "go.etcd.io/etcd/server/v3")
}

/// The API server.
pub fn kube_apiserver() -> Result<PathBuf> {
    kubernetes("kube-apiserver")
}

/// The controllers: podCIDRs, StatefulSets, DaemonSets, certificates.
pub fn kube_controller_manager() -> Result<PathBuf> {
    kubernetes("kube-controller-manager")
}

/// The scheduler.
pub fn kube_scheduler() -> Result<PathBuf> {
    kubernetes("kube-scheduler")
}

/// Services on a node.
pub fn kube_proxy() -> Result<PathBuf> {
    kubernetes("kube-proxy")
}

/// The person's command.
pub fn kubectl() -> Result<PathBuf> {
    kubernetes("kubectl")
}

/// The folder with `konnectivity-server` and `konnectivity-agent`.
pub fn konnectivity_dir() -> Result<PathBuf> {
    KONNECTIVITY.programs(&[
        ("konnectivity-server", "sigs.k8s.io/apiserver-network-proxy/cmd/server"),
        ("konnectivity-agent", "sigs.k8s.io/apiserver-network-proxy/cmd/agent"),
    ])
}

/// The Kubernetes metrics server.
pub fn metrics_server() -> Result<PathBuf> {
    METRICS.program("metrics-server", "sigs.k8s.io/metrics-server/cmd/metrics-server")
}

/// Prometheus, as scripts/setup.sh unpacks Debian's package.
pub fn prometheus() -> Result<PathBuf> {
    let path = crate::go::cache().join("prometheus/usr/bin/prometheus");
    ensure!(path.exists(), "no Prometheus at {}: scripts/setup.sh unpacks it there", path.display());
    Ok(path)
}

/// Builds all of the above that is missing, so that no test has to.
pub fn build_all() -> Result<()> {
    cnitool()?;
    metrics_server()?;
    build_for(&Options { cni: Cni::Flannel, kube_proxy: true, konnectivity: true, ..Options::default() })
}

/// Builds what a cluster like this needs and is missing.
pub fn build_for(options: &Options) -> Result<()> {
    cni_plugins_dir()?;
    for name in ["kube-apiserver", "kubelet", "kube-controller-manager", "kube-scheduler", "kubectl"] {
        kubernetes(name)?;
    }
    etcd()?;
    if options.kube_proxy {
        kube_proxy()?;
    }
    if options.konnectivity {
        konnectivity_dir()?;
    }
    if options.tunnel.is_some() {
        edge_tunnel()?;
    }
    if options.cni.wants_flanneld() {
        flanneld()?;
    }
    match options.cni {
        Cni::Ours | Cni::OursOnFlannel => drop(ours()?),
        Cni::Flannel => drop(flannel_cni_dir()?),
        Cni::Bridge => {}
    }
    Ok(())
}

/// The folder with our own `ipam-sticky`, `edgeflannel` and `edgeflanneld`: `EDGEFLANNEL_BIN_DIR`, else a debug build made now.
pub fn ours() -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os("EDGEFLANNEL_BIN_DIR") {
        let dir = PathBuf::from(dir);
        for name in ["ipam-sticky", "edgeflannel", "edgeflanneld"] {
            ensure!(dir.join(name).exists(), "EDGEFLANNEL_BIN_DIR={} holds no {name}", dir.display());
        }
        return Ok(dir);
    }
    static BUILT: Mutex<bool> = Mutex::new(false);
    let mut built =
        BUILT.lock().map_err(|_| anyhow::anyhow!("an earlier build of our own programs panicked"))?;
    if !*built {
        cargo_build(&["-p", "ipam-sticky", "-p", "cni-edgeflannel"])?;
        *built = true;
    }
    Ok(target_dir()?.join("debug"))
}

/// Our `edge-tunnel`: from `EDGEFLANNEL_BIN_DIR` if it is there, else a debug build; either is taken when it is newer than its
/// sources: a build for this package alone would choose other features, and take minutes.
pub fn edge_tunnel() -> Result<PathBuf> {
    const NAME: &str = "edge-tunnel";
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tunnel/src");
    let is_current = |path: &Path| {
        let built = fs::metadata(path).and_then(|file| file.modified());
        built.is_ok_and(|built| newest(&sources).is_ok_and(|source| source <= built))
    };
    if let Some(dir) = std::env::var_os("EDGEFLANNEL_BIN_DIR") {
        let path = PathBuf::from(dir).join(NAME);
        if is_current(&path) {
            return Ok(path);
        }
    }
    static FOUND: Mutex<Option<PathBuf>> = Mutex::new(None);
    let mut found = FOUND.lock().map_err(|_| anyhow::anyhow!("an earlier build of {NAME} panicked"))?;
    if let Some(path) = &*found {
        return Ok(path.clone());
    }
    let path = target_dir()?.join("debug").join(NAME);
    if !is_current(&path) {
        cargo_build(&["-p", "tunnel", "--bin", NAME])?;
    }
    *found = Some(path.clone());
    Ok(path)
}

/// When the last file of a folder, or of those in it, was written.
fn newest(dir: &Path) -> std::io::Result<std::time::SystemTime> {
    let mut newest = std::time::UNIX_EPOCH;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let time = match entry.file_type()?.is_dir() {
            true => self::newest(&entry.path())?,
            false => entry.metadata()?.modified()?,
        };
        newest = newest.max(time);
    }
    Ok(newest)
}

/// The `rig` program: ourselves, or beside the test that runs.
pub fn rig() -> Result<&'static Path> {
    static RIG: OnceLock<PathBuf> = OnceLock::new();
    if let Some(path) = RIG.get() {
        return Ok(path);
    }
    let me = std::env::current_exe().context("cannot find out which program this is")?;
    let path = if me.file_name().is_some_and(|name| name == "rig") {
        me
    } else {
        // target/debug/deps/TEST-hash -> target/debug/rig. Cargo builds it for the tests of this package, not for others.
        let beside = me.ancestors().nth(2).map(|dir| dir.join("rig")).filter(|path| path.exists());
        match beside {
            Some(path) => path,
            None => {
                cargo_build(&["-p", "integration", "--bin", "rig"])?;
                target_dir()?.join("debug/rig")
            }
        }
    };
    ensure!(path.exists(), "no rig program at {}", path.display());
    Ok(RIG.get_or_init(|| path))
}

fn cargo_build(arguments: &[&str]) -> Result<()> {
    let status = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args([
            "build",
            "--quiet",
            "--manifest-path",
            concat!(env!("CARGO_MANIFEST_DIR"), "/../../Cargo.toml"),
        ])
        .args(arguments)
        .status()
        .context("cannot start cargo")?;
    ensure!(status.success(), "`cargo build {}` failed; its own words are above", arguments.join(" "));
    Ok(())
}

/// Cargo's target folder, found from where this program lies (`.../debug/deps/NAME` or `.../debug/rig`).
fn target_dir() -> Result<PathBuf> {
    let me = std::env::current_exe()?;
    if let Some(dir) = me.ancestors().find(|dir| dir.join("CACHEDIR.TAG").exists()) {
        return Ok(dir.to_owned());
    }
    bail!("{} does not lie in a cargo target folder: set EDGEFLANNEL_BIN_DIR", me.display())
}

/// Without these the programs call themselves v0.0.0-master, and the API server refuses to talk to such.
fn kubernetes_version() -> String {
    let minor = KUBERNETES_VERSION.split('.').nth(1).unwrap_or_default();
    let mut flags = Vec::new();
    for package in ["k8s.io/component-base/version", "k8s.io/client-go/pkg/version"] {
        for (name, value) in [
            ("gitVersion", format!("v{KUBERNETES_VERSION}")),
            ("gitMajor", "1".to_owned()),
            ("gitMinor", minor.to_owned()),
            ("gitTreeState", "clean".to_owned()),
            ("gitCommit", "module".to_owned()),
        ] {
            flags.push(format!("-X {package}.{name}={value}"));
        }
    }
    flags.join(" ")
}

fn flannel_version() -> String {
    format!("-X github.com/flannel-io/flannel/pkg/version.Version=v{FLANNEL_VERSION}")
}

/// flannel's own main.go less two backends: `tencentvpc` needs a module that is not served, `udp` needs cgo.
fn flannel_main(go: &Path, source: &Path) -> Result<()> {
    let module = module_dir(go, source, "github.com/flannel-io/flannel")?;
    let main = fs::read_to_string(module.join("main.go")).context("flannel's module has no main.go")?;
    let kept: String = main
        .lines()
        .filter(|line| !line.contains("backend/tencentvpc\"") && !line.contains("backend/udp\""))
        .map(|line| format!("{line}\n"))
        .collect();
    fs::write(source.join("main.go"), kept)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pins_in_go_mod_are_the_versions_that_the_programs_will_claim() {
        let text =
            |name| fs::read_to_string(format!("{}/tools/{name}/go.mod", env!("CARGO_MANIFEST_DIR"))).unwrap();
        assert!(text("k8s").contains(&format!("k8s.io/kubernetes v{KUBERNETES_VERSION}")));
        assert!(text("flannel").contains(&format!("github.com/flannel-io/flannel v{FLANNEL_VERSION}")));
    }
}
