//! Hardware addresses: six bytes with a text form, and how one is derived from an IP address.
//!
//! An address that follows from the pod's IP stays the same over restarts and reboots as the IP does, so no
//! neighbour's ARP or ND cache ever holds a stale one.

use sha2::{Digest, Sha256};
use std::{fmt, net::IpAddr, str::FromStr};

/// A MAC address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// The address that belongs to an IP address: `0a:58` (locally administered, unicast; the prefix that
    /// Kubernetes and docker use for the same purpose) and the four bytes of an IPv4 address, or four bytes of
    /// the SHA-256 of an IPv6 one.
    #[must_use]
    pub fn of_address(address: IpAddr) -> Self {
        let tail = match address {
            IpAddr::V4(v4) => v4.octets(),
            IpAddr::V6(v6) => first_bytes(&v6.octets()),
        };
        Self([0x0a, 0x58, tail[0], tail[1], tail[2], tail[3]])
    }

    /// A stable address for something that has a name: `0e:58` and four bytes of the name's SHA-256.
    #[must_use]
    pub fn of_name(name: &str) -> Self {
        let tail = first_bytes::<4>(name.as_bytes());
        Self([0x0e, 0x58, tail[0], tail[1], tail[2], tail[3]])
    }

    /// The address as the kernel sends it; `None` for anything but six bytes.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }
}

/// The first bytes of the SHA-256 of `data`.
pub(crate) fn first_bytes<const N: usize>(data: &[u8]) -> [u8; N] {
    let digest = Sha256::digest(data);
    std::array::from_fn(|i| digest[i])
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// Why a text is not a MAC address that a device may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BadMac {
    /// Not six bytes in hexadecimal, divided by `:` or `-`.
    Format,
    /// Multicast or all zero: the kernel refuses it for a device.
    NotUnicast,
}

impl fmt::Display for BadMac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Format => "it is not six hexadecimal bytes divided by ':'",
            Self::NotUnicast => "it is no unicast address",
        })
    }
}

impl FromStr for Mac {
    type Err = BadMac;

    /// Takes the forms that Go's `net.ParseMAC` takes for six bytes with `:` or `-`.
    fn from_str(text: &str) -> Result<Self, BadMac> {
        let divider = if text.contains('-') { '-' } else { ':' };
        let mut bytes = [0; 6];
        let mut parts = text.split(divider);
        for byte in &mut bytes {
            let part =
                parts.next().filter(|part| part.len() == 2 && part.is_ascii()).ok_or(BadMac::Format)?;
            if part.starts_with('+') {
                return Err(BadMac::Format);
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| BadMac::Format)?;
        }
        if parts.next().is_some() {
            return Err(BadMac::Format);
        }
        if bytes[0] & 1 == 1 || bytes == [0; 6] {
            return Err(BadMac::NotUnicast);
        }
        Ok(Self(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_gives_its_mac() {
        let mac = |ip: &str| Mac::of_address(ip.parse().unwrap()).to_string();
        assert_eq!(mac("10.244.1.5"), "0a:58:0a:f4:01:05");
        assert_eq!(mac("255.255.255.254"), "0a:58:ff:ff:ff:fe");
        // Neighbours remember it across an upgrade: the derivation must never change.
        assert_eq!(mac("fd00:1::5"), "0a:58:0d:48:95:0a");
        assert_ne!(mac("fd00:1::5"), mac("fd00:1::6"));
        assert_eq!(Mac::of_name("vethx").0[..2], [0x0e, 0x58]);
    }

    #[test]
    fn texts() {
        for good in ["0a:58:0a:f4:01:05", "0A-58-0A-F4-01-05"] {
            assert_eq!(good.parse::<Mac>().unwrap().to_string(), "0a:58:0a:f4:01:05");
        }
        for bad in [
            "",
            "0a:58:0a:f4:01",
            "0a:58:0a:f4:01:05:06",
            "0a58.0af4.0105",
            "0a:58:0a:f4:01:5",
            "+a:58:0a:f4:01:05",
        ] {
            assert_eq!(bad.parse::<Mac>(), Err(BadMac::Format), "{bad}");
        }
        for bad in ["01:00:5e:00:00:01", "ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00"] {
            assert_eq!(bad.parse::<Mac>(), Err(BadMac::NotUnicast), "{bad}");
        }
    }
}
