//! The head of a target's answer as the scraper is to see it: without what was meant for the connection to us, and with
//! the word that ours closes. Pure.

use super::{connection, is_hop_by_hop, request::VIA, write};
use crate::head::HEADERS_LIMIT;

/// The largest head of an answer that is read, bytes.
pub const HEAD_LIMIT: usize = 16 * 1024;

/// What the first bytes of an answer are.
#[derive(Debug, PartialEq, Eq)]
pub enum Seen {
    /// The head has not ended.
    More,
    /// An interim answer (1xx) of this length, of which nothing is passed on.
    Interim(usize),
    /// A head of this length, and what to write in its place.
    Head(usize, Vec<u8>),
    /// No HTTP/1: passed on as it is, so that the scraper sees it for what it is.
    Foreign,
}

/// Looks at what has come so far.
pub fn read(bytes: &[u8]) -> Seen {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_LIMIT];
    let mut response = httparse::Response::new(&mut headers);
    let length = match response.parse(bytes) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) if bytes.len() < HEAD_LIMIT => return Seen::More,
        Ok(httparse::Status::Partial) | Err(_) => return Seen::Foreign,
    };
    let (version, code) = (response.version.unwrap_or_default(), response.code.unwrap_or_default());
    if (100..200).contains(&code) && code != 101 {
        return Seen::Interim(length);
    }
    let reason = response.reason.unwrap_or_default();
    let mut head = format!("HTTP/1.{version} {code} {reason}\r\n").into_bytes();
    let named = connection(response.headers);
    for header in response.headers.iter().filter(|header| !is_hop_by_hop(header.name, &named)) {
        write(&mut head, header);
    }
    head.extend_from_slice(format!("Via: 1.{version} {VIA}\r\nConnection: close\r\n\r\n").as_bytes());
    Seen::Head(length, head)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn heads() {
        let answer = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nKeep-Alive: timeout=5\r\nTransfer-Encoding: chunked\r\n\
                       Connection: keep-alive, X-Mine\r\nX-Mine: 1\r\nProxy-Authenticate: Basic\r\n\r\nbody";
        let expected = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\
                        Via: 1.1 edge-tunnel\r\nConnection: close\r\n\r\n";
        assert_eq!(read(answer), Seen::Head(answer.len() - 4, expected.into()));
        for end in 0..answer.len() - 4 {
            assert_eq!(read(&answer[..end]), Seen::More, "{end}");
        }
        assert_eq!(read(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/"), Seen::Interim(37));
        for foreign in [&b"SSH-2.0-OpenSSH\r\n"[..], b"\x15\x03\x01", b"HTTP/2.0 200 OK\r\n\r\n"] {
            assert_eq!(read(foreign), Seen::Foreign);
        }
        assert_eq!(read(&[b"HTTP/1.1 200 OK\r\nA: ", &[b'a'; HEAD_LIMIT][..]].concat()), Seen::Foreign);
    }

    proptest! {
        #[test]
        fn a_head_stays_one_head(line in "HTTP/1.[01] [1-9][0-9]{2}( [ -~]{0,8})?", name in "[A-Za-z]{1,8}", value in "[ -~]{0,8}") {
            let answer = format!("{line}\r\n{name}: {value}\r\n\r\n");
            if let Seen::Head(length, head) = read(answer.as_bytes()) {
                prop_assert_eq!(length, answer.len());
                prop_assert!(matches!(read(&head), Seen::Head(again, _) if again == head.len()));
            }
        }
    }
}
