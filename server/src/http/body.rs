//! Reading request bodies: with an idle limit, counted, decoded, bounded; and sending bodies that are held in memory.
//!
//! NARs stream. Everything else is held whole: memory for it is taken from a pool first ([`buffers`](super::buffers)),
//! and it must have come, or gone, within `limits.body_timeout_s`, so that nobody keeps that memory by being slow.
//!
//! A body is never refused by closing the connection under the client: TCP would throw away the answer together with
//! what was not read. What a handler leaves is drained for a moment ([`linger`]), except where the client asked first
//! (`Expect: 100-continue`) and was not told to go on.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, BodyDataStream, HttpBody as _};
use axum::extract::Request;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::Response;
use bytes::Bytes;
use futures::stream::{self, Stream, StreamExt as _};
use narlake_format::nix::compression::Compression;
use narlake_format::nix::hash::{Sha256Hash, Sha256Hasher};
use tokio::time::Instant;

use super::State;
use super::buffers::Buffer;
use super::error::HttpError;
use crate::coding::{self, Bounds, ByteStream, CodingError};

/// Most bytes of a refused body that are read and thrown away, so that its client gets to read the answer.
const LINGER_BYTES_MAX: usize = 64 << 20;
/// Longest time that a refused body is read.
const LINGER: Duration = Duration::from_secs(5);
/// Longest silence in it: a client that is not sending has nothing that could keep it from reading.
const LINGER_IDLE: Duration = Duration::from_millis(500);

/// Bytes of a body that count as progress. A client that takes the idle time for less is as good as gone.
pub const PROGRESS_BYTES: usize = 64 << 10;

/// Most memory that the decoder of a body that is held whole may take, in bytes: twice what the presets take that
/// clients use for small things.
pub const DECODER_BYTES_MAX: usize = 16 << 20;

/// How a body came to its end before its time. It travels inside an [`io::Error`].
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// It made no progress for too long.
    #[error("the body made no progress for {seconds} s")]
    Idle {
        /// The limit, in seconds.
        seconds: u64,
    },
    /// All of it took too long.
    #[error("the body did not end within {seconds} s")]
    Slow {
        /// The limit, in seconds.
        seconds: u64,
    },
    /// The connection broke off.
    #[error("the body broke off")]
    Broken(#[source] axum::Error),
    /// The bytes are not those that the URL names.
    #[error("the body has {found}, the URL says {expected}")]
    Hash {
        /// The hash in the URL.
        expected: Sha256Hash,
        /// The hash of what came.
        found: Sha256Hash,
    },
}

impl BodyError {
    /// The error inside an I/O error, if it is one of these.
    #[must_use]
    pub fn within(error: &io::Error) -> Option<&Self> {
        error.get_ref()?.downcast_ref()
    }
}

/// The body of a NAR as it comes, without its content coding, within bounds.
///
/// # Errors
/// Where it announces more than the bound, or a coding that is not supported.
pub fn incoming(
    state: &State,
    route: &'static str,
    headers: &HeaderMap,
    body: Body,
    bytes_max: u64,
) -> Result<ByteStream, HttpError> {
    announced(headers, bytes_max)?;
    let decoder_bytes_max = coding::DECODER_BYTES_MAX;
    let bounds = Bounds { bytes_max, expansion_max: state.limits.expansion_max, decoder_bytes_max };
    Ok(coding::decode(received(state, route, body), content_coding(headers)?, bounds))
}

