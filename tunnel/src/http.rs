//! The small HTTP listener for people and probes: /metrics, /healthz, /readyz, /sessions.
//!
//! One request a connection, GET or HEAD, no bodies read. Connections that say nothing make room for new ones, so
//! that nobody who reaches the port can keep the kubelet's probes out.

use crate::{
    listen::{Handshake, Handshakes},
    metrics::{self, Metrics},
};
use serde::{Deserialize, Serialize};
use std::{io, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::timeout,
};

/// Requests under way.
const CONNECTIONS: usize = 64;

/// The largest head, bytes.
const HEAD_LIMIT: usize = 8 * 1024;

/// From the first byte to the last.
const TIME_LIMIT: Duration = Duration::from_secs(10);

/// What the pages show.
pub trait Status: Send + Sync + 'static {
    /// The counters.
    fn metrics(&self) -> &Metrics;

    /// Whether work can be sent here.
    ///
    /// # Errors
    /// Why not, in a sentence.
    fn ready(&self) -> Result<String, String>;

    /// /sessions; none where there is no such page.
    fn sessions(&self) -> Option<Sessions> {
        None
    }
}

/// /sessions: who is connected to this replica.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sessions {
    /// This replica.
    pub replica: String,
    /// Its own sessions.
    pub sessions: Vec<Session>,
}

/// One agent's session.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Session {
    /// The node.
    pub node: String,
    /// Where it dialled from.
    pub remote: String,
    /// Since when, RFC 3339.
    pub since: String,
    /// Open streams.
    pub streams: usize,
    /// Bytes to the node.
    pub bytes_in: u64,
    /// Bytes from the node.
    pub bytes_out: u64,
    /// The last round trip measured, milliseconds.
    pub rtt_ms: Option<f64>,
}

/// A page.
#[derive(Debug, PartialEq, Eq)]
struct Page {
    code: u16,
    phrase: &'static str,
    kind: &'static str,
    body: String,
}

/// Serves the pages for ever.
pub async fn serve(listener: TcpListener, status: Arc<dyn Status>) {
    let greet = |socket, _, place| {
        let status = status.clone();
        async move {
            // Whoever asked and went away is not worth a word.
            let _ = timeout(TIME_LIMIT, answer(socket, place, &*status)).await;
        }
    };
    Handshakes::new(CONNECTIONS).take_in(&listener, greet).await;
}

async fn answer(mut socket: TcpStream, place: Handshake, status: &dyn Status) -> io::Result<()> {
    place.talks(&socket).await?;
    let mut head = Vec::new();
    let answer = loop {
        let mut buffer = [0; 2048];
        let read = socket.read(&mut buffer).await?;
        if read == 0 {
            return Ok(());
        }
        head.extend_from_slice(&buffer[..read]);
        if let Some(answer) = respond(&head, status) {
            break answer;
        }
    };
    socket.write_all(&answer).await?;
    socket.shutdown().await?;
    // What the other side still had to say is read, so that it gets to read our answer.
    while socket.read(&mut [0; 2048]).await? > 0 {}
    Ok(())
}

/// The whole answer, once the head has ended.
fn respond(head: &[u8], status: &dyn Status) -> Option<Vec<u8>> {
    let mut headers = [httparse::EMPTY_HEADER; 100];
    let mut request = httparse::Request::new(&mut headers);
    let (page, with_body) = match request.parse(head) {
        Ok(httparse::Status::Partial) if head.len() <= HEAD_LIMIT => return None,
        Ok(httparse::Status::Complete(_)) => {
            let method = request.method.unwrap_or_default();
            let path = request.path.unwrap_or_default().split('?').next().unwrap_or_default();
            match method {
                "GET" | "HEAD" => (page(path, status), method == "GET"),
                _ => (Page::text(405, "Method Not Allowed", "GET or HEAD\n"), true),
            }
        }
        Ok(_) | Err(httparse::Error::TooManyHeaders) => {
            (Page::text(431, "Request Header Fields Too Large", "the head is too large\n"), true)
        }
        Err(_) => (Page::text(400, "Bad Request", "this is not HTTP\n"), true),
    };
    let Page { code, phrase, kind, body } = page;
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {code} {phrase}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
    );
    Some(if with_body { head + &body } else { head }.into_bytes())
}

fn page(path: &str, status: &dyn Status) -> Page {
    match path {
        "/metrics" => {
            Page { code: 200, phrase: "OK", kind: metrics::CONTENT_TYPE, body: status.metrics().text() }
        }
        "/healthz" => Page::text(200, "OK", "ok\n"),
        "/readyz" => match status.ready() {
            Ok(how) => Page::text(200, "OK", how + "\n"),
            Err(why) => Page::text(503, "Service Unavailable", why + "\n"),
        },
        "/sessions" => match status.sessions().map(|sessions| serde_json::to_string(&sessions)) {
            Some(Ok(body)) => Page { code: 200, phrase: "OK", kind: "application/json", body },
            Some(Err(error)) => Page::text(500, "Internal Server Error", format!("{error}\n")),
            None => Page::text(404, "Not Found", "an agent has no such page\n"),
        },
        _ => Page::text(404, "Not Found", "/metrics, /healthz, /readyz or /sessions\n"),
    }
}

