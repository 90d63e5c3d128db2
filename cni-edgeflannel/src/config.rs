//! The network configuration: what a person wrote, and what the plugin uses.
//!
//! Two shapes are taken. Ours has the reference bridge plugin's keys at the top. flannel's has them under
//! `delegate`, so a flannel node's conflist needs its `type` changed and nothing else. Where both say
//! something, the top wins: whoever writes there writes for us. Every mistake is reported at once.

use crate::mac::Mac;
use cni::{Attachment, Dns, Error, IfName, NetConf};
use ipnetwork::IpNetwork;
use serde::Deserialize;
use serde_json::{Map, Value};
use std::path::PathBuf;

/// Where flanneld writes it, and so do we.
pub const SUBNET_FILE: &str = "/run/flannel/subnet.env";
/// Where flannel's CNI plugin keeps the configuration of each container's delegate.
const FLANNEL_DATA_DIR: &str = "/var/lib/cni/flannel";
/// Where the daemon keeps the node's record.
const STATE_DIR: &str = "/var/lib/edgeflannel";
/// IPAM unless told otherwise.
const IPAM: &str = "ipam-sticky";
/// Plugins that cannot do without ranges; others (`static`, `dhcp`) have their own source of addresses.
const NEED_RANGES: [&str; 2] = [IPAM, "host-local"];
/// `CNI_ARGS` that we, or the IPAM plugin, know.
const KNOWN_ARGS: [&str; 6] =
    ["IP", "MAC", "K8S_POD_NAMESPACE", "K8S_POD_NAME", "K8S_POD_INFRA_CONTAINER_ID", "K8S_POD_UID"];

/// What the plugin goes by.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The bridge that pods are ports of.
    pub bridge: IfName,
    /// The bridge has the subnet's gateway address.
    pub gateway: bool,
    /// Pods get a default route through it.
    pub default_route: bool,
    /// What to do with another gateway address on the bridge.
    pub old_gateway: OldGateway,
    /// A pod reaches itself through a service.
    pub hairpin: bool,
    /// The bridge takes every frame, whatever its destination.
    pub promiscuous: bool,
    /// Pods of this node do not see each other.
    pub isolated: bool,
    /// Written; `None` is automatic.
    pub mtu: Option<u32>,
    /// Written; `None` is for [`Config::masquerade`] to decide.
    masquerade: Option<bool>,
    /// The hardware address that the pod is to have.
    pub mac: Option<Mac>,
    /// Resolver settings of the configuration, which replace those of IPAM.
    pub dns: Option<Dns>,
    /// Who gives addresses.
    pub ipam: Ipam,
    /// flannel's notes about containers made before a migration.
    pub flannel_data_dir: PathBuf,
    /// The node's record, from which the overlay comes back.
    pub state_dir: PathBuf,
}

/// What happens to a gateway address on the bridge that belongs to another subnet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OldGateway {
    /// It is taken away: the node's subnet has changed.
    Replace,
    /// `"forceAddress": false` was written: an error, as in the reference plugin.
    Refuse,
}

/// The IPAM plugin and where its ranges come from.
#[derive(Debug, Clone, PartialEq)]
pub struct Ipam {
    /// Name of its executable.
    pub kind: String,
    /// Its part of the configuration, as written.
    pub written: Map<String, Value>,
    /// That part stands at the top of the configuration, where the IPAM plugin looks for it.
    pub at_top: bool,
    /// Ranges.
    pub ranges: Ranges,
}

/// Where the ranges of addresses come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ranges {
    /// They stand in the configuration (or IPAM needs none); these are the subnets that could be read from it.
    Inline(Vec<IpNetwork>),
    /// The node's subnet.
    SubnetFile(PathBuf),
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct Written {
    subnet_file: String,
    state_dir: String,
    data_dir: String,
    delegate: Option<Options>,
    ipam: Map<String, Value>,
    args: Args,
    runtime_config: RuntimeConfig,
    dns: Option<WrittenDns>,
}

