//! Closures loaded in the background, and who waits for them.
//!
//! Whoever asks for a path asks for what it refers to next, one path after the other: Nix does, for each path of a
//! closure. So the first of them has its closure loaded, with one question, and whoever asks for a path that this one
//! refers to waits for the closure instead of asking for the path. Those further down are asked for by who has heard of
//! them, so after the closure has come.
//!
//! Waiting is an optimisation: it has an end well before the deadline of who waits, and then the path is asked for by
//! itself. So it is where a closure could not be loaded.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use narlake_format::error::chain;
use narlake_format::nix::store_path::StorePathHash;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::View;
use crate::trust::TrustedRecord;

/// Closures that are being loaded or wait for their turn.
const PREFETCHES_MAX: usize = 64;

/// Those that are being loaded.
const PREFETCHES_AT_ONCE: usize = 4;

/// The closures that are being loaded.
pub(super) struct Prefetches {
    // By root. Held for a look or a change, never across an await.
    under_way: Mutex<HashMap<StorePathHash, Prefetch>>,
    turns: Semaphore,
}

struct Prefetch {
    /// What the root refers to.
    members: HashSet<StorePathHash>,
    ended: CancellationToken,
}

/// A closure that is being loaded, until this is dropped.
struct Loading {
    prefetches: Arc<Prefetches>,
    root: StorePathHash,
}

impl Default for Prefetches {
    fn default() -> Self {
        Self { under_way: Mutex::default(), turns: Semaphore::new(PREFETCHES_AT_ONCE) }
    }
}

impl Prefetches {
    /// Enters a closure, unless it is being loaded already or there are too many.
    fn begin(self: &Arc<Self>, root: StorePathHash, members: HashSet<StorePathHash>) -> Option<Loading> {
        let mut under_way = self.lock();
        // Beyond the bound it is loaded when one of its members is asked for.
        if under_way.len() >= PREFETCHES_MAX || under_way.contains_key(&root) {
            return None;
        }
        under_way.insert(root, Prefetch { members, ended: CancellationToken::new() });
        Some(Loading { prefetches: Arc::clone(self), root })
    }

    /// Cancelled once a closure that this path is in has been loaded, or could not be; none if it is in none.
    fn loading(&self, hash: &StorePathHash) -> Option<CancellationToken> {
        let under_way = self.lock();
        under_way.values().find(|prefetch| prefetch.members.contains(hash)).map(|prefetch| prefetch.ended.clone())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<StorePathHash, Prefetch>> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Loading {
    fn drop(&mut self) {
        if let Some(prefetch) = self.prefetches.lock().remove(&self.root) {
            prefetch.ended.cancel();
        }
    }
}

impl View {
    /// Loads the closure of a path in the background, unless all it refers to is known.
    pub(super) fn prefetch(&self, record: &TrustedRecord) {
        let root = record.info().store_path.hash;
        let references = record.info().references.iter().map(|path| path.hash);
        let members: HashSet<StorePathHash> = references.filter(|hash| *hash != root).collect();
        if members.iter().all(|hash| self.inner.records.contains_key(hash)) {
            return;
        }
        let Some(loading) = self.inner.prefetches.begin(root, members) else { return };
        let view = self.clone();
        tokio::spawn(async move {
            let _turn = view.inner.prefetches.turns.acquire().await;
            let loaded = view.load_closures(&[root]).await;
            // The trees are not what anybody waits for here.
            drop(loading);
            match loaded {
                Ok(closures) => view.warm(&closures.records).await,
                Err(error) => {
                    tracing::warn!(root = %root, error = chain(&error), "prefetch the closure");
                }
            }
        });
    }

    /// The record of a path, if a closure that it is in is being loaded and brings it. Cancel safe.
    pub(super) async fn prefetched(&self, hash: &StorePathHash) -> Option<TrustedRecord> {
        let ended = self.inner.prefetches.loading(hash)?;
        let _ = tokio::time::timeout(self.inner.settings.deadline / 2, ended.cancelled()).await;
        self.inner.records.get(hash)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(number: u8) -> StorePathHash {
        StorePathHash::from_bytes([number; 20])
    }

    #[test]
    fn members_wait_until_the_closure_has_come_or_failed() {
        let prefetches = Arc::new(Prefetches::default());
        let members = HashSet::from([hash(1), hash(2)]);
        let loading = prefetches.begin(hash(0), members.clone()).unwrap();
        assert!(prefetches.begin(hash(0), members).is_none(), "once at a time");
        let ended = prefetches.loading(&hash(1)).unwrap();
        assert!(
            !ended.is_cancelled() && prefetches.loading(&hash(0)).is_none() && prefetches.loading(&hash(3)).is_none()
        );
        drop(loading);
        assert!(ended.is_cancelled() && prefetches.loading(&hash(1)).is_none());
    }

    #[test]
    fn they_are_bounded() {
        let prefetches = Arc::new(Prefetches::default());
        let begin = |number| prefetches.begin(hash(number), HashSet::new());
        let max = u8::try_from(PREFETCHES_MAX).unwrap();
        let mut loading: Vec<_> = (0..max).map(|number| begin(number).unwrap()).collect();
        assert!(begin(max).is_none());
        loading.pop();
        assert!(begin(max).is_some());
    }
}
