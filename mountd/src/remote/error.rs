//! Why a server did not give what it was asked for, and what a caller does about it.

use std::error::Error as _;
use std::io;
use std::path::PathBuf;

use narlake_format::error::FormatError;
use narlake_format::lake::record::RecordError;
use narlake_storage::ErrorKind;

/// Why the server did not give what it was asked for.
#[derive(Debug, thiserror::Error)]
#[error("{operation} {key}")]
pub struct RemoteError {
    /// What was asked, as a verb.
    pub operation: &'static str,
    /// For what.
    pub key: String,
    /// What went wrong.
    #[source]
    pub cause: Cause,
}

/// What went wrong with a request.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    /// No answer, or none that is HTTP.
    #[error("talk to the server")]
    Transport(#[source] reqwest::Error),
    /// The other side cannot prove to be the server, or does not speak TLS.
    #[error("no TLS with the server; is its certificate by an authority that this host knows?")]
    Tls(#[source] reqwest::Error),
    /// The answer broke off.
    #[error("the answer broke off after {received} bytes")]
    Cut {
        /// Bytes received.
        received: usize,
        /// What went wrong.
        #[source]
        source: reqwest::Error,
    },
    /// The answer comes too slowly, or not at all.
    #[error("the answer brought {received} bytes and then too little for {waited_ms} ms")]
    Slow {
        /// Bytes received.
        received: usize,
        /// How long little or nothing came, in milliseconds.
        waited_ms: u64,
    },
    /// The server does not take the token.
    #[error("server answers 401 to the token of {file}: {text}", file = file.display())]
    Token {
        /// Where the token is from, and a new one is looked for with the next request.
        file: PathBuf,
        /// The start of its text.
        text: String,
    },
    /// The server says no.
    #[error("server answers {status}: {text}")]
    Status {
        /// The HTTP status.
        status: u16,
        /// The start of its text.
        text: String,
    },
    /// The time was up; the last attempt ended like this.
    #[error("no answer within {limit_ms} ms")]
    Deadline {
        /// The limit, in milliseconds.
        limit_ms: u64,
        /// How the last attempt ended.
        #[source]
        last: Option<Box<Cause>>,
    },
    /// The answer is larger than any answer to this should be.
    #[error("answer is longer than {max} bytes")]
    TooLarge {
        /// The limit, in bytes.
        max: usize,
    },
    /// The answer is not the JSON it should be.
    #[error("parse the answer")]
    Json(#[source] serde_json::Error),
    /// The answer is JSON, with values that it should not have.
    #[error("parse the answer")]
    Format(#[source] FormatError),
    /// The server itself says that it has no such path.
    #[error("not in the cache")]
    Absent,
    /// The server itself says that what it has stored is missing or damaged; the start of its text.
    #[error("the server cannot read what it has stored: {0}")]
    Damaged(String),
    /// The record is not one.
    #[error("parse the path record")]
    Record(#[source] RecordError),
    /// The answer is not complete, or not to this question.
    #[error("{0}")]
    Incomplete(&'static str),
}

impl RemoteError {
    /// What a caller does about it.
    #[must_use]
    pub const fn kind(&self) -> ErrorKind {
        self.cause.kind()
    }
}

impl Cause {
    /// A request that did not come to an answer.
    pub(super) fn transport(error: reqwest::Error) -> Self {
        let mut cause: Option<&(dyn std::error::Error + 'static)> = error.source();
        while let Some(inner) = cause {
            let io = inner.downcast_ref::<io::Error>();
            // What the TLS library refuses comes as invalid data of the connection.
            if io.is_some_and(|io| io.kind() == io::ErrorKind::InvalidData) {
                return Self::Tls(error);
            }
            // An I/O error that wraps another does not call it its source.
            cause = match io.and_then(io::Error::get_ref) {
                Some(wrapped) => Some(wrapped),
                None => inner.source(),
            };
        }
        Self::Transport(error)
    }

    /// Whether the same request may be answered a moment later.
    pub(super) const fn passes(&self) -> bool {
        // A certificate stays wrong until somebody puts it right; each new request finds out.
        !matches!(self, Self::Tls(_)) && matches!(self.kind(), ErrorKind::Unavailable)
    }

    /// Whether the answer is not what the server can have meant.
    pub(super) const fn is_garbled(&self) -> bool {
        matches!(self, Self::Json(_) | Self::Format(_) | Self::Record(_))
    }

    pub(super) const fn kind(&self) -> ErrorKind {
        match self {
            Self::Transport(_) | Self::Tls(_) | Self::Cut { .. } | Self::Slow { .. } | Self::Deadline { .. } => {
                ErrorKind::Unavailable
            }
            Self::Token { .. } => ErrorKind::Denied,
            Self::Status { status, .. } => match *status {
                401 | 403 | 407 => ErrorKind::Denied,
                404 | 410 => ErrorKind::NotFound,
                408 | 425 | 429 | 500.. => ErrorKind::Unavailable,
                _ => ErrorKind::Invalid,
            },
            Self::Absent => ErrorKind::NotFound,
            Self::TooLarge { .. } => ErrorKind::TooLarge,
            Self::Damaged(_) | Self::Json(_) | Self::Format(_) | Self::Record(_) => ErrorKind::Corrupt,
            // Most often a connection that broke.
            Self::Incomplete(_) => ErrorKind::Unavailable,
        }
    }
}

impl From<RemoteError> for narlake_storage::Error {
    fn from(error: RemoteError) -> Self {
        let RemoteError { operation, key, cause } = error;
        let kind = cause.kind();
        Self::Bucket { operation, key, kind, source: cause.into() }
    }
}
