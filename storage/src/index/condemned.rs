//! Which packs are about to be deleted, as the bucket says (docs/consistency.md, rule 4).
//!
//! Condemnation is irrevocable: a pack that was once is never relied on again while this process lives, though its batch
//! is removed some time after the pack itself. After a restart what is gone is not listed.

use std::collections::HashSet;
use std::sync::PoisonError;

use narlake_format::lake::location::PackRef;
use narlake_format::lake::{condemned, keys};

use super::Index;
use crate::error::Error;
use crate::upload::found;

/// What has been read of `condemned/`.
#[derive(Default)]
pub(super) struct Condemned {
    /// Batches that were read; created once, they need no second look.
    batches: HashSet<String>,
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
        let listed = self.bucket.list(keys::CONDEMNED, None).await?;
        let unread: Vec<String> = {
            let tables = self.tables.read().unwrap_or_else(PoisonError::into_inner);
            let known = &tables.condemned.batches;
            listed.into_iter().map(|object| object.key).filter(|key| !known.contains(key)).collect()
        };
        for key in unread {
            // One that went away since was done with.
            let Some(bytes) = found(self.bucket.get(&key).await)? else { continue };
            let packs = condemned::decode(&bytes).map_err(Error::format(key.as_str()))?;
            let mut tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
            let known = &mut tables.condemned;
            if known.batches.insert(key) {
                known.news += 1;
                known.packs.extend(packs);
            }
        }
        Ok(())
    }
}
