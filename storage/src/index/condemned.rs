//! Which packs are about to be deleted, as the bucket says (docs/consistency.md, rule 4).
//!
//! Batches are created once and removed long after their packs; one that was read needs no second look.

use std::collections::{HashMap, HashSet};
use std::sync::PoisonError;

use narlake_format::lake::location::PackRef;
use narlake_format::lake::{condemned, keys};

use super::Index;
use crate::error::Error;
use crate::upload::found;

/// What has been read of `condemned/`.
#[derive(Default)]
pub(super) struct Condemned {
    batches: HashMap<String, Vec<PackRef>>,
    packs: HashSet<PackRef>,
    /// Batches read since the start: whoever compares two counts knows whether there was news in between.
    news: u64,
}

impl Condemned {
    pub(super) fn contains(&self, pack: &PackRef) -> bool {
        self.packs.contains(pack)
    }
}

impl Index {
    /// How many condemnations were learned of so far.
    pub(crate) fn condemnations(&self) -> u64 {
        self.tables.read().unwrap_or_else(PoisonError::into_inner).condemned.news
    }

    /// Reads the condemnations that the bucket has now: the packs they name are not relied on from here on. Cancel safe.
    ///
    /// # Errors
    /// Where the bucket does not answer, `Corrupt` where a batch does not decode.
    pub(crate) async fn read_condemned(&self) -> Result<(), Error> {
        let listed: HashSet<String> =
            self.bucket.list(keys::CONDEMNED, None).await?.into_iter().map(|object| object.key).collect();
        let unread: Vec<&String> = {
            let tables = self.tables.read().unwrap_or_else(PoisonError::into_inner);
            listed.iter().filter(|key| !tables.condemned.batches.contains_key(*key)).collect()
        };
        let mut read = Vec::with_capacity(unread.len());
        for key in unread {
            // One that went away since was done with.
            let Some(bytes) = found(self.bucket.get(key).await)? else { continue };
            read.push((key.clone(), condemned::decode(&bytes).map_err(Error::format(key.as_str()))?));
        }
        let mut tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
        let known = &mut tables.condemned;
        known.news += read.len() as u64;
        known.batches.retain(|key, _| listed.contains(key));
        known.batches.extend(read);
        known.packs = known.batches.values().flatten().copied().collect();
        Ok(())
    }
}
