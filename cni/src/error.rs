//! The error object of the protocol: a code that the runtime acts on and a sentence for a person.

use crate::Version;
use serde_json::{Value, json};
use std::{any::Any, fmt};

/// What a plugin answers instead of a result (spec section 5, "Error").
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    /// 1 to 99 belong to the spec, 100 and up to the plugin, 999 is the reference's "internal".
    pub code: u32,
    /// What was tried, on what, and what to do.
    pub msg: String,
    /// More about it, or empty.
    pub details: String,
}

/// One constructor per code of the spec, so that a number is written once.
impl Error {
    fn new(code: u32, msg: impl Into<String>) -> Self {
        Self { code, msg: msg.into(), details: String::new() }
    }

    /// 1: the configuration's version cannot be served.
    pub fn incompatible_version(msg: impl Into<String>) -> Self {
        Self::new(1, msg)
    }

    /// 2: a field of the configuration is not supported; the message names key and value.
    pub fn unsupported_field(key: &str, value: &str) -> Self {
        Self::new(2, format!("{key}: {value} is not supported"))
    }

    /// 3: the container is unknown or does not exist. The runtime need not send DEL.
    pub fn unknown_container(msg: impl Into<String>) -> Self {
        Self::new(3, msg)
    }

    /// 4: a `CNI_*` variable is missing or wrong; the message names it.
    pub fn invalid_environment(msg: impl Into<String>) -> Self {
        Self::new(4, msg)
    }

    /// 5: reading or writing failed.
    pub fn io(msg: impl Into<String>) -> Self {
        Self::new(5, msg)
    }

    /// 6: something is not the JSON it should be.
    pub fn decode(msg: impl Into<String>) -> Self {
        Self::new(6, msg)
    }

    /// 7: the network configuration is wrong.
    pub fn invalid_config(msg: impl Into<String>) -> Self {
        Self::new(7, msg)
    }

    /// 8: `CNI_NETNS` is the plugin's own namespace (code of the Go reference).
    pub fn invalid_netns(msg: impl Into<String>) -> Self {
        Self::new(8, msg)
    }

    /// 11: a passing state; the runtime should try again later.
    pub fn try_again(msg: impl Into<String>) -> Self {
        Self::new(11, msg)
    }

    /// 50: STATUS: no ADD can be served now.
    pub fn not_available(msg: impl Into<String>) -> Self {
        Self::new(50, msg)
    }

    /// 51: STATUS: no ADD can be served, and containers that are there may be cut off too.
    pub fn limited_connectivity(msg: impl Into<String>) -> Self {
        Self::new(51, msg)
    }

    /// 100 and up: the plugin's own.
    pub fn plugin(code: u32, msg: impl Into<String>) -> Self {
        debug_assert!(code >= 100, "codes below 100 are the spec's");
        Self::new(code, msg)
    }

    /// 999: none of the spec's (what the Go reference makes of any plain error).
    pub fn internal(msg: impl Into<String>) -> Self {
        Self::new(999, msg)
    }

    /// Adds what helps to understand the message.
    #[must_use]
    pub fn with_details(mut self, details: impl Into<String>) -> Self {
        self.details = details.into();
        self
    }

    /// Puts what was being done in front of the message: `context: msg`.
    #[must_use]
    pub fn context(mut self, context: impl fmt::Display) -> Self {
        self.msg = format!("{context}: {}", self.msg);
        self
    }

    /// An error as another plugin printed it, code and all.
    pub(crate) fn reported(code: u32, msg: String, details: String) -> Self {
        Self { code, msg, details }
    }

    pub(crate) fn from_panic(panic: &(dyn Any + Send)) -> Self {
        let said = panic
            .downcast_ref::<&str>()
            .copied()
            .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
            .unwrap_or("no message");
        Self::internal(format!("the plugin panicked, which is a bug worth reporting: {said}"))
    }

    /// The error document of the spec. `details` is left out when empty.
    #[must_use]
    pub fn render(&self, version: Version) -> Value {
        let mut document = json!({
            "cniVersion": version.as_str(),
            "code": self.code,
            "msg": self.msg,
        });
        if !self.details.is_empty() {
            document["details"] = json!(self.details);
        }
        document
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.msg)?;
        if !self.details.is_empty() {
            write!(f, "; {}", self.details)?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_the_specs() {
        let codes = [
            (Error::incompatible_version("x"), 1),
            (Error::unsupported_field("vlan", "7"), 2),
            (Error::unknown_container("x"), 3),
            (Error::invalid_environment("x"), 4),
            (Error::io("x"), 5),
            (Error::decode("x"), 6),
            (Error::invalid_config("x"), 7),
            (Error::invalid_netns("x"), 8),
            (Error::try_again("x"), 11),
            (Error::not_available("x"), 50),
            (Error::limited_connectivity("x"), 51),
            (Error::plugin(100, "x"), 100),
            (Error::internal("x"), 999),
        ];
        for (error, code) in codes {
            assert_eq!(error.code, code);
        }
    }

    #[test]
    fn the_document_has_the_callers_version_and_no_empty_details() {
        let error = Error::io("read x").context("store");
        assert_eq!(
            error.render(Version::V0_4_0).to_string(),
            r#"{"cniVersion":"0.4.0","code":5,"msg":"store: read x"}"#
        );
        let error = error.with_details("disk full");
        assert_eq!(error.render(Version::V1_1_0)["details"], "disk full");
        assert_eq!(error.to_string(), "store: read x; disk full");
    }
}
