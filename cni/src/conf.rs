//! A network configuration as the runtime hands it to one plugin: what every plugin needs of it.

use crate::{Error, NetworkName, Success, Version, golike};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::Value;

/// The plugin's object of the network configuration (spec section 1), with what the runtime injected.
#[derive(Debug, Clone, PartialEq)]
pub struct NetConf {
    /// stdin, byte for byte: what a delegate is given.
    pub raw: Vec<u8>,
    /// `cniVersion`, in which the result is to be printed.
    pub version: Version,
    /// `name` of the network.
    pub name: NetworkName,
    /// `type`, the name of the plugin's executable; empty when the caller left it out.
    pub kind: String,
    /// `ipam.type`.
    pub ipam_kind: Option<String>,
    /// `prevResult`. `None` when there is none, and on DEL also when it cannot be read.
    pub prev_result: Option<Success>,
    /// Always an object.
    document: Value,
}

#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct Head {
    cni_version: String,
    name: String,
    r#type: String,
    ipam: IpamHead,
}

#[derive(Deserialize, Default)]
#[serde(default)]
struct IpamHead {
    r#type: String,
}

impl NetConf {
    /// Reads the parts that the spec defines, except for the previous result. `version` is set as soon as it is
    /// known, so that an error about the rest is told in it.
    ///
    /// # Errors
    /// 6 not JSON or of a wrong type, 7 no network name, 1 a version that is not spoken here.
    pub fn parse(raw: Vec<u8>, version: &mut Version) -> Result<Self, Error> {
        let document: Value = serde_json::from_slice(&raw)
            .map_err(|e| decode("the network configuration on stdin is not JSON", &e))?;
        let Some(object) = document.as_object() else {
            return Err(Error::decode("the network configuration on stdin is not a JSON object"));
        };
        let written = golike::get(object, "cniVersion").and_then(Value::as_str);
        if let Some(Ok(spoken)) = written.map(Version::parse) {
            *version = spoken;
        }
        let head: Head = golike::from_value(&document).map_err(|e| decode(WRONG_TYPE, &e))?;
        let name = NetworkName::parse(&head.name)?;
        Ok(Self {
            raw,
            version: Version::parse(&head.cni_version)?,
            name,
            kind: head.r#type,
            ipam_kind: Some(head.ipam.r#type).filter(|kind| !kind.is_empty()),
            prev_result: None,
            document,
        })
    }

    /// The whole object as `T`, which names the keys that the plugin knows (see [`golike`]).
    ///
    /// # Errors
    /// 6 when a key has the wrong type.
    pub fn decode<T: DeserializeOwned>(&self) -> Result<T, Error> {
        golike::from_value(&self.document).map_err(|e| decode(WRONG_TYPE, &e))
    }

    /// One key of the object, whatever its case; `null` counts as missing.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.document.as_object().and_then(|object| golike::get(object, key))
    }

    /// The whole object as it was read, for a plugin that hands a changed copy to its delegate.
    #[must_use]
    pub fn document(&self) -> &Value {
        &self.document
    }

    /// Reads `prevResult` in the configuration's version.
    pub(crate) fn read_prev_result(&self) -> Result<Option<Success>, Error> {
        let written = self.get("prevResult");
        written
            .map(|written| Success::parse(written, self.version).map_err(|e| e.context("prevResult")))
            .transpose()
    }
}

const WRONG_TYPE: &str = "the network configuration has a key of the wrong type";

fn decode(what: &str, error: &serde_json::Error) -> Error {
    Error::decode(format!("{what}: {error}"))
}
