//! From a range of a file to its bytes: where cache, source and patches meet.
//!
//! A range is served from the complete file in the cache if there is one. Else its chunks are: those that a partial
//! file holds from there; those that another reader is fetching by waiting for that reader; the rest by one fetch, whose
//! bytes are verified by the fetch engine, get their store paths back ([`PatchList`]), are kept, and then answered. A
//! file no longer than [`WHOLE_MAX`] is fetched whole and goes straight into `hot/`.
//!
//! What the cache has is verified again whenever it is read: the chunks that the range touches are scrubbed once more
//! and hashed, which costs microseconds and leaves nothing to believe of a disk. What does not verify is a miss.
//!
//! What will be wanted next is guessed in `ahead`, and only ever makes the fetch engine have it sooner.
//!
//! Invariant: a chunk of a file has one filler at a time ([`Fill`]), so nothing writes to a file that is complete.

mod ahead;
mod fill;

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::future::try_join_all;
use narlake_format::id::{BlobId, BlobKind, ChunkId, ContentId};
use narlake_format::lake::scrub::PatchList;
use narlake_format::lake::strings::StringTable;
use narlake_storage::fetch::{Fetcher, Nearness};

use self::ahead::{Foresight, Site};
use self::fill::{Fill, Share};
use crate::cache::Cache;
use crate::fs::error::FsError;
use crate::fs::nodes::NodeId;
use crate::fs::tree::{EntryNumber, Tree, TreeFile};
use crate::lru::{Lru, Weigh, lru};
use crate::metrics::Metrics;

/// A file up to this many bytes is fetched whole: what the kernel's readahead asks for at once anyway.
const WHOLE_MAX: u64 = 128 * 1024;

/// Chunks on either side of a fetch that are kept with it if they came in its frames: those of a frame, at most.
const BESIDE_MAX: usize = 64;

/// Longest time for their content to be had: it is in memory, and whoever reads does not wait for it to be read again.
const BESIDE_TIMEOUT: Duration = Duration::from_millis(100);

/// Bytes of memory for files whose patches and name are kept at hand: those of 4,000 files with a few thousand patches.
/// The string table of an object counts for each of its files, so this is more than they take.
const FILES_BYTES: u64 = 64 << 20;

/// The same for a reader beside the first, of which there may be hundreds.
const FILES_OF_VIEW_BYTES: u64 = 1 << 20;

/// Bytes of a patch that has been placed in its file.
const PLACED_PATCH: usize = 16;

/// What of a file is the same for all its reads.
pub struct FileView {
    content: ContentId,
    size: u64,
    patches: PatchList,
    /// Bytes of the string table that the patches share.
    table_bytes: usize,
}

impl Weigh for FileView {
    fn bytes(&self) -> u64 {
        (size_of::<Self>() + self.patches.len() * PLACED_PATCH + self.table_bytes) as u64
    }
}

/// Reads files of trees.
pub struct Reader {
    fetcher: Fetcher,
    foresight: Foresight,
    cache: Arc<Cache>,
    views: Lru<NodeId, Arc<FileView>>,
    // Held to look up, insert or remove, never across an await. Invariant: an `Arc` in it is cloned under this lock.
    fills: Arc<Mutex<HashMap<ContentId, Arc<Fill>>>>,
    metrics: Metrics,
}

impl Reader {
    /// A reader that fetches what the cache does not have.
    #[must_use]
    pub fn new(fetcher: Fetcher, cache: Arc<Cache>, metrics: &Metrics) -> Self {
        let (metrics, foresight) = (metrics.clone(), Foresight::new(fetcher.clone()));
        Self { fetcher, foresight, cache, views: lru(4096, FILES_BYTES), fills: Arc::default(), metrics }
    }

    /// A reader that fetches from elsewhere, into the same cache. A file has one filler at a time among all of them.
    #[must_use]
    pub fn of(&self, fetcher: Fetcher) -> Self {
        let (cache, fills, metrics) = (Arc::clone(&self.cache), Arc::clone(&self.fills), self.metrics.clone());
        let foresight = Foresight::new(fetcher.clone());
        Self { fetcher, foresight, cache, views: lru(64, FILES_OF_VIEW_BYTES), fills, metrics }
    }

