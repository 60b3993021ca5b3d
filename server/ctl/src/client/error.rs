//! What can go wrong between us and the server, and what to do about it.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use narlake_format::nix::narinfo::NarInfoError;
use reqwest::{StatusCode, Url};

use super::shown;
use crate::output::printable;

/// Why the server did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No request could be made.
    #[error("prepare the request")]
    Build {
        /// Why.
        #[source]
        source: reqwest::Error,
    },
    /// The file of the token cannot be read.
    #[error("read the token file {}", .file.display())]
    TokenFile {
        /// The file.
        file: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// There is no token where one should be.
    #[error("{origin} holds no token")]
    Token {
        /// The file, or the variable.
        origin: String,
    },
    /// The server named a URL that is none.
    #[error("{url:?} is not a URL")]
    Url {
        /// The text.
        url: String,
    },
    /// No connection could be made.
    #[error("connect to {url}")]
    Connect {
        /// What was asked for.
        url: String,
        /// Why.
        #[source]
        source: reqwest::Error,
    },
    /// The connection broke.
    #[error("talk to {url}")]
    Broken {
        /// What was asked for.
        url: String,
        /// Why.
        #[source]
        source: reqwest::Error,
    },
    /// The server said nothing for too long.
    #[error("{url} gave no answer for {seconds} s")]
    Deadline {
        /// What was asked for.
        url: String,
        /// How long.
        seconds: u64,
    },
    /// The server said no.
    #[error("{url}: {message} (status {status})")]
    Refused {
        /// What was asked for.
        url: String,
        /// The status.
        status: u16,
        /// What it said.
        message: String,
    },
    /// Whoever answers there, it is no narlake-server.
    #[error("there is no narlake-server at {url}")]
    NotNarlake {
        /// Where.
        url: String,
    },
    /// The answer is not the JSON that it should be.
    #[error("read the answer of {url}")]
    Json {
        /// What was asked for.
        url: String,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
    /// The answer is no narinfo.
    #[error("read {url}")]
    NarInfo {
        /// What was asked for.
        url: String,
        /// What is wrong.
        #[source]
        source: NarInfoError,
    },
    /// The answer is longer than any good one.
    #[error("the answer of {url} has more than {max} bytes")]
    TooLong {
        /// What was asked for.
        url: String,
        /// The limit.
        max: u64,
    },
    /// The answer ended early.
    #[error("the answer of {url} ends too early")]
    Short {
        /// What was asked for.
        url: String,
    },
}

impl ClientError {
    pub(super) fn from_http(url: &Url, source: reqwest::Error) -> Self {
        // The URL is told once, and without its password.
        let (url, connect, source) = (shown(url), source.is_connect(), source.without_url());
        if connect { Self::Connect { url, source } } else { Self::Broken { url, source } }
    }

    pub(super) fn deadline(url: &Url, limit: Duration) -> Self {
        Self::Deadline { url: shown(url), seconds: limit.as_secs() }
    }

    /// Whether the same request may well succeed a little later.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Connect { .. } | Self::Broken { .. } | Self::Short { .. } => true,
            // 500 is how a server says 503 to a PUT that older Nix may have sent.
            Self::Refused { status, .. } => matches!(status, 408 | 429 | 500 | 502 | 503 | 504),
            // A server that says nothing has had its time; to wait for it five times over is not what was asked for.
            Self::Deadline { .. }
            | Self::Build { .. }
            | Self::TokenFile { .. }
            | Self::Token { .. }
            | Self::Url { .. }
            | Self::NotNarlake { .. }
            | Self::Json { .. }
            | Self::NarInfo { .. }
            | Self::TooLong { .. } => false,
        }
    }

    /// What the user can do about it.
    #[must_use]
    pub fn advice(&self) -> Option<String> {
        let advice = match self {
            Self::Connect { .. } => "is narlake-server running there? give its URL with --server or NARLAKE_SERVER",
            Self::NotNarlake { .. } => {
                "give the URL of a narlake-server, and not of one of its caches, with --server or NARLAKE_SERVER"
            }
            Self::Deadline { .. } => "the server may be overloaded; --timeout gives it more time",
            Self::Token { .. } | Self::TokenFile { .. } => "a token file holds the token on a line of its own",
            Self::Refused { status: 401 | 403, .. } => {
                "give a token that the server knows, in a file with --token-file or in the variable NARLAKE_TOKEN"
            }
            Self::Refused { status: 413, .. } => {
                "the limits of the server are in its configuration (docs/configuration.md)"
            }
            Self::Refused { status: 507, .. } => "the server's disk is full",
            Self::Refused { status: 500..=599, .. } => "the server's log has the cause, under that request's id",
            _ => return None,
        };
        Some(advice.to_owned())
    }
}

/// What an error's body says: JSON of the lake API, or text, one line of it.
pub(super) fn message(status: StatusCode, text: &[u8]) -> String {
    #[derive(serde::Deserialize)]
    struct Document {
        error: String,
        detail: Option<String>,
    }
    let told = match serde_json::from_slice::<Document>(text) {
        Ok(Document { error, detail: Some(detail) }) => format!("{error} ({detail})"),
        Ok(Document { error, detail: None }) => error,
        Err(_) => String::from_utf8_lossy(text).trim().to_owned(),
    };
    let told = if told.is_empty() || told.starts_with('<') {
        // Nothing, or somebody's page of HTML.
        status.canonical_reason().unwrap_or("refused").to_ascii_lowercase()
    } else {
        told
    };
    printable(told.as_bytes())
}
