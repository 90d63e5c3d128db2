//! The CNI verbs of edgeflannel: which part does what, in which order.

use crate::{
    config::{Config, Log, Ranges},
    ipam,
    netns::Netns,
    overlay::restore::{self, Restored},
    pod::{
        check::{self, Drift, Expected},
        kernel::{self, Kernel},
        look,
        plan::{self, Refusal, SeenBridge},
        remove,
        wanted::{Subject, Wanted},
    },
    subnet_env::SubnetEnv,
};
use cni::{Attachment, AttachmentId, Call, Delegate, Error, Plugin, Success};
use log::warn;
use std::{borrow::Cow, fs, io, path::Path};

/// Error code of CHECK for what is missing or not as it was made.
const DRIFT: u32 = 102;

/// The plugin.
#[derive(Debug)]
pub struct Edgeflannel;

impl Plugin for Edgeflannel {
    fn about(&self) -> String {
        format!(
            "edgeflannel {}: wires pods to the node's bridge, for flannel-compatible edge nodes",
            env!("CARGO_PKG_VERSION")
        )
    }

    fn add(&self, call: &Call, at: &Attachment, netns: &Path) -> Result<Success, Error> {
        start_log(call)?;
        let config = Config::new(&call.conf, Some(at))?;
        restore_overlay(&config);
        let subnet = ipam::node_subnet(&config)?;
        let ipam = Ipam::find(call, &config, subnet.as_ref())?;
        let of = Subject { network: &call.conf.name, at: &at.id, netns };
        let kernel = Kernel::open(open_netns(netns)?).map_err(refused)?;
        if kernel.pod_has(at.id.ifname.as_str()).map_err(refused)? {
            return Err(Error::invalid_environment(format!(
                "CNI_IFNAME {} exists already in {}; DEL it first, or choose another",
                at.id.ifname,
                netns.display()
            )));
        }
        let bridge = kernel.see_bridge(config.bridge.as_str()).map_err(refused)?;
        let made = match ipam.delegate.add(&ipam.stdin) {
            Ok(given) => wire(of, &config, subnet.as_ref(), &given, &kernel, bridge),
            Err(error) => Err(error),
        };
        // Also when the IPAM plugin itself failed (spec section 4): it may have been killed half-way.
        if made.is_err()
            && let Err(e) = ipam.delegate.del(&ipam.stdin)
        {
            warn!("giving the address back after a failed ADD: {e}");
        }
        made
    }

    fn del(&self, call: &Call, at: &Attachment, netns: Option<&Path>) -> Result<(), Error> {
        start_log(call)?;
        let config = Config::new(&call.conf, None)?;
        let deleted =
            remove::attachment(&call.conf.name, &at.id, config.bridge.as_str(), netns).map_err(refused);
        // Only now: as long as the veth is there, the address must not be anybody else's.
        let released = release(call, &config);
        match fs::remove_file(config.flannel_data_dir.join(at.id.container_id.as_str())) {
            Err(e) if !matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                warn!("flannel's note about container {}: {e}", at.id.container_id);
            }
            _ => {}
        }
        deleted.and(released)
    }

    fn check(&self, call: &Call, at: &Attachment, netns: &Path) -> Result<(), Error> {
        start_log(call)?;
        let config = Config::new(&call.conf, Some(at))?;
        let subnet = ipam::node_subnet(&config)?;
        let of = Subject { network: &call.conf.name, at: &at.id, netns };
        let result = call.conf.prev_result.clone().unwrap_or_default();
        let expected = Expected::new(of, &config, subnet.as_ref(), &result);
        let observed =
            Kernel::open(open_netns(netns)?).and_then(|kernel| kernel.observe(&expected)).map_err(refused)?;
        let drift: Vec<String> = check::drift(&expected, &observed).iter().map(Drift::to_string).collect();
        if !drift.is_empty() {
            return Err(Error::plugin(DRIFT, drift.join("; ")));
        }
        let ipam = Ipam::find(call, &config, subnet.as_ref())?;
        ipam.delegate.check(&ipam.stdin)
    }

    fn gc(&self, call: &Call, valid: Option<&[AttachmentId]>) -> Result<(), Error> {
        start_log(call)?;
        let config = Config::new(&call.conf, None)?;
        let removed = match valid {
            Some(valid) => remove::all_but(&call.conf.name, valid).map_err(refused),
            None => Ok(()),
        };
        let subnet = ipam::node_subnet(&config).unwrap_or_default();
        let collected =
            Ipam::find(call, &config, subnet.as_ref()).and_then(|ipam| ipam.delegate.gc(&ipam.stdin));
        removed.and(collected)
    }

    fn status(&self, call: &Call) -> Result<(), Error> {
        start_log(call)?;
        let config = Config::new(&call.conf, None)?;
        // A runtime that asks first and is told "not available" never comes with the ADD that would restore it.
        restore_overlay(&config);
        let subnet =
            ipam::node_subnet(&config).map_err(|e| Error::not_available(e.msg).with_details(e.details))?;
        let bridge = config.bridge.as_str();
        look::bridge_is_usable(bridge).map_err(|e| Error::not_available(e.to_string()))?;
        let ipam = Ipam::find(call, &config, subnet.as_ref())?;
        ipam.delegate.status(&ipam.stdin)
    }
}

