//! The network configuration: what was written, and what is used. Pure; every mistake is reported at once.
//!
//! DEL, CHECK and GC need only the [`Place`], so that a pod can be torn down under a configuration whose ranges
//! are wrong or, as on a flannel node without its `subnet.env`, not known.

use crate::{
    address::Address,
    range::{Pools, Range, RangeSet, Span},
};
use cni::{Error, NetConf, Route, Version};
use ipnetwork::IpNetwork;
use serde::Deserialize;
use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    time::Duration,
};

/// Where the state of all networks is kept unless `dataDir` says otherwise.
pub const DATA_DIR: &str = "/var/lib/cni/ipam-sticky";

/// Where host-local keeps its reservations unless `dataDir` says otherwise.
pub const HOST_LOCAL_DIR: &str = "/var/lib/cni/networks";

/// Where libcni keeps what it was told of each attachment, under `results`.
pub const CACHE_DIR: &str = "/var/lib/cni";

/// Where a change of owner is noted while the disk cannot be written.
pub const RUN_DIR: &str = "/run/ipam-sticky";

/// How long to wait for the lock.
pub const LOCK_TIMEOUT: Duration = Duration::from_secs(10);

/// Idle bindings kept: a /64 must not grow the file for ever.
pub const MAX_IDLE: u64 = 10_000;

/// Where the state of one network is, and how it is treated. What every verb needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Name of the network.
    pub network: String,
    /// `dataDir`
    pub data_dir: PathBuf,
    /// `runDir`, ours: not documented for people, tests set it.
    pub run_dir: PathBuf,
    /// `cacheDir`, ours: libcni's cache directory.
    pub cache_dir: PathBuf,
    /// Directories in which host-local may have left reservations of this network.
    pub host_local: Vec<PathBuf>,
    /// `lockTimeout`
    pub lock_timeout: Duration,
    /// `maxIdle`
    pub max_idle: u64,
}

impl Place {
    /// The defaults, for a network under a data directory.
    #[must_use]
    pub fn new(network: &str, data_dir: PathBuf) -> Self {
        let mut host_local = vec![data_dir.join(network)];
        if data_dir == Path::new(DATA_DIR) {
            host_local = vec![PathBuf::from(HOST_LOCAL_DIR).join(network)];
        }
        Self {
            network: network.into(),
            data_dir,
            run_dir: RUN_DIR.into(),
            cache_dir: CACHE_DIR.into(),
            host_local,
            lock_timeout: LOCK_TIMEOUT,
            max_idle: MAX_IDLE,
        }
    }
}

/// What ADD and STATUS need besides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Where the state is.
    pub place: Place,
    /// Where addresses come from.
    pub pools: Pools,
    /// `routes`, handed through.
    pub routes: Vec<Route>,
    /// `resolvConf`
    pub resolv_conf: Option<PathBuf>,
    /// runtimeConfig.ips and args.cni.ips. `None` means that CNI_ARGS may ask.
    pub requested: Requested,
}

/// Addresses asked for in the configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Requested {
    /// runtimeConfig.ips and args.cni.ips.
    pub addresses: Vec<Address>,
    /// args.cni.ips is there: then the conventions say that IP in CNI_ARGS is ignored.
    pub ignore_cni_args: bool,
}

/// Log settings, needed before anything else is known to be right.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Log {
    /// `logFile`
    pub file: Option<PathBuf>,
    /// `logLevel`
    pub level: Option<String>,
}

/// The configuration as it was written, of which nothing is believed yet but the types.
#[derive(Debug, Clone, Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
pub struct Written {
    ipam: WrittenIpam,
    runtime_config: WrittenRuntime,
    args: WrittenArgs,
}

#[derive(Debug, Clone, Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct WrittenIpam {
    subnet: String,
    range_start: String,
    range_end: String,
    gateway: String,
    ranges: Vec<Vec<WrittenRange>>,
    routes: Vec<WrittenRoute>,
    resolv_conf: String,
    data_dir: String,
    exclude: Vec<String>,
    max_idle: Option<u64>,
    lock_timeout: String,
    log_file: String,
    log_level: String,
    cache_dir: String,
    run_dir: String,
}

