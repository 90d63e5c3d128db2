//! flannel's `net-conf.json`, the configuration that all nodes of a cluster share.
//!
//! Read as flanneld reads it (`pkg/subnet/config.go`, `pkg/backend/vxlan/vxlan.go`): keys in any case, unknown
//! ones ignored. Only the backend vxlan is spoken here; a file without a backend means that too, as flannel's
//! documentation says (its code then takes udp, which no longer exists). Pure.

use crate::{
    record::{Backend, Family, PerFamily},
    subnet_env::without_host,
};
use cni::golike;
use ipnetwork::IpNetwork;
use serde::Deserialize;
use serde_json::Value;

/// What is used of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NetConf {
    /// The cluster's networks, of the families that are switched on.
    pub networks: PerFamily<IpNetwork>,
    /// How nodes are connected.
    pub backend: Backend,
}

/// What is written.
#[derive(Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct Written {
    network: String,
    #[serde(rename = "IPv6Network")]
    ipv6_network: String,
    #[serde(rename = "EnableIPv4")]
    enable_ipv4: bool,
    #[serde(rename = "EnableIPv6")]
    enable_ipv6: bool,
    backend: Option<WrittenBackend>,
}

impl Default for Written {
    fn default() -> Self {
        Self {
            network: String::new(),
            ipv6_network: String::new(),
            enable_ipv4: true,
            enable_ipv6: false,
            backend: None,
        }
    }
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "PascalCase")]
struct WrittenBackend {
    r#type: String,
    #[serde(rename = "VNI")]
    vni: Option<i64>,
    port: i64,
    #[serde(rename = "GBP")]
    gbp: bool,
    learning: bool,
    direct_routing: bool,
    #[serde(rename = "MTU")]
    mtu: i64,
}

/// Reads the text of the file.
///
/// # Errors
/// Every mistake in it.
pub fn parse(text: &str) -> Result<NetConf, Vec<String>> {
    let value: Value = serde_json::from_str(text).map_err(|why| vec![why.to_string()])?;
    let written: Written = golike::from_value(&value).map_err(|why| vec![why.to_string()])?;
    let mut mistakes = Vec::new();
    let mut networks = PerFamily::default();
    for (family, on, key, text) in [
        (Family::V4, written.enable_ipv4, "Network", &written.network),
        (Family::V6, written.enable_ipv6, "IPv6Network", &written.ipv6_network),
    ] {
        if on {
            match text.parse::<IpNetwork>() {
                Ok(cidr) if Family::of_subnet(cidr) == family && text.contains('/') => {
                    *networks.slot(family) = Some(without_host(cidr));
                }
                _ if text.is_empty() => {
                    mistakes.push(format!("{key} is missing, but {family} is switched on"))
                }
                _ => mistakes.push(format!("{key} {text:?} is not an {family} subnet")),
            }
        }
    }
    if !written.enable_ipv4 && !written.enable_ipv6 {
        mistakes.push("neither EnableIPv4 nor EnableIPv6 is on".into());
    }
    let backend = backend(written.backend.unwrap_or_default(), &mut mistakes);
    if mistakes.is_empty() { Ok(NetConf { networks, backend }) } else { Err(mistakes) }
}

fn backend(written: WrittenBackend, mistakes: &mut Vec<String>) -> Backend {
    if !matches!(written.r#type.as_str(), "" | "vxlan") {
        mistakes.push(format!("Backend.Type {:?}: edgeflanneld speaks vxlan only", written.r#type));
    }
    let mut number = |key: &str, value: i64, from: i64, to: i64| {
        if !(from..=to).contains(&value) {
            mistakes.push(format!("Backend.{key} {value} is not between {from} and {to}"));
        }
        value
    };
    // 24 bits on the wire, and the device's name with it must fit 15 characters: flannel-v6.NNNN.
    let vni = number("VNI", written.vni.unwrap_or(1), 1, (1 << 24) - 1);
    let port = number("Port", written.port, 0, 65_535);
    let mtu = number("MTU", written.mtu, 0, 65_535);
    Backend {
        vni: u32::try_from(vni).unwrap_or_default(),
        port: u16::try_from(port).unwrap_or_default(),
        gbp: written.gbp,
        learning: written.learning,
        direct_routing: written.direct_routing,
        mtu: u32::try_from(mtu).unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flannels_own_manifest() {
        let conf =
            parse(r#"{"Network": "10.244.0.0/16", "EnableNFTables": false, "Backend": {"Type": "vxlan"}}"#)
                .unwrap();
        assert_eq!(conf.networks, PerFamily { v4: "10.244.0.0/16".parse().ok(), v6: None });
        assert_eq!(conf.backend, Backend::default());
    }

    #[test]
    fn everything() {
        let conf = parse(
            r#"{"network":"10.244.9.0/16","EnableIPv6":true,"IPv6Network":"fd00:10:244::/56","SubnetLen":24,
                "Backend":{"type":"vxlan","VNI":4096,"port":8473,"GBP":true,"Learning":true,"DirectRouting":true,"MTU":9000,"MacPrefix":"0E-2A"}}"#,
        )
        .unwrap();
        assert_eq!(conf.networks.v4, "10.244.0.0/16".parse().ok());
        assert_eq!(conf.networks.v6, "fd00:10:244::/56".parse().ok());
        let backend =
            Backend { vni: 4096, port: 8473, gbp: true, learning: true, direct_routing: true, mtu: 9000 };
        assert_eq!(conf.backend, backend);
    }

    #[test]
    fn ipv6_alone_and_no_backend() {
        let conf = parse(r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00::/48"}"#).unwrap();
        assert!(conf.networks.v4.is_none() && conf.networks.v6.is_some());
        assert_eq!(conf.backend, Backend::default());
        // A network of a family that is off is not used.
        let conf = parse(r#"{"Network":"10.0.0.0/8","IPv6Network":"fd00::/48"}"#).unwrap();
        assert!(conf.networks.v6.is_none());
    }

    #[test]
    fn mistakes() {
        let count = |text: &str| parse(text).unwrap_err().len();
        assert_eq!(count("{"), 1);
        assert_eq!(count("[]"), 1);
        assert_eq!(count("{}"), 1);
        assert_eq!(count(r#"{"Network":"fd00::/48"}"#), 1);
        assert_eq!(count(r#"{"Network":"10.0.0.0"}"#), 1);
        assert_eq!(count(r#"{"Network":"10.0.0.0/8","EnableIPv6":"yes"}"#), 1);
        assert_eq!(
            count(r#"{"EnableIPv6":true,"Backend":{"Type":"udp","VNI":0,"Port":-1,"MTU":70000}}"#),
            6,
            "{:?}",
            parse(r#"{"EnableIPv6":true,"Backend":{"Type":"udp","VNI":0,"Port":-1,"MTU":70000}}"#)
        );
    }
}
