//! `nar/<file>`: NARs in and out.
//!
//! Two kinds of names. A *content* name, `<hash part>-<NarHash>.nar`, stands in the narinfos that we serve: the NAR is
//! assembled from chunks. An *upload* name, `<FileHash>.nar[.<suffix>]`, is where Nix puts a file, and where a client
//! that remembers its own narinfo will look for it weeks later: the file itself is not kept, so the NAR is compressed
//! anew, in the format that was uploaded.
//!
//! Whether a NAR is complete is known before 200 is sent. Should a byte then turn out to be wrong, the connection is
//! broken off, so that no client takes the part for the whole.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use futures::stream::{self, Stream, StreamExt as _};
use narlake_format::lake::record::PathRecord;
use narlake_format::nix::compression::Compression;
use narlake_format::nix::hash::Sha256Hash;
use narlake_format::nix::store_path::StorePathHash;
use narlake_storage::{Cache, Error, UploadName};

use super::error::HttpError;
use super::range::{self, Asked};
use super::target::{Object, Target};
use super::{Shared, body, place};
use crate::coding::{self, Bounds, ByteStream};
use crate::metrics::InFlight;

const ROUTE: &str = "/nar/{file}";

/// Digits of a SHA-256 in Nix's base 32.
const HASH_CHARS: usize = 52;

/// What follows `nar/`.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Name {
    Content { path: StorePathHash, nar_hash: Sha256Hash },
    Upload { file_hash: Sha256Hash, compression: Compression },
}

impl Name {
    fn parse(file: &str) -> Result<Self, HttpError> {
        let unknown = || {
            HttpError::not_found(format!(
                "{file} is neither <hash part>-<NarHash>.nar nor <FileHash>.nar[.xz|.zst|.br|.bz2]"
            ))
        };
        let (stem, suffix) = file.split_once(".nar").ok_or_else(unknown)?;
        if let Some((path, nar_hash)) = stem.split_once('-') {
            let path = path.parse().map_err(|_| unknown())?;
            let nar_hash = Sha256Hash::parse_base32(nar_hash).map_err(|_| unknown())?;
            return if suffix.is_empty() { Ok(Self::Content { path, nar_hash }) } else { Err(unknown()) };
        }
        if stem.len() != HASH_CHARS {
            return Err(unknown());
        }
        let file_hash = Sha256Hash::parse_base32(stem).map_err(|_| unknown())?;
        let compression = Compression::from_suffix(suffix).ok_or_else(unknown)?;
        Ok(Self::Upload { file_hash, compression })
    }
}

/// Takes in a NAR that a narinfo will name. Answered 201 once everything is in the bucket.
///
/// While as many uploads as `limits.uploads_max` are under way this waits, holding the connection: told to come back
/// later, older Nix would give up. Only once `limits.hold_s` have passed it is told so nevertheless, shortly before
/// it gives up by itself.
pub async fn put(
    State(shared): State<Shared>,
    Target(cache): Target,
    Path(Object { file }): Path<Object>,
    headers: HeaderMap,
    request: Body,
) -> Result<StatusCode, HttpError> {
    let Name::Upload { file_hash, compression } = Name::parse(&file)? else {
        return Err(HttpError::invalid("NARs are uploaded as nar/<FileHash>.nar[.<suffix>]"));
    };
    supported(compression)?;
    let waiting = InFlight::of(&shared.metrics.uploads_waiting);
    let permit = place(shared.limits.hold(), shared.uploads.acquire(), "too many uploads are under way").await?;
    drop(waiting);
    let _in_flight = InFlight::of(&shared.metrics.uploads_in_flight);

    let limits = &shared.limits;
    let received = body::incoming(&shared, ROUTE, &headers, request, limits.nar_bytes_max)?;
    let (received, compression) = reveal(received, compression).await?;
    supported(compression)?;
    let bounds = Bounds {
        bytes_max: limits.nar_bytes_max,
        expansion_max: limits.expansion_max,
        decoder_bytes_max: coding::DECODER_BYTES_MAX,
    };
    let nar = coding::decode(body::hashed(received, file_hash), compression, bounds);
    let ingested = shared.lake.ingest(&cache, nar).await?;
    shared.lake.keep_upload(&cache, &UploadName { file_hash, compression }, &ingested).await?;
    drop(permit);
    tracing::debug!(
        nar_hash = %ingested.nar_hash,
        nar_size = ingested.nar_size,
        chunks_new = ingested.stats.chunks_new,
        chunks_known = ingested.stats.chunks_known,
        bytes_new = ingested.stats.bytes_new,
        bytes_stored = ingested.stats.bytes_stored,
        "NAR taken in"
    );
    Ok(StatusCode::CREATED)
}

