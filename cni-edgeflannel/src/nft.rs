//! nftables over its netlink socket: our own table, and nothing else.
//!
//! The other of the two files that speak to a kernel socket. No nft or iptables process: a batch costs less
//! than 0.1 ms, a process 3 to 60 ms.
//!
//! Own encoder rather than the crate netlink-packet-netfilter 0.4: that one has no masquerade expression, no
//! rule comments and no acknowledged batches, so the part that is left to it (attributes in attributes) is the
//! thirty lines of `Buffer` below.
//!
//! Every rule carries its own text as comment (user data). So reading the comments back says whether the rules
//! are the wanted ones, without decoding expressions: nothing can change a rule and keep its comment.

pub mod others;

use ipnetwork::IpNetwork;
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

fn ip(net: &IpNetwork) -> &'static str {
    if net.is_ipv4() { "ip" } else { "ip6" }
}

/// One netfilter socket, in the network namespace it was opened in.
#[derive(Debug)]
pub struct Nft {
    socket: Socket,
}

// linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
const NFNL_MSG_BATCH_END: u16 = 0x11;
const NFT_MSG_NEWTABLE: u16 = 0;
const NFT_MSG_NEWCHAIN: u16 = 3;
const NFT_MSG_DELCHAIN: u16 = 5;
const NFT_MSG_NEWRULE: u16 = 6;
const NFT_MSG_GETRULE: u16 = 7;
const NFT_MSG_DELRULE: u16 = 8;
const NFTA_TABLE_NAME: u16 = 1;
const NFTA_CHAIN_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;
const NFTA_CHAIN_HOOK: u16 = 4;
const NFTA_CHAIN_POLICY: u16 = 5;
const NFTA_CHAIN_TYPE: u16 = 7;
const NFTA_HOOK_HOOKNUM: u16 = 1;
const NFTA_HOOK_PRIORITY: u16 = 2;
const NFTA_RULE_TABLE: u16 = 1;
const NFTA_RULE_CHAIN: u16 = 2;
const NFTA_RULE_EXPRESSIONS: u16 = 4;
const NFTA_RULE_USERDATA: u16 = 7;
const NFTA_LIST_ELEM: u16 = 1;
const NFTA_EXPR_NAME: u16 = 1;
const NFTA_EXPR_DATA: u16 = 2;
const NFTA_DATA_VALUE: u16 = 1;
const NFTA_DATA_VERDICT: u16 = 2;
const NFTA_VERDICT_CODE: u16 = 1;
const NFTA_META_DREG: u16 = 1;
const NFTA_META_KEY: u16 = 2;
const NFT_META_MARK: u32 = 3;
const NFT_META_NFPROTO: u32 = 15;
const NFTA_PAYLOAD_DREG: u16 = 1;
const NFTA_PAYLOAD_BASE: u16 = 2;
const NFTA_PAYLOAD_OFFSET: u16 = 3;
const NFTA_PAYLOAD_LEN: u16 = 4;
const NFT_PAYLOAD_NETWORK_HEADER: u32 = 1;
const NFTA_BITWISE_SREG: u16 = 1;
const NFTA_BITWISE_DREG: u16 = 2;
const NFTA_BITWISE_LEN: u16 = 3;
const NFTA_BITWISE_MASK: u16 = 4;
const NFTA_BITWISE_XOR: u16 = 5;
const NFTA_CMP_SREG: u16 = 1;
const NFTA_CMP_OP: u16 = 2;
const NFTA_CMP_DATA: u16 = 3;
const NFT_CMP_EQ: u32 = 0;
const NFT_CMP_NEQ: u32 = 1;
const NFTA_IMMEDIATE_DREG: u16 = 1;
const NFTA_IMMEDIATE_DATA: u16 = 2;
const NFT_REG_VERDICT: u32 = 0;
const NFT_REG_1: u32 = 1;
const NFT_RETURN: u32 = -5_i32 as u32;
const NF_ACCEPT: u32 = 1;
const NFTA_MASQ_FLAGS: u16 = 1;
const NF_NAT_RANGE_PROTO_RANDOM_FULLY: u32 = 1 << 4;
const NF_INET_FORWARD: u32 = 2;
const NF_INET_POST_ROUTING: u32 = 4;
const NF_IP_PRI_FILTER: u32 = 0;
const NF_IP_PRI_NAT_SRC: u32 = 100;
/// libnftnl's user data of a rule: type, length, text with closing zero.
const NFTNL_UDATA_RULE_COMMENT: u8 = 0;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const REQUEST: u16 = libc::NLM_F_REQUEST as u16;
const ACK: u16 = libc::NLM_F_ACK as u16;
const CREATE: u16 = libc::NLM_F_CREATE as u16;
const APPEND: u16 = libc::NLM_F_APPEND as u16;
const DUMP: u16 = libc::NLM_F_DUMP as u16;

