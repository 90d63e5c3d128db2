//! What a replica tells another: which agents have a session with it. Lines of text, pure, bounded, fuzzed.
//!
//! ```text
//! begin                          all that is known is said anew
//! node NAME EPOCH INSTANCE ...   this node's agents here, each with its epoch; none: there is none any more
//! all                            whoever has not been named since `begin` is not here
//! draining                       this replica is going away: others first
//! ```
//!
//! A line says how things stand and not what happened, so saying it twice does no harm. Words that are not known are
//! skipped: a later version may say more. What is known of a replica lives as long as the connection to it, so there is
//! nothing to reconcile after two have been cut off from each other.

use crate::{hello::Id, target::Name};
use bytes::{Buf, BytesMut};
use std::{
    collections::{HashMap, HashSet},
    fmt,
};

/// The longest line, bytes: a name, and as many agents as a node can have on one replica.
pub const LINE_LIMIT: usize = 1024;

/// Nodes one replica may tell of.
pub const NODES_LIMIT: usize = 200_000;

/// An agent that has a session, and the age of that agent among its node's: the highest counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hold {
    /// When the agent's first session began, as a number that only grows from one agent of a node to the next.
    pub epoch: u64,
    /// Which run of which agent.
    pub instance: Id,
}

/// One line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Line {
    /// All that is known is said anew.
    Begin,
    /// A node's agents.
    Node(Name, Vec<Hold>),
    /// Everything has been said.
    All,
    /// The replica is going away.
    Draining,
}

/// Why a line cannot be understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotNews {
    /// Longer than [`LINE_LIMIT`].
    TooLong,
    /// A value that cannot be.
    Value,
    /// More than [`NODES_LIMIT`] nodes.
    TooMany,
}

impl fmt::Display for NotNews {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLong => write!(f, "a line of its news is longer than {LINE_LIMIT} bytes"),
            Self::Value => f.write_str("a line of its news has a value that cannot be"),
            Self::TooMany => write!(f, "it tells of more than {NODES_LIMIT} nodes"),
        }
    }
}

impl Line {
    /// Appends the line with its end.
    pub fn write(&self, to: &mut String) {
        match self {
            Self::Begin => to.push_str("begin"),
            Self::All => to.push_str("all"),
            Self::Draining => to.push_str("draining"),
            Self::Node(name, holds) => {
                to.push_str("node ");
                to.push_str(name.as_str());
                for hold in holds {
                    *to += &format!(" {} {}", hold.epoch, hold.instance);
                }
            }
        }
        to.push('\n');
    }

    /// Reads a line without its end; none for a word that is not known.
    ///
    /// # Errors
    /// [`NotNews::Value`].
    pub fn read(line: &[u8]) -> Result<Option<Self>, NotNews> {
        let line = str::from_utf8(line).map_err(|_| NotNews::Value)?;
        let mut words = line.split(' ');
        Ok(match words.next() {
            Some("begin") => Some(Self::Begin),
            Some("all") => Some(Self::All),
            Some("draining") => Some(Self::Draining),
            Some("node") => {
                let name = words.next().unwrap_or_default();
                let name = Name::parse(name.as_bytes()).map_err(|_| NotNews::Value)?;
                let mut holds = Vec::new();
                while let Some(epoch) = words.next() {
                    let epoch = epoch.parse().map_err(|_| NotNews::Value)?;
                    let instance = words.next().ok_or(NotNews::Value)?;
                    let instance = Id::parse(instance).map_err(|_| NotNews::Value)?;
                    holds.push(Hold { epoch, instance });
                }
                Some(Self::Node(name, holds))
            }
            _ => None,
        })
    }
}

/// Cuts bytes as they come into lines.
#[derive(Debug, Default)]
pub struct Reader {
    bytes: BytesMut,
    searched: usize,
}

impl Reader {
    /// Takes the next bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole line of those that are known.
    ///
    /// # Errors
    /// What is wrong; nothing more can be read then.
    pub fn line(&mut self) -> Result<Option<Line>, NotNews> {
        loop {
            let Some(found) = self.bytes[self.searched..].iter().position(|&byte| byte == b'\n') else {
                self.searched = self.bytes.len();
                return if self.searched > LINE_LIMIT { Err(NotNews::TooLong) } else { Ok(None) };
            };
            let end = self.searched + found;
            if end > LINE_LIMIT {
                return Err(NotNews::TooLong);
            }
            let line = Line::read(&self.bytes[..end]);
            self.bytes.advance(end + 1);
            self.searched = 0;
            if let Some(line) = line? {
                return Ok(Some(line));
            }
        }
    }
}

/// What is known of one replica.
#[derive(Debug, Default)]
pub struct Table {
    nodes: HashMap<Name, Vec<Hold>>,
    /// Those that have been named since `begin`, while everything is said anew.
    named: Option<HashSet<Name>>,
    complete: bool,
    draining: bool,
}

