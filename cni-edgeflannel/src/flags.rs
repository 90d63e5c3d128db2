//! The command line of `edgeflanneld`, written as flanneld's manifests write it.
//!
//! Go's `flag` package decides the grammar: one dash or two, `-flag=value` or `-flag value`, and a boolean
//! without a value is true. What is not on the command line is looked up in the environment, first as
//! `EDGEFLANNELD_HEALTHZ_PORT`, then as `FLANNELD_HEALTHZ_PORT` (`main.go`, `SetFlagsFromEnv`). A flag of
//! flanneld's that means nothing here is accepted with a warning, so that a node can move over with its
//! manifest unchanged; an unknown one is refused. Every mistake is reported at once. Pure: nothing is read here.

use crate::{
    cluster::annotations::Keys,
    record::{Family, UnderlayChoice},
};
use regex_lite::Regex;
use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
    path::PathBuf,
};

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Run until told to stop.
    Run,
    /// Restore the overlay from the record, once, and end.
    Restore,
    /// Say what is wanted and what the kernel has.
    Status {
        /// For programs (`-o json`).
        json: bool,
    },
    /// Take away everything of ours but the pods' addresses.
    Remove,
    /// Print the version.
    Version,
    /// Print what can be said here.
    Help,
}

/// Where the API server is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ApiAddress {
    /// `--kubeconfig-file`; with neither, the pod's own service account.
    pub kubeconfig: Option<PathBuf>,
    /// `--kube-api-url`, instead of the kubeconfig's.
    pub url: Option<String>,
}

/// Everything that was said. `None` and empty lists: not said, so the record's value or the default holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flags {
    /// `--node-name`, else NODE_NAME, in lower case.
    pub node_name: Option<String>,
    /// `--kubeconfig-file`, `--kube-api-url`
    pub api: ApiAddress,
    /// `--net-config-path`
    pub net_config_path: PathBuf,
    /// `--subnet-file`
    pub subnet_file: Option<PathBuf>,
    /// `--state-dir`
    pub state_dir: PathBuf,
    /// `--cni-cache-dir`
    pub cni_cache_dir: PathBuf,
    /// `--iface`, `--iface-regex`, `--iface-can-reach`, `--public-ip`, `--public-ipv6`
    pub underlay: UnderlayChoice,
    /// `--ip-masq`
    pub ip_masq: Option<bool>,
    /// Not `--ip-masq-fully-random-disable`.
    pub random_fully: Option<bool>,
    /// `--iptables-forward-rules`
    pub forward_rules: Option<bool>,
    /// `--disable-tx-checksum`
    pub disable_tx_checksum: Option<bool>,
    /// `--kube-annotation-prefix`
    pub annotation_prefix: Option<String>,
    /// `--set-node-network-unavailable`
    pub set_network_unavailable: bool,
    /// `--healthz-ip`
    pub healthz_ip: IpAddr,
    /// `--healthz-port`; `None` is off.
    pub healthz_port: Option<u16>,
    /// `--log-level`
    pub log_level: log::LevelFilter,
}

impl Default for Flags {
    fn default() -> Self {
        Self {
            node_name: None,
            api: ApiAddress::default(),
            net_config_path: "/etc/kube-flannel/net-conf.json".into(),
            subnet_file: None,
            state_dir: "/var/lib/edgeflannel".into(),
            cni_cache_dir: "/var/lib/cni".into(),
            underlay: UnderlayChoice::default(),
            ip_masq: None,
            random_fully: None,
            forward_rules: None,
            disable_tx_checksum: None,
            annotation_prefix: None,
            set_network_unavailable: true,
            healthz_ip: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            healthz_port: None,
            log_level: log::LevelFilter::Info,
        }
    }
}

/// A command line that can be acted upon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parsed {
    /// What is to be done.
    pub command: Command,
    /// How.
    pub flags: Flags,
    /// What was accepted but does nothing.
    pub warnings: Vec<String>,
}

/// How a flag takes its value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Takes {
    /// `--x`, `--x=true`
    Bool,
    /// `--x=v`, `--x v`; the last one counts.
    Value,
    /// The same, and each one counts.
    Values,
}

/// A flag: name, value, and what it does (empty: nothing here, only flanneld knows it).
type Known = (&'static str, Takes, &'static str);

