//! `subnet.env`, the file by which flannel tells its CNI plugin what the node's subnet is.
//!
//! Read as flannel's own plugin reads it (`flannel-io/cni-plugin`, `loadFlannelSubnetEnv`): `KEY=VALUE` lines,
//! unknown keys ignored. The file lives in /run, so after a reboot it is missing until somebody writes it.

use ipnetwork::IpNetwork;
use std::{
    fmt, fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
    process,
};

/// What the node knows about its part of the cluster's network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubnetEnv {
    /// The cluster's networks (`FLANNEL_NETWORK`, `FLANNEL_IPV6_NETWORK`), IPv4 first.
    pub networks: Vec<IpNetwork>,
    /// This node's subnets, one per family, IPv4 first, host part zeroed (`FLANNEL_SUBNET` names the gateway).
    pub subnets: Vec<IpNetwork>,
    /// What fits through the overlay.
    pub mtu: u32,
    /// flannel masquerades itself, so the plugin need not.
    pub ip_masq: bool,
}

/// As flanneld writes it (`flannel/pkg/subnet/subnet.go`, `WriteSubnetFile`): FLANNEL_SUBNET is the first usable
/// address, which the bridge gets.
impl fmt::Display for SubnetEnv {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for v4 in [true, false] {
            let of = |list: &[IpNetwork]| {
                list.iter().filter(|net| net.is_ipv4() == v4).copied().collect::<Vec<_>>()
            };
            let infix = if v4 { "" } else { "IPV6_" };
            let networks: Vec<String> = of(&self.networks).iter().map(ToString::to_string).collect();
            if !networks.is_empty() {
                writeln!(f, "FLANNEL_{infix}NETWORK={}", networks.join(","))?;
            }
            for subnet in of(&self.subnets) {
                writeln!(f, "FLANNEL_{infix}SUBNET={}/{}", gateway(subnet), subnet.prefix())?;
            }
        }
        writeln!(f, "FLANNEL_MTU={}\nFLANNEL_IPMASQ={}", self.mtu, self.ip_masq)
    }
}

fn gateway(subnet: IpNetwork) -> IpAddr {
    match subnet.network() {
        IpAddr::V4(v4) => Ipv4Addr::from_bits(v4.to_bits().wrapping_add(1)).into(),
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits().wrapping_add(1)).into(),
    }
}

/// Why the file cannot be used.
#[derive(Debug)]
pub enum Error {
    /// It is not there (yet).
    Missing,
    /// It cannot be read.
    Unreadable(io::Error),
    /// It does not say everything that is needed.
    Incomplete(Vec<&'static str>),
    /// It says something that makes no sense.
    Invalid(Vec<String>),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing => f.write_str("it does not exist"),
            Self::Unreadable(error) => write!(f, "{error}"),
            Self::Incomplete(missing) => write!(f, "it lacks {}", missing.join(", ")),
            Self::Invalid(mistakes) => f.write_str(&mistakes.join("; ")),
        }
    }
}

/// Reads the file.
///
/// # Errors
/// Each of [`Error`].
pub fn read(path: &Path) -> Result<SubnetEnv, Error> {
    match fs::read_to_string(path) {
        Ok(text) => parse(&text),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Err(Error::Missing),
        Err(e) => Err(Error::Unreadable(e)),
    }
}

/// Writes the file, in one step: a pod that is made meanwhile reads the old or the new one, never half of it. Not
/// synced, since /run does not outlive the machine.
///
/// # Errors
/// When the directory refuses.
pub fn write(path: &Path, text: &str) -> io::Result<()> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(dir)?;
    // A name of its own for each writer: the daemon and a plugin may both be at it.
    let new = dir.join(format!(".subnet.env.{}", process::id()));
    fs::write(&new, text).and_then(|()| fs::rename(&new, path)).inspect_err(|_| {
        let _ = fs::remove_file(&new);
    })
}

