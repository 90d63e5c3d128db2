//! Where the head of an HTTP/1 request ends: bytes as they come in, a whole head or a refusal out. Pure and bounded.
//!
//! Anyone who reaches a listener may send anything: nothing here reads a byte twice, however small the pieces come, and
//! a head is parsed (by httparse) once, when its end is seen. Garbage is refused at its first byte. What a head means is
//! read in [`crate::connect`] and [`crate::proxy::request`].

use crate::{
    audit::Escaped,
    refusal::{Reason, Refusal},
};
use bytes::{Bytes, BytesMut};
use std::fmt;

/// The largest head, from the method to the empty line, bytes.
pub const HEAD_LIMIT: usize = 16 * 1024;

/// How many bytes to read at most at once: together with the rule that one read may hold both the end of the head and
/// bytes after it, this bounds [`Head::early`].
pub const READ_LIMIT: usize = 16 * 1024;

/// How many headers a head may have.
pub const HEADERS_LIMIT: usize = 100;

/// The longest method that is read to its end, to name it in the refusal.
const METHOD_LIMIT: usize = 24;

/// The longest request line that is shown, bytes.
const SHOWN_LIMIT: usize = 200;

/// A head that has ended.
#[derive(PartialEq, Eq)]
pub struct Head {
    /// From the method to the empty line.
    pub bytes: Bytes,
    /// What came after it, at most [`READ_LIMIT`] bytes.
    pub early: Bytes,
}

/// Collects a head.
pub struct Reader {
    methods: &'static [&'static str],
    bytes: BytesMut,
    /// Where the search for the head's end goes on.
    searched: usize,
    /// The method has been seen to its end, and is one of ours.
    method: bool,
}

impl Reader {
    /// A reader that has seen nothing and understands these methods.
    pub fn new(methods: &'static [&'static str]) -> Self {
        Self { methods, bytes: BytesMut::new(), searched: 0, method: false }
    }

    /// Takes the next bytes, at most [`READ_LIMIT`] of them. None: the head has not ended. Once it has, or was refused,
    /// the reader is spent.
    ///
    /// # Errors
    /// What to answer before closing.
    pub fn push(&mut self, bytes: &[u8]) -> Result<Option<Head>, Refusal> {
        self.bytes.extend_from_slice(bytes);
        if !self.method {
            self.method = judge_method(&self.bytes, self.methods)?;
        }
        let end = self.end();
        if end.unwrap_or(self.bytes.len()) > HEAD_LIMIT {
            return Err(Reason::HeaderTooLarge.into());
        }
        let Some(end) = end else { return Ok(None) };
        let whole = self.bytes.clone().freeze();
        Ok(Some(Head { bytes: whole.slice(..end), early: whole.slice(end..) }))
    }

    /// The request line as far as it came, for the audit line of a refusal.
    pub fn request_line(&self) -> String {
        let line = self.bytes[..].split(|&byte| byte == b'\r' || byte == b'\n').next().unwrap_or_default();
        shown(line)
    }

    /// Finds the empty line: where the head ends, that line included.
    fn end(&mut self) -> Option<usize> {
        while let Some(found) = self.bytes[self.searched..].iter().position(|&byte| byte == b'\n') {
            let next = self.searched + found + 1;
            match self.bytes[next..] {
                [b'\n', ..] => return Some(next + 1),
                [b'\r', b'\n', ..] => return Some(next + 2),
                // Not known yet: look at this line end again when more has come.
                [] | [b'\r'] => {
                    self.searched = next - 1;
                    return None;
                }
                _ => self.searched = next,
            }
        }
        self.searched = self.bytes.len();
        None
    }
}

