//! Why something is not mounted, or not unmounted: the view itself, and the overlays over it.

use std::io;
use std::path::{Path, PathBuf};

/// Why a mount could not be had, used, or left.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// What was asked for cannot work, or would hurt.
    #[error("{path}: {reason}", path = path.display())]
    Refused {
        /// The directory at fault.
        path: PathBuf,
        /// Why, and what to do.
        reason: String,
    },
    /// There is no overlay in care here.
    #[error("{path} is not an overlay over this mount", path = path.display())]
    Unknown {
        /// Where it should be.
        path: PathBuf,
    },
    /// The mount is in use.
    #[error("{path} is in use; stop what runs there, or detach it with --lazy", path = path.display())]
    Busy {
        /// Where it is.
        path: PathBuf,
    },
    /// The time was up. What had begun goes on behind the caller's back.
    #[error("{operation} {path}: not done within {limit_ms} ms", path = path.display())]
    Late {
        /// The operation, as a verb.
        operation: &'static str,
        /// Where.
        path: PathBuf,
        /// How long was waited, in milliseconds.
        limit_ms: u64,
    },
    /// The kernel refused.
    #[error("{operation} {path}", path = path.display())]
    Kernel {
        /// The operation, as a verb.
        operation: &'static str,
        /// The directory or device.
        path: PathBuf,
        /// What it said.
        #[source]
        source: io::Error,
    },
}

impl MountError {
    pub(crate) fn kernel(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::Kernel { operation, path, source }
    }

    pub(crate) fn refused(path: &Path, reason: impl Into<String>) -> Self {
        Self::Refused { path: path.to_owned(), reason: reason.into() }
    }
}
