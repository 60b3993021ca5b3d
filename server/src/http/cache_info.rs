//! nix-cache-info, and the page with the public keys.

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use narlake_format::limits::CACHE_INFO_MAX;
use narlake_format::nix::cache_info::CacheInfo;

use super::error::HttpError;
use super::target::Target;
use super::{Shared, body};

const ROUTE: &str = "/nix-cache-info";

/// What a client asks for first.
pub async fn get(State(shared): State<Shared>, Target(_): Target) -> Response {
    let info = CacheInfo {
        store_dir: shared.lake.info().store_dir.clone(),
        want_mass_query: true,
        priority: Some(shared.priority),
    };
    ([(header::CONTENT_TYPE, "text/x-nix-cache-info")], info.to_text()).into_response()
}

/// What a client does that got 404 for the above: it never does here, but some tools write it first. Accepted if it
/// says what we say anyway.
pub async fn put(
    State(shared): State<Shared>,
    Target(_): Target,
    headers: HeaderMap,
    body: Body,
) -> Result<StatusCode, HttpError> {
    let (text, _buffer) = body::whole(&shared, ROUTE, &headers, body, CACHE_INFO_MAX).await?;
    let given = CacheInfo::parse(&text)?.store_dir;
    let ours = &shared.lake.info().store_dir;
    if given == *ours {
        return Ok(StatusCode::OK);
    }
    let message = format!("StoreDir is {given}, this lake holds paths of {ours}");
    Err(HttpError::refused(StatusCode::CONFLICT, message))
}

/// What clients put into `trusted-public-keys`, one key a line.
pub async fn public_key(State(shared): State<Shared>) -> Response {
    let keys: String = shared.signers.public_keys().iter().map(|key| format!("{key}\n")).collect();
    ([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], keys).into_response()
}