/// A whole body of a push, of at most so many bytes, without its content coding, and its memory, to be kept as long as
/// the body or what was made of it. While there is none the client is held.
///
/// # Errors
/// Where it is larger, is not what its headers say, or does not come to an end in time.
pub async fn whole(
    state: &State,
    route: &'static str,
    headers: &HeaderMap,
    body: Body,
    bytes_max: usize,
) -> Result<(Bytes, Buffer), HttpError> {
    let length = announced(headers, bytes_max as u64)?;
    let coding = content_coding(headers)?;
    let (text_max, decoder_max) = match (coding, length) {
        (Compression::None, Some(length)) => (length, 0),
        (Compression::None, None) => (bytes_max, 0),
        _ => (bytes_max, DECODER_BYTES_MAX),
    };
    let mut buffer = state.pushes.take(text_max + decoder_max).await?;
    let bounds = Bounds {
        bytes_max: text_max as u64,
        expansion_max: state.limits.expansion_max,
        decoder_bytes_max: DECODER_BYTES_MAX as u64,
    };
    let text = collect(state, coding::decode(received(state, route, body), coding, bounds), text_max).await?;
    buffer.shrink(text.len());
    Ok((text.into(), buffer))
}

/// A question of the lake API, whole, with memory for `weight` times its length: for what becomes of it, and for the
/// answer. It has no content coding.
///
/// # Errors
/// Where it is larger than `bytes_max`, coded, or does not come to an end in time.
pub async fn question(
    state: &State,
    route: &'static str,
    headers: &HeaderMap,
    body: Body,
    bytes_max: usize,
    weight: usize,
) -> Result<(Vec<u8>, Buffer), HttpError> {
    if content_coding(headers).ok() != Some(Compression::None) {
        let refused =
            HttpError::refused(StatusCode::UNSUPPORTED_MEDIA_TYPE, "questions are sent without content coding");
        return Err(refused.with(header::ACCEPT_ENCODING, HeaderValue::from_static("identity")));
    }
    let length = announced(headers, bytes_max as u64)?.unwrap_or(bytes_max);
    let mut buffer = state.answers.take(length * weight).await?;
    let bounds = Bounds { bytes_max: length as u64, expansion_max: 1, decoder_bytes_max: 0 };
    let text = collect(state, coding::decode(received(state, route, body), Compression::None, bounds), length).await?;
    buffer.shrink(text.len() * weight);
    Ok((text, buffer))
}

/// The length that a body says it has.
fn announced(headers: &HeaderMap, bytes_max: u64) -> Result<Option<usize>, HttpError> {
    let length = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if length.is_some_and(|length| length > bytes_max) {
        let message = format!("the body may have at most {bytes_max} bytes");
        return Err(HttpError::refused(StatusCode::PAYLOAD_TOO_LARGE, message));
    }
    // What is above the address space cannot be sent either.
    Ok(length.map(|length| usize::try_from(length).unwrap_or(usize::MAX)))
}

/// A stream of at most so many bytes, whole, within the time for that.
async fn collect(state: &State, mut stream: ByteStream, bytes_max: usize) -> Result<Vec<u8>, HttpError> {
    // At once, since growing would hold two copies for a moment; what is not filled takes no memory.
    let mut text = Vec::with_capacity(bytes_max);
    let limit = state.limits.body_timeout();
    let read = async {
        while let Some(bytes) = stream.next().await {
            text.extend_from_slice(&bytes?);
        }
        Ok(())
    };
    let slow = |_| io::Error::other(BodyError::Slow { seconds: limit.as_secs() });
    tokio::time::timeout(limit, read).await.map_err(slow).flatten().map_err(HttpError::from)?;
    text.shrink_to_fit();
    Ok(text)
}

/// Reads a body of at most so many bytes to its end and keeps nothing of it.
///
/// # Errors
/// Where it is larger, is not what its headers say, or does not come to an end.
pub async fn ignored(
    state: &State,
    route: &'static str,
    headers: &HeaderMap,
    body: Body,
    bytes_max: u64,
) -> Result<(), HttpError> {
    announced(headers, bytes_max)?;
    let mut stream = received(state, route, body);
    let mut length = 0;
    while let Some(bytes) = stream.next().await.transpose()? {
        length += bytes.len() as u64;
        if length > bytes_max {
            return Err(io::Error::other(CodingError::TooLarge { bytes_max }).into());
        }
    }
    Ok(())
}

