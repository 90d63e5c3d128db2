//! What others have in nftables: chains that drop what is forwarded, and flanneld's leftovers.

use super::{
    Nft, TABLE, attributes, errno,
    message::{
        ACK, Buffer, DUMP, NF_INET_FORWARD, NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END, NFNL_SUBSYS_NFTABLES,
        NFT_MSG_DELCHAIN, NFT_MSG_DELRULE, NFT_MSG_GETRULE, NFTA_CHAIN_HOOK, NFTA_CHAIN_NAME,
        NFTA_CHAIN_POLICY, NFTA_CHAIN_TABLE, NFTA_DATA_VERDICT, NFTA_EXPR_DATA, NFTA_EXPR_NAME,
        NFTA_HOOK_HOOKNUM, NFTA_HOOK_PRIORITY, NFTA_IMMEDIATE_DATA, NFTA_LIST_ELEM, NFTA_RULE_CHAIN,
        NFTA_RULE_EXPRESSIONS, NFTA_RULE_TABLE, NFTA_TABLE_NAME, NFTA_VERDICT_CODE, NLMSG_DONE, NLMSG_ERROR,
    },
    messages,
};
use nix::libc;
use std::{fmt, io};

const NFT_MSG_GETTABLE: u16 = 1;
const NFT_MSG_DELTABLE: u16 = 2;
const NFT_MSG_GETCHAIN: u16 = 4;
const NFTA_RULE_HANDLE: u16 = 3;
const NFTA_VERDICT_CHAIN: u16 = 2;
const NFT_JUMP: u32 = -3_i32 as u32;
const NF_DROP: u32 = 0;
const NFGENMSG: usize = 4;

/// A chain that the kernel calls at a hook.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseChain {
    /// `NFPROTO_*` of its table.
    pub family: u8,
    /// Its table.
    pub table: String,
    /// Its name.
    pub name: String,
    /// Where it hangs: `NF_INET_*`.
    pub hook: u32,
    /// In which place there.
    pub priority: i32,
    /// Drops what reaches its end.
    pub drops: bool,
}

impl BaseChain {
    /// Of our own table.
    #[must_use]
    pub fn is_ours(&self) -> bool {
        i32::from(self.family) == libc::NFPROTO_INET && self.table == TABLE
    }

    /// Somebody else's, and it drops forwarded packets that none of its rules accepts. Accepting them in our
    /// table does not help: each chain at a hook has a say.
    #[must_use]
    pub fn drops_forwarded(&self) -> bool {
        let ip = [libc::NFPROTO_INET, libc::NFPROTO_IPV4, libc::NFPROTO_IPV6];
        ip.contains(&i32::from(self.family)) && self.hook == NF_INET_FORWARD && self.drops && !self.is_ours()
    }
}

/// As nft names it: `ip filter FORWARD`.
impl fmt::Display for BaseChain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", family_name(self.family), self.table, self.name)
    }
}

fn family_name(family: u8) -> &'static str {
    match i32::from(family) {
        libc::NFPROTO_IPV4 => "ip",
        libc::NFPROTO_IPV6 => "ip6",
        libc::NFPROTO_INET => "inet",
        _ => "other",
    }
}

/// Chains that flanneld makes through iptables-nft: table, chain, the chain that jumps to it.
const FLANNEL_CHAINS: [(&str, &str, &str); 2] =
    [("nat", "FLANNEL-POSTRTG", "POSTROUTING"), ("filter", "FLANNEL-FWD", "FORWARD")];

/// Tables that flanneld makes with `EnableNFTables`.
const FLANNEL_TABLES: [(i32, &str); 2] =
    [(libc::NFPROTO_IPV4, "flannel-ipv4"), (libc::NFPROTO_IPV6, "flannel-ipv6")];

impl Nft {
    /// All chains at hooks, of all tables.
    ///
    /// # Errors
    /// When the kernel refuses to say.
    pub fn base_chains(&self) -> io::Result<Vec<BaseChain>> {
        let bodies = self.dump(NFT_MSG_GETCHAIN, 0, |_| ())?;
        Ok(bodies.iter().filter_map(|body| read_chain(body)).collect())
    }

    /// Removes what flanneld left in nftables and says what it was. With iptables-legacy it cannot be seen from
    /// here.
    ///
    /// # Errors
    /// When the kernel refuses; the rest has been tried.
    pub fn remove_flannels(&self) -> io::Result<Vec<String>> {
        let mut removed = Vec::new();
        let mut failure = None;
        for (family, table) in FLANNEL_TABLES {
            match self.remove_table(family, table) {
                Ok(true) => removed.push(format!("table {} {table}", family_name(byte(family)))),
                Ok(false) => {}
                Err(e) => failure = Some(e),
            }
        }
        for family in [libc::NFPROTO_IPV4, libc::NFPROTO_IPV6] {
            for (table, chain, from) in FLANNEL_CHAINS {
                match self.remove_chain_of(family, table, chain, from) {
                    Ok(true) => removed.push(format!("chain {} {table} {chain}", family_name(byte(family)))),
                    Ok(false) => {}
                    Err(e) => failure = Some(e),
                }
            }
        }
        failure.map_or(Ok(removed), Err)
    }

