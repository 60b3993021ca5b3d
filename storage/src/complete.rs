//! Whether everything that a path is made of is there: manifest, parts, string table, chunks.

use std::collections::HashSet;

use narlake_format::id::{BlobId, BlobKind, ManifestId, TableId};
use narlake_format::lake::config::UploadDocument;
use narlake_format::lake::manifest::ManifestEvent;
use narlake_format::lake::record::PathRecord;

use crate::error::Error;
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

    /// The next blobs, each once within its batch; none where that was all. What describes the tree (manifest, parts,
    /// table) is read for this, and so verified.
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
            let parts: HashSet<BlobId> = manifest.header().parts.iter().map(|part| part.id.into()).collect();
            blobs.extend(parts.into_iter().map(|id| (BlobKind::Part, id)));
            self.manifest = Some(manifest);
            return Ok(Some(blobs));
        };
        let mut chunks = HashSet::new();
        let more = manifest
            .next_part(self.fetcher, |event| {
                if let ManifestEvent::Chunk { id, .. } = event {
                    chunks.insert(BlobId::from(id));
                }
                Ok(())
            })
            .await?;
        Ok(more.then(|| chunks.into_iter().map(|id| (BlobKind::Chunk, id)).collect()))
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
