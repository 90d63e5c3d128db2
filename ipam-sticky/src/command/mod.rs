//! x
use std::{ffi::OsString, io::Write, process::ExitCode};
/// x
pub fn run(_: impl Iterator<Item = OsString>, _: &mut dyn Write, _: &mut dyn Write) -> ExitCode {
    ExitCode::FAILURE
}
