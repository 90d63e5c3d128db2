//! Looks at the kernel and /run, and carries out steps: one line each, everything has been decided before.

use super::{
    desired::Desired,
    device_name, masquerade,
    observed::{DeviceSeen, Observed, RouteSeen},
    step::Step,
};
use crate::{
    netlink::{self, Netlink, ethtool::Ethtool, fine_if_gone, fine_if_there},
    nft::Nft,
    record::{Family, NodeRecord, PerFamily},
    subnet_env,
    sysctl::{self, Sysctl},
    underlay::Machine,
};
use ipnetwork::IpNetwork;
use log::{debug, warn};
use nix::libc;
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs, io,
    net::IpAddr,
    path::Path,
};

/// Something that could not be seen or done, with the operation.
#[derive(Debug)]
pub struct Error(String);

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

impl From<netlink::Error> for Error {
    fn from(error: netlink::Error) -> Self {
        Self(error.to_string())
    }
}

fn failed(what: &str) -> impl Fn(io::Error) -> Error {
    move |e| Error(format!("{what}: {e}"))
}

/// A step that failed.
#[derive(Debug)]
pub struct Failure {
    /// What was to be done.
    pub step: Step,
    /// Why it was not.
    pub error: Error,
}

/// The node's kernel: sockets in the network namespace that it was opened in. Sysctls go by the calling thread's
/// namespace, which must be the same.
#[derive(Debug)]
pub struct Kernel {
    netlink: Netlink,
}

impl Kernel {
    /// Opens a socket.
    ///
    /// # Errors
    /// When the kernel gives none.
    pub fn open() -> Result<Self, Error> {
        Ok(Self { netlink: Netlink::open().map_err(failed("open a netlink socket"))? })
    }

    /// The node's interfaces, for the choice of the one below.
    ///
    /// # Errors
    /// When the kernel refuses to say.
    pub fn machine(&self, can_reach: Option<IpAddr>) -> Result<Machine, Error> {
        Ok(self.netlink.machine(can_reach)?)
    }

    /// The devices of our names that are there, without what is on them.
    ///
    /// # Errors
    /// When the kernel refuses to say.
    pub fn links(&self, vni: u32) -> Result<PerFamily<super::LinkSeen>, Error> {
        let mut links = PerFamily::default();
        for family in Family::ALL {
            *links.slot(family) = self.netlink.vxlan(&device_name(family, vni))?;
        }
        Ok(links)
    }

    /// The main table's routes, both families.
    ///
    /// # Errors
    /// When the kernel refuses to say.
    pub fn routes(&self) -> Result<BTreeSet<RouteSeen>, Error> {
        let mut routes = self.netlink.main_routes(Family::V4)?;
        routes.extend(self.netlink.main_routes(Family::V6)?);
        Ok(routes)
    }

    /// All that a plan compares.
    ///
    /// # Errors
    /// When the kernel refuses to say.
    pub fn observe(&self, node: &NodeRecord, desired: &Desired) -> Result<Observed, Error> {
        let links = self.links(node.backend.vni)?;
        let mut devices = PerFamily::default();
        for (family, link) in links.iter() {
            let mut link = link.clone();
            if node.disable_tx_checksum && link.vxlan.is_some() {
                link.tx_checksum = tx_checksum(link.index);
            }
            let addresses = self.netlink.addresses(link.index)?;
            let seen = DeviceSeen {
                addresses: addresses.iter().map(|one| one.cidr).filter(|cidr| ours(*cidr, family)).collect(),
                neighbours: self.netlink.permanent_neighbours(link.index, family)?,
                fdb: match link.vxlan {
                    Some(_) => self.netlink.permanent_fdb(link.index)?,
                    None => BTreeSet::new(),
                },
                link,
            };
            *devices.slot(family) = Some(seen);
        }
        Ok(Observed {
            devices,
            routes: self.routes()?,
            sysctls: sysctls(desired),
            chains: chains(desired)?,
            subnet_env: fs::read_to_string(&node.subnet_file).ok(),
        })
    }