/// The part of ADD that has something to lose: IPAM has given addresses.
fn wire(
    of: Subject<'_>,
    config: &Config,
    subnet: Option<&SubnetEnv>,
    given: &Success,
    kernel: &Kernel,
    bridge: Option<SeenBridge>,
) -> Result<Success, Error> {
    let wanted = Wanted::new(of, config, subnet, given, bridge.as_ref()).map_err(cannot)?;
    let seen = kernel.see(&wanted, bridge).map_err(refused)?;
    let steps = plan::steps(&wanted, &seen).map_err(cannot)?;
    kernel.carry_out(&steps, &wanted).map_err(refused)?;
    Ok(wanted.result)
}

/// Brings the node's overlay back from its record when it is not up, which is so for the first pod after a reboot.
/// A pod is wired to its node also when that fails: the next pod, or the daemon, tries again.
fn restore_overlay(config: &Config) {
    let run_dir = Path::new(restore::RUN_DIR);
    let subnet_known = || match &config.ipam.ranges {
        Ranges::SubnetFile(file) => file.exists(),
        Ranges::Inline(_) => true,
    };
    if restore::is_up(run_dir, subnet_known) {
        return;
    }
    match restore::restore(&config.state_dir, run_dir, subnet_known) {
        Ok(Restored::OtherHost(name)) => warn!(
            "the node record in {} was written on {name}, and this host is {}: the overlay is not restored from it",
            config.state_dir.display(),
            restore::host_name()
        ),
        Ok(_) => {}
        Err(e) => warn!("the overlay is not restored: {e}"),
    }
}

/// The IPAM plugin, and what it is told.
struct Ipam<'a> {
    delegate: Delegate<'a>,
    stdin: Cow<'a, [u8]>,
}

impl<'a> Ipam<'a> {
    fn find(call: &'a Call, config: &Config, subnet: Option<&SubnetEnv>) -> Result<Self, Error> {
        let delegate = call.path.find(&config.ipam.kind)?;
        Ok(Self { delegate, stdin: ipam::stdin(&call.conf, config, subnet) })
    }
}

/// IPAM DEL. A node that does not know its subnet yet (just booted) can still release: bindings go by container.
fn release(call: &Call, config: &Config) -> Result<(), Error> {
    let subnet = ipam::node_subnet(config);
    let ipam = Ipam::find(call, config, subnet.as_ref().ok().and_then(Option::as_ref))?;
    ipam.delegate.del(&ipam.stdin).map_err(|error| match subnet {
        Err(unknown) => unknown.with_details(error.to_string()),
        Ok(_) => error,
    })
}

fn start_log(call: &Call) -> Result<(), Error> {
    let log: Log = call.conf.decode()?;
    cni::logging::init(log.log_file.as_deref(), log.log_level.as_deref());
    Ok(())
}

fn open_netns(path: &Path) -> Result<Netns, Error> {
    Netns::open(path).map_err(|e| {
        let msg = format!("CNI_NETNS {}: {e}", path.display());
        match e.kind() {
            io::ErrorKind::NotFound => Error::unknown_container(msg),
            _ => Error::invalid_environment(msg),
        }
    })
}

fn refused(error: kernel::Error) -> Error {
    Error::io(error.to_string())
}

fn cannot(refusal: Refusal) -> Error {
    match refusal {
        Refusal::NoAddress => Error::invalid_config(refusal.to_string()),
        Refusal::OtherGateway(_) => Error::invalid_config(refusal.to_string()),
    }
}