impl Hook {
    /// Hook number, priority and type of a chain there.
    fn place(self) -> (u32, u32, &'static str) {
        match self {
            Self::SourceNat => (NF_INET_POST_ROUTING, NF_IP_PRI_NAT_SRC, "nat"),
            Self::Forward => (NF_INET_FORWARD, NF_IP_PRI_FILTER, "filter"),
        }
    }

    /// The chain hangs here, and accepts what reaches its end.
    #[must_use]
    pub fn has(self, chain: &others::BaseChain) -> bool {
        let (hook, priority, _) = self.place();
        chain.hook == hook && chain.priority == priority.cast_signed() && !chain.drops
    }
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
        let mut ask = Buffer::default();
        ask.message(NFT_MSG_GETRULE, DUMP, |b| {
            b.text(NFTA_RULE_TABLE, TABLE);
            b.text(NFTA_RULE_CHAIN, chain);
        });
        self.send(&ask)?;
        let mut rules = Vec::new();
        loop {
            for (kind, body) in messages(&self.receive()?) {
                match kind {
                    NLMSG_DONE => return Ok(rules),
                    NLMSG_ERROR => match errno(body) {
                        libc::ENOENT => return Ok(rules),
                        code => return Err(io::Error::from_raw_os_error(code)),
                    },
                    _ => rules.push(comment(body)),
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
        let mut batch = Buffer::default();
        batch.bracket(NFNL_MSG_BATCH_BEGIN);
        batch.message(NFT_MSG_NEWTABLE, CREATE, |b| b.text(NFTA_TABLE_NAME, TABLE));
        batch.message(NFT_MSG_NEWCHAIN, CREATE, |b| {
            b.text(NFTA_CHAIN_TABLE, TABLE);
            b.text(NFTA_CHAIN_NAME, &chain.name);
            let (hook, priority, kind) = chain.hook.place();
            b.nested(NFTA_CHAIN_HOOK, |b| {
                b.number(NFTA_HOOK_HOOKNUM, hook);
                b.number(NFTA_HOOK_PRIORITY, priority);
            });
            b.number(NFTA_CHAIN_POLICY, NF_ACCEPT);
            b.text(NFTA_CHAIN_TYPE, kind);
        });
        batch.flush_chain(&chain.name);
        for rule in &chain.rules {
            batch.message(NFT_MSG_NEWRULE, CREATE | APPEND, |b| {
                b.text(NFTA_RULE_TABLE, TABLE);
                b.text(NFTA_RULE_CHAIN, &chain.name);
                b.nested(NFTA_RULE_EXPRESSIONS, |b| expressions(b, rule));
                b.attribute(NFTA_RULE_USERDATA, &user_data(&rule.comment()));
            });
        }
        batch.bracket(NFNL_MSG_BATCH_END);
        self.commit(&batch)
    }

    /// Removes a chain with its rules. None being there is fine.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn remove(&self, chain: &str) -> io::Result<()> {
        let mut batch = Buffer::default();
        batch.bracket(NFNL_MSG_BATCH_BEGIN);
        batch.flush_chain(chain);
        batch.message(NFT_MSG_DELCHAIN, 0, |b| {
            b.text(NFTA_CHAIN_TABLE, TABLE);
            b.text(NFTA_CHAIN_NAME, chain);
        });
        batch.bracket(NFNL_MSG_BATCH_END);
        match self.commit(&batch) {
            Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            other => other,
        }
    }

    /// Sends a batch and takes the kernel's answer to each of its messages.
    fn commit(&self, batch: &Buffer) -> io::Result<()> {
        self.send(batch)?;
        let mut failure = None;
        loop {
            let datagram = match self.receive() {
                Ok(datagram) => datagram,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => return Err(e),
            };
            for (kind, body) in messages(&datagram) {
                if kind == NLMSG_ERROR && errno(body) != 0 {
                    failure.get_or_insert_with(|| io::Error::from_raw_os_error(errno(body)));
                }
            }
        }
        failure.map_or(Ok(()), Err)
    }

    fn send(&self, buffer: &Buffer) -> io::Result<()> {
        let sent = self.socket.send_to(&buffer.bytes, &SocketAddr::new(0, 0), 0)?;
        if sent != buffer.bytes.len() {
            return Err(io::Error::new(io::ErrorKind::WriteZero, "netlink took only part of a message"));
        }
        Ok(())
    }

    fn receive(&self) -> io::Result<Vec<u8>> {
        self.socket.recv_from_full().map(|(datagram, _)| datagram)
    }
}

/// The expressions of a rule, as nft itself would compile its text.
fn expressions(b: &mut Buffer, rule: &Rule) {
    for condition in &rule.matches {
        match condition {
            Match::Mark(bits) => {
                load_meta(b, NFT_META_MARK);
                mask(b, &bits.to_ne_bytes());
                equals(b, &bits.to_ne_bytes());
            }
            Match::From(net) => in_network(b, net, true, NFT_CMP_EQ),
            Match::NotFrom(net) => in_network(b, net, true, NFT_CMP_NEQ),
            Match::To(net) => in_network(b, net, false, NFT_CMP_EQ),
            Match::NotTo(net) => in_network(b, net, false, NFT_CMP_NEQ),
        }
    }
    match rule.verdict {
        Verdict::Return => verdict(b, NFT_RETURN),
        Verdict::Accept => verdict(b, NF_ACCEPT),
        Verdict::Masquerade { fully_random: true } => {
            expression(b, "masq", |b| b.number(NFTA_MASQ_FLAGS, NF_NAT_RANGE_PROTO_RANDOM_FULLY));
        }
        Verdict::Masquerade { fully_random: false } => expression(b, "masq", |_| ()),
    }
}

fn verdict(b: &mut Buffer, code: u32) {
    expression(b, "immediate", |b| {
        b.number(NFTA_IMMEDIATE_DREG, NFT_REG_VERDICT);
        b.nested(NFTA_IMMEDIATE_DATA, |b| {
            b.nested(NFTA_DATA_VERDICT, |b| b.number(NFTA_VERDICT_CODE, code));
        });
    });
}

fn in_network(b: &mut Buffer, net: &IpNetwork, source: bool, comparison: u32) {
    load_meta(b, NFT_META_NFPROTO);
    // Offsets of the addresses in the IPv4 and IPv6 headers.
    let (protocol, offset, address, mask_bytes) = match net {
        IpNetwork::V4(v4) => (
            libc::NFPROTO_IPV4,
            if source { 12 } else { 16 },
            v4.network().octets().to_vec(),
            v4.mask().octets().to_vec(),
        ),
        IpNetwork::V6(v6) => (
            libc::NFPROTO_IPV6,
            if source { 8 } else { 24 },
            v6.network().octets().to_vec(),
            v6.mask().octets().to_vec(),
        ),
    };
    equals(b, &[u8::try_from(protocol).unwrap_or_default()]);
    if net.prefix() == 0 && comparison == NFT_CMP_EQ {
        return;
    }
    expression(b, "payload", |b| {
        b.number(NFTA_PAYLOAD_DREG, NFT_REG_1);
        b.number(NFTA_PAYLOAD_BASE, NFT_PAYLOAD_NETWORK_HEADER);
        b.number(NFTA_PAYLOAD_OFFSET, offset);
        b.number(NFTA_PAYLOAD_LEN, length(&address));
    });
    mask(b, &mask_bytes);
    compare(b, comparison, &address);
}

fn load_meta(b: &mut Buffer, key: u32) {
    expression(b, "meta", |b| {
        b.number(NFTA_META_DREG, NFT_REG_1);
        b.number(NFTA_META_KEY, key);
    });
}

fn mask(b: &mut Buffer, bits: &[u8]) {
    expression(b, "bitwise", |b| {
        b.number(NFTA_BITWISE_SREG, NFT_REG_1);
        b.number(NFTA_BITWISE_DREG, NFT_REG_1);
        b.number(NFTA_BITWISE_LEN, length(bits));
        b.nested(NFTA_BITWISE_MASK, |b| b.attribute(NFTA_DATA_VALUE, bits));
        b.nested(NFTA_BITWISE_XOR, |b| b.attribute(NFTA_DATA_VALUE, &vec![0; bits.len()]));
    });
}

fn equals(b: &mut Buffer, value: &[u8]) {
    compare(b, NFT_CMP_EQ, value);
}

fn compare(b: &mut Buffer, operator: u32, value: &[u8]) {
    expression(b, "cmp", |b| {
        b.number(NFTA_CMP_SREG, NFT_REG_1);
        b.number(NFTA_CMP_OP, operator);
        b.nested(NFTA_CMP_DATA, |b| b.attribute(NFTA_DATA_VALUE, value));
    });
}

fn expression(b: &mut Buffer, name: &str, data: impl FnOnce(&mut Buffer)) {
    b.nested(NFTA_LIST_ELEM, |b| {
        b.text(NFTA_EXPR_NAME, name);
        b.nested(NFTA_EXPR_DATA, data);
    });
}

fn length(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len()).unwrap_or_default()
}

