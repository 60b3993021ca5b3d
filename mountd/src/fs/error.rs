//! What can go wrong in an operation, and the one place where that becomes an errno.
//!
//! `ENOENT` is said on an authoritative answer only (docs/semantics.md): whatever stands between us and the truth,
//! an outage, damage, a full disk, is `EIO`.

use rustix::io::Errno;

use crate::fs::nodes::NodeTableError;
use crate::remote::Cause;
use crate::view::ViewError;

/// Why an operation failed.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// There is no entry of that name.
    #[error("no such entry")]
    NotFound,
    /// The node is not a directory.
    #[error("not a directory")]
    NotDirectory,
    /// A directory, where a file is needed.
    #[error("is a directory")]
    IsDirectory,
    /// The node is neither what is needed nor a directory.
    #[error("not {0}")]
    WrongKind(&'static str),
    /// No row of the node table covers this nodeid: the kernel remembers another daemon's mount.
    #[error("nodeid {node:#x} belongs to no store object")]
    Stale {
        /// The nodeid.
        node: u64,
    },
    /// The operation's time was up.
    #[error("no answer within {limit_ms} ms")]
    Deadline {
        /// The limit, in milliseconds.
        limit_ms: u64,
    },
    /// Whether the path exists could not be found out.
    #[error("look up")]
    View(#[source] ViewError),
    /// The object's tree or a file's content could not be had.
    #[error("fetch")]
    Content(#[source] narlake_storage::Error),
    /// The manifest breaks a rule of its format.
    #[error("read the manifest")]
    Manifest(#[source] narlake_format::error::FormatError),
    /// A string table or patch does not go with its manifest.
    #[error("restore store paths")]
    Restore(#[source] narlake_format::error::FormatError),
    /// There is no memory for a tree.
    #[error("make room for a tree")]
    Memory(#[source] std::io::Error),
    /// The nodeid could not be recorded, so it cannot be given out.
    #[error("record the nodeid")]
    Nodes(#[source] NodeTableError),
}

impl FsError {
    /// What the kernel is told.
    #[must_use]
    pub const fn errno(&self) -> Errno {
        match self {
            Self::NotFound => Errno::NOENT,
            Self::NotDirectory => Errno::NOTDIR,
            Self::IsDirectory => Errno::ISDIR,
            Self::WrongKind(_) => Errno::INVAL,
            Self::Stale { .. } => Errno::STALE,
            Self::Deadline { .. }
            | Self::View(_)
            | Self::Content(_)
            | Self::Manifest(_)
            | Self::Restore(_)
            | Self::Memory(_)
            | Self::Nodes(_) => Errno::IO,
        }
    }

    /// Whether it is the time that was up.
    #[must_use]
    pub const fn is_deadline(&self) -> bool {
        match self {
            Self::Deadline { .. }
            | Self::View(ViewError::Deadline { .. })
            | Self::Content(narlake_storage::Error::Deadline { .. }) => true,
            Self::View(ViewError::Remote(error)) => matches!(error.cause, Cause::Deadline { .. }),
            _ => false,
        }
    }

    /// Whether a human should hear of it: what a program asked for wrongly is its own affair.
    #[must_use]
    pub const fn is_failure(&self) -> bool {
        match self {
            Self::NotFound | Self::NotDirectory | Self::IsDirectory | Self::WrongKind(_) => false,
            Self::Stale { .. }
            | Self::Deadline { .. }
            | Self::View(_)
            | Self::Content(_)
            | Self::Manifest(_)
            | Self::Restore(_)
            | Self::Memory(_)
            | Self::Nodes(_) => true,
        }
    }
}
