//! A Node object, read from the API server's JSON without ever holding the whole of it.
//!
//! A Node is 7 to 10 KB of JSON, most of it images and heartbeats; five thousand of them as kube's full type
//! take 300 MB. Here everything but a few strings is skipped while reading (facts/limits.md 6).

use super::annotations::{Node, may_matter};
use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, MapAccess, SeqAccess, Visitor},
};
use std::{collections::BTreeMap, fmt};

/// A Node, and the version of the list that it belongs to.
#[derive(Debug, Clone, Deserialize)]
pub struct SlimNode {
    #[serde(default)]
    metadata: Metadata,
    #[serde(default)]
    spec: Spec,
    #[serde(default)]
    status: Status,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Metadata {
    name: String,
    resource_version: String,
    #[serde(deserialize_with = "flannels_annotations")]
    annotations: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct Spec {
    #[serde(rename = "podCIDR")]
    pod_cidr: String,
    #[serde(rename = "podCIDRs", deserialize_with = "or_default")]
    pod_cidrs: Vec<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct Status {
    #[serde(deserialize_with = "network_unavailable")]
    conditions: Option<String>,
}

/// A page of a list.
#[derive(Debug, Deserialize)]
pub struct NodeList {
    /// Where a watch may go on.
    pub metadata: ListMetadata,
    /// The nodes.
    #[serde(default, deserialize_with = "or_default")]
    pub items: Vec<SlimNode>,
}

/// Of a page.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub struct ListMetadata {
    /// The version that the list shows.
    pub resource_version: String,
    /// Where the next page begins; empty after the last.
    #[serde(rename = "continue")]
    pub continue_: String,
}

impl SlimNode {
    /// `metadata.resourceVersion`
    #[must_use]
    pub fn resource_version(&self) -> &str {
        &self.metadata.resource_version
    }
}

impl From<SlimNode> for Node {
    fn from(slim: SlimNode) -> Self {
        let SlimNode { metadata, spec, status } = slim;
        let mut pod_cidrs = spec.pod_cidrs;
        if pod_cidrs.is_empty() && !spec.pod_cidr.is_empty() {
            pod_cidrs.push(spec.pod_cidr);
        }
        Self {
            name: metadata.name,
            annotations: metadata.annotations,
            pod_cidrs,
            network_unavailable: status.conditions,
        }
    }
}

/// `null` where Go had a nil slice.
fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(from: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

fn flannels_annotations<'de, D: Deserializer<'de>>(from: D) -> Result<BTreeMap<String, String>, D::Error> {
    struct Annotations;
    impl<'de> Visitor<'de> for Annotations {
        type Value = BTreeMap<String, String>;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("annotations")
        }
        fn visit_unit<E>(self) -> Result<Self::Value, E> {
            Ok(BTreeMap::new())
        }
        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut kept = BTreeMap::new();
            while let Some(key) = map.next_key::<String>()? {
                if may_matter(&key) {
                    kept.insert(key, map.next_value()?);
                } else {
                    map.next_value::<IgnoredAny>()?;
                }
            }
            Ok(kept)
        }
    }
    from.deserialize_any(Annotations)
}

/// The status of the condition NetworkUnavailable.
fn network_unavailable<'de, D: Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(default)]
    #[derive(Default)]
    struct Condition {
        r#type: String,
        status: String,
    }
    struct Conditions;
    impl<'de> Visitor<'de> for Conditions {
        type Value = Option<String>;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("conditions")
        }
        fn visit_unit<E>(self) -> Result<Self::Value, E> {
            Ok(None)
        }
        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
            let mut found = None;
            while let Some(condition) = seq.next_element::<Condition>()? {
                if condition.r#type == "NetworkUnavailable" {
                    found = Some(condition.status);
                }
            }
            Ok(found)
        }
    }
    from.deserialize_any(Conditions)
}

#[cfg(test)]
mod tests {
    use super::*;
    use kube::core::WatchEvent;

    const NODE: &str = r#"{"kind":"Node","apiVersion":"v1","metadata":{"name":"edge-1","uid":"x","resourceVersion":"812",
        "labels":{"a":"b"},"annotations":{"flannel.alpha.coreos.com/public-ip":"192.168.0.2","node.alpha.kubernetes.io/ttl":"0"},
        "managedFields":[{"manager":"kubelet","fieldsV1":{"f:status":{}}}]},
        "spec":{"podCIDR":"10.244.1.0/24","podCIDRs":["10.244.1.0/24","fd00:1::/64"],"providerID":"p"},
        "status":{"capacity":{"cpu":"2"},"conditions":[{"type":"NetworkUnavailable","status":"False","reason":"FlannelIsUp"},
        {"type":"Ready","status":"True"}],"images":[{"names":["a"],"sizeBytes":1}]}}"#;

    fn node(json: &str) -> Node {
        serde_json::from_str::<SlimNode>(json).unwrap().into()
    }

    #[test]
    fn only_what_matters_is_read() {
        let node = node(NODE);
        assert_eq!(node.name, "edge-1");
        assert_eq!(node.annotations.len(), 1);
        assert_eq!(node.pod_cidrs, ["10.244.1.0/24", "fd00:1::/64"]);
        assert_eq!(node.network_unavailable.as_deref(), Some("False"));
    }

    #[test]
    fn what_may_be_missing() {
        assert_eq!(node(r#"{"metadata":{"name":"a"}}"#), Node { name: "a".into(), ..Node::default() });
        let nulls = r#"{"metadata":{"name":"a","annotations":null},"spec":{"podCIDRs":null},"status":{"conditions":null}}"#;
        assert_eq!(node(nulls), Node { name: "a".into(), ..Node::default() });
        assert_eq!(
            node(r#"{"metadata":{"name":"a"},"spec":{"podCIDR":"10.1.0.0/24"}}"#).pod_cidrs,
            ["10.1.0.0/24"]
        );
    }

    #[test]
    fn events_and_lists() {
        let line = format!(r#"{{"type":"MODIFIED","object":{NODE}}}"#);
        let WatchEvent::Modified(slim) = serde_json::from_str::<WatchEvent<SlimNode>>(&line).unwrap() else {
            panic!()
        };
        assert_eq!(slim.resource_version(), "812");
        let end = r#"{"type":"BOOKMARK","object":{"kind":"Node","apiVersion":"v1","metadata":{"resourceVersion":"9",
            "annotations":{"k8s.io/initial-events-end":"true"}}}}"#;
        assert!(matches!(
            serde_json::from_str::<WatchEvent<SlimNode>>(end).unwrap(),
            WatchEvent::Bookmark(_)
        ));
        let list = format!(
            r#"{{"kind":"NodeList","metadata":{{"resourceVersion":"7","continue":"t"}},"items":[{NODE}]}}"#
        );
        let list: NodeList = serde_json::from_str(&list).unwrap();
        assert_eq!((list.items.len(), list.metadata.continue_.as_str()), (1, "t"));
        let empty: NodeList =
            serde_json::from_str(r#"{"metadata":{"resourceVersion":"7"},"items":null}"#).unwrap();
        assert!(empty.items.is_empty() && empty.metadata.continue_.is_empty());
    }
}
