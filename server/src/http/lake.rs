//! The lake API: what mountd and the `narlake` command ask that Nix's protocol has no words for. Bodies are those of
//! [`narlake_format::api`].
//!
//! It serves the default cache. A pack is given out only to those who may read the cache's trust domain, and named by
//! its domain in the URL, so that no request crosses one.

use std::collections::HashSet;
use std::io;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use futures::stream::{self, StreamExt as _, TryStreamExt as _};
use narlake_format::api::{
    self, API_VERSION, ClosureLine, ClosureRequest, Info, LOCATE_MAX, LocateResponse, MissingRequest, MissingResponse,
    NDJSON, PackUrl, decode_locate,
};
use narlake_format::id::ID_LEN;
use narlake_format::lake::location::PackRef;
use narlake_format::lake::record::PathRecord;
use narlake_format::limits::{CLOSURE_MAX, PACK_MAX};
use narlake_format::nix::store_path::StorePathHash;
use narlake_storage::ErrorKind;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::buffers::Buffer;
use super::error::HttpError;
use super::{Shared, State as Parts, body, range};
use crate::config::BUFFERS_BYTES_MIN;

/// Largest JSON body of a request: the longest base names, quoted, of the largest closure.
const JSON_BYTES_MAX: usize = CLOSURE_MAX * 256;

/// Memory that a JSON question takes, in multiples of its length: the text, and what is read from it.
const JSON_WEIGHT: usize = 2;

/// Memory that a question where blobs are takes, in multiples of its length: ids, locations, and the answer made of
/// them, twice.
const LOCATE_WEIGHT: usize = 8;

/// Memory taken for a closure before its size is known, in bytes: what that of a system comes to.
const CLOSURE_BYTES: usize = 4 << 20;

/// Memory that a record and each of its references take in a closure, in bytes.
const RECORD_BYTES: usize = 1024;
const REFERENCE_BYTES: usize = 128;

/// JSON that is longer than this is read on a thread where it keeps nobody waiting.
const JSON_QUICK_BYTES: usize = 64 << 10;

const _: () = assert!((JSON_BYTES_MAX * JSON_WEIGHT) as u64 <= BUFFERS_BYTES_MIN);
const _: () = assert!((LOCATE_MAX * ID_LEN * LOCATE_WEIGHT) as u64 <= BUFFERS_BYTES_MIN);
const _: () = assert!(PACK_MAX as u64 <= BUFFERS_BYTES_MIN);

/// For how many seconds nobody need ask again for the URL of a pack, where none is given out.
const NO_URL_S: u64 = 600;

/// Lookups under way at once for one `missing` request.
const LOOKUPS: usize = 32;

/// `GET info`
pub async fn info(State(shared): State<Shared>) -> Response {
    let lake = shared.lake.info();
    let info = Info {
        api_version: API_VERSION,
        lake: lake.lake,
        store_dir: lake.store_dir.clone(),
        cache: shared.cache.id(),
        public_keys: shared.cache.public_keys().to_vec(),
    };
    axum::Json(info).into_response()
}

/// The part of the URL that names a path.
#[derive(Deserialize)]
pub struct ByHash {
    hash: String,
}

/// `GET paths/<hash>`: the path record itself.
pub async fn path(State(shared): State<Shared>, Path(ByHash { hash }): Path<ByHash>) -> Result<Response, HttpError> {
    let hash: StorePathHash = hash.parse().map_err(|_| HttpError::invalid(format!("{hash:?} is not a hash part")))?;
    let record = shared.lake.lookup(&shared.cache, &hash).await?;
    let absent = || {
        let mark = (HeaderName::from_static(api::ABSENT_HEADER), HeaderValue::from_static("path"));
        HttpError::not_found(format!("{hash} is not in this cache")).with(mark.0, mark.1)
    };
    let record = record.ok_or_else(absent)?;
    let text = record.to_text(&shared.lake.info().store_dir);
    Ok(([(header::CONTENT_TYPE, "text/x-nix-narinfo")], text).into_response())
}

