//! The ranges addresses come from, checked once, and the addresses in them that nobody ever gets.
//!
//! The rules are host-local's: both ends belong to the range, the gateway is the first address unless it is
//! given, an IPv4 range ends before the broadcast address by itself, prefixes beyond /30 and /126 are too
//! small. Stricter in one point: gateway, network and broadcast address are never given out, even when
//! `rangeStart` or `rangeEnd` includes them.

use crate::address::Address;
use ipnetwork::IpNetwork;
use std::net::IpAddr;

/// Addresses from the first to the last, both included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span {
    /// The first address.
    pub first: Address,
    /// The last address.
    pub last: Address,
}

impl Span {
    /// Every address of a network.
    #[must_use]
    pub fn of(network: IpNetwork) -> Self {
        let last = match network {
            IpNetwork::V4(v4) => IpAddr::V4(v4.broadcast()),
            IpNetwork::V6(v6) => IpAddr::V6(v6.broadcast()),
        };
        Self { first: network.network().into(), last: last.into() }
    }

    /// Whether the address lies in it.
    #[must_use]
    pub fn contains(&self, address: Address) -> bool {
        self.first <= address && address <= self.last
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }
}

impl From<Address> for Span {
    fn from(address: Address) -> Self {
        Self { first: address, last: address }
    }
}

/// One range of a subnet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Range {
    /// The subnet; its prefix length goes into the result.
    pub subnet: IpNetwork,
    /// What may be given out of it.
    pub span: Span,
    /// The gateway that goes into the result.
    pub gateway: Address,
}

impl Range {
    /// Checks a range as host-local does.
    ///
    /// # Errors
    /// Every mistake, a sentence each.
    pub fn new(
        subnet: IpNetwork,
        start: Option<Address>,
        end: Option<Address>,
        gateway: Option<Address>,
    ) -> Result<Self, Vec<String>> {
        let whole = Span::of(subnet);
        let (width, first_bits) = if subnet.is_ipv4() { (32, "IPv4") } else { (128, "IPv6") };
        if subnet.prefix() > width - 2 {
            return Err(vec![format!(
                "subnet {subnet} is too small: an {first_bits} prefix is at most /{}",
                width - 2
            )]);
        }
        if subnet.ip() != subnet.network() {
            return Err(vec![format!(
                "subnet {subnet} has host bits set; the network address is {}/{}",
                subnet.network(),
                subnet.prefix()
            )]);
        }
        let mut mistakes = Vec::new();
        let mut inside = |name: &str, address: Option<Address>| {
            let outside = address.filter(|address| !whole.contains(*address));
            mistakes.extend(outside.map(|address| format!("{name} {address} is not in subnet {subnet}")));
        };
        inside("rangeStart", start);
        inside("rangeEnd", end);
        inside("gateway", gateway);
        let second = whole.first.next().unwrap_or(whole.first);
        let before_last = whole.last.previous().unwrap_or(whole.last);
        let span = Span {
            first: start.unwrap_or(second),
            last: end.unwrap_or(if subnet.is_ipv4() { before_last } else { whole.last }),
        };
        if mistakes.is_empty() && span.first > span.last {
            mistakes.push(format!("rangeStart {} comes after rangeEnd {}", span.first, span.last));
        }
        if !mistakes.is_empty() {
            return Err(mistakes);
        }
        Ok(Self { subnet, span, gateway: gateway.unwrap_or(second) })
    }

    /// An address of this range as the result states it: with the subnet's prefix length.
    #[must_use]
    pub fn state(&self, address: Address) -> Option<IpNetwork> {
        IpNetwork::new(address.ip(), self.subnet.prefix()).ok()
    }
}

/// Ranges of one family that are alternatives: a pod gets one address out of each set.
pub type RangeSet = Vec<Range>;

/// Everything addresses can come from, in the order of the configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pools {
    sets: Vec<RangeSet>,
    /// Sorted, not overlapping.
    never: Vec<Span>,
}

