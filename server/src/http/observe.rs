//! The outermost layer: each request gets an id, is counted, and leaves one line in the log when its response has ended.
//!
//! It also writes the body of a failure ([`Problem`]), since only here the request's id is known, and keeps 503 away
//! from pushes: to Nix before 2.27 a PUT that was answered 503 has failed for good, and to later ones it means no more
//! than 500.

use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};

use axum::body::{Body, BodyDataStream, HttpBody as _};
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::Response;
use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use narlake_format::error::chain;
use serde_json::json;
use tokio::time::Instant;

use super::body::{Aborted, BodyError};
use super::error::{Panicked, Problem};
use super::serve::Peer;
use super::{Shared, pattern};
use crate::metrics::{InFlight, Metrics};

/// The header that tells a client its request's id.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The status of a request whose client went away before it was answered: nginx's number, never sent.
const CLIENT_GONE: u16 = 499;

/// Most characters of a path or reason in the log: those of Nix have 300, those of a request's head may have 64 Ki.
const LOGGED_MAX: usize = 1024;

/// Numbers requests.
static NEXT: AtomicU64 = AtomicU64::new(1);

/// Media types of the bodies of failures.
const JSON: &str = "application/json";
const TEXT: &str = "text/plain; charset=utf-8";

/// The layer.
pub async fn observe(State(shared): State<Shared>, request: Request, next: Next) -> Response {
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let matched = request.extensions().get::<MatchedPath>().map(MatchedPath::as_str);
    let path = request.uri().path();
    let is_api = path.starts_with("/api/");
    let method = request.method().clone();
    let mut exchange = Exchange {
        id: format!("{:08x}-{number:x}", shared.run),
        route: pattern(matched, path),
        path: clipped(path),
        peer: request.extensions().get::<Peer>().map(|peer| peer.0.to_string()),
        method: known(&method),
        start: Instant::now(),
        status: CLIENT_GONE,
        sent: 0,
        outcome: Outcome::ClientGone,
        reason: None,
        metrics: shared.metrics.clone(),
        _in_flight: InFlight::of(&shared.metrics.requests_in_flight),
    };
    let mut response = next.run(request).await;
    if response.status() == StatusCode::SERVICE_UNAVAILABLE && method == Method::PUT {
        *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
    }
    if let Some(problem) = response.extensions_mut().remove::<Problem>() {
        fail(&mut response, &exchange.id, &problem, is_api);
        exchange.report(&problem);
    }
    exchange.status = response.status().as_u16();
    if let Ok(id) = HeaderValue::from_str(&exchange.id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    let (mut parts, body) = response.into_parts();
    // Wrapped, a body no longer knows its length, and the client would not be told.
    if let Some(length) = body.size_hint().exact()
        && length > 0
    {
        parts.headers.entry(header::CONTENT_LENGTH).or_insert_with(|| length.into());
    }
    if method == Method::HEAD || body.is_end_stream() {
        exchange.outcome = Outcome::Whole;
        return Response::from_parts(parts, body);
    }
    let length = parts.headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
    Response::from_parts(parts, Body::from_stream(Observed { body: body.into_data_stream(), length, exchange }))
}

fn fail(response: &mut Response, id: &str, problem: &Problem, is_api: bool) {
    let server = response.status().is_server_error();
    let message = &problem.message;
    let (text, media_type) = match (is_api, server) {
        (true, true) => (json!({ "error": message, "detail": format!("request {id}") }).to_string(), JSON),
        (true, false) => (json!({ "error": message }).to_string(), JSON),
        (false, true) => (format!("{message} (request {id})\n"), TEXT),
        (false, false) => (format!("{message}\n"), TEXT),
    };
    *response.body_mut() = Body::from(text);
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(media_type));
}

/// The start of a text that a client has chosen, for the log.
fn clipped(text: &str) -> String {
    text.chars().take(LOGGED_MAX).collect()
}

/// The method's name, from a closed set.
fn known(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::PUT => "PUT",
        Method::POST => "POST",
        _ => "other",
    }
}

/// A request under way. When it is dropped it has ended, one way or another.
struct Exchange {
    id: String,
    route: &'static str,
    path: String,
    peer: Option<String>,
    method: &'static str,
    start: Instant,
    status: u16,
    sent: u64,
    outcome: Outcome,
    /// Why it was refused.
    reason: Option<String>,
    metrics: Metrics,
    _in_flight: InFlight,
}

/// How a response ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Whole,
    ServerFailed,
    ClientGone,
}

impl Exchange {
    /// Logs what went wrong inside, the one place where it is; what was wrong with the request goes into its line.
    fn report(&mut self, problem: &Problem) {
        let Some(cause) = &problem.cause else {
            self.reason = Some(clipped(&problem.message));
            return;
        };
        if cause.is::<Panicked>() {
            self.metrics.panics.inc();
        }
        tracing::error!(id = self.id, path = self.path, error = chain(cause.as_ref()), "request failed");
    }

    fn broke(&mut self, error: &axum::Error) {
        self.outcome = Outcome::ServerFailed;
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
        while let Some(error) = cause {
            if let Some(Aborted(inner)) = error.downcast_ref() {
                if let Some(slow) = inner.downcast_ref::<BodyError>() {
                    self.outcome = Outcome::ClientGone;
                    self.reason = Some(slow.to_string());
                    return;
                }
                tracing::error!(
                    id = self.id,
                    path = self.path,
                    sent = self.sent,
                    error = chain(inner.as_ref()),
                    "response broken off"
                );
                return;
            }
            cause = error.source();
        }
        tracing::error!(id = self.id, path = self.path, sent = self.sent, error = chain(error), "response broken off");
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        let took = self.start.elapsed();
        self.metrics.answered(self.route, self.method, self.status, took, self.sent);
        let ended = match self.outcome {
            Outcome::Whole => "whole",
            Outcome::ServerFailed => "broken off",
            Outcome::ClientGone => "client gone",
        };
        if self.outcome != Outcome::Whole {
            self.metrics.aborted(self.route, self.outcome == Outcome::ServerFailed);
        }
        tracing::info!(
            id = self.id,
            peer = self.peer,
            method = self.method,
            route = self.route,
            path = self.path,
            status = self.status,
            bytes = self.sent,
            seconds = took.as_secs_f64(),
            ended,
            reason = self.reason,
            "request"
        );
    }
}

/// A response body that is counted.
struct Observed {
    body: BodyDataStream,
    /// What the header promises: nobody polls for an end that is known to have come.
    length: Option<u64>,
    exchange: Exchange,
}

impl Stream for Observed {
    type Item = Result<Bytes, axum::Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let item = std::task::ready!(self.body.poll_next_unpin(cx));
        match &item {
            Some(Ok(bytes)) => {
                self.exchange.sent += bytes.len() as u64;
                if self.length == Some(self.exchange.sent) {
                    self.exchange.outcome = Outcome::Whole;
                }
            }
            Some(Err(error)) => self.exchange.broke(error),
            None => self.exchange.outcome = Outcome::Whole,
        }
        Poll::Ready(item)
    }
}
