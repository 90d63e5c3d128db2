//! Nodes from a file: `[{"name": "node1", "addresses": ["10.0.0.5"], "podCIDRs": [], "direct": false}]`.
//!
//! The file is followed. One that is gone, empty or cannot be understood keeps the last good list; `[]` is a list, and
//! is believed.

use super::{Node, Nodes};
use crate::{
    target::{Host, Name},
    tls::follow::Followed,
};
use serde::Deserialize;
use std::{collections::HashSet, path::PathBuf, sync::Arc};
use tokio::sync::watch;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    name: String,
    #[serde(default)]
    addresses: Vec<String>,
    #[serde(default, rename = "podCIDRs")]
    pod_cidrs: Vec<String>,
    #[serde(default)]
    direct: bool,
}

/// Reads a list.
///
/// # Errors
/// The first thing that is wrong with it; a list is good as a whole or not at all.
pub fn parse(bytes: &[u8]) -> Result<Vec<Node>, String> {
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Err("it is empty; a list without nodes is written []".into());
    }
    let list: Vec<Written> = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    let mut names = HashSet::new();
    list.into_iter()
        .map(|written| {
            let node = written.check()?;
            if names.insert(node.name.clone()) {
                Ok(node)
            } else {
                Err(format!("node {} comes twice", node.name))
            }
        })
        .collect()
}

impl Written {
    fn check(self) -> Result<Node, String> {
        let Self { name, addresses, pod_cidrs, direct } = self;
        let wrong = |what: &str, text: &str| format!("node {name:?}: {text:?} is no {what}");
        let addresses = addresses
            .iter()
            .map(|text| Host::parse(text.as_bytes()).map_err(|_| wrong("address", text)))
            .collect::<Result<_, _>>()?;
        let pods = pod_cidrs
            .iter()
            .map(|text| text.parse().map_err(|_| wrong("network", text)))
            .collect::<Result<_, _>>()?;
        let name = Name::parse(name.as_bytes()).map_err(|_| format!("{name:?} is no name of a node"))?;
        Ok(Node { name, addresses, pods, direct })
    }
}

/// A nodes file that has been read once.
pub struct File(Followed<Arc<Nodes>>);

impl File {
    /// Reads the file.
    ///
    /// # Errors
    /// When it is not there or not a good list.
    pub fn open(path: PathBuf) -> Result<Self, String> {
        let shown = path.display().to_string();
        let load = move |files: &[Vec<u8>]| match parse(&files[0]) {
            Ok(list) => Ok(Arc::new(Nodes::new(list))),
            Err(why) => Err(format!("{shown}: {why}")),
        };
        Followed::new(vec![path], load).map(Self)
    }

    /// The list in force.
    pub fn nodes(&self) -> Arc<Nodes> {
        self.0.get().as_ref().clone()
    }

    /// Sends this list and every later one, for ever; `failed` hears of each that is not good.
    pub async fn follow(self, nodes: watch::Sender<Arc<Nodes>>, failed: impl FnMut(&str)) {
        nodes.send_replace(self.nodes());
        let mut changes = self.0.changes();
        let pass_on = async {
            while changes.changed().await.is_ok() {
                nodes.send_replace(self.nodes());
            }
        };
        tokio::join!(self.0.follow(failed), pass_on);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        fs,
        sync::atomic::{AtomicUsize, Ordering},
        time::Duration,
    };

    #[test]
    fn a_list_as_people_write_it() {
        let list = parse(
            br#"[{"name": "Node1", "addresses": ["10.0.0.5", "fd00::5", "node1.lan"], "podCIDRs": ["10.244.1.0/24"]},
                {"name": "cloud", "direct": true}]"#,
        )
        .unwrap();
        assert_eq!(list[0], super::super::tests::node("node1 10.0.0.5 fd00::5 node1.lan / 10.244.1.0/24"));
        assert!(list[1].direct && list[1].addresses.is_empty());
        assert_eq!(parse(b"[]"), Ok(vec![]));
    }

    #[test]
    fn what_is_no_list() {
        for (text, says) in [
            ("", "empty"),
            (" \n", "empty"),
            ("null", "null"),
            ("{}", "map"),
            (r#"[{"addresses": []}]"#, "name"),
            (r#"[{"name": "a", "adresses": []}]"#, "adresses"),
            (r#"[{"name": "a b"}]"#, "name of a node"),
            (r#"[{"name": "a", "addresses": ["10.0.0.5:80"]}]"#, "10.0.0.5:80"),
            (r#"[{"name": "a", "podCIDRs": ["10.0.0.0/40"]}]"#, "10.0.0.0/40"),
            (r#"[{"name": "a"}, {"name": "A"}]"#, "twice"),
            (r#"[{"name": "a"}"#, "EOF"),
        ] {
            let why = parse(text.as_bytes()).unwrap_err();
            assert!(why.contains(says), "{text}: {why}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_bad_file_keeps_the_last_good_list() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nodes.json");
        assert!(File::open(path.clone()).err().unwrap().contains("nodes.json"));
        fs::write(&path, r#"[{"name": "a"}]"#).unwrap();
        let (sender, nodes) = watch::channel(Arc::default());
        let failures = Arc::new(AtomicUsize::new(0));
        let file = File::open(path.clone()).unwrap();
        let counted = failures.clone();
        let follow = tokio::spawn(file.follow(sender, move |_| {
            counted.fetch_add(1, Ordering::Relaxed);
        }));
        let names = || {
            let nodes = nodes.borrow();
            ["a", "b"].map(|name| nodes.named(&name.parse().unwrap()).is_some())
        };
        for (text, expected, failed) in [
            (r#"[{"name": "a"}]"#, [true, false], 0),
            ("", [true, false], 1),
            (r#"[{"name": "b"}]"#, [false, true], 1),
            (r#"[{"name": "#, [false, true], 2),
            ("[]", [false, false], 2),
        ] {
            fs::write(&path, text).unwrap();
            tokio::time::sleep(Duration::from_secs(10)).await;
            assert_eq!((names(), failures.load(Ordering::Relaxed)), (expected, failed), "{text:?}");
        }
        follow.abort();
    }
}