impl Pools {
    /// Checks the sets against each other.
    ///
    /// # Errors
    /// Every mistake, a sentence each.
    pub fn new(sets: Vec<RangeSet>, excluded: &[Span]) -> Result<Self, Vec<String>> {
        let mut mistakes = Vec::new();
        for (index, set) in sets.iter().enumerate() {
            match set.first() {
                None => mistakes.push(format!("range set {index} is empty")),
                Some(first) if set.iter().any(|range| range.subnet.is_ipv4() != first.subnet.is_ipv4()) => {
                    mistakes
                        .push(format!("range set {index} mixes IPv4 and IPv6; give each a set of its own"));
                }
                Some(_) => {}
            }
        }
        let ranges: Vec<(usize, &Range)> = sets
            .iter()
            .enumerate()
            .flat_map(|(index, set)| set.iter().map(move |range| (index, range)))
            .collect();
        for (at, (set, range)) in ranges.iter().enumerate() {
            for (other_set, other) in ranges.iter().skip(at + 1) {
                if range.span.overlaps(&other.span) {
                    mistakes.push(format!(
                        "range {}-{} of set {set} overlaps {}-{} of set {other_set}",
                        range.span.first, range.span.last, other.span.first, other.span.last
                    ));
                }
            }
        }
        if !mistakes.is_empty() {
            return Err(mistakes);
        }
        let mut never = excluded.to_vec();
        for (_, range) in &ranges {
            let whole = Span::of(range.subnet);
            never.extend([Span::from(range.gateway), Span::from(whole.first)]);
            never.extend(range.subnet.is_ipv4().then(|| Span::from(whole.last)));
        }
        Ok(Self { never: merge(never), sets })
    }

    /// The sets, in the order of the configuration: one address out of each.
    #[must_use]
    pub fn sets(&self) -> &[RangeSet] {
        &self.sets
    }

    /// The set and range an address belongs to.
    #[must_use]
    pub fn find(&self, address: Address) -> Option<(usize, &Range)> {
        self.sets.iter().enumerate().find_map(|(index, set)| {
            set.iter().find(|range| range.span.contains(address)).map(|range| (index, range))
        })
    }

    /// The last of the never-given addresses that begin with this one, or `None` when this one may be given.
    #[must_use]
    pub fn never_until(&self, address: Address) -> Option<Address> {
        let after = self.never.partition_point(|span| span.first <= address);
        let span = self.never.get(after.checked_sub(1)?)?;
        span.contains(address).then_some(span.last)
    }

    /// Whether the address may be given to a pod: in a range, and not one of those nobody gets.
    #[must_use]
    pub fn may_give(&self, address: Address) -> bool {
        self.find(address).is_some() && self.never_until(address).is_none()
    }
}

