//! What a scraper asks the proxy for: a tunnel (`CONNECT node1:10250`) or one plain page
//! (`GET http://node1:9100/metrics`), and as whom. Pure.
//!
//! metrics-server and Prometheus send CONNECT for https targets and the absolute form for http targets. The head of the
//! latter is written anew for the target: in origin form, without what was meant for us, above all the password.

use super::{connection, is_hop_by_hop, write};
use crate::{
    connect,
    head::{self, malformed},
    refusal::Refusal,
    target::{NotATarget, Target},
};
use base64::{Engine, alphabet, engine};
use bytes::Bytes;
use std::fmt;

/// Methods that are understood.
pub const METHODS: &[&str] = &["CONNECT", "GET", "HEAD"];

/// How we call ourselves in `Via`.
pub const VIA: &str = "edge-tunnel";

/// RFC 7617 says nothing of padding, so either will do.
const BASE64: engine::GeneralPurpose = engine::GeneralPurpose::new(
    &alphabet::STANDARD,
    engine::GeneralPurposeConfig::new().with_decode_padding_mode(engine::DecodePaddingMode::Indifferent),
);

/// A user and password, as `Proxy-Authorization: Basic` has them.
#[derive(PartialEq, Eq)]
pub struct Credentials {
    /// The user.
    pub name: String,
    /// The password.
    pub password: Box<[u8]>,
}

/// Without the password.
impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}:***", self.name)
    }
}

/// A request that can be understood.
#[derive(Debug, PartialEq, Eq)]
pub struct Asked {
    /// Where to.
    pub target: Target,
    /// As whom; none without credentials, or with some that are not `Basic`.
    pub credentials: Option<Credentials>,
    /// What for.
    pub what: What,
}

/// What the connection to the target is for.
#[derive(Debug, PartialEq, Eq)]
pub enum What {
    /// Whatever the caller says; this came already.
    Tunnel(Bytes),
    /// One request, whose head is this, and its answer.
    Page(Bytes),
}

/// Reads a head that has ended.
///
/// # Errors
/// `malformed`, or too many headers.
pub fn read(head: &head::Head) -> Result<Asked, Refusal> {
    head::parse(&head.bytes, |request| {
        let credentials = credentials(request)?;
        if request.method == Some("CONNECT") {
            let target = connect::target(request)?;
            return Ok(Asked { target, credentials, what: What::Tunnel(head.early.clone()) });
        }
        let (target, head) = page(request)?;
        Ok(Asked { target, credentials, what: What::Page(head) })
    })
}

fn credentials(request: &httparse::Request<'_, '_>) -> Result<Option<Credentials>, Refusal> {
    let mut found =
        request.headers.iter().filter(|header| header.name.eq_ignore_ascii_case("proxy-authorization"));
    let (first, second) = (found.next(), found.next());
    if second.is_some() {
        return Err(malformed("more than one Proxy-Authorization"));
    }
    Ok(first.and_then(|header| basic(header.value)))
}

/// `Basic dXNlcjpwYXNzd29yZA==`
fn basic(value: &[u8]) -> Option<Credentials> {
    let space = value.iter().position(|&byte| byte == b' ')?;
    if !value[..space].eq_ignore_ascii_case(b"basic") {
        return None;
    }
    let pair = BASE64.decode(value[space..].trim_ascii()).ok()?;
    let colon = pair.iter().position(|&byte| byte == b':')?;
    let name = str::from_utf8(&pair[..colon]).ok()?.to_owned();
    Some(Credentials { name, password: pair[colon + 1..].into() })
}

