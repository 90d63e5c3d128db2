//! The Container Network Interface protocol, spec 0.1.0 to 1.1.0, as a library for plugins.
//!
//! A plugin implements [`Plugin`] and hands itself to [`run`], which is its whole `main`:
//!
//! ```no_run
//! use cni::{Attachment, AttachmentId, Call, Error, Plugin, Success};
//! use std::{path::Path, process::ExitCode};
//!
//! struct Nothing;
//!
//! impl Plugin for Nothing {
//!     fn about(&self) -> String {
//!         "CNI plugin that does nothing".into()
//!     }
//!     fn add(&self, call: &Call, _at: &Attachment, _netns: &Path) -> Result<Success, Error> {
//!         Ok(call.conf.prev_result.clone().unwrap_or_default())
//!     }
//!     fn del(&self, _: &Call, _: &Attachment, _: Option<&Path>) -> Result<(), Error> {
//!         Ok(())
//!     }
//!     fn check(&self, _: &Call, _: &Attachment, _: &Path) -> Result<(), Error> {
//!         Ok(())
//!     }
//!     fn gc(&self, _: &Call, _: Option<&[AttachmentId]>) -> Result<(), Error> {
//!         Ok(())
//!     }
//!     fn status(&self, _: &Call) -> Result<(), Error> {
//!         Ok(())
//!     }
//! }
//!
//! fn main() -> ExitCode {
//!     cni::run(&Nothing)
//! }
//! ```
//!
//! One call walks through the files from top to bottom: [`run`] gathers the environment and stdin, `request`
//! checks them against the spec and makes a typed [`Request`], the plugin answers, `result` or `error`
//! renders the answer in the version that the caller speaks, and `run` prints it. Everything but `run`
//! works on values, so a test can drive a plugin with [`serve`] without a process.
//!
//! What the spec leaves open is done as the Go reference (`containernetworking/cni`) does it, because that
//! is what runtimes are tested with. It knows nothing of any network: names, addresses and devices are the
//! plugin's affair.

mod args;
mod conf;
mod error;
mod exec;
pub mod golike;
pub mod logging;
mod names;
mod request;
mod result;
mod version;

pub use args::Args;
pub use conf::NetConf;
pub use error::Error;
pub use exec::{Delegate, SearchPath};
pub use names::{ContainerId, IfName, NetworkName};
pub use request::{Attachment, AttachmentId, Call, Environment, Request};
pub use result::{Dns, Interface, Ip, Route, Success};
pub use version::Version;

use std::{
    io::{self, Read, Write},
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    process::ExitCode,
};

/// The verbs of the spec, section 2. `VERSION` is answered by [`run`] itself.
///
/// Whatever a method returns is all that reaches the runtime: stdout belongs to [`run`].
pub trait Plugin {
    /// One line for the person who runs the plugin by hand, without `CNI_COMMAND`.
    fn about(&self) -> String;

    /// Makes the attachment, or adjusts it when `call.conf.prev_result` is there. `netns` is not the
    /// plugin's own network namespace (checked), but may not exist.
    ///
    /// # Errors
    /// Whatever stopped it; the plugin has then undone what it did.
    fn add(&self, call: &Call, at: &Attachment, netns: &Path) -> Result<Success, Error>;

    /// Takes the attachment away. Must succeed when it is already gone, when `netns` is `None` or a path
    /// that no longer exists, without a previous result, and when it comes twice.
    ///
    /// # Errors
    /// Only what a later DEL can still put right: the runtime will repeat it.
    fn del(&self, call: &Call, at: &Attachment, netns: Option<&Path>) -> Result<(), Error>;

    /// Compares the attachment with `call.conf.prev_result`, which is always there.
    ///
    /// # Errors
    /// The first thing that is missing or not as it was made.
    fn check(&self, call: &Call, at: &Attachment, netns: &Path) -> Result<(), Error>;

