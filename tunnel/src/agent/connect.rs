//! One connection to the server: name, TCP (or a proxy), TLS, hello.
//!
//! Names are resolved anew at every try and every address is tried. Each step says which one failed, in words for the
//! person who reads the node's log.

use crate::{
    carrier::link::{self, Link},
    config::{agent::AgentConfig, outbound},
    dial,
    hello::{self, Answer, Hello, Id, TurnedAway},
    listen::HANDSHAKE,
    target::{Host, Target},
    tls::{self, ClientTls},
};
use rustls::pki_types::ServerName;
use std::{fmt, io, net::SocketAddr, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};

/// Looking a name up and connecting, all addresses of it together.
const CONNECT: Duration = Duration::from_secs(10);

/// A connection the server has welcomed.
pub struct Connected {
    /// What HTTP/2 is spoken on.
    pub stream: TlsStream<Link<TcpStream>>,
    /// Which replica is at the other end.
    pub replica: Id,
    /// How many it knows of, itself among them.
    pub replicas: usize,
    /// How long our certificate counts.
    pub not_after: i64,
}

/// Why there is no connection.
#[derive(Debug)]
pub enum Failure {
    /// A step failed, and which.
    Step(&'static str, String),
    /// The server does not want it.
    TurnedAway(TurnedAway, String),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Step(step, why) => write!(f, "{step}: {why}"),
            Self::TurnedAway(why, sentence) => {
                let sentence = crate::audit::Escaped::new(sentence.as_bytes());
                write!(f, "the server turns us away: {}: {sentence}", why.word())
            }
        }
    }
}

/// Makes a connection.
///
/// # Errors
/// The step that failed, or that we were turned away.
pub async fn connect(
    config: &AgentConfig,
    server: &(Target, ServerName<'static>),
    tls: &ClientTls,
    hello: &Hello,
) -> Result<Connected, Failure> {
    let (target, name) = server;
    let socket = match timeout(CONNECT, reach(config, target)).await {
        Ok(socket) => socket?,
        Err(_) => return Err(Failure::Step("connect", format!("{target} did not answer in time"))),
    };
    let client = tls.get();
    let greet = async {
        let connector = TlsConnector::from(client.config.clone());
        let mut stream = connector
            .connect_with(name.clone(), Link::new(socket), |connection| {
                connection.set_buffer_limit(Some(tls::BUFFER))
            })
            .await
            .map_err(|error| Failure::Step("TLS", tls::explain(&error, "the server")))?;
        let said = async {
            stream.write_all(&hello.encode()).await?;
            stream.flush().await?;
            read_answer(&mut stream).await
        };
        match said.await {
            Ok(Answer::Welcome { replica, replicas }) => {
                Ok(Connected { stream, replica, replicas, not_after: client.leaf.not_after })
            }
            Ok(Answer::TurnedAway { why, sentence, .. }) => Err(Failure::TurnedAway(why, sentence)),
            // In TLS 1.3 a client hears only now that its certificate is not wanted.
            Err(error) => Err(Failure::Step("certificate", tls::explain(&error, "the server"))),
        }
    };
    match timeout(HANDSHAKE, greet).await {
        Ok(connected) => connected,
        Err(_) => Err(Failure::Step("TLS", format!("no answer within {} s", HANDSHAKE.as_secs()))),
    }
}

/// A tuned socket to the server, through the proxy where there is one.
async fn reach(config: &AgentConfig, target: &Target) -> Result<TcpStream, Failure> {
    let Some(proxy) = config.outbound.proxy_for(target) else {
        return Ok(tuned(dial_target(target).await?));
    };
    let failed = |why| Failure::Step("proxy", why);
    let mut socket = dial_target(&proxy.address).await?;
    socket.write_all(&proxy.request(target)).await.map_err(|error| failed(error.to_string()))?;
    let mut answer = Vec::new();
    loop {
        // Byte by byte: what follows the head is TLS, and not ours to read.
        answer.push(socket.read_u8().await.map_err(|error| failed(error.to_string()))?);
        if outbound::answered(&answer).map_err(failed)?.is_some() {
            return Ok(tuned(socket));
        }
    }
}

fn tuned(socket: TcpStream) -> TcpStream {
    link::tune(&socket);
    socket
}

async fn dial_target(target: &Target) -> Result<TcpStream, Failure> {
    let mut addresses: Vec<SocketAddr> = match &target.host {
        Host::Address(address) => vec![SocketAddr::new(*address, target.port)],
        Host::Name(name) => match tokio::net::lookup_host((name.as_str(), target.port)).await {
            Ok(found) => found.collect(),
            Err(error) => return Err(Failure::Step("resolve", format!("{name}: {error}"))),
        },
    };
    // One that accepts and then does not work must not be the first every time.
    fastrand::shuffle(&mut addresses);
    dial::first(&addresses).await.map_err(|error| Failure::Step("connect", format!("{target}: {error}")))
}

async fn read_answer(stream: &mut TlsStream<Link<TcpStream>>) -> io::Result<Answer> {
    let mut header = [0; hello::HEADER];
    stream.read_exact(&mut header).await?;
    let length = hello::body_length(header).map_err(io::Error::other)?;
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await?;
    Answer::decode(&body).map_err(io::Error::other)
}
