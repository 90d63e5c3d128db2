//! Which node a connection is for that nobody opens: the server name of a TLS ClientHello, or the Host of plain HTTP.
//! Bytes as they come in, a name or a refusal out. Pure and bounded.
//!
//! The ClientHello is read by rustls, as for a server of its own: across records, in whatever pieces. It stays as it is
//! and goes to the node with everything else.

use crate::{
    head::{self, malformed},
    refusal::{Reason, Refusal},
    target::{Host, Name, Target},
};
use bytes::{Bytes, BytesMut};
use rustls::server::Acceptor;

/// The largest ClientHello, bytes. One with post-quantum keys has 1,800.
pub const HELLO_LIMIT: usize = 16 * 1024;

/// The first byte of a TLS handshake record; no HTTP method begins with it.
const HANDSHAKE_RECORD: u8 = 0x16;

/// Methods of plain HTTP that scrapers and people use. CONNECT is the proxy's.
const METHODS: &[&str] = &["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"];

/// What a caller hears instead of an answer to its ClientHello: a fatal alert, unrecognized_name (RFC 6066, 3).
pub const UNRECOGNIZED_NAME: &[u8] = &[21, 3, 3, 0, 2, 2, 112];

/// Whom a connection is for, and what has come on it.
#[derive(Debug, PartialEq, Eq)]
pub struct Meant {
    /// The name.
    pub name: Name,
    /// Everything so far; the node gets it first.
    pub bytes: Bytes,
}

/// Reads the first bytes of a connection.
#[derive(Default)]
pub struct Reader(State);

#[derive(Default)]
enum State {
    /// Nothing has come.
    #[default]
    New,
    Tls(Box<Acceptor>, BytesMut),
    Http(Box<head::Reader>),
}

impl Reader {
    /// A reader that has seen nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether the caller speaks TLS.
    pub fn is_tls(&self) -> bool {
        matches!(self.0, State::Tls(..))
    }

    /// Takes the next bytes. None: not known yet. Once a name or a refusal came out, the reader is spent.
    ///
    /// # Errors
    /// Why there is no name.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Option<Meant>, Refusal> {
        if matches!(self.0, State::New) {
            self.0 = match bytes.first() {
                None => return Ok(None),
                Some(&HANDSHAKE_RECORD) => State::Tls(Box::default(), BytesMut::new()),
                Some(_) => State::Http(Box::new(head::Reader::new(METHODS))),
            };
        }
        match &mut self.0 {
            State::New => Ok(None),
            State::Tls(acceptor, seen) => {
                let room = HELLO_LIMIT.saturating_sub(seen.len());
                seen.extend_from_slice(bytes);
                let name = hello(acceptor, &bytes[..bytes.len().min(room)])?;
                if name.is_none() && seen.len() > HELLO_LIMIT {
                    return Err(malformed(format_args!(
                        "the ClientHello is larger than {HELLO_LIMIT} bytes"
                    )));
                }
                Ok(name.map(|name| Meant { name, bytes: seen.split().freeze() }))
            }
            State::Http(reader) => {
                let Some(head) = reader.push(bytes)? else { return Ok(None) };
                let name = head::parse(&head.bytes, host)?;
                Ok(Some(Meant { name, bytes: [&head.bytes[..], &head.early].concat().into() }))
            }
        }
    }
}

/// The server name, once the ClientHello has ended.
fn hello(acceptor: &mut Acceptor, mut bytes: &[u8]) -> Result<Option<Name>, Refusal> {
    let no_hello = |why: &dyn std::fmt::Display| malformed(format_args!("no TLS ClientHello: {why}"));
    while !bytes.is_empty() {
        acceptor.read_tls(&mut bytes).map_err(|error| no_hello(&error))?;
        match acceptor.accept() {
            Ok(None) => {}
            Ok(Some(accepted)) => {
                let hello = accepted.client_hello();
                let name = hello.server_name().ok_or_else(|| {
                    malformed("the ClientHello has no server name; ask by the node's name, not its address")
                })?;
                return known(Name::parse(name.as_bytes()).map(Some), name);
            }
            Err((error, _alert)) => return Err(no_hello(&error)),
        }
    }
    Ok(None)
}

/// The host that plain HTTP is for.
fn host(request: &httparse::Request<'_, '_>) -> Result<Name, Refusal> {
    let mut hosts = request.headers.iter().filter(|header| header.name.eq_ignore_ascii_case("host"));
    let (Some(host), None) = (hosts.next(), hosts.next()) else {
        return Err(malformed("one Host is needed, to know which node is meant"));
    };
    let parsed = Target::parse(host.value).map(|target| target.host).or_else(|_| Host::parse(host.value));
    match parsed {
        Ok(Host::Name(name)) => Ok(name),
        Ok(Host::Address(address)) => Err(Refusal::new(
            Reason::UnknownNode,
            format_args!("{address}: ask by the node's name, not its address"),
        )),
        Err(why) => known(Err(why), &String::from_utf8_lossy(host.value)),
    }
}

