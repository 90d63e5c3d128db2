//! etcd, kube-apiserver, kube-controller-manager and kube-scheduler in the cloud's host, and the certificates of all who talk to them.

use crate::daemons::Daemons;
use crate::exec::{COMMAND_LIMIT, run, wait_for};
use crate::host::Host;
use crate::pki::{Authority, Subject, Usage, kubeconfig, service_account_keys};
use crate::tools;
use crate::topology::{CLOUD, POD_CIDR, SERVICE_CIDR, Site};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Where everybody finds the API.
pub const API: &str = "https://10.10.0.2:6443";

/// The running control plane.
#[derive(Debug)]
pub struct ControlPlane {
    dir: PathBuf,
    /// etcd, kube-apiserver, kube-controller-manager, kube-scheduler.
    pub daemons: Daemons,
}

impl ControlPlane {
    /// One whose files lie in `dir`.
    pub fn new(dir: &Path, daemons: Daemons) -> Self {
        Self { dir: dir.to_owned(), daemons }
    }

    fn pki(&self) -> PathBuf {
        self.dir.join("pki")
    }

    /// Makes every certificate and kubeconfig, the nodes' too.
    pub fn make_certificates(&self, sites: &[Site]) -> Result<()> {
        let pki = self.pki();
        fs::create_dir_all(&pki)?;
        let (ca, front) = (Authority::new(&pki, "ca")?, Authority::new(&pki, "front-ca")?);
        service_account_keys(&pki)?;
        let cloud = CLOUD.to_string();
        let api_names = [&cloud, "127.0.0.1", "10.96.0.1", "localhost", "kubernetes", "kubernetes.default"];
        let api_names = [&api_names[..], &["kubernetes.default.svc"]].concat();
        ca.leaf(&pki, "apiserver", Subject::new("kube-apiserver", None), Usage::Server, &api_names)?;
        ca.leaf(&pki, "konnectivity", Subject::new("konnectivity-server", None), Usage::Server, &[&cloud])?;
        front.leaf(&pki, "front-proxy", Subject::new("front-proxy-client", None), Usage::Client, &[])?;
        for (name, common_name, group) in [
            ("kubelet-client", "kube-apiserver-kubelet-client", Some("system:masters")),
            ("admin", "admin", Some("system:masters")),
            ("kcm", "system:kube-controller-manager", None),
            ("scheduler", "system:kube-scheduler", None),
            ("kube-proxy", "system:kube-proxy", None),
        ] {
            ca.leaf(&pki, name, Subject::new(common_name, group), Usage::Client, &[])?;
            fs::write(pki.join(format!("{name}.kubeconfig")), kubeconfig(API, &pki.to_string_lossy(), name))?;
        }
        for site in sites {
            for node in &site.nodes {
                let dir = pki.join(node);
                fs::create_dir_all(&dir)?;
                let address = site.address(node).context("a node without an address")?.to_string();
                let user = format!("system:node:{node}");
                let subject = Subject::new(&user, Some("system:nodes"));
                ca.leaf(&dir, "kubelet", subject, Usage::Client, &[])?;
                ca.leaf(&dir, "serving", subject, Usage::Server, &[node, &address])?;
            }
        }
        Ok(())
    }

    /// Puts a node's certificates and kubeconfigs where its kubelet, kube-proxy and flanneld look.
    pub fn equip(&self, node: &Host) -> Result<()> {
        const PKI: &str = "/etc/kubernetes/pki";
        let from = self.pki();
        let own = from.join(node.name());
        for (file, dir) in [
            ("ca.crt", &from),
            ("kube-proxy.crt", &from),
            ("kube-proxy.key", &from),
            // flanneld's, which has no identity of its own here.
            ("admin.crt", &from),
            ("admin.key", &from),
            ("kubelet.crt", &own),
            ("kubelet.key", &own),
            ("serving.crt", &own),
            ("serving.key", &own),
        ] {
            node.write(&format!("{PKI}/{file}"), fs::read(dir.join(file))?)?;
        }
        for name in ["kubelet", "kube-proxy", "admin"] {
            node.write(&format!("/etc/kubernetes/{name}.kubeconfig"), kubeconfig(API, PKI, name))?;
        }
        Ok(())
    }

