//! The result of ADD, independent of version, and how each version writes it (spec section 5).
//!
//! A plugin builds a [`Success`] and never thinks of versions: what an older one cannot say is left out, as the
//! Go reference does it.

use crate::{Error, Version, golike};
use ipnetwork::IpNetwork;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::{net::IpAddr, str::FromStr};

/// What an attachment got.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Success {
    /// Devices, on the host and in the container. An IPAM plugin has none.
    pub interfaces: Vec<Interface>,
    /// Addresses, with the prefix length of their subnet.
    pub ips: Vec<Ip>,
    /// Routes in the container.
    pub routes: Vec<Route>,
    /// Resolver settings.
    pub dns: Dns,
}

/// A network device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Interface {
    /// Name in its namespace.
    pub name: String,
    /// Hardware address, `aa:bb:cc:dd:ee:ff`.
    pub mac: Option<String>,
    /// In bytes; told from 1.1.0.
    pub mtu: Option<u32>,
    /// Path of the namespace it is in; `None` for the host.
    pub sandbox: Option<String>,
    /// Told from 1.1.0.
    pub socket_path: Option<String>,
    /// Told from 1.1.0.
    pub pci_id: Option<String>,
}

/// An address of an attachment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ip {
    /// Address and the prefix length of the subnet it is in.
    pub address: IpNetwork,
    /// The subnet's gateway.
    pub gateway: Option<IpAddr>,
    /// Index in [`Success::interfaces`].
    pub interface: Option<usize>,
}

/// A route in the container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Destination.
    pub dst: IpNetwork,
    /// Next hop; `None` means the gateway of the address of this family.
    pub gw: Option<IpAddr>,
    /// Told from 1.1.0.
    pub mtu: Option<u32>,
    /// Told from 1.1.0.
    pub advmss: Option<u32>,
    /// Told from 1.1.0.
    pub priority: Option<u32>,
    /// Told from 1.1.0.
    pub table: Option<u32>,
    /// Told from 1.1.0.
    pub scope: Option<u8>,
}

impl Route {
    /// A plain route.
    #[must_use]
    pub fn new(dst: IpNetwork, gw: Option<IpAddr>) -> Self {
        Self { dst, gw, mtu: None, advmss: None, priority: None, table: None, scope: None }
    }
}

/// Resolver settings, as in resolv.conf.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dns {
    /// Name servers, in order.
    pub nameservers: Vec<String>,
    /// Local domain.
    pub domain: Option<String>,
    /// Search list.
    pub search: Vec<String>,
    /// Options.
    pub options: Vec<String>,
}

impl Success {
    /// The document that a caller of this version expects.
    ///
    /// 0.1.0 and 0.2.0 know one address per family and no devices: they are told the first.
    #[must_use]
    pub fn render(&self, version: Version) -> Value {
        let mut document = Map::new();
        document.insert("cniVersion".into(), json!(version.as_str()));
        if version < Version::V0_3_0 {
            for (key, v4) in [("ip4", true), ("ip6", false)] {
                if let Some(config) = self.render_family(v4) {
                    document.insert(key.into(), config);
                }
            }
        } else {
            let mut list = |key: &str, items: Vec<Value>| {
                if !items.is_empty() {
                    document.insert(key.into(), Value::Array(items));
                }
            };
            list("interfaces", self.interfaces.iter().map(|i| i.render(version)).collect());
            list("ips", self.ips.iter().map(|ip| ip.render(version)).collect());
            list("routes", self.routes.iter().map(|route| route.render(version)).collect());
        }
        document.insert("dns".into(), self.dns.render());
        Value::Object(document)
    }

    fn render_family(&self, v4: bool) -> Option<Value> {
        let ip = self.ips.iter().find(|ip| ip.address.is_ipv4() == v4)?;
        let routes = self.routes.iter().filter(|route| route.dst.is_ipv4() == v4);
        let routes: Vec<Value> = routes.map(|route| route.render(Version::V0_2_0)).collect();
        let mut config = Map::new();
        config.insert("ip".into(), json!(ip.address.to_string()));
        optional(&mut config, "gateway", ip.gateway.map(|gateway| gateway.to_string()));
        optional(&mut config, "routes", (!routes.is_empty()).then_some(routes));
        Some(Value::Object(config))
    }

