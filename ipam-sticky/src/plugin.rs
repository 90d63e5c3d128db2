//! The CNI verbs: configuration in, one decision through the store, result out.

use crate::{
    address::Address,
    allocate::{Refusal, Wish, choose},
    config::{Config, Place, Requested, Written},
    fault::Fault,
    identity::{Identity, Key},
    ownership,
    range::Pools,
    record::Owner,
    resolv,
    store::{self, Store},
    view::{Attachment, Changes, View},
};
use cni::{AttachmentId, Call, Dns, Error, Ip, NetConf, Plugin, Success};
use std::{collections::HashSet, fs, net::IpAddr, path::Path};

/// Longer than any runtime's; a key of the state has to end somewhere.
const LONGEST_ID: usize = 512;

/// What CNI_ARGS may say without `IgnoreUnknown`.
const KNOWN_ARGS: [&str; 5] =
    ["IP", "K8S_POD_NAMESPACE", "K8S_POD_NAME", "K8S_POD_INFRA_CONTAINER_ID", "K8S_POD_UID"];

/// Our own codes, from 100 on.
mod code {
    /// Every address of a range set is in use or pinned.
    pub const EXHAUSTED: u32 = 100;
    /// A requested address cannot be had.
    pub const NOT_AVAILABLE: u32 = 101;
    /// CHECK: the container does not own what the previous result says.
    pub const NOT_OWNED: u32 = 102;
}

/// The plugin. `boot` is the id of this boot.
#[derive(Debug, Clone)]
pub struct Sticky {
    boot: String,
}

impl Sticky {
    /// The plugin on this machine.
    #[must_use]
    pub fn here() -> Self {
        Self { boot: boot_id() }
    }

    fn store(&self, place: Place) -> Store {
        Store::new(place, self.boot.clone())
    }

    /// For the verbs that ask nothing of the ranges.
    fn open(&self, conf: &NetConf) -> Result<Store, Error> {
        let place = read(conf)?.place(conf.name.as_str())?;
        Ok(self.store(place))
    }
}

/// This boot's id, or nothing where the kernel does not tell.
#[must_use]
pub fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

impl Plugin for Sticky {
    fn about(&self) -> String {
        format!("ipam-sticky {}: keeps each pod's addresses bound to its name", env!("CARGO_PKG_VERSION"))
    }

    fn add(&self, call: &Call, at: &cni::Attachment, netns: &Path) -> Result<Success, Error> {
        let conf = &call.conf;
        let config = read(conf)?.config(conf.name.as_str(), conf.version)?;
        at.args.refuse_unknown(&KNOWN_ARGS)?;
        let (container, ifname) = (at.id.container_id.as_str(), at.id.ifname.as_str());
        if container.len() > LONGEST_ID {
            return Err(Error::invalid_environment(format!(
                "CNI_CONTAINERID has {} characters; up to {LONGEST_ID} are kept",
                container.len()
            )));
        }
        let identity = Identity::of(container, ifname, &at.args)?;
        let requested = requested(&config.requested, at.args.get("IP"))?;
        let dns = dns(&config)?;
        let store = self.store(config.place.clone());
        let uid = at.args.get("K8S_POD_UID").unwrap_or_default();
        let owner = Owner::new(container, &netns.to_string_lossy(), &self.boot, uid);
        let decide = |view: &dyn View| {
            ownership::acquire(&config.pools, view, &identity, owner.clone(), &requested, &store.now())
        };
        let addresses = store.serve(&decide).map_err(|error| answer(error, &format!("ADD {identity}")))?;
        let ips = addresses.iter().map(|address| state(&config.pools, *address)).collect::<Result<_, _>>()?;
        Ok(Success { ips, routes: config.routes, dns, ..Success::default() })
    }

    fn del(&self, call: &Call, at: &cni::Attachment, _: Option<&Path>) -> Result<(), Error> {
        let store = self.open(&call.conf)?;
        let at = attachment(&at.id);
        store
            .serve(&|view: &dyn View| Ok(((), ownership::release(view, &at, &store.now())?)))
            .map_err(|error| answer(error, &format!("DEL {} {}", at.container, at.ifname)))
    }

    fn check(&self, call: &Call, at: &cni::Attachment, _: &Path) -> Result<(), Error> {
        let store = self.open(&call.conf)?;
        let at = attachment(&at.id);
        let stated = call.conf.prev_result.iter().flat_map(|result| &result.ips);
        let stated: HashSet<Address> = stated.map(|ip| ip.address.ip().to_canonical().into()).collect();
        let owned = store
            .serve(&|view: &dyn View| Ok((owned(view, &at)?, Changes::default())))
            .map_err(|error| answer(error, &format!("CHECK {} {}", at.container, at.ifname)))?;
        if owned == stated {
            return Ok(());
        }
        Err(Error::plugin(
            code::NOT_OWNED,
            format!(
                "container {} owns {} as {}, and the previous result says {}: add it again",
                at.container,
                list(&owned),
                at.ifname,
                list(&stated)
            ),
        ))
    }

