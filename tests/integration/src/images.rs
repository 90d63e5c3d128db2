//! The container images of the rig, made here from Debian's static busybox: no registry is needed.
//!
//! Two names share one layer: `rig.local/busybox:1`, what pods run, and `rig.local/pause:1`, which sleeps for ever and
//! holds a pod's namespaces.

use anyhow::{Context, Result};
use serde_json::json;
use sha2::{Digest, Sha256};
use std::fs;
use std::io::Write;
use std::path::Path;
use tar::{Builder, EntryType, Header};

/// The image that pods run.
pub const BUSYBOX: &str = "rig.local/busybox:1";
/// The image of sandboxes, named in containerd's configuration.
pub const PAUSE: &str = "rig.local/pause:1";

/// Writes both images as one archive in `docker save`'s layout, for `ctr image import`.
pub fn write_archive(to: &Path) -> Result<()> {
    let layer = layer(Path::new("/bin/busybox"))?;
    let layer_id = sha256(&layer);
    let mut archive = Builder::new(Vec::new());
    let mut manifest = Vec::new();
    for (name, command) in [(BUSYBOX, vec!["sh"]), (PAUSE, vec!["sleep", "infinity"])] {
        let config = json!({
            "architecture": "amd64", "os": "linux", "created": "1970-01-01T00:00:00Z",
            "config": {"Env": ["PATH=/bin"], "Cmd": command, "WorkingDir": "/"},
            "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{layer_id}")]},
            "history": [{"created": "1970-01-01T00:00:00Z"}],
        })
        .to_string();
        let config_file = format!("{}.json", sha256(config.as_bytes()));
        add(&mut archive, &config_file, EntryType::Regular, 0o644, config.as_bytes())?;
        manifest.push(
            json!({"Config": config_file, "RepoTags": [name], "Layers": [format!("{layer_id}/layer.tar")]}),
        );
    }
    add(&mut archive, &format!("{layer_id}/layer.tar"), EntryType::Regular, 0o644, &layer)?;
    let manifest = serde_json::to_vec(&manifest)?;
    add(&mut archive, "manifest.json", EntryType::Regular, 0o644, &manifest)?;
    let mut file = fs::File::create(to).with_context(|| format!("cannot write {to:?}"))?;
    file.write_all(&archive.into_inner()?)?;
    Ok(())
}

/// The root file system: busybox, a link for each of its applets, and the folders that programs expect.
fn layer(busybox: &Path) -> Result<Vec<u8>> {
    let program = fs::read(busybox).context("no /bin/busybox: run scripts/setup.sh (busybox-static)")?;
    let list =
        crate::exec::run(std::process::Command::new(busybox).arg("--list"), b"", crate::exec::COMMAND_LIMIT)?
            .ok()?;
    let mut tar = Builder::new(Vec::new());
    for (dir, mode) in
        [("bin", 0o755), ("etc", 0o755), ("root", 0o700), ("tmp", 0o1777), ("var", 0o755), ("www", 0o755)]
    {
        add(&mut tar, &format!("{dir}/"), EntryType::Directory, mode, b"")?;
    }
    add(&mut tar, "bin/busybox", EntryType::Regular, 0o755, &program)?;
    for applet in list.lines().filter(|name| *name != "busybox") {
        let mut header = header(EntryType::Symlink, 0o777, 0);
        tar.append_link(&mut header, format!("bin/{applet}"), "busybox")?;
    }
    add(&mut tar, "etc/passwd", EntryType::Regular, 0o644, b"root:x:0:0:root:/root:/bin/sh\n")?;
    add(&mut tar, "etc/group", EntryType::Regular, 0o644, b"root:x:0:\n")?;
    Ok(tar.into_inner()?)
}

fn add(tar: &mut Builder<Vec<u8>>, path: &str, kind: EntryType, mode: u32, bytes: &[u8]) -> Result<()> {
    let size = u64::try_from(bytes.len())?;
    tar.append_data(&mut header(kind, mode, size), path, bytes)?;
    Ok(())
}

/// Nothing of this machine in it: the same input gives the same bytes, and so the same digest.
fn header(kind: EntryType, mode: u32, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_is_the_same_each_time() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        write_archive(&a).unwrap();
        write_archive(&b).unwrap();
        assert!(fs::read(a).unwrap() == fs::read(b).unwrap());
    }
}