fn user_data(comment: &str) -> Vec<u8> {
    let mut data = vec![NFTNL_UDATA_RULE_COMMENT, u8::try_from(comment.len() + 1).unwrap_or_default()];
    data.extend(comment.as_bytes());
    data.push(0);
    data
}

/// Netlink messages in the making: headers and attributes whose lengths are filled in afterwards.
#[derive(Default)]
pub(crate) struct Buffer {
    pub(crate) bytes: Vec<u8>,
}

impl Buffer {
    /// A message to nftables: netlink header, nfgenmsg, attributes.
    fn message(&mut self, kind: u16, flags: u16, body: impl FnOnce(&mut Self)) {
        let kind = NFNL_SUBSYS_NFTABLES << 8 | kind;
        let family = u8::try_from(libc::NFPROTO_INET).unwrap_or_default();
        let acknowledge = if flags & DUMP == DUMP { 0 } else { ACK };
        self.raw(kind, flags | acknowledge, family, 0, body);
    }

    /// Begin or end of a batch, which the kernel takes as a whole or not at all.
    fn bracket(&mut self, kind: u16) {
        self.raw(kind, 0, 0, NFNL_SUBSYS_NFTABLES, |_| ());
    }

    fn flush_chain(&mut self, chain: &str) {
        self.message(NFT_MSG_DELRULE, 0, |b| {
            b.text(NFTA_RULE_TABLE, TABLE);
            b.text(NFTA_RULE_CHAIN, chain);
        });
    }

