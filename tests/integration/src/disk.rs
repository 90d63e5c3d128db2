//! A disk that is an ext4 image on a loop device, so that a power cut loses what nobody synced.

use crate::exec::{COMMAND_LIMIT, run};
use crate::leaks::loop_device;
use anyhow::{Context, Result, bail};
use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

/// Room for images and pods; the file is sparse.
const SIZE: u64 = 4 << 30;

/// Makes an empty image.
pub fn make_image(image: &Path) -> Result<()> {
    let file = File::create(image).with_context(|| format!("cannot make {image:?}"))?;
    file.set_len(SIZE)?;
    run(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(image), b"", COMMAND_LIMIT)?.ok().map(drop)
}

/// Mounts it (in this mount namespace); the loop device goes with the mount.
pub fn mount_image(image: &Path, on: &Path) -> Result<()> {
    fs::create_dir_all(on)?;
    run(Command::new("mount").args(["-o", "loop"]).arg(image).arg(on), b"", COMMAND_LIMIT)?.ok().map(drop)
}

/// Copies the image of a mounted file system as it is on the disk at one moment, syncing nothing. The caller has frozen whoever writes;
/// the kernel may still write back at any time, so a copy during which it did is thrown away.
pub fn copy_unsynced(image: &Path, to: &Path) -> Result<()> {
    let device = loop_device(image).with_context(|| format!("{image:?} is not mounted"))?;
    for _ in 0..20 {
        let before = written(&device)?;
        let mut copy = Command::new("cp");
        copy.arg("--sparse=always").arg(image).arg(to);
        run(&mut copy, b"", COMMAND_LIMIT)?.ok()?;
        if before.in_flight == 0 && written(&device)? == before {
            return Ok(());
        }
    }
    bail!("the kernel wrote to {image:?} during each of 20 copies")
}

#[derive(Debug, PartialEq, Eq)]
struct Written {
    sectors: u64,
    in_flight: u64,
}

/// From /sys/block/loopN/stat: sectors written so far, requests under way.
fn written(device: &str) -> Result<Written> {
    let path = format!("{device}/stat");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let fields: Vec<u64> = text.split_whitespace().filter_map(|field| field.parse().ok()).collect();
    match fields[..] {
        [_, _, _, _, _, _, sectors, _, in_flight, ..] => Ok(Written { sectors, in_flight }),
        _ => bail!("{path} has an unknown form: {text}"),
    }
}