    /// Reads a result that was written in `version`; a `cniVersion` in the document itself wins.
    ///
    /// # Errors
    /// 1 for a version that is not spoken here, 6 for anything that is not a result of that version.
    pub fn parse(document: &Value, version: Version) -> Result<Self, Error> {
        let Some(object) = document.as_object() else {
            return Err(Error::decode("a result must be a JSON object"));
        };
        let version = match golike::get(object, "cniVersion").and_then(Value::as_str) {
            Some(written) if !written.is_empty() => Version::parse(written)?,
            _ => version,
        };
        let decode = |e: serde_json::Error| Error::decode(format!("a result of {version}: {e}"));
        if version < Version::V0_3_0 {
            golike::from_value::<written::Legacy>(document).map_err(decode)?.read()
        } else {
            golike::from_value::<written::Current>(document).map_err(decode)?.read()
        }
    }
}

fn optional<T: serde::Serialize>(object: &mut Map<String, Value>, key: &str, value: Option<T>) {
    if let Some(value) = value {
        object.insert(key.into(), json!(value));
    }
}

impl Interface {
    fn render(&self, version: Version) -> Value {
        let mut object = Map::new();
        object.insert("name".into(), json!(self.name));
        optional(&mut object, "mac", self.mac.as_ref());
        optional(&mut object, "sandbox", self.sandbox.as_ref());
        if version >= Version::V1_1_0 {
            optional(&mut object, "mtu", self.mtu);
            optional(&mut object, "socketPath", self.socket_path.as_ref());
            optional(&mut object, "pciID", self.pci_id.as_ref());
        }
        Value::Object(object)
    }
}

impl Ip {
    fn render(&self, version: Version) -> Value {
        let mut object = Map::new();
        if version < Version::V1_0_0 {
            object.insert("version".into(), json!(if self.address.is_ipv4() { "4" } else { "6" }));
        }
        optional(&mut object, "interface", self.interface);
        object.insert("address".into(), json!(self.address.to_string()));
        optional(&mut object, "gateway", self.gateway.map(|gateway| gateway.to_string()));
        Value::Object(object)
    }
}

impl Route {
    fn render(&self, version: Version) -> Value {
        let mut object = Map::new();
        object.insert("dst".into(), json!(self.dst.to_string()));
        optional(&mut object, "gw", self.gw.map(|gw| gw.to_string()));
        if version >= Version::V1_1_0 {
            optional(&mut object, "mtu", self.mtu);
            optional(&mut object, "advmss", self.advmss);
            optional(&mut object, "priority", self.priority);
            optional(&mut object, "table", self.table);
            optional(&mut object, "scope", self.scope);
        }
        Value::Object(object)
    }
}

impl Dns {
    fn render(&self) -> Value {
        let mut object = Map::new();
        let list = |items: &Vec<String>| (!items.is_empty()).then(|| items.clone());
        optional(&mut object, "nameservers", list(&self.nameservers));
        optional(&mut object, "domain", self.domain.as_ref());
        optional(&mut object, "search", list(&self.search));
        optional(&mut object, "options", list(&self.options));
        Value::Object(object)
    }
}

/// The documents as they are written, before their texts are checked.
mod written {
    use super::{Deserialize, Error, FromStr, IpAddr, IpNetwork};

    #[derive(Deserialize, Default)]
    #[serde(default)]
    pub struct Legacy {
        ip4: Option<Family>,
        ip6: Option<Family>,
        dns: Dns,
    }

    #[derive(Deserialize, Default)]
    #[serde(default)]
    struct Family {
        ip: String,
        gateway: String,
        routes: Vec<Route>,
    }

    #[derive(Deserialize, Default)]
    #[serde(default)]
    pub struct Current {
        interfaces: Vec<Interface>,
        ips: Vec<Ip>,
        routes: Vec<Route>,
        dns: Dns,
    }

    #[derive(Deserialize, Default)]
    #[serde(default, rename_all = "camelCase")]
    struct Interface {
        name: String,
        mac: String,
        mtu: Option<u32>,
        sandbox: String,
        socket_path: String,
        #[serde(rename = "pciID")]
        pci_id: String,
    }

    #[derive(Deserialize, Default)]
    #[serde(default)]
    struct Ip {
        address: String,
        gateway: String,
        interface: Option<i64>,
    }

    #[derive(Deserialize, Default)]
    #[serde(default)]
    struct Route {
        dst: String,
        gw: String,
        mtu: Option<u32>,
        advmss: Option<u32>,
        priority: Option<u32>,
        table: Option<u32>,
        scope: Option<u8>,
    }

    #[derive(Deserialize, Default)]
    #[serde(default)]
    struct Dns {
        nameservers: Vec<String>,
        domain: String,
        search: Vec<String>,
        options: Vec<String>,
    }

