//! The head of an HTTP/1 CONNECT: bytes as they come in, a request or a refusal out. Pure and bounded ([`head`]).
//!
//! kube-apiserver sends `CONNECT node1:10250 HTTP/1.1`, one constant `Host` header and an empty line, then waits for a
//! status line that is exactly 200 and for nothing after it. Its header names no target, so only the request line does.

use crate::{head, refusal::Refusal, target::Target};
use bytes::Bytes;

pub use head::{HEAD_LIMIT, READ_LIMIT};

/// The answer once the target's connection stands. Go's client refuses any other code and any byte after it.
pub const ESTABLISHED: &[u8] = b"HTTP/1.1 200 Connection established\r\n\r\n";

/// A CONNECT that can be understood.
#[derive(Debug, PartialEq, Eq)]
pub struct Request {
    /// Where to.
    pub target: Target,
    /// What came after the head and belongs to the target, at most [`READ_LIMIT`] bytes.
    pub early: Bytes,
}

/// What is known after some bytes.
#[derive(Debug, PartialEq, Eq)]
pub enum Progress {
    /// The head has not ended.
    More,
    /// The head has ended; the reader is spent.
    Done(Request),
    /// Answer this and close; the reader is spent.
    Refused(Refusal),
}

/// Collects a head.
pub struct Reader(head::Reader);

impl Default for Reader {
    fn default() -> Self {
        Self::new()
    }
}

impl Reader {
    /// A reader that has seen nothing.
    pub fn new() -> Self {
        Self(head::Reader::new(&["CONNECT"]))
    }

    /// Takes the next bytes, at most [`READ_LIMIT`] of them.
    pub fn push(&mut self, bytes: &[u8]) -> Progress {
        let head = match self.0.push(bytes) {
            Ok(Some(head)) => head,
            Ok(None) => return Progress::More,
            Err(refusal) => return Progress::Refused(refusal),
        };
        match head::parse(&head.bytes, target) {
            Ok(target) => Progress::Done(Request { target, early: head.early }),
            Err(refusal) => Progress::Refused(refusal),
        }
    }

    /// The request line as far as it came, escaped and cut short, for the audit line of a refusal.
    pub fn request_line(&self) -> String {
        self.0.request_line()
    }
}

