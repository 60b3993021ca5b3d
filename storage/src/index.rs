//! Where content lies: blob id to pack, frame and place, one table per trust domain.
//!
//! New blobs are in a memtable; when it is full, and when the lake closes, it becomes a segment: an immutable sorted
//! file, put in the bucket and memory-mapped here. At start the index is made of the segments of the bucket plus the
//! footers of packs that no segment covers ([`rebuild`]), so nothing but the bucket is needed.
//!
//! What other servers have put since then, and what was taken for lost while the bucket was ill, is found when somebody
//! asks for content that has no place: before "nowhere" is said, the bucket is listed again ([`refresh`]).
//!
//! Invariant: an entry is given out only for a pack that the bucket listed or that was put since. A hit is a promise
//! that a push may rely on; a miss only costs a duplicate. So a push never hears of a copy in a pack that is condemned
//! (docs/consistency.md, rule 4), nor in one of which a frame failed to verify, since where one has rotted its
//! neighbours are suspect (rule 7). A reader does where there is no other: it verifies what it gets.

mod condemned;
pub mod map;
mod rebuild;
mod refresh;

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use bytes::Bytes;
use narlake_format::id::{BlobId, SegmentId};
use narlake_format::lake::keys;
use narlake_format::lake::location::{Domain, Location, PackRef};
use narlake_format::lake::segment::{Segment, SegmentBuilder};

use self::condemned::Condemned;
use self::map::MappedFile;
pub(crate) use self::refresh::Reach;
use self::refresh::Refreshed;
use crate::bucket::Bucket;
use crate::error::Error;
use crate::kv::Kv;
use crate::metrics::Metrics;
use crate::mint::Mint;

/// Blobs of a memtable beyond which pushes are refused: segments have not been written for long, and memory is finite.
const MEMTABLE_BLOBS_MAX: usize = 4 * MEMTABLE_BLOBS;

/// Blobs at which a memtable becomes a segment: about 12 MB of file, 30 MB of memory before.
const MEMTABLE_BLOBS: usize = 1 << 18;

/// The index of all domains.
pub(crate) struct Index {
    directory: PathBuf,
    bucket: Bucket,
    kv: Kv,
    mint: Mint,
    metrics: Metrics,
    // Held for look-ups and inserts only, never across an await.
    tables: RwLock<Tables>,
    /// Held while segments are written: two at once would write the same blobs.
    flushing: tokio::sync::Mutex<()>,
    /// The last listings of each domain. Held for a look-up only; each entry has a lock of its own.
    refreshed: Mutex<HashMap<Domain, Arc<Refreshed>>>,
    /// When everything was listed at start, in milliseconds since the Unix epoch.
    opened_ms: u64,
}

#[derive(Default)]
struct Tables {
    packs: HashSet<PackRef>,
    /// Packs of which frames failed to verify, and the offsets of those.
    damaged: HashMap<PackRef, HashSet<u32>>,
    /// Packs that are about to be deleted.
    condemned: Condemned,
    /// Packs that the bucket lists and that could not be read as such.
    rejected: HashSet<PackRef>,
    domains: HashMap<Domain, Table>,
}

#[derive(Default)]
struct Table {
    memtable: Memtable,
    segments: Vec<Segment<MappedFile>>,
}

/// What no segment has yet. A blob may lie in several packs, and is lost only with the last of them.
#[derive(Default)]
struct Memtable {
    newest: HashMap<BlobId, Location>,
    /// The others, of the few blobs that have some.
    older: HashMap<BlobId, Vec<Location>>,
}

impl Memtable {
    fn len(&self) -> usize {
        self.newest.len()
    }

    fn insert(&mut self, id: BlobId, at: Location) {
        if let Some(before) = self.newest.insert(id, at)
            && before.pack != at.pack
        {
            let older = self.older.entry(id).or_default();
            older.retain(|other| other.pack != at.pack && other.pack != before.pack);
            older.push(before);
        }
    }

    fn copies(&self, id: &BlobId) -> impl Iterator<Item = Location> {
        self.newest.get(id).copied().into_iter().chain(self.older.get(id).into_iter().flatten().copied())
    }

    fn iter(&self) -> impl Iterator<Item = (BlobId, Location)> {
        let older = self.older.iter().flat_map(|(id, copies)| copies.iter().map(|at| (*id, *at)));
        self.newest.iter().map(|(id, at)| (*id, *at)).chain(older)
    }

    fn remove(&mut self, id: &BlobId, at: &Location) {
        if let Some(older) = self.older.get_mut(id) {
            older.retain(|other| other != at);
            if older.is_empty() {
                self.older.remove(id);
            }
        }
        if self.newest.get(id) == Some(at) {
            self.newest.remove(id);
            // One that came in the meantime stays to be found.
            if let Some(next) = self.older.get_mut(id).and_then(Vec::pop) {
                self.newest.insert(*id, next);
            }
        }
    }
}

