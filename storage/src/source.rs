//! The lake's own source of content: the index and the bucket, for one trust domain.

use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use narlake_format::id::BlobId;
use narlake_format::lake::keys;
use narlake_format::lake::location::{Domain, Location, PackRef};

use crate::bucket::Bucket;
use crate::error::{Error, ErrorKind};
use crate::fetch::BlobSource;
use crate::index::{Index, Reach};
use crate::metrics::Metrics;

/// Content of one domain.
pub(crate) struct BucketSource {
    pub(crate) domain: Domain,
    pub(crate) index: Arc<Index>,
    pub(crate) bucket: Bucket,
    pub(crate) metrics: Metrics,
}

#[async_trait]
impl BlobSource for BucketSource {
    async fn locate(&self, ids: &[BlobId]) -> Result<Vec<Option<Location>>, Error> {
        let mut found = self.index.get_many(&self.domain, ids);
        for reach in [Reach::Tail, Reach::All] {
            if found.iter().all(Option::is_some) {
                break;
            }
            self.index.refresh(self.domain, reach).await?;
            found = self.index.get_many(&self.domain, ids);
        }
        Ok(found)
    }

    async fn read(&self, pack: &PackRef, range: Range<u64>) -> Result<Bytes, Error> {
        self.bucket.get_range(&keys::pack(pack), range).await
    }

    async fn size(&self, pack: &PackRef) -> Result<u64, Error> {
        let key = keys::pack(pack);
        match self.bucket.head(&key).await? {
            Some(object) => Ok(object.size),
            None => Err(Error::Bucket {
                operation: "look at",
                key,
                kind: ErrorKind::NotFound,
                source: "there is no such pack".into(),
            }),
        }
    }

    async fn damaged(&self, pack: &PackRef, frame_offset: u32, error: &Error) {
        if error.kind() == ErrorKind::NotFound {
            tracing::error!(%pack, error = error.chain(), "pack lost; pushing its paths again heals them");
            self.metrics.verification_failures.inc();
            self.index.forget_pack(pack);
        } else if self.index.mark_damaged(pack, frame_offset) {
            tracing::error!(%pack, frame_offset, error = error.chain(), "damaged; pushing its paths again heals them");
            self.metrics.verification_failures.inc();
            let mark = keys::damaged(pack, frame_offset);
            if let Err(error) = self.bucket.put_new(&mark, DAMAGE_MARK.to_vec()).await {
                // This process knows; the next finds out again.
                tracing::warn!(mark, error = error.chain(), "damage not written down");
            }
        }
    }
}

/// What stands in a mark: the key says it all.
const DAMAGE_MARK: &[u8] = b"damaged\n";
