//! What keeps a connection from being held for ever by a client that is silent, or does not take what it is sent.
//!
//! hyper bounds the time for the head of a request of HTTP/1.1, and nothing else. [`Timed`] bounds the time for the first
//! byte and for a write that is stuck. That does not do for HTTP/2, where a client may answer pings and keep the windows
//! of its streams shut, or send no request at all: [`Watch`] knows which requests a connection has, and which of their
//! answers wait for the client.

use std::collections::HashMap;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, HttpBody};
use axum::http::Version;
use bytes::Bytes;
use hyper::body::{Frame, SizeHint};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep, sleep};

use crate::config::Limits;

/// Largest piece of an answer that is handed over at once: what a client must take within the body's idle time.
const PIECE_BYTES: usize = 256 << 10;

/// Shortest time between two looks at a connection.
const LOOK_MIN: Duration = Duration::from_millis(50);

/// Why a connection is to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// A client has not taken a piece of an answer within the body's idle time.
    Stuck,
    /// There has been no request for as long as a request's head may take.
    Idle,
}

/// The requests of one connection.
pub struct Watch {
    state: Mutex<Requests>,
    idle: Duration,
    stuck: Duration,
}

struct Requests {
    next: u64,
    /// Since when the answer of each waits for its client; `None` while it is the client that waits.
    waiting: HashMap<u64, Option<Instant>>,
    /// Since when there are none.
    none_since: Instant,
    /// hyper itself ends an idle connection of HTTP/1.1, once the last answer has been sent to its end.
    is_http1: bool,
}

impl Watch {
    /// Of a new connection.
    #[must_use]
    pub fn new(limits: &Limits) -> Arc<Self> {
        let requests = Requests { next: 0, waiting: HashMap::new(), none_since: Instant::now(), is_http1: false };
        Arc::new(Self { state: Mutex::new(requests), idle: limits.header_timeout(), stuck: limits.body_idle_timeout() })
    }

    /// Notes a request, until the ticket, or the body that it watches, is dropped.
    #[must_use]
    pub fn request(self: &Arc<Self>, version: Version) -> Ticket {
        let mut requests = self.lock();
        requests.is_http1 = version < Version::HTTP_2;
        let number = requests.next;
        requests.next += 1;
        requests.waiting.insert(number, None);
        Ticket { watch: Arc::clone(self), number }
    }

    /// Returns when the connection is to end. Cancel safe.
    pub async fn end(&self) -> End {
        loop {
            if let Some(end) = self.look() {
                return end;
            }
            sleep((self.idle.min(self.stuck) / 8).max(LOOK_MIN)).await;
        }
    }

    /// Returns when an answer is stuck. Cancel safe.
    pub async fn stuck(&self) {
        while self.end().await != End::Stuck {
            sleep(LOOK_MIN).await;
        }
    }

    fn look(&self) -> Option<End> {
        let requests = self.lock();
        if requests.waiting.values().flatten().any(|since| since.elapsed() > self.stuck) {
            return Some(End::Stuck);
        }
        let none = requests.waiting.is_empty() && !requests.is_http1;
        (none && requests.none_since.elapsed() > self.idle).then_some(End::Idle)
    }

    fn lock(&self) -> MutexGuard<'_, Requests> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request that has not been answered to its end.
pub struct Ticket {
    watch: Arc<Watch>,
    number: u64,
}

impl Ticket {
    /// Watches the answer.
    #[must_use]
    pub fn watch(self, body: Body) -> Watched {
        Watched { body, rest: Bytes::new(), ticket: self }
    }

    fn set(&self, waiting: Option<Instant>) {
        self.watch.lock().waiting.insert(self.number, waiting);
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut requests = self.watch.lock();
        requests.waiting.remove(&self.number);
        requests.none_since = Instant::now();
    }
}

/// The body of an answer, in pieces. From when one is handed over until the next is asked for it waits for its client.
pub struct Watched {
    body: Body,
    /// Of the last buffer of the body.
    rest: Bytes,
    ticket: Ticket,
}

impl HttpBody for Watched {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        self.ticket.set(None);
        while self.rest.is_empty() {
            let Some(frame) = ready!(Pin::new(&mut self.body).poll_frame(cx)).transpose()? else {
                return Poll::Ready(None);
            };
            match frame.into_data() {
                Ok(bytes) => self.rest = bytes,
                Err(frame) => return Poll::Ready(Some(Ok(frame))),
            }
        }
        self.ticket.set(Some(Instant::now()));
        let length = self.rest.len().min(PIECE_BYTES);
        Poll::Ready(Some(Ok(Frame::data(self.rest.split_to(length)))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let rest = self.rest.len() as u64;
        let body = self.body.size_hint();
        let mut hint = SizeHint::new();
        hint.set_lower(body.lower().saturating_add(rest));
        if let Some(upper) = body.upper() {
            hint.set_upper(upper.saturating_add(rest));
        }
        hint
    }
}

/// A connection that must begin to talk, and must take what it is sent, within a time.
///
/// For the first byte, since hyper bounds the time for a head only once it knows which HTTP it is.
pub struct Timed {
    stream: TcpStream,
    /// Until the first byte.
    first: Option<Pin<Box<Sleep>>>,
    /// While a write is stuck.
    stuck: Option<Pin<Box<Sleep>>>,
    idle: Duration,
}

impl Timed {
    /// `first` is the time for the first byte, `idle` the time for what is written to be taken.
    #[must_use]
    pub fn new(stream: TcpStream, first: Duration, idle: Duration) -> Self {
        Self { stream, first: Some(Box::pin(sleep(first))), stuck: None, idle }
    }

    /// Passes on what a write came to; one that is stuck for too long fails.
    fn written<T>(&mut self, cx: &mut Context<'_>, result: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if result.is_ready() {
            self.stuck = None;
            return result;
        }
        let idle = self.idle;
        let stuck = self.stuck.get_or_insert_with(|| Box::pin(sleep(idle)));
        if stuck.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        Poll::Pending
    }
}

impl AsyncRead for Timed {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.stream).poll_read(cx, buf);
        if result.is_ready() {
            self.first = None;
        } else if let Some(first) = &mut self.first
            && first.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        result
    }
}

impl AsyncWrite for Timed {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.written(cx, result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.written(cx, result)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.stream).poll_flush(cx);
        self.written(cx, result)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.written(cx, result)
    }
}