fn known<T>(parsed: Result<T, crate::target::NotATarget>, text: &str) -> Result<T, Refusal> {
    parsed.map_err(|_| Refusal::new(Reason::UnknownNode, format_args!("{text:?} is no node's name")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rustls::{ClientConfig, ClientConnection, RootCertStore, crypto::aws_lc_rs, pki_types::ServerName};
    use std::sync::Arc;

    /// A ClientHello as a client of ours makes it.
    fn client_hello(name: &str) -> Vec<u8> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let builder =
            ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
        let config = builder.with_root_certificates(RootCertStore::empty()).with_no_client_auth();
        let name = ServerName::try_from(name.to_owned()).unwrap();
        let mut connection = ClientConnection::new(Arc::new(config), name).unwrap();
        let mut bytes = Vec::new();
        connection.write_tls(&mut bytes).unwrap();
        bytes
    }

    fn in_pieces(bytes: &[u8], size: usize) -> Result<Option<Meant>, Refusal> {
        let mut reader = Reader::new();
        let mut pushed = 0;
        for piece in bytes.chunks(size) {
            pushed += piece.len();
            if let Some(Meant { name, bytes: seen }) = reader.push(piece)? {
                let seen = [&seen, &bytes[pushed..]].concat().into();
                return Ok(Some(Meant { name, bytes: seen }));
            }
        }
        Ok(None)
    }

    fn meant(bytes: &[u8]) -> Result<Option<String>, u16> {
        let meant = in_pieces(bytes, bytes.len().max(1)).map_err(|refusal| refusal.reason.code())?;
        Ok(meant.map(|meant| {
            assert_eq!(meant.bytes, bytes, "nothing is opened, nothing is lost");
            meant.name.to_string()
        }))
    }

    #[test]
    fn a_client_hello_in_any_pieces() {
        let hello = client_hello("Node1");
        assert_eq!(meant(&hello), Ok(Some("node1".into())));
        let behind = [&hello[..], &[20, 3, 3, 0, 1, 1]].concat();
        assert_eq!(meant(&behind), Ok(Some("node1".into())));
        for size in [1, 2, 5, 6, 7, 100] {
            assert_eq!(in_pieces(&hello, size), in_pieces(&hello, hello.len()), "{size}");
        }
        for end in 0..hello.len() {
            assert_eq!(in_pieces(&hello[..end], end.max(1)), Ok(None), "{end}");
        }
        // One handshake message in records of 10 bytes each.
        let body: Vec<u8> = hello[5..]
            .chunks(10)
            .flat_map(|part| {
                let length = u16::try_from(part.len()).unwrap().to_be_bytes();
                [&[22, 3, 1], &length[..], part].concat()
            })
            .collect();
        assert_eq!(meant(&body), Ok(Some("node1".into())));
        assert_eq!(in_pieces(&body, 1), in_pieces(&body, body.len()));
    }

    #[test]
    fn what_names_nobody() {
        assert_eq!(meant(&client_hello("10.1.0.1")), Err(400), "an address is no server name");
        assert_eq!(meant(&client_hello("no_de")), Err(404));
        assert_eq!(meant(b"\x16\x03\x01\x00\x04\x02\x00\x00\x00"), Err(400), "a ServerHello");
        assert_eq!(meant(b"\x16\x03\x01\xff\xff\x01"), Err(400), "a record larger than records are");
        assert_eq!(meant(b"\x15\x03\x01\x00\x02\x02\x28"), Err(400), "an alert first");
        // One that never ends: small records, each a part of a message of 60,000 bytes.
        let mut endless = vec![22, 3, 1, 0, 5, 1, 0, 0xea, 0x60, 0];
        while endless.len() <= HELLO_LIMIT {
            endless.extend_from_slice(&[22, 3, 1, 0, 1, 0]);
        }
        assert_eq!(meant(&endless), Err(400));
        assert_eq!(in_pieces(&endless, 1).unwrap_err().reason.code(), 400);
    }

    #[test]
    fn plain_http_by_its_host() {
        for (text, expected) in [
            ("GET / HTTP/1.1\r\nHost: Node1\r\n\r\n", Ok("node1")),
            (
                "POST /x HTTP/1.1\r\nhost: node1.example:10255\r\nContent-Length: 3\r\n\r\nabc",
                Ok("node1.example"),
            ),
            ("GET / HTTP/1.1\r\nHost: 10.1.0.1:80\r\n\r\n", Err(404)),
            ("GET / HTTP/1.1\r\nHost: [fd00::5]\r\n\r\n", Err(404)),
            ("GET / HTTP/1.1\r\nHost: no_de\r\n\r\n", Err(404)),
            ("GET / HTTP/1.1\r\nHost:\r\n\r\n", Err(404)),
            ("GET / HTTP/1.0\r\n\r\n", Err(400)),
            ("GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", Err(400)),
            ("CONNECT node1:1 HTTP/1.1\r\nHost: node1\r\n\r\n", Err(405)),
            ("SSH-2.0-OpenSSH\r\n", Err(400)),
            ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Err(405)),
        ] {
            assert_eq!(meant(text.as_bytes()), expected.map(|name| Some(name.to_owned())), "{text}");
        }
        assert_eq!(meant(b"GET / HTTP/1.1\r\nHost: node1\r\n"), Ok(None));
    }

    proptest! {
        /// Bytes that are almost a ClientHello: never a panic, and the same in pieces.
        #[test]
        fn damaged_hellos(at in 0usize..300, byte in any::<u8>(), cut in 1usize..50) {
            let mut bytes = client_hello("node1");
            let at = at % bytes.len();
            bytes[at] = byte;
            let outcome = |size| in_pieces(&bytes, size).map_err(|refusal| refusal.reason);
            prop_assert_eq!(outcome(cut), outcome(bytes.len()));
        }
    }
}
