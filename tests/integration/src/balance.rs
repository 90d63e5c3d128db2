//! A load balancer that passes TCP through, as `rig balance` runs it: round robin over the addresses of a file, the next one where nobody answers.

use anyhow::{Context, Result};
use std::fs;
use std::io;
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::thread;
use std::time::Duration;

/// How long one may take to answer before the next is tried.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);

/// Serves for ever. `behind` is a file with an address a line, read for every connection; the port is that of `listen`.
pub fn serve(listen: SocketAddr, behind: &Path) -> Result<()> {
    let listener = TcpListener::bind(listen).with_context(|| format!("cannot listen at {listen}"))?;
    for (turn, near) in listener.incoming().enumerate() {
        let near = near.context("cannot accept")?;
        let mut servers = servers(behind, listen.port())?;
        let first = turn % servers.len().max(1);
        servers.rotate_left(first);
        thread::spawn(move || {
            let answers = |server| TcpStream::connect_timeout(server, ANSWER_LIMIT).ok();
            if let Some(far) = servers.iter().find_map(answers) {
                join(&near, &far);
            }
        });
    }
    Ok(())
}

fn servers(behind: &Path, port: u16) -> Result<Vec<SocketAddr>> {
    let text = fs::read_to_string(behind).with_context(|| format!("cannot read {behind:?}"))?;
    let address = |line: &str| {
        let address: IpAddr = line.parse().with_context(|| format!("{behind:?}: {line} is no address"))?;
        Ok(SocketAddr::new(address, port))
    };
    text.lines().map(address).collect()
}

/// Carries both directions to their ends.
fn join(near: &TcpStream, far: &TcpStream) {
    for socket in [near, far] {
        let _ = socket.set_nodelay(true);
    }
    thread::scope(|scope| {
        scope.spawn(|| pass(near, far));
        pass(far, near);
    });
}

/// An end is passed on as one; what breaks one side breaks both.
fn pass(mut from: &TcpStream, mut to: &TcpStream) {
    if io::copy(&mut from, &mut to).is_ok() {
        let _ = to.shutdown(Shutdown::Write);
    } else {
        let _ = from.shutdown(Shutdown::Both);
        let _ = to.shutdown(Shutdown::Both);
    }
}
