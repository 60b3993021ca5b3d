//! What a failure means to the client: the only place that maps errors to statuses.
//!
//! A 4xx says what is wrong with the request, with path and offset. A 5xx says no more than that, and a request id to
//! ask the operator about: what the server's disks and buckets are called is nobody else's business. The cause goes to
//! the log, once, by [`observe`](super::observe), which also writes the body: text for Nix, JSON for the lake API.

use std::any::Any;
use std::error::Error as StdError;
use std::sync::Arc;

use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use narlake_format::api::DAMAGED_HEADER;
use narlake_format::error::{FormatError, chain};
use narlake_format::nix::narinfo::NarInfoError;
use narlake_storage::{Error, ErrorKind};

use super::body::BodyError;
use crate::coding::CodingError;

/// A failed request.
#[derive(Debug)]
pub struct HttpError {
    status: StatusCode,
    problem: Problem,
    headers: Vec<(HeaderName, HeaderValue)>,
}

/// What a failure is, for the body and for the log. It travels as an extension of the response.
#[derive(Debug, Clone)]
pub struct Problem {
    /// What the client is told.
    pub message: String,
    /// What went wrong inside, for the log alone.
    pub cause: Option<Arc<dyn StdError + Send + Sync>>,
}

impl HttpError {
    /// The client's request is wrong.
    pub fn refused(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, problem: Problem { message: message.into(), cause: None }, headers: Vec::new() }
    }

    /// The client's request is wrong in itself.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::refused(StatusCode::BAD_REQUEST, message)
    }

    /// There is no such thing. Never to be remembered: it may come at any moment.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::refused(StatusCode::NOT_FOUND, message).with(header::CACHE_CONTROL, HeaderValue::from_static("no-store"))
    }

    /// There is no room for this request now. On its way to a PUT's client this becomes 500
    /// ([`observe`](super::observe)).
    pub fn busy(what: &str) -> Self {
        Self::refused(StatusCode::SERVICE_UNAVAILABLE, format!("the server is busy: {what}; try again"))
            .with(header::RETRY_AFTER, HeaderValue::from_static("1"))
    }

    /// A task that worked for the request panicked.
    #[expect(clippy::needless_pass_by_value, reason = "for map_err")]
    pub fn lost(error: tokio::task::JoinError) -> Self {
        Self::internal(StatusCode::INTERNAL_SERVER_ERROR, Panicked(error.to_string()))
    }

    /// An answer that cannot be written down.
    pub fn unwritable(error: serde_json::Error) -> Self {
        Self::internal(StatusCode::INTERNAL_SERVER_ERROR, error)
    }

    /// Adds a header to the response.
    #[must_use]
    pub fn with(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.push((name, value));
        self
    }

    fn internal(status: StatusCode, cause: impl StdError + Send + Sync + 'static) -> Self {
        let message = status.canonical_reason().unwrap_or("internal error").to_ascii_lowercase();
        Self { status, problem: Problem { message, cause: Some(Arc::new(cause)) }, headers: Vec::new() }
    }
}

impl From<Error> for HttpError {
    fn from(error: Error) -> Self {
        // A body that we ended ourselves says so inside.
        if let Error::Body(source) = &error
            && let Some(refusal) =
                BodyError::within(source).map(refusal).or_else(|| CodingError::within(source).map(coding))
        {
            return refusal;
        }
        let status = status(error.kind());
        if status == StatusCode::NOT_FOUND {
            return Self::not_found(error.to_string());
        }
        if status.is_client_error() && is_about_the_request(&error) {
            return Self::refused(status, chain(&error));
        }
        let status = if status.is_client_error() { StatusCode::INTERNAL_SERVER_ERROR } else { status };
        let damaged = error.kind() == ErrorKind::Corrupt;
        let failed = Self::internal(status, error);
        if damaged {
            return failed.with(HeaderName::from_static(DAMAGED_HEADER), HeaderValue::from_static("content"));
        }
        failed
    }
}

/// Whether an error says what is wrong with what the client sent, and nothing about this server.
const fn is_about_the_request(error: &Error) -> bool {
    matches!(
        error,
        Error::Nar(_) | Error::Unstorable(_) | Error::Rejected { .. } | Error::TooLarge { .. } | Error::Body(_)
    )
}

/// The status of each kind of error.
const fn status(kind: ErrorKind) -> StatusCode {
    match kind {
        ErrorKind::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        ErrorKind::NotFound => StatusCode::NOT_FOUND,
        ErrorKind::Conflict => StatusCode::CONFLICT,
        ErrorKind::Invalid => StatusCode::BAD_REQUEST,
        ErrorKind::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
        ErrorKind::Full => StatusCode::INSUFFICIENT_STORAGE,
        // The client went away, or its body broke off: whoever still reads this sent less than announced.
        ErrorKind::Closed => StatusCode::BAD_REQUEST,
        // Denied is the bucket refusing this server. Not 403: to Nix that would say that the path does not exist.
        ErrorKind::Corrupt | ErrorKind::Denied => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

fn refusal(error: &BodyError) -> HttpError {
    let status = match error {
        BodyError::Idle { .. } | BodyError::Slow { .. } => StatusCode::REQUEST_TIMEOUT,
        BodyError::Hash { .. } | BodyError::Broken(_) => StatusCode::BAD_REQUEST,
    };
    HttpError::refused(status, error.to_string())
}

fn coding(error: &CodingError) -> HttpError {
    let status = match error {
        CodingError::Malformed { .. } => StatusCode::BAD_REQUEST,
        CodingError::TooLarge { .. } | CodingError::Expansion { .. } => StatusCode::PAYLOAD_TOO_LARGE,
    };
    HttpError::refused(status, chain(error))
}

/// What reading a body ended in, where the engine is not involved.
impl From<std::io::Error> for HttpError {
    fn from(error: std::io::Error) -> Self {
        Self::from(Error::Body(error))
    }
}

impl From<FormatError> for HttpError {
    fn from(error: FormatError) -> Self {
        Self::invalid(chain(&error))
    }
}

impl From<NarInfoError> for HttpError {
    fn from(error: NarInfoError) -> Self {
        Self::invalid(chain(&error))
    }
}

impl IntoResponse for HttpError {
    fn into_response(self) -> Response {
        let mut response = self.status.into_response();
        response.extensions_mut().insert(self.problem);
        response.headers_mut().extend(self.headers);
        response
    }
}

/// A handler that panicked.
#[derive(Debug, thiserror::Error)]
#[error("a handler panicked: {0}")]
pub struct Panicked(String);

/// The response to a request whose handler panicked.
#[expect(clippy::needless_pass_by_value, reason = "the layer's signature")]
pub fn panicked(payload: Box<dyn Any + Send>) -> Response {
    let text = payload
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_default();
    HttpError::internal(StatusCode::INTERNAL_SERVER_ERROR, Panicked(text)).into_response()
}
