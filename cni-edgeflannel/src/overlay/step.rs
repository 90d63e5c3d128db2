//! One thing to do, said so that it can be done, counted and shown.

use super::{
    desired::{Device, Hop},
    observed::RouteSeen,
};
use crate::{mac::Mac, nft::Chain, record::Family, sysctl::Sysctl};
use ipnetwork::IpNetwork;
use std::{fmt, net::IpAddr};

/// A step from what is to what should be. Each names all it needs, so that it can be tried again alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// A device of our name that is not what it should be, in a way the kernel cannot change, or is not wanted.
    DeleteDevice {
        /// Name.
        name: String,
        /// Number.
        index: u32,
    },
    /// A device that is not there.
    CreateDevice(Box<Device>, Family),
    /// The VXLAN's interface below, local address or learning differ. The kernel can change these; where it does
    /// not, the device is made anew.
    ChangeVxlan(Box<Device>, Family),
    /// Its hardware address differs.
    SetMac(Family, Mac),
    /// Its MTU differs.
    SetMtu(Family, u32),
    /// It is down.
    SetUp(Family),
    /// Its checksum offload is on.
    TxChecksumOff(Family),
    /// A kernel setting differs.
    SetSysctl(Sysctl),
    /// An address is missing.
    AddAddress(Family, IpNetwork),
    /// An address of ours that is no longer wanted.
    RemoveAddress(Family, IpNetwork),
    /// A neighbour is missing or leads elsewhere.
    PutNeighbour(Family, IpAddr, Mac),
    /// A neighbour that nobody wants.
    RemoveNeighbour(Family, IpAddr, Mac),
    /// A forwarding entry is missing or leads elsewhere.
    PutFdb(Family, Mac, IpAddr),
    /// A forwarding entry that nobody wants.
    RemoveFdb(Family, Mac, IpAddr),
    /// A route is missing or leads elsewhere.
    PutRoute(Family, IpNetwork, Hop),
    /// A route that nobody wants.
    RemoveRoute(Box<RouteSeen>),
    /// A chain is missing or has other rules.
    PutChain(Chain),
    /// A chain that is no longer wanted.
    RemoveChain(String),
    /// subnet.env is missing or says something else.
    WriteSubnetEnv(String),
}

/// What kind of drift a step repairs; the label of `edgeflannel_drift_total`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// A device.
    Link,
    /// Its hardware address.
    Mac,
    /// Its MTU.
    Mtu,
    /// An address.
    Address,
    /// A route.
    Route,
    /// A neighbour.
    Neigh,
    /// A forwarding entry.
    Fdb,
    /// The rules in our table.
    Nft,
    /// A kernel setting.
    Sysctl,
    /// subnet.env
    SubnetEnv,
    /// A peer that is not obeyed.
    Conflict,
    /// Somebody else's rule drops what is forwarded.
    ForeignDrop,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 12] = [
        Self::Link,
        Self::Mac,
        Self::Mtu,
        Self::Address,
        Self::Route,
        Self::Neigh,
        Self::Fdb,
        Self::Nft,
        Self::Sysctl,
        Self::SubnetEnv,
        Self::Conflict,
        Self::ForeignDrop,
    ];

    /// As metrics and `status` name it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Link => "link",
            Self::Mac => "mac",
            Self::Mtu => "mtu",
            Self::Address => "address",
            Self::Route => "route",
            Self::Neigh => "neigh",
            Self::Fdb => "fdb",
            Self::Nft => "nft",
            Self::Sysctl => "sysctl",
            Self::SubnetEnv => "subnet-env",
            Self::Conflict => "conflict",
            Self::ForeignDrop => "foreign-drop",
        }
    }
}

