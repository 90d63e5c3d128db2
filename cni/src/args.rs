//! `CNI_ARGS`: the `K=V;K=V` list by which a runtime says which pod it is about.

use crate::Error;

/// The pairs of `CNI_ARGS`, in the order given.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Args(Vec<(String, String)>);

impl Args {
    /// Reads the variable as the reference's `LoadArgs` does: pairs divided by `;`, each with exactly one `=`.
    ///
    /// # Errors
    /// Code 4 for a pair that is none.
    pub fn parse(written: &str) -> Result<Self, Error> {
        if written.is_empty() {
            return Ok(Self::default());
        }
        let pair = |pair: &str| match pair.split('=').collect::<Vec<_>>()[..] {
            [key, value] => Ok((key.to_owned(), value.to_owned())),
            _ => Err(Error::invalid_environment(format!("CNI_ARGS has {pair:?}, which is not KEY=VALUE"))),
        };
        written.split(';').map(pair).collect::<Result<_, _>>().map(Self)
    }

    /// The value of a key; the last one when it is given twice. Keys are case sensitive.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&str> {
        let last = self.0.iter().rev().find(|(name, _)| name == key);
        last.map(|(_, value)| value.as_str())
    }

    /// Refuses keys that the plugin does not know, unless the runtime said `IgnoreUnknown=1`, as every
    /// Kubernetes runtime does.
    ///
    /// # Errors
    /// Code 4, with the unknown keys, or when `IgnoreUnknown` is not a boolean.
    pub fn refuse_unknown(&self, known: &[&str]) -> Result<(), Error> {
        if self.ignore_unknown()? {
            return Ok(());
        }
        let unknown: Vec<&str> = self
            .0
            .iter()
            .map(|(key, _)| key.as_str())
            .filter(|key| *key != "IgnoreUnknown" && !known.contains(key))
            .collect();
        if unknown.is_empty() {
            return Ok(());
        }
        Err(Error::invalid_environment(format!(
            "CNI_ARGS has keys that this plugin does not know: {}; IgnoreUnknown=1 permits them",
            unknown.join(", ")
        )))
    }

    fn ignore_unknown(&self) -> Result<bool, Error> {
        let written = self.get("IgnoreUnknown").unwrap_or("0");
        match written.to_ascii_lowercase().as_str() {
            "1" | "true" => Ok(true),
            "0" | "false" => Ok(false),
            _ => Err(Error::invalid_environment(format!(
                "CNI_ARGS: IgnoreUnknown={written} is neither 1 nor 0"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_containerd_sends() {
        let args =
            Args::parse("IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0;K8S_POD_UID=76b8")
                .unwrap();
        assert_eq!(args.get("K8S_POD_NAME"), Some("web-0"));
        assert_eq!(args.get("K8S_POD_UID"), Some("76b8"));
        assert_eq!(args.get("k8s_pod_name"), None);
        assert_eq!(args.refuse_unknown(&[]), Ok(()));
    }

    #[test]
    fn pairs_that_are_none() {
        assert_eq!(Args::parse(""), Ok(Args::default()));
        assert_eq!(Args::parse("A=").unwrap().get("A"), Some(""));
        for bad in ["A", "A=1;", ";A=1", "A=1=2", "A=1;;B=2", "="] {
            let parsed = Args::parse(bad);
            if bad == "=" {
                assert!(parsed.is_ok(), "Go takes an empty key too");
            } else {
                assert_eq!(parsed.unwrap_err().code, 4, "{bad:?}");
            }
        }
    }

    #[test]
    fn unknown_keys() {
        let known = ["IP", "MAC"];
        let refused = |written| Args::parse(written).unwrap().refuse_unknown(&known);
        assert_eq!(refused("IP=1.2.3.4;MAC=x"), Ok(()));
        assert_eq!(refused("IgnoreUnknown=TRUE;FOO=1"), Ok(()));
        let error = refused("FOO=1;IP=1.2.3.4;BAR=2").unwrap_err();
        assert_eq!(error.code, 4);
        assert!(error.msg.contains("FOO, BAR"), "{error}");
        assert_eq!(refused("IgnoreUnknown=0;FOO=1").unwrap_err().code, 4);
        assert_eq!(refused("IgnoreUnknown=maybe").unwrap_err().code, 4);
        let twice = Args::parse("IP=1;IP=2").unwrap();
        assert_eq!(twice.get("IP"), Some("2"));
    }
}
