//! What a person can ask, when nobody set CNI_COMMAND: one file per command, tables for people, `-o json` for
//! programs. Commands that change something do it as the plugin does, through the store.

mod export;
mod import;
mod list;
mod options;
mod pin;
mod reclaim;
mod release;
mod show;
mod table;
mod unpin;
mod verify;

use options::Options;
use std::{ffi::OsString, io::Write, process::ExitCode};

const USAGE: &str = "\
ipam-sticky: keeps each pod's addresses bound to its name

As a CNI plugin it is called by the runtime. By hand, it looks at the state and changes it:

  list                            one row per address
  show NAMESPACE/POD              everything about one pod
  release NAMESPACE/POD           forget an idle pod, so that its addresses are free
  release --stale [NAMESPACE/POD] let go of owners of earlier boots, or whose network namespace is gone
  pin NAMESPACE/POD ADDRESS       keep an address for a pod, whatever happens
  unpin NAMESPACE/POD [ADDRESS]   take that back
  import --host-local DIR         take over the reservations in host-local's directory of this network
  export --host-local DIR         write reservations that host-local honours
  export -o json                  everything, for a program
  verify                          read everything, and say what is wrong
  reclaim --dry-run               who would lose an address next, and why

  --network NAME    which network (default: the only one there is)
  --data-dir DIR    where the state is (default: /var/lib/cni/ipam-sticky)
  --cache-dir DIR   libcni's cache (default: /var/lib/cni)
  --run-dir DIR     notes of a disk that cannot be written (default: /run/ipam-sticky)
  --ifname NAME     which interface of the pod (pin: eth0; otherwise: all)
  -o table|json     how to print
";

/// Why a command failed: what to print, and the exit code.
#[derive(Debug)]
pub struct Failure {
    message: String,
    code: u8,
}

impl Failure {
    fn usage(message: impl Into<String>) -> Self {
        Self { message: format!("{}; `ipam-sticky --help` says more", message.into()), code: 2 }
    }

    fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), code: 1 }
    }
}

impl From<crate::store::Error> for Failure {
    fn from(error: crate::store::Error) -> Self {
        Self::new(error.to_string())
    }
}

/// Runs one command: the body of `main` for a person.
pub fn run(args: impl Iterator<Item = OsString>, out: &mut dyn Write, err: &mut dyn Write) -> ExitCode {
    cni::logging::init(None, None);
    let answered = Options::read(args).and_then(|options| match options {
        Some(options) => answer(&options),
        None => Ok(USAGE.into()),
    });
    let (text, code) = match answered {
        Ok(text) => (out.write_all(text.as_bytes()).and_then(|()| out.flush()), 0),
        Err(Failure { message, code }) => (writeln!(err, "ipam-sticky: {message}"), code),
    };
    // A reader that went away, as `head` does, is no failure worth a word.
    ExitCode::from(if text.is_ok() { code } else { code.max(1) })
}

fn answer(options: &Options) -> Result<String, Failure> {
    match options.command.as_str() {
        "list" => list::run(options),
        "show" => show::run(options),
        "release" => release::run(options),
        "pin" => pin::run(options),
        "unpin" => unpin::run(options),
        "import" => import::run(options),
        "export" => export::run(options),
        "verify" => verify::run(options),
        "reclaim" => reclaim::run(options),
        other => Err(Failure::usage(format!("there is no command {other:?}"))),
    }
}
