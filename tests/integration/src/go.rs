//! Builds one set of Go programs from its committed go.mod and go.sum, once per machine.
//!
//! The result lies in `~/.cache/edgeflannel/tools/NAME-HASH/`, where the hash covers everything that could change the bytes. So a changed pin
//! builds anew, an unchanged one never, and nothing has to be cleaned.

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// A folder of `tests/integration/tools/` and what is built from it.
#[derive(Debug)]
pub struct ToolSet {
    /// The folder's name.
    pub name: &'static str,
    /// Go's `-ldflags`, beyond leaving out the debug tables.
    pub ldflags: fn() -> String,
    /// Puts more source beside go.mod before the build: (go, build folder).
    pub prepare: Option<fn(&Path, &Path) -> Result<()>>,
}

const MODULES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tools");

/// Our cache in the home directory; `EDGEFLANNEL_CACHE` names another place.
pub fn cache() -> PathBuf {
    if let Some(dir) = std::env::var_os("EDGEFLANNEL_CACHE") {
        return dir.into();
    }
    PathBuf::from(std::env::var_os("HOME").unwrap_or_else(|| "/root".into())).join(".cache/edgeflannel")
}

impl ToolSet {
    /// The program `package` of this set as an executable called `name`, built if it is not there yet.
    pub fn program(&self, name: &str, package: &str) -> Result<PathBuf> {
        Ok(self.programs(&[(name, package)])?.join(name))
    }

    /// The folder that holds all of `programs` (name, Go package), the missing ones built first.
    pub fn programs(&self, programs: &[(&str, &str)]) -> Result<PathBuf> {
        let dir = self.dir()?;
        let missing = |dir: &Path| programs.iter().any(|(name, _)| !dir.join(name).exists());
        if missing(&dir) {
            fs::create_dir_all(&dir).with_context(|| format!("cannot make {dir:?}"))?;
            // One Go build at a time on the whole machine: two would only fight over the cores and the memory.
            let lock = cache().join("build.lock");
            let lock_file = File::create(&lock).with_context(|| format!("cannot make {lock:?}"))?;
            lock_file.lock().with_context(|| format!("cannot lock {lock:?}"))?;
            for (name, package) in programs {
                if !dir.join(name).exists() {
                    self.build(&dir, name, package)?;
                }
            }
        }
        Ok(dir)
    }

    fn dir(&self) -> Result<PathBuf> {
        let mut hash = Sha256::new();
        for file in ["go.mod", "go.sum"] {
            let path = Path::new(MODULES).join(self.name).join(file);
            hash.update(fs::read(&path).with_context(|| format!("cannot read {path:?}"))?);
        }
        hash.update((self.ldflags)());
        hash.update(go_version()?);
        let digest: String = hash.finalize().iter().take(6).map(|b| format!("{b:02x}")).collect();
        Ok(cache().join("tools").join(format!("{}-{digest}", self.name)))
    }

    fn build(&self, dir: &Path, name: &str, package: &str) -> Result<()> {
        let source = dir.join("src");
        fs::create_dir_all(&source)?;
        for file in ["go.mod", "go.sum"] {
            fs::copy(Path::new(MODULES).join(self.name).join(file), source.join(file))?;
        }
        if let Some(prepare) = self.prepare {
            prepare(go()?, &source)?;
        }
        progress(&format!("building {name} ({package}) ..."));
        let start = Instant::now();
        // Built beside its place and renamed, so that a killed build leaves no half a program.
        let partial = dir.join(format!(".{name}.partial"));
        let status = Command::new("nice")
            .args(["-n", "5"])
            .arg(go()?)
            .args(["build", "-trimpath", "-mod=mod"])
            .arg(format!("-ldflags=-s -w {}", (self.ldflags)()))
            .arg("-o")
            .arg(&partial)
            .arg(package)
            .current_dir(&source)
            .env("CGO_ENABLED", "0")
            .env("GOTOOLCHAIN", "local")
            .env_remove("GOFLAGS")
            .status()
            .context("cannot start go")?;
        ensure!(
            status.success(),
            "building {name} from {package} in {source:?} failed ({status}); Go's own words are above"
        );
        fs::rename(&partial, dir.join(name))?;
        progress(&format!("built {name} in {:.0} s", start.elapsed().as_secs_f64()));
        Ok(())
    }
}

/// A line for the person who waits. Straight to stderr: the test runner would swallow `eprintln!`.
pub fn progress(line: &str) {
    let _ = writeln!(io::stderr(), "rig: {line}");
}

/// The Go that builds: on the PATH, else where scripts/setup.sh puts one.
pub fn go() -> Result<&'static Path> {
    static GO: OnceLock<Option<PathBuf>> = OnceLock::new();
    GO.get_or_init(|| {
        [PathBuf::from("go"), cache().join("go-venv/bin/go")]
            .into_iter()
            .find(|go| version_of(go).is_some_and(|v| v >= (1, 26)))
    })
    .as_deref()
    .context("no Go >= 1.26 on the PATH or in the cache: run scripts/setup.sh")
}

fn go_version() -> Result<String> {
    static VERSION: OnceLock<String> = OnceLock::new();
    if let Some(version) = VERSION.get() {
        return Ok(version.clone());
    }
    let text = crate::exec::run(Command::new(go()?).arg("version"), b"", Duration::from_secs(20))?.ok()?;
    Ok(VERSION.get_or_init(|| text).clone())
}

fn version_of(go: &Path) -> Option<(u32, u32)> {
    let out = crate::exec::run(Command::new(go).arg("version"), b"", Duration::from_secs(20)).ok()?;
    parse_version(&out.stdout)
}

/// "go version go1.26.8 linux/amd64" -> (1, 26)
fn parse_version(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.split_whitespace().find_map(|w| w.strip_prefix("go1").map(|_| &w[2..]))?.split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

/// The folder where Go unpacked a module of the set whose go.mod lies in `source`.
pub fn module_dir(go: &Path, source: &Path, module: &str) -> Result<PathBuf> {
    let mut command = Command::new(go);
    command.args(["list", "-mod=mod", "-m", "-f", "{{.Version}}", module]).current_dir(source);
    let version = crate::exec::run(&mut command, b"", Duration::from_secs(300))?.ok()?;
    let mut command = Command::new(go);
    command.args(["mod", "download", "-json", &format!("{module}@{}", version.trim())]).current_dir(source);
    let text = crate::exec::run(&mut command, b"", Duration::from_secs(300))?.ok()?;
    let json: serde_json::Value =
        serde_json::from_str(&text).context("`go mod download -json` gave no JSON")?;
    match json["Dir"].as_str() {
        Some(dir) => Ok(dir.into()),
        None => bail!("`go mod download {module}` named no folder: {text}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        assert_eq!(parse_version("go version go1.26.8 linux/amd64"), Some((1, 26)));
        assert_eq!(parse_version("go version go1.9 linux/amd64"), Some((1, 9)));
        assert_eq!(parse_version("nonsense"), None);
    }
}
