//! The metrics, for Prometheus to scrape.

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse as _, Response};

use super::Shared;
use crate::metrics::TEXT_FORMAT;

/// All metrics of server, engine and process.
pub async fn get(State(shared): State<Shared>) -> Response {
    ([(header::CONTENT_TYPE, TEXT_FORMAT)], shared.metrics.render()).into_response()
}
