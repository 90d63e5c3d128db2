//! Delegation: finding another plugin on `CNI_PATH` and calling it as a runtime would (spec section 4).

use crate::{Environment, Error, Success, Version, golike};
use serde::Deserialize;
use std::{
    fs,
    io::{self, Read, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

/// How long a delegate may take. Longer than any lock's deadline, shorter than the two minutes after which a
/// kubelet gives up and leaves plugin and delegate behind.
const TIME_LIMIT: Duration = Duration::from_secs(100);

/// How long "text file busy" is retried: the plugin's file is just being written by an installer.
const BUSY_LIMIT: Duration = Duration::from_secs(1);

/// `CNI_PATH` with the call's environment, which a delegate inherits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SearchPath {
    directories: Vec<PathBuf>,
    environment: Environment,
}

impl SearchPath {
    pub(crate) fn new(environment: &Environment) -> Self {
        let path = environment.get("CNI_PATH");
        let directories = path.split(':').filter(|dir| !dir.is_empty()).map(PathBuf::from).collect();
        Self { directories, environment: environment.clone() }
    }

    /// Looks up the executable of a plugin type.
    ///
    /// # Errors
    /// Code 7 when the name is no file name or no directory of `CNI_PATH` has such a file.
    pub fn find(&self, kind: &str) -> Result<Delegate<'_>, Error> {
        if kind.is_empty() || kind.contains('/') || kind == ".." || kind == "." {
            return Err(Error::invalid_config(format!("{kind:?} is not the name of a plugin")));
        }
        let executable = |file: &PathBuf| {
            fs::metadata(file).is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
        };
        let found = self.directories.iter().map(|dir| dir.join(kind)).find(executable);
        found.map(|file| Delegate { file, environment: &self.environment }).ok_or_else(|| {
            let dirs: Vec<String> = self.directories.iter().map(|dir| dir.display().to_string()).collect();
            Error::invalid_config(format!(
                "no plugin {kind:?} in {}; install it there, or name another in the network configuration",
                dirs.join(", ")
            ))
        })
    }
}

/// Another plugin, ready to be called for this attachment.
#[derive(Debug)]
pub struct Delegate<'a> {
    file: PathBuf,
    environment: &'a Environment,
}

impl Delegate<'_> {
    /// The executable.
    #[must_use]
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// ADD with this configuration on its stdin.
    ///
    /// # Errors
    /// The delegate's own error, code and all; 999 when it said nothing intelligible.
    pub fn add(&self, stdin: &[u8]) -> Result<Success, Error> {
        let printed = self.call("ADD", stdin)?;
        let result = serde_json::from_slice(&printed).map_err(|e| e.to_string()).and_then(|result| {
            let version = result_version(&result, stdin);
            Success::parse(&result, version).map_err(|e| e.to_string())
        });
        result.map_err(|e| {
            let said = snippet(&printed);
            Error::decode(format!("ADD of {} printed no result: {e}", self.file.display())).with_details(said)
        })
    }

    /// DEL. The verb is set here and not taken from the environment, so that a failed ADD can undo.
    ///
    /// # Errors
    /// The delegate's own.
    pub fn del(&self, stdin: &[u8]) -> Result<(), Error> {
        self.call("DEL", stdin).map(drop)
    }

    /// CHECK.
    ///
    /// # Errors
    /// The delegate's own.
    pub fn check(&self, stdin: &[u8]) -> Result<(), Error> {
        self.call("CHECK", stdin).map(drop)
    }

    /// GC.
    ///
    /// # Errors
    /// The delegate's own.
    pub fn gc(&self, stdin: &[u8]) -> Result<(), Error> {
        self.call("GC", stdin).map(drop)
    }

    /// STATUS.
    ///
    /// # Errors
    /// The delegate's own.
    pub fn status(&self, stdin: &[u8]) -> Result<(), Error> {
        self.call("STATUS", stdin).map(drop)
    }

    fn call(&self, verb: &str, stdin: &[u8]) -> Result<Vec<u8>, Error> {
        let output = self
            .spawn(verb)
            .and_then(|child| converse(child, stdin, TIME_LIMIT))
            .map_err(|e| Error::io(format!("{verb} of {}: {e}", self.file.display())))?;
        if output.status.success() {
            return Ok(output.stdout);
        }
        Err(self.error(verb, &output))
    }

    fn spawn(&self, verb: &str) -> io::Result<Child> {
        let started = Instant::now();
        loop {
            let spawned = Command::new(&self.file)
                .envs(self.environment.iter())
                .env("CNI_COMMAND", verb)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn();
            match spawned {
                Err(e) if e.kind() == io::ErrorKind::ExecutableFileBusy && started.elapsed() < BUSY_LIMIT => {
                    thread::sleep(Duration::from_millis(20));
                }
                other => return other,
            }
        }
    }

    fn error(&self, verb: &str, output: &Output) -> Error {
        #[derive(Deserialize, Default)]
        #[serde(default)]
        struct Written {
            code: u32,
            msg: String,
            details: String,
        }
        let file = self.file.display();
        let document = serde_json::from_slice(&output.stdout).ok();
        let written: Option<Written> = document.and_then(|document| golike::from_value(&document).ok());
        match written {
            Some(Written { code, msg, details }) if code != 0 || !msg.is_empty() => {
                Error::reported(code, msg, details)
            }
            _ => {
                let said = if output.stdout.is_empty() { &output.stderr } else { &output.stdout };
                Error::internal(format!(
                    "{verb} of {file} failed ({}) without an error document",
                    output.status
                ))
                .with_details(snippet(said))
            }
        }
    }
}