    /// Up to `length` bytes of a file from `offset` on; fewer only at its end. Cancel safe: what was kept stays kept,
    /// and other readers of the same chunks go on.
    ///
    /// # Errors
    /// When content cannot be fetched, or its patches do not fit.
    pub async fn read(
        &self,
        node: NodeId,
        (tree, table, entry): (&Tree, &StringTable, EntryNumber),
        offset: u64,
        length: u32,
    ) -> Result<Bytes, FsError> {
        let file = tree.file(entry).ok_or(FsError::WrongKind("a regular file"))?;
        let end = offset.saturating_add(u64::from(length)).min(file.size);
        if offset >= end {
            return Ok(Bytes::new());
        }
        let view = self.view(node, &file, table)?;
        if let Some(bytes) = self.read_hot(&file, &view, offset..end).await {
            return Ok(bytes);
        }
        let lease = Lease::take(self, &view, file.chunks.len()).await;
        let site = Site { node, tree, entry, file };
        self.foresight.read(&site, &(offset..end), |chunks| lease.fill.missing(chunks));
        lease.read(&site, &view, offset..end).await
    }

    fn view(&self, node: NodeId, file: &TreeFile<'_>, table: &StringTable) -> Result<Arc<FileView>, FsError> {
        let make = || {
            if file.patches.is_empty() {
                let (content, patches) = (file.id.into(), PatchList::default());
                return Ok(Arc::new(FileView { content, size: file.size, patches, table_bytes: 0 }));
            }
            let patches = PatchList::resolve(&file.patches.to_vec(), table, file.size).map_err(FsError::Restore)?;
            let (content, table_bytes) = (patches.content_id(&file.id), table.encoded_len());
            Ok(Arc::new(FileView { content, size: file.size, patches, table_bytes }))
        };
        self.views.get_or_insert_with(&node, make)
    }

    /// The range from the complete file. Anything wrong with that is a miss.
    async fn read_hot(&self, file: &TreeFile<'_>, view: &Arc<FileView>, range: Range<u64>) -> Option<Bytes> {
        let (cache, view) = (Arc::clone(&self.cache), Arc::clone(view));
        let wanted = Wanted::of(file, &chunks_of(file, &range));
        let bytes = on_disk(move || {
            let file = cache.open_hot(&view.content, view.size)?;
            let found = wanted.read(&file, &view);
            if found.is_none() {
                cache.drop_damaged(&view.content);
            }
            let start = wanted.span.start;
            let at = |offset: u64| usize::try_from(offset - start).unwrap_or(usize::MAX);
            Some(found?.slice(at(range.start)..at(range.end)))
        });
        let bytes = bytes.await;
        if let Some(bytes) = &bytes {
            self.metrics.cache_hit_bytes.inc_by(bytes.len() as u64);
        }
        bytes
    }
}

/// Consecutive chunks to be read from the cache: where they are in their file, and what they have to be.
struct Wanted {
    span: Range<u64>,
    chunks: Vec<(ChunkId, u64)>,
}

impl Wanted {
    fn of(file: &TreeFile<'_>, run: &Range<usize>) -> Self {
        let ids = file.chunks.get(run.clone()).unwrap_or_default();
        let ends = file.chunk_ends.get(run.clone()).unwrap_or_default();
        Self { span: span_of(file, run), chunks: ids.iter().copied().zip(ends.iter().copied()).collect() }
    }

    /// The bytes, if they can be read and are the right ones.
    fn read(&self, file: &File, view: &FileView) -> Option<Bytes> {
        let bytes = read_range(file, self.span.clone()).ok()?;
        let mut scrubbed = Cow::Borrowed(bytes.as_ref());
        if !view.patches.is_empty() && !view.patches.take_out(self.span.start, scrubbed.to_mut()) {
            return None;
        }
        let mut rest = scrubbed.as_ref();
        let mut start = self.span.start;
        for (id, end) in &self.chunks {
            let (chunk, after) = rest.split_at_checked(usize::try_from(end - start).ok()?)?;
            if ChunkId::of(chunk) != *id {
                return None;
            }
            (rest, start) = (after, *end);
        }
        Some(bytes)
    }
}