/// Passes a stream on, and ends it with an error where its bytes do not have this hash.
#[must_use]
pub fn hashed(input: ByteStream, expected: Sha256Hash) -> ByteStream {
    let state = (input, Some(Sha256Hasher::new()));
    stream::try_unfold(state, move |(mut input, hasher)| async move {
        let Some(mut hasher) = hasher else { return Ok(None) };
        if let Some(bytes) = input.next().await.transpose()? {
            hasher.update(&bytes);
            return Ok(Some((bytes, (input, Some(hasher)))));
        }
        let found = hasher.finish();
        if found == expected { Ok(None) } else { Err(io::Error::other(BodyError::Hash { expected, found })) }
    })
    .boxed()
}

fn received(state: &State, route: &'static str, body: Body) -> ByteStream {
    let idle = state.limits.body_idle_timeout();
    let metrics = state.metrics.clone();
    let start = Progress { waited: Duration::ZERO, bytes: 0 };
    stream::try_unfold((body.into_data_stream(), start), move |(mut body, mut progress)| {
        let metrics = metrics.clone();
        async move {
            // Only the time that we wait for the client counts: while the engine is busy this is not polled.
            let begin = Instant::now();
            let next = tokio::time::timeout(idle.saturating_sub(progress.waited), body.next()).await;
            let next = next.map_err(|_| io::Error::other(BodyError::Idle { seconds: idle.as_secs() }))?;
            let Some(bytes) = next.transpose().map_err(|error| io::Error::other(BodyError::Broken(error)))? else {
                return Ok(None);
            };
            progress.waited += begin.elapsed();
            progress.bytes += bytes.len();
            if progress.bytes >= PROGRESS_BYTES {
                progress = Progress { waited: Duration::ZERO, bytes: 0 };
            }
            metrics.received(route, bytes.len() as u64);
            Ok(Some((bytes, (body, progress))))
        }
    })
    .boxed()
}

/// How a body is getting on: a byte now and then is no progress.
struct Progress {
    /// Time spent waiting for the client, and bytes that came, since enough of them had come the last time.
    waited: Duration,
    bytes: usize,
}

/// The content coding of a body. There is at most one: no client applies two, and each costs a decoder.
fn content_coding(headers: &HeaderMap) -> Result<Compression, HttpError> {
    let refused = |what: &str| {
        let message = format!("the content coding {what} is not supported; one of zstd, br, gzip, xz and bzip2 is");
        HttpError::refused(StatusCode::UNSUPPORTED_MEDIA_TYPE, message)
    };
    let mut found = Compression::None;
    for value in headers.get_all(header::CONTENT_ENCODING) {
        let value = value.to_str().map_err(|_| refused("given"))?;
        for name in value.split(',').map(|name| name.trim().to_ascii_lowercase()) {
            let coding = match name.as_str() {
                "" | "identity" => continue,
                "x-gzip" => Some(Compression::Gzip),
                name => name.parse().ok().filter(|coding| coding::is_supported(*coding)),
            };
            match coding {
                Some(coding) if found == Compression::None => found = coding,
                _ => return Err(refused(value)),
            }
        }
    }
    Ok(found)
}

/// Has what a handler leaves of a body drained for a moment.
pub async fn linger(request: Request, next: Next) -> Response {
    let (parts, body) = request.into_parts();
    if body.is_end_stream() {
        return next.run(Request::from_parts(parts, body)).await;
    }
    let asked = parts.headers.contains_key(header::EXPECT);
    let body = Body::from_stream(Lingering { body: Some(body.into_data_stream()), owed: !asked });
    next.run(Request::from_parts(parts, body)).await
}

/// A body whose rest, when it is dropped, is drained.
struct Lingering {
    /// `None` once it has ended.
    body: Option<BodyDataStream>,
    /// Whether the client is sending: at once, or because the body was asked for.
    owed: bool,
}

impl Stream for Lingering {
    type Item = Result<Bytes, axum::Error>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.owed = true;
        let Some(body) = &mut self.body else { return Poll::Ready(None) };
        let item = std::task::ready!(body.poll_next_unpin(cx));
        if !matches!(item, Some(Ok(_))) {
            self.body = None;
        }
        Poll::Ready(item)
    }
}