    /// Removes what belongs to attachments of this network that are not in `valid`. `None` means that the
    /// runtime sent no list, which is not the same as an empty one.
    ///
    /// # Errors
    /// The first failure, after everything else has been tried.
    fn gc(&self, call: &Call, valid: Option<&[AttachmentId]>) -> Result<(), Error>;

    /// Says whether an ADD could work now.
    ///
    /// # Errors
    /// [`Error::not_available`] or [`Error::limited_connectivity`], with the reason.
    fn status(&self, call: &Call) -> Result<(), Error>;
}

/// What a process that answers one CNI call has to print, and whether it exits with 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// One JSON document with a line end, or nothing.
    pub stdout: String,
    /// For a person; only the "about" text of a call without `CNI_COMMAND`.
    pub stderr: String,
    /// Exit code 0.
    pub success: bool,
}

/// Answers the one call that this process was started for: the body of a plugin's `main`.
///
/// The only code that writes to stdout. Prints a JSON document on every way out that the spec gives one,
/// a panic of the plugin included (code 999).
pub fn run(plugin: &impl Plugin) -> ExitCode {
    let reply = match Environment::from_process() {
        Ok(environment) => serve(plugin, &environment, &mut io::stdin().lock()),
        Err(error) => failure(&error, Version::LATEST),
    };
    let printed = io::stderr()
        .write_all(reply.stderr.as_bytes())
        .and_then(|()| io::stdout().write_all(reply.stdout.as_bytes()))
        .and_then(|()| io::stdout().flush());
    match printed {
        Ok(()) if reply.success => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}

/// [`run`] without the process: environment and stdin in, what to print out.
pub fn serve(plugin: &impl Plugin, environment: &Environment, stdin: &mut dyn Read) -> Reply {
    // The error is rendered in the caller's version as soon as that is known.
    let mut version = Version::LATEST;
    let answered = catch_unwind(AssertUnwindSafe(|| answer(plugin, environment, stdin, &mut version)));
    match answered {
        Ok(Ok(reply)) => reply,
        Ok(Err(error)) => failure(&error, version),
        Err(panic) => failure(&Error::from_panic(panic.as_ref()), version),
    }
}

fn answer(
    plugin: &impl Plugin,
    environment: &Environment,
    stdin: &mut dyn Read,
    version: &mut Version,
) -> Result<Reply, Error> {
    if environment.command().is_none() {
        return Ok(about(plugin));
    }
    match Request::read(environment, stdin, version)? {
        Request::Version(asked) => Ok(success(&asked.supported())),
        Request::Add { call, at, netns } => {
            // The reference looks only after the plugin has acted; nothing is gained by acting first.
            environment.refuse_own_netns(&netns)?;
            let result = plugin.add(&call, &at, &netns)?;
            Ok(success(&result.render(call.conf.version)))
        }
        Request::Del { call, at, netns } => {
            plugin.del(&call, &at, netns.as_deref())?;
            netns.map_or(Ok(()), |netns| environment.refuse_own_netns(&netns))?;
            Ok(silence())
        }
        Request::Check { call, at, netns } => plugin.check(&call, &at, &netns).map(|()| silence()),
        Request::Gc { call, valid } => plugin.gc(&call, valid.as_deref()).map(|()| silence()),
        Request::Status { call } => plugin.status(&call).map(|()| silence()),
    }
}

fn silence() -> Reply {
    Reply { stdout: String::new(), stderr: String::new(), success: true }
}

fn success(document: &serde_json::Value) -> Reply {
    Reply { stdout: format!("{document}\n"), ..silence() }
}

fn failure(error: &Error, version: Version) -> Reply {
    Reply { stdout: format!("{}\n", error.render(version)), success: false, ..silence() }
}

fn about(plugin: &impl Plugin) -> Reply {
    let versions: Vec<&str> = Version::ALL.iter().map(|version| version.as_str()).collect();
    let stderr = format!("{}\nCNI protocol versions supported: {}\n", plugin.about(), versions.join(", "));
    Reply { stderr, ..silence() }
}
