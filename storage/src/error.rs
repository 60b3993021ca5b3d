//! What can go wrong in the engine, and what a caller is to do about it.
//!
//! Every error answers `kind()`: the front doors (HTTP status, errno) decide by it alone, exhaustively. Messages carry
//! the key, path and offset; causes stay typed behind `source()`.

use narlake_format::error::FormatError;
use narlake_format::id::{BlobId, BlobKind};
use narlake_format::lake::location::PackRef;
use narlake_format::nar::NarError;

/// What a caller does about an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// Try again later: the bucket or the local state does not answer.
    Unavailable,
    /// What was asked for is not there.
    NotFound,
    /// Something else holds the name.
    Conflict,
    /// Stored bytes are missing or not what names them.
    Corrupt,
    /// The bucket refuses this server's credentials.
    Denied,
    /// What the caller sent is wrong; the same again fails again.
    Invalid,
    /// What the caller sent goes beyond a limit.
    TooLarge,
    /// No space is left.
    Full,
    /// The other side went away.
    Closed,
}

/// An error of the engine.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The bucket did not do what it was asked.
    #[error("{operation} {key}")]
    Bucket {
        /// The operation, as a verb.
        operation: &'static str,
        /// The key or prefix.
        key: String,
        /// What the caller is to do.
        kind: ErrorKind,
        /// What the backend said.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Something took longer than its limit.
    #[error("{operation} {key}: no answer within {limit_ms} ms")]
    Deadline {
        /// The operation, as a verb.
        operation: &'static str,
        /// The key or path.
        key: String,
        /// The limit, in milliseconds.
        limit_ms: u64,
    },
    /// A stored object is not what its format says.
    #[error("decode {key}")]
    Format {
        /// The object's key.
        key: String,
        /// Where and what.
        #[source]
        source: FormatError,
    },
    /// Neither index nor bucket knows this content.
    #[error("{kind:?} {id} is nowhere in the lake")]
    MissingBlob {
        /// What it is.
        kind: BlobKind,
        /// Its id.
        id: BlobId,
    },
    /// A pack holds other bytes than the index says.
    #[error("{kind:?} {id} does not verify in {pack}, frame at {offset}")]
    DamagedBlob {
        /// What it is.
        kind: BlobKind,
        /// The id it should have.
        id: BlobId,
        /// Where it was read from.
        pack: PackRef,
        /// Offset of the frame in the pack.
        offset: u32,
    },
    /// The NAR sent is malformed.
    #[error("malformed NAR")]
    Nar(#[from] NarError),
    /// What was pushed does not hold together.
    #[error("{path}: {reason}")]
    Rejected {
        /// The store path.
        path: String,
        /// Why.
        reason: Rejection,
    },
    /// The NAR is well-formed, but beyond what a manifest holds.
    #[error("the NAR cannot be stored")]
    Unstorable(#[source] FormatError),
    /// What was sent is beyond a limit.
    #[error("{what} exceeds {limit} {unit}")]
    TooLarge {
        /// What it is.
        what: &'static str,
        /// The limit.
        limit: u64,
        /// What the limit counts.
        unit: &'static str,
    },
    /// The stream that was being read broke off.
    #[error("read the stream sent")]
    Body(#[source] std::io::Error),
    /// The local state directory does not serve.
    #[error("{operation} {path}")]
    State {
        /// The operation, as a verb.
        operation: &'static str,
        /// The file or directory.
        path: String,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// This engine cannot serve this bucket.
    #[error("the bucket cannot be used: {0}")]
    Unusable(String),
    /// Work was handed to a part that has stopped.
    #[error("{0} has stopped")]
    Stopped(&'static str),
}

/// Why a push was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    /// The narinfo came before its NAR, or long after.
    #[error("its NAR {0} has not been uploaded to this cache, or has expired; upload it first")]
    NoUpload(String),
    /// The narinfo's NarHash is not the upload's.
    #[error("NarHash is {claimed}, the uploaded NAR has {found}")]
    NarHash {
        /// What the narinfo says.
        claimed: String,
        /// What was uploaded.
        found: String,
    },
    /// The narinfo's NarSize is not the upload's.
    #[error("NarSize is {claimed}, the uploaded NAR has {found}")]
    NarSize {
        /// What the narinfo says, in bytes.
        claimed: u64,
        /// What was uploaded, in bytes.
        found: u64,
    },
    /// A reference is not in the cache.
    #[error("reference {0} is not in this cache; push it first")]
    MissingReference(String),
    /// The CA field does not belong to this path or content.
    #[error("CA {0} does not stand for this path and content")]
    ContentAddress(String),
    /// The CA field uses a method that cannot be checked.
    #[error("CA {0} uses a method or hash that is not supported")]
    UnsupportedContentAddress(String),
    /// The path is there with other content, and the cache refuses rather than ignores that.
    #[error("it is in this cache with NarHash {there}, the push has {pushed}")]
    NotReproducible {
        /// What is served.
        there: String,
        /// What was pushed.
        pushed: String,
    },
    /// It has more signatures than a path may.
    #[error("it has {0} signatures, the limit is {1}")]
    Signatures(usize, usize),
    /// Its record could not be read back.
    #[error("no record can be made of it: {0}")]
    Record(String),
    /// Content that the upload relied on went away.
    #[error("content of its NAR is gone; upload it again")]
    Condemned,
    /// The URL names something that is not a NAR of this cache.
    #[error("URL {0} does not name an uploaded NAR (nar/<hash>.nar[.<compression>])")]
    Url(String),
}

impl Error {
    /// What a caller does about it.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Bucket { kind, .. } => *kind,
            Self::Deadline { .. } | Self::Stopped(_) => ErrorKind::Unavailable,
            Self::Format { .. } | Self::MissingBlob { .. } | Self::DamagedBlob { .. } => ErrorKind::Corrupt,
            Self::Nar(_) | Self::Unstorable(_) | Self::Unusable(_) => ErrorKind::Invalid,
            Self::Rejected { reason, .. } => match reason {
                Rejection::Condemned | Rejection::NotReproducible { .. } => ErrorKind::Conflict,
                Rejection::NoUpload(_)
                | Rejection::NarHash { .. }
                | Rejection::NarSize { .. }
                | Rejection::MissingReference(_)
                | Rejection::ContentAddress(_)
                | Rejection::UnsupportedContentAddress(_)
                | Rejection::Signatures(..)
                | Rejection::Record(_)
                | Rejection::Url(_) => ErrorKind::Invalid,
            },
            Self::TooLarge { .. } => ErrorKind::TooLarge,
            Self::Body(_) => ErrorKind::Closed,
            Self::State { source, .. } => io_kind(source),
        }
    }

    /// The error and all its causes, on one line.
    #[must_use]
    pub fn chain(&self) -> String {
        narlake_format::error::chain(self)
    }

    pub(crate) fn state(operation: &'static str, path: &std::path::Path, source: std::io::Error) -> Self {
        Self::State { operation, path: path.display().to_string(), source }
    }

    pub(crate) fn format(key: impl Into<String>) -> impl FnOnce(FormatError) -> Self {
        let key = key.into();
        move |source| Self::Format { key, source }
    }
}

/// The kind of an I/O error of this host.
pub(crate) fn io_kind(error: &std::io::Error) -> ErrorKind {
    match error.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => ErrorKind::Full,
        std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::ReadOnlyFilesystem => ErrorKind::Denied,
        _ => ErrorKind::Unavailable,
    }
}