/// Feeds stdin and collects the output without either side waiting for the other, within the limit.
fn converse(mut child: Child, stdin: &[u8], limit: Duration) -> io::Result<Output> {
    let (Some(mut input), Some(mut output), Some(mut errors)) =
        (child.stdin.take(), child.stdout.take(), child.stderr.take())
    else {
        return Err(io::Error::other("a pipe to the plugin is missing"));
    };
    let (done, finished) = std::sync::mpsc::channel::<()>();
    let pid = nix::unistd::Pid::from_raw(child.id().cast_signed());
    thread::scope(|scope| {
        scope.spawn(move || {
            // A plugin that fails before reading closes the pipe: its error document is what matters.
            let _ = input.write_all(stdin);
        });
        let errors = scope.spawn(move || {
            let mut said = Vec::new();
            errors.read_to_end(&mut said).map(|_| said)
        });
        // `child` is reaped only after this thread has ended, so the pid cannot have become another's.
        let watchdog = scope.spawn(move || {
            let timed_out = finished.recv_timeout(limit) == Err(std::sync::mpsc::RecvTimeoutError::Timeout);
            if timed_out {
                let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            }
            timed_out
        });
        let mut stdout = Vec::new();
        let read = output.read_to_end(&mut stdout);
        drop(done);
        let timed_out = watchdog.join().unwrap_or(false);
        let status = child.wait()?;
        let stderr = errors.join().unwrap_or_else(|_| Ok(Vec::new())).unwrap_or_default();
        if timed_out {
            let seconds = limit.as_secs();
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("no answer within {seconds} s, so it was killed"),
            ));
        }
        read.map(|_| Output { status, stdout, stderr })
    })
}

/// A result says its own version; an older delegate may leave it out and means that of its configuration.
fn result_version(result: &serde_json::Value, stdin: &[u8]) -> Version {
    let version = |document: &serde_json::Value| {
        let object = document.as_object()?;
        Version::parse(golike::get(object, "cniVersion")?.as_str()?).ok()
    };
    version(result).or_else(|| version(&serde_json::from_slice(stdin).ok()?)).unwrap_or(Version::V0_1_0)
}

fn snippet(said: &[u8]) -> String {
    const MOST: usize = 1024;
    let text = String::from_utf8_lossy(&said[..said.len().min(MOST)]);
    text.trim().to_owned()
}
