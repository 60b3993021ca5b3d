//! NEG: the names of store paths that the kernel was told do not exist.
//!
//! An overlay remembers such an answer until it is refreshed, so these names need work before they may be called valid.
//! A name is in NEG from before anybody is asked about it ([`Negative::ask`]) until it was seen through every overlay,
//! or the kernel was told something else.
//!
//! The set is bounded. When it is full, the names whose answer was given are dropped, and a refresh of every overlay is
//! owed ([`Negative::due`]). Until it is done, any name may be one of those dropped and is looked for through the
//! overlays ([`Negative::contains`]); once it is done, none is ([`Negative::paid`]). Why none is:
//!
//! - A refresh makes an overlay forget every name that it took for absent before the refresh began.
//! - A name that was dropped was answered before the drop. The kernel acts on an answer without waiting for anything
//!   but a processor, so [`SETTLE`] later the overlay that asked has noted the name; and the refresh that counts begins
//!   no earlier than that.
//! - A name whose answer was still on its way at the drop was kept. One that was asked about after the drop, while the
//!   refresh was waited for or ran, is in NEG like any other, and stays in it.
//! - An overlay that comes into care meanwhile is refreshed after it has been entered, so either this refresh or that
//!   one covers it.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use narlake_format::nix::store_path::StorePath;
use tokio::time::Instant;

use crate::metrics::Metrics;

/// Most names kept, about 120 bytes each; those being asked about come on top.
const NAMES_MAX: usize = 65_536;

/// How long an answer may take from here into the overlay that waits for it.
pub(super) const SETTLE: Duration = Duration::from_secs(5);

pub(super) struct Negative {
    // Held for one look or change, never across an await.
    state: Mutex<State>,
    metrics: Metrics,
}

#[derive(Default)]
struct State {
    names: HashMap<StorePath, Name>,
    /// When names were last dropped, if no refresh has covered that yet: any name may be negative...
    dropped: Option<Instant>,
    /// ... but these, which were seen since. Bounded like `names`.
    seen: HashSet<StorePath>,
    /// Somebody sees to the refresh.
    paying: bool,
}

#[derive(Default)]
struct Name {
    /// Look-ups under way.
    asking: u32,
    /// Some look-up was answered with "does not exist".
    told: bool,
}

/// A look-up under way. Dropped without [`Asking::absent`], the kernel is told something else.
pub(super) struct Asking<'a> {
    negative: &'a Negative,
    path: &'a StorePath,
    /// A refresh is owed, and whoever sees this first is to see to it.
    pub(super) owes: bool,
}

impl Negative {
    pub(super) fn new(metrics: &Metrics) -> Self {
        Self { state: Mutex::default(), metrics: metrics.clone() }
    }

    /// Adds a name that is about to be asked about.
    pub(super) fn ask<'a>(&'a self, path: &'a StorePath) -> Asking<'a> {
        let mut state = self.lock();
        if state.names.len() >= NAMES_MAX && !state.names.contains_key(path) {
            state.names.retain(|_, name| name.asking > 0);
            state.seen.clear();
            state.dropped = Some(Instant::now());
        }
        state.names.entry(path.clone()).or_default().asking += 1;
        let owes = state.dropped.is_some() && !state.paying;
        state.paying |= owes;
        self.show(&state);
        Asking { negative: self, path, owes }
    }

    /// Any name may be negative: what earlier daemons answered is not known.
    pub(super) fn drop_all(&self) {
        let mut state = self.lock();
        state.dropped = Some(Instant::now());
        state.paying = true;
    }

    /// The name was seen through every overlay.
    pub(super) fn seen(&self, path: &StorePath) {
        let mut state = self.lock();
        state.names.remove(path);
        if state.dropped.is_some() && state.seen.len() < NAMES_MAX {
            state.seen.insert(path.clone());
        }
        self.show(&state);
    }

    /// Whether the kernel may have been told that the name does not exist.
    pub(super) fn contains(&self, path: &StorePath) -> bool {
        let state = self.lock();
        state.names.contains_key(path) || (state.dropped.is_some() && !state.seen.contains(path))
    }

    /// From when on a refresh of every overlay pays what is owed. `None` when nothing is, and whoever asks need not see to
    /// it any longer.
    pub(super) fn due(&self) -> Option<Instant> {
        let mut state = self.lock();
        state.paying = state.dropped.is_some();
        state.dropped.map(|at| at + SETTLE)
    }

