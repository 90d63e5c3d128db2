//! One rtnetlink socket, asked and answered on the spot.
//!
//! The kernel works on a request while it takes it, so its answer is there when `send` returns: two system calls
//! a request, no runtime and no thread. The messages are rtnetlink's and netlink-packet-route's.

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

/// The kernel answers at once. Should it ever not, nothing waits for ever.
const ANSWER_LIMIT: i64 = 10;
/// The kernel puts as much of a list into one datagram as the reader has room for, up to this
/// (`netlink_recvmsg`), and answers to single requests are far below.
const DATAGRAM: usize = 32 * 1024;
/// Messages begin at multiples of this.
const ALIGNMENT: usize = 4;

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
        setsockopt(&descriptor, ReceiveTimeout, &TimeVal::new(ANSWER_LIMIT, 0))?;
        Ok(Self { descriptor, sequence: Cell::new(1), datagram: RefCell::new(Vec::with_capacity(DATAGRAM)) })
    }

    /// Sends one request and takes all that the kernel answers: what was asked for, or nothing to a change.
    ///
    /// # Errors
    /// The kernel's refusal, by its number.
    pub fn ask(&self, message: Message, flags: u16) -> io::Result<Vec<Message>> {
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
    fn take(&mut self, mut datagram: &[u8]) -> io::Result<bool> {
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
                Ok(NetlinkPayload::Error(error)) if error.code.is_some() => return Err(error.to_io()),
                Ok(NetlinkPayload::Done(_) | NetlinkPayload::Error(_)) => return Ok(true),
                Ok(_) => {}
                // One thing in a list that the library cannot read is none of ours.
                Err(e) if self.ends_itself => debug!("a netlink message that cannot be read: {e}"),
                Err(e) => return Err(invalid(&e.to_string())),
            }
            if !self.ends_itself {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}