impl Drop for Lingering {
    fn drop(&mut self) {
        let Some(mut body) = self.body.take().filter(|_| self.owed) else { return };
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        // Owned by nobody, since the request is over; it ends by itself within `LINGER`.
        runtime.spawn(tokio::time::timeout(LINGER, async move {
            let mut drained = 0;
            while let Ok(Some(Ok(bytes))) = tokio::time::timeout(LINGER_IDLE, body.next()).await {
                drained += bytes.len();
                if drained > LINGER_BYTES_MAX {
                    break;
                }
            }
        }));
    }
}

/// The stream as a response body. An error in it ends the connection, so that the client cannot take the rest for the
/// whole.
pub fn outgoing<E>(stream: impl Stream<Item = Result<Bytes, E>> + Send + 'static) -> Body
where
    E: std::error::Error + Send + Sync + 'static,
{
    Body::from_stream(stream.map(|item| item.map_err(|error| Aborted(Arc::new(error)))))
}

/// Bytes that are held in memory as a response body, which must be taken within the time for that; and its length.
pub fn held(state: &State, bytes: Bytes) -> ([(HeaderName, String); 1], Body) {
    let length = [(header::CONTENT_LENGTH, bytes.len().to_string())];
    let pieces = stream::unfold(bytes, async |mut bytes| {
        let piece = bytes.split_to(bytes.len().min(PROGRESS_BYTES));
        (!piece.is_empty()).then_some((Ok::<_, BodyError>(piece), bytes))
    });
    (length, in_time(state, pieces))
}

/// A stream that holds memory as a response body, which ends in an error where its client is slow to take it.
pub fn in_time<E>(state: &State, stream: impl Stream<Item = Result<Bytes, E>> + Send + 'static) -> Body
where
    E: std::error::Error + Send + Sync + 'static,
{
    let limit = state.limits.body_timeout();
    let start = Instant::now();
    Body::from_stream(stream.map(move |item| {
        if start.elapsed() > limit {
            return Err(Aborted(Arc::new(BodyError::Slow { seconds: limit.as_secs() })));
        }
        item.map_err(|error| Aborted(Arc::new(error)))
    }))
}

/// A failure in the middle of a response body.
#[derive(Debug, Clone, thiserror::Error)]
#[error("the response broke off")]
pub struct Aborted(#[source] pub Arc<dyn std::error::Error + Send + Sync>);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_codings() {
        let check = |value: &str, expect: Option<Compression>| {
            let mut headers = HeaderMap::new();
            headers.insert(header::CONTENT_ENCODING, value.parse().unwrap());
            assert_eq!(content_coding(&headers).ok(), expect, "{value}");
        };
        check("", Some(Compression::None));
        check("identity", Some(Compression::None));
        check("zstd", Some(Compression::Zstd));
        check("BR", Some(Compression::Brotli));
        check("identity, xz", Some(Compression::Xz));
        check("x-gzip", Some(Compression::Gzip));
        check("bzip2", Some(Compression::Bzip2));
        check("none", Some(Compression::None));
        check("zstd, zstd", None);
        check("lz4", None);
        check("deflate", None);
    }

    #[tokio::test]
    async fn a_hash_that_does_not_match_is_the_last_item() {
        let pieces = || stream::iter(["ab", "c"].map(|piece| Ok(Bytes::from(piece)))).boxed();
        let right: Vec<_> = hashed(pieces(), Sha256Hash::of(b"abc")).collect().await;
        assert!(right.iter().all(Result::is_ok) && right.len() == 2);
        let wrong: Vec<_> = hashed(pieces(), Sha256Hash::of(b"abd")).collect().await;
        let error = wrong.last().unwrap().as_ref().unwrap_err();
        assert!(matches!(BodyError::within(error), Some(BodyError::Hash { .. })));
    }
}