/// Reads the text of the file; every mistake is reported.
///
/// # Errors
/// [`Error::Invalid`], else [`Error::Incomplete`].
pub fn parse(text: &str) -> Result<SubnetEnv, Error> {
    let (mut networks, mut subnets) = (Vec::new(), Vec::new());
    let (mut mtu, mut ip_masq) = (None, None);
    let mut mistakes = Vec::new();
    for line in text.lines() {
        let Some((key, value)) = line.trim().split_once('=') else { continue };
        let mut cidrs = |into: &mut Vec<IpNetwork>, v4: bool| {
            for item in value.split(',') {
                match item.trim().parse::<IpNetwork>() {
                    Ok(cidr) if cidr.is_ipv4() == v4 && item.contains('/') => into.push(without_host(cidr)),
                    _ => mistakes.push(format!("{key}={value} is not an {} subnet", family(v4))),
                }
            }
        };
        match key.trim() {
            "FLANNEL_NETWORK" => cidrs(&mut networks, true),
            "FLANNEL_IPV6_NETWORK" => cidrs(&mut networks, false),
            "FLANNEL_SUBNET" => cidrs(&mut subnets, true),
            "FLANNEL_IPV6_SUBNET" => cidrs(&mut subnets, false),
            "FLANNEL_MTU" => match value.parse::<u32>() {
                Ok(value) if value > 0 => mtu = Some(value),
                _ => mistakes.push(format!("FLANNEL_MTU={value} is not an MTU")),
            },
            "FLANNEL_IPMASQ" => match value {
                "true" | "1" => ip_masq = Some(true),
                "false" | "0" => ip_masq = Some(false),
                _ => mistakes.push(format!("FLANNEL_IPMASQ={value} is neither true nor false")),
            },
            _ => {}
        }
    }
    for v4 in [true, false] {
        if subnets.iter().filter(|subnet| subnet.is_ipv4() == v4).count() > 1 {
            mistakes.push(format!("it names more than one {} subnet for this node", family(v4)));
        }
    }
    if !mistakes.is_empty() {
        return Err(Error::Invalid(mistakes));
    }
    for list in [&mut networks, &mut subnets] {
        list.sort_by_key(IpNetwork::is_ipv6);
    }
    match (networks.is_empty(), subnets.is_empty(), mtu, ip_masq) {
        (false, false, Some(mtu), Some(ip_masq)) => Ok(SubnetEnv { networks, subnets, mtu, ip_masq }),
        (no_networks, no_subnets, mtu, ip_masq) => {
            let lacking = [
                (no_networks, "FLANNEL_NETWORK or FLANNEL_IPV6_NETWORK"),
                (no_subnets, "FLANNEL_SUBNET or FLANNEL_IPV6_SUBNET"),
                (mtu.is_none(), "FLANNEL_MTU"),
                (ip_masq.is_none(), "FLANNEL_IPMASQ"),
            ];
            Err(Error::Incomplete(
                lacking.into_iter().filter(|(lacks, _)| *lacks).map(|(_, key)| key).collect(),
            ))
        }
    }
}

fn family(v4: bool) -> &'static str {
    if v4 { "IPv4" } else { "IPv6" }
}

/// The network that an address with a prefix length lies in.
pub(crate) fn without_host(cidr: IpNetwork) -> IpNetwork {
    IpNetwork::new(cidr.network(), cidr.prefix()).unwrap_or(cidr)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DUAL: &str = "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\n\
        FLANNEL_IPV6_NETWORK=fd00:10:244::/56\nFLANNEL_IPV6_SUBNET=fd00:10:244:1::1/64\n\
        FLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";

    fn nets(list: &[&str]) -> Vec<IpNetwork> {
        list.iter().map(|cidr| cidr.parse().unwrap()).collect()
    }

    #[test]
    fn as_flanneld_writes_it() {
        let env = parse(DUAL).unwrap();
        assert_eq!(env.networks, nets(&["10.244.0.0/16", "fd00:10:244::/56"]));
        assert_eq!(env.subnets, nets(&["10.244.1.0/24", "fd00:10:244:1::/64"]));
        assert_eq!((env.mtu, env.ip_masq), (1450, true));
        assert_eq!(env.to_string(), DUAL);
    }

    #[test]
    fn single_families_lists_and_noise() {
        let env = parse("FLANNEL_IPV6_NETWORK=fd00::/48\nFLANNEL_IPV6_SUBNET=fd00:0:0:1::1/64\nFLANNEL_MTU=1430\nFLANNEL_IPMASQ=false\n").unwrap();
        assert_eq!(env.subnets, nets(&["fd00:0:0:1::/64"]));
        let env = parse("# made by hand\n\nFLANNEL_SUBNET=10.1.2.1/24\nFLANNEL_NETWORK=10.1.0.0/16,10.2.0.0/16\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=0\nOTHER=x\n").unwrap();
        assert_eq!(env.networks, nets(&["10.1.0.0/16", "10.2.0.0/16"]));
        assert!(!env.ip_masq);
    }

    #[test]
    fn what_is_missing_is_said() {
        let missing = |text: &str| match parse(text) {
            Err(Error::Incomplete(missing)) => missing,
            other => panic!("{other:?}"),
        };
        assert_eq!(missing("").len(), 4);
        assert_eq!(
            missing("FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.2.1/24\nFLANNEL_MTU=1450"),
            ["FLANNEL_IPMASQ"]
        );
        // A write that was cut off by a power failure.
        assert_eq!(missing(&DUAL[..60]), ["FLANNEL_MTU", "FLANNEL_IPMASQ"]);
    }

    #[test]
    fn every_mistake_is_said() {
        let text = "FLANNEL_NETWORK=10.1.0.0\nFLANNEL_SUBNET=fd00::1/64\nFLANNEL_MTU=0\nFLANNEL_IPMASQ=yes";
        let Err(Error::Invalid(mistakes)) = parse(text) else { panic!() };
        assert_eq!(mistakes.len(), 4, "{mistakes:?}");
        let two = "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.1.1/24,10.1.2.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=1";
        assert!(matches!(parse(two), Err(Error::Invalid(_))));
    }

    #[test]
    fn writing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/flannel/subnet.env");
        write(&path, DUAL).unwrap();
        write(&path, &DUAL.replace("1450", "1400")).unwrap();
        assert_eq!(read(&path).unwrap().mtu, 1400);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "nothing is left beside it");
    }

    #[test]
    fn a_missing_file() {
        assert!(matches!(read(Path::new("/nonexistent/subnet.env")), Err(Error::Missing)));
        assert!(matches!(read(Path::new("/proc/self")), Err(Error::Unreadable(_))));
    }
}
