//! IPAM alone, as the number of addresses given out grows, and how often it makes the disk sync.

use crate::{
    contest::{Attachment, Contestant, Dirs},
    measure::{Cost, call, median, peak_memory},
    table,
};
use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use std::{fs, net::Ipv4Addr, path::Path, process::Command};

const SIZES: [u32; 3] = [1, 1_000, 60_000];
const ROUNDS: usize = 30;

/// host-local's directory with this many addresses of 10.244.0.0/16 given out.
fn reserve(dir: &Path, count: u32) -> Result<()> {
    fs::create_dir_all(dir)?;
    for number in 0..count {
        let address = Ipv4Addr::from(0x0af4_0000 + 2 + number);
        fs::write(dir.join(address.to_string()), format!("filler-{number}\r\neth0"))?;
    }
    fs::write(dir.join("last_reserved_ip.0"), Ipv4Addr::from(0x0af4_0000 + 1 + count).to_string())?;
    Ok(())
}

fn contestant(name: &'static str, dir: &std::path::PathBuf, kind: &str, data: &str) -> Result<Contestant> {
    // An IPAM plugin is called with the whole configuration of its caller.
    let conf = json!({
        "type": kind,
        "ipam": {"type": kind, "dataDir": data, "ranges": [[{"subnet": "10.244.0.0/16"}]]},
    });
    Contestant::new(name, &[dir], &[conf])
}

/// Runs inside a host.
pub fn inside(dirs: &Dirs) -> Result<()> {
    let head = ["given out", "contestant", "ADD wall ms", "ADD CPU ms", "DEL wall ms", "peak MiB"];
    let mut rows = vec![head.map(String::from).to_vec()];
    let mut ours_at = Vec::new();
    for size in SIZES {
        let contestants = [
            contestant("ipam-sticky", &dirs.ours, "ipam-sticky", &format!("/var/lib/sticky-{size}"))?,
            contestant("host-local (Debian)", &dirs.debian, "host-local", &format!("/var/lib/local-{size}"))?,
            contestant(
                "host-local (newest)",
                &dirs.newest,
                "host-local",
                &format!("/var/lib/newest-{size}"),
            )?,
        ];
        for rival in &contestants[1..] {
            let data = rival.chain[0].conf["ipam"]["dataDir"].as_str().context("no dataDir")?;
            let network = rival.chain[0].conf["name"].as_str().context("no name")?;
            reserve(&Path::new(data).join(network), size)?;
        }
        import(dirs, &contestants, size)?;

        let mut adds: Vec<Vec<Cost>> = vec![Vec::new(); contestants.len()];
        let mut dels = adds.clone();
        for round in 0..ROUNDS {
            for (index, contestant) in contestants.iter().enumerate() {
                let at = attachment(&format!("c{round}"), &format!("p{round}"));
                let (add, _) = contestant.add(&at)?;
                let del = contestant.del(&at, &Value::Null)?;
                if round >= 3 {
                    adds[index].push(add);
                    dels[index].push(del);
                }
            }
        }
        let wall = |costs: &[Cost]| median(&costs.iter().map(|cost| cost.wall).collect::<Vec<_>>());
        let cpu = |costs: &[Cost]| median(&costs.iter().map(|cost| cost.cpu).collect::<Vec<_>>());
        let ours = (wall(&adds[0]), cpu(&adds[0]), wall(&dels[0]));
        ours_at.push(ours.0);
        for (index, contestant) in contestants.iter().enumerate() {
            rows.push(vec![
                size.to_string(),
                contestant.name.into(),
                table::ratio(wall(&adds[index]), ours.0),
                table::ratio(cpu(&adds[index]), ours.1),
                table::ratio(wall(&dels[index]), ours.2),
                format!("{:.1}", peak(contestant)?),
            ]);
        }
        rows.push(vec![String::new(), "goal".into(), table::goal(ours.0, 1.0, "ms")]);
    }
    table::print("IPAM alone, /16, contestants in turn (xN: times ours)", &rows);
    let growth = ours_at.last().context("no figure")? / ours_at.first().context("no figure")?;
    println!("  ours, from 1 to 60,000: x{growth:.2}");
    println!("  syncs (fdatasync + fsync) of one ADD: {}; goal: 3", syncs(dirs)?);
    Ok(())
}

fn attachment(container: &str, pod: &str) -> Attachment {
    Attachment { container: container.into(), netns: "/run/netns/none".into(), pod: pod.into() }
}

/// Fills ours from host-local's directory, as a node does that moves to it.
fn import(dirs: &Dirs, contestants: &[Contestant; 3], size: u32) -> Result<()> {
    let conf = |contestant: &Contestant, key: &str| -> Result<String> {
        let conf = &contestant.chain[0].conf;
        let value = if key == "name" { &conf[key] } else { &conf["ipam"][key] };
        Ok(value.as_str().with_context(|| format!("no {key}"))?.to_owned())
    };
    let from = Path::new(&conf(&contestants[1], "dataDir")?).join(conf(&contestants[1], "name")?);
    let status = Command::new(dirs.ours.join("ipam-sticky"))
        .args(["import", "--host-local"])
        .arg(from)
        .args([
            "--network",
            &conf(&contestants[0], "name")?,
            "--data-dir",
            &conf(&contestants[0], "dataDir")?,
        ])
        .stdout(std::process::Stdio::null())
        .status()?;
    ensure!(status.success(), "importing {size} reservations failed");
    Ok(())
}

fn peak(contestant: &Contestant) -> Result<f64> {
    let at = attachment("peak", "peak");
    let step = &contestant.chain[0];
    let stdin = step.conf.to_string();
    let peak = peak_memory(&step.plugin, &contestant.environment("ADD", &at), stdin.as_bytes())?;
    contestant.del(&at, &Value::Null)?;
    Ok(peak)
}

/// Counts the syncs of one ADD that gives a new address, in a file that is there already.
fn syncs(dirs: &Dirs) -> Result<usize> {
    let contestant = contestant("ipam-sticky", &dirs.ours, "ipam-sticky", "/var/lib/sticky-1")?;
    let step = &contestant.chain[0];
    let traced = |at: &Attachment| -> Result<usize> {
        let env = contestant.environment("ADD", at);
        let mut words: Vec<(String, String)> = env;
        words.push(("TRACED".into(), step.plugin.to_string_lossy().into_owned()));
        let script = Path::new("/run/traced");
        fs::write(
            script,
            "#!/bin/sh\nexec strace -f -o /run/trace -e trace=fdatasync,fsync,sync_file_range,msync \"$TRACED\"\n",
        )?;
        Command::new("chmod").arg("+x").arg(script).status()?;
        let output = call(script, &words, step.conf.to_string().as_bytes())?;
        ensure!(output.status.success(), "traced ADD: {}", String::from_utf8_lossy(&output.stdout));
        let trace = fs::read_to_string("/run/trace")?;
        Ok(trace.lines().filter(|line| line.contains("sync(")).count())
    };
    let at = attachment("traced", "traced");
    let count = traced(&at)?;
    contestant.del(&at, &Value::Null)?;
    Ok(count)
}
