//! `<hash>.narinfo`: GET of what is known of a path, PUT as the commit of a push.

use axum::body::Body;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use narlake_format::lake::record::PathRecord;
use narlake_format::limits::NARINFO_MAX;
use narlake_format::nix::compression::Compression;
use narlake_format::nix::narinfo::NarInfo;
use narlake_format::nix::store_path::StorePathHash;
use narlake_storage::{Cache, Outcome, UploadName};

use super::error::HttpError;
use super::{Shared, State, body};

const ROUTE: &str = "/{hash}.narinfo";

/// The narinfo of a path, with our signatures, as it is served: the NAR assembled from chunks, not the file uploaded.
pub async fn get(state: &State, cache: &Cache, hash: StorePathHash) -> Result<Response, HttpError> {
    let record = state.lake.lookup(cache, &hash).await?;
    let record = record.ok_or_else(|| HttpError::not_found(format!("{hash} is not in this cache")))?;
    // Nix pushes what is not there, which heals it; and does not ask for a NAR that we could not give.
    if !state.lake.is_whole(cache, &record).await? {
        return Err(HttpError::not_found(format!("{hash} has lost content; push it again")));
    }
    Ok(served(state, StatusCode::OK, &record))
}

/// Publishes a path whose NAR has been uploaded. Answered 201 when the path is new and 200 when it was there; a path
/// that was there with another NarHash stays as it is.
///
/// A commit that has begun is carried through even if its client goes away: half of one would be a path that is visible
/// before its references were looked at for the last time.
pub async fn put(
    state: &Shared,
    cache: &Cache,
    hash: StorePathHash,
    headers: &HeaderMap,
    body: Body,
) -> Result<Response, HttpError> {
    let (text, buffer) = body::whole(state, ROUTE, headers, body, NARINFO_MAX).await?;
    let info = NarInfo::parse(&state.lake.info().store_dir, &text)?;
    if info.store_path.hash != hash {
        let message = format!("the narinfo is of {}, the URL is of {hash}", info.store_path);
        return Err(HttpError::invalid(message));
    }
    check_file(&info)?;
    let (shared, cache) = (Shared::clone(state), cache.clone());
    let commit = async move {
        // What was parsed of the text is as large: its memory counts until the commit is done.
        let _buffer = buffer;
        shared.lake.publish(&cache, info, shared.signers.keys()).await
    };
    let published = state.commits.spawn(commit).await.map_err(HttpError::lost)??;
    let status = match published.outcome {
        Outcome::New => StatusCode::CREATED,
        Outcome::Known | Outcome::NotReproducible => StatusCode::OK,
    };
    // The answer shows the signatures: a pusher that remembers its own narinfo would reject the path for lack of them.
    Ok(served(state, status, &published.record))
}

/// Refuses a narinfo that contradicts itself about the file that its URL names. Whether the file is here, and is the NAR,
/// the engine says; it also refuses URLs of other forms, but for those of paths that it knows: a client that adds a
/// signature sends back what it was served.
fn check_file(info: &NarInfo) -> Result<(), HttpError> {
    let Some(name) = UploadName::parse(&info.url) else { return Ok(()) };
    let (url, file_hash, compression) = (&info.url, name.file_hash, info.compression);
    let check = |holds: bool, contradiction: &dyn Fn() -> String| {
        if holds { Ok(()) } else { Err(HttpError::invalid(contradiction())) }
    };
    check(info.file_hash.is_none_or(|claimed| claimed == file_hash), &|| {
        let claimed = info.file_hash.map(|hash| hash.to_string()).unwrap_or_default();
        format!("FileHash is {claimed}, the URL {url} is of {file_hash}")
    })?;
    // Not every compression has a suffix: gzip has none.
    check(compression.suffix() == name.compression.suffix(), &|| {
        format!("Compression is {compression}, the URL {url} is of a file with {}", name.compression)
    })?;
    // What is not compressed is the NAR itself, and what is cannot be.
    let is_nar = file_hash == info.nar_hash;
    check(is_nar == (compression == Compression::None), &|| {
        format!("Compression is {compression}, but the file is {file_hash} and NarHash {}", info.nar_hash)
    })?;
    check(!is_nar || info.file_size.is_none_or(|size| size == info.nar_size), &|| {
        let claimed = info.file_size.unwrap_or_default();
        format!("FileSize is {claimed}, but the file is the NAR, and NarSize {}", info.nar_size)
    })
}

fn served(state: &State, status: StatusCode, record: &PathRecord) -> Response {
    let text = record.info().to_text(&state.lake.info().store_dir);
    (status, [(header::CONTENT_TYPE, "text/x-nix-narinfo")], text).into_response()
}
