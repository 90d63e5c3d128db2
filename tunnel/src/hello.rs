//! What an agent says of itself when a connection is made, and what the server answers. Pure, bounded, fuzzed.
//!
//! Both are sent once, inside TLS, before the first byte of HTTP/2: the agent's [`Hello`] right after its handshake,
//! then the server's [`Answer`]. Either is a frame
//!
//! ```text
//! "etun"  length: u16, big endian, at most 1024   that many bytes of "key=value\n" lines
//! ```
//!
//! Values are 1 to 64 (a sentence: 400) printable characters. Unknown keys are skipped, so that later versions can say
//! more; a key said twice is an error. The hello names no node: only the certificate does.

use crate::audit::Escaped;
use std::fmt;

/// The four bytes a frame begins with.
pub const MAGIC: &[u8; 4] = b"etun";

/// Bytes before the body: [`MAGIC`] and the length.
pub const HEADER: usize = 6;

/// The largest body, bytes.
pub const BODY_LIMIT: usize = 1024;

/// The version of what follows the hello. Both ends must speak the same.
pub const VERSION: u16 = 1;

/// The longest value of a key other than a sentence.
const VALUE_LIMIT: usize = 64;

/// The longest sentence.
const SENTENCE_LIMIT: usize = 400;

/// A word one end chose at random to be known by: letters, digits, `-`, `_` and `.`, 1 to 64 of them.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Id(Box<str>);

impl Id {
    /// Checks an id.
    ///
    /// # Errors
    /// [`NotAHello::Value`] when it is empty, too long or has other characters.
    pub fn parse(text: &str) -> Result<Self, NotAHello> {
        let letter = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        let good = (1..=VALUE_LIMIT).contains(&text.len()) && text.bytes().all(letter);
        if good { Ok(Self(text.into())) } else { Err(NotAHello::Value) }
    }

    /// An id nobody else has: 128 random bits.
    pub fn random(random: &mut fastrand::Rng) -> Self {
        Self(format!("{:032x}", random.u128(..)).into())
    }

    /// The id's text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// The first connection of a session.
    Session,
    /// One more for a session that has work; joins only where that session is.
    Extra,
    /// `edge-tunnel doctor`: answered like a session, never registered.
    Probe,
}

impl Role {
    const WORDS: [(Self, &'static str); 3] =
        [(Self::Session, "session"), (Self::Extra, "extra"), (Self::Probe, "probe")];
}

/// An agent introduces a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// This run of the agent: new after each of its starts.
    pub instance: Id,
    /// The session the connection begins or joins.
    pub session: Id,
    /// What the connection is for.
    pub role: Role,
}

impl Hello {
    /// The frame to send.
    pub fn encode(&self) -> Vec<u8> {
        let role = word(&Role::WORDS, self.role);
        frame(&[
            ("version", &VERSION.to_string()),
            ("instance", self.instance.as_str()),
            ("session", self.session.as_str()),
            ("role", role),
        ])
    }

    /// Reads a frame's body.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(body: &[u8]) -> Result<Self, NotAHello> {
        let pairs = Pairs::new(body)?;
        pairs.version()?;
        Ok(Self {
            instance: Id::parse(pairs.required("instance")?)?,
            session: Id::parse(pairs.required("session")?)?,
            role: meaning(&Role::WORDS, pairs.required("role")?).ok_or(NotAHello::Value)?,
        })
    }
}

/// Why a connection is turned away. All but the first three are worth another try elsewhere or later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TurnedAway {
    /// The certificate's node is not in the server's list of nodes.
    UnknownNode,
    /// The other end speaks another version of this protocol.
    Version,
    /// The hello cannot be understood.
    Malformed,
    /// This replica has a good session of the same agent already.
    Duplicate,
    /// An extra connection for a session that is not here.
    NotHere,
    /// The session has as many connections as it may have, or the server as many as it can hold.
    TooMany,
    /// The server is going away.
    Draining,
    /// The server has not loaded its list of nodes yet.
    NotReady,
}

impl TurnedAway {
    const WORDS: [(Self, &'static str); 8] = [
        (Self::UnknownNode, "unknown-node"),
        (Self::Version, "version"),
        (Self::Malformed, "malformed"),
        (Self::Duplicate, "duplicate"),
        (Self::NotHere, "not-here"),
        (Self::TooMany, "too-many"),
        (Self::Draining, "draining"),
        (Self::NotReady, "not-ready"),
    ];

    /// The word on the wire and in the log.
    pub fn word(self) -> &'static str {
        word(&Self::WORDS, self)
    }
}

/// What the server says to a hello.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// HTTP/2 follows.
    Welcome {
        /// Which replica this is.
        replica: Id,
        /// How many there are, as far as it knows.
        replicas: usize,
    },
    /// The connection is closed after this.
    TurnedAway {
        /// Which replica this is.
        replica: Id,
        /// Why.
        why: TurnedAway,
        /// The same for a person reading the agent's log.
        sentence: String,
    },
}