    /// Removes our own table, with the pods' chains in it. None being there is fine.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn remove_own_table(&self) -> io::Result<()> {
        self.remove_table(libc::NFPROTO_INET, TABLE).map(drop)
    }

    fn remove_table(&self, family: i32, table: &str) -> io::Result<bool> {
        let tables = self.dump(NFT_MSG_GETTABLE, family, |_| ())?;
        if !tables.iter().any(|body| text(body_of(body), NFTA_TABLE_NAME) == Some(table)) {
            return Ok(false);
        }
        self.batch(|batch| {
            delete(batch, family, NFT_MSG_DELTABLE, |b| b.text(NFTA_TABLE_NAME, table));
        })?;
        Ok(true)
    }

    /// Removes a chain, and the jumps that lead to it.
    fn remove_chain_of(&self, family: i32, table: &str, chain: &str, from: &str) -> io::Result<bool> {
        let chains = self.dump(NFT_MSG_GETCHAIN, family, |_| ())?;
        let is_it = |body: &[u8]| {
            text(body, NFTA_CHAIN_TABLE) == Some(table) && text(body, NFTA_CHAIN_NAME) == Some(chain)
        };
        if !chains.iter().any(|body| is_it(body_of(body))) {
            return Ok(false);
        }
        let rules = self.dump(NFT_MSG_GETRULE, family, |b| {
            b.text(NFTA_RULE_TABLE, table);
            b.text(NFTA_RULE_CHAIN, from);
        })?;
        let jumps = rules.iter().map(|body| body_of(body)).filter(|rule| jumps_to(rule, chain));
        let handles: Vec<&[u8]> = jumps.filter_map(|rule| attribute(rule, NFTA_RULE_HANDLE)).collect();
        self.batch(|batch| {
            for handle in &handles {
                delete(batch, family, NFT_MSG_DELRULE, |b| {
                    b.text(NFTA_RULE_TABLE, table);
                    b.text(NFTA_RULE_CHAIN, from);
                    b.attribute(NFTA_RULE_HANDLE, handle);
                });
            }
            delete(batch, family, NFT_MSG_DELRULE, |b| {
                b.text(NFTA_RULE_TABLE, table);
                b.text(NFTA_RULE_CHAIN, chain);
            });
            delete(batch, family, NFT_MSG_DELCHAIN, |b| {
                b.text(NFTA_CHAIN_TABLE, table);
                b.text(NFTA_CHAIN_NAME, chain);
            });
        })?;
        Ok(true)
    }

    fn batch(&self, fill: impl FnOnce(&mut Buffer)) -> io::Result<()> {
        let mut batch = Buffer::default();
        batch.bracket(NFNL_MSG_BATCH_BEGIN);
        fill(&mut batch);
        batch.bracket(NFNL_MSG_BATCH_END);
        self.commit(&batch.bytes)
    }

    /// The bodies (with their nfgenmsg) of all answers.
    fn dump(&self, kind: u16, family: i32, body: impl FnOnce(&mut Buffer)) -> io::Result<Vec<Vec<u8>>> {
        let mut ask = Buffer::default();
        ask.raw(NFNL_SUBSYS_NFTABLES << 8 | kind, DUMP, byte(family), 0, body);
        self.send(&ask.bytes)?;
        let mut found = Vec::new();
        loop {
            for (kind, body) in messages(&self.receive()?) {
                match kind {
                    NLMSG_DONE => return Ok(found),
                    NLMSG_ERROR => match errno(body) {
                        libc::ENOENT => return Ok(found),
                        code => return Err(io::Error::from_raw_os_error(code)),
                    },
                    _ => found.push(body.to_vec()),
                }
            }
        }
    }
}

fn delete(batch: &mut Buffer, family: i32, kind: u16, body: impl FnOnce(&mut Buffer)) {
    batch.raw(NFNL_SUBSYS_NFTABLES << 8 | kind, ACK, byte(family), 0, body);
}

fn byte(family: i32) -> u8 {
    u8::try_from(family).unwrap_or_default()
}

fn read_chain(body: &[u8]) -> Option<BaseChain> {
    let family = *body.first()?;
    let body = body_of(body);
    let hook = attribute(body, NFTA_CHAIN_HOOK)?;
    Some(BaseChain {
        family,
        table: text(body, NFTA_CHAIN_TABLE)?.to_owned(),
        name: text(body, NFTA_CHAIN_NAME)?.to_owned(),
        hook: number(hook, NFTA_HOOK_HOOKNUM)?,
        priority: number(hook, NFTA_HOOK_PRIORITY)?.cast_signed(),
        drops: number(body, NFTA_CHAIN_POLICY) == Some(NF_DROP),
    })
}

/// One of the rule's expressions is a jump to the chain.
fn jumps_to(rule: &[u8], chain: &str) -> bool {
    let expressions = attribute(rule, NFTA_RULE_EXPRESSIONS).unwrap_or_default();
    attributes(expressions).filter(|(kind, _)| *kind == NFTA_LIST_ELEM).any(|(_, expression)| {
        let verdict = attribute(expression, NFTA_EXPR_DATA)
            .filter(|_| text(expression, NFTA_EXPR_NAME) == Some("immediate"))
            .and_then(|data| attribute(data, NFTA_IMMEDIATE_DATA))
            .and_then(|data| attribute(data, NFTA_DATA_VERDICT));
        verdict.is_some_and(|verdict| {
            number(verdict, NFTA_VERDICT_CODE) == Some(NFT_JUMP)
                && text(verdict, NFTA_VERDICT_CHAIN) == Some(chain)
        })
    })
}

fn body_of(body: &[u8]) -> &[u8] {
    body.get(NFGENMSG..).unwrap_or_default()
}

fn text(bytes: &[u8], kind: u16) -> Option<&str> {
    attribute(bytes, kind)
        .and_then(|value| std::str::from_utf8(value).ok())
        .map(|text| text.trim_end_matches('\0'))
}

fn number(bytes: &[u8], kind: u16) -> Option<u32> {
    attribute(bytes, kind).and_then(|value| value.first_chunk().copied()).map(u32::from_be_bytes)
}

fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(found, _)| *found == kind).map(|(_, value)| value)
}