    /// Carries out the steps. Each is tried, whatever became of those before it; what hangs on a device that could
    /// not be made is left out.
    pub fn carry_out(&self, steps: &[Step], node: &NodeRecord) -> Vec<Failure> {
        let mut failures = Vec::new();
        let mut indexes = Indexes { vni: node.backend.vni, known: BTreeMap::new() };
        for step in steps {
            debug!("{step:?}");
            if let Err(error) = self.act(step, &mut indexes, &node.subnet_file) {
                failures.push(Failure { step: step.clone(), error });
            }
        }
        failures
    }

    fn act(&self, step: &Step, indexes: &mut Indexes, subnet_file: &Path) -> Result<(), Error> {
        match step {
            Step::DeleteDevice { name, .. } => {
                indexes.known.clear();
                fine_if_gone(self.netlink.delete_link(name))?;
            }
            Step::CreateDevice(device, _) => {
                indexes.known.clear();
                self.netlink.add_vxlan(device)?;
            }
            Step::ChangeVxlan(device, family) => {
                let Some(index) = indexes.of(*family, &self.netlink)? else { return Ok(()) };
                if let Err(e) = self.netlink.change_vxlan(index, device) {
                    // The next round makes it anew.
                    warn!("{e}: {} is made anew", device.name);
                    indexes.known.clear();
                    fine_if_gone(self.netlink.delete_link(&device.name))?;
                }
            }
            Step::SetSysctl(sysctl) => ensure(sysctl)?,
            Step::RemoveRoute(route) => fine_if_gone(self.netlink.delete_main_route(route))?,
            Step::PutChain(chain) => put_chain(chain)?,
            Step::RemoveChain(name) => {
                let removed = Nft::open().and_then(|nft| nft.remove(name));
                removed.map_err(failed(&format!("remove chain {name} from nftables")))?;
            }
            Step::WriteSubnetEnv(text) => {
                let what = format!("write {}", subnet_file.display());
                subnet_env::write(subnet_file, text).map_err(failed(&what))?;
            }
            Step::SetMac(family, _)
            | Step::SetMtu(family, _)
            | Step::SetUp(family)
            | Step::TxChecksumOff(family)
            | Step::AddAddress(family, _)
            | Step::RemoveAddress(family, _)
            | Step::PutNeighbour(family, ..)
            | Step::RemoveNeighbour(family, ..)
            | Step::PutFdb(family, ..)
            | Step::RemoveFdb(family, ..)
            | Step::PutRoute(family, ..) => {
                // That the device is missing has been said where it was to be made.
                if let Some(index) = indexes.of(*family, &self.netlink)? {
                    self.act_on(index, step)?;
                }
            }
        }
        Ok(())
    }

    /// The steps that alter a device or what is on it.
    fn act_on(&self, index: u32, step: &Step) -> Result<(), Error> {
        let netlink = &self.netlink;
        match step {
            Step::SetMac(_, mac) => netlink.set_mac(index, *mac)?,
            Step::SetMtu(_, mtu) => netlink.set_mtu(index, *mtu)?,
            Step::SetUp(_) => netlink.only_up(index)?,
            Step::TxChecksumOff(_) => {
                let done = Ethtool::open().and_then(|ethtool| ethtool.tx_checksum_off(index));
                done.map_err(failed("switch tx-checksum-ip-generic off"))?;
            }
            Step::AddAddress(_, cidr) => fine_if_there(netlink.add_address(index, *cidr))?,
            Step::RemoveAddress(_, cidr) => fine_if_gone(netlink.delete_address(index, *cidr))?,
            Step::PutNeighbour(_, ip, mac) => netlink.put_neighbour(index, *ip, *mac)?,
            Step::RemoveNeighbour(_, ip, mac) => fine_if_gone(netlink.delete_neighbour(index, *ip, *mac))?,
            Step::PutFdb(_, mac, place) => netlink.put_fdb(index, *mac, *place)?,
            Step::RemoveFdb(_, mac, place) => fine_if_gone(netlink.delete_fdb(index, *mac, *place))?,
            Step::PutRoute(_, dst, hop) => netlink.put_peer_route(index, *dst, *hop)?,
            _ => {}
        }
        Ok(())
    }
}

