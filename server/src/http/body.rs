//! Reading request bodies: with an idle limit, counted, decoded, bounded.
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
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::Next;
use axum::response::Response;
use bytes::{Bytes, BytesMut};
use futures::stream::{self, Stream, StreamExt as _};
use narlake_format::nix::compression::Compression;
use narlake_format::nix::hash::{Sha256Hash, Sha256Hasher};

use super::State;
use super::error::HttpError;
use crate::coding::{self, Bounds, ByteStream};

/// Most bytes of a refused body that are read and thrown away, so that its client gets to read the answer.
const LINGER_BYTES_MAX: usize = 64 << 20;
/// Longest time that a refused body is read.
const LINGER: Duration = Duration::from_secs(5);
/// Longest silence in it: a client that is not sending has nothing that could keep it from reading.
const LINGER_IDLE: Duration = Duration::from_millis(500);

/// Most content codings on one body.
const CODINGS_MAX: usize = 2;

/// How a body came to its end before its time. It travels inside an [`io::Error`].
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// No byte came for too long.
    #[error("no byte of the body came for {seconds} s")]
    Idle {
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

/// The body as it comes, without its content codings, within bounds.
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
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|length| length > bytes_max) {
        let message = format!("the body may have at most {bytes_max} bytes");
        return Err(HttpError::refused(StatusCode::PAYLOAD_TOO_LARGE, message));
    }
    let bounds = Bounds { bytes_max, expansion_max: state.limits.expansion_max };
    let mut stream = received(state, route, body);
    // The coding applied last stands last, and comes off first.
    for compression in codings(headers)?.into_iter().rev() {
        stream = coding::decode(stream, compression, bounds);
    }
    Ok(coding::decode(stream, Compression::None, bounds))
}

/// A whole body of at most so many bytes, without its content codings.
///
/// # Errors
/// Where it is larger, is not what its headers say, or does not come to an end.
pub async fn whole(
    state: &State,
    route: &'static str,
    headers: &HeaderMap,
    body: Body,
    bytes_max: usize,
) -> Result<Bytes, HttpError> {
    let mut stream = incoming(state, route, headers, body, bytes_max as u64)?;
    let mut all = BytesMut::new();
    while let Some(bytes) = stream.next().await {
        all.extend_from_slice(&bytes?);
    }
    Ok(all.freeze())
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
    stream::try_unfold(body.into_data_stream(), move |mut body| {
        let metrics = metrics.clone();
        async move {
            // Only the time that we wait for the client counts: while the engine is busy this is not polled.
            let next = tokio::time::timeout(idle, body.next()).await;
            let next = next.map_err(|_| io::Error::other(BodyError::Idle { seconds: idle.as_secs() }))?;
            let Some(bytes) = next.transpose().map_err(|error| io::Error::other(BodyError::Broken(error)))? else {
                return Ok(None);
            };
            metrics.received(route, bytes.len() as u64);
            Ok(Some((bytes, body)))
        }
    })
    .boxed()
}

/// The content codings of a body, in the order they were applied.
fn codings(headers: &HeaderMap) -> Result<Vec<Compression>, HttpError> {
    let refused = |what: &str| {
        let message = format!("the content coding {what} is not supported; zstd, br, gzip, xz and bzip2 are");
        HttpError::refused(StatusCode::UNSUPPORTED_MEDIA_TYPE, message)
    };
    let mut codings = Vec::new();
    for value in headers.get_all(header::CONTENT_ENCODING) {
        let value = value.to_str().map_err(|_| refused("given"))?;
        for name in value.split(',').map(|name| name.trim().to_ascii_lowercase()) {
            match name.as_str() {
                "" | "identity" => {}
                "x-gzip" => codings.push(Compression::Gzip),
                name => match name.parse() {
                    Ok(compression) if coding::is_supported(compression) => codings.push(compression),
                    _ => return Err(refused(name)),
                },
            }
        }
    }
    if codings.len() > CODINGS_MAX {
        return Err(HttpError::invalid(format!("the body has more than {CODINGS_MAX} content codings")));
    }
    Ok(codings)
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

/// A failure in the middle of a response body.
#[derive(Debug, Clone, thiserror::Error)]
#[error("the response broke off")]
pub struct Aborted(#[source] pub Arc<dyn std::error::Error + Send + Sync>);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_codings() {
        let check = |value: &str, expect: Option<&[Compression]>| {
            let mut headers = HeaderMap::new();
            headers.insert(header::CONTENT_ENCODING, value.parse().unwrap());
            assert_eq!(codings(&headers).ok().as_deref(), expect, "{value}");
        };
        check("", Some(&[]));
        check("identity", Some(&[]));
        check("zstd", Some(&[Compression::Zstd]));
        check("BR", Some(&[Compression::Brotli]));
        check("gzip, xz", Some(&[Compression::Gzip, Compression::Xz]));
        check("x-gzip", Some(&[Compression::Gzip]));
        check("bzip2", Some(&[Compression::Bzip2]));
        check("zstd, zstd, zstd", None);
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