    /// Every overlay has been refreshed, from this moment on.
    pub(super) fn paid(&self, began: Instant) {
        let mut state = self.lock();
        if state.dropped.is_some_and(|at| at + SETTLE <= began) {
            state.dropped = None;
            state.seen = HashSet::new();
        }
    }

    pub(super) fn len(&self) -> usize {
        self.lock().names.len()
    }

    fn show(&self, state: &State) {
        self.metrics.negative_names.set(i64::try_from(state.names.len()).unwrap_or(i64::MAX));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Asking<'_> {
    /// The kernel is about to be told that the name does not exist.
    pub(super) fn absent(self) {
        let mut state = self.negative.lock();
        // Seen meanwhile, it was removed: this answer may still reach somebody.
        state.names.entry(self.path.clone()).or_default().told = true;
        drop(state);
    }
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        let mut state = self.negative.lock();
        if let Some(name) = state.names.get_mut(self.path) {
            name.asking = name.asking.saturating_sub(1);
            if name.asking == 0 && !name.told {
                state.names.remove(self.path);
            }
        }
        self.negative.show(&state);
    }
}

#[cfg(test)]
mod tests {
    use narlake_format::nix::store_path::StorePathHash;

    use super::*;

    fn path(number: usize) -> StorePath {
        let mut hash = [0; 20];
        hash[..8].copy_from_slice(&number.to_le_bytes());
        StorePath { hash: StorePathHash::from_bytes(hash), name: "x".parse().unwrap() }
    }

    /// Asks about more names than are kept, none of them asked about before; how often that owed a refresh.
    fn overflow(negative: &Negative, round: usize) -> usize {
        let mut owing = 0;
        for number in 0..=NAMES_MAX {
            let number = 1000 + round * 2 * NAMES_MAX + number;
            let path = path(number);
            let asking = negative.ask(&path);
            owing += usize::from(asking.owes);
            asking.absent();
        }
        owing
    }

    #[test]
    fn only_absence_is_kept() {
        let negative = Negative::new(&Metrics::new());
        let name = path(1);
        drop(negative.ask(&name));
        assert!(!negative.contains(&name));
        // Two look-ups at once, one before the path came and one after.
        let (first, second) = (negative.ask(&name), negative.ask(&name));
        assert!(negative.contains(&name));
        first.absent();
        drop(second);
        assert!(negative.contains(&name));
        negative.seen(&name);
        assert!(!negative.contains(&name));
        // Seen through the overlays while an answer is on its way to somebody else.
        let late = negative.ask(&name);
        negative.seen(&name);
        late.absent();
        assert!(negative.contains(&name));
        assert!(negative.due().is_none());
    }

    #[test]
    fn an_overflow_is_paid_for_once() {
        let negative = Negative::new(&Metrics::new());
        let (old, flying, fresh, unknown) = (path(1), path(2), path(3), path(4));
        negative.ask(&old).absent();
        let on_its_way = negative.ask(&flying);
        assert_eq!(overflow(&negative, 0), 1);
        assert!(negative.len() < NAMES_MAX);
        // Any name may be one of those dropped, but for what is seen.
        for name in [&old, &flying, &unknown] {
            assert!(negative.contains(name));
        }
        negative.seen(&unknown);
        assert!(!negative.contains(&unknown));
        negative.ask(&fresh).absent();
        on_its_way.absent();
        let due = negative.due().unwrap();
        // A refresh that began too early covers nothing.
        negative.paid(due - Duration::from_millis(1));
        assert!(negative.contains(&old));
        negative.paid(due);
        assert!(!negative.contains(&old) && !negative.contains(&unknown));
        // What was answered while the refresh was owed is known all the same.
        assert!(negative.contains(&flying) && negative.contains(&fresh));
        assert!(negative.due().is_none());
        // And the next overflow is seen to again.
        assert_eq!(overflow(&negative, 1), 1);
    }

    /// A drop after the refresh began is not covered by it.
    #[test]
    fn a_later_drop_is_owed_for_itself() {
        let negative = Negative::new(&Metrics::new());
        assert_eq!(overflow(&negative, 0), 1);
        let first = negative.due().unwrap();
        assert_eq!(overflow(&negative, 1), 0);
        let second = negative.due().unwrap();
        assert!(second > first);
        negative.paid(first);
        assert!(negative.contains(&path(1)));
        negative.paid(second);
        assert!(!negative.contains(&path(1)));
    }
}