impl Page {
    fn text(code: u16, phrase: &'static str, body: impl Into<String>) -> Self {
        Self { code, phrase, kind: "text/plain; charset=utf-8", body: body.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    struct Fake {
        metrics: Metrics,
        ready: AtomicBool,
    }

    impl Status for Fake {
        fn metrics(&self) -> &Metrics {
            &self.metrics
        }

        fn ready(&self) -> Result<String, String> {
            if self.ready.load(Ordering::Relaxed) { Ok("ok".into()) } else { Err("draining".into()) }
        }

        fn sessions(&self) -> Option<Sessions> {
            let session = Session {
                node: "node1".into(),
                remote: "10.0.0.5:4711".into(),
                since: "2026-11-24T14:00:00Z".into(),
                streams: 2,
                bytes_in: 3,
                bytes_out: 4,
                rtt_ms: Some(1.5),
            };
            Some(Sessions { replica: "a".into(), sessions: vec![session] })
        }
    }

    fn fake() -> Fake {
        Fake { metrics: Metrics::server(), ready: AtomicBool::new(true) }
    }

    fn ask(status: &Fake, request: &str) -> String {
        String::from_utf8(respond(request.as_bytes(), status).unwrap()).unwrap()
    }

    #[test]
    fn the_pages() {
        let status = fake();
        assert!(ask(&status, "GET /healthz HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 200 OK\r\n"));
        assert!(ask(&status, "GET /readyz?verbose HTTP/1.1\r\n\r\n").ends_with("\r\n\r\nok\n"));
        status.ready.store(false, Ordering::Relaxed);
        let answer = ask(&status, "GET /readyz HTTP/1.1\r\n\r\n");
        assert!(answer.starts_with("HTTP/1.1 503 ") && answer.ends_with("draining\n"), "{answer}");
        let answer = ask(&status, "GET /metrics HTTP/1.0\r\n\r\n");
        assert!(
            answer.contains("Content-Type: text/plain; version=0.0.4")
                && answer.contains("edge_tunnel_sessions 0")
        );
        let answer = ask(&status, "GET /sessions HTTP/1.1\r\n\r\n");
        let body = answer.split("\r\n\r\n").nth(1).unwrap();
        assert_eq!(
            body,
            r#"{"replica":"a","sessions":[{"node":"node1","remote":"10.0.0.5:4711","since":"2026-11-24T14:00:00Z","streams":2,"bytes_in":3,"bytes_out":4,"rtt_ms":1.5}]}"#
        );
        let answer = ask(&status, "HEAD /sessions HTTP/1.1\r\n\r\n");
        assert!(
            answer.ends_with(&format!("Content-Length: {}\r\nConnection: close\r\n\r\n", body.len())),
            "{answer}"
        );
    }

    #[test]
    fn what_is_no_request_for_a_page() {
        let status = fake();
        for (request, code) in [
            ("GET / HTTP/1.1\r\n\r\n", "404"),
            ("POST /metrics HTTP/1.1\r\n\r\n", "405"),
            ("CONNECT node1:10250 HTTP/1.1\r\n\r\n", "405"),
            ("\u{16}\u{3}\u{1}", "400"),
            (&"A: b\r\n".repeat(4000), "400"),
            (&format!("GET / HTTP/1.1\r\nA: {}", "b".repeat(HEAD_LIMIT)), "431"),
        ] {
            let answer = ask(&status, request);
            assert!(answer.starts_with(&format!("HTTP/1.1 {code} ")), "{answer}");
        }
        assert_eq!(respond(b"GET /metrics HT", &status), None);
    }

    /// A hundred connections that say nothing must not keep a probe out.
    #[tokio::test]
    async fn the_silent_lock_nobody_out() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(serve(listener, Arc::new(fake())));
        let mut silent = Vec::new();
        for _ in 0..100 {
            silent.push(TcpStream::connect(address).await.unwrap());
        }
        let probe = async {
            let mut socket = TcpStream::connect(address).await.unwrap();
            socket.write_all(b"GET /healthz HTTP/1.1\r\n\r\n").await.unwrap();
            let mut answer = String::new();
            socket.read_to_string(&mut answer).await.unwrap();
            answer
        };
        let answer = timeout(Duration::from_secs(9), probe).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
        server.abort();
    }
}
