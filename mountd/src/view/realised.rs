//! Realisations: what outputs of content-addressed derivations turned out to be.
//!
//! Nix believes its lower store without a signature. So only what a trusted key has signed is said, of a path that the
//! view shows (docs/decisions/0020-realisations-are-signed.md); what nobody trusted has signed is as good as absent, and
//! Nix builds. When the server does not answer, that is an error, as it is for a path.
//!
//! A realisation is for good, so it is remembered; whether its path is shown is found out each time. Nix asks about each
//! output ten times over, so that one that is absent is remembered too, for a second.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use narlake_format::nix::realisation::RealisationKey;
use tokio::time::Instant;

use super::{View, ViewError};
use crate::lru::{Lru, lru};
use crate::trust::TrustedRealisation;

/// Most bytes of realisations in memory, and how many of the usual size that is.
const BYTES: u64 = 8 << 20;
const USUAL: usize = 16_384;

/// How long one that is absent is not asked for again.
const ABSENT_FOR: Duration = Duration::from_secs(1);

/// Most of those that are remembered; should there be more within a second, all of them are asked for again.
const ABSENT_MAX: usize = 4096;

/// What is remembered.
pub(super) struct Realised {
    known: Lru<RealisationKey, TrustedRealisation>,
    // With when they were absent. Held for a look or a change, never across an await.
    absent: Mutex<HashMap<RealisationKey, Instant>>,
}

impl Default for Realised {
    fn default() -> Self {
        Self { known: lru(USUAL, BYTES), absent: Mutex::default() }
    }
}

impl Realised {
    fn is_absent(&self, key: &RealisationKey, now: Instant) -> bool {
        let absent = self.absent.lock().unwrap_or_else(PoisonError::into_inner);
        absent.get(key).is_some_and(|at| *at + ABSENT_FOR > now)
    }

    fn note_absent(&self, key: &RealisationKey, now: Instant) {
        let mut absent = self.absent.lock().unwrap_or_else(PoisonError::into_inner);
        if absent.len() >= ABSENT_MAX {
            absent.retain(|_, at| *at + ABSENT_FOR > now);
        }
        if absent.len() >= ABSENT_MAX {
            absent.clear();
        }
        absent.insert(key.clone(), now);
    }
}

impl View {
    /// What an output turned out to be, if a trusted key has signed it and the view shows it. Cancel safe.
    ///
    /// # Errors
    /// When the server does not answer, and as [`View::valid`].
    pub async fn realisation(&self, key: &RealisationKey) -> Result<Option<TrustedRealisation>, ViewError> {
        let Some(realisation) = self.bounded(self.find_realisation(key)).await? else { return Ok(None) };
        let shown = self.valid(&realisation.out_path).await?;
        Ok(shown.map(|_| realisation))
    }

    async fn find_realisation(&self, key: &RealisationKey) -> Result<Option<TrustedRealisation>, ViewError> {
        let realised = &self.inner.realised;
        if realised.is_absent(key, Instant::now()) {
            return Ok(None);
        }
        // Those who ask at the same time wait for the first one's answer.
        let asked = realised.known.get_or_insert_async(key, async {
            let _turn = self.inner.lookups.acquire().await;
            let found = self.inner.source.realisation(key).await.map_err(|error| Some(ViewError::Remote(error)))?;
            let found = found.ok_or(None)?;
            let out_path = found.out_path.clone();
            self.inner.keys.verify_realisation(key, found).ok_or_else(|| {
                self.inner.metrics.realisations_untrusted.inc();
                tracing::warn!(realisation = %key, path = %out_path, "no trusted key has signed it, taken as absent");
                None
            })
        });
        match asked.await {
            Ok(realisation) => Ok(Some(realisation)),
            Err(None) => {
                realised.note_absent(key, Instant::now());
                Ok(None)
            }
            Err(Some(error)) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absence_is_remembered_for_a_second_and_bounded() {
        let realised = Realised::default();
        let key = |number: usize| -> RealisationKey {
            format!("build-trace-v2/bidkcs01mww363s4s7akdhbl6ws66b0z-x.drv/o{number}.doi").parse().unwrap()
        };
        let now = Instant::now();
        assert!(!realised.is_absent(&key(0), now));
        realised.note_absent(&key(0), now);
        assert!(realised.is_absent(&key(0), now) && !realised.is_absent(&key(1), now));
        assert!(!realised.is_absent(&key(0), now + ABSENT_FOR));
        for number in 0..=ABSENT_MAX {
            realised.note_absent(&key(number), now);
        }
        assert!(realised.absent.lock().unwrap().len() <= ABSENT_MAX);
        assert!(realised.is_absent(&key(ABSENT_MAX), now));
    }
}