/// Every flag. `node-name`, `state-dir`, `cni-cache-dir`, `disable-tx-checksum`, `log-level` and `o` are ours.
const KNOWN: &[Known] = &[
    ("node-name", Takes::Value, "name of this node (default NODE_NAME, then the host name)"),
    ("kubeconfig-file", Takes::Value, "kubeconfig of the API server (default: the pod's service account)"),
    ("kube-api-url", Takes::Value, "URL of the API server, instead of the kubeconfig's"),
    ("net-config-path", Takes::Value, "net-conf.json (default /etc/kube-flannel/net-conf.json)"),
    ("subnet-file", Takes::Value, "where subnet.env is written (default /run/flannel/subnet.env)"),
    ("state-dir", Takes::Value, "the node's own record (default /var/lib/edgeflannel)"),
    (
        "cni-cache-dir",
        Takes::Value,
        "libcni's cache, cleared at start of unreadable results (default /var/lib/cni)",
    ),
    ("iface", Takes::Values, "name or address of the interface between nodes; the first that exists"),
    ("iface-regex", Takes::Values, "pattern for the address or the name of that interface"),
    ("iface-can-reach", Takes::Value, "address; the interface by which it is reached"),
    ("public-ip", Takes::Value, "IPv4 address by which other nodes reach this one"),
    ("public-ipv6", Takes::Value, "IPv6 address by which other nodes reach this one"),
    ("ip-masq", Takes::Bool, "masquerade what leaves the overlay"),
    ("ip-masq-fully-random-disable", Takes::Bool, "masquerade without fully random ports"),
    ("iptables-forward-rules", Takes::Bool, "accept forwarded packets of the overlay (default true)"),
    ("disable-tx-checksum", Takes::Bool, "switch the checksum offload of the VXLAN device off"),
    ("kube-annotation-prefix", Takes::Value, "prefix of the annotations (default flannel.alpha.coreos.com)"),
    ("set-node-network-unavailable", Takes::Bool, "set NetworkUnavailable=False when ready (default true)"),
    ("healthz-ip", Takes::Value, "address of /healthz, /readyz and /metrics (default 0.0.0.0)"),
    ("healthz-port", Takes::Value, "their port (default 0: off)"),
    ("log-level", Takes::Value, "error, warn, info, debug, trace or off (default info)"),
    ("o", Takes::Value, "json: status for programs"),
    ("version", Takes::Bool, "print the version"),
    ("help", Takes::Bool, "print this"),
    ("h", Takes::Bool, "print this"),
    ("kube-subnet-mgr", Takes::Bool, ""),
    ("iptables-resync", Takes::Value, ""),
    ("ip-blackhole-route", Takes::Bool, ""),
    ("subnet-lease-renew-margin", Takes::Value, ""),
    ("etcd-endpoints", Takes::Value, ""),
    ("etcd-prefix", Takes::Value, ""),
    ("etcd-keyfile", Takes::Value, ""),
    ("etcd-certfile", Takes::Value, ""),
    ("etcd-cafile", Takes::Value, ""),
    ("etcd-username", Takes::Value, ""),
    ("etcd-password", Takes::Value, ""),
    ("v", Takes::Value, ""),
    ("vmodule", Takes::Value, ""),
    ("log_backtrace_at", Takes::Value, ""),
];

/// What `--help` prints.
#[must_use]
pub fn usage() -> String {
    let mut text = String::from(
        "edgeflanneld joins this node to the cluster's flannel network and keeps it there.\n\n\
         Usage: edgeflanneld [restore | status [-o json] | remove] [--flag=value]...\n\n",
    );
    for (name, _, does) in KNOWN.iter().filter(|(.., does)| !does.is_empty()) {
        text.push_str(&format!("  --{name}\n        {does}\n"));
    }
    text.push_str("\nEach flag is also read from EDGEFLANNELD_FLAG_NAME, then FLANNELD_FLAG_NAME.\n");
    text
}