impl Index {
    /// Makes the index from the bucket. `directory` keeps copies of segments.
    ///
    /// # Errors
    /// Where the bucket or the directory does not serve.
    pub(crate) async fn open(
        directory: &Path,
        bucket: Bucket,
        kv: Kv,
        mint: Mint,
        metrics: Metrics,
    ) -> Result<Arc<Self>, Error> {
        let directory = directory.join("segments");
        std::fs::create_dir_all(&directory).map_err(|e| Error::state("create segment directory", &directory, e))?;
        let (tables, flushing, refreshed) = Default::default();
        let opened_ms = mint.now_ms();
        let index = Self { directory, bucket, kv, mint, metrics, tables, flushing, refreshed, opened_ms };
        let index = Arc::new(index);
        if let Err(error) = index.read_condemned().await {
            // A push asks again before it is acknowledged, and fails then if it has to.
            tracing::warn!(error = error.chain(), "condemned packs not known yet");
        }
        index.rebuild().await?;
        Ok(index)
    }

    /// Where a blob is, if this domain has it in a pack that may be relied on.
    pub(crate) fn get(&self, domain: &Domain, id: &BlobId) -> Option<Location> {
        self.tables.read().unwrap_or_else(PoisonError::into_inner).sound(domain, id)
    }

    /// Where blobs are to be read, in order.
    pub(crate) fn get_many(&self, domain: &Domain, ids: &[BlobId]) -> Vec<Option<Location>> {
        let tables = self.tables.read().unwrap_or_else(PoisonError::into_inner);
        ids.iter().map(|id| tables.best(domain, id)).collect()
    }

    /// Whether a pack is in the bucket and may be relied on, as far as is known here.
    pub(crate) fn is_sound(&self, pack: &PackRef) -> bool {
        self.tables.read().unwrap_or_else(PoisonError::into_inner).is_sound(pack)
    }

    /// Whether a blob has a copy that did not fail to verify so far.
    pub(crate) fn is_readable(&self, domain: &Domain, id: &BlobId) -> bool {
        let tables = self.tables.read().unwrap_or_else(PoisonError::into_inner);
        tables.copies(domain, id).any(|at| !tables.has_failed(&at))
    }

    /// Takes note that a frame does not verify. False if that was known.
    pub(crate) fn mark_damaged(&self, pack: &PackRef, frame_offset: u32) -> bool {
        let mut tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
        tables.damaged.entry(*pack).or_default().insert(frame_offset)
    }

    /// Takes note that the bucket does not hold a pack any more: what it held is a miss, until a listing shows the pack
    /// again.
    pub(crate) fn forget_pack(&self, pack: &PackRef) {
        self.tables.write().unwrap_or_else(PoisonError::into_inner).packs.remove(pack);
        if let Err(error) = self.kv.packs.remove(keys::pack(pack).as_bytes()) {
            tracing::warn!(%pack, error = error.chain(), "pack not struck off the local catalogue");
        }
        self.report();
    }

    /// Takes in a pack that the bucket holds now.
    pub(crate) fn add(&self, pack: PackRef, bytes: u64, blobs: impl IntoIterator<Item = (BlobId, Location)>) {
        {
            let mut tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
            tables.packs.insert(pack);
            tables.rejected.remove(&pack);
            let memtable = &mut tables.domains.entry(pack.domain).or_default().memtable;
            for (id, at) in blobs {
                memtable.insert(id, at);
            }
        }
        // The catalogue only saves work after a restart; the pack is found without it.
        if let Err(error) = self.kv.packs.put(keys::pack(&pack).as_bytes(), &bytes.to_le_bytes()) {
            tracing::warn!(pack = %keys::pack(&pack), error = error.chain(), "pack not entered in the local catalogue");
        }
        self.report();
    }

    /// Packs known, and their bytes.
    pub(crate) fn catalogue(&self) -> Result<(u64, u64), Error> {
        let mut packs = 0;
        let mut bytes = 0;
        for pair in self.kv.packs.iter() {
            let (_, value) = pair?;
            packs += 1;
            bytes += value.try_into().map_or(0, u64::from_le_bytes);
        }
        Ok((packs, bytes))
    }

    /// Turns each memtable of at least `least` blobs into a segment of the bucket.
    ///
    /// Not cancel safe: dropped midway it may leave a segment in the bucket that this process has not loaded, which
    /// does no harm.
    ///
    /// # Errors
    /// Where the bucket or the disk does not take it; the memtable then stays.
    pub(crate) async fn flush(self: &Arc<Self>, least: usize) -> Result<(), Error> {
        let _turn = self.flushing.lock().await;
        for domain in self.domains_with(least.max(1)) {
            let id = SegmentId(self.mint.ulid());
            // Sorting, and writing some megabytes, is too long for a thread that others wait for.
            let index = Arc::clone(self);
            let written = tokio::task::spawn_blocking(move || index.write(domain, &id)).await;
            let (entries, bytes) = written.map_err(|_| Error::Stopped("segment writer"))??;
            // The copy on disk came first: with a full disk no segment after the other goes to the bucket in vain.
            self.bucket.put_new(&keys::segment(0, &id), bytes).await?;
            let segment = self.map(&id)?;
            let mut tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
            let table = tables.domains.entry(domain).or_default();
            table.segments.push(segment);
            for (blob, at) in &entries {
                table.memtable.remove(blob, at);
            }
            table.memtable.newest.shrink_to(MEMTABLE_BLOBS / 8);
        }
        Ok(())
    }