fn supported(compression: Compression) -> Result<(), HttpError> {
    if coding::is_supported(compression) {
        return Ok(());
    }
    let message = format!("NARs compressed with {compression} are not supported; push with compression=zstd");
    Err(HttpError::refused(StatusCode::UNSUPPORTED_MEDIA_TYPE, message))
}

/// Finds out what a file without suffix is: Nix gives none to gzip, nor to lzma.
async fn reveal(mut stream: ByteStream, named: Compression) -> Result<(ByteStream, Compression), HttpError> {
    if named != Compression::None {
        return Ok((stream, named));
    }
    let mut head = Vec::new();
    let mut length = 0;
    let mut first = [0; 3];
    while length < first.len() {
        let Some(bytes) = stream.next().await.transpose()? else { break };
        for (slot, byte) in first.iter_mut().skip(length).zip(&bytes) {
            *slot = *byte;
            length += 1;
        }
        head.push(Ok(bytes));
    }
    let compression = match first {
        [0x1f, 0x8b, _] => Compression::Gzip,
        [0x5d, 0x00, 0x00] => Compression::Lzma,
        _ => Compression::None,
    };
    Ok((stream::iter(head).chain(stream).boxed(), compression))
}

/// Whether a NAR is there. For an uploaded file this is the question that Nix asks before it sends one, so the answer
/// is a promise that its narinfo will be accepted.
pub async fn head(
    State(shared): State<Shared>,
    Target(cache): Target,
    Path(Object { file }): Path<Object>,
    mut headers: HeaderMap,
) -> Result<Response, HttpError> {
    // Ranges are of GET alone.
    headers.remove(header::RANGE);
    let name = Name::parse(&file)?;
    if let Name::Upload { file_hash, compression } = name {
        supported(compression).map_err(|_| missing(&file))?;
        if shared.lake.has_upload(&cache, &UploadName { file_hash, compression }).await? {
            return Ok(([(header::CONTENT_TYPE, NAR)], ()).into_response());
        }
    }
    let found = find(&shared, &cache, &file, name).await?;
    let answer = Answer::to(&found, &headers);
    shared.lake.check_complete(&cache, &found.record).await?;
    Ok(answer.response(Body::empty()))
}

/// A NAR, or a part of it.
pub async fn get(
    State(shared): State<Shared>,
    Target(cache): Target,
    Path(Object { file }): Path<Object>,
    headers: HeaderMap,
) -> Result<Response, HttpError> {
    let name = Name::parse(&file)?;
    let found = find(&shared, &cache, &file, name).await?;
    let answer = Answer::to(&found, &headers);
    if matches!(answer, Answer::NotModified { .. } | Answer::Unsatisfiable { .. }) {
        return Ok(answer.response(Body::empty()));
    }
    let places = Arc::clone(&shared.downloads).acquire_owned();
    let place = place(shared.limits.hold(), places, "too many downloads are under way").await?;
    let nar = shared.lake.export(&cache, &found.record).await?;
    // The place goes when the stream does.
    let nar = nar.inspect(move |_| _ = &place);
    let body = match &answer {
        Answer::Part { range, .. } => body::outgoing(part(nar, range.clone())),
        Answer::Compressed { compression, .. } => {
            body::outgoing(coding::encode(nar.map(|item| item.map_err(io::Error::other)).boxed(), *compression))
        }
        _ => body::outgoing(nar),
    };
    Ok(answer.response(body))
}

/// A NAR that is there, and how its name says it is compressed.
struct Found {
    record: Arc<PathRecord>,
    compression: Compression,
}

