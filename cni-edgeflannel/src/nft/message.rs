//! nftables messages as bytes, and what the kernel's answers say. Nothing here touches a socket.

use super::{Chain, Hook, Match, Rule, TABLE, Verdict};
use ipnetwork::IpNetwork;
use nix::libc;

// linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h
pub(super) const NFNL_SUBSYS_NFTABLES: u16 = 10;
pub(super) const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
pub(super) const NFNL_MSG_BATCH_END: u16 = 0x11;
const NFT_MSG_NEWTABLE: u16 = 0;
const NFT_MSG_NEWCHAIN: u16 = 3;
pub(super) const NFT_MSG_DELCHAIN: u16 = 5;
const NFT_MSG_NEWRULE: u16 = 6;
pub(super) const NFT_MSG_GETRULE: u16 = 7;
pub(super) const NFT_MSG_DELRULE: u16 = 8;
pub(super) const NFTA_TABLE_NAME: u16 = 1;
pub(super) const NFTA_CHAIN_TABLE: u16 = 1;
pub(super) const NFTA_CHAIN_NAME: u16 = 3;
pub(super) const NFTA_CHAIN_HOOK: u16 = 4;
pub(super) const NFTA_CHAIN_POLICY: u16 = 5;
const NFTA_CHAIN_TYPE: u16 = 7;
pub(super) const NFTA_HOOK_HOOKNUM: u16 = 1;
pub(super) const NFTA_HOOK_PRIORITY: u16 = 2;
pub(super) const NFTA_RULE_TABLE: u16 = 1;
pub(super) const NFTA_RULE_CHAIN: u16 = 2;
pub(super) const NFTA_RULE_EXPRESSIONS: u16 = 4;
const NFTA_RULE_USERDATA: u16 = 7;
pub(super) const NFTA_LIST_ELEM: u16 = 1;
pub(super) const NFTA_EXPR_NAME: u16 = 1;
pub(super) const NFTA_EXPR_DATA: u16 = 2;
const NFTA_DATA_VALUE: u16 = 1;
pub(super) const NFTA_DATA_VERDICT: u16 = 2;
pub(super) const NFTA_VERDICT_CODE: u16 = 1;
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
pub(super) const NFTA_IMMEDIATE_DATA: u16 = 2;
const NFT_REG_VERDICT: u32 = 0;
const NFT_REG_1: u32 = 1;
const NFT_RETURN: u32 = -5_i32 as u32;
const NF_ACCEPT: u32 = 1;
const NFTA_MASQ_FLAGS: u16 = 1;
const NF_NAT_RANGE_PROTO_RANDOM_FULLY: u32 = 1 << 4;
pub(super) const NF_INET_FORWARD: u32 = 2;
const NF_INET_POST_ROUTING: u32 = 4;
const NF_IP_PRI_FILTER: u32 = 0;
const NF_IP_PRI_NAT_SRC: u32 = 100;
/// libnftnl's user data of a rule: type, length, text with closing zero.
const NFTNL_UDATA_RULE_COMMENT: u8 = 0;

pub(super) const NLMSG_ERROR: u16 = 2;
pub(super) const NLMSG_DONE: u16 = 3;
const REQUEST: u16 = libc::NLM_F_REQUEST as u16;
pub(super) const ACK: u16 = libc::NLM_F_ACK as u16;
const CREATE: u16 = libc::NLM_F_CREATE as u16;
const APPEND: u16 = libc::NLM_F_APPEND as u16;
pub(super) const DUMP: u16 = libc::NLM_F_DUMP as u16;

/// The request for a chain's rules.
pub(super) fn list_rules(chain: &str) -> Vec<u8> {
    let mut ask = Buffer::default();
    ask.message(NFT_MSG_GETRULE, DUMP, |b| {
        b.text(NFTA_RULE_TABLE, TABLE);
        b.text(NFTA_RULE_CHAIN, chain);
    });
    ask.bytes
}

