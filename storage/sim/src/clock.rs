//! The engine's two seams, driven by the simulation.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use narlake_storage::{Clock, Entropy};

use crate::rng::Rng;

/// When every run begins, in milliseconds of Unix time.
const EPOCH_MS: u64 = 1_790_000_000_000;

/// A clock that moves when it is told to. The bucket's objects carry its time too.
#[derive(Debug)]
pub struct SimClock(AtomicU64);

impl SimClock {
    /// A clock at the beginning.
    #[must_use]
    pub const fn new() -> Self {
        Self(AtomicU64::new(EPOCH_MS))
    }

    /// Lets time pass.
    pub fn advance(&self, by: Duration) {
        self.0.fetch_add(u64::try_from(by.as_millis()).unwrap_or(u64::MAX), Ordering::SeqCst);
    }
}

impl Default for SimClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for SimClock {
    fn now_ms(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
}

/// Random bytes from a seed.
#[derive(Debug)]
pub struct SimEntropy(Mutex<Rng>);

impl SimEntropy {
    /// The bytes of a stream.
    #[must_use]
    pub const fn new(rng: Rng) -> Self {
        Self(Mutex::new(rng))
    }
}

impl Entropy for SimEntropy {
    fn fill(&self, bytes: &mut [u8]) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).fill(bytes);
    }
}
