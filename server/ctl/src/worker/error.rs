//! What can keep a machine from joining or leaving, and what to do about it.

use std::io;
use std::path::{Path, PathBuf};

use super::busy::Holder;
use crate::control::ControlError;

/// Why a step was not taken.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The system said no.
    #[error("{operation} {}", .path.display())]
    System {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// What it said.
        #[source]
        source: io::Error,
    },
    /// This machine is not one that can be joined as it is.
    #[error("{reason}")]
    Refused {
        /// Why.
        reason: String,
        /// What to do.
        advice: String,
    },
    /// The record of what was done cannot be read.
    #[error("read the record {}", .path.display())]
    Record {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// Another program failed.
    #[error("{program} {ended}: {said}")]
    Program {
        /// Its command line.
        program: String,
        /// How.
        ended: String,
        /// The end of what it printed.
        said: String,
    },
    /// Something did not come about in time.
    #[error("{what}: not within {seconds} s")]
    Late {
        /// What was awaited.
        what: String,
        /// How long.
        seconds: u64,
    },
    /// Somebody uses the store.
    #[error("{} is in use by {}", .store.display(), list(.holders))]
    Busy {
        /// The store.
        store: PathBuf,
        /// By whom.
        holders: Vec<Holder>,
    },
    /// mountd did not do it.
    #[error(transparent)]
    Control(#[from] ControlError),
}

/// Processes that a message names; the rest is counted.
const NAMED: usize = 20;

fn list(holders: &[Holder]) -> String {
    if holders.is_empty() {
        return "somebody who cannot be seen from here".to_owned();
    }
    let mut named: Vec<String> = holders.iter().take(NAMED).map(ToString::to_string).collect();
    if let Some(more) = holders.len().checked_sub(NAMED).filter(|more| *more > 0) {
        named.push(format!("{more} more"));
    }
    named.join(", ")
}

impl WorkerError {
    /// For `map_err`: the system said no to this.
    pub(super) fn system<E: Into<io::Error>>(operation: &'static str, path: &Path) -> impl FnOnce(E) -> Self {
        move |error| Self::System { operation, path: path.to_owned(), source: error.into() }
    }

    pub(super) fn refused(reason: impl Into<String>, advice: impl Into<String>) -> Self {
        Self::Refused { reason: reason.into(), advice: advice.into() }
    }

    /// What the user can do about it.
    #[must_use]
    pub fn advice(&self) -> Option<String> {
        match self {
            Self::Refused { advice, .. } => Some(advice.clone()),
            Self::Busy { .. } => Some("end these processes first, or detach the store with --lazy".to_owned()),
            Self::Late { .. } | Self::Program { .. } => {
                Some("`narlake worker status` shows what is up; `narlake worker down` undoes it".to_owned())
            }
            Self::Control(error) => error.advice(),
            Self::System { .. } | Self::Record { .. } => None,
        }
    }
}
