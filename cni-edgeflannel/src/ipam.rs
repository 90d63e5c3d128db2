//! What the IPAM plugin is told: the configuration as it came, or with the node's subnet filled in.

use crate::{
    config::{Config, Ranges},
    subnet_env::{self, SubnetEnv},
};
use cni::{Error, NetConf};
use serde_json::{Map, Value, json};
use std::borrow::Cow;

/// The node's subnet, when the configuration leaves the ranges to it.
///
/// # Errors
/// 11 while nobody has said yet what it is, 7 when the file is wrong, 5 when it cannot be read.
pub fn node_subnet(config: &Config) -> Result<Option<SubnetEnv>, Error> {
    let Ranges::SubnetFile(file) = &config.ipam.ranges else { return Ok(None) };
    subnet_env::read(file).map(Some).map_err(|e| {
        let about = |what: &str| format!("{what} ({}: {e})", file.display());
        match e {
            subnet_env::Error::Missing | subnet_env::Error::Incomplete(_) => {
                Error::try_again(about("the node's subnet is not known yet"))
            }
            subnet_env::Error::Unreadable(_) => Error::io(about("the node's subnet cannot be read")),
            subnet_env::Error::Invalid(_) => Error::invalid_config(about("the node's subnet makes no sense")),
        }
    })
}

/// stdin for the IPAM plugin: byte for byte what came, if that has everything the plugin looks for; else with
/// an `ipam` like the one that flannel's CNI plugin makes: one range set per family, and routes to the whole
/// cluster after the written ones.
#[must_use]
pub fn stdin<'a>(conf: &'a NetConf, config: &Config, subnet: Option<&SubnetEnv>) -> Cow<'a, [u8]> {
    if config.ipam.at_top && conf.ipam_kind.is_some() && subnet.is_none() {
        return Cow::Borrowed(&conf.raw);
    }
    let mut ipam = config.ipam.written.clone();
    set(&mut ipam, "type", json!(config.ipam.kind));
    if let Some(subnet) = subnet {
        let ranges: Vec<Value> =
            subnet.subnets.iter().map(|net| json!([{"subnet": net.to_string()}])).collect();
        set(&mut ipam, "ranges", Value::Array(ranges));
        let written = cni::golike::get(&ipam, "routes").and_then(Value::as_array).cloned();
        let mut routes = written.unwrap_or_default();
        routes.extend(subnet.networks.iter().map(|net| json!({"dst": net.to_string()})));
        set(&mut ipam, "routes", Value::Array(routes));
    }
    let mut document = conf.document().as_object().cloned().unwrap_or_default();
    set(&mut document, "ipam", Value::Object(ipam));
    Cow::Owned(Value::Object(document).to_string().into_bytes())
}

/// Sets a key, in the place of any of the same name in other case.
fn set(object: &mut Map<String, Value>, key: &str, value: Value) {
    object.retain(|name, _| !name.eq_ignore_ascii_case(key));
    object.insert(key.into(), value);
}

#[cfg(test)]
mod tests {
    use super::*;
    use cni::Version;

    fn given(text: &str, subnet: Option<&SubnetEnv>) -> String {
        let conf = NetConf::parse(text.into(), &mut Version::V1_1_0).unwrap();
        let config = Config::new(&conf, None).unwrap();
        String::from_utf8(stdin(&conf, &config, subnet).into_owned()).unwrap()
    }

    fn subnet() -> SubnetEnv {
        subnet_env::parse(
            "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_IPV6_NETWORK=fd00::/48\n\
             FLANNEL_IPV6_SUBNET=fd00:0:0:1::1/64\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true",
        )
        .unwrap()
    }

    #[test]
    fn a_complete_configuration_passes_byte_for_byte() {
        let text = r#"{ "name":"n", "cniVersion":"0.3.1" , "type":"edgeflannel","ipam":{"type":"host-local", "subnet":"10.1.0.0/16"},"x":1.50 }"#;
        assert_eq!(given(text, None), text);
    }

    #[test]
    fn the_nodes_subnet_is_filled_in() {
        let text = r#"{"name":"n","cniVersion":"0.3.1","type":"edgeflannel","delegate":{"ipam":{"type":"host-local","routes":[{"dst":"1.2.3.0/24"}],"dataDir":"/d"}},"runtimeConfig":{"ips":["10.244.1.9"]}}"#;
        let sent: Value = serde_json::from_str(&given(text, Some(&subnet()))).unwrap();
        assert_eq!(
            sent["ipam"],
            json!({
                "type": "host-local", "dataDir": "/d",
                "ranges": [[{"subnet": "10.244.1.0/24"}], [{"subnet": "fd00:0:0:1::/64"}]],
                "routes": [{"dst": "1.2.3.0/24"}, {"dst": "10.244.0.0/16"}, {"dst": "fd00::/48"}],
            })
        );
        assert_eq!(sent["runtimeConfig"]["ips"][0], "10.244.1.9");
        assert_eq!(sent["cniVersion"], "0.3.1");
    }

    #[test]
    fn without_any_ipam_it_is_ours() {
        let text = r#"{"name":"n","cniVersion":"1.0.0","type":"edgeflannel","IPAM":null}"#;
        let sent: Value = serde_json::from_str(&given(text, None)).unwrap();
        assert_eq!(sent["ipam"], json!({"type": "ipam-sticky"}));
        assert!(sent.get("IPAM").is_none());
        // A type may be missing where ranges are written.
        let text =
            r#"{"name":"n","cniVersion":"1.0.0","type":"edgeflannel","ipam":{"subnet":"10.1.0.0/16"}}"#;
        let sent: Value = serde_json::from_str(&given(text, None)).unwrap();
        assert_eq!(sent["ipam"], json!({"type": "ipam-sticky", "subnet": "10.1.0.0/16"}));
    }

    #[test]
    fn an_unknown_subnet_means_try_again() {
        let text = r#"{"name":"n","cniVersion":"1.0.0","type":"edgeflannel","subnetFile":"/nonexistent/subnet.env"}"#;
        let conf = NetConf::parse(text.into(), &mut Version::V1_1_0).unwrap();
        let error = node_subnet(&Config::new(&conf, None).unwrap()).unwrap_err();
        assert_eq!(error.code, 11);
        assert!(error.msg.contains("the node's subnet is not known yet"), "{error}");
    }
}
