//! Delegation: finding another plugin on `CNI_PATH` and calling it as a runtime would (spec section 4).

use crate::{Environment, Error, Success, Version, golike};
use nix::{
    errno::Errno,
    fcntl::{FcntlArg, OFlag, fcntl},
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use serde::Deserialize;
use std::{
    fs,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::PermissionsExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
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
///
/// One loop over the three pipes and no thread: threads would cost more than all the rest of a short call.
fn converse(mut child: Child, stdin: &[u8], limit: Duration) -> io::Result<Output> {
    let deadline = Instant::now() + limit;
    let mut output = Output { status: ExitStatus::default(), stdout: Vec::new(), stderr: Vec::new() };
    let ended = exchange(&mut child, stdin, &mut output, deadline).and_then(|()| wait(&mut child, deadline));
    if ended.is_err() {
        // Whatever went wrong, nothing is left behind.
        let _ = child.kill();
        let _ = child.wait();
    }
    output.status = ended.map_err(|e| match e.kind() {
        io::ErrorKind::TimedOut => {
            io::Error::new(e.kind(), format!("no answer within {} s, so it was killed", limit.as_secs()))
        }
        _ => e,
    })?;
    Ok(output)
}

/// Until both outputs are closed.
fn exchange(child: &mut Child, stdin: &[u8], output: &mut Output, deadline: Instant) -> io::Result<()> {
    let missing = || io::Error::other("a pipe to the plugin is missing");
    let mut stdin = stdin;
    let mut input = Some(child.stdin.take().ok_or_else(missing)?);
    let mut out = Some(child.stdout.take().ok_or_else(missing)?);
    let mut err = Some(child.stderr.take().ok_or_else(missing)?);
    for pipe in
        [input.as_ref().map(AsFd::as_fd), out.as_ref().map(AsFd::as_fd), err.as_ref().map(AsFd::as_fd)]
    {
        pipe.map_or(Ok(()), do_not_block)?;
    }
    loop {
        if let Some(pipe) = &mut input {
            match pipe.write(stdin) {
                Ok(written) => stdin = &stdin[written..],
                Err(e) if would_wait(&e) => {}
                // A plugin that fails before reading closes the pipe: its error document is what matters.
                Err(_) => stdin = &[],
            }
            if stdin.is_empty() {
                input = None;
            }
        }
        drain(&mut out, &mut output.stdout)?;
        drain(&mut err, &mut output.stderr)?;
        let pipes: Vec<PollFd> = [
            input.as_ref().map(|pipe| PollFd::new(pipe.as_fd(), PollFlags::POLLOUT)),
            out.as_ref().map(|pipe| PollFd::new(pipe.as_fd(), PollFlags::POLLIN)),
            err.as_ref().map(|pipe| PollFd::new(pipe.as_fd(), PollFlags::POLLIN)),
        ]
        .into_iter()
        .flatten()
        .collect();
        if out.is_none() && err.is_none() {
            return Ok(());
        }
        wait_for_any(pipes, deadline)?;
    }
}

fn do_not_block(pipe: BorrowedFd<'_>) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(pipe, FcntlArg::F_GETFL)?);
    fcntl(pipe, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}

fn would_wait(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// Reads what is there; the pipe is dropped at its end.
fn drain(pipe: &mut Option<impl Read>, into: &mut Vec<u8>) -> io::Result<()> {
    if let Some(open) = pipe {
        match open.read_to_end(into) {
            Ok(_) => *pipe = None,
            Err(e) if would_wait(&e) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn wait_for_any(mut pipes: Vec<PollFd<'_>>, deadline: Instant) -> io::Result<()> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    match poll(&mut pipes, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

/// A process that has closed its outputs is about to end, so this hardly ever waits; but nothing obliges it to.
fn wait(child: &mut Child, deadline: Instant) -> io::Result<ExitStatus> {
    let mut pause = Duration::from_micros(20);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if Instant::now() >= deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn start(script: &str) -> Child {
        let mut shell = Command::new("sh");
        shell.args(["-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        shell.spawn().unwrap()
    }

    #[test]
    fn a_delegate_that_hangs_is_killed_in_time() {
        // With its outputs open, and with its outputs closed.
        for script in ["exec sleep 60", "exec >/dev/null 2>&1; exec sleep 60"] {
            let started = Instant::now();
            let child = start(script);
            let pid = child.id();
            let error = converse(child, b"{}", Duration::from_millis(100)).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{error}");
            assert!(started.elapsed() < Duration::from_secs(20));
            assert!(!Path::new(&format!("/proc/{pid}")).exists(), "it was reaped");
        }
    }

    #[test]
    fn exit_code_and_both_outputs() {
        let output = converse(start("cat; echo bad >&2; exit 3"), b"in", Duration::from_secs(20)).unwrap();
        assert_eq!((output.stdout, output.stderr), (b"in".to_vec(), b"bad\n".to_vec()));
        assert_eq!(output.status.code(), Some(3));
    }
}
