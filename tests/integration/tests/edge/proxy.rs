//! The HTTP proxy of a site: makes tunnels (CONNECT) for those who give a user and a password.

use integration::host::Host;
use nix::sched::{CloneFlags, setns};
use std::{
    fs::File,
    io::{Read, Write, copy},
    net::{Shutdown, TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
};

/// The running proxy, on port 3128 of its host.
#[derive(Debug, Clone)]
pub struct SiteProxy {
    asked: Arc<Mutex<Vec<String>>>,
}

impl SiteProxy {
    pub fn start(host: &Host) -> Self {
        let proxy = Self { asked: Arc::default() };
        let netns = File::open(format!("/proc/{}/ns/net", host.init_pid().unwrap())).unwrap();
        let server = proxy.clone();
        // The thread stays in the namespace, those that it starts too.
        thread::spawn(move || {
            setns(&netns, CloneFlags::CLONE_NEWNET).unwrap();
            drop(netns);
            for stream in TcpListener::bind("0.0.0.0:3128").unwrap().incoming().flatten() {
                let server = server.clone();
                thread::spawn(move || server.serve(stream));
            }
        });
        proxy
    }

    /// The heads of the requests so far.
    pub fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }

    fn serve(&self, mut client: TcpStream) -> Option<()> {
        let (mut head, mut byte) = (Vec::new(), [0]);
        while !head.ends_with(b"\r\n\r\n") {
            client.read_exact(&mut byte).ok()?;
            head.push(byte[0]);
        }
        let head = String::from_utf8(head).ok()?;
        self.asked.lock().unwrap().push(head.clone());
        // edge:secret
        if !head.to_lowercase().contains(&"proxy-authorization: Basic ZWRnZTpzZWNyZXQ=".to_lowercase()) {
            return client.write_all(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n").ok();
        }
        let mut server = TcpStream::connect(head.strip_prefix("CONNECT ")?.split(' ').next()?).ok()?;
        client.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").ok()?;
        let (mut from, mut to) = (server.try_clone().ok()?, client.try_clone().ok()?);
        thread::spawn(move || {
            let _ = copy(&mut from, &mut to);
            let _ = to.shutdown(Shutdown::Both);
        });
        let _ = copy(&mut client, &mut server);
        server.shutdown(Shutdown::Both).ok()
    }
}