/// One reader's share in the filling of a file. The last one to go takes the fill with it.
struct Lease<'a> {
    reader: &'a Reader,
    content: ContentId,
    fill: Arc<Fill>,
}

impl<'a> Lease<'a> {
    async fn take(reader: &'a Reader, view: &FileView, chunks: usize) -> Self {
        let fresh = || Arc::new(Fill::new(view.content, view.size, chunks));
        let fill = {
            let mut fills = reader.fills.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(fills.entry(view.content).or_insert_with(fresh))
        };
        let lease = Self { reader, content: view.content, fill };
        // Outside the lock: it looks at the disk.
        if view.size > WHOLE_MAX {
            lease.fill.open(&reader.cache).await;
        }
        lease
    }

    async fn read(&self, site: &Site<'_>, view: &Arc<FileView>, range: Range<u64>) -> Result<Bytes, FsError> {
        let file = &site.file;
        let mut out = vec![0; usize::try_from(range.end - range.start).unwrap_or(usize::MAX)];
        let wanted = if file.size <= WHOLE_MAX { 0..file.chunks.len() } else { chunks_of(file, &range) };
        let mut left: Vec<usize> = wanted.collect();
        while !left.is_empty() {
            let Share { present, mine, others, changed } = self.fill.share(&left);
            left.clear();
            for run in runs(&present) {
                if !self.copy_present(file, view, &run, &range, &mut out).await {
                    if self.fill.lost(run.clone()) {
                        let (cache, content) = (Arc::clone(&self.reader.cache), self.content);
                        on_disk(move || cache.drop_damaged(&content)).await;
                    }
                    left.extend(run);
                }
            }
            let fetched = try_join_all(runs(mine.chunks()).into_iter().map(|run| async move {
                self.reader.foresight.fetch(site, &run);
                let content = self.fetch(file, view, run.clone()).await?;
                Ok::<_, FsError>((run, content))
            }));
            for (run, content) in fetched.await? {
                let start = span_of(file, &run).start;
                copy_overlap(&content, start, &range, &mut out);
                self.fill.keep(&self.reader.cache, run.clone(), start, content).await;
                self.keep_beside(file, view, run).await;
            }
            drop(mine);
            if !others.is_empty() {
                changed.await;
                left.extend(others);
            }
        }
        Ok(out.into())
    }

    /// Keeps what else of the file came in the frames of a run: who reads here and there in a long file mostly comes back
    /// to it when the frame is not in memory any more. Best effort.
    async fn keep_beside(&self, file: &TreeFile<'_>, view: &FileView, run: Range<usize>) {
        let fetcher = &self.reader.fetcher;
        let is_here =
            |chunk: &usize| file.chunks.get(*chunk).is_some_and(|id| fetcher.nearness(&(*id).into()) == Nearness::Here);
        let before = (run.start.saturating_sub(BESIDE_MAX)..run.start).rev().take_while(is_here).count();
        let after = (run.end..file.chunks.len()).take(BESIDE_MAX).take_while(is_here).count();
        let beside: Vec<usize> = (run.start - before..run.start).chain(run.end..run.end + after).collect();
        let claim = self.fill.share(&beside).mine;
        for run in runs(claim.chunks()) {
            let fetched = tokio::time::timeout(BESIDE_TIMEOUT, self.fetch(file, view, run.clone())).await;
            let Ok(Ok(content)) = fetched else { return };
            self.fill.keep(&self.reader.cache, run.clone(), span_of(file, &run).start, content).await;
        }
    }

