//! A label selector as `kubectl -l` takes it: `a=b,c!=d,e in (f,g),h notin (i),j,!k`. Pure.
//!
//! It is judged here and not by the API server, so that one watch tells of all nodes, and a node whose labels change
//! is told about like any other change.

use kube::core::{Expression, Selector};

/// Reads a selector; an empty one is an error, since it would select every node there is.
///
/// # Errors
/// A sentence with the part that cannot be understood.
pub fn parse(text: &str) -> Result<Selector, String> {
    if text.trim().is_empty() {
        return Err("an empty selector would select every node".into());
    }
    terms(text).into_iter().map(expression).collect()
}

/// Splits at the commas outside parentheses.
fn terms(text: &str) -> Vec<&str> {
    let mut depth = 0;
    text.split(|letter| {
        match letter {
            '(' => depth += 1,
            ')' => depth -= 1,
            _ => {}
        }
        letter == ',' && depth == 0
    })
    .map(str::trim)
    .collect()
}

fn expression(term: &str) -> Result<Expression, String> {
    let wrong = || format!("{term:?} is no term of a label selector such as key=value, key in (a,b) or !key");
    let key = |text: &str| {
        let text = text.trim();
        let letter = |byte: u8| byte.is_ascii_alphanumeric() || b"-_./".contains(&byte);
        if !text.is_empty() && text.len() <= 317 && text.bytes().all(letter) {
            Ok(text.to_owned())
        } else {
            Err(wrong())
        }
    };
    let value = |text: &str| {
        let text = text.trim();
        let letter = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        if text.len() <= 63 && text.bytes().all(letter) { Ok(text.to_owned()) } else { Err(wrong()) }
    };
    if let Some(rest) = term.strip_suffix(')') {
        let (head, values) = rest.split_once('(').ok_or_else(wrong)?;
        let values = values.split(',').map(value).collect::<Result<_, _>>()?;
        let (name, operator) = head.trim().rsplit_once(char::is_whitespace).ok_or_else(wrong)?;
        return match operator {
            "in" => Ok(Expression::In(key(name)?, values)),
            "notin" => Ok(Expression::NotIn(key(name)?, values)),
            _ => Err(wrong()),
        };
    }
    if let Some((name, wanted)) = term.split_once("!=") {
        return Ok(Expression::NotEqual(key(name)?, value(wanted)?));
    }
    if let Some((name, wanted)) = term.split_once("==").or_else(|| term.split_once('=')) {
        return Ok(Expression::Equal(key(name)?, value(wanted)?));
    }
    match term.strip_prefix('!') {
        Some(name) => Ok(Expression::DoesNotExist(key(name)?)),
        None => Ok(Expression::Exists(key(term)?)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kube::core::SelectorExt;

    #[test]
    fn selects_as_kubectl_does() {
        let labels = [("a", "b"), ("example.io/zone", "x"), ("empty", "")];
        let labels = labels.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        for (text, matches) in [
            ("a=b", true),
            ("a==b", true),
            (" a = b , example.io/zone=x", true),
            ("a=b,example.io/zone=y", false),
            ("a!=b", false),
            ("none!=b", true),
            ("a in (x, b)", true),
            ("a in (x,y)", false),
            ("a notin (x,y),a", true),
            ("none notin (x)", true),
            ("a", true),
            ("none", false),
            ("!none", true),
            ("!a", false),
            ("empty=", true),
        ] {
            assert_eq!(parse(text).unwrap().matches(&labels), matches, "{text}");
        }
    }

    #[test]
    fn nonsense_is_named() {
        for text in [
            "",
            " ",
            "a,",
            ",",
            "a=b c",
            "a in b",
            "a in (b",
            "a like (b)",
            "in (b)",
            "a>1",
            "=b",
            "!",
            "a=b=c",
        ] {
            assert!(parse(text).is_err(), "{text:?} is {:?}", parse(text));
        }
    }
}
