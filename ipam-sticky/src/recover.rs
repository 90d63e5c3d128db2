//! What the node still knows of a network when the state is new or damaged: libcni's result cache and
//! host-local's reservations.

use crate::{
    address::Address,
    config::Place,
    identity::Identity,
    record::Owner,
    view::{Changes, Draft, View},
};
use cni::Args;
use serde::Deserialize;
use serde_json::Value;
use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs, io,
    net::IpAddr,
    path::Path,
};

/// What one attachment is known by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trace {
    /// Whose it is.
    pub identity: Identity,
    /// Its addresses.
    pub addresses: Vec<Address>,
    /// Its container.
    pub owner: Owner,
    /// Whether the container may be running.
    pub alive: bool,
}

/// A line of libcni's cache, as far as it matters here.
#[derive(Deserialize, Default)]
#[serde(default, rename_all = "camelCase")]
struct Cached {
    container_id: String,
    if_name: String,
    network_name: String,
    netns: String,
    cni_args: Vec<(String, String)>,
    result: Value,
}

/// The attachments of a network that libcni remembers. What cannot be read is left out.
#[must_use]
pub fn result_cache(place: &Place, boot: &str, lives: &dyn Fn(&str) -> bool) -> Vec<Trace> {
    let mut files = entries(&place.cache_dir.join("results"));
    let prefix = format!("{}-", place.network);
    files.retain(|(name, _)| name.starts_with(&prefix));
    let traces = files.into_iter().filter_map(|(name, path)| {
        let read = fs::read(&path).ok().and_then(|bytes| serde_json::from_slice::<Cached>(&bytes).ok());
        if read.is_none() {
            log::warn!("{name} in libcni's cache cannot be read and is left out");
        }
        trace(read?, &place.network, boot, lives)
    });
    traces.collect()
}

fn trace(cached: Cached, network: &str, boot: &str, lives: &dyn Fn(&str) -> bool) -> Option<Trace> {
    if cached.network_name != network || cached.container_id.is_empty() || cached.if_name.is_empty() {
        return None;
    }
    let pairs: Vec<String> = cached.cni_args.iter().map(|(key, value)| format!("{key}={value}")).collect();
    let args = Args::parse(&pairs.join(";")).unwrap_or_default();
    let identity = Identity::of(&cached.container_id, &cached.if_name, &args).ok()?;
    let netns = match cached.netns.is_empty() {
        true => sandbox(&cached.result).unwrap_or_default(),
        false => cached.netns,
    };
    let alive = !netns.is_empty() && lives(&netns);
    let uid = args.get("K8S_POD_UID").unwrap_or_default();
    let boot = if alive { boot } else { "" };
    let owner = Owner::new(&cached.container_id, &netns, boot, uid);
    Some(Trace { identity, addresses: addresses(&cached.result), owner, alive })
}

/// The namespace of the container's device, for runtimes whose cache does not name it.
fn sandbox(result: &Value) -> Option<String> {
    let devices = result.get("interfaces")?.as_array()?;
    let found =
        devices.iter().find_map(|device| device.get("sandbox")?.as_str().filter(|path| !path.is_empty()));
    found.map(String::from)
}

/// The addresses of a result of any version.
fn addresses(result: &Value) -> Vec<Address> {
    let listed = result.get("ips").and_then(Value::as_array).into_iter().flatten();
    let listed = listed.filter_map(|ip| ip.get("address"));
    let legacy = ["ip4", "ip6"].into_iter().filter_map(|family| result.get(family)?.get("ip"));
    let bare = |written: &Value| written.as_str()?.split('/').next()?.parse::<IpAddr>().ok();
    listed.chain(legacy).filter_map(bare).map(|ip| ip.to_canonical().into()).collect()
}