    pub(crate) fn raw(
        &mut self,
        kind: u16,
        flags: u16,
        family: u8,
        resource: u16,
        body: impl FnOnce(&mut Self),
    ) {
        let start = self.bytes.len();
        self.bytes.extend([0; 4]);
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend((REQUEST | flags).to_ne_bytes());
        self.bytes.extend([0; 8]);
        self.bytes.extend([family, 0]);
        self.bytes.extend(resource.to_be_bytes());
        body(self);
        let length = u32::try_from(self.bytes.len() - start).unwrap_or_default();
        self.bytes[start..start + 4].copy_from_slice(&length.to_ne_bytes());
    }

    pub(crate) fn nested(&mut self, kind: u16, body: impl FnOnce(&mut Self)) {
        const NLA_F_NESTED: u16 = 1 << 15;
        let start = self.bytes.len();
        self.bytes.extend([0; 2]);
        self.bytes.extend((kind | NLA_F_NESTED).to_ne_bytes());
        body(self);
        let length = u16::try_from(self.bytes.len() - start).unwrap_or_default();
        self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
    }

    pub(crate) fn attribute(&mut self, kind: u16, value: &[u8]) {
        let length = u16::try_from(value.len() + 4).unwrap_or_default();
        self.bytes.extend(length.to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend(value);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    pub(crate) fn text(&mut self, kind: u16, text: &str) {
        let mut value = text.as_bytes().to_vec();
        value.push(0);
        self.attribute(kind, &value);
    }

    /// Numbers of nftables are big-endian.
    fn number(&mut self, kind: u16, value: u32) {
        self.attribute(kind, &value.to_be_bytes());
    }
}

/// The messages of a datagram, as type and body. Stops at the first that is cut off.
pub(crate) fn messages(datagram: &[u8]) -> Vec<(u16, &[u8])> {
    let mut found = Vec::new();
    let mut rest = datagram;
    while let [a, b, c, d, e, f, ..] = *rest {
        let length = u32::from_ne_bytes([a, b, c, d]) as usize;
        let Some(body) = rest.get(16..length) else { break };
        found.push((u16::from_ne_bytes([e, f]), body));
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

/// The error number of an NLMSG_ERROR, 0 for an acknowledgement.
pub(crate) fn errno(body: &[u8]) -> i32 {
    body.first_chunk().map_or(libc::EPROTO, |code| -i32::from_ne_bytes(*code))
}

/// The comment of a rule that the kernel sent; empty when it has none.
fn comment(body: &[u8]) -> String {
    const NFGENMSG: usize = 4;
    let mut rest = body.get(NFGENMSG..).unwrap_or_default();
    while let [a, b, c, d, ..] = *rest {
        let length = usize::from(u16::from_ne_bytes([a, b]));
        let Some(value) = rest.get(4..length) else { break };
        if let (NFTA_RULE_USERDATA, [NFTNL_UDATA_RULE_COMMENT, length, text @ ..]) =
            (u16::from_ne_bytes([c, d]), value)
        {
            let text = text.get(..usize::from(*length)).unwrap_or(text);
            return String::from_utf8_lossy(text).trim_end_matches('\0').to_owned();
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    String::new()
}