#[derive(Debug, Clone, Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct WrittenRange {
    subnet: String,
    range_start: String,
    range_end: String,
    gateway: String,
}

#[derive(Debug, Clone, Deserialize, Default)]
#[serde(default)]
struct WrittenRoute {
    dst: String,
    gw: String,
    mtu: Option<u32>,
    advmss: Option<u32>,
    priority: Option<u32>,
    table: Option<u32>,
    scope: Option<u8>,
}

#[derive(Debug, Clone, Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct WrittenRuntime {
    ip_ranges: Vec<Vec<WrittenRange>>,
    ips: Vec<String>,
}

#[derive(Debug, Clone, Deserialize, Default)]
#[serde(default)]
struct WrittenArgs {
    cni: WrittenCniArgs,
}

#[derive(Debug, Clone, Deserialize, Default)]
#[serde(default)]
struct WrittenCniArgs {
    ips: Vec<String>,
}

impl Written {
    /// Reads the keys that are ours.
    ///
    /// # Errors
    /// Code 6 when one has the wrong type.
    pub fn read(conf: &NetConf) -> Result<Self, Error> {
        conf.decode()
    }

    /// Where to log.
    #[must_use]
    pub fn log(&self) -> Log {
        Log {
            file: given(&self.ipam.log_file).map(PathBuf::from),
            level: given(&self.ipam.log_level).map(String::from),
        }
    }

    /// The part that every verb needs.
    ///
    /// # Errors
    /// Code 7 with every mistake in it.
    pub fn place(&self, network: &str) -> Result<Place, Error> {
        let mut mistakes = Vec::new();
        let place = self.read_place(network, &mut mistakes);
        refuse(mistakes).map(|()| place)
    }

    /// All of it.
    ///
    /// # Errors
    /// Code 7 with every mistake.
    pub fn config(&self, network: &str, version: Version) -> Result<Config, Error> {
        let mut mistakes = Vec::new();
        let place = self.read_place(network, &mut mistakes);
        let pools = self.read_pools(version, &mut mistakes);
        let routes = self.read_routes(&mut mistakes);
        let requested = self.read_requested(&mut mistakes);
        let resolv_conf = given(&self.ipam.resolv_conf).map(PathBuf::from);
        refuse(mistakes)?;
        Ok(Config { place, pools, routes, resolv_conf, requested })
    }

    fn read_place(&self, network: &str, mistakes: &mut Vec<String>) -> Place {
        let data_dir = path("dataDir", &self.ipam.data_dir, DATA_DIR, mistakes);
        let mut place = Place::new(network, data_dir);
        place.run_dir = path("runDir", &self.ipam.run_dir, RUN_DIR, mistakes);
        place.cache_dir = path("cacheDir", &self.ipam.cache_dir, CACHE_DIR, mistakes);
        place.max_idle = self.ipam.max_idle.unwrap_or(MAX_IDLE);
        if let Some(written) = given(&self.ipam.lock_timeout) {
            match duration(written) {
                Some(timeout) => place.lock_timeout = timeout,
                None => mistakes.push(format!(
                    "ipam.lockTimeout {written:?} is not a time like \"10s\", \"500ms\" or \"1m30s\""
                )),
            }
        }
        place
    }

