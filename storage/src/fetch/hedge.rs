//! When a read is asked for a second time: once it takes longer than 99 of 100 like it.
//!
//! A request now and then meets a slow disk, a full queue or a lost packet, and whoever waits for it waits ten times as
//! long as for others. The second one, on another connection, mostly does not. Reads are compared with those of about
//! the same length; too few of them, and nothing is known. Second requests are a small share of all, whatever happens:
//! where everything is slow, asking twice makes it slower.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Reads remembered of each length.
const REMEMBERED: usize = 128;

/// Reads of a length from which on anything is known of them.
const KNOWN_MIN: usize = 32;

/// Shortest time after which a read is asked for again.
const PATIENCE_MIN: Duration = Duration::from_millis(50);

/// Classes of lengths: up to 128 KiB, and up to four times as much each, the last without limit.
const CLASSES: usize = 5;
const CLASS_FIRST: u64 = 128 << 10;

/// What one second request costs, in what a read brings in: they are 1 of 20 at most.
const COST: u32 = 20;

/// Most that is saved up: a few at once, after many reads that needed none.
const SAVED_MAX: u32 = 4 * COST;

/// How long reads have taken, and how many may be asked for twice.
pub(super) struct Hedge {
    // Held to note or to count, never across an await.
    state: Mutex<State>,
}

struct State {
    classes: [Times; CLASSES],
    saved: u32,
}

#[derive(Default)]
struct Times {
    /// In microseconds, the oldest overwritten first.
    micros: Vec<u32>,
    next: usize,
}

impl Hedge {
    pub(super) fn new() -> Self {
        Self { state: Mutex::new(State { classes: Default::default(), saved: 0 }) }
    }

    /// A read of this many bytes took this long.
    pub(super) fn saw(&self, bytes: u64, took: Duration) {
        let micros = u32::try_from(took.as_micros()).unwrap_or(u32::MAX);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.saved = (state.saved + 1).min(SAVED_MAX);
        let Some(times) = state.classes.get_mut(class(bytes)) else { return };
        match times.micros.get_mut(times.next) {
            Some(slot) => *slot = micros,
            None => times.micros.push(micros),
        }
        times.next = (times.next + 1) % REMEMBERED;
    }

    /// How long a read of this many bytes may take before it is asked for again; `None` while that is not known.
    pub(super) fn patience(&self, bytes: u64) -> Option<Duration> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let times = state.classes.get(class(bytes)).filter(|times| times.micros.len() >= KNOWN_MIN)?;
        let mut sorted = times.micros.clone();
        drop(state);
        sorted.sort_unstable();
        let p99 = sorted.get((sorted.len() * 99).div_ceil(100) - 1)?;
        Some(Duration::from_micros(u64::from(*p99)).max(PATIENCE_MIN))
    }

    /// Whether one more second request is within its share; it then counts.
    pub(super) fn take(&self) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let left = state.saved.checked_sub(COST);
        state.saved = left.unwrap_or(state.saved);
        left.is_some()
    }
}

fn class(bytes: u64) -> usize {
    let mut limit = CLASS_FIRST;
    for class in 0..CLASSES - 1 {
        if bytes <= limit {
            return class;
        }
        limit *= 4;
    }
    CLASSES - 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_is_what_nearly_all_needed() {
        let hedge = Hedge::new();
        for n in 0..KNOWN_MIN as u64 - 1 {
            hedge.saw(1000, Duration::from_millis(n));
        }
        assert_eq!(hedge.patience(1000), None, "too few");
        hedge.saw(1000, Duration::from_millis(1));
        assert_eq!(hedge.patience(1000), Some(PATIENCE_MIN));
        for _ in 0..1000 {
            hedge.saw(1000, Duration::from_millis(200));
        }
        hedge.saw(1000, Duration::from_secs(5));
        assert_eq!(hedge.patience(1000), Some(Duration::from_millis(200)), "one of 128 is no rule");
        hedge.saw(1000, Duration::from_secs(5));
        assert_eq!(hedge.patience(1000), Some(Duration::from_secs(5)));
        assert_eq!(hedge.patience(1 << 20), None, "others are another matter");
    }

    #[test]
    fn second_requests_are_a_small_share() {
        let hedge = Hedge::new();
        assert!(!hedge.take());
        let mut taken = 0;
        for _ in 0..10_000 {
            hedge.saw(1, Duration::ZERO);
            taken += u32::from(hedge.take());
        }
        assert_eq!(taken, 10_000 / COST);
    }
}
