//! One switch of ethtool's: tx-checksum-ip-generic, by generic netlink (kernel 5.6).
//!
//! Some NICs write wrong inner checksums into encapsulated packets (flannel#1279, calico#3145: connections that
//! take 63 s to open); flannel's documentation has people run `ethtool -K flannel.1 tx-checksum-ip-generic off`
//! and write a udev rule. Netlink rather than the ioctl, which needs unsafe code; by hand rather than with the
//! crate `ethtool`, which brings its own netlink stack for what are two messages.

use crate::nft::{Buffer, attributes, errno, messages};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_GENERIC};
use nix::libc;
use std::io;

const SWITCH: &str = "tx-checksum-ip-generic";

// linux/genetlink.h
const GENL_ID_CTRL: u16 = 0x10;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
// linux/ethtool_netlink.h
const ETHTOOL_MSG_FEATURES_GET: u8 = 11;
const ETHTOOL_MSG_FEATURES_SET: u8 = 12;
const ETHTOOL_A_FEATURES_HEADER: u16 = 1;
const ETHTOOL_A_FEATURES_WANTED: u16 = 3;
const ETHTOOL_A_FEATURES_ACTIVE: u16 = 4;
const ETHTOOL_A_HEADER_DEV_INDEX: u16 = 1;
const ETHTOOL_A_BITSET_BITS: u16 = 3;
const ETHTOOL_A_BITSET_BITS_BIT: u16 = 1;
const ETHTOOL_A_BITSET_BIT_NAME: u16 = 2;

const NLMSG_ERROR: u16 = 2;
const ACK: u16 = libc::NLM_F_ACK as u16;
const GENERIC_HEADER: usize = 4;

/// One generic netlink socket, in the network namespace it was opened in.
#[derive(Debug)]
pub struct Ethtool {
    socket: Socket,
    family: u16,
}

impl Ethtool {
    /// Opens a socket and asks for the family's number.
    ///
    /// # Errors
    /// When the kernel has no ethtool over netlink.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_GENERIC)?;
        socket.bind_auto()?;
        // The kernel answers while it takes a message.
        socket.set_non_blocking(true)?;
        let mut ethtool = Self { socket, family: GENL_ID_CTRL };
        let body = ethtool.ask(CTRL_CMD_GETFAMILY, 0, |b| b.text(CTRL_ATTR_FAMILY_NAME, "ethtool"))?;
        let id = attribute(body.get(GENERIC_HEADER..).unwrap_or_default(), CTRL_ATTR_FAMILY_ID);
        let id = id.and_then(|bytes| bytes.first_chunk().copied()).map(u16::from_ne_bytes);
        ethtool.family = id.ok_or_else(|| io::Error::other("the kernel named no ethtool family"))?;
        Ok(ethtool)
    }

    /// Whether a device computes inner checksums itself.
    ///
    /// # Errors
    /// When the kernel refuses to say.
    pub fn tx_checksum(&self, index: u32) -> io::Result<bool> {
        let body = self.ask(ETHTOOL_MSG_FEATURES_GET, 0, |b| device(b, index))?;
        let inner = |bytes, kind| attribute(bytes, kind).unwrap_or_default();
        let active = inner(body.get(GENERIC_HEADER..).unwrap_or_default(), ETHTOOL_A_FEATURES_ACTIVE);
        // Without a mask only those are listed that are on.
        let on = attributes(inner(active, ETHTOOL_A_BITSET_BITS)).any(|(kind, bit)| {
            kind == ETHTOOL_A_BITSET_BITS_BIT
                && attribute(bit, ETHTOOL_A_BITSET_BIT_NAME).is_some_and(|name| name == zero_ended(SWITCH))
        });
        Ok(on)
    }

    /// Switches it off.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn tx_checksum_off(&self, index: u32) -> io::Result<()> {
        self.ask(ETHTOOL_MSG_FEATURES_SET, ACK, |b| {
            device(b, index);
            b.nested(ETHTOOL_A_FEATURES_WANTED, |b| {
                b.nested(ETHTOOL_A_BITSET_BITS, |b| {
                    // Named, and without ETHTOOL_A_BITSET_BIT_VALUE: off.
                    b.nested(ETHTOOL_A_BITSET_BITS_BIT, |b| b.text(ETHTOOL_A_BITSET_BIT_NAME, SWITCH));
                });
            });
        })
        .map(drop)
    }

    /// One request; the body of the answer, empty for an acknowledgement.
    fn ask(&self, command: u8, flags: u16, body: impl FnOnce(&mut Buffer)) -> io::Result<Vec<u8>> {
        let mut request = Buffer::default();
        // A generic header is command, version and two bytes of nothing: as long as netfilter's.
        request.raw(self.family, flags, command, 0, body);
        self.socket.send_to(&request.bytes, &SocketAddr::new(0, 0), 0)?;
        let (datagram, _) = self.socket.recv_from_full()?;
        match messages(&datagram).first() {
            Some((NLMSG_ERROR, body)) if errno(body) != 0 => Err(io::Error::from_raw_os_error(errno(body))),
            Some((NLMSG_ERROR, _)) => Ok(Vec::new()),
            Some((_, body)) => Ok(body.to_vec()),
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

fn device(b: &mut Buffer, index: u32) {
    b.nested(ETHTOOL_A_FEATURES_HEADER, |b| b.attribute(ETHTOOL_A_HEADER_DEV_INDEX, &index.to_ne_bytes()));
}

fn zero_ended(text: &str) -> Vec<u8> {
    [text.as_bytes(), &[0]].concat()
}

fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(found, _)| *found == kind).map(|(_, value)| value)
}
