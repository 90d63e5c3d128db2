//! /healthz, /readyz and /metrics.
//!
//! One listener, one answer per request, from what the daemon last put on the [`Board`]. It opens when the
//! address can be bound, be it later than the daemon's start (an edge node's address may come late), and no
//! request can hold the daemon up: each connection has a time limit, and there are few at once.

use crate::daemon::board::Board;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::{
    body::{Bytes, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{sleep, timeout},
};

/// Bytes; the answers are built on the heap.
const STACK: usize = 512 * 1024;
/// Connections at once. A kubelet, a Prometheus and a person.
const AT_ONCE: usize = 16;
/// For a whole connection.
const WITHIN: Duration = Duration::from_secs(30);
/// For a request's head.
const HEAD_WITHIN: Duration = Duration::from_secs(5);

/// Serves until the program ends, on a thread of its own: while the daemon puts thousands of peers into the
/// kernel, a probe is answered all the same.
///
/// # Errors
/// A sentence, when there is no thread to be had.
pub fn start(address: SocketAddr, board: Arc<Board>) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|e| format!("start the runtime for /healthz: {e}"))?;
    let serve = move || runtime.block_on(serve(address, board));
    let started = thread::Builder::new().name("http".into()).stack_size(STACK).spawn(serve);
    started.map(drop).map_err(|e| format!("start the thread for /healthz: {e}"))
}

async fn serve(address: SocketAddr, board: Arc<Board>) {
    let listener = listen(address).await;
    let places = Arc::new(Semaphore::new(AT_ONCE));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let board = Arc::clone(&board);
                tokio::spawn(async move {
                    let _ = timeout(WITHIN, connection(stream, board)).await;
                    drop(place);
                });
            }
            Err(e) => {
                log::warn!("accept on {address}: {e}");
                sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

async fn listen(address: SocketAddr) -> TcpListener {
    let mut said = false;
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => return listener,
            Err(e) => {
                if !std::mem::replace(&mut said, true) {
                    log::warn!("listen on {address} for /healthz: {e}; trying again");
                }
                sleep(Duration::from_secs(2)).await;
            }
        }
    }
}

async fn connection(stream: TcpStream, board: Arc<Board>) {
    let service = service_fn(move |request: Request<Incoming>| {
        let response = answer(request.method(), request.uri().path(), &board);
        async move { Ok::<_, Infallible>(response) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_WITHIN)
        .max_buf_size(16 * 1024)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(e) = served {
        log::debug!("http: {e}");
    }
}

fn answer(method: &Method, path: &str, board: &Board) -> Response<Full<Bytes>> {
    let (status, kind, body) = match path {
        _ if !matches!(*method, Method::GET | Method::HEAD) => {
            (StatusCode::METHOD_NOT_ALLOWED, TEXT, "only GET and HEAD\n".to_owned())
        }
        "/healthz" => yes_unless(board.hangs(Instant::now())),
        "/readyz" => yes_unless(board.hangs(Instant::now()).or_else(|| board.not_ready())),
        "/metrics" => (StatusCode::OK, METRICS, board.metrics()),
        _ => (StatusCode::NOT_FOUND, TEXT, "there are /healthz, /readyz and /metrics\n".to_owned()),
    };
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    response
}

fn yes_unless(why: Option<String>) -> (StatusCode, &'static str, String) {
    match why {
        None => (StatusCode::OK, TEXT, "ok\n".to_owned()),
        Some(why) => (StatusCode::SERVICE_UNAVAILABLE, TEXT, format!("{why}\n")),
    }
}

const TEXT: &str = "text/plain; charset=utf-8";
const METRICS: &str = "text/plain; version=0.0.4; charset=utf-8";

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[test]
    fn answers() {
        let board = Board::default();
        let status = |path: &str| answer(&Method::GET, path, &board).status().as_u16();
        assert_eq!((status("/healthz"), status("/metrics"), status("/x")), (200, 200, 404));
        assert_eq!(status("/readyz"), 503, "nothing restored yet");
        board.set_not_ready(None);
        assert_eq!(status("/readyz"), 200);
        assert_eq!(answer(&Method::POST, "/healthz", &board).status().as_u16(), 405);
        // This thread goes on answering when the loop does not.
        board.turned(Instant::now().checked_sub(Duration::from_secs(61)).unwrap());
        assert_eq!((status("/healthz"), status("/readyz")), (503, 503));
        board.turned(Instant::now());
        assert_eq!((status("/healthz"), status("/readyz")), (200, 200));
    }

    #[tokio::test]
    async fn over_a_socket() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        tokio::spawn(serve(address, Arc::new(Board::default())));
        let mut text = String::new();
        for _ in 0..50 {
            if let Ok(mut stream) = TcpStream::connect(address).await {
                stream
                    .write_all(b"GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                    .await
                    .unwrap();
                stream.read_to_string(&mut text).await.unwrap();
                break;
            }
            sleep(Duration::from_millis(20)).await;
        }
        assert!(text.starts_with("HTTP/1.1 503"), "{text}");
    }
}
