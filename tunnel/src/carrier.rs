//! What carries streams between a server and an agent.
//!
//! Above this module nothing knows the wire: the registry of sessions holds [`h2::Opener`]s, the agent serves
//! [`h2::Request`]s, and the relay copies between a socket and a [`pipe::Pipe`]. A second carrier gives the same three
//! things. `h2` is HTTP/2 in reversed roles over TLS; `pipe` is one stream and how it changes connections while it
//! runs; `stall` sees to it that readers that stand still do not hold everybody's window; `link` is the socket below.

pub mod h2;
pub mod link;
pub mod pipe;
pub mod stall;

use std::{fmt, time::Duration};

/// The receive window of a stream, bytes: what one reader that stands still can hold.
pub const STREAM_WINDOW: u32 = 1 << 20;

/// The largest a stream's window becomes where the round trip is long: 4 MiB are 200 MB/s at 20 ms and 40 at 100.
pub const STREAM_WINDOW_LIMIT: u32 = 4 << 20;

/// What a connection of a session is for, which decides its windows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Everybody's: where every stream begins and bulk does not stay. A crowd of readers may come to stand still here
    /// before any of them is moved, and must not take the room of those who type.
    First,
    /// For bulk, on which windows grow with the round trip.
    Extra,
}

impl Kind {
    /// The connection's window, in windows of a stream.
    pub const fn windows(self) -> u32 {
        match self {
            Self::First => 256,
            Self::Extra => 64,
        }
    }

    /// A stream's window for this round trip: for bulk 200 MB/s worth of it, within the bounds.
    pub fn window(self, round_trip: Duration) -> u32 {
        let wanted = u32::try_from(round_trip.as_micros().saturating_mul(200)).unwrap_or(u32::MAX);
        match self {
            Self::First => STREAM_WINDOW,
            Self::Extra => wanted.clamp(STREAM_WINDOW, STREAM_WINDOW_LIMIT),
        }
    }
}

/// How an end of a connection watches the path.
#[derive(Debug, Clone, Copy)]
pub struct Watch {
    /// How long it may be silent before it is asked whether it is there.
    pub quiet: Duration,
    /// Without a byte for this long the path is dead.
    pub dead: Duration,
}

/// The server's end of an agent's connection.
pub const WATCH_SERVER: Watch = Watch { quiet: Duration::from_secs(10), dead: Duration::from_secs(25) };

/// The agent's end. It waits longer, so that on an idle connection one side asks.
pub const WATCH_AGENT: Watch = Watch { quiet: Duration::from_secs(13), dead: Duration::from_secs(25) };

/// Both ends between replicas, which are near each other. A replica that has been silent for some seconds gets no new
/// dials ([`crate::peers::Peer::is_silent`]); streams that stand get longer.
pub const WATCH_PEER: Watch = Watch { quiet: Duration::from_secs(1), dead: Duration::from_secs(15) };

/// How a connection ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ended {
    /// The other end closed it in order.
    Closed,
    /// Nothing was heard for this long.
    Silent(Duration),
    /// The socket or the protocol broke.
    Broken(String),
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("closed by the other end"),
            Self::Silent(time) => write!(f, "nothing heard for {} s", time.as_secs()),
            Self::Broken(why) => f.write_str(why),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_follow_the_round_trip_within_bounds() {
        let at = |ms| Kind::Extra.window(Duration::from_millis(ms));
        assert_eq!((at(0), at(5), at(10), at(20)), (1 << 20, 1 << 20, 2_000_000, 4_000_000));
        assert_eq!((at(900), Kind::First.window(Duration::from_secs(1))), (4 << 20, 1 << 20));
    }
}
