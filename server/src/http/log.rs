//! `log/<derivation>`: build logs, kept as they came, without content coding.

use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use narlake_format::nix::store_path::StorePath;
use narlake_storage::DocumentKey;
use serde::Deserialize;

use super::error::HttpError;
use super::target::Target;
use super::{Shared, body, place};
use crate::config::BUFFERS_BYTES_MIN;

const ROUTE: &str = "/log/{drv}";

/// Largest build log, in bytes.
const LOG_BYTES_MAX: usize = 48 << 20;

/// Logs that are read from the bucket at once.
pub const READS_MAX: usize = 2;

const _: () = assert!((LOG_BYTES_MAX + body::DECODER_BYTES_MAX) as u64 <= BUFFERS_BYTES_MIN);

/// The part of the URL that names the derivation.
#[derive(Deserialize)]
pub struct LogPath {
    drv: String,
}

fn key(drv: &str) -> Result<DocumentKey, HttpError> {
    let path: StorePath =
        drv.parse().map_err(|_| HttpError::not_found(format!("{drv:?} is not the base name of a derivation")))?;
    if path.name.as_str().ends_with(".drv") {
        Ok(DocumentKey::Log(path))
    } else {
        Err(HttpError::not_found(format!("{drv} is not a derivation")))
    }
}

/// The log of a derivation's build.
pub async fn get(
    State(shared): State<Shared>,
    Target(cache): Target,
    Path(LogPath { drv }): Path<LogPath>,
) -> Result<Response, HttpError> {
    let key = key(&drv)?;
    let turn = place(shared.limits.wait(), shared.logs.acquire(), "logs are being read").await?;
    let log = shared.lake.get_document(&cache, &key).await?;
    let log = log.ok_or_else(|| HttpError::not_found(format!("there is no log of {drv}")))?;
    // It is in memory already: the turn is kept until it is counted.
    let log = shared.answers.take(log.len()).await?.join(log);
    drop(turn);
    let (length, body) = body::held(&shared, log);
    Ok(([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], length, body).into_response())
}

/// Keeps the log of a derivation's build.
pub async fn put(
    State(shared): State<Shared>,
    Target(cache): Target,
    Path(LogPath { drv }): Path<LogPath>,
    headers: HeaderMap,
    body: Body,
) -> Result<StatusCode, HttpError> {
    let key = key(&drv)?;
    let (log, _buffer) = body::whole(&shared, ROUTE, &headers, body, LOG_BYTES_MAX).await?;
    shared.lake.put_document(&cache, &key, log).await?;
    Ok(StatusCode::CREATED)
}