impl Answer {
    /// The frame to send. The sentence is cut and escaped where it must be.
    pub fn encode(&self) -> Vec<u8> {
        let version = VERSION.to_string();
        match self {
            Self::Welcome { replica, replicas } => frame(&[
                ("version", &version),
                ("replica", replica.as_str()),
                ("answer", "welcome"),
                ("replicas", &replicas.to_string()),
            ]),
            Self::TurnedAway { replica, why, sentence } => {
                let mut sentence = Escaped::sentence(sentence).to_string();
                sentence.truncate(SENTENCE_LIMIT);
                if sentence.is_empty() {
                    sentence.push_str(why.word());
                }
                frame(&[
                    ("version", &version),
                    ("replica", replica.as_str()),
                    ("answer", why.word()),
                    ("sentence", &sentence),
                ])
            }
        }
    }

    /// Reads a frame's body. A word from a later version counts as [`TurnedAway::NotReady`]: try again.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(body: &[u8]) -> Result<Self, NotAHello> {
        let pairs = Pairs::new(body)?;
        let replica = Id::parse(pairs.required("replica")?)?;
        match pairs.required("answer")? {
            "welcome" => {
                pairs.version()?;
                // One that does not say so is alone.
                let replicas = pairs.get("replicas").map_or(Ok(1), |text| text.parse());
                Ok(Self::Welcome { replica, replicas: replicas.map_err(|_| NotAHello::Value)? })
            }
            other => {
                let why = meaning(&TurnedAway::WORDS, other).unwrap_or(TurnedAway::NotReady);
                let sentence = pairs.get("sentence").unwrap_or(other).to_owned();
                Ok(Self::TurnedAway { replica, why, sentence })
            }
        }
    }
}

/// What is wrong with a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotAHello {
    /// It does not begin with [`MAGIC`].
    Magic,
    /// It is longer than [`BODY_LIMIT`].
    TooLong,
    /// It is not made of `key=value` lines.
    Lines,
    /// A key comes twice.
    Twice,
    /// A key that must be there is not.
    Missing,
    /// A value that cannot be.
    Value,
    /// Another version than [`VERSION`].
    Version,
}

impl fmt::Display for NotAHello {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Magic => {
                "what came is not edge-tunnel's hello; is something else listening or dialling there?"
            }
            Self::TooLong => "the hello is longer than 1024 bytes",
            Self::Lines => "the hello is not made of lines key=value",
            Self::Twice => "the hello says a thing twice",
            Self::Missing => "the hello lacks a key",
            Self::Value => "the hello has a value that cannot be",
            Self::Version => {
                "the other end speaks another version of edge-tunnel's protocol; update the older one"
            }
        })
    }
}

impl std::error::Error for NotAHello {}

/// Reads a frame's first [`HEADER`] bytes: how many bytes of body follow.
///
/// # Errors
/// [`NotAHello::Magic`] or [`NotAHello::TooLong`], before memory is reserved for anything.
pub fn body_length(header: [u8; HEADER]) -> Result<usize, NotAHello> {
    let [m0, m1, m2, m3, high, low] = header;
    if [m0, m1, m2, m3] != *MAGIC {
        return Err(NotAHello::Magic);
    }
    let length = usize::from(u16::from_be_bytes([high, low]));
    if length > BODY_LIMIT { Err(NotAHello::TooLong) } else { Ok(length) }
}

fn frame(pairs: &[(&str, &str)]) -> Vec<u8> {
    let body: String = pairs.iter().map(|(key, value)| format!("{key}={value}\n")).collect();
    // At most four pairs of bounded values: well below BODY_LIMIT.
    let length = u16::try_from(body.len()).unwrap_or(u16::MAX);
    [MAGIC, &length.to_be_bytes()[..], body.as_bytes()].concat()
}

fn word<T: PartialEq>(words: &'static [(T, &'static str)], meant: T) -> &'static str {
    words.iter().find(|(meaning, _)| *meaning == meant).map_or("", |(_, word)| word)
}

fn meaning<T: Copy>(words: &[(T, &'static str)], said: &str) -> Option<T> {
    words.iter().find(|(_, word)| *word == said).map(|(meaning, _)| *meaning)
}

/// A body whose lines have been checked.
struct Pairs<'a>(Vec<(&'a str, &'a str)>);

impl<'a> Pairs<'a> {
    fn new(body: &'a [u8]) -> Result<Self, NotAHello> {
        if body.len() > BODY_LIMIT {
            return Err(NotAHello::TooLong);
        }
        let body = str::from_utf8(body).map_err(|_| NotAHello::Lines)?;
        let mut pairs: Vec<(&str, &str)> = Vec::new();
        for line in body.split_terminator('\n') {
            let (key, value) = line.split_once('=').ok_or(NotAHello::Lines)?;
            let printable = value.bytes().all(|byte| (b' '..=b'~').contains(&byte));
            if key.is_empty() || value.is_empty() || value.len() > SENTENCE_LIMIT || !printable {
                return Err(NotAHello::Value);
            }
            if pairs.iter().any(|(other, _)| *other == key) {
                return Err(NotAHello::Twice);
            }
            pairs.push((key, value));
        }
        Ok(Self(pairs))
    }

    fn get(&self, key: &str) -> Option<&'a str> {
        self.0.iter().find(|(other, _)| *other == key).map(|(_, value)| *value)
    }

    fn required(&self, key: &str) -> Result<&'a str, NotAHello> {
        self.get(key).ok_or(NotAHello::Missing)
    }

    fn version(&self) -> Result<(), NotAHello> {
        if self.required("version")? == VERSION.to_string() { Ok(()) } else { Err(NotAHello::Version) }
    }
}

#[cfg(test)]
mod tests;