/// `POST closure`: the records of closures, references first, one JSON document a line.
pub async fn closure(State(shared): State<Shared>, headers: HeaderMap, body: Body) -> Result<Response, HttpError> {
    let (request, asked): (ClosureRequest, _) = json(&shared, "/api/v1/closure", &headers, body).await?;
    bounded("roots", request.roots.len())?;
    bounded("have", request.have.len())?;
    let have: HashSet<StorePathHash> = request.have.into_iter().collect();
    // Memory goes before more is taken: two that held some and waited for more would wait for each other.
    drop(asked);
    let mut buffer = shared.answers.take(CLOSURE_BYTES).await?;
    let (records, missing) = shared.lake.closure(&shared.cache, &request.roots).await?;
    let bytes = records.iter().map(|record| RECORD_BYTES + record.info().references.len() * REFERENCE_BYTES).sum();
    if bytes > CLOSURE_BYTES {
        drop(buffer);
        buffer = shared.answers.take(bytes).await?;
    }
    buffer.shrink(bytes);
    let state = Arc::clone(&shared);
    let wanted = records.into_iter().filter(move |record| !have.contains(&record.info().store_path.hash));
    let mut count = 0;
    let items = wanted.map(Item::Record).chain(missing.into_iter().map(Item::Missing)).chain([Item::End]);
    // The text of a line is made when it is sent: all of them together may be far larger than the records.
    let lines = items.map(move |item| {
        let _held = &buffer;
        let line = match item {
            Item::Record(record) => ClosureLine::Record(record.to_text(&shared.lake.info().store_dir)),
            Item::Missing(hash) => ClosureLine::Missing(hash),
            Item::End => ClosureLine::Done(count),
        };
        count += 1;
        let mut text = serde_json::to_vec(&line).map_err(io::Error::other)?;
        text.push(b'\n');
        Ok::<_, io::Error>(Bytes::from(text))
    });
    let body = body::in_time(&state, stream::iter(lines));
    Ok(([(header::CONTENT_TYPE, NDJSON)], body).into_response())
}

/// What a line of the answer is made of.
enum Item {
    Record(Arc<PathRecord>),
    Missing(StorePathHash),
    End,
}

/// `POST missing`: which of these paths the cache does not have.
pub async fn missing(State(shared): State<Shared>, headers: HeaderMap, body: Body) -> Result<Response, HttpError> {
    let (request, buffer): (MissingRequest, _) = json(&shared, "/api/v1/missing", &headers, body).await?;
    bounded("paths", request.paths.len())?;
    let shared = &shared;
    let missing: Vec<_> = stream::iter(request.paths)
        .map(|path| async move {
            let found = shared.lake.lookup(&shared.cache, &path.hash).await?;
            Ok::<_, HttpError>(found.is_none_or(|record| record.info().store_path != path).then_some(path))
        })
        .buffered(LOOKUPS)
        .try_filter_map(async |path| Ok(path))
        .try_collect()
        .await?;
    answer(shared, &MissingResponse { missing }, buffer)
}

/// `POST locate`: where these blobs are.
pub async fn locate(State(shared): State<Shared>, headers: HeaderMap, body: Body) -> Result<Response, HttpError> {
    let (ids, buffer) =
        body::question(&shared, "/api/v1/locate", &headers, body, LOCATE_MAX * ID_LEN, LOCATE_WEIGHT).await?;
    let ids = decode_locate(&ids)?;
    let locations = shared.lake.locate(&shared.cache.domain(), &ids).await?;
    answer(&shared, &LocateResponse::new(&locations), buffer)
}

/// The parts of the URL that name a pack.
#[derive(Deserialize)]
pub struct PackPath {
    domain: String,
    id: String,
}

