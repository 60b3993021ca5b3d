//! New ids: a ULID of this moment.
//!
//! Replicas tail the bucket by these ids with an hour's overlap, so the clock behind them is checked against the
//! bucket's when the lake opens (docs/consistency.md, rule 8).

use std::sync::Arc;

use narlake_format::id::Ulid;

use crate::clock::{Clock, Entropy};

/// Makes ids from the two seams.
#[derive(Clone)]
pub(crate) struct Mint {
    clock: Arc<dyn Clock>,
    entropy: Arc<dyn Entropy>,
}

impl Mint {
    pub(crate) fn new(clock: Arc<dyn Clock>, entropy: Arc<dyn Entropy>) -> Self {
        Self { clock, entropy }
    }

    /// A ULID of now.
    pub(crate) fn ulid(&self) -> Ulid {
        let mut random = [0; 16];
        self.entropy.fill(&mut random);
        Ulid::from_parts(self.clock.now_ms(), u128::from_le_bytes(random))
    }

    /// Milliseconds since the Unix epoch.
    pub(crate) fn now_ms(&self) -> u64 {
        self.clock.now_ms()
    }
}
