//! Which cache a request is for, and which resource of it where the URL's last part alone decides.

use axum::body::Body;
use axum::extract::{FromRequestParts, Path, RawPathParams, State};
use axum::http::HeaderMap;
use axum::http::request::Parts;
use axum::response::Response;
use narlake_format::nix::store_path::StorePathHash;
use narlake_storage::Cache;
use serde::Deserialize;

use super::error::HttpError;
use super::{Shared, listing, narinfo};

/// The cache that a URL names, or the default one where it names none.
pub struct Target(pub Cache);

impl FromRequestParts<Shared> for Target {
    type Rejection = HttpError;

    async fn from_request_parts(parts: &mut Parts, shared: &Shared) -> Result<Self, HttpError> {
        let params = RawPathParams::from_request_parts(parts, shared)
            .await
            .map_err(|error| HttpError::invalid(error.to_string()))?;
        let named = params.iter().find(|(key, _)| *key == "cache").map(|(_, name)| name);
        match named {
            Some(name) if name != shared.cache_name => Err(HttpError::not_found(format!("there is no cache {name:?}"))),
            _ => Ok(Self(shared.cache.clone())),
        }
    }
}

/// The last part of a URL.
#[derive(Debug, Deserialize)]
pub struct Object {
    /// That part.
    pub file: String,
}

/// What lies directly below a cache, but for nix-cache-info.
enum Kind {
    NarInfo(StorePathHash),
    Listing(StorePathHash),
}

fn kind(file: &str) -> Result<Kind, HttpError> {
    let parse =
        |text: &str| text.parse().map_err(|_| HttpError::not_found(format!("{file} does not begin with a hash part")));
    if let Some(hash) = file.strip_suffix(".narinfo") {
        return parse(hash).map(Kind::NarInfo);
    }
    if let Some(hash) = file.strip_suffix(".ls") {
        return parse(hash).map(Kind::Listing);
    }
    Err(HttpError::not_found(format!("{file} is no resource of a binary cache")))
}

/// GET of a narinfo or listing.
pub async fn get_object(
    State(shared): State<Shared>,
    Target(cache): Target,
    Path(Object { file }): Path<Object>,
) -> Result<Response, HttpError> {
    match kind(&file)? {
        Kind::NarInfo(hash) => narinfo::get(&shared, &cache, hash).await,
        Kind::Listing(hash) => listing::get(&shared, &cache, hash).await,
    }
}

/// PUT of a narinfo or listing.
pub async fn put_object(
    State(shared): State<Shared>,
    Target(cache): Target,
    Path(Object { file }): Path<Object>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, HttpError> {
    match kind(&file)? {
        Kind::NarInfo(hash) => narinfo::put(&shared, &cache, hash, &headers, body).await,
        Kind::Listing(_) => listing::put(&shared, &headers, body).await,
    }
}
