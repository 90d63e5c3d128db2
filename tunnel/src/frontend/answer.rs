//! A caller that asked for one page: the head of its answer is written anew on the way, and nothing that it still says
//! reaches the target.
//!
//! Looks like any other caller's socket to [`super::connect_and_copy`]. Its reading half is silent until the answer has
//! been passed on, so that the target sees no early end; a caller that goes away meanwhile is noticed.

use super::Caller;
use crate::{
    proxy::response::{self, Seen},
    relay::Socket,
};
use bytes::{Buf, BytesMut};
use std::{
    future::Future,
    io,
    pin::Pin,
    task::{Context, Poll, Waker, ready},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Sleep, sleep},
};

/// What a caller may say after its request, bytes; nobody reads it.
const CHATTER: usize = 16 * 1024;

/// A caller may close as soon as it has the last byte, a moment before the target does.
const GRACE: Duration = Duration::from_secs(5);

/// The caller's socket.
pub struct Answering<S> {
    socket: S,
    /// The head of the answer, until it has ended.
    head: Option<BytesMut>,
    /// What the socket has not taken yet.
    out: BytesMut,
    chatter: usize,
    /// The caller has ended its half.
    ended: Option<Pin<Box<Sleep>>>,
    /// The answer has been passed on.
    done: bool,
    reader: Option<Waker>,
}

impl<S: Caller> Answering<S> {
    /// A caller whose request has been read.
    pub fn new(socket: S) -> Self {
        let (head, out) = (Some(BytesMut::new()), BytesMut::new());
        Self { socket, head, out, chatter: 0, ended: None, done: false, reader: None }
    }

    /// The socket itself.
    pub fn into_inner(self) -> S {
        self.socket
    }

    /// Takes bytes of a head that has not ended.
    fn look(&mut self, bytes: &[u8]) {
        let Some(head) = &mut self.head else { return };
        head.extend_from_slice(bytes);
        // A line at a time, not a byte at a time.
        if !bytes.contains(&b'\n') && head.len() < response::HEAD_LIMIT {
            return;
        }
        loop {
            match response::read(head) {
                Seen::More => return,
                Seen::Interim(length) => head.advance(length),
                Seen::Head(length, written) => {
                    head.advance(length);
                    self.out.extend_from_slice(&written);
                    break;
                }
                Seen::Foreign => break,
            }
        }
        self.give_up_head();
    }

    /// What is there goes out as it is, and all that follows.
    fn give_up_head(&mut self) {
        if let Some(head) = self.head.take() {
            self.out.extend_from_slice(&head);
        }
    }

    fn poll_out(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.out.is_empty() {
            match ready!(Pin::new(&mut self.socket).poll_write(cx, &self.out))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                written => self.out.advance(written),
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: Caller> AsyncWrite for Answering<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.poll_out(cx))?;
        if self.head.is_some() {
            self.look(bytes);
            return Poll::Ready(Ok(bytes.len()));
        }
        Pin::new(&mut self.socket).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_out(cx))?;
        Pin::new(&mut self.socket).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.give_up_head();
        ready!(self.poll_out(cx))?;
        ready!(Pin::new(&mut self.socket).poll_shutdown(cx))?;
        self.done = true;
        if let Some(reader) = self.reader.take() {
            reader.wake();
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: Caller> AsyncRead for Answering<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        _nothing: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let gone = || Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        loop {
            if self.done {
                return Poll::Ready(Ok(()));
            }
            if let Some(grace) = &mut self.ended {
                ready!(grace.as_mut().poll(cx));
                return gone();
            }
            let mut bytes = [0; 1024];
            let mut buffer = ReadBuf::new(&mut bytes);
            if Pin::new(&mut self.socket).poll_read(cx, &mut buffer)?.is_pending() {
                self.reader = Some(cx.waker().clone());
                return Poll::Pending;
            }
            match buffer.filled().len() {
                0 if self.head.is_some() => return gone(),
                0 => {
                    self.reader = Some(cx.waker().clone());
                    self.ended = Some(Box::pin(sleep(GRACE)));
                }
                more => {
                    self.chatter += more;
                    if self.chatter > CHATTER {
                        return gone();
                    }
                }
            }
        }
    }
}

impl<S: Caller> Socket for Answering<S> {
    fn reset(&self) {
        self.socket.reset();
    }

    fn is_gone(&self) -> bool {
        self.socket.is_gone()
    }
}

impl<S: Caller> Caller for Answering<S> {
    async fn hung_up(&mut self) {
        self.socket.hung_up().await;
    }
}