/// The reference bridge plugin's keys.
#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct Options {
    r#type: String,
    bridge: String,
    is_gateway: Option<bool>,
    is_default_gateway: Option<bool>,
    force_address: Option<bool>,
    ip_masq: Option<bool>,
    mtu: u32,
    hairpin_mode: Option<bool>,
    promisc_mode: Option<bool>,
    port_isolation: Option<bool>,
    vlan: i64,
    vlan_trunk: Vec<Value>,
    macspoofchk: bool,
    disable_container_interface: bool,
    ipam: Map<String, Value>,
    dns: Option<WrittenDns>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct Args {
    cni: ArgsCni,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct ArgsCni {
    mac: String,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct RuntimeConfig {
    mac: String,
    ip_ranges: Vec<Value>,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct WrittenDns {
    nameservers: Vec<String>,
    domain: String,
    search: Vec<String>,
    options: Vec<String>,
}

/// The log, which is started before anything else is looked at.
#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
pub struct Log {
    /// `logFile`
    pub log_file: Option<PathBuf>,
    /// `logLevel`
    pub log_level: Option<String>,
}

impl Config {
    /// Reads the configuration, and what the attachment's arguments say about it.
    ///
    /// # Errors
    /// 6 for a key of the wrong type, 2 for options of the bridge plugin that we would have to ignore, 7 with
    /// every mistake, 4 for a bad `CNI_ARGS`.
    pub fn new(conf: &NetConf, at: Option<&Attachment>) -> Result<Self, Error> {
        let top: Options = conf.decode()?;
        let written: Written = conf.decode()?;
        let from_flannel = written.delegate.is_some();
        let delegate = written.delegate.unwrap_or_default();
        refuse_unsupported(&top, &delegate)?;
        if let Some(at) = at {
            at.args.refuse_unknown(&KNOWN_ARGS)?;
        }

        let mut mistakes = Vec::new();
        let bridge = first(&[&top.bridge, &delegate.bridge, "cni0"]);
        let bridge = IfName::parse(bridge)
            .map_err(|_| mistakes.push(format!("\"bridge\": {bridge:?} cannot be the name of a device")));
        let mac = asked_mac(&written.runtime_config, &written.args, at)
            .map_err(|(origin, why)| mistakes.push(format!("{origin}: {why}")));
        let mtu = [top.mtu, delegate.mtu].into_iter().find(|mtu| *mtu != 0);
        if let Some(mtu) = mtu.filter(|mtu| !(68..=65535).contains(mtu)) {
            mistakes.push(format!("\"mtu\": {mtu} is not between 68 and 65535"));
        }
        let promiscuous = top.promisc_mode.or(delegate.promisc_mode).unwrap_or(false);
        let hairpin = top.hairpin_mode.or(delegate.hairpin_mode);
        if promiscuous && hairpin == Some(true) {
            mistakes.push("\"hairpinMode\" and \"promiscMode\" exclude each other".into());
        }
        let (Ok(bridge), Ok(mac), true) = (bridge, mac, mistakes.is_empty()) else {
            return Err(Error::invalid_config(mistakes.join("; ")));
        };

        let gateway = top.is_gateway.or(delegate.is_gateway);
        let default_route = top.is_default_gateway.or(delegate.is_default_gateway);
        let at_top = !written.ipam.is_empty();
        let ipam = if at_top { written.ipam } else { delegate.ipam };
        let dns = top.dns.or(delegate.dns);
        Ok(Self {
            bridge,
            gateway: default_route == Some(true) || gateway.unwrap_or(true),
            default_route: default_route.unwrap_or(gateway.unwrap_or(true)),
            old_gateway: match top.force_address.or(delegate.force_address) {
                Some(false) => OldGateway::Refuse,
                _ => OldGateway::Replace,
            },
            hairpin: hairpin.unwrap_or(!promiscuous),
            promiscuous,
            isolated: top.port_isolation.or(delegate.port_isolation).unwrap_or(false),
            mtu,
            masquerade: top.ip_masq.or(delegate.ip_masq),
            mac,
            dns: dns.map(WrittenDns::used).filter(|dns| *dns != Dns::default()),
            ipam: choose_ipam(ipam, at_top, &written.subnet_file, from_flannel, &written.runtime_config),
            flannel_data_dir: PathBuf::from(first(&[&written.data_dir, FLANNEL_DATA_DIR])),
            state_dir: PathBuf::from(first(&[&written.state_dir, STATE_DIR])),
        })
    }

    /// Whether pods leave under the node's address: as written; else, as flannel's CNI plugin decides, when
    /// flannel does not do it itself; else not, as the reference plugin.
    #[must_use]
    pub fn masquerade(&self, flannel_does: Option<bool>) -> bool {
        self.masquerade.or(flannel_does.map(|does| !does)).unwrap_or(false)
    }
}

/// Options that change who can reach whom must not be dropped silently.
fn refuse_unsupported(top: &Options, delegate: &Options) -> Result<(), Error> {
    for options in [top, delegate] {
        if options.vlan != 0 {
            return Err(Error::unsupported_field("vlan", &options.vlan.to_string()));
        }
        if !options.vlan_trunk.is_empty() {
            return Err(Error::unsupported_field(
                "vlanTrunk",
                &Value::from(options.vlan_trunk.clone()).to_string(),
            ));
        }
        if options.macspoofchk {
            return Err(Error::unsupported_field("macspoofchk", "true"));
        }
        if options.disable_container_interface {
            return Err(Error::unsupported_field("disableContainerInterface", "true"));
        }
    }
    if !["", "bridge"].contains(&delegate.r#type.as_str()) {
        return Err(Error::unsupported_field("delegate.type", &delegate.r#type).with_details(
            "edgeflannel wires pods to a bridge itself; keep flannel's plugin for other delegates",
        ));
    }
    Ok(())
}

/// The hardware address that was asked for; the later source wins, as in the reference plugin.
fn asked_mac(
    runtime: &RuntimeConfig,
    args: &Args,
    at: Option<&Attachment>,
) -> Result<Option<Mac>, (&'static str, String)> {
    let environment = at.and_then(|at| at.args.get("MAC")).unwrap_or_default();
    let sources = [
        ("runtimeConfig.mac", runtime.mac.as_str()),
        ("args.cni.mac", args.cni.mac.as_str()),
        ("CNI_ARGS MAC", environment),
    ];
    match sources.into_iter().find(|(_, text)| !text.is_empty()) {
        None => Ok(None),
        Some((origin, text)) => match text.parse() {
            Ok(mac) => Ok(Some(mac)),
            Err(why) => Err((origin, format!("{text:?} cannot be a pod's hardware address: {why}"))),
        },
    }
}

fn choose_ipam(
    written: Map<String, Value>,
    at_top: bool,
    subnet_file: &str,
    from_flannel: bool,
    runtime: &RuntimeConfig,
) -> Ipam {
    let text = |key| cni::golike::get(&written, key).and_then(Value::as_str).unwrap_or_default();
    let kind = first(&[text("type"), IPAM]).to_owned();
    let subnets = inline_subnets(&written);
    let has_ranges = !subnets.is_empty()
        || !text("subnet").is_empty()
        || cni::golike::get(&written, "ranges")
            .and_then(Value::as_array)
            .is_some_and(|list| !list.is_empty())
        || !runtime.ip_ranges.is_empty();
    let by_node = from_flannel || !subnet_file.is_empty() || NEED_RANGES.contains(&kind.as_str());
    let ranges = if !has_ranges && by_node {
        Ranges::SubnetFile(PathBuf::from(first(&[subnet_file, SUBNET_FILE])))
    } else {
        Ranges::Inline(subnets)
    };
    Ipam { kind, written, at_top, ranges }
}

/// The subnets that host-local's keys name, as far as they can be read: whether they make sense is for the
/// IPAM plugin to say.
fn inline_subnets(ipam: &Map<String, Value>) -> Vec<IpNetwork> {
    let subnet = |range: &Map<String, Value>| {
        let text = cni::golike::get(range, "subnet")?.as_str()?;
        text.parse().ok().map(crate::subnet_env::without_host)
    };
    let sets = cni::golike::get(ipam, "ranges").and_then(Value::as_array);
    let ranges = sets.into_iter().flatten().filter_map(Value::as_array).flatten();
    subnet(ipam).into_iter().chain(ranges.filter_map(Value::as_object).filter_map(subnet)).collect()
}

/// The first that is not empty.
fn first<'a>(texts: &[&'a str]) -> &'a str {
    texts.iter().find(|text| !text.is_empty()).copied().unwrap_or_default()
}

