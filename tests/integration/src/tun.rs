//! A tun device: a network interface whose packets a program reads and writes.
#![allow(unsafe_code, reason = "a tun device is made by an ioctl, which std and nix offer only so")]

use anyhow::{Context, Result, ensure};
use nix::libc;
use std::fs::File;
use std::os::fd::AsRawFd;

/// `struct ifreq` as TUNSETIFF reads it.
#[repr(C)]
struct Request {
    name: [u8; libc::IFNAMSIZ],
    flags: libc::c_short,
    rest: [u8; 22],
}

nix::ioctl_write_ptr_bad!(
    /// Makes the interface and ties it to the open file.
    tun_set_interface,
    libc::TUNSETIFF,
    Request
);

/// Makes interface `name` in this process's network namespace; it lives as long as the file is open.
pub fn open(name: &str) -> Result<File> {
    ensure!(name.len() < libc::IFNAMSIZ, "interface name {name} is too long");
    let file = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .context("cannot open /dev/net/tun: does the kernel have tun?")?;
    let mut request =
        Request { name: [0; libc::IFNAMSIZ], flags: (libc::IFF_TUN | libc::IFF_NO_PI) as _, rest: [0; 22] };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: the file is open for the whole call, and `Request` has the size and layout of the kernel's struct ifreq.
    unsafe { tun_set_interface(file.as_raw_fd(), &raw const request) }
        .with_context(|| format!("cannot make tun device {name}"))?;
    Ok(file)
}
