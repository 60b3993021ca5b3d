//! Content that may not be relied on any more, written again while it can still be read.
//!
//! A push that finds a pack of its content condemned does not send its client away: the chunks are in that pack for a
//! day yet, and are moved to a new one before the push is acknowledged (docs/consistency.md, rule 4).

use std::sync::Arc;

use bytes::Bytes;
use narlake_format::id::{BlobId, BlobKind};
use narlake_format::lake::frame::{FrameContent, FrameEncoder};
use narlake_format::lake::location::Domain;
use tokio::sync::Semaphore;

use crate::complete::{Blobs, Roots};
use crate::error::Error;
use crate::fetch::Fetcher;
use crate::index::Index;
use crate::pack::writer::{PackWriter, PendingPack, Session};

/// Chunks read at once: neighbours, so mostly of a few frames.
const CHUNKS: usize = 128;

/// Parts of manifests read at once, of up to 256 KiB each.
const PARTS: usize = 8;

/// Paths whose content is moved at once: what they read must fit into memory beside everything else.
pub(crate) const REWRITES: usize = 2;

/// What it takes to write content of a domain again.
pub(crate) struct Rewriter {
    pub(crate) domain: Domain,
    pub(crate) fetcher: Arc<Fetcher>,
    pub(crate) index: Arc<Index>,
    pub(crate) writer: PackWriter,
    pub(crate) zstd_level: i32,
    /// [`REWRITES`] turns.
    pub(crate) turns: Arc<Semaphore>,
}

impl Rewriter {
    /// Gives every blob under `roots` a copy that may be relied on, and says how many had none. Dropped midway it leaves
    /// unreferenced bytes at most.
    ///
    /// # Errors
    /// `Corrupt` where a blob is nowhere or does not verify, the bucket's own where it does not take the copies.
    pub(crate) async fn run(&self, roots: Roots) -> Result<u64, Error> {
        let _turn = self.turns.acquire().await.map_err(|_| Error::Stopped("rewrite"))?;
        let mut session = self.writer.begin(self.domain);
        let mut relied: Vec<PendingPack> = Vec::new();
        let mut written = 0;
        let mut blobs = Blobs::of(&self.fetcher, roots);
        while let Some(found) = blobs.next().await? {
            let mut unsound = Vec::new();
            for (kind, id) in found {
                if self.index.get(&self.domain, &id).is_some() {
                    continue;
                }
                match session.pending(&id) {
                    Some(pack) => relied.push(pack),
                    None => unsound.push((kind, id)),
                }
            }
            let some = if matches!(unsound.first(), Some((BlobKind::Chunk, _))) { CHUNKS } else { PARTS };
            for batch in unsound.chunks(some) {
                let bytes = self.fetcher.fetch(batch).await?;
                let packs;
                (session, packs) = self.append(session, batch.to_vec(), bytes).await?;
                relied.extend(packs);
                written += batch.len() as u64;
            }
            relied.sort_unstable_by_key(PendingPack::number);
            relied.dedup_by_key(|pack| pack.number());
        }
        session.commit(relied).await?;
        Ok(written)
    }

    /// Compresses and appends: work for a thread that may block.
    async fn append(
        &self,
        session: Session,
        blobs: Vec<(BlobKind, BlobId)>,
        bytes: Vec<Bytes>,
    ) -> Result<(Session, Vec<PendingPack>), Error> {
        let level = self.zstd_level;
        let work = move || {
            let mut encoder = FrameEncoder::new(level);
            let mut content = FrameContent::default();
            let mut packs = Vec::new();
            for ((kind, id), bytes) in blobs.iter().zip(&bytes) {
                if content.is_full_for(bytes.len()) {
                    packs.push(session.append(encoder.encode(&std::mem::take(&mut content))));
                }
                content.push(*kind, *id, bytes);
            }
            if !content.is_empty() {
                packs.push(session.append(encoder.encode(&content)));
            }
            (session, packs)
        };
        tokio::task::spawn_blocking(work).await.map_err(|_| Error::Stopped("rewrite"))
    }
}