    fn read_pools(&self, version: Version, mistakes: &mut Vec<String>) -> Pools {
        let ipam = &self.ipam;
        let mut written: Vec<(String, Vec<WrittenRange>)> = Vec::new();
        for (index, set) in self.runtime_config.ip_ranges.iter().enumerate() {
            written.push((format!("runtimeConfig.ipRanges[{index}]"), set.clone()));
        }
        if given(&ipam.subnet).is_some() {
            let single = WrittenRange {
                subnet: ipam.subnet.clone(),
                range_start: ipam.range_start.clone(),
                range_end: ipam.range_end.clone(),
                gateway: ipam.gateway.clone(),
            };
            written.push(("ipam".into(), vec![single]));
        }
        for (index, set) in ipam.ranges.iter().enumerate() {
            written.push((format!("ipam.ranges[{index}]"), set.clone()));
        }
        if written.is_empty() {
            mistakes.push("no address range is configured: set ipam.ranges or ipam.subnet".into());
        }
        let before = mistakes.len();
        let sets: Vec<RangeSet> = written
            .iter()
            .map(|(name, set)| set.iter().filter_map(|range| read_range(name, range, mistakes)).collect())
            .collect();
        let excluded: Vec<Span> =
            ipam.exclude.iter().filter_map(|written| excluded(written, mistakes)).collect();
        if mistakes.len() > before {
            return Pools::default();
        }
        for (family, wanted) in [("IPv4", true), ("IPv6", false)] {
            let of_family =
                |set: &&RangeSet| set.first().is_some_and(|range| range.subnet.is_ipv4() == wanted);
            if version < Version::V0_3_0 && sets.iter().filter(of_family).count() > 1 {
                mistakes.push(format!(
                    "cniVersion {version} has room for one {family} address, and more than one range set asks for one"
                ));
            }
        }
        Pools::new(sets, &excluded).unwrap_or_else(|found| {
            mistakes.extend(found);
            Pools::default()
        })
    }

    fn read_routes(&self, mistakes: &mut Vec<String>) -> Vec<Route> {
        let mut routes = Vec::new();
        for (index, written) in self.ipam.routes.iter().enumerate() {
            let name = format!("ipam.routes[{index}]");
            let dst: Option<IpNetwork> = network(&format!("{name}.dst"), &written.dst, mistakes);
            let gw = address(&format!("{name}.gw"), &written.gw, mistakes);
            let Some(dst) = dst else { continue };
            let WrittenRoute { mtu, advmss, priority, table, scope, .. } = *written;
            routes.push(Route { dst, gw: gw.map(Address::ip), mtu, advmss, priority, table, scope });
        }
        routes
    }

    fn read_requested(&self, mistakes: &mut Vec<String>) -> Requested {
        let runtime = self.runtime_config.ips.iter().map(|ip| ("runtimeConfig.ips", ip));
        let args = self.args.cni.ips.iter().map(|ip| ("args.cni.ips", ip));
        let mut addresses = Vec::new();
        for (name, written) in runtime.chain(args) {
            // Both spellings of the conventions: with and without a prefix length.
            let bare = written.split('/').next().unwrap_or(written);
            addresses.extend(address(name, bare, mistakes).filter(|address| !addresses.contains(address)));
        }
        Requested { addresses, ignore_cni_args: !self.args.cni.ips.is_empty() }
    }
}

fn refuse(mistakes: Vec<String>) -> Result<(), Error> {
    if mistakes.is_empty() {
        return Ok(());
    }
    Err(Error::invalid_config(format!("ipam-sticky: {}", mistakes.join("; "))))
}

fn given(written: &str) -> Option<&str> {
    Some(written).filter(|written| !written.is_empty())
}

fn path(name: &str, written: &str, default: &str, mistakes: &mut Vec<String>) -> PathBuf {
    let path = PathBuf::from(given(written).unwrap_or(default));
    if !path.is_absolute() {
        mistakes.push(format!("ipam.{name} {written:?} is not an absolute path"));
    }
    path
}

fn address(name: &str, written: &str, mistakes: &mut Vec<String>) -> Option<Address> {
    let parsed = given(written)?.parse::<IpAddr>();
    if parsed.is_err() {
        mistakes.push(format!("{name} {written:?} is not an IP address"));
    }
    parsed.ok().map(|ip| ip.to_canonical().into())
}

fn network(name: &str, written: &str, mistakes: &mut Vec<String>) -> Option<IpNetwork> {
    let parsed = if written.contains('/') { written.parse().ok() } else { None };
    match parsed {
        Some(IpNetwork::V6(v6)) if v6.ip().to_ipv4_mapped().is_some() => {
            mistakes.push(format!("{name} {written:?} is IPv4 in IPv6's clothes; write it as IPv4"));
            None
        }
        None => {
            mistakes
                .push(format!("{name} {written:?} is not an address with a prefix length, like 10.0.0.0/24"));
            None
        }
        parsed => parsed,
    }
}

