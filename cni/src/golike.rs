//! Decoding that is as loose as Go's `encoding/json`, because every CNI runtime is written in Go.
//!
//! Against plain serde: a struct's keys match without regard to case (an exact match wins), and a key whose
//! value is `null` counts as missing. Unknown keys are ignored, which serde does by itself. Types are not
//! bent: a number where text belongs is an error in Go as well. Mark optional fields `#[serde(default)]`.

use serde::{
    de::{
        DeserializeOwned, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor,
        value::StrDeserializer,
    },
    forward_to_deserialize_any,
};
use serde_json::{Error, Map, Value};

/// Decodes a JSON value the way Go would.
///
/// # Errors
/// What serde says of a value of the wrong type or a missing key without default.
pub fn from_value<T: DeserializeOwned>(value: &Value) -> Result<T, Error> {
    T::deserialize(Tolerant(value))
}

/// The value of a key as a struct of Go's would see it.
#[must_use]
pub fn get<'a>(object: &'a Map<String, Value>, key: &str) -> Option<&'a Value> {
    let exact = object.get(key).filter(|value| !value.is_null());
    exact.or_else(|| {
        let other = |(name, value): &(&String, &Value)| name.eq_ignore_ascii_case(key) && !value.is_null();
        object.iter().find(other).map(|(_, value)| value)
    })
}

struct Tolerant<'a>(&'a Value);

impl<'de> Deserializer<'de> for Tolerant<'de> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match self.0 {
            Value::Array(items) => visitor.visit_seq(Items(items.iter())),
            Value::Object(object) => {
                let entries = object.iter().map(|(key, value)| (key.as_str(), value)).collect();
                visitor.visit_map(Entries { entries, value: None })
            }
            scalar => scalar.deserialize_any(visitor),
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        let Value::Object(object) = self.0 else {
            // Left to itself, serde would take an array as the struct's fields in order.
            return Err(serde::de::Error::custom(format_args!("{} is not an object", shown(self.0))));
        };
        let entries = fields.iter().filter_map(|field| Some((*field, get(object, field)?))).collect();
        visitor.visit_map(Entries { entries, value: None })
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        if self.0.is_null() { visitor.visit_none() } else { visitor.visit_some(self) }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        self.0.deserialize_enum(name, variants, visitor)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit
        unit_struct seq tuple tuple_struct map identifier ignored_any
    }
}

fn shown(value: &Value) -> String {
    let text = value.to_string();
    text.char_indices().nth(40).map_or_else(|| text.clone(), |(at, _)| format!("{}...", &text[..at]))
}

struct Items<'a>(std::slice::Iter<'a, Value>);

impl<'de> SeqAccess<'de> for Items<'de> {
    type Error = Error;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Error> {
        self.0.next().map(|item| seed.deserialize(Tolerant(item))).transpose()
    }

    fn size_hint(&self) -> Option<usize> {
        Some(self.0.len())
    }
}

/// The keys of an object, in no order, each followed by its value.
struct Entries<'a> {
    entries: Vec<(&'a str, &'a Value)>,
    value: Option<&'a Value>,
}

impl<'de> MapAccess<'de> for Entries<'de> {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Error> {
        let Some((key, value)) = self.entries.pop() else {
            return Ok(None);
        };
        self.value = Some(value);
        seed.deserialize(StrDeserializer::new(key)).map(Some)
    }

    fn next_value_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<T::Value, Error> {
        seed.deserialize(Tolerant(self.value.take().unwrap_or(&Value::Null)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;
    use serde_json::json;
    use std::collections::BTreeMap;

    #[derive(Debug, Deserialize, PartialEq, Default)]
    #[serde(default, rename_all = "camelCase")]
    struct Inner {
        range_start: Option<String>,
        routes: Vec<String>,
    }

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(rename_all = "lowercase")]
    enum Mode {
        Plain,
    }

    #[derive(Debug, Deserialize, PartialEq, Default)]
    #[serde(default)]
    struct Outer {
        bridge: String,
        mtu: u32,
        hairpin: Option<bool>,
        ipam: Inner,
        sets: Vec<Vec<Inner>>,
        labels: BTreeMap<String, String>,
        mode: Option<Mode>,
    }

    fn decode(value: Value) -> Result<Outer, Error> {
        from_value(&value)
    }

    #[test]
    fn keys_match_without_case_at_every_depth() {
        let decoded = decode(json!({
            "BRIDGE": "cni0", "Mtu": 1450, "hairPin": true, "Mode": "plain",
            "IPAM": {"RANGESTART": "10.0.0.1", "routes": ["a"]},
            "sets": [[{"rangestart": "x"}]],
            "labels": {"Key": "kept as it is"},
        }))
        .unwrap();
        assert_eq!(decoded.bridge, "cni0");
        assert_eq!(decoded.mtu, 1450);
        assert_eq!(decoded.hairpin, Some(true));
        assert_eq!(decoded.mode, Some(Mode::Plain));
        assert_eq!(decoded.ipam.range_start.as_deref(), Some("10.0.0.1"));
        assert_eq!(decoded.sets[0][0].range_start.as_deref(), Some("x"));
        assert_eq!(decoded.labels["Key"], "kept as it is");
    }

    #[test]
    fn an_exact_key_wins_over_another_case() {
        let decoded = decode(json!({"BRIDGE": "no", "bridge": "yes", "Bridge": "no"})).unwrap();
        assert_eq!(decoded.bridge, "yes");
    }

    #[test]
    fn null_is_missing() {
        let decoded = decode(json!({
            "bridge": null, "mtu": null, "hairpin": null, "ipam": null, "sets": null, "labels": null
        }))
        .unwrap();
        assert_eq!(decoded, Outer::default());
        assert_eq!(decode(json!({})).unwrap(), Outer::default());
        // A null under the exact key does not hide the value under another case.
        assert_eq!(decode(json!({"bridge": null, "BRIDGE": "b"})).unwrap().bridge, "b");
    }

    #[test]
    fn types_are_not_bent() {
        for wrong in [
            json!({"mtu": "1450"}),
            json!({"mtu": -1}),
            json!({"mtu": 1.5}),
            json!({"bridge": 7}),
            json!({"ipam": []}),
            json!({"sets": {}}),
            json!({"mode": "other"}),
            json!([]),
            json!("text"),
            json!(null),
        ] {
            assert!(decode(wrong.clone()).is_err(), "{wrong}");
        }
    }
}
