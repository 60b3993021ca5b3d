//! What kind of bucket this is, found out at start: does a create refuse a taken key, does a read see the last write,
//! how far is this host's clock from the bucket's.
//!
//! The engine is safe without conditional creates (every key it creates is unique or named by content), so their
//! absence is only said; a bucket that does not show what was just written, or a clock that is far off, is refused,
//! since the order of claims and markers rests on both (docs/consistency.md, rules 0 and 8).

use narlake_format::limits::CLOCK_SKEW_MAX_S;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload};

use super::{Bucket, bucket_error, path};
use crate::clock::Clock;
use crate::error::Error;

/// What the probe found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Probe {
    /// A create of a taken key is refused.
    pub conditional_create: bool,
    /// The bucket's clock minus this host's, in milliseconds.
    pub clock_offset_ms: i64,
}

impl Bucket {
    /// Writes, reads and deletes one object at `key`, which nobody else uses.
    ///
    /// # Errors
    /// `Unusable` where the bucket does not read its own writes or the clocks are too far apart.
    pub async fn probe(&self, key: &str, clock: &dyn Clock) -> Result<Probe, Error> {
        let at = path(key)?;
        let create = || PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        let before_ms = clock.now_ms();
        self.put_new(key, b"first".to_vec()).await?;
        let after_ms = clock.now_ms();
        let conditional_create = matches!(
            self.store.put_opts(&at, PutPayload::from_static(b"second"), create()).await,
            Err(object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. })
        );
        let meta = self.store.head(&at).await.map_err(|e| bucket_error("look at", key, e))?;
        let seen = self.get(key).await?;
        let expected: &[u8] = if conditional_create { b"first" } else { b"second" };
        let (parent, _) = key.rsplit_once('/').unwrap_or(("", key));
        let listed = self.list(&format!("{parent}/"), None).await?.iter().any(|object| object.key == key);
        self.delete(key).await?;
        if seen != expected || !listed {
            return Err(Error::Unusable("a read does not show the last write".to_owned()));
        }
        let bucket_ms = meta.last_modified.timestamp_millis();
        let offset = |host_ms: u64| bucket_ms - i64::try_from(host_ms).unwrap_or(i64::MAX);
        // LastModified has whole seconds on S3, so the request's own span and one second more count as no offset.
        let clock_offset_ms = match (offset(before_ms), offset(after_ms)) {
            (early, _) if early < -1000 => early,
            (_, late) if late > 1000 => late,
            _ => 0,
        };
        if clock_offset_ms.unsigned_abs() > CLOCK_SKEW_MAX_S * 1000 {
            return Err(Error::Unusable(format!(
                "its clock is {} s from this host's, the limit is {CLOCK_SKEW_MAX_S} s; set this host's clock",
                clock_offset_ms / 1000
            )));
        }
        Ok(Probe { conditional_create, clock_offset_ms })
    }
}
