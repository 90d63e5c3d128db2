//! One rtnetlink socket, asked and answered on the spot.
//!
//! The kernel works on a request while it takes it, so its answer is there when `send` returns: two system calls
//! a request, no runtime and no thread. The messages are rtnetlink's and netlink-packet-route's.

use crate::nft::attributes;
use log::debug;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkBuffer, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage as Message;
use netlink_sys::{Socket as Descriptor, SocketAddr, protocols::NETLINK_ROUTE};
use nix::{
    libc,
    sys::{
        socket::{setsockopt, sockopt::ReceiveTimeout},
        time::TimeVal,
    },
};
use std::{
    cell::{Cell, RefCell},
    io,
};

/// The kernel works while it takes a request and answers at once. Should no answer come, nobody waits for one for ever.
const ANSWER_LIMIT: i64 = 10;
/// The kernel puts as much of a list into one datagram as the reader has room for, up to this
/// (`netlink_recvmsg`), and answers to single requests are far below.
const DATAGRAM: usize = 32 * 1024;
/// Messages begin at multiples of this.
const ALIGNMENT: usize = 4;

// linux/netlink.h
const NETLINK_HEADER_LEN: usize = 16;
/// Below are those about the exchange itself.
const NLMSG_MIN_TYPE: u16 = 16;
const NLMSGERR_ATTR_MSG: u16 = 1;

/// Why a request was not carried out.
#[derive(Debug)]
pub struct Refusal {
    /// With the kernel's error number, when the kernel said it.
    pub source: io::Error,
    /// The kernel's own sentence about it, such as "Nexthop has invalid gateway" (extended acknowledgement, 4.12).
    pub said: Option<String>,
}

impl From<io::Error> for Refusal {
    fn from(source: io::Error) -> Self {
        Self { source, said: None }
    }
}

/// A socket in the network namespace that it was opened in.
#[derive(Debug)]
pub struct Socket {
    descriptor: Descriptor,
    sequence: Cell<u32>,
    datagram: RefCell<Vec<u8>>,
}

impl Socket {
    /// Opens a socket in this thread's network namespace.
    ///
    /// # Errors
    /// When the kernel gives none.
    pub fn open() -> io::Result<Self> {
        let mut descriptor = Descriptor::new(NETLINK_ROUTE)?;
        descriptor.bind_auto()?;
        descriptor.connect(&SocketAddr::new(0, 0))?;
        // Makes the kernel honour the filters in requests for lists. Before 5.0 it knows no such thing.
        if let Err(e) = descriptor.set_netlink_get_strict_chk(true) {
            debug!("strict checking of netlink requests: {e}");
        }
        // And these, to say why it refuses, without sending the request back first. Before 4.12 it does not.
        if let Err(e) = descriptor.set_cap_ack(true).and_then(|()| descriptor.set_ext_ack(true)) {
            debug!("extended acknowledgements: {e}");
        }
        setsockopt(&descriptor, ReceiveTimeout, &TimeVal::new(ANSWER_LIMIT, 0))?;
        Ok(Self { descriptor, sequence: Cell::new(1), datagram: RefCell::new(Vec::with_capacity(DATAGRAM)) })
    }

    /// Sends one request and takes all that the kernel answers: what was asked for, or nothing to a change.
    ///
    /// # Errors
    /// The kernel's refusal, or that the kernel could not be asked.
    pub fn ask(&self, message: Message, flags: u16) -> Result<Vec<Message>, Refusal> {
        let sequence = self.sequence.get();
        self.sequence.set(sequence.wrapping_add(1));
        let mut datagram = self.datagram.borrow_mut();
        write(message, NLM_F_REQUEST | flags, sequence, &mut datagram);
        self.descriptor.send(&datagram, 0)?;
        let mut answer =
            Answer { sequence, ends_itself: flags & (NLM_F_DUMP | NLM_F_ACK) != 0, messages: Vec::new() };
        loop {
            self.receive(&mut datagram)?;
            if answer.take(&datagram)? {
                return Ok(answer.messages);
            }
        }
    }

    fn receive(&self, datagram: &mut Vec<u8>) -> io::Result<()> {
        loop {
            datagram.clear();
            return match self.descriptor.recv(datagram, libc::MSG_TRUNC) {
                Ok(length) if length > datagram.len() => {
                    Err(invalid(&format!("an answer of {length} bytes is longer than any should be")))
                }
                Ok(_) => Ok(()),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("no answer from the kernel within {ANSWER_LIMIT} s"),
                )),
                Err(e) => Err(e),
            };
        }
    }
}

fn write(message: Message, flags: u16, sequence: u32, datagram: &mut Vec<u8>) {
    let mut request = NetlinkMessage::from(message);
    request.header.flags = flags;
    request.header.sequence_number = sequence;
    request.finalize();
    datagram.clear();
    datagram.resize(request.buffer_len(), 0);
    request.serialize(datagram);
}

