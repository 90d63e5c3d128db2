//! Why something is refused: one table of codes and words.
//!
//! A refusal is the same everywhere it shows: the status line that kubectl prints, the `reason` label of
//! `edge_tunnel_refused_total`, the audit line, and the answer of an agent over the carrier. All of them are made here.

use crate::audit::Escaped;
use std::fmt;

/// The longest sentence that is sent, bytes. kubectl shows it on one line.
const SENTENCE_LIMIT: usize = 400;

/// The reason words of the interface, each with the one status code it goes with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    /// 400: no port, bad address, not HTTP/1.x.
    Malformed,
    /// 403: the agent's allow-list does not let this in.
    DeniedByAgent,
    /// 403: neither a node nor inside a `--direct-cidr`.
    DeniedByServer,
    /// 403: the port is not in the proxy user's list.
    ForbiddenPort,
    /// 404: no such node, or a name that is no node and does not resolve.
    UnknownNode,
    /// 405: not CONNECT.
    Method,
    /// 407: proxy user missing or wrong.
    Auth,
    /// 409: several nodes claim the address.
    AmbiguousAddress,
    /// 429: a cap is reached.
    TooMany,
    /// 431: the head is larger than [`crate::connect::HEAD_LIMIT`].
    HeaderTooLarge,
    /// 502: the port on the node refused the connection.
    Refused,
    /// 502: no route to the target.
    Unreachable,
    /// 503: this server is going away.
    Draining,
    /// 503: the node is known, and no agent of it is connected.
    NoSession,
    /// 504: the agent did not answer.
    AgentTimeout,
    /// 504: the target did not answer.
    Timeout,
    /// A stream, reset: its reader stood still while others needed its window.
    Stalled,
}

impl Reason {
    /// Every reason there is, in the order of the table.
    pub const ALL: [Self; 17] = [
        Self::Malformed,
        Self::DeniedByAgent,
        Self::DeniedByServer,
        Self::ForbiddenPort,
        Self::UnknownNode,
        Self::Method,
        Self::Auth,
        Self::AmbiguousAddress,
        Self::TooMany,
        Self::HeaderTooLarge,
        Self::Refused,
        Self::Unreachable,
        Self::Draining,
        Self::NoSession,
        Self::AgentTimeout,
        Self::Timeout,
        Self::Stalled,
    ];

    /// The word in status line, log and metric.
    pub const fn word(self) -> &'static str {
        self.row().1
    }

    /// The HTTP status code. [`Reason::Stalled`] has none on the wire, it is a reset of a stream that stands; 500
    /// stands in for it.
    pub const fn code(self) -> u16 {
        self.row().0
    }

    /// What to say when nobody knew more.
    pub const fn sentence(self) -> &'static str {
        self.row().2
    }

    /// The reason with this word, as an agent or a replica sends it.
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.word() == word)
    }

    const fn row(self) -> (u16, &'static str, &'static str) {
        match self {
            Self::Malformed => (400, "malformed", "the request cannot be understood"),
            Self::DeniedByAgent => (403, "denied-by-agent", "the agent's --allow list does not let this in"),
            Self::DeniedByServer => (403, "denied-by-server", "neither a node nor inside a --direct-cidr"),
            Self::ForbiddenPort => (403, "forbidden-port", "this user may not reach that port"),
            Self::UnknownNode => (404, "unknown-node", "no node has this name"),
            Self::Method => (405, "method", "only CONNECT is understood here"),
            Self::Auth => (407, "auth", "user or password is missing or wrong"),
            Self::AmbiguousAddress => (409, "ambiguous-address", "several nodes claim this address"),
            Self::TooMany => (429, "too-many", "too many connections at once"),
            Self::HeaderTooLarge => (431, "header-too-large", "the head is larger than 16 KiB"),
            Self::Refused => (502, "refused", "the port on the node refused the connection"),
            Self::Unreachable => (502, "unreachable", "there is no route to the target"),
            Self::Draining => (503, "draining", "this server is going away; try again"),
            Self::NoSession => (503, "no-session", "no agent of this node is connected"),
            Self::AgentTimeout => (504, "agent-timeout", "the agent of this node did not answer in time"),
            Self::Timeout => (504, "timeout", "the target did not answer in time"),
            Self::Stalled => (500, "stalled", "nothing was read for long while others needed the room"),
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// A reason and one sentence for the person who asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// What the sentence is a case of.
    pub reason: Reason,
    sentence: Box<str>,
}

impl Refusal {
    /// A refusal with its sentence. Whatever is in it is sent as at most 400 bytes of printable ASCII.
    pub fn new(reason: Reason, sentence: impl fmt::Display) -> Self {
        let mut text = Escaped::sentence(&sentence.to_string()).to_string();
        text.truncate(SENTENCE_LIMIT);
        Self { reason, sentence: text.into() }
    }

    /// What an agent said. It may only say what it can know: a word from a later version, or one that is the server's
    /// to say (a hostile agent's `auth` would make kube-apiserver look for a password), counts as `unreachable`, with
    /// its sentence kept.
    pub fn from_agent(word: &str, sentence: &str) -> Self {
        let reason = match Reason::from_word(word) {
            Some(
                reason @ (Reason::Malformed
                | Reason::DeniedByAgent
                | Reason::Refused
                | Reason::Unreachable
                | Reason::Timeout
                | Reason::TooMany
                | Reason::Draining),
            ) => reason,
            _ => Reason::Unreachable,
        };
        if sentence.is_empty() { reason.into() } else { Self::new(reason, sentence) }
    }

    /// What another replica said: anything this one could say itself. A word from a later version counts as
    /// `unreachable`.
    pub fn from_peer(word: &str, sentence: &str) -> Self {
        let reason = Reason::from_word(word).unwrap_or(Reason::Unreachable);
        if sentence.is_empty() { reason.into() } else { Self::new(reason, sentence) }
    }

    /// The sentence: printable ASCII, at most 400 bytes, without the reason's word.
    pub fn sentence(&self) -> &str {
        &self.sentence
    }

    /// The whole answer to an HTTP/1 caller, after which the connection is closed.
    pub fn response(&self) -> Vec<u8> {
        let body = format!("{self}\n");
        let challenge = match self.reason {
            Reason::Auth => "Proxy-Authenticate: Basic realm=\"edge-tunnel\"\r\n",
            Reason::Method => "Allow: CONNECT\r\n",
            _ => "",
        };
        format!(
            "HTTP/1.1 {} {self}\r\n{challenge}Content-Type: text/plain\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
            self.reason.code(),
            body.len(),
        )
        .into_bytes()
    }
}

impl From<Reason> for Refusal {
    fn from(reason: Reason) -> Self {
        Self { reason, sentence: reason.sentence().into() }
    }
}

/// `reason: sentence`, as in status line, body and log.
impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.reason, self.sentence)
    }
}