async fn find(shared: &Shared, cache: &Cache, file: &str, name: Name) -> Result<Found, HttpError> {
    match name {
        Name::Content { path, nar_hash } => {
            let record = shared.lake.lookup(cache, &path).await?.filter(|record| record.info().nar_hash == nar_hash);
            Ok(Found { record: record.ok_or_else(|| missing(file))?, compression: Compression::None })
        }
        Name::Upload { file_hash, compression } => {
            supported(compression).map_err(|_| missing(file))?;
            let name = UploadName { file_hash, compression };
            let record = shared.lake.uploaded(cache, &name).await?.ok_or_else(|| missing(file))?;
            // Without a suffix it was gzip, unless it was the NAR itself.
            let compression = match compression {
                Compression::None if record.info().nar_hash != file_hash => Compression::Gzip,
                compression => compression,
            };
            Ok(Found { record, compression })
        }
    }
}

fn missing(file: &str) -> HttpError {
    HttpError::not_found(format!("nar/{file} is not in this cache"))
}

/// Media type of a NAR.
const NAR: &str = "application/x-nix-nar";

/// How a NAR is answered.
enum Answer {
    Whole {
        etag: String,
        length: u64,
    },
    Part {
        etag: String,
        length: u64,
        range: Range<u64>,
    },
    /// Compressed on the way; `coding` if the client asked for a content coding rather than for a compressed file.
    Compressed {
        etag: String,
        compression: Compression,
        coding: bool,
    },
    NotModified {
        etag: String,
    },
    Unsatisfiable {
        length: u64,
    },
}

impl Answer {
    fn to(found: &Found, headers: &HeaderMap) -> Self {
        let text = |name| headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok()).unwrap_or_default();
        let length = found.record.info().nar_size;
        let nar_hash = found.record.info().nar_hash.to_base32();
        let plain = format!("\"{nar_hash}\"");
        let ranged = headers.contains_key(header::RANGE) && found.compression == Compression::None;
        // A range is of the NAR itself; the compressed variant is not the same bytes every time.
        let coding = found.compression == Compression::None && !ranged && accepts_zstd(text(header::ACCEPT_ENCODING));
        let compression = if coding { Compression::Zstd } else { found.compression };
        let etag = match compression {
            Compression::None => plain.clone(),
            // Weak: equal in meaning, not byte for byte.
            compression => format!("W/\"{nar_hash}-{compression}\""),
        };
        // Weakly, as the RFC has it: a proxy on the way may have made the tag a weak one.
        let opaque = |tag: &str| tag.trim().trim_start_matches("W/").to_owned();
        let known = text(header::IF_NONE_MATCH).split(',').map(opaque).any(|tag| tag == opaque(&etag) || tag == "*");
        if known {
            return Self::NotModified { etag };
        }
        if compression != Compression::None {
            return Self::Compressed { etag, compression, coding };
        }
        let condition = text(header::IF_RANGE);
        if ranged && (condition.is_empty() || condition == plain) {
            match range::parse(text(header::RANGE), length) {
                Asked::Whole => {}
                Asked::Part(range) => return Self::Part { etag, length, range },
                Asked::Unsatisfiable => return Self::Unsatisfiable { length },
            }
        }
        Self::Whole { etag, length }
    }

    fn response(&self, body: Body) -> Response {
        let mut response = Response::new(body);
        let headers = response.headers_mut();
        let mut set = |name, value: String| {
            if let Ok(value) = HeaderValue::from_str(&value) {
                headers.insert(name, value);
            }
        };
        set(header::CONTENT_TYPE, NAR.to_owned());
        set(header::VARY, "accept-encoding".to_owned());
        let status = match self {
            Self::Whole { etag, length } => {
                set(header::ETAG, etag.clone());
                set(header::ACCEPT_RANGES, "bytes".to_owned());
                set(header::CONTENT_LENGTH, length.to_string());
                StatusCode::OK
            }
            Self::Part { etag, length, range } => {
                set(header::ETAG, etag.clone());
                set(header::ACCEPT_RANGES, "bytes".to_owned());
                set(header::CONTENT_LENGTH, (range.end - range.start).to_string());
                set(header::CONTENT_RANGE, format!("bytes {}-{}/{length}", range.start, range.end - 1));
                StatusCode::PARTIAL_CONTENT
            }
            Self::Compressed { etag, compression, coding } => {
                set(header::ETAG, etag.clone());
                if *coding {
                    set(header::CONTENT_ENCODING, compression.to_string());
                }
                StatusCode::OK
            }
            Self::NotModified { etag } => {
                set(header::ETAG, etag.clone());
                StatusCode::NOT_MODIFIED
            }
            Self::Unsatisfiable { length } => {
                set(header::CONTENT_RANGE, format!("bytes */{length}"));
                StatusCode::RANGE_NOT_SATISFIABLE
            }
        };
        *response.status_mut() = status;
        response
    }
}

