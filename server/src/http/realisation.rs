//! Realisations of content-addressed derivations, under both of the URLs that versions of Nix use for them.
//!
//! Who may push a realisation may push content under any input-addressed path as well. So it is signed as a path is, with
//! the cache's keys, and workers that trust those keys build on it (docs/decisions/0020-realisations-are-signed.md).

use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use narlake_format::api::ABSENT_HEADER;
use narlake_format::limits::REALISATION_MAX;
use narlake_format::nix::realisation::{Realisation, RealisationKey};
use narlake_storage::{Cache, DocumentKey};
use serde::Deserialize;

use super::error::HttpError;
use super::target::Target;
use super::{Shared, body};

/// The part of `realisations/<id>.doi` that names the output.
#[derive(Deserialize)]
pub struct ByHash {
    id: String,
}

/// The parts of `build-trace-v2/<drv>/<output>.doi` that name it.
#[derive(Deserialize)]
pub struct ByPath {
    drv: String,
    output: String,
}

/// GET below `realisations/`.
pub async fn get(
    State(shared): State<Shared>,
    Target(cache): Target,
    Path(ByHash { id }): Path<ByHash>,
) -> Result<Response, HttpError> {
    fetch(&shared, &cache, &format!("realisations/{id}")).await
}

/// GET below `build-trace-v2/`.
pub async fn get_by_path(
    State(shared): State<Shared>,
    Target(cache): Target,
    Path(ByPath { drv, output }): Path<ByPath>,
) -> Result<Response, HttpError> {
    fetch(&shared, &cache, &format!("build-trace-v2/{drv}/{output}")).await
}

/// PUT below `realisations/`.
pub async fn put(
    State(shared): State<Shared>,
    Target(cache): Target,
    Path(ByHash { id }): Path<ByHash>,
    headers: HeaderMap,
    body: Body,
) -> Result<StatusCode, HttpError> {
    let (text, _buffer) = body::whole(&shared, "/realisations/{id}", &headers, body, REALISATION_MAX).await?;
    keep(&shared, &cache, &format!("realisations/{id}"), text).await
}

/// PUT below `build-trace-v2/`.
pub async fn put_by_path(
    State(shared): State<Shared>,
    Target(cache): Target,
    Path(ByPath { drv, output }): Path<ByPath>,
    headers: HeaderMap,
    body: Body,
) -> Result<StatusCode, HttpError> {
    let (text, _buffer) =
        body::whole(&shared, "/build-trace-v2/{drv}/{output}", &headers, body, REALISATION_MAX).await?;
    keep(&shared, &cache, &format!("build-trace-v2/{drv}/{output}"), text).await
}

fn key(url: &str) -> Result<RealisationKey, HttpError> {
    url.parse().map_err(|_| HttpError::not_found(format!("{url} does not name a realisation")))
}

async fn fetch(shared: &Shared, cache: &Cache, url: &str) -> Result<Response, HttpError> {
    let key = DocumentKey::Realisation(key(url)?);
    let buffer = shared.answers.take(REALISATION_MAX).await?;
    let document = shared.lake.get_document(cache, &key).await?;
    let absent = || {
        let mark = (HeaderName::from_static(ABSENT_HEADER), HeaderValue::from_static("realisation"));
        HttpError::not_found(format!("there is no {url}")).with(mark.0, mark.1)
    };
    let document = document.ok_or_else(absent)?;
    let (length, body) = body::held(shared, buffer.join(document));
    Ok(([(header::CONTENT_TYPE, "application/json")], length, body).into_response())
}

async fn keep(shared: &Shared, cache: &Cache, url: &str, text: bytes::Bytes) -> Result<StatusCode, HttpError> {
    let key = key(url)?;
    let signed = Realisation::sign(&key, &text, shared.signers.keys())?;
    shared.lake.put_document(cache, &DocumentKey::Realisation(key), signed.into()).await?;
    Ok(StatusCode::CREATED)
}