    /// Starts etcd and the API server; [`ControlPlane::wait_ready`] waits for them. With an `egress` configuration, connections to
    /// nodes go through the tunnel that it names.
    pub fn start_api(&mut self, cloud: &Host, egress: Option<&Path>) -> Result<()> {
        let mut etcd = cloud.command(tools::etcd()?)?;
        etcd.args(["--name=rig", "--listen-client-urls=http://127.0.0.1:2379"]);
        etcd.args([
            "--advertise-client-urls=http://127.0.0.1:2379",
            "--listen-peer-urls=http://127.0.0.1:2380",
        ]);
        etcd.args([
            "--initial-advertise-peer-urls=http://127.0.0.1:2380",
            "--initial-cluster=rig=http://127.0.0.1:2380",
        ]);
        // It is not etcd's durability that is tested here.
        etcd.args(["--unsafe-no-fsync", "--log-level=warn"]);
        etcd.arg(format!("--data-dir={}", self.dir.join("etcd").display()));
        self.daemons.start("etcd", etcd)?;

        let mut api = cloud.command(tools::kube_apiserver()?)?;
        let file = |name: &str| self.pki().join(name).display().to_string();
        api.args(["--etcd-servers=http://127.0.0.1:2379", "--secure-port=6443", "--allow-privileged=true"]);
        api.arg(format!("--advertise-address={CLOUD}"));
        api.arg(format!("--service-cluster-ip-range={SERVICE_CIDR}"));
        api.args(["--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction"]);
        api.args([
            "--service-account-issuer=https://kubernetes.default.svc",
            "--enable-aggregator-routing=true",
        ]);
        api.arg("--profiling=false");
        match egress {
            Some(config) => {
                api.arg(format!("--egress-selector-config-file={}", config.display()));
                // A node's name is unique where its address may not be.
                api.arg("--kubelet-preferred-address-types=Hostname,InternalIP");
            }
            None => drop(api.arg("--kubelet-preferred-address-types=InternalIP,Hostname")),
        }
        api.args([
            "--requestheader-allowed-names=front-proxy-client",
            "--requestheader-username-headers=X-Remote-User",
        ]);
        api.args([
            "--requestheader-group-headers=X-Remote-Group",
            "--requestheader-extra-headers-prefix=X-Remote-Extra-",
        ]);
        for (flag, name) in [
            ("tls-cert-file", "apiserver.crt"),
            ("tls-private-key-file", "apiserver.key"),
            ("client-ca-file", "ca.crt"),
            ("service-account-key-file", "sa.pub"),
            ("service-account-signing-key-file", "sa.key"),
            ("kubelet-certificate-authority", "ca.crt"),
            ("kubelet-client-certificate", "kubelet-client.crt"),
            ("kubelet-client-key", "kubelet-client.key"),
            ("requestheader-client-ca-file", "front-ca.crt"),
            ("proxy-client-cert-file", "front-proxy.crt"),
            ("proxy-client-key-file", "front-proxy.key"),
        ] {
            api.arg(format!("--{flag}={}", file(name)));
        }
        self.daemons.start("kube-apiserver", api)
    }

    /// Waits until the API answers, then starts the controllers and the scheduler.
    pub fn wait_ready(&mut self, cloud: &Host) -> Result<()> {
        wait_for("the API server to be ready", Duration::from_secs(120), || {
            self.daemons.check_alive("kube-apiserver")?;
            self.daemons.check_alive("etcd")?;
            let answer = self.kubectl(cloud, &["get", "--raw=/readyz"])?;
            Ok((answer == "ok").then_some(()))
        })?;
        let file = |name: &str| self.pki().join(name).display().to_string();
        let mut kcm = cloud.command(tools::kube_controller_manager()?)?;
        for flag in ["kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig"] {
            kcm.arg(format!("--{flag}={}", file("kcm.kubeconfig")));
        }
        for (flag, name) in [
            ("service-account-private-key-file", "sa.key"),
            ("root-ca-file", "ca.crt"),
            ("cluster-signing-cert-file", "ca.crt"),
            ("cluster-signing-key-file", "ca.key"),
            ("client-ca-file", "ca.crt"),
            ("requestheader-client-ca-file", "front-ca.crt"),
        ] {
            kcm.arg(format!("--{flag}={}", file(name)));
        }
        kcm.args(["--allocate-node-cidrs=true", "--node-cidr-mask-size=24", "--leader-elect=false"]);
        kcm.args(["--use-service-account-credentials=true", "--bind-address=127.0.0.1"]);
        // It makes an account for each of its controllers first; by default it holds itself back to 20 requests a second.
        kcm.args(["--kube-api-qps=500", "--kube-api-burst=500"]);
        kcm.arg(format!("--cluster-cidr={POD_CIDR}"));
        kcm.arg(format!("--service-cluster-ip-range={SERVICE_CIDR}"));
        let mut scheduler = cloud.command(tools::kube_scheduler()?)?;
        for flag in ["kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig"] {
            scheduler.arg(format!("--{flag}={}", file("scheduler.kubeconfig")));
        }
        scheduler.args(["--leader-elect=false", "--bind-address=127.0.0.1"]);
        self.daemons.start("kube-controller-manager", kcm)?;
        self.daemons.start("kube-scheduler", scheduler)
    }

    /// `kubectl` as the cluster's admin, run in the cloud's host.
    pub fn kubectl_command(&self, cloud: &Host) -> Result<Command> {
        let mut command = cloud.command(tools::kubectl()?)?;
        command.arg(format!("--kubeconfig={}", self.pki().join("admin.kubeconfig").display()));
        command.arg(format!("--cache-dir={}", self.dir.join("kubectl-cache").display()));
        Ok(command)
    }

    /// Runs kubectl to its end; gives its stdout.
    pub fn kubectl(&self, cloud: &Host, arguments: &[&str]) -> Result<String> {
        ensure!(cloud.is_on(), "the cloud has no power: is the rig up?");
        run(self.kubectl_command(cloud)?.args(arguments), b"", COMMAND_LIMIT)?.ok()
    }
}
