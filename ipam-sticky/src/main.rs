//! `ipam-sticky`: a CNI plugin when a runtime calls it, a tool when a person does.

use std::{env, io, process::ExitCode};

fn main() -> ExitCode {
    if env::var_os("CNI_COMMAND").is_some() {
        return cni::run(&ipam_sticky::plugin::Sticky::here());
    }
    ipam_sticky::command::run(env::args_os().skip(1), &mut io::stdout(), &mut io::stderr())
}
