//! `rig`: real clusters on this machine, from a person's terminal. See docs/rig.md.
#![allow(clippy::print_stderr, clippy::print_stdout, reason = "a person's command: it talks to the terminal")]

mod arguments;
mod demo;
mod show;

use anyhow::{Context, Result, bail};
use arguments::{Request, parse};
use integration::cluster::{Cluster, rigs_dir};
use integration::host::Host;
use integration::sweep::{RIGS, sweep, sweep_killed_tests};
use integration::{balance, enter, host_init, tools, wan};
use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

const USAGE: &str = "\
usage: rig COMMAND [--name RIG]
  demo                        a minute's show: pods keep their addresses, with the cloud away too
  build                       build every program that is missing (10 to 15 minutes when all are)
  up [--nodes N]              a cluster of node1 ... nodeN (2), control plane in the cloud
     [--site A:node1,node2]   these nodes share one LAN behind one uplink; others have a site each
     [--nat node2,node3]      their sites are behind a NAT   [--same-address] and use the same addresses
     [--konnectivity]         Kubernetes' own tunnel, for logs and exec on nodes behind a NAT
     [--tunnel uds|tcp]       our edge-tunnel instead, and how kube-apiserver calls it
     [--cni ours|bridge|flannel|ours-on-flannel]   [--kube-proxy]
     [--wan delay=50ms,loss=1%,rate=20mbit]   what the uplinks are like
     [--disk-images]          so that `reboot --power-cut` can lose what was not synced
  down [--all]                remove it; with --all every rig, and what killed rigs and tests left
  cut NODE|SITE|cloud         silence: packets vanish; a site's LAN stays whole
  heal [NODE|SITE|cloud]      the end of one silence, or of all
  reboot [--power-cut] NODE   power loss: everything gone at once, the disk kept (or only what had reached it)
  kubectl ARGUMENTS...        as the cluster's admin
  enter NODE|cloud [COMMAND]  a shell on a node
  status                      hosts, daemons, nodes, pods, cuts
  logs [NODE]                 where the logs are, and how they end";

fn main() -> ExitCode {
    match run(&std::env::args().skip(1).collect::<Vec<_>>()) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("rig: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(words: &[String]) -> Result<u8> {
    if let Some(code) = run_inner(words)? {
        return Ok(code);
    }
    let Some((name, request)) = parse(words)? else {
        show::say(USAGE);
        return Ok(0);
    };
    let load = || Cluster::load(&name);
    match request {
        Request::Build => tools::build_all()?,
        Request::Demo => demo::run()?,
        Request::Up(options) => up(&name, options)?,
        Request::Down => Cluster::down_named(&name)?,
        Request::DownAll => down_all()?,
        Request::Cut(what) => load()?.cut(&what)?,
        Request::Heal(what) => load()?.heal(what.as_deref())?,
        Request::Reboot { node, power_cut } => reboot(&mut load()?, &node, power_cut)?,
        Request::Kubectl(arguments) => {
            let cluster = load()?;
            let mut command = cluster.control_plane().kubectl_command(&cluster.network().cloud)?;
            return code_of(command.args(arguments));
        }
        Request::Enter { host, command } => return enter_host(&load()?, &host, &command),
        Request::Status => show::status(&name, &load()?)?,
        Request::Logs(node) => show::logs(&load()?, node.as_deref())?,
    }
    Ok(0)
}

/// What the rig calls itself with, inside or on the way into a host.
fn run_inner(words: &[String]) -> Result<Option<u8>> {
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["host-run", spec] => host_init::run(spec)?,
        ["host-init", spec] => host_init::init(spec)?,
        ["enter-pid", pid, cgroup, ..] => {
            let pid = pid.parse().with_context(|| format!("{pid} is no process id"))?;
            let code = enter::enter(pid, Some(cgroup).filter(|id| *id != "-"), &words[3..])?;
            return Ok(Some(u8::try_from(code).unwrap_or(u8::MAX)));
        }
        ["wan", near, far, wan] => wan::forward(near, far, serde_json::from_str(wan)?)?,
        ["balance", listen, behind] => balance::serve(listen.parse()?, Path::new(behind))?,
        // For the test that kills the maker of a host.
        ["hold-host"] => {
            let host = Host::new("held")?;
            println!("{}", host.init_pid()?);
            std::io::stdin().read_to_end(&mut Vec::new())?;
        }
        _ => return Ok(None),
    }
    Ok(Some(0))
}

fn up(name: &str, options: integration::topology::Options) -> Result<()> {
    // The clock that matters to a person starts when all programs are there.
    tools::build_for(&options)?;
    let start = Instant::now();
    match Cluster::up_named(name, options) {
        Ok(cluster) => {
            show::say(format!("rig {name} is up after {:.1} s; `rig kubectl get nodes` asks it", start.elapsed().as_secs_f64()));
            show::nodes(&cluster)
        }
        Err(error) => Err(error.context(format!(
            "rig {name} did not come up; `rig logs --name {name}` shows why, `rig down --name {name}` removes it"
        ))),
    }
}

/// Every rig that has a record, then what is left of those that have none.
fn down_all() -> Result<()> {
    let rigs = rigs_dir();
    for rig in fs::read_dir(&rigs).into_iter().flatten().flatten() {
        Cluster::down_named(&rig.file_name().to_string_lossy())?;
    }
    sweep(RIGS)?;
    sweep_killed_tests()?;
    if rigs.exists() {
        fs::remove_dir_all(&rigs).with_context(|| format!("cannot remove {rigs:?}"))?;
    }
    Ok(())
}

fn reboot(cluster: &mut Cluster, node: &str, power_cut: bool) -> Result<()> {
    let start = Instant::now();
    let handle = cluster.node(node)?;
    if power_cut {
        handle.reboot_after_power_cut()?
    } else {
        handle.reboot()?
    }
    show::say(format!("{node} lost its power and is on again after {:.1} s", start.elapsed().as_secs_f64()));
    Ok(())
}

fn enter_host(cluster: &Cluster, name: &str, command: &[String]) -> Result<u8> {
    let hosts = cluster.network().hosts();
    let host = match cluster.nodes().get(name) {
        Some(node) => &node.host,
        None => hosts.iter().find(|host| host.name() == name).with_context(|| {
            let names: Vec<&str> =
                cluster.nodes().keys().map(String::as_str).chain(hosts.iter().map(|h| h.name())).collect();
            format!("there is no host {name}: there are {}", names.join(", "))
        })?,
    };
    let [program, arguments @ ..] = command else { return code_of(host.command("bash")?.arg("-i")) };
    code_of(host.command(program)?.args(arguments))
}

fn code_of(command: &mut std::process::Command) -> Result<u8> {
    let status = command.status().context("cannot start it")?;
    match status.code() {
        Some(code) => Ok(u8::try_from(code)?),
        None => bail!("it ended with {status}"),
    }
}