/// A request line, escaped and cut short, without what may be secret in it: a user and password before an `@`, and
/// whatever follows a `?`.
fn shown(line: &[u8]) -> String {
    let end = line.iter().position(|&byte| byte == b'?').unwrap_or(line.len());
    let line = &line[..end];
    let Some(at) = line.iter().rposition(|&byte| byte == b'@') else {
        return Escaped::new(&line[..line.len().min(SHOWN_LIMIT)]).to_string();
    };
    let method = line[..at].iter().position(|&byte| byte == b' ').unwrap_or(0);
    let after = &line[at..line.len().min(at + SHOWN_LIMIT)];
    format!("{} ***{}", Escaped::new(&line[..method.min(METHOD_LIMIT)]), Escaped::new(after))
}

/// Judges the method as early as it can be: TLS and other garbage need not wait for the end of a head.
fn judge_method(bytes: &[u8], methods: &[&str]) -> Result<bool, Refusal> {
    let length = bytes.iter().position(|&byte| !is_token(byte)).unwrap_or(bytes.len());
    if length > METHOD_LIMIT {
        return Err(Refusal::new(Reason::Malformed, "what came is not an HTTP request"));
    }
    match bytes.get(length) {
        None => Ok(false),
        Some(b' ') if methods.iter().any(|method| method.as_bytes() == &bytes[..length]) => Ok(true),
        Some(b' ') if length > 0 => {
            let (method, known) = (Escaped::new(&bytes[..length]), methods.join(", "));
            Err(Refusal::new(Reason::Method, format_args!("{method} is not understood here, only {known}")))
        }
        Some(0x16) if length == 0 => {
            Err(Refusal::new(Reason::Malformed, "a TLS handshake came where HTTP was expected"))
        }
        Some(_) => Err(Refusal::new(Reason::Malformed, "what came is not an HTTP request")),
    }
}

/// A letter of an HTTP token (RFC 9110, 5.6.2).
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// A `malformed` refusal.
pub fn malformed(why: impl fmt::Display) -> Refusal {
    Refusal::new(Reason::Malformed, why)
}

/// Parses a whole head, and lets `read` make something of it.
///
/// # Errors
/// Why it is none, or what `read` says.
pub fn parse<T>(
    head: &[u8],
    read: impl FnOnce(&httparse::Request<'_, '_>) -> Result<T, Refusal>,
) -> Result<T, Refusal> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_LIMIT];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(head) {
        Ok(httparse::Status::Complete(length)) if length == head.len() => {}
        Ok(_) => return Err(malformed("the head does not end where its empty line is")),
        Err(httparse::Error::TooManyHeaders) => {
            return Err(Refusal::new(Reason::HeaderTooLarge, "more than 100 headers"));
        }
        Err(error) => return Err(malformed(error)),
    }
    read(&request)
}

/// Refuses content. A CONNECT has none (RFC 9110, 9.3.6) and a GET none that means anything: a caller that means
/// something else must not be left in that belief.
///
/// # Errors
/// `malformed`.
pub fn no_content(request: &httparse::Request<'_, '_>) -> Result<(), Refusal> {
    let content = request.headers.iter().any(|header| {
        header.name.eq_ignore_ascii_case("transfer-encoding")
            || (header.name.eq_ignore_ascii_case("content-length") && header.value != b"0")
    });
    let method = request.method.unwrap_or_default();
    if content { Err(malformed(format_args!("a {method} has no content"))) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_secret_in_a_request_line_is_not_shown() {
        for (line, expected) in [
            ("CONNECT no\0de HTTP/1.1", "CONNECT no\\x00de HTTP/1.1"),
            ("GET http://ann:p@ss@node1:9100/metrics?a=b HTTP/1.1", "GET ***@node1:9100/metrics"),
            ("CONNECT ann:pass@node1:1 HTTP/1.1", "CONNECT ***@node1:1 HTTP/1.1"),
            ("GET http://node1/metrics?token=x HTTP/1.1", "GET http://node1/metrics"),
            ("@", " ***@"),
        ] {
            assert_eq!(shown(line.as_bytes()), expected);
        }
        assert!(shown(&[b'@'; 9999]).len() < 300);
    }
}