/// What a CONNECT asks for.
///
/// # Errors
/// When that is no target.
pub fn target(request: &httparse::Request<'_, '_>) -> Result<Target, Refusal> {
    head::no_content(request)?;
    Ok(Target::parse(request.path.unwrap_or_default().as_bytes())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::Escaped;
    use proptest::prelude::*;

    fn all_at_once(bytes: &[u8]) -> Progress {
        Reader::new().push(bytes)
    }

    /// Pushes pieces until something is decided; what is left goes behind the early bytes, as the socket would have it.
    fn in_pieces(bytes: &[u8], sizes: &[usize]) -> Progress {
        let mut reader = Reader::new();
        let mut rest = bytes;
        let mut sizes = sizes.iter().copied().cycle();
        while !rest.is_empty() {
            let size = sizes.next().unwrap_or(1).clamp(1, rest.len());
            let (piece, after) = rest.split_at(size);
            rest = after;
            match reader.push(piece) {
                Progress::More => {}
                Progress::Done(request) => {
                    let early = [&request.early[..], rest].concat().into();
                    return Progress::Done(Request { early, ..request });
                }
                refused => return refused,
            }
        }
        Progress::More
    }

    fn refused(bytes: &[u8]) -> (u16, String) {
        match all_at_once(bytes) {
            Progress::Refused(refusal) => (refusal.reason.code(), refusal.to_string()),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_kube_apiserver_sends() {
        let bytes = b"CONNECT 10.20.1.2:10250 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n";
        let target = "10.20.1.2:10250".parse().unwrap();
        assert_eq!(all_at_once(bytes), Progress::Done(Request { target, early: Bytes::new() }));
    }

    #[test]
    fn what_others_send() {
        let table: [(&[u8], &str, &[u8]); 6] = [
            (b"CONNECT node2:10250 HTTP/1.1\r\nHost: node2:10250\r\nUser-Agent: Go-http-client/1.1\r\n\r\n", "node2:10250", b""),
            (b"CONNECT Node2:10250 HTTP/1.0\r\n\r\n", "node2:10250", b""),
            (b"CONNECT [fd00::5]:10250 HTTP/1.1\nHost: x\n\n", "[fd00::5]:10250", b""),
            (b"CONNECT a:1 HTTP/1.1\r\nContent-Length: 0\r\n\r\n\x16\x03\x01", "a:1", b"\x16\x03\x01"),
            (b"CONNECT a:1 HTTP/1.1\r\n\r\n\r\n\r\n", "a:1", b"\r\n\r\n"),
            (b"CONNECT a:1 HTTP/1.1\r\n\r\nCONNECT b:2 HTTP/1.1\r\n\r\n", "a:1", b"CONNECT b:2 HTTP/1.1\r\n\r\n"),
        ];
        for (bytes, target, early) in table {
            let request = Request { target: target.parse().unwrap(), early: early.into() };
            assert_eq!(all_at_once(bytes), Progress::Done(request), "{}", Escaped::new(bytes));
        }
    }

    #[test]
    fn what_is_refused() {
        let table: [(&[u8], u16); 17] = [
            (b"GET / HTTP/1.1\r\n\r\n", 405),
            (b"GET http://node1:10255/metrics HTTP/1.1\r\n", 405),
            (b"connect node1:10250 HTTP/1.1\r\n\r\n", 405),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 405),
            (b"CONNECT node1:10250 HTTP/2.0\r\n\r\n", 400),
            (b"CONNECT node1 HTTP/1.1\r\n\r\n", 400),
            (b"CONNECT fd00::5:10250 HTTP/1.1\r\n\r\n", 400),
            (b"CONNECT http://node1:10250/ HTTP/1.1\r\n\r\n", 400),
            (b"CONNECT  node1:10250 HTTP/1.1\r\n\r\n", 400),
            (b"CONNECT node1:10250\r\n\r\n", 400),
            (b"CONNECT node1:10250 HTTP/1.1\r\nno colon\r\n\r\n", 400),
            (b"CONNECT node1:10250 HTTP/1.1\r\nHost: a\r\n b\r\n\r\n", 400),
            (b"CONNECT a:1 HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
            (b"CONNECT a:1 HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello", 400),
            (b"\x16\x03\x01\x02\x00", 400),
            (b"\r\nCONNECT a:1 HTTP/1.1\r\n\r\n", 400),
            (b" ", 400),
        ];
        for (bytes, code) in table {
            let (got, says) = refused(bytes);
            assert_eq!(got, code, "{}: {says}", Escaped::new(bytes));
        }
        assert_eq!(refused(&[b'A'; 100]).0, 400);
    }

    #[test]
    fn sixty_four_kilobytes_of_headers_are_refused_at_sixteen() {
        let mut head = b"CONNECT node1:10250 HTTP/1.1\r\n".to_vec();
        while head.len() < 64 * 1024 {
            head.extend_from_slice(b"X-Padding: abcdefghijklmnopqrstuvwxyz\r\n");
        }
        assert_eq!(refused(&head).0, 431);
        assert_eq!(in_pieces(&head, &[1]), all_at_once(&head));
        // One byte more or less than the limit, whatever comes behind.
        for (padding, fits) in [(0, true), (1, false)] {
            let mut head = b"CONNECT node1:10250 HTTP/1.1\r\nX: ".to_vec();
            head.resize(HEAD_LIMIT - 4 + padding, b'x');
            head.extend_from_slice(b"\r\n\r\nearly");
            assert_eq!(matches!(all_at_once(&head), Progress::Done(_)), fits);
            assert_eq!(in_pieces(&head, &[1000]), all_at_once(&head));
        }
        let many = ["CONNECT a:1 HTTP/1.1\r\n", &"A: b\r\n".repeat(101), "\r\n"].concat();
        assert_eq!(refused(many.as_bytes()).0, 431);
    }

    #[test]
    fn the_audit_line_gets_the_request_line() {
        let mut reader = Reader::new();
        assert!(matches!(
            reader.push(b"CONNECT no\x00de HTTP/1.1\r\nHost: secret\r\n\r\n"),
            Progress::Refused(_)
        ));
        assert_eq!(reader.request_line(), "CONNECT no\\x00de HTTP/1.1");
    }

    /// Bytes that are almost a CONNECT.
    fn almost() -> impl Strategy<Value = Vec<u8>> {
        let piece = prop_oneof![
            Just(b"CONNECT ".to_vec()),
            Just(b"node1:10250".to_vec()),
            Just(b" HTTP/1.1".to_vec()),
            Just(b"\r\n".to_vec()),
            Just(b"\n".to_vec()),
            Just(b"\r".to_vec()),
            Just(b"Host: x".to_vec()),
            proptest::collection::vec(any::<u8>(), 0..4),
        ];
        let tail = proptest::collection::vec(piece, 0..8).prop_map(|pieces| pieces.concat());
        (any::<bool>(), tail).prop_map(|(line, tail)| {
            let start: &[u8] = if line { b"CONNECT a:1 HTTP/1.1\r\n" } else { b"" };
            [start, &tail].concat()
        })
    }

    proptest! {
        /// However the network cuts the bytes, the outcome is the same.
        #[test]
        fn pieces_make_no_difference(bytes in almost(), sizes in proptest::collection::vec(1usize..9, 1..5)) {
            prop_assert_eq!(in_pieces(&bytes, &sizes), all_at_once(&bytes));
        }
    }
}