/// The absolute form: the target, and the head as the target is to see it.
fn page(request: &httparse::Request<'_, '_>) -> Result<(Target, Bytes), Refusal> {
    head::no_content(request)?;
    let uri = request.path.unwrap_or_default();
    let (scheme, rest) = uri
        .split_once("://")
        .ok_or_else(|| malformed("this is a proxy: write GET http://NODE:PORT/PATH, or CONNECT NODE:PORT"))?;
    if !scheme.eq_ignore_ascii_case("http") {
        return Err(malformed("only http:// is fetched; for https:// send CONNECT NODE:PORT"));
    }
    let (authority, path) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
    if path.contains('#') {
        return Err(malformed("a fragment (#…) is not sent to servers"));
    }
    let target = match Target::parse(authority.as_bytes()) {
        Err(NotATarget::NoPort) => Target::parse(format!("{authority}:80").as_bytes())?,
        parsed => parsed?,
    };
    let slash = if path.starts_with('/') { "" } else { "/" };
    let (method, version) = (request.method.unwrap_or_default(), request.version.unwrap_or_default());
    let mut head = format!("{method} {slash}{path} HTTP/1.{version}\r\nHost: {authority}\r\n").into_bytes();
    let named = connection(request.headers);
    for header in request.headers.iter() {
        let ours =
            ["host", "content-length", "expect"].iter().any(|ours| ours.eq_ignore_ascii_case(header.name));
        if !ours && !is_hop_by_hop(header.name, &named) {
            write(&mut head, header);
        }
    }
    // One request a connection: what else comes would be neither asked for by name nor allowed.
    head.extend_from_slice(format!("Via: 1.{version} {VIA}\r\nConnection: close\r\n\r\n").as_bytes());
    Ok((target, head.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn asked(bytes: &[u8]) -> Result<Asked, Refusal> {
        let head = head::Reader::new(METHODS).push(bytes)?;
        read(&head.unwrap())
    }

    fn page_of(bytes: &str) -> (String, String) {
        let asked = asked(bytes.as_bytes()).unwrap();
        let What::Page(head) = asked.what else { panic!("a tunnel") };
        (asked.target.to_string(), String::from_utf8(head.to_vec()).unwrap())
    }

    #[test]
    fn what_metrics_server_sends() {
        let text = "CONNECT node2:10250 HTTP/1.1\r\nHost: node2:10250\r\nUser-Agent: Go-http-client/1.1\r\n\
                    Proxy-Authorization: Basic bWV0cmljczpzZWM6cmV0\r\n\r\n";
        let asked = asked(text.as_bytes()).unwrap();
        assert_eq!(asked.target, "node2:10250".parse().unwrap());
        assert_eq!(asked.what, What::Tunnel(Bytes::new()));
        let credentials = asked.credentials.unwrap();
        assert_eq!((&*credentials.name, &*credentials.password), ("metrics", &b"sec:ret"[..]));
        assert!(!format!("{credentials:?}").contains("sec"));
    }

    #[test]
    fn a_page_is_asked_for_as_by_the_scraper_itself() {
        let (target, head) = page_of(
            "GET http://Node1:9100/metrics?a=b HTTP/1.1\r\nHost: other\r\nUser-Agent: Prometheus/2.42.0\r\n\
             proxy-authorization: Basic YTpi\r\nAuthorization: Bearer t\r\nX-Prometheus-Scrape-Timeout-Seconds: 10\r\n\
             Connection: keep-alive, X-Mine\r\nX-Mine: 1\r\nKeep-Alive: 5\r\nTE: trailers\r\nUpgrade: h2c\r\n\
             Proxy-Connection: keep-alive\r\nAccept-Encoding: gzip\r\n\r\n",
        );
        assert_eq!(target, "node1:9100");
        assert_eq!(
            head,
            "GET /metrics?a=b HTTP/1.1\r\nHost: Node1:9100\r\nUser-Agent: Prometheus/2.42.0\r\n\
             Authorization: Bearer t\r\nX-Prometheus-Scrape-Timeout-Seconds: 10\r\nAccept-Encoding: gzip\r\n\
             Via: 1.1 edge-tunnel\r\nConnection: close\r\n\r\n"
        );
        for (uri, target, path) in [
            ("http://node1", "node1:80", "/"),
            ("HTTP://node1/", "node1:80", "/"),
            ("http://node1?x", "node1:80", "/?x"),
            ("http://[fd00::5]:9100/a/../b", "[fd00::5]:9100", "/a/../b"),
            ("http://[fd00::5]/", "[fd00::5]:80", "/"),
        ] {
            let (got, head) = page_of(&format!("HEAD {uri} HTTP/1.0\r\n\r\n"));
            assert_eq!(got, target, "{uri}");
            assert!(head.starts_with(&format!("HEAD {path} HTTP/1.0\r\nHost: ")), "{uri}: {head}");
        }
    }

    #[test]
    fn what_is_refused() {
        for (line, code, says) in [
            ("GET /metrics HTTP/1.1", 400, "this is a proxy"),
            ("GET https://node1:10250/metrics HTTP/1.1", 400, "CONNECT"),
            ("GET ftp://node1/ HTTP/1.1", 400, "CONNECT"),
            ("GET http://ann:pass@node1/ HTTP/1.1", 400, ""),
            ("GET http://node1:0/ HTTP/1.1", 400, "port"),
            ("GET http:///metrics HTTP/1.1", 400, ""),
            ("GET http://node1/#x HTTP/1.1", 400, "fragment"),
            ("POST http://node1/ HTTP/1.1", 405, "CONNECT, GET, HEAD"),
            ("GET http://node1/ HTTP/1.1\r\nContent-Length: 1", 400, "no content"),
            ("GET http://node1/ HTTP/1.1\r\nTransfer-Encoding: chunked", 400, "no content"),
            (
                "CONNECT node1:1 HTTP/1.1\r\nProxy-Authorization: a\r\nProxy-Authorization: b",
                400,
                "more than one",
            ),
            ("CONNECT node1 HTTP/1.1", 400, "no port"),
        ] {
            let refusal = asked(format!("{line}\r\n\r\n").as_bytes()).unwrap_err();
            assert_eq!(refusal.reason.code(), code, "{line}: {refusal}");
            assert!(
                refusal.sentence().contains(says) && !refusal.sentence().contains("pass"),
                "{line}: {refusal}"
            );
        }
    }

    #[test]
    fn credentials_as_people_write_them() {
        for (value, expected) in [
            ("Basic YTpi", Some(("a", "b"))),
            ("bAsIc   YTpi ", Some(("a", "b"))),
            ("Basic YTo=", Some(("a", ""))),
            ("Basic YTo", Some(("a", ""))),
            ("Basic OmI=", Some(("", "b"))),
            ("Basic YQ==", None),
            ("Basic ", None),
            ("Basic", None),
            ("Bearer YTpi", None),
            ("Basic !!!!", None),
            ("Basic /zpi", None),
        ] {
            let credentials = basic(value.as_bytes());
            let pair = credentials.as_ref().map(|it| (&*it.name, str::from_utf8(&it.password).unwrap()));
            assert_eq!(pair, expected, "{value}");
        }
    }

    proptest! {
        /// Whatever headers come along, the target sees one head that says nothing of the password or the connection.
        #[test]
        fn nothing_of_ours_is_passed_on(
            names in proptest::collection::vec("(Proxy-Authorization|Connection|TE|X-[a-z]{1,3}|Host)", 0..6),
            value in "[ -~]{0,12}",
        ) {
            let headers: String = names.iter().map(|name| format!("{name}: {value}\r\n")).collect();
            let text = format!("GET http://node1:9100/ HTTP/1.1\r\n{headers}\r\n");
            let Ok(asked) = asked(text.as_bytes()) else { return Ok(()) };
            let What::Page(head) = asked.what else { panic!("a tunnel") };
            let mut parsed = [httparse::EMPTY_HEADER; 16];
            let mut request = httparse::Request::new(&mut parsed);
            prop_assert_eq!(request.parse(&head).unwrap().unwrap(), head.len());
            let count = |name: &str| request.headers.iter().filter(|it| it.name.eq_ignore_ascii_case(name)).count();
            prop_assert_eq!(count("proxy-authorization") + count("te"), 0);
            prop_assert_eq!((count("host"), count("connection")), (1, 1));
        }
    }
}