fn read_range(name: &str, written: &WrittenRange, mistakes: &mut Vec<String>) -> Option<Range> {
    let before = mistakes.len();
    let subnet = network(&format!("{name}: subnet"), &written.subnet, mistakes);
    let start = address(&format!("{name}: rangeStart"), &written.range_start, mistakes);
    let end = address(&format!("{name}: rangeEnd"), &written.range_end, mistakes);
    let gateway = address(&format!("{name}: gateway"), &written.gateway, mistakes);
    if mistakes.len() > before {
        return None;
    }
    Range::new(subnet?, start, end, gateway)
        .map_err(|found| mistakes.extend(found.into_iter().map(|mistake| format!("{name}: {mistake}"))))
        .ok()
}

fn excluded(written: &str, mistakes: &mut Vec<String>) -> Option<Span> {
    if let Ok(ip) = written.parse::<IpAddr>() {
        return Some(Address::from(ip.to_canonical()).into());
    }
    network("ipam.exclude", written, mistakes).map(Span::of)
}

/// A time as Go writes it, in whole numbers: `1m30s`, `500ms`. At most an hour.
fn duration(written: &str) -> Option<Duration> {
    let mut rest = written;
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, after) = rest.split_at_checked(digits)?;
        let letters = after.len() - after.trim_start_matches(|c: char| c.is_ascii_alphabetic()).len();
        let (unit, after) = after.split_at_checked(letters)?;
        let milliseconds = match unit {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            _ => return None,
        };
        let number: u64 = number.parse().ok()?;
        total = total.checked_add(Duration::from_millis(number.checked_mul(milliseconds)?))?;
        rest = after;
    }
    (!written.is_empty() && total <= Duration::from_secs(3600)).then_some(total)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn written(document: &Value) -> Written {
        let mut version = Version::LATEST;
        let mut document = document.clone();
        document["name"] = json!("net");
        let conf = NetConf::parse(document.to_string().into_bytes(), &mut version).unwrap();
        Written::read(&conf).unwrap()
    }

    fn config(document: &Value) -> Result<Config, Error> {
        written(document).config("net", Version::V1_1_0)
    }

    fn sets(config: &Config) -> Vec<Vec<String>> {
        let name = |range: &Range| range.subnet.to_string();
        config.pools.sets().iter().map(|set| set.iter().map(name).collect()).collect()
    }

    #[test]
    fn the_surface_of_host_local() {
        let config = config(&json!({
            "cniVersion": "1.1.0",
            "ipam": {
                "type": "ipam-sticky", "subnet": "10.1.0.0/16", "rangeStart": "10.1.0.9", "gateway": "10.1.0.8",
                "ranges": [[{"subnet": "10.2.0.0/24"}, {"subnet": "10.3.0.0/24"}], [{"subnet": "fd00::/64"}]],
                "routes": [{"dst": "0.0.0.0/0"}, {"dst": "10.9.0.0/16", "gw": "10.1.0.7", "mtu": 1400}],
                "resolvConf": "/etc/resolv.conf", "dataDir": "/tmp/x", "unknown": 1
            },
            "runtimeConfig": {"ipRanges": [[{"subnet": "10.0.0.0/24"}]], "ips": ["10.2.0.4/24", "fd00::4"]},
            "args": {"cni": {"ips": ["10.0.0.5"]}}
        }))
        .unwrap();
        let subnets =
            [vec!["10.0.0.0/24"], vec!["10.1.0.0/16"], vec!["10.2.0.0/24", "10.3.0.0/24"], vec!["fd00::/64"]];
        assert_eq!(sets(&config), subnets);
        let first = &config.pools.sets()[1][0];
        assert_eq!(first.span.first.to_string(), "10.1.0.9");
        assert_eq!(first.gateway.to_string(), "10.1.0.8");
        assert_eq!(config.routes[1].mtu, Some(1400));
        assert_eq!(config.routes[1].gw.unwrap().to_string(), "10.1.0.7");
        assert_eq!(config.place.data_dir, PathBuf::from("/tmp/x"));
        assert_eq!(config.place.host_local, [PathBuf::from("/tmp/x/net")]);
        let requested: Vec<String> = config.requested.addresses.iter().map(ToString::to_string).collect();
        assert_eq!(requested, ["10.2.0.4", "fd00::4", "10.0.0.5"]);
        assert!(config.requested.ignore_cni_args);
    }

    #[test]
    fn defaults_and_our_own_keys() {
        let config = config(&json!({"ipam": {"subnet": "10.1.0.0/24", "exclude": null}})).unwrap();
        assert_eq!(config.place, Place::new("net", DATA_DIR.into()));
        assert_eq!(config.place.host_local, [PathBuf::from("/var/lib/cni/networks/net")]);
        let ours = written(&json!({"ipam": {
            "subnet": "10.1.0.0/24", "exclude": ["10.1.0.2", "10.1.0.16/28"], "maxIdle": 7,
            "lockTimeout": "1m30s", "logFile": "/tmp/log", "logLevel": "debug"
        }}));
        let config = ours.config("net", Version::V1_1_0).unwrap();
        assert_eq!((config.place.max_idle, config.place.lock_timeout), (7, Duration::from_secs(90)));
        assert!(!config.pools.may_give("10.1.0.31".parse().unwrap()));
        assert_eq!(ours.log(), Log { file: Some("/tmp/log".into()), level: Some("debug".into()) });
    }

    #[test]
    fn every_mistake_is_reported_at_once() {
        let error = config(&json!({
            "ipam": {
                "ranges": [[{"subnet": "10.1.0.0"}], [{"subnet": "10.1.0.1/24", "gateway": "x"}], [{"subnet": "10.1.0.7/24"}]],
                "routes": [{"dst": "default"}], "dataDir": "relative", "lockTimeout": "soon", "exclude": ["me"]
            },
            "runtimeConfig": {"ips": ["10.0.0"]}
        }))
        .unwrap_err();
        assert_eq!(error.code, 7);
        for part in [
            "ranges[0]: subnet \"10.1.0.0\"",
            "gateway \"x\"",
            "ranges[2]: subnet 10.1.0.7/24 has host bits",
            "routes[0].dst",
            "dataDir",
            "lockTimeout",
            "exclude \"me\"",
            "runtimeConfig.ips",
        ] {
            assert!(error.msg.contains(part), "{part} is not in {}", error.msg);
        }
    }

    #[test]
    fn what_host_local_refuses() {
        for (ipam, part) in [
            (json!({}), "no address range"),
            (json!({"ranges": []}), "no address range"),
            (json!({"ranges": [[]]}), "empty"),
            (json!({"ranges": [[{}]]}), "subnet \"\""),
            (json!({"ranges": [[{"subnet": "10.0.0.0/24"}], [{"subnet": "10.0.0.128/25"}]]}), "overlaps"),
            (json!({"ranges": [[{"subnet": "10.0.0.0/24"}, {"subnet": "fd00::/64"}]]}), "mixes"),
            (json!({"subnet": "::ffff:10.0.0.0/120"}), "write it as IPv4"),
        ] {
            let error = config(&json!({"ipam": ipam})).unwrap_err();
            assert_eq!(error.code, 7);
            assert!(error.msg.contains(part), "{part} is not in {}", error.msg);
        }
        let two =
            written(&json!({"ipam": {"ranges": [[{"subnet": "10.0.0.0/24"}], [{"subnet": "10.1.0.0/24"}]]}}));
        assert!(two.config("net", Version::V0_3_0).is_ok());
        assert!(two.config("net", Version::V0_2_0).unwrap_err().msg.contains("one IPv4 address"));
    }

    #[test]
    fn a_pod_can_be_torn_down_without_ranges() {
        let place = written(&json!({"ipam": {"dataDir": "/tmp/x"}})).place("net").unwrap();
        assert_eq!(place.data_dir, PathBuf::from("/tmp/x"));
    }

    #[test]
    fn times() {
        for (text, expected) in
            [("10s", 10_000), ("500ms", 500), ("1m30s", 90_000), ("1h", 3_600_000), ("0s", 0)]
        {
            assert_eq!(duration(text), Some(Duration::from_millis(expected)), "{text}");
        }
        for bad in ["", "10", "s", "-1s", "1.5s", "2h", "1d", "10 s", "99999999999999999999s", "1é"] {
            assert_eq!(duration(bad), None, "{bad}");
        }
    }
}
