//! Networks in CIDR notation, and the addresses that are never dialled.
//!
//! Everything is compared in one form: an IPv4 network written as `::ffff:10.0.0.0/104` is `10.0.0.0/8`, and host bits
//! are cleared.

use ipnetwork::IpNetwork;
use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

/// A network, in its one spelling.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Network {
    first: IpAddr,
    prefix: u8,
}

impl Network {
    /// The network of this prefix length around an address; a length that is too long is the longest.
    pub fn around(address: IpAddr, prefix: u8) -> Self {
        let (address, prefix) = match (address, address.to_canonical()) {
            (IpAddr::V6(_), IpAddr::V4(v4)) if prefix >= 96 => (IpAddr::V4(v4), prefix - 96),
            _ => (address, prefix),
        };
        match address {
            IpAddr::V4(v4) => {
                let prefix = prefix.min(32);
                let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
                Self { first: Ipv4Addr::from(u32::from(v4) & mask).into(), prefix }
            }
            IpAddr::V6(v6) => {
                let prefix = prefix.min(128);
                let mask = u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0);
                Self { first: Ipv6Addr::from(u128::from(v6) & mask).into(), prefix }
            }
        }
    }

    /// The network of one address.
    pub fn one(address: IpAddr) -> Self {
        Self::around(address.to_canonical(), u8::MAX)
    }

    /// Whether an address is inside.
    pub fn contains(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        address.is_ipv4() == self.first.is_ipv4() && Self::around(address, self.prefix) == *self
    }

    /// The prefix length.
    pub fn prefix(&self) -> u8 {
        self.prefix
    }

    /// Whether it is one of IPv4.
    pub fn is_ipv4(&self) -> bool {
        self.first.is_ipv4()
    }
}

/// `10.0.0.0/8`, `fd00::/64`, or an address for the network of it alone.
impl FromStr for Network {
    type Err = NotANetwork;

    fn from_str(text: &str) -> Result<Self, NotANetwork> {
        let network: IpNetwork = text.parse().map_err(|_| NotANetwork)?;
        Ok(Self::around(network.ip(), network.prefix()))
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.first, self.prefix)
    }
}

/// The text is no network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotANetwork;

impl fmt::Display for NotANetwork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("no network; write it as 10.0.0.0/8 or fd00::/64")
    }
}

impl std::error::Error for NotANetwork {}

/// What kind of address is never dialled by anyone, whatever is allowed; none for an ordinary one.
///
/// Cloud metadata services live on link-local addresses, `0.0.0.0` and `::` are this machine by another name, and the
/// rest is nobody's kubelet. IPv6 addresses that carry an IPv4 one (NAT64, the deprecated compatible form) count as
/// what they carry.
pub fn never_dialled(address: IpAddr) -> Option<&'static str> {
    match unwrapped(address) {
        IpAddr::V4(v4) if v4.is_link_local() => Some("a link-local address"),
        IpAddr::V4(v4) if v4.is_multicast() || v4.is_broadcast() => Some("a multicast address"),
        IpAddr::V4(v4) if v4.octets()[0] == 0 => Some("an address of 0.0.0.0/8"),
        IpAddr::V6(v6) if v6.is_unicast_link_local() => Some("a link-local address"),
        IpAddr::V6(v6) if v6.is_multicast() => Some("a multicast address"),
        IpAddr::V6(v6) if v6.is_unspecified() => Some("the unspecified address"),
        _ => None,
    }
}

/// What kind of address the server never dials itself: those of [`never_dialled`], and its own loopback.
pub fn never_direct(address: IpAddr) -> Option<&'static str> {
    never_dialled(address).or_else(|| unwrapped(address).is_loopback().then_some("a loopback address"))
}

fn unwrapped(address: IpAddr) -> IpAddr {
    let IpAddr::V6(v6) = address.to_canonical() else {
        return address.to_canonical();
    };
    match v6.segments() {
        // `::` and `::1` are themselves.
        [0, 0, 0, 0, 0, 0, 0, 0 | 1] => v6.into(),
        [0, 0, 0, 0, 0, 0, high, low] | [0x64, 0xff9b, 0, 0, 0, 0, high, low] => {
            let [a, b] = high.to_be_bytes();
            let [c, d] = low.to_be_bytes();
            Ipv4Addr::new(a, b, c, d).into()
        }
        _ => v6.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn network(text: &str) -> Network {
        text.parse().unwrap()
    }

    #[test]
    fn equal_networks_are_equal() {
        let table = [
            ("10.1.2.3/8", "10.0.0.0/8"),
            ("10.1.2.3", "10.1.2.3/32"),
            ("::ffff:10.0.0.0/104", "10.0.0.0/8"),
            ("::ffff:0:0/96", "0.0.0.0/0"),
            ("FD00:0::1/64", "fd00::/64"),
            ("::/0", "::/0"),
        ];
        for (written, meant) in table {
            assert_eq!(network(written).to_string(), meant, "{written}");
        }
        for wrong in ["", "10.0.0.0/33", "fd00::/129", "10.0.0/8", "node1/8", "10.0.0.0/", "10.0.0.0/-1"] {
            assert_eq!(wrong.parse::<Network>(), Err(NotANetwork), "{wrong}");
        }
    }

    #[test]
    fn inside_is_inside_in_any_spelling() {
        let inside = |net: &str, address: &str| network(net).contains(address.parse().unwrap());
        assert!(inside("10.0.0.0/8", "10.255.255.255"));
        assert!(inside("10.0.0.0/8", "::ffff:10.0.0.1"));
        assert!(!inside("10.0.0.0/8", "11.0.0.0"));
        assert!(inside("0.0.0.0/0", "1.2.3.4"));
        assert!(!inside("0.0.0.0/0", "fd00::1"));
        assert!(!inside("::/0", "1.2.3.4"));
        assert!(!inside("::/0", "::ffff:1.2.3.4"));
        assert!(inside("fd00::/64", "fd00::ffff:1"));
    }

    #[test]
    fn what_is_never_dialled() {
        let kinds = |address: &str| {
            let address = address.parse().unwrap();
            (never_dialled(address).is_some(), never_direct(address).is_some())
        };
        for address in [
            "169.254.169.254",
            "::ffff:169.254.169.254",
            "64:ff9b::a9fe:a9fe",
            "::169.254.169.254",
            "fe80::1",
            "febf::1",
            "224.0.0.1",
            "239.255.255.255",
            "255.255.255.255",
            "ff02::1",
            "0.0.0.0",
            "0.1.2.3",
            "::",
        ] {
            assert_eq!(kinds(address), (true, true), "{address}");
        }
        for address in ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1"] {
            assert_eq!(kinds(address), (false, true), "{address}");
        }
        for address in ["10.0.0.5", "169.253.1.1", "8.8.8.8", "fd00::1", "2001:db8::1", "64:ff9b::a00:1"] {
            assert_eq!(kinds(address), (false, false), "{address}");
        }
    }

    proptest! {
        #[test]
        fn a_network_holds_its_address_and_is_read_as_written(address in any::<IpAddr>(), prefix in any::<u8>()) {
            let net = Network::around(address, prefix);
            prop_assert!(net.contains(address) || address.to_canonical() != address);
            prop_assert_eq!(net.to_string().parse(), Ok(net));
            prop_assert!(Network::one(address).contains(address));
        }
    }
}
