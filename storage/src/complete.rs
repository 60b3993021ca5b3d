//! Whether everything that a path is made of is there: manifest, parts, string table, chunks.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

use narlake_format::id::{BlobId, BlobKind, CacheId, ManifestId, TableId};
use narlake_format::lake::config::UploadDocument;
use narlake_format::lake::manifest::ManifestEvent;
use narlake_format::lake::record::PathRecord;
use narlake_format::nix::store_path::StorePathHash;

use crate::error::{Error, ErrorKind};
use crate::fetch::Fetcher;
use crate::manifest::{self, Manifest};

/// What all content of a path hangs from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Roots {
    pub(crate) manifest: ManifestId,
    /// The string table, where it is a blob of its own.
    pub(crate) table: Option<TableId>,
}

impl From<&PathRecord> for Roots {
    fn from(record: &PathRecord) -> Self {
        let table = record.inline_table().is_none().then(|| record.table());
        Self { manifest: record.manifest(), table }
    }
}

impl From<&UploadDocument> for Roots {
    fn from(upload: &UploadDocument) -> Self {
        Self { manifest: upload.manifest, table: upload.inline_table.is_none().then_some(upload.table) }
    }
}

/// The blobs under some roots, a batch at a time, so that a tree of any size takes little memory.
pub(crate) struct Blobs<'a> {
    fetcher: &'a Fetcher,
    roots: Roots,
    /// Opened by the first batch.
    manifest: Option<Manifest>,
}

impl<'a> Blobs<'a> {
    pub(crate) fn of(fetcher: &'a Fetcher, roots: Roots) -> Self {
        Self { fetcher, roots, manifest: None }
    }

    /// The next blobs, in the order of the tree, each once within its batch; none where that was all. What describes the
    /// tree (manifest, parts, table) is read for this, and so verified.
    ///
    /// # Errors
    /// `Corrupt` where what describes the tree is nowhere or does not verify.
    pub(crate) async fn next(&mut self) -> Result<Option<Vec<(BlobKind, BlobId)>>, Error> {
        let Some(manifest) = &mut self.manifest else {
            let manifest = Manifest::open(self.fetcher, &self.roots.manifest).await?;
            let mut blobs = vec![(BlobKind::Manifest, self.roots.manifest.into())];
            if let Some(table) = &self.roots.table {
                manifest::table(self.fetcher, table).await?;
                blobs.push((BlobKind::Table, (*table).into()));
            }
            let mut seen = HashSet::new();
            let parts = manifest.header().parts.iter().map(|part| part.id.into());
            blobs.extend(parts.filter(|id| seen.insert(*id)).map(|id: BlobId| (BlobKind::Part, id)));
            self.manifest = Some(manifest);
            return Ok(Some(blobs));
        };
        let (mut chunks, mut seen) = (Vec::new(), HashSet::new());
        let more = manifest
            .next_part(self.fetcher, |event| {
                if let ManifestEvent::Chunk { id, .. } = event {
                    let id = BlobId::from(id);
                    if seen.insert(id) {
                        chunks.push((BlobKind::Chunk, id));
                    }
                }
                Ok(())
            })
            .await?;
        Ok(more.then_some(chunks))
    }
}

/// Looks every blob up. `sound` says whether one that has a place will do.
///
/// # Errors
/// `Corrupt` where one is nowhere or will not do, naming it.
pub(crate) async fn check(fetcher: &Fetcher, roots: Roots, sound: impl Fn(&BlobId) -> bool) -> Result<(), Error> {
    let mut blobs = Blobs::of(fetcher, roots);
    while let Some(batch) = blobs.next().await? {
        fetcher.locate(&batch).await?;
        if let Some((kind, id)) = batch.iter().find(|(_, id)| !sound(id)) {
            return Err(Error::MissingBlob { kind: *kind, id: *id });
        }
    }
    Ok(())
}

/// Paths remembered at most; with more than that, some are found out again.
const INCOMPLETE_MAX: usize = 1 << 16;

/// Paths that could not be read for want of content. Clients that ask for them are told that they are not there, so that
/// they push them, which heals, or get them elsewhere.
#[derive(Default)]
pub(crate) struct Incomplete {
    // Held for a look or a change, never across an await.
    paths: Mutex<HashSet<(CacheId, StorePathHash)>>,
}

impl Incomplete {
    /// Takes note of why a path could not be read.
    pub(crate) fn note(&self, path: (CacheId, StorePathHash), error: &Error) {
        if error.kind() == ErrorKind::Corrupt {
            let mut paths = self.paths.lock().unwrap_or_else(PoisonError::into_inner);
            if paths.len() >= INCOMPLETE_MAX {
                paths.clear();
            }
            paths.insert(path);
        }
    }

    pub(crate) fn contains(&self, path: &(CacheId, StorePathHash)) -> bool {
        self.paths.lock().unwrap_or_else(PoisonError::into_inner).contains(path)
    }

    pub(crate) fn strike(&self, path: &(CacheId, StorePathHash)) {
        self.paths.lock().unwrap_or_else(PoisonError::into_inner).remove(path);
    }
}
