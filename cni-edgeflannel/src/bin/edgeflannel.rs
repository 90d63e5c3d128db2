//! The CNI plugin `edgeflannel`: an executable in /opt/cni/bin, called by the container runtime.

use std::process::ExitCode;

fn main() -> ExitCode {
    cni::run(&cni_edgeflannel::plugin::Edgeflannel)
}