    fn gc(&self, call: &Call, valid: Option<&[AttachmentId]>) -> Result<(), Error> {
        let store = self.open(&call.conf)?;
        // No list is not an empty list: nothing is known, so nothing is freed.
        let Some(valid) = valid else {
            log::warn!("GC without cni.dev/valid-attachments: nothing is freed");
            return Ok(());
        };
        let valid: HashSet<Attachment> = valid.iter().map(attachment).collect();
        store
            .serve(&|view: &dyn View| Ok(((), ownership::collect(view, &valid, &store.now())?)))
            .map_err(|error| answer(error, "GC"))
    }

    fn status(&self, call: &Call) -> Result<(), Error> {
        let conf = &call.conf;
        let config = read(conf)?.config(conf.name.as_str(), conf.version)?;
        let store = self.store(config.place.clone());
        let key = Identity::Container { id: "status".into(), ifname: "status".into() }.key();
        let unavailable = |why: String| Error::not_available(format!("STATUS: {why}"));
        dns(&config).map_err(|error| unavailable(error.msg))?;
        store
            .serve(&|view: &dyn View| {
                let wish = Wish { key: &key, requested: &[] };
                choose(&config.pools, view, wish, &store.now()).map(|_| ((), Changes::default()))
            })
            .map_err(|error| unavailable(error.to_string()))?;
        store.can_write().map_err(|error| unavailable(error.to_string()))
    }
}

fn read(conf: &NetConf) -> Result<Written, Error> {
    let written = Written::read(conf)?;
    let log = written.log();
    cni::logging::init(log.file.as_deref(), log.level.as_deref());
    Ok(written)
}

fn attachment(id: &AttachmentId) -> Attachment {
    Attachment { container: id.container_id.as_str().into(), ifname: id.ifname.as_str().into() }
}

/// Everything asked for: by the configuration, and by `IP` in CNI_ARGS unless args.cni.ips outranks it.
fn requested(written: &Requested, ip: Option<&str>) -> Result<Vec<Address>, Error> {
    let mut requested = written.addresses.clone();
    let ip = ip.filter(|ip| !ip.is_empty() && !written.ignore_cni_args);
    for ip in ip.into_iter().flat_map(|ip| ip.split(',')) {
        let parsed = ip.trim().parse::<IpAddr>();
        let parsed = parsed
            .map_err(|_| Error::invalid_environment(format!("CNI_ARGS: IP={ip} is not an IP address")))?;
        requested.push(parsed.to_canonical().into());
    }
    Ok(requested)
}

fn dns(config: &Config) -> Result<Dns, Error> {
    let Some(path) = &config.resolv_conf else { return Ok(Dns::default()) };
    let text = fs::read_to_string(path).map_err(|error| {
        Error::invalid_config(format!("ipam.resolvConf: read {}: {error}", path.display()))
    })?;
    Ok(resolv::parse(&text))
}

fn state(pools: &Pools, address: Address) -> Result<Ip, Error> {
    let range = pools.find(address).map(|(_, range)| range);
    let stated = range.and_then(|range| Some((range.state(address)?, range.gateway.ip())));
    let (address, gateway) =
        stated.ok_or_else(|| Error::internal(format!("{address} was chosen and is in no range")))?;
    Ok(Ip { address, gateway: Some(gateway), interface: None })
}

/// What a container owns. One that only owned it before owns nothing.
fn owned(view: &dyn View, at: &Attachment) -> Result<HashSet<Address>, Fault> {
    let Some(key) = view.key_of(at)? else { return Ok(HashSet::new()) };
    let key: Key = key;
    let binding = view.binding(&key)?.unwrap_or_default();
    let owns = binding.owner.is_some_and(|owner| owner.container == at.container);
    Ok(if owns { binding.addresses.into_iter().collect() } else { HashSet::new() })
}

fn list(addresses: &HashSet<Address>) -> String {
    let mut sorted: Vec<Address> = addresses.iter().copied().collect();
    sorted.sort_unstable();
    let texts: Vec<String> = sorted.iter().map(ToString::to_string).collect();
    if texts.is_empty() { "no address".into() } else { texts.join(", ") }
}

/// The store's words as the protocol's code.
fn answer(error: store::Error, doing: &str) -> Error {
    use store::Error::{Busy, Newer, Refused, Storage, Unwritable};
    let msg = error.to_string();
    let answer = match error {
        Busy(..) | Unwritable(_) => Error::try_again(msg),
        Newer(..) => Error::invalid_config(msg),
        Storage(_) | Refused(Refusal::Fault(_)) => Error::io(msg),
        Refused(Refusal::Exhausted(_)) => Error::plugin(code::EXHAUSTED, msg),
        Refused(Refusal::NotAvailable { .. }) => Error::plugin(code::NOT_AVAILABLE, msg),
    };
    answer.context(doing)
}