/// Reads a command line (without the program's name) and the environment.
///
/// # Errors
/// Every mistake in it.
pub fn parse(args: &[String], env: impl Fn(&str) -> Option<String>) -> Result<Parsed, Vec<String>> {
    let mut said = Said::default();
    said.command_line(args);
    said.environment(&env);
    let mut flags = Flags::default();
    let mut command = Command::Run;
    said.apply(&mut flags, &mut command);
    if flags.node_name.is_none() {
        flags.node_name = env("NODE_NAME").filter(|name| !name.is_empty());
    }
    flags.node_name = flags.node_name.map(|name| name.to_lowercase());
    if let Some(name) = flags.node_name.as_deref().filter(|name| !is_node_name(name)) {
        said.mistakes.push(format!("{name:?} cannot be the name of a node"));
    }
    if said.mistakes.is_empty() {
        Ok(Parsed { command, flags, warnings: said.warnings })
    } else {
        Err(said.mistakes)
    }
}

/// The name this node has without being given one: the host's, unless nobody has set that yet.
#[must_use]
pub fn name_of_host(host_name: &str) -> Option<String> {
    let name = host_name.to_lowercase();
    (!matches!(name.as_str(), "localhost" | "(none)") && is_node_name(&name)).then_some(name)
}

/// A DNS subdomain (Kubernetes `ValidateNodeName`). The name goes into URLs and file names.
fn is_node_name(name: &str) -> bool {
    let label = |label: &str| {
        let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        !label.is_empty() && label.chars().all(inner) && !label.starts_with('-') && !label.ends_with('-')
    };
    name.len() <= 253 && name.split('.').all(label)
}

/// What was written, before it is understood.
#[derive(Default)]
struct Said {
    words: Vec<String>,
    values: BTreeMap<&'static str, Vec<String>>,
    warnings: Vec<String>,
    mistakes: Vec<String>,
}