    /// Turns memtables that are full into segments.
    pub(crate) async fn flush_full(self: &Arc<Self>) -> Result<(), Error> {
        self.flush(MEMTABLE_BLOBS).await
    }

    /// Refuses new content while segments cannot be written, with what is in the way of that.
    ///
    /// # Errors
    /// That of the segment tried now.
    pub(crate) async fn check_room(self: &Arc<Self>) -> Result<(), Error> {
        if self.domains_with(MEMTABLE_BLOBS_MAX).is_empty() { Ok(()) } else { self.flush_full().await }
    }

    fn domains_with(&self, least: usize) -> Vec<Domain> {
        let tables = self.tables.read().unwrap_or_else(PoisonError::into_inner);
        tables.domains.iter().filter(|(_, table)| table.memtable.len() >= least).map(|(domain, _)| *domain).collect()
    }

    /// Writes the local copy of a segment of all that is in a memtable now. Blocks.
    fn write(&self, domain: Domain, id: &SegmentId) -> Result<(Vec<(BlobId, Location)>, Bytes), Error> {
        let entries: Vec<(BlobId, Location)> = {
            let tables = self.tables.read().unwrap_or_else(PoisonError::into_inner);
            let memtable = tables.domains.get(&domain).map(|table| &table.memtable);
            memtable.into_iter().flat_map(Memtable::iter).collect()
        };
        let mut builder = SegmentBuilder::new();
        for (blob, at) in &entries {
            builder.add(*blob, at);
        }
        let bytes = Bytes::from(builder.finish());
        self.keep(id, &bytes)?;
        Ok((entries, bytes))
    }

    /// Keeps a copy of a segment on disk. One that did not make it to the bucket goes at the next start.
    fn keep(&self, id: &SegmentId, bytes: &[u8]) -> Result<(), Error> {
        let path = self.directory.join(id.to_string());
        let temporary = path.with_extension("new");
        let written = std::fs::write(&temporary, bytes).and_then(|()| std::fs::rename(&temporary, &path));
        written.map_err(|e| {
            // Half a file on a full disk would only be in the way of the next try.
            let _ = std::fs::remove_file(&temporary);
            Error::state("write segment", &path, e)
        })
    }

    fn map(&self, id: &SegmentId) -> Result<Segment<MappedFile>, Error> {
        let path = self.directory.join(id.to_string());
        let mapped = MappedFile::open(&path).map_err(|e| Error::state("map segment", &path, e))?;
        Segment::open(mapped).map_err(Error::format(path.display().to_string()))
    }

    fn report(&self) {
        let tables = self.tables.read().unwrap_or_else(PoisonError::into_inner);
        let blobs: u64 = tables
            .domains
            .values()
            .map(|table| table.memtable.len() as u64 + table.segments.iter().map(|s| s.len() as u64).sum::<u64>())
            .sum();
        self.metrics.index_blobs.set(i64::try_from(blobs).unwrap_or(i64::MAX));
        self.metrics.index_packs.set(i64::try_from(tables.packs.len()).unwrap_or(i64::MAX));
    }
}

impl Tables {
    /// Every copy of a blob, newest first, in packs that are there.
    fn copies(&self, domain: &Domain, id: &BlobId) -> impl Iterator<Item = Location> {
        let table = self.domains.get(domain);
        let recent = table.into_iter().flat_map(|table| table.memtable.copies(id));
        let older = table.into_iter().flat_map(|table| table.segments.iter().rev().flat_map(|s| s.get_all(id)));
        recent.chain(older).filter(|at| self.packs.contains(&at.pack))
    }

    fn has_failed(&self, at: &Location) -> bool {
        self.damaged.get(&at.pack).is_some_and(|frames| frames.contains(&at.frame_offset))
    }

    fn is_sound(&self, pack: &PackRef) -> bool {
        self.packs.contains(pack) && !self.damaged.contains_key(pack) && !self.condemned.contains(pack)
    }

    fn sound(&self, domain: &Domain, id: &BlobId) -> Option<Location> {
        self.copies(domain, id).find(|at| self.is_sound(&at.pack))
    }

    /// The copy to read: one that may be relied on, else one that has not failed yet, else any.
    fn best(&self, domain: &Domain, id: &BlobId) -> Option<Location> {
        self.sound(domain, id)
            .or_else(|| self.copies(domain, id).find(|at| !self.has_failed(at)))
            .or_else(|| self.copies(domain, id).next())
    }
}
