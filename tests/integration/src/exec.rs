//! Running a program to its end, with a bound on the time; and waiting for a condition, likewise.

use anyhow::{Context, Result, anyhow, bail};
use std::io::{Read, Write};
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// How long an ordinary command may take before the test calls it stuck.
pub const COMMAND_LIMIT: Duration = Duration::from_secs(30);

/// What a finished program left.
#[derive(Debug, Clone)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// What it wrote to stdout.
    pub stdout: String,
    /// What it wrote to stderr.
    pub stderr: String,
    /// The command line, for messages.
    pub command: String,
}

impl Output {
    /// Stdout when the program succeeded, else an error with all that it said.
    pub fn ok(self) -> Result<String> {
        if self.status.success() {
            return Ok(self.stdout);
        }
        bail!(
            "`{}` ended with {}\n  stdout: {}\n  stderr: {}",
            self.command,
            self.status,
            self.stdout.trim_end(),
            self.stderr.trim_end()
        )
    }
}

/// The command line as a person would type it.
pub fn shown(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy().into_owned())
        .collect::<Vec<_>>()
        .join(" ")
}

/// Runs `command` with `stdin`, killing it when `limit` is over.
pub fn run(command: &mut Command, stdin: &[u8], limit: Duration) -> Result<Output> {
    let line = shown(command);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().with_context(
            || format!("cannot start `{line}`: is it installed? scripts/setup.sh installs what is missing"),
        )?;

    // Threads, so that a program that fills one pipe while we wait on another cannot block us.
    let mut pipe = child.stdin.take().context("no stdin")?;
    let bytes = stdin.to_vec();
    thread::spawn(move || {
        // A program may end without reading its stdin; that is its business.
        let _ = pipe.write_all(&bytes);
    });
    let stdout = collect(child.stdout.take().context("no stdout")?);
    let stderr = collect(child.stderr.take().context("no stderr")?);

    let deadline = Instant::now() + limit;
    let status = loop {
        if let Some(status) = child.try_wait().with_context(|| format!("cannot wait for `{line}`"))? {
            break Some(status);
        }
        if Instant::now() >= deadline {
            break None;
        }
        thread::sleep(Duration::from_millis(2));
    };
    let Some(status) = status else {
        let _ = child.kill();
        let _ = child.wait();
        bail!("`{line}` was still running after {limit:?} and was killed");
    };
    // A daemon that the program left behind may hold the pipes open: do not wait for it long.
    let text = |r: std::sync::mpsc::Receiver<Vec<u8>>, name: &str| {
        r.recv_timeout(Duration::from_secs(5))
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .map_err(|_| anyhow!("`{line}` ended but something it started still holds its {name}"))
    };
    Ok(Output {
        status,
        stdout: text(stdout, "stdout")?,
        stderr: text(stderr, "stderr")?,
        command: line.clone(),
    })
}

fn collect(mut pipe: impl Read + Send + 'static) -> std::sync::mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = std::sync::mpsc::channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = pipe.read_to_end(&mut bytes);
        let _ = sender.send(bytes);
    });
    receiver
}

/// Asks `probe` again and again until it gives a value; after `limit` fails with `what` and the last reason.
///
/// `Ok(None)` means "not yet"; an error means "not yet" too, and is shown if the time runs out.
pub fn wait_for<T>(what: &str, limit: Duration, mut probe: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let start = Instant::now();
    let mut pause = Duration::from_millis(2);
    loop {
        let why = match probe() {
            Ok(Some(value)) => return Ok(value),
            Ok(None) => None,
            Err(error) => Some(error),
        };
        if start.elapsed() >= limit {
            return match why {
                Some(error) => Err(error.context(format!("waited {limit:?} for: {what}"))),
                None => Err(anyhow!("waited {limit:?} for: {what}")),
            };
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(100));
    }
}

/// [`wait_for`] a plain condition.
pub fn wait_until(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) -> Result<()> {
    wait_for(what, limit, || Ok(condition().then_some(())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stuck_program_is_killed_and_named() {
        let error = run(Command::new("sleep").arg("60"), b"", Duration::from_millis(50)).unwrap_err();
        assert!(format!("{error:#}").contains("`sleep 60` was still running"), "{error:#}");
    }

    #[test]
    fn a_program_that_reads_nothing_and_says_much_does_not_block() {
        let out = run(Command::new("seq").arg("100000"), &vec![b'x'; 1 << 20], COMMAND_LIMIT)
            .unwrap()
            .ok()
            .unwrap();
        assert!(out.ends_with("100000\n"));
    }

    #[test]
    fn a_failure_shows_both_streams() {
        let out = run(Command::new("sh").args(["-c", "echo out; echo err >&2; exit 3"]), b"", COMMAND_LIMIT)
            .unwrap();
        let error = out.ok().unwrap_err().to_string();
        assert!(
            error.contains("exit status: 3") && error.contains("out") && error.contains("err"),
            "{error}"
        );
    }

    #[test]
    fn a_wait_that_runs_out_says_for_what_and_why() {
        let error = wait_for::<()>("the moon", Duration::from_millis(10), || bail!("clouds")).unwrap_err();
        let text = format!("{error:#}");
        assert!(text.contains("the moon") && text.contains("clouds"), "{text}");
    }
}
