//! Manifests and string tables, from the disk where they are there, else from the lake.

use std::sync::Arc;

use bytes::Bytes;
use narlake_format::id::{BlobId, BlobKind};
use narlake_storage::Error;
use narlake_storage::fetch::Fetcher;

use super::{Metadata, on_disk};

/// The fetch engine with the disk before it, for metadata. Cloning shares both.
#[derive(Clone)]
pub struct Blobs {
    fetcher: Fetcher,
    metadata: Arc<Metadata>,
}

impl Blobs {
    /// What is fetched is kept.
    #[must_use]
    pub const fn new(fetcher: Fetcher, metadata: Arc<Metadata>) -> Self {
        Self { fetcher, metadata }
    }

    /// The fetch engine alone, for content.
    #[must_use]
    pub const fn fetcher(&self) -> &Fetcher {
        &self.fetcher
    }

    /// Those of these blobs that are not on disk.
    #[must_use]
    pub fn absent(&self, ids: &[BlobId]) -> Vec<BlobId> {
        ids.iter().filter(|id| !self.metadata.has_blob(id)).copied().collect()
    }

    /// The bytes of these blobs, verified, in the order asked. Cancel safe.
    ///
    /// # Errors
    /// As [`Fetcher::fetch`], for what is not on disk.
    pub async fn fetch(&self, kind: BlobKind, ids: &[BlobId]) -> Result<Vec<Bytes>, Error> {
        let wanted = ids.to_vec();
        let found = on_disk(&self.metadata, move |metadata| {
            wanted.iter().map(|id| metadata.blob(kind, id)).collect::<Vec<Option<Bytes>>>()
        });
        let found = found.await;
        let missing = ids.iter().zip(&found).filter(|(_, found)| found.is_none());
        let missing: Vec<(BlobKind, BlobId)> = missing.map(|(id, _)| (kind, *id)).collect();
        if missing.is_empty() {
            return Ok(found.into_iter().flatten().collect());
        }
        let fetched = self.fetcher.fetch(&missing).await?;
        let keep: Vec<(BlobId, Bytes)> = missing.iter().map(|(_, id)| *id).zip(fetched.iter().cloned()).collect();
        on_disk(&self.metadata, move |metadata| keep.iter().for_each(|(id, bytes)| metadata.keep_blob(id, bytes)))
            .await;
        let mut fetched = fetched.into_iter();
        Ok(found.into_iter().filter_map(|found| found.or_else(|| fetched.next())).collect())
    }

    /// A blob, if it is on disk. Cancel safe.
    pub async fn kept(&self, kind: BlobKind, id: BlobId) -> Option<Bytes> {
        on_disk(&self.metadata, move |metadata| metadata.blob(kind, &id)).await
    }

    /// Keeps a blob that did not come by this way, and that the caller has verified.
    pub async fn keep(&self, id: BlobId, bytes: Bytes) {
        on_disk(&self.metadata, move |metadata| metadata.keep_blob(&id, &bytes)).await;
    }

    /// One blob.
    ///
    /// # Errors
    /// As [`Blobs::fetch`].
    pub async fn one(&self, kind: BlobKind, id: BlobId) -> Result<Bytes, Error> {
        self.fetch(kind, &[id]).await?.pop().ok_or(Error::MissingBlob { kind, id })
    }
}