impl Said {
    fn command_line(&mut self, args: &[String]) {
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            let Some(flag) = arg.strip_prefix('-').filter(|flag| !flag.is_empty()) else {
                self.words.push(arg.clone());
                continue;
            };
            let flag = flag.strip_prefix('-').unwrap_or(flag);
            if flag.is_empty() {
                self.words.extend(args.by_ref().cloned());
                break;
            }
            let (name, value) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            let Some((name, takes, _)) = KNOWN.iter().find(|(known, ..)| *known == name) else {
                self.mistakes.push(format!("unknown flag {arg}"));
                continue;
            };
            let value = match (takes, value) {
                (_, Some(value)) => Some(value),
                (Takes::Bool, None) => Some("true".into()),
                (_, None) => args.next().cloned(),
            };
            match value {
                Some(value) => self.values.entry(name).or_default().push(value),
                None => self.mistakes.push(format!("--{name} lacks a value")),
            }
        }
    }

    fn environment(&mut self, env: &impl Fn(&str) -> Option<String>) {
        for (name, ..) in
            KNOWN.iter().filter(|(name, ..)| name.len() > 1 && !matches!(*name, "help" | "version"))
        {
            let upper = name.to_uppercase().replace('-', "_");
            let value = ["EDGEFLANNELD", "FLANNELD"]
                .iter()
                .find_map(|prefix| env(&format!("{prefix}_{upper}")).filter(|value| !value.is_empty()));
            if let Some(value) = value {
                self.values.entry(name).or_insert_with(|| vec![value]);
            }
        }
    }

    fn apply(&mut self, flags: &mut Flags, command: &mut Command) {
        let values = std::mem::take(&mut self.values);
        let mut output = None;
        for (name, all) in &values {
            let Some(last) = all.last() else { continue };
            match *name {
                "node-name" => flags.node_name = Some(last.clone()).filter(|name| !name.is_empty()),
                "kubeconfig-file" => flags.api.kubeconfig = self.path(last),
                "kube-api-url" => flags.api.url = self.url(last),
                "net-config-path" => flags.net_config_path = last.into(),
                "subnet-file" => flags.subnet_file = self.path(last),
                "state-dir" => flags.state_dir = last.into(),
                "cni-cache-dir" => flags.cni_cache_dir = last.into(),
                "iface" => flags.underlay.ifaces = all.clone(),
                "iface-regex" => flags.underlay.iface_regexes = self.patterns(all),
                "iface-can-reach" => flags.underlay.can_reach = self.address(name, last, None),
                "public-ip" => flags.underlay.public_ips.v4 = self.address(name, last, Some(Family::V4)),
                "public-ipv6" => flags.underlay.public_ips.v6 = self.address(name, last, Some(Family::V6)),
                "ip-masq" => flags.ip_masq = self.boolean(name, last),
                "ip-masq-fully-random-disable" => flags.random_fully = self.boolean(name, last).map(|no| !no),
                "iptables-forward-rules" => flags.forward_rules = self.boolean(name, last),
                "disable-tx-checksum" => flags.disable_tx_checksum = self.boolean(name, last),
                "kube-annotation-prefix" => match Keys::new(last) {
                    Ok(_) => flags.annotation_prefix = Some(last.clone()),
                    Err(why) => self.mistakes.push(format!("--{name}={last}: {why}")),
                },
                "set-node-network-unavailable" => {
                    flags.set_network_unavailable = self.boolean(name, last).unwrap_or(true);
                }
                "healthz-ip" => {
                    flags.healthz_ip = self.address(name, last, None).unwrap_or(flags.healthz_ip);
                }
                "healthz-port" => match last.parse::<u16>() {
                    Ok(port) => flags.healthz_port = Some(port).filter(|port| *port != 0),
                    Err(_) => self.mistakes.push(format!("--{name}={last} is not a port")),
                },
                "log-level" => match last.parse() {
                    Ok(level) => flags.log_level = level,
                    Err(_) => self.mistakes.push(format!("--{name}={last} is not a log level")),
                },
                "o" => output = Some(last.as_str()),
                "version" if self.boolean(name, last) == Some(true) => *command = Command::Version,
                "help" | "h" if self.boolean(name, last) == Some(true) => *command = Command::Help,
                "version" | "help" | "h" => {}
                etcd if etcd.starts_with("etcd-") => self.warnings.push(format!(
                    "--{etcd} has no effect: subnets come from the Kubernetes API, never from etcd"
                )),
                other => self
                    .warnings
                    .push(format!("--{other} has no effect: flanneld needs it, edgeflanneld does not")),
            }
        }
        self.command(command, output);
    }

    fn command(&mut self, command: &mut Command, output: Option<&str>) {
        let json = match output {
            None | Some("table") => false,
            Some("json") => true,
            Some(other) => {
                self.mistakes.push(format!("-o {other}: there are json and table"));
                false
            }
        };
        if matches!(command, Command::Run) {
            match self.words.as_slice() {
                [] => {}
                [word] => match word.as_str() {
                    "restore" => *command = Command::Restore,
                    "status" => *command = Command::Status { json },
                    "remove" => *command = Command::Remove,
                    other => self
                        .mistakes
                        .push(format!("unknown command {other:?}: there are restore, status and remove")),
                },
                many => self.mistakes.push(format!("one command at a time, not {}", many.join(" "))),
            }
        }
        if output.is_some() && matches!(command, Command::Run | Command::Restore | Command::Remove) {
            self.mistakes.push("-o belongs to status".into());
        }
    }

    /// Go's `strconv.ParseBool`.
    fn boolean(&mut self, name: &str, value: &str) -> Option<bool> {
        match value {
            "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
            "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
            _ => {
                self.mistakes.push(format!("--{name}={value} is neither true nor false"));
                None
            }
        }
    }

    /// An address; empty is "not given", as in flanneld.
    fn address(&mut self, name: &str, value: &str, family: Option<Family>) -> Option<IpAddr> {
        if value.is_empty() {
            return None;
        }
        match value.parse::<IpAddr>() {
            Ok(address) if family.is_none_or(|family| Family::of(address) == family) => Some(address),
            _ => {
                let kind = family.map_or_else(|| "IP".to_owned(), |family| family.to_string());
                self.mistakes.push(format!("--{name}={value} is not an {kind} address"));
                None
            }
        }
    }

    fn patterns(&mut self, all: &[String]) -> Vec<String> {
        for pattern in all {
            if let Err(why) = Regex::new(pattern) {
                self.mistakes.push(format!("--iface-regex={pattern}: {why}"));
            }
        }
        all.to_vec()
    }

    fn path(&self, value: &str) -> Option<PathBuf> {
        (!value.is_empty()).then(|| value.into())
    }

    /// `host:port` alone means http, as in client-go (`rest.DefaultServerURL`).
    fn url(&mut self, value: &str) -> Option<String> {
        if value.is_empty() {
            return None;
        }
        let url = if value.contains("://") { value.to_owned() } else { format!("http://{value}") };
        let rest = url.strip_prefix("https://").or_else(|| url.strip_prefix("http://"));
        if rest.is_none_or(|rest| rest.is_empty() || rest.contains(char::is_whitespace)) {
            self.mistakes.push(format!("--kube-api-url={value} is not an http or https URL"));
        }
        Some(url)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(args: &[&str], env: &[(&str, &str)]) -> Result<Parsed, Vec<String>> {
        let args: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
        parse(&args, |key| env.iter().find(|(name, _)| *name == key).map(|(_, value)| (*value).to_owned()))
    }

    fn good(args: &[&str]) -> Parsed {
        with(args, &[]).unwrap()
    }

    #[test]
    fn flannels_own_manifest() {
        let parsed = with(
            &["--ip-masq", "--kube-subnet-mgr", "--healthz-port=8081"],
            &[("POD_NAME", "kube-flannel-x"), ("EVENT_QUEUE_DEPTH", "5000"), ("NODE_NAME", "Edge-1")],
        )
        .unwrap();
        assert_eq!(parsed.command, Command::Run);
        assert_eq!(parsed.flags.ip_masq, Some(true));
        assert_eq!(parsed.flags.healthz_port, Some(8081));
        assert_eq!(parsed.flags.node_name.as_deref(), Some("edge-1"));
        assert_eq!(parsed.warnings.len(), 1, "{:?}", parsed.warnings);
    }

    #[test]
    fn gos_ways_to_write_a_flag() {
        for args in [
            &["--iface=eth0", "--ip-masq=true", "--state-dir=/s"][..],
            &["-iface", "eth0", "-ip-masq", "-state-dir", "/s"],
            &["--iface", "eth0", "--state-dir", "/s", "--ip-masq=T"],
        ] {
            let flags = good(args).flags;
            assert_eq!(flags.underlay.ifaces, ["eth0"]);
            assert_eq!((flags.ip_masq, flags.state_dir), (Some(true), "/s".into()), "{args:?}");
        }
        let flags = good(&["--iface=eth0", "--iface=192.168.0.7", "--ip-masq=0", "--healthz-port=0"]).flags;
        assert_eq!(flags.underlay.ifaces, ["eth0", "192.168.0.7"]);
        assert_eq!((flags.ip_masq, flags.healthz_port), (Some(false), None));
        assert_eq!(good(&["--healthz-port=1", "--healthz-port=2"]).flags.healthz_port, Some(2));
        assert_eq!(good(&["--ip-masq-fully-random-disable"]).flags.random_fully, Some(false));
    }

    #[test]
    fn commands() {
        assert_eq!(good(&[]).command, Command::Run);
        assert_eq!(good(&["restore", "--state-dir=/s"]).command, Command::Restore);
        assert_eq!(good(&["--state-dir", "/s", "restore"]).command, Command::Restore);
        assert_eq!(good(&["status"]).command, Command::Status { json: false });
        assert_eq!(good(&["status", "-o", "json"]).command, Command::Status { json: true });
        assert_eq!(good(&["-o=json", "status"]).command, Command::Status { json: true });
        assert_eq!(good(&["remove"]).command, Command::Remove);
        assert_eq!(good(&["--version"]).command, Command::Version);
        assert_eq!(good(&["status", "-h"]).command, Command::Help);
        for bad in [
            &["start"][..],
            &["restore", "status"],
            &["-o", "json"],
            &["status", "-o", "yaml"],
            &["status", "-o"],
        ] {
            assert_eq!(with(bad, &[]).unwrap_err().len(), 1, "{bad:?}");
        }
    }

    #[test]
    fn ours_wins_over_flannels_environment_and_the_command_line_over_both() {
        let env = [
            ("FLANNELD_IFACE", "eth0"),
            ("EDGEFLANNELD_IFACE", "eth1"),
            ("FLANNELD_PUBLIC_IP", "10.0.0.1"),
            ("EDGEFLANNELD_PUBLIC_IP", ""),
            // What Kubernetes sets for a Service called edgeflanneld.
            ("EDGEFLANNELD_PORT", "tcp://10.96.0.7:80"),
            ("FLANNELD_ETCD_ENDPOINTS", "http://127.0.0.1:2379"),
        ];
        let parsed = with(&[], &env).unwrap();
        assert_eq!(parsed.flags.underlay.ifaces, ["eth1"]);
        assert_eq!(parsed.flags.underlay.public_ips.v4, "10.0.0.1".parse().ok());
        assert_eq!(parsed.warnings.len(), 1);
        assert_eq!(with(&["--iface=eth2"], &env).unwrap().flags.underlay.ifaces, ["eth2"]);
        let named = with(&["--node-name=A"], &[("NODE_NAME", "b"), ("EDGEFLANNELD_NODE_NAME", "c")]).unwrap();
        assert_eq!(named.flags.node_name.as_deref(), Some("a"));
        let named = with(&[], &[("NODE_NAME", "b"), ("EDGEFLANNELD_NODE_NAME", "c")]).unwrap();
        assert_eq!(named.flags.node_name.as_deref(), Some("c"));
    }

    #[test]
    fn every_mistake_at_once() {
        let mistakes = with(
            &[
                "--iface-regexp=x",
                "--public-ip=fd00::1",
                "--public-ipv6=10.0.0.1",
                "--healthz-port=70000",
                "--healthz-ip=here",
                "--iface-regex=(",
                "--kube-annotation-prefix=a/b/c",
                "--ip-masq=yes",
                "--kube-api-url=ftp://x",
                "--node-name=../x",
                "--log-level=loud",
                "--iface",
            ],
            &[],
        )
        .unwrap_err();
        assert_eq!(mistakes.len(), 12, "{mistakes:#?}");
    }

    #[test]
    fn what_means_nothing_here_is_accepted() {
        let parsed =
            good(&["--iptables-resync=5", "--v=4", "-v", "4", "--etcd-prefix", "/x", "--ip-blackhole-route"]);
        assert_eq!(parsed.warnings.len(), 4, "{:?}", parsed.warnings);
        assert_eq!(parsed.flags, Flags::default());
    }

    #[test]
    fn an_api_url() {
        let url = |url: &str| good(&[&format!("--kube-api-url={url}")]).flags.api.url;
        assert_eq!(url("https://10.0.0.1:6443").unwrap(), "https://10.0.0.1:6443");
        assert_eq!(url("10.0.0.1:8080").unwrap(), "http://10.0.0.1:8080");
        assert_eq!(url(""), None);
    }

    #[test]
    fn a_host_name_that_nobody_set_is_none() {
        assert_eq!(name_of_host("Edge-1").as_deref(), Some("edge-1"));
        assert_eq!(name_of_host("a.b.example").as_deref(), Some("a.b.example"));
        for none in ["", "localhost", "(none)", "a_b", "-a", "a..b"] {
            assert_eq!(name_of_host(none), None, "{none}");
        }
    }

    #[test]
    fn help_names_every_flag_that_does_something() {
        let text = usage();
        assert!(text.contains("--iface-can-reach") && !text.contains("etcd"));
    }

    /// Every manifest and unit that we ship starts the daemon with flags that it has, and that do something.
    #[test]
    fn what_we_ship() {
        let conf = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../conf");
        let mut found = 0;
        for dir in ["daemonset", "static-pod", "systemd"] {
            for entry in std::fs::read_dir(conf.join(dir)).unwrap() {
                let path = entry.unwrap().path();
                let text = std::fs::read_to_string(&path).unwrap();
                let args: Vec<String> = text
                    .lines()
                    .flat_map(|line| match line.trim().strip_prefix("ExecStart=") {
                        Some(command) => command.split(' ').skip(1).collect(),
                        None => line
                            .trim()
                            .strip_prefix("- ")
                            .filter(|arg| arg.starts_with("--"))
                            .into_iter()
                            .collect::<Vec<_>>(),
                    })
                    .map(str::to_owned)
                    .collect();
                assert!(!args.is_empty(), "{}", path.display());
                let parsed =
                    parse(&args, |_| None).unwrap_or_else(|why| panic!("{}: {why:?}", path.display()));
                assert!(parsed.warnings.is_empty(), "{}: {:?}", path.display(), parsed.warnings);
                found += 1;
            }
        }
        assert_eq!(found, 4, "a new file, or one that is gone");
    }
}