impl WrittenDns {
    fn used(self) -> Dns {
        Dns {
            nameservers: self.nameservers,
            domain: Some(self.domain).filter(|domain| !domain.is_empty()),
            search: self.search,
            options: self.options,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cni::{Args as CniArgs, AttachmentId, ContainerId, Version};

    fn conf(text: &str) -> NetConf {
        NetConf::parse(text.into(), &mut Version::V1_1_0).unwrap()
    }

    fn config(keys: &str) -> Result<Config, Error> {
        let comma = if keys.is_empty() { "" } else { "," };
        let text = format!(r#"{{"cniVersion":"1.0.0","name":"n","type":"edgeflannel"{comma}{keys}}}"#);
        Config::new(&conf(&text), None)
    }

    fn with_args(args: &str, keys: &str) -> Result<Config, Error> {
        let id = AttachmentId {
            container_id: ContainerId::parse("c").unwrap(),
            ifname: IfName::parse("eth0").unwrap(),
        };
        let at = Attachment { id, args: CniArgs::parse(args).unwrap() };
        let text = format!(r#"{{"cniVersion":"1.0.0","name":"n","type":"edgeflannel"{keys}}}"#);
        Config::new(&conf(&text), Some(&at))
    }

    #[test]
    fn defaults() {
        let config = config("").unwrap();
        assert_eq!(config.bridge.as_str(), "cni0");
        assert!(config.gateway && config.default_route && config.hairpin);
        assert!(!config.promiscuous && !config.isolated);
        assert_eq!((config.mtu, config.mac, config.old_gateway), (None, None, OldGateway::Replace));
        assert_eq!(config.ipam.kind, "ipam-sticky");
        assert_eq!(config.ipam.ranges, Ranges::SubnetFile(SUBNET_FILE.into()));
        assert!(!config.masquerade(None) && !config.masquerade(Some(true)) && config.masquerade(Some(false)));
    }

    #[test]
    fn flannels_own() {
        // kube-flannel.yml with `type` changed.
        let keys = r#""delegate":{"hairpinMode":true,"isDefaultGateway":true},"subnetFile":"/x/subnet.env","dataDir":"/y""#;
        let config = config(keys).unwrap();
        assert!(config.hairpin && config.gateway && config.default_route);
        assert_eq!(config.ipam.ranges, Ranges::SubnetFile("/x/subnet.env".into()));
        assert_eq!(config.flannel_data_dir, PathBuf::from("/y"));
        assert_eq!(config.state_dir, PathBuf::from(STATE_DIR));
    }

    #[test]
    fn top_wins_over_delegate() {
        let keys = r#""bridge":"br1","mtu":1400,"delegate":{"bridge":"br2","mtu":1300,"ipMasq":true,"isGateway":false,"ipam":{"type":"host-local"}}"#;
        let config = config(keys).unwrap();
        assert_eq!((config.bridge.as_str(), config.mtu), ("br1", Some(1400)));
        assert!(config.masquerade(Some(true)) && !config.gateway && !config.default_route);
        assert_eq!((config.ipam.kind.as_str(), config.ipam.at_top), ("host-local", false));
    }

    #[test]
    fn default_gateway_implies_gateway() {
        let both = |keys| config(keys).map(|c| (c.gateway, c.default_route)).unwrap();
        assert_eq!(both(r#""isGateway":false,"isDefaultGateway":true"#), (true, true));
        assert_eq!(both(r#""isGateway":false"#), (false, false));
        assert_eq!(both(r#""isDefaultGateway":false"#), (true, false));
    }

    #[test]
    fn where_ranges_come_from() {
        let ranges = |keys| config(keys).unwrap().ipam.ranges;
        let inline = |nets: &[&str]| Ranges::Inline(nets.iter().map(|net| net.parse().unwrap()).collect());
        let two =
            r#""ipam":{"type":"host-local","ranges":[[{"subnet":"10.1.0.0/16"}],[{"subnet":"fd00::/64"}]]}"#;
        assert_eq!(ranges(two), inline(&["10.1.0.0/16", "fd00::/64"]));
        assert_eq!(ranges(r#""ipam":{"Subnet":"10.1.0.5/16"}"#), inline(&["10.1.0.0/16"]));
        // Nonsense is the IPAM plugin's to refuse, not a reason to take other ranges.
        assert_eq!(ranges(r#""ipam":{"subnet":"nonsense"}"#), inline(&[]));
        assert_eq!(ranges(r#""ipam":{"type":"static","addresses":[]}"#), inline(&[]));
        assert_eq!(ranges(r#""ipam":{"type":"x"},"subnetFile":"/s""#), Ranges::SubnetFile("/s".into()));
        assert_eq!(ranges(r#""runtimeConfig":{"ipRanges":[[{"subnet":"10.1.0.0/16"}]]}"#), inline(&[]));
        assert_eq!(ranges(r#""ipam":{"ranges":[]}"#), Ranges::SubnetFile(SUBNET_FILE.into()));
    }

    #[test]
    fn every_mistake_is_said() {
        let keys = r#""bridge":"much too long for a device","mtu":70000,"promiscMode":true,"hairpinMode":true,"runtimeConfig":{"mac":"01:00:00:00:00:01"}"#;
        let error = config(keys).unwrap_err();
        assert_eq!(error.code, 7);
        for part in ["bridge", "mtu", "promiscMode", "runtimeConfig.mac"] {
            assert!(error.msg.contains(part), "{part}: {error}");
        }
        assert!(
            !config(r#""promiscMode":true"#).unwrap().hairpin,
            "promiscuous and hairpin exclude each other"
        );
    }

    #[test]
    fn wrong_types_and_options_we_would_have_to_drop() {
        assert_eq!(config(r#""bridge":5"#).unwrap_err().code, 6);
        assert_eq!(config(r#""mtu":-1"#).unwrap_err().code, 6);
        for keys in [
            r#""vlan":7"#,
            r#""delegate":{"vlanTrunk":[{"id":1}]}"#,
            r#""macspoofchk":true"#,
            r#""disableContainerInterface":true"#,
            r#""delegate":{"type":"macvlan"}"#,
        ] {
            assert_eq!(config(keys).unwrap_err().code, 2, "{keys}");
        }
        assert!(
            config(
                r#""vlan":0,"macspoofchk":false,"enabledad":true,"delegate":{"type":"bridge"},"mtu":null"#
            )
            .is_ok()
        );
    }

    #[test]
    fn the_mac_that_was_asked_for() {
        let mac = |args, keys| with_args(args, keys).unwrap().mac.map(|mac| mac.to_string());
        assert_eq!(mac("MAC=02:00:00:00:00:01", ""), Some("02:00:00:00:00:01".into()));
        assert_eq!(
            mac("", r#","args":{"cni":{"mac":"02:00:00:00:00:02"}}"#),
            Some("02:00:00:00:00:02".into())
        );
        let all =
            r#","args":{"cni":{"mac":"02:00:00:00:00:02"}},"runtimeConfig":{"mac":"02:00:00:00:00:03"}"#;
        assert_eq!(mac("MAC=02:00:00:00:00:01", all), Some("02:00:00:00:00:03".into()));
        assert_eq!(with_args("MAC=x", "").unwrap_err().code, 7);
        assert_eq!(with_args("FOO=1", "").unwrap_err().code, 4);
        assert!(with_args("FOO=1;IgnoreUnknown=1", "").is_ok());
    }

    #[test]
    fn dns_of_the_configuration() {
        assert_eq!(config(r#""dns":{}"#).unwrap().dns, None);
        assert_eq!(config(r#""dns":{"domain":"x"}"#).unwrap().dns.unwrap().domain.unwrap(), "x");
    }

    #[test]
    fn every_conflist_that_we_ship() {
        let conf_dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../conf");
        let mut parsed = 0;
        for entry in std::fs::read_dir(conf_dir).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_none_or(|extension| extension != "conflist") {
                continue;
            }
            let list: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
            let mut plugin = list["plugins"][0].clone();
            assert_eq!(plugin["type"], "edgeflannel", "{}", path.display());
            plugin["name"] = list["name"].clone();
            plugin["cniVersion"] = list["cniVersion"].clone();
            let config = Config::new(&conf(&plugin.to_string()), None).unwrap();
            assert_eq!(config.ipam.kind, "ipam-sticky");
            parsed += 1;
        }
        assert_eq!(parsed, 3);
    }
}