impl Step {
    /// What it repairs.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::DeleteDevice { .. }
            | Self::CreateDevice(..)
            | Self::ChangeVxlan(..)
            | Self::SetUp(_)
            | Self::TxChecksumOff(_) => Kind::Link,
            Self::SetMac(..) => Kind::Mac,
            Self::SetMtu(..) => Kind::Mtu,
            Self::SetSysctl(_) => Kind::Sysctl,
            Self::AddAddress(..) | Self::RemoveAddress(..) => Kind::Address,
            Self::PutNeighbour(..) | Self::RemoveNeighbour(..) => Kind::Neigh,
            Self::PutFdb(..) | Self::RemoveFdb(..) => Kind::Fdb,
            Self::PutRoute(..) | Self::RemoveRoute(_) => Kind::Route,
            Self::PutChain(_) | Self::RemoveChain(_) => Kind::Nft,
            Self::WriteSubnetEnv(_) => Kind::SubnetEnv,
        }
    }

    /// The object that it concerns, whichever way it is put right: for bounding how often that is done.
    #[must_use]
    pub fn object(&self) -> String {
        let kind = self.kind().as_str();
        match self {
            Self::DeleteDevice { name, .. } => format!("{kind} {name}"),
            Self::CreateDevice(device, _) | Self::ChangeVxlan(device, _) => format!("{kind} {}", device.name),
            Self::SetMac(family, _)
            | Self::SetMtu(family, _)
            | Self::SetUp(family)
            | Self::TxChecksumOff(family) => {
                format!("{kind} {family}")
            }
            Self::SetSysctl(sysctl) => format!("{kind} {}", sysctl.key),
            Self::AddAddress(_, cidr) | Self::RemoveAddress(_, cidr) => format!("{kind} {cidr}"),
            Self::PutNeighbour(_, ip, _) | Self::RemoveNeighbour(_, ip, _) => format!("{kind} {ip}"),
            Self::PutFdb(family, mac, _) | Self::RemoveFdb(family, mac, _) => {
                format!("{kind} {family} {mac}")
            }
            Self::PutRoute(_, dst, _) => format!("{kind} {dst}"),
            Self::RemoveRoute(route) => format!("{kind} {}", route.dst),
            Self::PutChain(chain) => format!("{kind} {}", chain.name),
            Self::RemoveChain(chain) => format!("{kind} {chain}"),
            Self::WriteSubnetEnv(_) => kind.to_owned(),
        }
    }
}

/// What is wrong, as `status` shows it and the log says it.
impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DeleteDevice { name, .. } => write!(f, "device {name} is not as it should be"),
            Self::CreateDevice(device, _) => write!(f, "device {} is missing", device.name),
            Self::ChangeVxlan(device, _) => {
                write!(f, "device {} should use {} on interface {}", device.name, device.local, device.link)
            }
            Self::SetMac(family, mac) => write!(f, "the {family} device's address should be {mac}"),
            Self::SetMtu(family, mtu) => write!(f, "the {family} device's MTU should be {mtu}"),
            Self::SetUp(family) => write!(f, "the {family} device is down"),
            Self::TxChecksumOff(family) => write!(f, "the {family} device's checksum offload is on"),
            Self::SetSysctl(sysctl) => write!(f, "{sysctl} is not set"),
            Self::AddAddress(_, cidr) => write!(f, "address {cidr} is missing"),
            Self::RemoveAddress(_, cidr) => write!(f, "address {cidr} is not wanted"),
            Self::PutNeighbour(_, ip, mac) => write!(f, "neighbour {ip} should be {mac}"),
            Self::RemoveNeighbour(_, ip, mac) => write!(f, "neighbour {ip} at {mac} is not wanted"),
            Self::PutFdb(_, mac, ip) => write!(f, "forwarding entry {mac} should lead to {ip}"),
            Self::RemoveFdb(_, mac, ip) => write!(f, "forwarding entry {mac} to {ip} is not wanted"),
            Self::PutRoute(_, dst, Hop::Vxlan(via)) => {
                write!(f, "route {dst} should lead through the overlay, via {via}")
            }
            Self::PutRoute(_, dst, Hop::Direct(via)) => write!(f, "route {dst} should lead to {via}"),
            Self::RemoveRoute(route) => match route.gateway {
                Some(via) => write!(f, "route {} via {via} is not wanted", route.dst),
                None => write!(f, "route {} is not wanted", route.dst),
            },
            Self::PutChain(chain) => write!(f, "nftables chain {} is not as it should be", chain.name),
            Self::RemoveChain(chain) => write!(f, "nftables chain {chain} is not wanted"),
            Self::WriteSubnetEnv(_) => f.write_str("subnet.env is missing or says something else"),
        }
    }
}
