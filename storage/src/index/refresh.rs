//! Packs that this process has not heard of: put by other servers, or taken for lost while the bucket was ill.
//!
//! Ids of packs begin with the time they were sealed at, so mostly the end of the listing will do, with an hour's
//! overlap for puts that took long and clocks that differ; where it does not, all of it is listed
//! (docs/consistency.md, rule 8). All who miss something at one time share one listing, and listings keep a distance,
//! so that questions for what is nowhere cost the bucket little. Those who ask are delayed by that, never told "nowhere"
//! on the word of a listing that began before they asked.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use narlake_format::id::{PackId, Ulid};
use narlake_format::lake::keys;
use narlake_format::lake::location::{Domain, PackRef};
use tokio::time::Instant;

use super::Index;
use crate::bucket::ObjectInfo;
use crate::error::Error;

/// How far back of the newest pack known the end of the listing begins, in milliseconds.
const OVERLAP_MS: u64 = 60 * 60 * 1000;
/// Least time between the beginnings of two listings of one domain.
const PAUSE: Duration = Duration::from_secs(1);
/// The same where listings take long: so many times what one takes, ...
const PAUSE_FACTOR: u32 = 4;
/// ... but so that whoever waits for the next one gets an answer.
const PAUSE_MAX: Duration = Duration::from_secs(10);

/// How much is listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reach {
    /// The newest packs.
    Tail,
    /// Every pack.
    All,
}

/// The last listings of a domain.
#[derive(Default)]
pub(super) struct Refreshed {
    /// When the last one began, of either reach.
    any: Option<Instant>,
    /// When the last one of everything began.
    all: Option<Instant>,
    took: Duration,
}

impl Index {
    /// Lists the packs of a domain and takes in those that are not known, by a listing that began after this was
    /// called. Cancel safe.
    ///
    /// # Errors
    /// Where the bucket does not answer.
    pub(crate) async fn refresh(self: &Arc<Self>, domain: &Domain, reach: Reach) -> Result<(), Error> {
        let asked = Instant::now();
        let mut domains = self.refreshed.lock().await;
        let last = domains.entry(*domain).or_default();
        let relevant = if reach == Reach::All { last.all } else { last.any };
        if relevant.is_some_and(|begun| begun >= asked) {
            return Ok(());
        }
        if let Some(begun) = last.any {
            let pause = last.took.saturating_mul(PAUSE_FACTOR).clamp(PAUSE, PAUSE_MAX);
            tokio::time::sleep_until(begun + pause).await;
        }
        let begun = Instant::now();
        self.take_in_new(domain, reach).await?;
        last.any = Some(begun);
        if reach == Reach::All {
            last.all = Some(begun);
        }
        last.took = begun.elapsed();
        Ok(())
    }

    async fn take_in_new(self: &Arc<Self>, domain: &Domain, reach: Reach) -> Result<(), Error> {
        let after = match reach {
            Reach::Tail => self.newest(domain).map(|newest| {
                let since = newest.timestamp_ms().saturating_sub(OVERLAP_MS);
                keys::pack(&PackRef { domain: *domain, id: PackId(Ulid::from_parts(since, 0)) })
            }),
            Reach::All => None,
        };
        let listed = self.bucket.list(&keys::packs_of(domain), after.as_deref()).await?;
        let new: Vec<(PackRef, ObjectInfo)> = {
            let tables = self.tables.read().unwrap_or_else(PoisonError::into_inner);
            let named = listed.into_iter().filter_map(|object| Some((keys::parse_pack(&object.key)?, object)));
            named.filter(|(pack, _)| !tables.packs.contains(pack)).collect()
        };
        if !new.is_empty() {
            tracing::info!(%domain, packs = new.len(), "packs of other servers, or found again");
        }
        self.take_in(new).await
    }

    fn newest(&self, domain: &Domain) -> Option<Ulid> {
        let tables = self.tables.read().unwrap_or_else(PoisonError::into_inner);
        tables.packs.iter().filter(|pack| pack.domain == *domain).map(|pack| pack.id.0).max()
    }
}