impl std::error::Error for Refusal {}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_table_is_the_interface() {
        // tunnel-interface.md, row by row.
        let rows: [(u16, &[&str]); 11] = [
            (400, &["malformed"]),
            (405, &["method"]),
            (431, &["header-too-large"]),
            (407, &["auth"]),
            (403, &["forbidden-port", "denied-by-server", "denied-by-agent"]),
            (404, &["unknown-node"]),
            (409, &["ambiguous-address"]),
            (429, &["too-many"]),
            (502, &["refused", "unreachable"]),
            (503, &["no-session", "draining"]),
            (504, &["timeout", "agent-timeout"]),
        ];
        let words: usize = rows.iter().map(|(_, words)| words.len()).sum();
        assert_eq!(words + 1, Reason::ALL.len(), "and stalled, which is a reset");
        for (code, words) in rows {
            for word in words {
                assert_eq!(Reason::from_word(word).map(Reason::code), Some(code), "{word}");
            }
        }
        assert_eq!(Reason::from_word("stalled"), Some(Reason::Stalled));
        assert_eq!(Reason::from_word(""), None);
    }

    #[test]
    fn the_answer_is_http() {
        let answer = Refusal::new(Reason::NoSession, "no agent of node1 is connected").response();
        assert_eq!(
            String::from_utf8(answer).unwrap(),
            "HTTP/1.1 503 no-session: no agent of node1 is connected\r\nContent-Type: text/plain\r\n\
             Content-Length: 43\r\nConnection: close\r\n\r\nno-session: no agent of node1 is connected\n"
        );
        let answer = String::from_utf8(Refusal::from(Reason::Auth).response()).unwrap();
        assert!(answer.contains("\r\nProxy-Authenticate: Basic realm=\"edge-tunnel\"\r\n"), "{answer}");
    }

    #[test]
    fn an_agent_says_what_it_can_know_and_no_more() {
        let refusal = Refusal::from_agent("moved-to-mars", "ask again\r\nthere");
        assert_eq!(refusal.to_string(), "unreachable: ask again\\r\\nthere");
        assert_eq!(Refusal::from_agent("auth", "password?").to_string(), "unreachable: password?");
        assert_eq!(Refusal::from_agent("refused", ""), Reason::Refused.into());
    }

    proptest! {
        /// Nothing a caller or a hostile agent writes can end the status line or add a header.
        #[test]
        fn one_status_line_whatever_the_sentence(sentence in any::<String>(), which in 0..Reason::ALL.len()) {
            let refusal = Refusal::new(Reason::ALL[which], &sentence);
            let answer = refusal.response();
            let mut headers = [httparse::EMPTY_HEADER; 8];
            let mut parsed = httparse::Response::new(&mut headers);
            let head = parsed.parse(&answer).unwrap().unwrap();
            prop_assert_eq!(parsed.code, Some(refusal.reason.code()));
            let phrase = refusal.to_string();
            prop_assert_eq!(parsed.reason, Some(phrase.as_str()));
            prop_assert!(parsed.headers.len() <= 4);
            let body = phrase + "\n";
            prop_assert_eq!(&answer[head..], body.as_bytes());
        }
    }
}