/// Whether an `Accept-Encoding` header allows zstd. The absence of a header allows nothing here: a client that did not
/// ask gets the bytes that NarHash is of.
fn accepts_zstd(header: &str) -> bool {
    header.split(',').any(|item| {
        let mut parameters = item.split(';').map(str::trim);
        let named = parameters.next().is_some_and(|name| name.eq_ignore_ascii_case("zstd"));
        let refused = parameters.any(|parameter| {
            parameter
                .strip_prefix("q=")
                .is_some_and(|quality| quality.parse::<f32>().is_ok_and(|quality| quality <= 0.0))
        });
        named && !refused
    })
}

/// The bytes of a range of a stream, and no longer than that.
fn part<S>(nar: S, range: Range<u64>) -> impl Stream<Item = Result<Bytes, Error>> + Send
where
    S: Stream<Item = Result<Bytes, Error>> + Send + 'static,
{
    let state = (Box::pin(nar), 0_u64);
    stream::try_unfold(state, move |(mut nar, mut at)| {
        let range = range.clone();
        async move {
            while at < range.end {
                let Some(mut bytes) = nar.next().await.transpose()? else { break };
                let start = at;
                at += bytes.len() as u64;
                let within = |place: u64| usize::try_from(place.clamp(start, at) - start).unwrap_or(usize::MAX);
                bytes.truncate(within(range.end));
                let bytes = bytes.slice(within(range.start).min(bytes.len())..);
                if !bytes.is_empty() {
                    return Ok(Some((bytes, (nar, at))));
                }
            }
            Ok(None)
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        let path = "0c4phn8d0z4d6mx8ym2ccyzl1l3rqbl4";
        let hash = Sha256Hash::of(b"");
        let digits = hash.to_base32();
        let content = Name::Content { path: path.parse().unwrap(), nar_hash: hash };
        assert_eq!(Name::parse(&format!("{path}-{digits}.nar")).unwrap(), content);
        for (suffix, compression) in [
            ("", Compression::None),
            (".xz", Compression::Xz),
            (".zst", Compression::Zstd),
            (".br", Compression::Brotli),
            (".bz2", Compression::Bzip2),
            (".lz4", Compression::Lz4),
            (".lzip", Compression::Lzip),
        ] {
            let name = Name::parse(&format!("{digits}.nar{suffix}")).unwrap();
            assert_eq!(name, Name::Upload { file_hash: hash, compression });
        }
        for wrong in [
            "",
            ".nar",
            "x.nar",
            &digits,
            &format!("{digits}.nar.zip"),
            &format!("{path}-{digits}.nar.xz"),
            &format!("{path}-.nar"),
            &format!("{digits}.narinfo"),
            &hash.to_hex(),
            &format!("{}.nar", hash.to_hex()),
            "../../etc/passwd.nar",
        ] {
            assert!(Name::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn accept_encoding() {
        for (header, expect) in [
            ("zstd", true),
            ("zstd, br, gzip, deflate, bzip2, xz", true),
            ("gzip;q=1.0, ZSTD;q=0.5", true),
            ("zstd;q=0", false),
            ("zstd; q=0.000", false),
            ("gzip", false),
            ("*", false),
            ("", false),
        ] {
            assert_eq!(accepts_zstd(header), expect, "{header}");
        }
    }

    #[tokio::test]
    async fn parts_of_a_stream() {
        for range in [0..1, 0..10, 2..3, 2..8, 3..6, 9..10, 5..5] {
            let pieces = ["abc", "", "def", "ghij"].map(|piece| Ok(Bytes::from(piece)));
            let found: Vec<Bytes> = part(stream::iter(pieces), range.clone()).map(Result::unwrap).collect().await;
            let (start, end) = (usize::try_from(range.start).unwrap(), usize::try_from(range.end).unwrap());
            assert_eq!(found.concat(), b"abcdefghij"[start..end], "{range:?}");
        }
    }
}
