//! One number for an address of either family, so that ranges, runs and table keys are plain arithmetic.
//!
//! IPv4 lives where IPv6 maps it (`::ffff:0:0/96`); the reference (Go) makes no difference between the two
//! spellings either.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

/// An IP address as a number. Ordered; the families do not overlap.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address(pub u128);

const MAPPED: u128 = 0xffff_0000_0000;

impl Address {
    /// The address after this one.
    #[must_use]
    pub fn next(self) -> Option<Self> {
        self.0.checked_add(1).map(Self)
    }

    /// The address before this one.
    #[must_use]
    pub fn previous(self) -> Option<Self> {
        self.0.checked_sub(1).map(Self)
    }

    /// Whether it is IPv4.
    #[must_use]
    pub fn is_ipv4(self) -> bool {
        self.0 >> 32 == MAPPED >> 32
    }

    /// The address as everybody else writes it.
    #[must_use]
    pub fn ip(self) -> IpAddr {
        match u32::try_from(self.0 ^ MAPPED) {
            Ok(v4) => IpAddr::V4(Ipv4Addr::from_bits(v4)),
            Err(_) => IpAddr::V6(Ipv6Addr::from_bits(self.0)),
        }
    }
}

impl From<IpAddr> for Address {
    fn from(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(v4) => Self(MAPPED | u128::from(v4.to_bits())),
            IpAddr::V6(v6) => Self(v6.to_bits()),
        }
    }
}

impl FromStr for Address {
    type Err = std::net::AddrParseError;

    fn from_str(written: &str) -> Result<Self, Self::Err> {
        written.parse::<IpAddr>().map(Self::from)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.ip().fmt(f)
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.ip().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_families_survive_the_round_trip() {
        for written in ["0.0.0.0", "10.244.1.5", "255.255.255.255", "::", "::1", "fd00::1:2", "ffff::"] {
            let address: Address = written.parse().unwrap();
            assert_eq!(address.to_string(), written);
            assert_eq!(address.is_ipv4(), !written.contains(':'), "{written}");
        }
        let mapped: Address = "::ffff:10.0.0.1".parse().unwrap();
        assert_eq!(mapped.to_string(), "10.0.0.1");
    }

    #[test]
    fn neighbours() {
        let last: Address = "10.0.0.255".parse().unwrap();
        assert_eq!(last.next().unwrap().to_string(), "10.0.1.0");
        assert_eq!(last.previous().unwrap().to_string(), "10.0.0.254");
        assert_eq!(Address(0).previous(), None);
        assert_eq!(Address(u128::MAX).next(), None);
    }
}
