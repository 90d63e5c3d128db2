//! Dialling: the first of several addresses that answers, and what it means when none does.

use crate::refusal::{Reason, Refusal};
use futures_util::stream::{FuturesUnordered, StreamExt};
use std::{io, net::SocketAddr, time::Duration};
use tokio::net::TcpStream;

/// The next address is tried beside the one before when that has not answered for so long.
const STAGGER: Duration = Duration::from_millis(250);

/// Connects to whichever address answers first; each is given a head start over the next. The caller bounds the time.
///
/// # Errors
/// The last address's failure.
pub async fn first(addresses: &[SocketAddr]) -> io::Result<TcpStream> {
    let mut rest = addresses.iter().copied();
    let mut trying = FuturesUnordered::new();
    let mut last = io::Error::new(io::ErrorKind::NotFound, "no address to dial");
    loop {
        let Some(next) = rest.next() else {
            while let Some(done) = trying.next().await {
                match done {
                    Ok(socket) => return Ok(socket),
                    Err(error) => last = error,
                }
            }
            return Err(last);
        };
        trying.push(TcpStream::connect(next));
        let head_start = tokio::time::sleep(STAGGER);
        tokio::pin!(head_start);
        loop {
            tokio::select! {
                Some(done) = trying.next() => match done {
                    Ok(socket) => return Ok(socket),
                    Err(error) => {
                        last = error;
                        if trying.is_empty() {
                            break;
                        }
                    }
                },
                () = &mut head_start => break,
            }
        }
    }
}

/// Why a target could not be reached, as a refusal. `target` is named as the caller wrote it.
pub fn refusal(error: &io::Error, target: &dyn std::fmt::Display) -> Refusal {
    match error.kind() {
        io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset => Refusal::new(
            Reason::Refused,
            format_args!("{target}: connection refused; is anything listening there?"),
        ),
        io::ErrorKind::TimedOut => Refusal::new(Reason::Timeout, format_args!("{target} did not answer")),
        _ => Refusal::new(Reason::Unreachable, format_args!("{target}: {error}")),
    }
}
