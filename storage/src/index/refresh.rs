//! Packs that this process has not heard of: put by other servers, or taken for lost while the bucket was ill.
//!
//! Ids of packs begin with the time they were sealed at, so what came since the last listing is found at its end, with
//! an hour's overlap for puts that took long and clocks that differ (docs/consistency.md, rule 8). What is older and yet
//! not known was away when it was listed; for that, everything is listed, now and then.
//!
//! All who miss something at one time share one listing of the end, which began after each of them asked; listings keep
//! a distance, so that questions for what is nowhere cost the bucket little. A listing is a task of its own: it goes on
//! when those who asked have gone, so that a long one is not begun over and over.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use narlake_format::id::{PackId, Ulid};
use narlake_format::lake::keys;
use narlake_format::lake::location::{Domain, PackRef};
use tokio::sync::Mutex;
use tokio::time::Instant;

use super::Index;
use crate::bucket::ObjectInfo;
use crate::error::Error;

/// How far before the last listing the next one begins, in milliseconds.
const OVERLAP_MS: u64 = 60 * 60 * 1000;
/// Least time from the end of one listing to the next.
const PAUSE: Duration = Duration::from_secs(1);
/// Least time between two listings of everything: what was away may stay so for this long after it is back.
const PAUSE_ALL: Duration = Duration::from_secs(30);
/// The same where listings take long: so many times what the last one took.
const PAUSE_FACTOR: u32 = 4;

/// How much is listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reach {
    /// What came since the last listing.
    Tail,
    /// Every pack.
    All,
}

/// The last listings of a domain. Held while one is under way.
pub(super) type Refreshed = Mutex<Last>;

#[derive(Default)]
pub(super) struct Last {
    /// When the last one that was read to its end began, ...
    tail_begun: Option<Instant>,
    /// ... in milliseconds since the Unix epoch.
    tail_ms: Option<u64>,
    /// When the last try ended.
    tail_ended: Option<Instant>,
    /// When the last try to list everything ended, and how long it took.
    all: Option<(Instant, Duration)>,
}

impl Index {
    /// Takes in packs of a domain that are not known. When this returns, everything that was put before it was called
    /// is known; with [`Reach::All`] also what was away, if that was not looked for a moment ago. Cancel safe: the
    /// listing goes on.
    ///
    /// # Errors
    /// Where the bucket does not answer.
    pub(crate) async fn refresh(self: &Arc<Self>, domain: Domain, reach: Reach) -> Result<(), Error> {
        let asked = Instant::now();
        let last = {
            let mut domains = self.refreshed.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(domains.entry(domain).or_default())
        };
        let index = Arc::clone(self);
        let listing = tokio::spawn(async move {
            let mut last = last.lock().await;
            match reach {
                Reach::Tail => index.refresh_tail(domain, asked, &mut last).await,
                Reach::All => index.refresh_all(domain, &mut last).await,
            }
        });
        listing.await.map_err(|_| Error::Stopped("listing of packs"))?
    }

    async fn refresh_tail(self: &Arc<Self>, domain: Domain, asked: Instant, last: &mut Last) -> Result<(), Error> {
        if last.tail_begun.is_some_and(|begun| begun >= asked) {
            return Ok(());
        }
        if let Some(ended) = last.tail_ended {
            tokio::time::sleep_until(ended + PAUSE).await;
        }
        let (begun, begun_ms) = (Instant::now(), self.mint.now_ms());
        let since_ms = last.tail_ms.unwrap_or(self.opened_ms).saturating_sub(OVERLAP_MS);
        let after = keys::pack(&PackRef { domain, id: PackId(Ulid::from_parts(since_ms, 0)) });
        let listed = self.take_in_new(domain, Some(&after)).await;
        last.tail_ended = Some(Instant::now());
        listed?;
        (last.tail_begun, last.tail_ms) = (Some(begun), Some(begun_ms));
        Ok(())
    }

    async fn refresh_all(self: &Arc<Self>, domain: Domain, last: &mut Last) -> Result<(), Error> {
        let due = |(ended, took): (Instant, Duration)| ended + (took * PAUSE_FACTOR).max(PAUSE_ALL);
        if last.all.is_some_and(|last| Instant::now() < due(last)) {
            return Ok(());
        }
        let begun = Instant::now();
        // What could not be read may be readable by now.
        self.tables.write().unwrap_or_else(PoisonError::into_inner).rejected.retain(|pack| pack.domain != domain);
        let listed = self.take_in_new(domain, None).await;
        last.all = Some((Instant::now(), begun.elapsed()));
        listed
    }

    async fn take_in_new(self: &Arc<Self>, domain: Domain, after: Option<&str>) -> Result<(), Error> {
        let listed = self.bucket.list(&keys::packs_of(&domain), after).await?;
        let new: Vec<(PackRef, ObjectInfo)> = {
            let tables = self.tables.read().unwrap_or_else(PoisonError::into_inner);
            let named = listed.into_iter().filter_map(|object| Some((keys::parse_pack(&object.key)?, object)));
            named.filter(|(pack, _)| !tables.packs.contains(pack) && !tables.rejected.contains(pack)).collect()
        };
        if !new.is_empty() {
            tracing::info!(%domain, packs = new.len(), "packs of other servers, or found again");
        }
        self.take_in(new).await
    }
}
