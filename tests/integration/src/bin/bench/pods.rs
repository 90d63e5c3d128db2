//! A pod's whole ADD and DEL, and a hundred at once.

use crate::{
    contest::{Attachment, Contestant, Dirs},
    measure::{Cost, median, peak_memory, percentile},
    table,
};
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::{
    process::Command,
    thread,
    time::{Duration, Instant},
};

const ROUNDS: usize = 40;

fn contestants(dirs: &Dirs) -> Result<Vec<Contestant>> {
    let Dirs { ours, debian, newest, flannel } = dirs;
    let ranges = json!([[{"subnet": "10.244.0.0/16"}]]);
    let subnet_env = "/run/flannel/subnet.env";
    std::fs::create_dir_all("/run/flannel")?;
    std::fs::write(
        subnet_env,
        "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.0.1/16\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n",
    )?;
    let bridge = |bridge: &str, ip_masq: bool| {
        json!({
            "type": "bridge", "bridge": bridge, "isDefaultGateway": true, "hairpinMode": true, "mtu": 1450,
            "ipMasq": ip_masq, "ipam": {"type": "host-local", "ranges": ranges},
        })
    };
    let edge = |bridge: &str, ip_masq: bool| {
        json!({
            "type": "edgeflannel", "bridge": bridge, "mtu": 1450, "ipMasq": ip_masq,
            "ipam": {"type": "ipam-sticky", "ranges": ranges},
        })
    };
    let ports = json!({
        "type": "portmap",
        "runtimeConfig": {"portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}]},
    });
    Ok(vec![
        Contestant::new("edgeflannel + ipam-sticky", &[ours], &[edge("br0", false)])?,
        Contestant::new("bridge + host-local (Debian)", &[debian], &[bridge("br1", false)])?,
        Contestant::new("bridge + host-local (newest)", &[newest], &[bridge("br2", false)])?,
        Contestant::new(
            "flannel + bridge + host-local",
            &[flannel, newest],
            &[json!({
                "type": "flannel", "delegate": {"bridge": "br3", "hairpinMode": true, "isDefaultGateway": true}
            })],
        )?,
        Contestant::new("edgeflannel, ipMasq", &[ours], &[edge("br4", true)])?,
        Contestant::new("bridge (Debian), ipMasq", &[debian], &[bridge("br5", true)])?,
        Contestant::new("edgeflannel, portmap", &[ours, newest], &[edge("br6", false), ports.clone()])?,
        Contestant::new("bridge (newest), portmap", &[newest], &[bridge("br7", false), ports])?,
    ])
}

fn netns(name: &str) -> Result<String> {
    let added = Command::new("ip").args(["netns", "add", name]).status()?;
    anyhow::ensure!(added.success(), "cannot make the namespace {name}");
    Ok(format!("/run/netns/{name}"))
}

fn remove_netns(name: &str) -> Result<()> {
    let removed = Command::new("ip").args(["netns", "del", name]).status()?;
    anyhow::ensure!(removed.success(), "cannot remove the namespace {name}");
    Ok(())
}

/// Runs inside a host.
pub fn inside(dirs: &Dirs) -> Result<()> {
    let contestants = contestants(dirs)?;
    let mut adds: Vec<Vec<Cost>> = vec![Vec::new(); contestants.len()];
    let mut dels = adds.clone();
    for round in 0..ROUNDS {
        for (index, contestant) in contestants.iter().enumerate() {
            let name = format!("s{index}-{round}");
            let at = Attachment { container: name.clone(), netns: netns(&name)?, pod: format!("p{round}") };
            let (add, result) = contestant.add(&at)?;
            let del = contestant.del(&at, &result)?;
            remove_netns(&name)?;
            // The first rounds make bridges, chains and state files.
            if round >= 4 {
                adds[index].push(add);
                dels[index].push(del);
            }
        }
    }
    let wall = |costs: &[Cost]| median(&costs.iter().map(|cost| cost.wall).collect::<Vec<_>>());
    let cpu = |costs: &[Cost]| median(&costs.iter().map(|cost| cost.cpu).collect::<Vec<_>>());
    let ours = (wall(&adds[0]), cpu(&adds[0]), wall(&dels[0]), cpu(&dels[0]));
    let head = ["one pod, ms", "ADD wall", "ADD CPU", "DEL wall", "DEL CPU", "peak MiB"];
    let mut rows = vec![head.map(String::from).to_vec()];
    for (index, contestant) in contestants.iter().enumerate() {
        rows.push(vec![
            contestant.name.to_owned(),
            table::ratio(wall(&adds[index]), ours.0),
            table::ratio(cpu(&adds[index]), ours.1),
            table::ratio(wall(&dels[index]), ours.2),
            table::ratio(cpu(&dels[index]), ours.3),
            format!("{:.1}", peak(contestant)?),
        ]);
    }
    rows.push(vec![
        "goal".into(),
        table::goal(ours.0, 2.0, "ms"),
        table::goal(ours.1, 1.6, "ms"),
        "about 16 ms are the kernel's".into(),
        table::goal(ours.3, 1.2, "ms"),
        String::new(),
    ]);
    table::print(&format!("A pod, {ROUNDS} rounds, contestants in turn (xN: times ours)"), &rows);
    hundred(&contestants[..4])
}

fn peak(contestant: &Contestant) -> Result<f64> {
    let at = Attachment { container: "peak".into(), netns: netns("peak")?, pod: "peak".into() };
    let step = contestant.chain.first().context("an empty chain")?;
    let env = contestant.environment("ADD", &at);
    let peak = peak_memory(&step.plugin, &env, step.conf.to_string().as_bytes())?;
    contestant.del(&at, &Value::Null)?;
    remove_netns("peak")?;
    Ok(peak)
}

/// A hundred ADDs started at once, as after a reboot.
fn hundred(contestants: &[Contestant]) -> Result<()> {
    let mut rows = vec![["100 at once, ms", "ADD all", "ADD p99", "DEL all"].map(String::from).to_vec()];
    let mut figures = vec![(Vec::new(), Vec::new(), Vec::new()); contestants.len()];
    for round in 0..3 {
        for (index, contestant) in contestants.iter().enumerate() {
            let names: Vec<String> = (0..100).map(|n| format!("h{index}-{round}-{n}")).collect();
            let at = |name: &String| -> Result<Attachment> {
                Ok(Attachment { container: name.clone(), netns: netns(name)?, pod: name.clone() })
            };
            let attachments = names.iter().map(at).collect::<Result<Vec<_>>>()?;
            let (add, each) = at_once(&attachments, |at| contestant.add(at).map(drop))?;
            let (del, _) = at_once(&attachments, |at| contestant.del(at, &Value::Null).map(drop))?;
            names.iter().try_for_each(|name| remove_netns(name))?;
            figures[index].0.push(add);
            figures[index].1.extend(each);
            figures[index].2.push(del);
        }
    }
    let of = |index: usize| {
        let (add, each, del) = &figures[index];
        (median(add), percentile(each, 99), median(del))
    };
    let ours = of(0);
    for (index, contestant) in contestants.iter().enumerate() {
        let (add, p99, del) = of(index);
        rows.push(vec![
            contestant.name.into(),
            table::ratio(add, ours.0),
            table::ratio(p99, ours.1),
            table::ratio(del, ours.2),
        ]);
    }
    rows.push(vec![
        "goal".into(),
        table::goal(ours.0, 120.0, "ms"),
        table::goal(ours.1, 120.0, "ms"),
        String::new(),
    ]);
    table::print("A hundred pods at once, 3 rounds", &rows);
    Ok(())
}

fn at_once(
    attachments: &[Attachment],
    call: impl Fn(&Attachment) -> Result<()> + Sync,
) -> Result<(Duration, Vec<Duration>)> {
    let started = Instant::now();
    let each = thread::scope(|scope| {
        let call = &call;
        let timed = move |at| {
            let started = Instant::now();
            call(at).map(|()| started.elapsed())
        };
        let running: Vec<_> = attachments.iter().map(|at| scope.spawn(move || timed(at))).collect();
        running
            .into_iter()
            .map(|thread| thread.join().map_err(|_| anyhow::anyhow!("a call panicked"))?)
            .collect::<Result<Vec<_>>>()
    })?;
    Ok((started.elapsed(), each))
}
