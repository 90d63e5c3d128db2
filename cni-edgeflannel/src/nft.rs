//! nftables over its netlink socket: our own table, and nothing else.
//!
//! The other of the two files that speak to a kernel socket. No nft or iptables process: a batch costs less
//! than 0.1 ms, a process 3 to 60 ms.
//!
//! Own encoder rather than the crate netlink-packet-netfilter 0.4: that one has no masquerade expression, no
//! rule comments and no acknowledged batches, so the part that is left to it (attributes in attributes) is the
//! thirty lines of `message::Buffer`.
//!
//! Every rule carries its own text as comment (user data). So reading the comments back says whether the rules
//! are the wanted ones, without decoding expressions: nothing can change a rule and keep its comment.

mod message;
pub mod others;

pub(crate) use message::{Buffer, attributes, errno, messages};

use ipnetwork::IpNetwork;
use message::Answer;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
use nix::libc;
use std::{fmt, io};

/// The table that is ours, in family `inet`. Nothing in it is anybody else's.
pub const TABLE: &str = "edgeflannel";

/// A base chain with its rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// Name in our table.
    pub name: String,
    /// Where it is called.
    pub hook: Hook,
    /// In order.
    pub rules: Vec<Rule>,
}

/// Where the kernel calls a base chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// `type nat hook postrouting priority srcnat`
    SourceNat,
    /// `type filter hook forward priority filter`
    Forward,
}

/// Matches, all of which must hold, and what then happens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// Conditions.
    pub matches: Vec<Match>,
    /// Consequence.
    pub verdict: Verdict,
}

/// A condition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Match {
    /// The packet's mark has all these bits.
    Mark(u32),
    /// The sender is in this network.
    From(IpNetwork),
    /// The packet is of this network's family and its sender is not in it.
    NotFrom(IpNetwork),
    /// The receiver is in this network.
    To(IpNetwork),
    /// The packet is of this network's family and its receiver is not in it.
    NotTo(IpNetwork),
}

/// A consequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Leave the chain.
    Return,
    /// Let it pass, as far as this chain is asked.
    Accept,
    /// Put this node's address in the place of the sender's.
    Masquerade {
        /// With a random port, so that two senders do not race for one (kubernetes#62628).
        fully_random: bool,
    },
}

/// The rule in nft's own words: also its comment.
impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for condition in &self.matches {
            match condition {
                Match::Mark(bits) => write!(f, "meta mark & {bits:#x} == {bits:#x} ")?,
                Match::From(net) => write!(f, "{} saddr {net} ", ip(net))?,
                Match::NotFrom(net) => write!(f, "{} saddr != {net} ", ip(net))?,
                Match::To(net) => write!(f, "{} daddr {net} ", ip(net))?,
                Match::NotTo(net) => write!(f, "{} daddr != {net} ", ip(net))?,
            }
        }
        f.write_str(match self.verdict {
            Verdict::Return => "return",
            Verdict::Accept => "accept",
            Verdict::Masquerade { fully_random: true } => "masquerade fully-random",
            Verdict::Masquerade { fully_random: false } => "masquerade",
        })
    }
}

impl Rule {
    /// The text as far as it fits into a comment: 128 bytes with the closing zero are what nft shows.
    #[must_use]
    pub fn comment(&self) -> String {
        let mut text = self.to_string();
        text.truncate(127);
        text
    }
}

impl Hook {
    /// A chain hangs here, and accepts what reaches its end.
    #[must_use]
    pub fn has(self, chain: &others::BaseChain) -> bool {
        let (hook, priority, _) = message::place(self);
        chain.hook == hook && chain.priority == priority.cast_signed() && !chain.drops
    }
}

fn ip(net: &IpNetwork) -> &'static str {
    if net.is_ipv4() { "ip" } else { "ip6" }
}

/// One netfilter socket, in the network namespace it was opened in.
#[derive(Debug)]
pub struct Nft {
    socket: Socket,
}

impl Nft {
    /// Opens a socket in this thread's network namespace.
    ///
    /// # Errors
    /// When the kernel gives none: it has no netfilter, or we lack CAP_NET_ADMIN.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        // The kernel answers while it takes a message; waiting would only ever mean that nothing comes.
        socket.set_non_blocking(true)?;
        Ok(Self { socket })
    }

    /// The comments of a chain's rules, in order; empty when there is no such chain, or no table.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn rules(&self, chain: &str) -> io::Result<Vec<String>> {
        self.send(&message::list_rules(chain))?;
        let mut rules = Vec::new();
        loop {
            for answer in message::answers(&self.receive()?) {
                match answer {
                    Answer::Rule(comment) => rules.push(comment),
                    Answer::Done | Answer::Error(libc::ENOENT) => return Ok(rules),
                    Answer::Error(errno) => return Err(io::Error::from_raw_os_error(errno)),
                }
            }
        }
    }

    /// Makes a chain have exactly these rules, in one step: nobody ever sees half of them, and two callers at
    /// once leave the same.
    ///
    /// # Errors
    /// When the kernel refuses; nothing is changed then.
    pub fn replace(&self, chain: &Chain) -> io::Result<()> {
        self.commit(&message::replace_chain(chain))
    }

    /// Removes a chain with its rules. None being there is fine.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn remove(&self, chain: &str) -> io::Result<()> {
        match self.commit(&message::remove_chain(chain)) {
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            other => other,
        }
    }

    /// Sends a batch and takes the kernel's answer to each of its messages.
    fn commit(&self, batch: &[u8]) -> io::Result<()> {
        self.send(batch)?;
        let mut failure = None;
        loop {
            let datagram = match self.receive() {
                Ok(datagram) => datagram,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => return Err(e),
            };
            for answer in message::answers(&datagram) {
                if let Answer::Error(errno) = answer {
                    failure.get_or_insert(errno);
                }
            }
        }
        failure.map_or(Ok(()), |errno| Err(io::Error::from_raw_os_error(errno)))
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        let sent = self.socket.send_to(bytes, &SocketAddr::new(0, 0), 0)?;
        if sent != bytes.len() {
            return Err(io::Error::new(io::ErrorKind::WriteZero, "netlink took only part of a message"));
        }
        Ok(())
    }

    fn receive(&self) -> io::Result<Vec<u8>> {
        self.socket.recv_from_full().map(|(datagram, _)| datagram)
    }
}
