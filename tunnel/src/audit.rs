//! The audit line: one per stream, written by the server when the stream ends; where two replicas are on its way, both.
//!
//! It says who reached what through which node, and how that ended; never what was said. Bytes that came from outside
//! are escaped, so that no caller writes a line of its own into the log.

use crate::{hello::Id, refusal::Refusal};
use std::{fmt, time::Duration};

/// Bytes from outside, shown as printable ASCII on one line: everything else as `\n`, `\t` or `\xNN`.
#[derive(Clone, Copy)]
pub struct Escaped<'a> {
    bytes: &'a [u8],
    backslash: bool,
}

impl<'a> Escaped<'a> {
    /// Shows these bytes so that they can be told: a backslash is shown as two.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, backslash: true }
    }

    /// Shows a sentence that may hold escaped bytes already: a backslash stays one, and doing it twice changes nothing.
    pub fn sentence(text: &'a str) -> Self {
        Self { bytes: text.as_bytes(), backslash: false }
    }
}

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for &byte in self.bytes {
            match byte {
                b'\\' if self.backslash => f.write_str("\\\\")?,
                b' '..=b'~' => write!(f, "{}", byte as char)?,
                _ => write!(f, "{}", std::ascii::escape_default(byte))?,
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// How a stream ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// Both sides said all they had to say.
    Finished,
    /// It never began.
    Refused(Refusal),
    /// It was cut: by whom or what, in a word or two (`caller`, `node`, `session lost`, `stalled`, `drain`).
    Reset(&'static str),
}

/// `finished`, the refusal's reason word, or `reset: WHAT`.
impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Finished => f.write_str("finished"),
            Self::Refused(refusal) => write!(f, "{refusal}"),
            Self::Reset(what) => write!(f, "reset: {what}"),
        }
    }
}

/// What is known about a stream when it ends.
#[derive(Debug, Clone)]
pub struct Audit<'a> {
    /// The certificate's name, or `unix` on the socket.
    pub caller: &'a str,
    /// The node it went to; none for direct targets and refusals before that was known.
    pub node: Option<&'a str>,
    /// The target as it was understood, or the bytes of the request target where it was not.
    pub target: &'a str,
    /// Bytes from the caller to the target.
    pub bytes_in: u64,
    /// Bytes from the target to the caller.
    pub bytes_out: u64,
    /// From the request to the end.
    pub duration: Duration,
    /// How it ended.
    pub end: &'a End,
}

impl Audit<'_> {
    /// Writes the line, at level `info` and target `audit`.
    pub fn write(&self) {
        log::info!(target: "audit", "{self}");
    }

    /// Writes the line of a stream whose caller called another replica, which writes one too: its name comes last.
    pub fn write_via(&self, replica: &Id) {
        log::info!(target: "audit", "{self} via={replica}");
    }
}

/// `stream caller=… node=… target=… bytes_in=… bytes_out=… seconds=… end=…`, one line.
impl fmt::Display for Audit<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "stream caller={} node={} target={} bytes_in={} bytes_out={} seconds={:.3} end={}",
            Word(self.caller),
            Word(self.node.unwrap_or("-")),
            Word(self.target),
            self.bytes_in,
            self.bytes_out,
            self.duration.as_secs_f64(),
            Word(&self.end.to_string()),
        )
    }
}

/// A value of the line: as it is where it is one plain word, else quoted and escaped, so that a line splits in one way.
struct Word<'a>(&'a str);

impl fmt::Display for Word<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plain = |byte: u8| byte.is_ascii_graphic() && !matches!(byte, b'"' | b'\\' | b'=');
        if !self.0.is_empty() && self.0.bytes().all(plain) {
            return f.write_str(self.0);
        }
        let text = Escaped::new(self.0.as_bytes()).to_string();
        write!(f, "\"{}\"", text.replace('"', "\\\""))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::refusal::Reason;
    use proptest::prelude::*;

    #[test]
    fn a_line_says_who_what_where_and_how() {
        let audit = Audit {
            caller: "kube-apiserver",
            node: Some("node1"),
            target: "node1:10250",
            bytes_in: 12,
            bytes_out: 3456,
            duration: Duration::from_millis(1234),
            end: &End::Finished,
        };
        assert_eq!(
            audit.to_string(),
            "stream caller=kube-apiserver node=node1 target=node1:10250 bytes_in=12 bytes_out=3456 seconds=1.234 \
             end=finished"
        );
        let end = End::Refused(Refusal::new(Reason::UnknownNode, "there is no node \"x\""));
        let audit = Audit { node: None, caller: "CN=evil name=\"x\"\n", end: &end, ..audit };
        assert_eq!(
            audit.to_string(),
            "stream caller=\"CN=evil name=\\\"x\\\"\\n\" node=- target=node1:10250 bytes_in=12 bytes_out=3456 \
             seconds=1.234 end=\"unknown-node: there is no node \\\"x\\\"\""
        );
    }

    proptest! {
        #[test]
        fn bytes_from_outside_stay_on_their_line(bytes in any::<Vec<u8>>()) {
            let text = Escaped::new(&bytes).to_string();
            prop_assert!(text.bytes().all(|byte| (b' '..=b'~').contains(&byte)), "{text}");
        }
    }
}