    fn cidr(text: &str) -> Result<IpNetwork, Error> {
        let parsed = text.contains('/').then(|| IpNetwork::from_str(text).ok()).flatten();
        parsed.ok_or_else(|| Error::decode(format!("{text:?} in a result is not ADDRESS/PREFIX")))
    }

    fn address(text: &str) -> Result<Option<IpAddr>, Error> {
        if text.is_empty() {
            return Ok(None);
        }
        let parsed = text.parse().map(Some);
        parsed.map_err(|_| Error::decode(format!("{text:?} in a result is not an address")))
    }

    fn text(text: String) -> Option<String> {
        Some(text).filter(|text| !text.is_empty())
    }

    impl Legacy {
        pub fn read(self) -> Result<super::Success, Error> {
            let mut result = super::Success { dns: self.dns.read(), ..Default::default() };
            for family in [self.ip4, self.ip6].into_iter().flatten() {
                result.ips.push(super::Ip {
                    address: cidr(&family.ip)?,
                    gateway: address(&family.gateway)?,
                    interface: None,
                });
                for route in family.routes {
                    result.routes.push(route.read()?);
                }
            }
            Ok(result)
        }
    }

    impl Current {
        pub fn read(self) -> Result<super::Success, Error> {
            let interfaces: Vec<_> = self.interfaces.into_iter().map(Interface::read).collect();
            let ips = self.ips.into_iter().map(|ip| ip.read(interfaces.len()));
            Ok(super::Success {
                ips: ips.collect::<Result<_, _>>()?,
                routes: self.routes.into_iter().map(Route::read).collect::<Result<_, _>>()?,
                dns: self.dns.read(),
                interfaces,
            })
        }
    }

    impl Interface {
        fn read(self) -> super::Interface {
            super::Interface {
                name: self.name,
                mac: text(self.mac),
                mtu: self.mtu,
                sandbox: text(self.sandbox),
                socket_path: text(self.socket_path),
                pci_id: text(self.pci_id),
            }
        }
    }

    impl Ip {
        fn read(self, interfaces: usize) -> Result<super::Ip, Error> {
            let interface = match self.interface.map(usize::try_from) {
                // Some plugins write -1 for "none".
                None | Some(Err(_)) => None,
                Some(Ok(index)) if index < interfaces => Some(index),
                Some(Ok(index)) => {
                    return Err(Error::decode(format!(
                        "an address in a result is on interface {index} of {interfaces}"
                    )));
                }
            };
            let (address, gateway) = (cidr(&self.address)?, address(&self.gateway)?);
            Ok(super::Ip { address, gateway, interface })
        }
    }

    impl Route {
        fn read(self) -> Result<super::Route, Error> {
            Ok(super::Route {
                dst: cidr(&self.dst)?,
                gw: address(&self.gw)?,
                mtu: self.mtu,
                advmss: self.advmss,
                priority: self.priority,
                table: self.table,
                scope: self.scope,
            })
        }
    }

