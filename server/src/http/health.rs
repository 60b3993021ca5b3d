//! Whether this server answers, for load balancers and for people with curl.

use axum::http::header;
use axum::response::{IntoResponse as _, Response};

/// Says so by answering. A server that is draining no longer accepts connections.
pub async fn get() -> Response {
    ([(header::CACHE_CONTROL, "no-store")], "ok\n").into_response()
}
