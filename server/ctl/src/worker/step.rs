//! What the steps of joining have in common.

use std::fmt;

use async_trait::async_trait;
use serde::Serialize;

use super::error::WorkerError;
use super::record::Record;

/// How a step stands.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(tag = "state", content = "reason", rename_all = "kebab-case")]
pub(super) enum State {
    /// As `up` makes it.
    Up,
    /// As `down` leaves it.
    Down,
    /// Neither.
    Broken(String),
}

impl State {
    /// Whether it is as `up` makes it.
    #[must_use]
    pub(super) fn is_up(&self) -> bool {
        *self == Self::Up
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Up => f.write_str("up"),
            Self::Down => f.write_str("down"),
            Self::Broken(reason) => write!(f, "broken: {reason}"),
        }
    }
}

/// One thing that is done to a machine that joins, and undone when it leaves.
///
/// Each is asked first how it stands, so that doing and undoing twice is doing and undoing once.
#[async_trait]
pub(super) trait Step: Send + Sync {
    /// What it is about, for people and programs.
    fn name(&self) -> &'static str;

    /// How it stands. Changes nothing.
    async fn check(&self) -> State;

    /// Does it, from whatever state. Returns what there is to say.
    ///
    /// # Errors
    /// When it cannot be done; what was done of it can be undone.
    async fn apply(&self, record: &mut Record) -> Result<Vec<String>, WorkerError>;

    /// Undoes it, from whatever state. Returns what there is to say.
    ///
    /// # Errors
    /// When it cannot be undone; it can be tried again.
    async fn undo(&self, record: &mut Record, lazy: bool) -> Result<Vec<String>, WorkerError>;
}