    impl Dns {
        fn read(self) -> super::Dns {
            super::Dns {
                nameservers: self.nameservers,
                domain: text(self.domain),
                search: self.search,
                options: self.options,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn dual() -> Success {
        Success {
            interfaces: vec![Interface {
                name: "eth0".into(),
                mac: Some("0a:58:0a:01:00:05".into()),
                mtu: Some(1450),
                sandbox: Some("/run/netns/x".into()),
                ..Default::default()
            }],
            ips: vec![
                Ip {
                    address: "10.1.0.5/16".parse().unwrap(),
                    gateway: Some("10.1.0.1".parse().unwrap()),
                    interface: Some(0),
                },
                Ip { address: "fd00::5/64".parse().unwrap(), gateway: None, interface: None },
                Ip { address: "10.2.0.5/16".parse().unwrap(), gateway: None, interface: None },
            ],
            routes: vec![
                Route { mtu: Some(1400), ..Route::new("0.0.0.0/0".parse().unwrap(), None) },
                Route::new("fd01::/48".parse().unwrap(), Some("fd00::1".parse().unwrap())),
            ],
            dns: Dns { nameservers: vec!["10.96.0.10".into()], ..Default::default() },
        }
    }

    #[test]
    fn each_version_writes_it_its_own_way() {
        let dns = json!({"nameservers": ["10.96.0.10"]});
        let legacy = json!({
            "cniVersion": "0.2.0",
            "ip4": {"ip": "10.1.0.5/16", "gateway": "10.1.0.1", "routes": [{"dst": "0.0.0.0/0"}]},
            "ip6": {"ip": "fd00::5/64", "routes": [{"dst": "fd01::/48", "gw": "fd00::1"}]},
            "dns": dns,
        });
        assert_eq!(dual().render(Version::V0_2_0), legacy);

        let mut current = json!({
            "cniVersion": "1.1.0",
            "interfaces": [
                {"name": "eth0", "mac": "0a:58:0a:01:00:05", "mtu": 1450, "sandbox": "/run/netns/x"}
            ],
            "ips": [
                {"interface": 0, "address": "10.1.0.5/16", "gateway": "10.1.0.1"},
                {"address": "fd00::5/64"},
                {"address": "10.2.0.5/16"},
            ],
            "routes": [{"dst": "0.0.0.0/0", "mtu": 1400}, {"dst": "fd01::/48", "gw": "fd00::1"}],
            "dns": dns,
        });
        assert_eq!(dual().render(Version::V1_1_0), current);

        current["cniVersion"] = json!("1.0.0");
        current["interfaces"][0].as_object_mut().unwrap().remove("mtu");
        current["routes"][0].as_object_mut().unwrap().remove("mtu");
        assert_eq!(dual().render(Version::V1_0_0), current);

        current["cniVersion"] = json!("0.4.0");
        for (index, version) in ["4", "6", "4"].into_iter().enumerate() {
            current["ips"][index]["version"] = json!(version);
        }
        assert_eq!(dual().render(Version::V0_4_0), current);
    }

    #[test]
    fn an_empty_result_still_has_dns() {
        let document = Success::default().render(Version::V1_1_0);
        assert_eq!(document, json!({"cniVersion": "1.1.0", "dns": {}}));
    }

    #[test]
    fn reads_what_it_writes() {
        assert_eq!(Success::parse(&dual().render(Version::V1_1_0), Version::V0_1_0), Ok(dual()));
        let read = Success::parse(&dual().render(Version::V0_1_0), Version::V0_1_0).unwrap();
        assert_eq!(read.ips.len(), 2);
        assert_eq!(read.render(Version::V0_1_0), dual().render(Version::V0_1_0));
    }

    #[test]
    fn a_document_without_version_has_its_configurations() {
        let document = json!({"ips": [{"version": "4", "address": "10.1.0.5/16", "interface": -1}]});
        let read = Success::parse(&document, Version::V0_3_1).unwrap();
        assert_eq!(read.ips[0].interface, None);
        assert_eq!(Success::parse(&document, Version::V0_2_0).unwrap().ips, []);
    }

    #[test]
    fn what_is_no_result() {
        for (document, code) in [
            (json!([]), 6),
            (json!("x"), 6),
            (json!({"ips": [{"address": "10.1.0.5"}]}), 6),
            (json!({"ips": [{"address": "ten/8"}]}), 6),
            (json!({"ips": [{"address": "10.0.0.1/8", "gateway": "x"}]}), 6),
            (json!({"ips": [{"address": "10.0.0.1/8", "interface": 0}]}), 6),
            (json!({"ips": {}}), 6),
            (json!({"routes": [{"gw": "10.0.0.1"}]}), 6),
            (json!({"cniVersion": "9.9.9"}), 1),
        ] {
            let error = Success::parse(&document, Version::V1_0_0).unwrap_err();
            assert_eq!(error.code, code, "{document}: {error}");
        }
    }

    proptest! {
        #[test]
        fn any_result_reads_back_in_1_1_0(
            address in any::<[u8; 16]>(), v4 in any::<bool>(), prefix in 0u8..=32, mac in "[0-9a-f:]{1,17}",
            interfaces in 0usize..3, text in "[a-z0-9.]{1,20}",
        ) {
            let ip: IpAddr = if v4 {
                IpAddr::from([address[0], address[1], address[2], address[3]])
            } else {
                IpAddr::from(address)
            };
            let made = Success {
                interfaces: (0..interfaces)
                    .map(|i| Interface { name: format!("e{i}"), mac: Some(mac.clone()), ..Default::default() })
                    .collect(),
                ips: vec![Ip {
                    address: IpNetwork::new(ip, prefix).unwrap(),
                    gateway: Some(ip),
                    interface: interfaces.checked_sub(1),
                }],
                routes: vec![Route { table: Some(7), ..Route::new(IpNetwork::new(ip, prefix).unwrap(), None) }],
                dns: Dns { search: vec![text.clone()], domain: Some(text), ..Default::default() },
            };
            prop_assert_eq!(Success::parse(&made.render(Version::V1_1_0), Version::V0_1_0), Ok(made));
        }
    }
}