/// What the kernel has said to one request so far.
struct Answer {
    sequence: u32,
    /// A list and a change are followed by a message that says so; a single thing stands alone.
    ends_itself: bool,
    messages: Vec<Message>,
}

impl Answer {
    /// Takes in a datagram. True when it was the last.
    fn take(&mut self, mut datagram: &[u8]) -> Result<bool, Refusal> {
        while !datagram.is_empty() {
            let header = NetlinkBuffer::new_checked(datagram).map_err(|e| invalid(&e.to_string()))?;
            let length = header.length() as usize;
            let (this, rest) = datagram.split_at(length);
            datagram = rest.get(length.next_multiple_of(ALIGNMENT) - length..).unwrap_or_default();
            // To a request that was given up.
            if header.sequence_number() != self.sequence {
                continue;
            }
            match NetlinkMessage::<Message>::deserialize(this).map(|message| message.payload) {
                Ok(NetlinkPayload::InnerMessage(message)) => self.messages.push(message),
                Ok(NetlinkPayload::Error(error)) if error.code.is_some() => {
                    return Err(Refusal { source: error.to_io(), said: sentence(&error.header) });
                }
                // A list that the kernel broke off ends with the reason.
                Ok(NetlinkPayload::Done(done)) if done.code < 0 => {
                    return Err(io::Error::from_raw_os_error(-done.code).into());
                }
                Ok(NetlinkPayload::Done(_) | NetlinkPayload::Error(_)) => return Ok(true),
                Ok(_) => {}
                // One thing in a list that the library cannot read is none of ours.
                Err(e) if self.ends_itself && header.message_type() >= NLMSG_MIN_TYPE => {
                    debug!("a netlink message that cannot be read: {e}")
                }
                Err(e) => return Err(invalid(&e.to_string()).into()),
            }
            if !self.ends_itself {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// What follows the error number: the header of the request, and attributes about it.
fn sentence(rest: &[u8]) -> Option<String> {
    let found = attributes(rest.get(NETLINK_HEADER_LEN..)?).find(|(kind, _)| *kind == NLMSGERR_ATTR_MSG)?;
    let text = found.1.strip_suffix(&[0]).unwrap_or(found.1);
    Some(String::from_utf8_lossy(text).into_owned())
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(ends_itself: bool) -> Answer {
        Answer { sequence: 7, ends_itself, messages: Vec::new() }
    }

    fn message(kind: u16, sequence: u32, body: &[u8]) -> Vec<u8> {
        let mut bytes = (16 + u32::try_from(body.len()).unwrap()).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 2]);
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend(body);
        bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
        bytes
    }

    #[test]
    fn a_refusal_has_the_kernels_number_and_its_sentence() {
        let mut body = (-libc::EEXIST).to_ne_bytes().to_vec();
        body.extend([0; NETLINK_HEADER_LEN]);
        body.extend(10u16.to_ne_bytes().into_iter().chain(NLMSGERR_ATTR_MSG.to_ne_bytes()));
        body.extend(b"taken\0");
        let refusal = answer(true).take(&message(2, 7, &body)).unwrap_err();
        assert_eq!(refusal.source.raw_os_error(), Some(libc::EEXIST));
        assert_eq!(refusal.said.as_deref(), Some("taken"));
        let bare = answer(true).take(&message(2, 7, &(-libc::EPERM).to_ne_bytes())).unwrap_err();
        assert_eq!((bare.source.raw_os_error(), bare.said), (Some(libc::EPERM), None));
    }

    #[test]
    fn the_end_is_an_acknowledgement_or_the_end_of_the_list() {
        assert!(answer(true).take(&message(2, 7, &[0; 20])).unwrap());
        assert!(answer(true).take(&message(3, 7, &[0; 4])).unwrap());
        let broken_off = answer(true).take(&message(3, 7, &(-libc::EIO).to_ne_bytes())).unwrap_err();
        assert_eq!(broken_off.source.raw_os_error(), Some(libc::EIO));
        // What answers another request, and what means nothing, ends nothing.
        assert!(!answer(true).take(&message(2, 6, &[0; 20])).unwrap());
        assert!(!answer(true).take(&message(1, 7, &[])).unwrap());
        assert!(!answer(true).take(&[]).unwrap());
    }

    #[test]
    fn bytes_that_are_no_messages_are_an_error() {
        assert!(answer(true).take(&[1, 2, 3]).is_err());
        assert!(answer(true).take(&[0; 16]).is_err());
        assert!(answer(true).take(&message(2, 7, &[1])).is_err(), "an end that cannot be read");
        let unreadable = message(libc::RTM_NEWLINK, 7, &[1]);
        assert!(answer(false).take(&unreadable).is_err());
        assert!(!answer(true).take(&unreadable).unwrap(), "one of a list: left out");
    }
}
