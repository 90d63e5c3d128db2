//! The versions of the CNI specification, and from which on each verb may be asked for.

use crate::Error;
use serde_json::{Value, json};
use std::fmt;

/// A released version of the CNI specification. Ordered by age.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    /// 0.1.0: results are `ip4` and `ip6`.
    V0_1_0,
    /// 0.2.0: the VERSION verb.
    V0_2_0,
    /// 0.3.0: chaining, `prevResult`, lists of interfaces and addresses.
    V0_3_0,
    /// 0.3.1
    V0_3_1,
    /// 0.4.0: CHECK.
    V0_4_0,
    /// 1.0.0: addresses without `version`, only lists of plugins.
    V1_0_0,
    /// 1.1.0: GC and STATUS.
    V1_1_0,
}

impl Version {
    /// Every version this library speaks, oldest first.
    pub const ALL: [Self; 7] =
        [Self::V0_1_0, Self::V0_2_0, Self::V0_3_0, Self::V0_3_1, Self::V0_4_0, Self::V1_0_0, Self::V1_1_0];

    /// The newest version this library speaks.
    pub const LATEST: Self = Self::V1_1_0;

    /// As written in a configuration.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::V0_1_0 => "0.1.0",
            Self::V0_2_0 => "0.2.0",
            Self::V0_3_0 => "0.3.0",
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }

    /// Reads `cniVersion`. An empty one is 0.1.0, as in the Go reference; versions match exactly.
    ///
    /// # Errors
    /// Code 1 for a version that is not in [`Version::ALL`].
    pub fn parse(written: &str) -> Result<Self, Error> {
        if written.is_empty() {
            return Ok(Self::V0_1_0);
        }
        Self::ALL.into_iter().find(|version| version.as_str() == written).ok_or_else(|| {
            let all: Vec<&str> = Self::ALL.iter().map(|version| version.as_str()).collect();
            Error::incompatible_version(format!("cniVersion {written:?} is not supported")).with_details(
                format!("set cniVersion in the network configuration to one of {}", all.join(", ")),
            )
        })
    }

    /// The answer to VERSION.
    #[must_use]
    pub fn supported(self) -> Value {
        let versions: Vec<&str> = Self::ALL.iter().map(|version| version.as_str()).collect();
        json!({"cniVersion": self.as_str(), "supportedVersions": versions})
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_version_reads_back() {
        for version in Version::ALL {
            assert_eq!(Version::parse(version.as_str()), Ok(version));
        }
        assert_eq!(Version::parse(""), Ok(Version::V0_1_0));
        assert!(Version::ALL.is_sorted());
    }

    #[test]
    fn other_versions_are_refused_with_what_to_do() {
        for written in ["0.5.0", "1.1", "1.1.0 ", "2.0.0", "latest"] {
            let error = Version::parse(written).unwrap_err();
            assert_eq!(error.code, 1, "{written}");
            assert!(error.details.contains("1.1.0"), "{error}");
        }
    }
}
