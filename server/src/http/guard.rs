//! The layer that lets only those push who may.

use axum::extract::{Request, State};
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};

use super::Shared;
use super::error::HttpError;
use crate::auth::Access;
use crate::metrics::Refusal;

/// Refuses a request that would write and shows no valid token, before anything of its body is read.
pub async fn guard(State(shared): State<Shared>, request: Request, next: Next) -> Response {
    if !writes(request.method()) {
        return next.run(request).await;
    }
    let authorization = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let (refusal, message) = match shared.tokens.may_push(authorization) {
        Access::Granted => return next.run(request).await,
        Access::Missing => {
            (Refusal::NoToken, "pushing needs a token, as bearer token or as password in the netrc file")
        }
        Access::Wrong => (Refusal::WrongToken, "the token is not one of this server's"),
    };
    shared.metrics.refused(refusal);
    HttpError::refused(StatusCode::UNAUTHORIZED, message)
        .with(header::WWW_AUTHENTICATE, HeaderValue::from_static("Basic realm=\"narlake\""))
        .into_response()
}

/// Whether requests with this method may change something. POST is how the lake API asks questions that are too long
/// for a URL.
fn writes(method: &Method) -> bool {
    !matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS | Method::POST)
}