/// `GET packs/<domain>/<id>` with a range: bytes of a pack.
pub async fn pack(
    State(shared): State<Shared>,
    Path(PackPath { domain, id }): Path<PackPath>,
    headers: HeaderMap,
) -> Result<Response, HttpError> {
    let pack = readable(&shared, &domain, &id)?;
    let asked = headers.get(header::RANGE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    // Neither end may be left open: to learn the length of the pack would cost another request each time.
    let range = range::closed(asked)
        .ok_or_else(|| HttpError::invalid("packs are read by ranges with two ends, bytes=<first>-<last>"))?;
    if range.end - range.start > PACK_MAX as u64 {
        let message = format!("a range of a pack may have at most {PACK_MAX} bytes");
        return Err(HttpError::refused(StatusCode::RANGE_NOT_SATISFIABLE, message));
    }
    let length = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
    let buffer = shared.answers.take(length).await?;
    let bytes = match shared.lake.read_pack(&pack, range.clone()).await {
        Err(error) if error.kind() == ErrorKind::Corrupt => {
            return Err(beyond(&shared, &pack, range.end).await.unwrap_or_else(|| error.into()));
        }
        read => read?,
    };
    // To know the length costs a request of its own. Whoever asks for the first byte alone wants to know nothing else.
    let total = if range == (0..1) { shared.lake.pack_size(&pack).await?.to_string() } else { "*".into() };
    let content_range = format!("bytes {}-{}/{total}", range.start, range.end - 1);
    let headers = [(header::CONTENT_TYPE, "application/octet-stream"), (header::CONTENT_RANGE, content_range.as_str())];
    let (length, body) = body::held(&shared, buffer.join(bytes));
    Ok((StatusCode::PARTIAL_CONTENT, headers, length, body).into_response())
}

/// `GET packs/<domain>/<id>/url`: where the pack can be read without this server, if it can.
pub async fn pack_url(
    State(shared): State<Shared>,
    Path(PackPath { domain, id }): Path<PackPath>,
) -> Result<Response, HttpError> {
    let pack = readable(&shared, &domain, &id)?;
    let url = match shared.pack_url_valid {
        Some(valid) => shared.lake.pack_url(&pack, valid).await?.map(|url| (url, valid)),
        None => None,
    };
    let valid_s = url.as_ref().map_or(NO_URL_S, |(_, valid)| valid.as_secs());
    let answer = PackUrl { url: url.map(|(url, _)| url), valid_s };
    // A URL is a key: no proxy is to keep it.
    Ok(([(header::CACHE_CONTROL, "no-store")], axum::Json(answer)).into_response())
}

/// The pack of this name, if it is of the domain that the cache's readers may read.
fn readable(shared: &Parts, domain: &str, id: &str) -> Result<PackRef, HttpError> {
    let name = format!("{domain}/{id}");
    let pack: PackRef = name.parse().map_err(|_| HttpError::invalid(format!("{name:?} does not name a pack")))?;
    if pack.domain == shared.cache.domain() {
        return Ok(pack);
    }
    Err(HttpError::not_found(format!("there is no pack {pack}")))
}

/// The refusal of a range that ends beyond the end of its pack, if it does. Whoever took it from a location learns that
/// the pack is not what the location was made for, and that asking again is no use.
async fn beyond(shared: &Parts, pack: &PackRef, end: u64) -> Option<HttpError> {
    let size = shared.lake.pack_size(pack).await.ok().filter(|size| *size < end)?;
    let message = format!("pack {pack} has {size} bytes");
    let refusal = HttpError::refused(StatusCode::RANGE_NOT_SATISFIABLE, message)
        .with(HeaderName::from_static(api::DAMAGED_HEADER), HeaderValue::from_static("content"));
    let value = HeaderValue::from_str(&format!("bytes */{size}")).ok()?;
    Some(refusal.with(header::CONTENT_RANGE, value))
}

async fn json<T: DeserializeOwned + Send + 'static>(
    state: &Parts,
    route: &'static str,
    headers: &HeaderMap,
    body: Body,
) -> Result<(T, Buffer), HttpError> {
    let (text, buffer) = body::question(state, route, headers, body, JSON_BYTES_MAX, JSON_WEIGHT).await?;
    let read = if text.len() <= JSON_QUICK_BYTES {
        serde_json::from_slice(&text)
    } else {
        tokio::task::spawn_blocking(move || serde_json::from_slice(&text)).await.map_err(HttpError::lost)?
    };
    let value = read.map_err(|error| HttpError::invalid(format!("the body is not what is expected: {error}")))?;
    Ok((value, buffer))
}

/// A JSON answer, in the memory that was taken for the question.
fn answer(state: &Parts, value: &impl Serialize, buffer: Buffer) -> Result<Response, HttpError> {
    let text = serde_json::to_vec(value).map_err(HttpError::unwritable)?;
    let (length, body) = body::held(state, buffer.join(text));
    Ok(([(header::CONTENT_TYPE, "application/json")], length, body).into_response())
}

fn bounded(what: &str, count: usize) -> Result<(), HttpError> {
    if count <= CLOSURE_MAX {
        return Ok(());
    }
    let message = format!("{what} has {count} items, the limit is {CLOSURE_MAX}");
    Err(HttpError::refused(StatusCode::PAYLOAD_TOO_LARGE, message))
}