/// Numbers of our devices, looked up once, and again after one was made or deleted.
struct Indexes {
    vni: u32,
    known: BTreeMap<Family, Option<u32>>,
}

impl Indexes {
    fn of(&mut self, family: Family, netlink: &Netlink) -> Result<Option<u32>, netlink::Error> {
        if let Some(known) = self.known.get(&family) {
            return Ok(*known);
        }
        let found = netlink.vxlan(&device_name(family, self.vni))?.map(|link| link.index);
        self.known.insert(family, found);
        Ok(found)
    }
}

/// An address that a plan looks at: of the device's family, and not the kernel's own link-local one.
fn ours(cidr: IpNetwork, family: Family) -> bool {
    let link_local = match cidr.ip() {
        IpAddr::V4(_) => false,
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    Family::of(cidr.ip()) == family && !link_local
}

/// Nobody can say on a kernel without ethtool over netlink: then nothing is done about it either.
fn tx_checksum(index: u32) -> Option<bool> {
    let asked = Ethtool::open().and_then(|ethtool| ethtool.tx_checksum(index));
    asked.inspect_err(|e| warn!("--disable-tx-checksum: ask for the offload of device {index}: {e}")).ok()
}

fn sysctls(desired: &Desired) -> BTreeMap<String, String> {
    let keys = desired.sysctls.iter().map(|sysctl| &sysctl.key).chain(&desired.accept_ra);
    let read = |key: &String| fs::read_to_string(sysctl::file(key)).ok();
    keys.filter_map(|key| Some((key.clone(), read(key)?.trim().to_owned()))).collect()
}

fn ensure(sysctl: &Sysctl) -> Result<(), Error> {
    match sysctl.ensure() {
        Ok(true) => log::info!("set sysctl {sysctl}"),
        Ok(false) => {}
        Err(e) => return Err(Error(e.to_string())),
    }
    Ok(())
}

/// The comments of our chains' rules. A chain that does not hang where it should counts as one without any.
fn chains(desired: &Desired) -> Result<BTreeMap<String, Vec<String>>, Error> {
    let nft = match Nft::open() {
        Ok(nft) => nft,
        // A kernel without nftables has no chains; that some are wanted is said when they are put.
        Err(e) => {
            debug!("nftables: {e}");
            return Ok(BTreeMap::new());
        }
    };
    let said = failed("read nftables");
    let mut seen = BTreeMap::new();
    for base in nft.base_chains().map_err(&said)?.into_iter().filter(|base| base.is_ours()) {
        if !masquerade::CHAINS.contains(&base.name.as_str()) {
            continue;
        }
        let wanted = desired.chains.iter().find(|chain| chain.name == base.name);
        let rules = match wanted {
            Some(wanted) if !wanted.hook.has(&base) => Vec::new(),
            _ => nft.rules(&base.name).map_err(&said)?,
        };
        seen.insert(base.name, rules);
    }
    Ok(seen)
}

fn put_chain(chain: &crate::nft::Chain) -> Result<(), Error> {
    let put = Nft::open().and_then(|nft| {
        nft.replace(chain).or_else(|e| match e.raw_os_error() {
            // One of this name hangs elsewhere, or nowhere; the kernel moves none.
            Some(libc::EEXIST | libc::EOPNOTSUPP | libc::EBUSY) => {
                nft.remove(&chain.name).and_then(|()| nft.replace(chain))
            }
            _ => Err(e),
        })
    });
    put.map_err(failed(&format!("put chain {} into nftables", chain.name)))
}

/// Others' chains that drop what the overlay forwards, each said with what to do. Nothing when nftables cannot be
/// read.
#[must_use]
pub fn foreign_drops() -> Vec<String> {
    let chains = Nft::open().and_then(|nft| nft.base_chains()).unwrap_or_default();
    let dropping = chains.into_iter().filter(super::super::nft::others::BaseChain::drops_forwarded);
    let said = dropping.map(|chain| {
        format!(
            "nftables chain \"{chain}\" drops forwarded packets that no rule of its own accepts: set its policy to \
             accept, or accept the cluster's networks in it"
        )
    });
    said.collect()
}