/// Sorts the spans, and joins those that touch or overlap.
fn merge(mut spans: Vec<Span>) -> Vec<Span> {
    spans.sort_unstable();
    let mut merged: Vec<Span> = Vec::with_capacity(spans.len());
    for span in spans {
        match merged.last_mut() {
            Some(before) if before.last.next().is_none_or(|next| span.first <= next) => {
                before.last = before.last.max(span.last);
            }
            _ => merged.push(span),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(written: &str) -> IpNetwork {
        written.parse().unwrap()
    }

    fn at(written: &str) -> Address {
        written.parse().unwrap()
    }

    fn range(subnet: &str, start: &str, end: &str, gateway: &str) -> Result<Range, Vec<String>> {
        let optional = |written: &str| (!written.is_empty()).then(|| at(written));
        Range::new(net(subnet), optional(start), optional(end), optional(gateway))
    }

    #[test]
    fn defaults_are_host_locals() {
        let v4 = range("10.0.0.0/24", "", "", "").unwrap();
        assert_eq!((v4.span.first, v4.span.last), (at("10.0.0.1"), at("10.0.0.254")));
        assert_eq!(v4.gateway, at("10.0.0.1"));
        assert_eq!(v4.state(at("10.0.0.9")), Some(net("10.0.0.9/24")));
        let v6 = range("fd00::/64", "", "", "fd00::ff").unwrap();
        assert_eq!((v6.span.first, v6.span.last), (at("fd00::1"), at("fd00::ffff:ffff:ffff:ffff")));
        assert_eq!(v6.gateway, at("fd00::ff"));
        assert!(range("10.0.0.0/30", "", "", "").is_ok());
        assert!(range("fd00::/126", "", "", "").is_ok());
        assert!(range("0.0.0.0/0", "", "", "").is_ok());
        assert!(range("::/0", "", "", "").is_ok());
    }

    #[test]
    fn mistakes_are_named_and_all_of_them() {
        for (written, expected) in [
            (["10.0.0.0/31", "", "", ""], vec!["too small"]),
            (["10.0.0.0/32", "", "", ""], vec!["too small"]),
            (["fd00::/127", "", "", ""], vec!["too small"]),
            (["10.0.0.1/24", "", "", ""], vec!["network address is 10.0.0.0/24"]),
            (["10.0.0.0/24", "10.0.1.1", "10.0.2.1", "fd00::1"], vec!["rangeStart", "rangeEnd", "gateway"]),
            (["10.0.0.0/24", "10.0.0.9", "10.0.0.8", ""], vec!["comes after"]),
        ] {
            let [subnet, start, end, gateway] = written;
            let mistakes = range(subnet, start, end, gateway).unwrap_err();
            assert_eq!(mistakes.len(), expected.len(), "{mistakes:?}");
            for (mistake, part) in mistakes.iter().zip(expected) {
                assert!(mistake.contains(part), "{mistake}");
            }
        }
    }

    #[test]
    fn sets_are_checked_against_each_other() {
        let a = range("10.0.0.0/24", "", "10.0.0.100", "").unwrap();
        let b = range("10.0.0.0/24", "10.0.0.100", "", "").unwrap();
        let c = range("10.0.0.0/24", "10.0.0.101", "", "").unwrap();
        let v6 = range("fd00::/64", "", "", "").unwrap();
        assert!(Pools::new(vec![vec![a.clone(), c.clone()], vec![v6.clone()]], &[]).is_ok());
        for (bad, part) in [
            (vec![vec![a.clone(), b.clone()]], "overlaps"),
            (vec![vec![a.clone()], vec![b]], "overlaps"),
            (vec![vec![a, v6]], "mixes"),
            (vec![vec![]], "empty"),
        ] {
            let mistakes = Pools::new(bad, &[]).unwrap_err();
            assert!(mistakes[0].contains(part), "{mistakes:?}");
        }
    }

    #[test]
    fn some_addresses_are_never_given() {
        let all = range("10.0.0.0/24", "10.0.0.0", "10.0.0.255", "10.0.0.7").unwrap();
        let excluded = [Span::of(net("10.0.0.16/28")), at("10.0.0.32").into(), at("10.0.0.8").into()];
        let pools = Pools::new(vec![vec![all]], &excluded).unwrap();
        for never in ["10.0.0.0", "10.0.0.255", "10.0.0.7", "10.0.0.8", "10.0.0.16", "10.0.0.31", "10.0.0.32"]
        {
            assert!(!pools.may_give(at(never)), "{never}");
        }
        for given in ["10.0.0.1", "10.0.0.6", "10.0.0.9", "10.0.0.15", "10.0.0.33", "10.0.0.254"] {
            assert!(pools.may_give(at(given)), "{given}");
        }
        assert_eq!(pools.never_until(at("10.0.0.20")), Some(at("10.0.0.32")));
        assert_eq!(pools.never_until(at("10.0.0.7")), Some(at("10.0.0.8")));
        assert!(!pools.may_give(at("10.0.1.1")), "outside");
        let v6 = Pools::new(vec![vec![range("fd00::/64", "", "", "").unwrap()]], &[]).unwrap();
        assert!(v6.may_give(at("fd00::ffff:ffff:ffff:ffff")), "IPv6 has no broadcast");
        assert!(!v6.may_give(at("fd00::1")) && !v6.may_give(at("fd00::")));
    }
}
