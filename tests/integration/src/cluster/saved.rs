//! Clusters that stay: made by one run of `rig`, written down, found by the next.

use super::{Cluster, Place};
use crate::control_plane::ControlPlane;
use crate::daemons::{Daemons, DaemonsRecord};
use crate::go::cache;
use crate::network::{Network, NetworkRecord};
use crate::node::{Node, NodeRecord};
use crate::sweep::{RIGS, sweep};
use crate::topology::Options;
use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

#[derive(Serialize, Deserialize)]
struct Record {
    place: Place,
    options: Options,
    network: NetworkRecord,
    control_plane: DaemonsRecord,
    nodes: BTreeMap<String, NodeRecord>,
}

/// The folder of the rigs that persons made.
pub fn rigs_dir() -> PathBuf {
    cache().join("rigs")
}

/// A rig's folder. Checked, since `down` removes it with all that is in it.
fn dir_of(name: &str) -> Result<PathBuf> {
    ensure!(
        !name.is_empty() && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'),
        "{name:?}: a rig's name is made of a-z, 0-9 and -"
    );
    Ok(rigs_dir().join(name))
}

impl Cluster {
    /// A cluster that stays until `rig down`.
    pub fn up_named(name: &str, options: Options) -> Result<Self> {
        let dir = dir_of(name)?;
        ensure!(!dir.exists(), "rig {name} is there already: `rig down --name {name}` removes it");
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {dir:?}"))?;
        let place = Place { dir, prefix: format!("{RIGS}{name}."), stay: true };
        Self::make(options, place, None)
    }

    /// Writes down where everything is, for the next run of `rig`.
    pub(super) fn save(&self) -> Result<()> {
        let record = Record {
            place: self.place.clone(),
            options: self.options.clone(),
            network: self.network.record(),
            control_plane: self.control_plane.daemons.record(),
            nodes: self.nodes.iter().map(|(name, node)| (name.clone(), node.record())).collect(),
        };
        let file = self.place.dir.join("rig.json");
        let new = file.with_extension("new");
        fs::write(&new, serde_json::to_vec_pretty(&record)?)
            .with_context(|| format!("cannot write {new:?}"))?;
        fs::rename(&new, &file).with_context(|| format!("cannot write {file:?}"))
    }

    /// Removes the cluster that `rig up --name NAME` made, or began to make.
    pub fn down_named(name: &str) -> Result<()> {
        match Self::load(name) {
            Ok(cluster) => cluster.down(),
            Err(error) => {
                let dir = dir_of(name)?;
                if !dir.exists() {
                    return Err(error);
                }
                // Killed before it wrote anything down, or written down by another version.
                sweep(&format!("{RIGS}{name}."))?;
                fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {dir:?}"))
            }
        }
    }

    /// The cluster that `rig up --name NAME` made.
    pub fn load(name: &str) -> Result<Self> {
        let file = dir_of(name)?.join("rig.json");
        let text = fs::read(&file).with_context(|| {
            format!("there is no rig {name} (no {}): `rig up --name {name}` makes it", file.display())
        })?;
        let record: Record = serde_json::from_slice(&text).with_context(|| {
            format!(
                "{} was written by another version: `rig down --name {name}` removes what there is of it",
                file.display()
            )
        })?;
        Ok(Self {
            nodes: record.nodes.into_iter().map(|(name, node)| (name, Node::found(node))).collect(),
            network: Network::found(record.network),
            control_plane: ControlPlane::new(&record.place.dir, Daemons::found(record.control_plane)),
            options: record.options,
            place: record.place,
            _temporary: None,
        })
    }
}
