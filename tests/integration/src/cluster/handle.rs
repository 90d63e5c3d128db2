//! Doing something to one node of a cluster: silence, power loss, power.

use super::{Cluster, start_daemon_and_kubelet, start_extras};
use crate::containerd;
use crate::host::Host;
use crate::node::Node;
use anyhow::{Context, Result};

/// A node of a cluster, to do something to it.
#[derive(Debug)]
pub struct NodeHandle<'c> {
    pub(super) cluster: &'c mut Cluster,
    pub(super) name: String,
}

impl NodeHandle<'_> {
    /// The node itself.
    pub fn get(&mut self) -> Result<&mut Node> {
        self.cluster.nodes.get_mut(&self.name).context("it is there: Cluster::node has looked")
    }

    /// Its machine.
    pub fn host(&mut self) -> Result<&Host> {
        Ok(&self.get()?.host)
    }

    /// Silence between this node and everybody.
    pub fn cut(self) -> Result<()> {
        self.cluster.cut(&self.name)
    }

    /// The end of the silence.
    pub fn heal(self) -> Result<()> {
        self.cluster.heal(Some(&self.name))
    }

    /// Power loss; the disk keeps all that was written.
    pub fn power_off(mut self) -> Result<()> {
        self.get()?.power_off()?;
        self.cluster.save()
    }

    /// Power loss; the disk keeps only what had reached it.
    pub fn power_cut(mut self) -> Result<()> {
        let node = self.get()?;
        node.host.power_cut()?;
        node.power_off()?;
        self.cluster.save()
    }

    /// Power on, the cable plugged in, and all that an init system would start.
    pub fn power_on(mut self) -> Result<()> {
        self.get()?.power_on()?;
        let cluster = self.cluster;
        let options = cluster.options.clone();
        let node = cluster.nodes.get_mut(&self.name).context("it is there")?;
        cluster.network.attach(&node.host)?;
        containerd::start(node)?;
        start_daemon_and_kubelet(node)?;
        start_extras(node, &options)?;
        cluster.save()
    }

    /// [`NodeHandle::power_off`] and [`NodeHandle::power_on`].
    pub fn reboot(self) -> Result<()> {
        let Self { cluster, name } = self;
        cluster.node(&name)?.power_off()?;
        cluster.node(&name)?.power_on()
    }

    /// [`NodeHandle::power_cut`] and [`NodeHandle::power_on`].
    pub fn reboot_after_power_cut(self) -> Result<()> {
        let Self { cluster, name } = self;
        cluster.node(&name)?.power_cut()?;
        cluster.node(&name)?.power_on()
    }
}
