//! An answer as it comes in, which must not stop coming.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use reqwest::header::HeaderMap;
use reqwest::{RequestBuilder, Response, StatusCode};
use tokio::time::Instant;

use super::Cause;
use crate::metrics::Metrics;

/// Bytes that an answer which has not ended must bring in the time that is given it to bring something: less is as good
/// as silence, and another connection may do better.
const PROGRESS: usize = 16 * 1024;

/// The answer to a request.
pub(super) struct Answer {
    response: Response,
    patience: Duration,
    received: usize,
    /// Until when there must be so many bytes.
    next: (Instant, usize),
    metrics: Metrics,
}

impl Answer {
    /// Sends a request; its answer must begin within `patience`, and bring something each time as long. Bytes of its
    /// body are counted.
    pub(super) async fn to(request: RequestBuilder, patience: Duration, metrics: &Metrics) -> Result<Self, Cause> {
        let Ok(response) = tokio::time::timeout(patience, request.send()).await else {
            return Err(slow(0, patience));
        };
        let response = response.map_err(Cause::transport)?;
        let next = (Instant::now() + patience, PROGRESS);
        Ok(Self { response, patience, received: 0, next, metrics: metrics.clone() })
    }

    pub(super) fn status(&self) -> StatusCode {
        self.response.status()
    }

    pub(super) fn headers(&self) -> &HeaderMap {
        self.response.headers()
    }

    /// The next bytes of the body, none at its end.
    pub(super) async fn part(&mut self) -> Result<Option<Bytes>, Cause> {
        let (until, bytes) = self.next;
        let Ok(part) = tokio::time::timeout_at(until, self.response.chunk()).await else {
            return Err(slow(self.received, self.patience));
        };
        let received = self.received;
        let Some(part) = part.map_err(|source| Cause::Cut { received, source })? else { return Ok(None) };
        self.metrics.remote_received_bytes.inc_by(part.len() as u64);
        self.received += part.len();
        if self.received >= bytes {
            self.next = (Instant::now() + self.patience, self.received + PROGRESS);
        }
        Ok(Some(part))
    }

    /// The whole body, if it is not longer than `max`.
    pub(super) async fn body(mut self, max: usize) -> Result<Bytes, Cause> {
        let announced = self.response.content_length();
        if announced.is_some_and(|length| length > max as u64) {
            return Err(Cause::TooLarge { max });
        }
        let mut body = BytesMut::with_capacity(announced.and_then(|length| usize::try_from(length).ok()).unwrap_or(0));
        while let Some(part) = self.part().await? {
            if body.len() + part.len() > max {
                return Err(Cause::TooLarge { max });
            }
            body.extend_from_slice(&part);
        }
        Ok(body.freeze())
    }
}

fn slow(received: usize, waited: Duration) -> Cause {
    Cause::Slow { received, waited_ms: u64::try_from(waited.as_millis()).unwrap_or(u64::MAX) }
}