    /// Copies what the partial file has of a run into the answer. False if it could not be read, or is not right.
    async fn copy_present(
        &self,
        file: &TreeFile<'_>,
        view: &Arc<FileView>,
        run: &Range<usize>,
        range: &Range<u64>,
        out: &mut [u8],
    ) -> bool {
        let span = span_of(file, run);
        if span.end <= range.start || span.start >= range.end {
            return true;
        }
        let Some(data) = self.fill.data() else { return false };
        let (wanted, view, start) = (Wanted::of(file, run), Arc::clone(view), span.start);
        let Some(bytes) = on_disk(move || wanted.read(&data, &view)).await else { return false };
        self.reader.metrics.cache_hit_bytes.inc_by(bytes.len() as u64);
        copy_overlap(&bytes, start, range, out);
        true
    }

    /// Consecutive chunks of the file, restored.
    async fn fetch(&self, file: &TreeFile<'_>, view: &FileView, run: Range<usize>) -> Result<Vec<u8>, FsError> {
        let ids = file.chunks.get(run.clone()).unwrap_or_default();
        let blobs: Vec<(BlobKind, BlobId)> = ids.iter().map(|id| (BlobKind::Chunk, (*id).into())).collect();
        let chunks = self.reader.fetcher.fetch(&blobs).await.map_err(FsError::Content)?;
        let span = span_of(file, &run);
        let mut content = Vec::with_capacity(usize::try_from(span.end - span.start).unwrap_or(0));
        for chunk in chunks {
            content.extend_from_slice(&chunk);
        }
        // The manifest says how long each chunk is, and the id says which bytes it has; both are signed for.
        if content.len() as u64 != span.end - span.start {
            let field = "chunk length";
            return Err(FsError::Restore(narlake_format::error::FormatError::Syntax { field, offset: span.start }));
        }
        view.patches.restore(span.start, &mut content);
        self.reader.metrics.cache_fill_bytes.inc_by(content.len() as u64);
        Ok(content)
    }
}

impl Drop for Lease<'_> {
    fn drop(&mut self) {
        let mut fills = self.reader.fills.lock().unwrap_or_else(PoisonError::into_inner);
        // The map's and this one.
        if Arc::strong_count(&self.fill) == 2 {
            fills.remove(&self.content);
        }
    }
}

/// Numbers of the chunks that a range touches.
fn chunks_of(file: &TreeFile<'_>, range: &Range<u64>) -> Range<usize> {
    let first = file.chunk_ends.partition_point(|end| *end <= range.start);
    let last = file.chunk_ends.partition_point(|end| *end < range.end);
    first..(last + 1).min(file.chunk_ends.len())
}

/// Where a run of chunks lies in its file.
fn span_of(file: &TreeFile<'_>, run: &Range<usize>) -> Range<u64> {
    let end_of = |chunk: usize| file.chunk_ends.get(chunk).copied().unwrap_or(file.size);
    let start = run.start.checked_sub(1).map_or(0, end_of);
    start..run.end.checked_sub(1).map_or(start, end_of)
}

/// Consecutive numbers of a sorted list, as ranges.
fn runs(chunks: &[usize]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for &chunk in chunks {
        match runs.last_mut() {
            Some(run) if run.end == chunk => run.end += 1,
            _ => runs.push(chunk..chunk + 1),
        }
    }
    runs
}

/// Copies what `content`, which starts at `start` of the file, has of `range` into `out`, which is that range.
fn copy_overlap(content: &[u8], start: u64, range: &Range<u64>, out: &mut [u8]) {
    let end = start + content.len() as u64;
    let (from, to) = (start.max(range.start), end.min(range.end));
    if from >= to {
        return;
    }
    let at = |offset: u64, base: u64| usize::try_from(offset - base).unwrap_or(usize::MAX);
    let source = content.get(at(from, start)..at(to, start));
    let target = out.get_mut(at(from, range.start)..at(to, range.start));
    if let (Some(source), Some(target)) = (source, target) {
        target.copy_from_slice(source);
    }
}

fn read_range(file: &File, range: Range<u64>) -> io::Result<Bytes> {
    let mut bytes = vec![0; usize::try_from(range.end - range.start).unwrap_or(usize::MAX)];
    file.read_exact_at(&mut bytes, range.start)?;
    Ok(bytes.into())
}

/// Runs blocking work on the disk where it holds nobody up.
async fn on_disk<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    crate::error::joined(tokio::task::spawn_blocking(work)).await
}