/// The batch that makes a chain have exactly these rules.
pub(super) fn replace_chain(chain: &Chain) -> Vec<u8> {
    let mut batch = Buffer::default();
    batch.bracket(NFNL_MSG_BATCH_BEGIN);
    batch.message(NFT_MSG_NEWTABLE, CREATE, |b| b.text(NFTA_TABLE_NAME, TABLE));
    batch.message(NFT_MSG_NEWCHAIN, CREATE, |b| {
        b.text(NFTA_CHAIN_TABLE, TABLE);
        b.text(NFTA_CHAIN_NAME, &chain.name);
        let (hook, priority, kind) = place(chain.hook);
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
    batch.bytes
}

/// Hook number, priority and type of a chain there.
pub(super) fn place(hook: Hook) -> (u32, u32, &'static str) {
    match hook {
        Hook::SourceNat => (NF_INET_POST_ROUTING, NF_IP_PRI_NAT_SRC, "nat"),
        Hook::Forward => (NF_INET_FORWARD, NF_IP_PRI_FILTER, "filter"),
    }
}

/// The batch that removes a chain with its rules.
pub(super) fn remove_chain(chain: &str) -> Vec<u8> {
    let mut batch = Buffer::default();
    batch.bracket(NFNL_MSG_BATCH_BEGIN);
    batch.flush_chain(chain);
    batch.message(NFT_MSG_DELCHAIN, 0, |b| {
        b.text(NFTA_CHAIN_TABLE, TABLE);
        b.text(NFTA_CHAIN_NAME, chain);
    });
    batch.bracket(NFNL_MSG_BATCH_END);
    batch.bytes
}

/// One message of an answer.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// A rule, by its comment; empty when it has none.
    Rule(String),
    /// The end of a list, or the acknowledgement of a change.
    Done,
    /// The error number of a refused request.
    Error(i32),
}

/// What a datagram says. Stops at the first message that is cut off.
pub(super) fn answers(datagram: &[u8]) -> Vec<Answer> {
    let one = |(kind, body)| match kind {
        NLMSG_DONE => Answer::Done,
        NLMSG_ERROR => match errno(body) {
            0 => Answer::Done,
            errno => Answer::Error(errno),
        },
        _ => Answer::Rule(comment(body)),
    };
    messages(datagram).into_iter().map(one).collect()
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

/// The attributes of a message or of another attribute, as type and value. Stops at the first that is cut off.
pub(crate) fn attributes(mut rest: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    /// The top two bits of an attribute's type say how it is laid out.
    const TYPE: u16 = 0x3fff;
    std::iter::from_fn(move || {
        let [a, b, c, d, ..] = *rest else { return None };
        let length = usize::from(u16::from_ne_bytes([a, b]));
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_ne_bytes([c, d]) & TYPE, value))
    })
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
    // A zero closes it.
    let comment = &comment.as_bytes()[..comment.len().min(127)];
    let mut data = vec![NFTNL_UDATA_RULE_COMMENT, u8::try_from(comment.len() + 1).unwrap_or_default()];
    data.extend(comment);
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
    pub(super) fn bracket(&mut self, kind: u16) {
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

/// The comment of a rule that the kernel sent; empty when it has none.
fn comment(body: &[u8]) -> String {
    const NFGENMSG: usize = 4;
    for (kind, value) in attributes(body.get(NFGENMSG..).unwrap_or_default()) {
        if let (NFTA_RULE_USERDATA, [NFTNL_UDATA_RULE_COMMENT, length, text @ ..]) = (kind, value) {
            let text = text.get(..usize::from(*length)).unwrap_or(text);
            return String::from_utf8_lossy(text).trim_end_matches('\0').to_owned();
        }
    }
    String::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u16, body: &[u8]) -> Vec<u8> {
        let mut bytes = u32::try_from(16 + body.len()).unwrap().to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend(body);
        bytes
    }

    #[test]
    fn every_length_adds_up() {
        let chain = Chain {
            name: "c".into(),
            hook: Hook::SourceNat,
            rules: vec![Rule {
                matches: vec![
                    Match::Mark(0x4000),
                    Match::From("10.1.0.0/24".parse().unwrap()),
                    Match::To("fd00::/64".parse().unwrap()),
                ],
                verdict: Verdict::Masquerade { fully_random: true },
            }],
        };
        let bytes = replace_chain(&chain);
        let mut kinds = Vec::new();
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let length = u32::from_ne_bytes(rest[..4].try_into().unwrap()) as usize;
            assert!(length >= 20 && length.is_multiple_of(4));
            kinds.push(u16::from_ne_bytes([rest[4], rest[5]]) & 0xff);
            rest = &rest[length..];
        }
        assert_eq!(kinds, [0x10, NFT_MSG_NEWTABLE, NFT_MSG_NEWCHAIN, NFT_MSG_DELRULE, NFT_MSG_NEWRULE, 0x11]);
    }

    #[test]
    fn answers_of_all_kinds_and_cut_off_ones() {
        let mut rule = Buffer { bytes: vec![0; 4] };
        rule.text(1, "table");
        rule.attribute(NFTA_RULE_USERDATA, &user_data("ip saddr 10.1.0.0/24 return"));
        let mut datagram = message(0xa06, &rule.bytes);
        datagram.extend(message(0xa06, &[0; 4]));
        datagram.extend(message(NLMSG_ERROR, &(-libc::ENOENT).to_ne_bytes()));
        datagram.extend(message(NLMSG_ERROR, &[0; 4]));
        datagram.extend(message(NLMSG_DONE, &[0; 4]));
        let all = answers(&datagram);
        let rule = Answer::Rule("ip saddr 10.1.0.0/24 return".into());
        assert_eq!(
            all,
            [rule, Answer::Rule(String::new()), Answer::Error(libc::ENOENT), Answer::Done, Answer::Done]
        );
        // No length that is a lie leads anywhere.
        for end in 0..datagram.len() {
            assert!(answers(&datagram[..end]).len() <= all.len());
        }
        let mut lying = datagram.clone();
        for length in [0_u32, 1, 15, u32::MAX] {
            lying[..4].copy_from_slice(&length.to_ne_bytes());
            assert_eq!(answers(&lying), []);
        }
    }

    #[test]
    fn a_long_comment_is_cut() {
        let data = user_data(&"x".repeat(500));
        assert_eq!((data.len(), data[1], data.last()), (130, 128, Some(&0)));
    }
}