impl Table {
    /// Takes a line in.
    ///
    /// # Errors
    /// [`NotNews::TooMany`].
    pub fn take(&mut self, line: Line) -> Result<(), NotNews> {
        match line {
            Line::Begin => self.named = Some(HashSet::new()),
            Line::All => {
                if let Some(named) = self.named.take() {
                    self.nodes.retain(|node, _| named.contains(node));
                }
                self.complete = true;
            }
            Line::Draining => self.draining = true,
            Line::Node(node, holds) => {
                if let Some(named) = &mut self.named {
                    named.insert(node.clone());
                }
                if holds.is_empty() {
                    self.nodes.remove(&node);
                } else {
                    self.nodes.insert(node, holds);
                }
                if self.nodes.len() > NODES_LIMIT {
                    return Err(NotNews::TooMany);
                }
            }
        }
        Ok(())
    }

    /// A node's agents on that replica.
    pub fn holds(&self, node: &str) -> &[Hold] {
        self.nodes.get(node).map_or(&[], Vec::as_slice)
    }

    /// Whether everything has been said once.
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    /// Whether the replica is going away.
    pub fn is_draining(&self) -> bool {
        self.draining
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn hold(epoch: u64, instance: &str) -> Hold {
        Hold { epoch, instance: Id::parse(instance).unwrap() }
    }

    fn read_all(bytes: &[u8], pieces: usize) -> Result<Vec<Line>, NotNews> {
        let mut reader = Reader::default();
        let mut lines = Vec::new();
        for piece in bytes.chunks(pieces) {
            reader.push(piece);
            while let Some(line) = reader.line()? {
                lines.push(line);
            }
        }
        Ok(lines)
    }

    #[test]
    fn what_cannot_be_is_refused_and_what_is_new_is_skipped() {
        for wrong in ["node\n", "node a_b\n", "node a 1\n", "node a x i\n", "node a 1 i/j\n", "node a -1 i\n"]
        {
            assert_eq!(read_all(wrong.as_bytes(), 3), Err(NotNews::Value), "{wrong}");
        }
        assert_eq!(read_all(b"weather 7\n\nall\n", 2), Ok(vec![Line::All]));
        assert_eq!(read_all(&[b'x'; LINE_LIMIT + 1], 100), Err(NotNews::TooLong));
        assert_eq!(read_all(b"node \xff 1 a\n", 9), Err(NotNews::Value));
    }

    #[test]
    fn what_is_not_said_anew_is_gone_only_once_all_has_been_said() {
        let mut table = Table::default();
        for line in read_all(b"begin\nnode a 1 x\nnode b 1 y 2 z\nall\n", 7).unwrap() {
            table.take(line).unwrap();
        }
        assert!(table.is_complete());
        assert_eq!(table.holds("b"), [hold(1, "y"), hold(2, "z")]);
        table.take(Line::Begin).unwrap();
        table.take(Line::Node("a".parse().unwrap(), vec![hold(3, "x")])).unwrap();
        assert_eq!((table.holds("a"), table.holds("b").len()), (&[hold(3, "x")][..], 2));
        table.take(Line::All).unwrap();
        assert_eq!((table.holds("a").len(), table.holds("b").len()), (1, 0));
        table.take(Line::Node("a".parse().unwrap(), vec![])).unwrap();
        assert!(table.holds("a").is_empty() && !table.is_draining());
        table.take(Line::Draining).unwrap();
        assert!(table.is_draining());
    }

    fn line() -> impl Strategy<Value = Line> {
        let hold = (any::<u64>(), "[a-z0-9]{1,8}").prop_map(|(epoch, id)| hold(epoch, &id));
        let node = ("[a-d]", proptest::collection::vec(hold, 0..4))
            .prop_map(|(name, holds)| Line::Node(name.parse().unwrap(), holds));
        prop_oneof![1 => Just(Line::Begin), 1 => Just(Line::All), 6 => node]
    }

    proptest! {
        /// However the bytes are cut, the lines are those that were written, and a table that hears them knows what a
        /// plain map would.
        #[test]
        fn lines_arrive_as_they_were_written(
            lines in proptest::collection::vec(line(), 0..30), pieces in 1usize..50
        ) {
            let mut text = String::new();
            lines.iter().for_each(|line| line.write(&mut text));
            prop_assert_eq!(read_all(text.as_bytes(), pieces), Ok(lines.clone()));
            let mut table = Table::default();
            let mut model: BTreeMap<String, Vec<Hold>> = BTreeMap::new();
            let mut named: Option<Vec<String>> = None;
            for line in lines {
                match line.clone() {
                    Line::Begin => named = Some(Vec::new()),
                    Line::All => if let Some(named) = named.take() { model.retain(|node, _| named.contains(node)) },
                    Line::Node(node, holds) => {
                        if let Some(named) = &mut named { named.push(node.to_string()) }
                        model.insert(node.to_string(), holds);
                    }
                    Line::Draining => {}
                }
                table.take(line).unwrap();
            }
            for node in ["a", "b", "c", "d"] {
                prop_assert_eq!(table.holds(node), model.get(node).map_or(&[][..], Vec::as_slice));
            }
        }

        #[test]
        fn any_bytes_are_news_or_not(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = read_all(&bytes, 16);
        }
    }
}
