//! NEG: the names of store paths that the kernel was told do not exist.
//!
//! An overlay remembers such an answer until it is refreshed, so these names need work before they may be called
//! valid. The set is bounded: when it is full it is emptied, and from then on any name may be one of those forgotten.

use std::collections::HashSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use narlake_format::nix::store_path::StorePath;

use crate::metrics::Metrics;

/// Most names kept.
const NAMES_MAX: usize = 65_536;

pub(super) struct Negative {
    // Held for one look or change, never across an await.
    state: Mutex<State>,
    metrics: Metrics,
}

#[derive(Default)]
struct State {
    names: HashSet<StorePath>,
    /// Names were forgotten, so that any name may be negative...
    forgotten: bool,
    /// ... but these, which were seen since. Bounded like `names`.
    seen: HashSet<StorePath>,
}

impl Negative {
    pub(super) fn new(metrics: &Metrics) -> Self {
        Self { state: Mutex::default(), metrics: metrics.clone() }
    }

    /// Adds a name; true if it was not there, so that whoever added it may take it back.
    pub(super) fn insert(&self, path: &StorePath) -> bool {
        let mut state = self.lock();
        if state.names.len() >= NAMES_MAX {
            state.names.clear();
            state.seen.clear();
            state.forgotten = true;
        }
        let fresh = state.names.insert(path.clone());
        self.metrics.negative_names.set(i64::try_from(state.names.len()).unwrap_or(i64::MAX));
        fresh
    }

    /// Takes back what `insert` added, since the kernel was told something else after all.
    pub(super) fn take_back(&self, path: &StorePath) {
        let mut state = self.lock();
        state.names.remove(path);
        self.metrics.negative_names.set(i64::try_from(state.names.len()).unwrap_or(i64::MAX));
    }

    /// The name was seen through every overlay.
    pub(super) fn seen(&self, path: &StorePath) {
        let mut state = self.lock();
        state.names.remove(path);
        if state.forgotten && state.seen.len() < NAMES_MAX {
            state.seen.insert(path.clone());
        }
        self.metrics.negative_names.set(i64::try_from(state.names.len()).unwrap_or(i64::MAX));
    }

    /// Whether the kernel may have been told that the name does not exist.
    pub(super) fn contains(&self, path: &StorePath) -> bool {
        let state = self.lock();
        state.names.contains(path) || (state.forgotten && !state.seen.contains(path))
    }

    pub(super) fn len(&self) -> usize {
        self.lock().names.len()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
