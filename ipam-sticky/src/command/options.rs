//! The command line.

use super::Failure;
use crate::{
    address::Address,
    config::{CACHE_DIR, DATA_DIR, Place, RUN_DIR},
    identity::{Identity, Key},
    plugin::boot_id,
    record::Binding,
    store::Store,
    tables::Snapshot,
    view::View,
};
use lexopt::{
    Arg::{Long, Short, Value},
    Parser, ValueExt,
};
use std::{ffi::OsString, fs, path::PathBuf};

/// A command line, read.
#[derive(Debug, Default)]
pub struct Options {
    /// The command's name.
    pub command: String,
    /// What came after it.
    pub operands: Vec<String>,
    /// `-o json`
    pub json: bool,
    /// `--stale`
    pub stale: bool,
    /// `--dry-run`
    pub dry_run: bool,
    /// `--host-local`
    pub host_local: Option<PathBuf>,
    /// `--ifname`
    pub ifname: Option<String>,
    network: Option<String>,
    data_dir: Option<PathBuf>,
    cache_dir: Option<PathBuf>,
    run_dir: Option<PathBuf>,
}

impl Options {
    /// Reads the arguments. `None` when help was asked for, or nothing.
    pub fn read(args: impl Iterator<Item = OsString>) -> Result<Option<Self>, Failure> {
        let mut options = Self::default();
        match options.parse(&mut Parser::from_args(args)) {
            Ok(false) => Ok(None),
            Ok(true) if options.command.is_empty() => Ok(None),
            Ok(true) => Ok(Some(options)),
            Err(error) => Err(Failure::usage(error.to_string())),
        }
    }

    fn parse(&mut self, parser: &mut Parser) -> Result<bool, lexopt::Error> {
        while let Some(arg) = parser.next()? {
            match arg {
                Long("help") | Short('h') => return Ok(false),
                Long("network") => self.network = Some(parser.value()?.string()?),
                Long("data-dir") => self.data_dir = Some(parser.value()?.into()),
                Long("cache-dir") => self.cache_dir = Some(parser.value()?.into()),
                Long("run-dir") => self.run_dir = Some(parser.value()?.into()),
                Long("host-local") => self.host_local = Some(parser.value()?.into()),
                Long("ifname") => self.ifname = Some(parser.value()?.string()?),
                Long("stale") => self.stale = true,
                Long("dry-run") => self.dry_run = true,
                Short('o') | Long("output") => {
                    let value = parser.value()?.string()?;
                    self.json = match value.as_str() {
                        "json" => true,
                        "table" => false,
                        _ => return Err(format!("-o {value} is neither table nor json").into()),
                    };
                }
                Value(value) if self.command.is_empty() => self.command = value.string()?,
                Value(value) => self.operands.push(value.string()?),
                _ => return Err(arg.unexpected()),
            }
        }
        Ok(true)
    }

    /// The operands, when there are as many as this.
    pub fn operands<const N: usize>(&self, names: &str) -> Result<[&str; N], Failure> {
        let operands: Vec<&str> = self.operands.iter().map(String::as_str).collect();
        operands.try_into().map_err(|_| Failure::usage(format!("{} takes {names}", self.command)))
    }

    /// The state that the command is about.
    pub fn store(&self) -> Result<Store, Failure> {
        Ok(Store::new(self.place()?, boot_id()))
    }

    /// Where it is.
    pub fn place(&self) -> Result<Place, Failure> {
        let data_dir = self.data_dir.clone().unwrap_or_else(|| DATA_DIR.into());
        let network = match &self.network {
            Some(network) => network.clone(),
            None => only_network(&data_dir)?,
        };
        cni::NetworkName::parse(&network).map_err(|error| Failure::usage(error.msg))?;
        let mut place = Place::new(&network, data_dir);
        place.cache_dir = self.cache_dir.clone().unwrap_or_else(|| CACHE_DIR.into());
        place.run_dir = self.run_dir.clone().unwrap_or_else(|| RUN_DIR.into());
        Ok(place)
    }
}

fn only_network(data_dir: &PathBuf) -> Result<String, Failure> {
    let listing = fs::read_dir(data_dir).map_err(|error| {
        Failure::new(format!("read {}: {error}; --data-dir names another", data_dir.display()))
    })?;
    let names = listing.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut networks: Vec<String> =
        names.filter_map(|name| name.strip_suffix(".redb").map(String::from)).collect();
    networks.sort();
    match networks.as_slice() {
        [only] => Ok(only.clone()),
        [] => Err(Failure::new(format!("{} holds the state of no network yet", data_dir.display()))),
        several => Err(Failure::usage(format!("choose one with --network: {}", several.join(", ")))),
    }
}

/// `NAMESPACE/POD` in parts.
pub fn pod(operand: &str) -> Result<(&str, &str), Failure> {
    let parts = operand.split_once('/').filter(|(namespace, pod)| !namespace.is_empty() && !pod.is_empty());
    parts.ok_or_else(|| Failure::usage(format!("{operand:?} is not NAMESPACE/POD")))
}

/// The key of one interface of a pod.
pub fn key(operand: &str, ifname: &str) -> Result<Key, Failure> {
    let (namespace, name) = pod(operand)?;
    let identity = Identity::pod(namespace, name, ifname);
    identity.map(|identity| identity.key()).map_err(|why| Failure::usage(format!("{operand:?} {why}")))
}

/// An address operand.
pub fn address(operand: &str) -> Result<Address, Failure> {
    operand.parse().map_err(|_| Failure::usage(format!("{operand:?} is not an IP address")))
}

/// The bindings of a pod among all: of the interface asked for, or of every one.
pub fn of_pod(all: Vec<(Key, Binding)>, operand: &str, ifname: Option<&str>) -> Vec<(Key, Binding)> {
    let is_it = |key: &Key| match key.identity() {
        Identity::Pod { namespace, pod, ifname: its } => {
            format!("{namespace}/{pod}") == operand && ifname.is_none_or(|ifname| ifname == its)
        }
        Identity::Container { .. } => false,
    };
    all.into_iter().filter(|(key, _)| is_it(key)).collect()
}

/// Every binding of the state.
pub fn bindings(store: &Store) -> Result<Vec<(Key, Binding)>, Failure> {
    Ok(store.look(&|database| Snapshot::of(database)?.bindings())?)
}