/// What host-local has reserved, and the address it gave last per range set.
///
/// # Errors
/// When the directory cannot be read.
pub fn host_local(
    directory: &Path,
    known: &[Trace],
    boot: &str,
) -> io::Result<(Vec<Trace>, BTreeMap<usize, Address>)> {
    let by_container: HashMap<(&str, &str), &Trace> = known
        .iter()
        .map(|trace| ((trace.owner.container.as_str(), trace.identity.ifname()), trace))
        .collect();
    let mut traces: Vec<Trace> = Vec::new();
    let mut cursors = BTreeMap::new();
    fs::read_dir(directory)?;
    for (name, path) in entries(directory) {
        let text = fs::read_to_string(&path).unwrap_or_default();
        if let Some(set) = name.strip_prefix("last_reserved_ip.") {
            let last = text.trim().parse::<Address>();
            cursors.extend(set.parse::<usize>().ok().zip(last.ok()));
            continue;
        }
        let Ok(address) = name.parse::<Address>() else { continue };
        let mut lines = text.lines().map(str::trim);
        let container = lines.next().unwrap_or_default();
        if container.is_empty() {
            log::warn!("{}: the reservation is empty and is left out", path.display());
            continue;
        }
        let ifname = lines.next().filter(|ifname| !ifname.is_empty()).unwrap_or("eth0");
        let trace = match by_container.get(&(container, ifname)) {
            Some(known) => Trace { addresses: vec![address], ..(*known).clone() },
            None => Trace {
                identity: Identity::Container { id: container.into(), ifname: ifname.into() },
                addresses: vec![address],
                // Nothing says that it is gone, so it counts as running until the next boot.
                owner: Owner::new(container, "", boot, ""),
                alive: true,
            },
        };
        match traces
            .iter_mut()
            .find(|other| other.owner.container == container && other.identity == trace.identity)
        {
            Some(other) => other.addresses.push(address),
            None => traces.push(trace),
        }
    }
    Ok((traces, cursors))
}

/// The plain files of a directory by name, sorted.
fn entries(directory: &Path) -> Vec<(String, std::path::PathBuf)> {
    let Ok(listing) = fs::read_dir(directory) else { return Vec::new() };
    let named = listing.filter_map(|entry| {
        let entry = entry.ok()?;
        Some((entry.file_name().into_string().ok()?, entry.path()))
    });
    let mut files: Vec<_> = named.collect();
    files.sort();
    files
}

/// The result of an import.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Import {
    /// What to write.
    pub changes: Changes,
    /// How many bindings got an address.
    pub bindings: usize,
    /// How many had theirs already.
    pub known: usize,
    /// What was left out, a sentence each.
    pub conflicts: Vec<String>,
}

/// Turns traces into bindings beside what the state has. Nobody loses an address; running containers come first.
///
/// # Errors
/// The view's.
pub fn import(view: &dyn View, traces: &[Trace]) -> Result<Import, crate::fault::Fault> {
    let mut draft = Draft::new(view);
    let mut taken: HashSet<Address> = HashSet::new();
    let mut import = Import::default();
    let (alive, gone): (Vec<&Trace>, Vec<&Trace>) = traces.iter().partition(|trace| trace.alive);
    for trace in alive.into_iter().chain(gone) {
        let key = trace.identity.key();
        if !trace.alive && !trace.identity.is_sticky() {
            continue;
        }
        let mut binding = draft.binding(&key)?.unwrap_or_default();
        let before = binding.clone();
        for address in &trace.addresses {
            if binding.addresses.contains(address) {
                continue;
            }
            let family = |other: &&Address| other.is_ipv4() == address.is_ipv4();
            if let Some(other) = before.addresses.iter().find(family) {
                import.conflicts.push(format!("{key} keeps {other} and does not get {address}"));
            } else if taken.contains(address) || view.holder(*address)?.is_some() {
                import.conflicts.push(format!("{address} of {key} is another's already"));
            } else {
                taken.insert(*address);
                binding.addresses.push(*address);
            }
        }
        let knows = binding.containers().any(|container| container == trace.owner.container);
        if trace.alive && !binding.addresses.is_empty() && !knows {
            match &binding.owner {
                None => binding.owner = Some(trace.owner.clone()),
                Some(_) => binding.former.push(trace.owner.clone()),
            }
        }
        if binding == before || binding.addresses.is_empty() {
            let has = |address| before.addresses.contains(address);
            import.known += usize::from(!trace.addresses.is_empty() && trace.addresses.iter().all(has));
            continue;
        }
        binding.sequence = draft.next_sequence()?;
        import.bindings += 1;
        draft.put(&key, binding);
    }
    import.changes = draft.changes;
    Ok(import)
}
