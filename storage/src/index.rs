//! Where content lies: blob id to pack, frame and place, one table per trust domain.
//!
//! New blobs are in a memtable; when it is full, and when the lake closes, it becomes a segment: an immutable sorted
//! file, put in the bucket and memory-mapped here. At start the index is made of the segments of the bucket plus the
//! footers of packs that no segment covers ([`rebuild`]), so nothing but the bucket is needed.
//!
//! Invariant: an entry is given out only for a pack that the bucket listed or that was put since. A hit is a promise
//! that a push may rely on; a miss only costs a duplicate. So a push never hears of a copy in a pack of which a frame
//! failed to verify, since where one has rotted its neighbours are suspect (docs/consistency.md, rule 7). A reader does
//! where there is no other: it verifies what it gets.

mod map;
mod rebuild;

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};

use bytes::Bytes;
use narlake_format::id::{BlobId, SegmentId};
use narlake_format::lake::keys;
use narlake_format::lake::location::{Domain, Location, PackRef};
use narlake_format::lake::segment::{Segment, SegmentBuilder};

use self::map::MappedFile;
use crate::bucket::Bucket;
use crate::error::Error;
use crate::kv::Kv;
use crate::metrics::Metrics;
use crate::mint::Mint;

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
}

#[derive(Default)]
struct Tables {
    packs: HashSet<PackRef>,
    /// Packs of which frames failed to verify, and the offsets of those.
    damaged: HashMap<PackRef, HashSet<u32>>,
    domains: HashMap<Domain, Table>,
}

#[derive(Default)]
struct Table {
    memtable: HashMap<BlobId, Location>,
    segments: Vec<Segment<MappedFile>>,
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
    ) -> Result<Self, Error> {
        let directory = directory.join("segments");
        std::fs::create_dir_all(&directory).map_err(|e| Error::state("create segment directory", &directory, e))?;
        let index = Self { directory, bucket, kv, mint, metrics, tables: RwLock::default() };
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

    /// Whether the bucket holds a pack, as far as is known here.
    pub(crate) fn has_pack(&self, pack: &PackRef) -> bool {
        self.tables.read().unwrap_or_else(PoisonError::into_inner).packs.contains(pack)
    }

    /// Takes note that a frame does not verify. False if that was known.
    pub(crate) fn mark_damaged(&self, pack: &PackRef, frame_offset: u32) -> bool {
        let mut tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
        tables.damaged.entry(*pack).or_default().insert(frame_offset)
    }

    /// Takes note that the bucket does not hold a pack any more: what it held is a miss from now on.
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
            let Tables { packs, damaged, domains } = &mut *tables;
            packs.insert(pack);
            let memtable = &mut domains.entry(pack.domain).or_default().memtable;
            for (id, at) in blobs {
                // At start packs come in any order: a damaged copy never takes the place of another.
                if damaged.contains_key(&pack) {
                    memtable.entry(id).or_insert(at);
                } else {
                    memtable.insert(id, at);
                }
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
    pub(crate) async fn flush(&self, least: usize) -> Result<(), Error> {
        let full: Vec<(Domain, Vec<(BlobId, Location)>)> = {
            let tables = self.tables.read().unwrap_or_else(PoisonError::into_inner);
            let full = tables.domains.iter().filter(|(_, table)| table.memtable.len() >= least.max(1));
            full.map(|(domain, table)| (*domain, table.memtable.iter().map(|(id, at)| (*id, *at)).collect())).collect()
        };
        for (domain, entries) in full {
            let id = SegmentId(self.mint.ulid());
            let mut builder = SegmentBuilder::new();
            for (blob, at) in &entries {
                builder.add(*blob, at);
            }
            let bytes = Bytes::from(builder.finish());
            self.bucket.put_new(&keys::segment(0, &id), bytes.clone()).await?;
            let segment = self.load(&id, &bytes)?;
            let mut tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
            let table = tables.domains.entry(domain).or_default();
            table.segments.push(segment);
            for (blob, at) in &entries {
                if table.memtable.get(blob) == Some(at) {
                    table.memtable.remove(blob);
                }
            }
        }
        Ok(())
    }

    /// Turns memtables that are full into segments.
    pub(crate) async fn flush_full(&self) -> Result<(), Error> {
        self.flush(MEMTABLE_BLOBS).await
    }

    /// Keeps a copy of a segment on disk and maps it.
    fn load(&self, id: &SegmentId, bytes: &[u8]) -> Result<Segment<MappedFile>, Error> {
        let path = self.directory.join(id.to_string());
        let temporary = path.with_extension("new");
        std::fs::write(&temporary, bytes).map_err(|e| Error::state("write segment", &temporary, e))?;
        std::fs::rename(&temporary, &path).map_err(|e| Error::state("write segment", &path, e))?;
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
        let recent = table.and_then(|table| table.memtable.get(id)).copied();
        let older = table.into_iter().flat_map(move |table| table.segments.iter().rev().filter_map(|s| s.get(id)));
        recent.into_iter().chain(older).filter(|at| self.packs.contains(&at.pack))
    }

    fn sound(&self, domain: &Domain, id: &BlobId) -> Option<Location> {
        self.copies(domain, id).find(|at| !self.damaged.contains_key(&at.pack))
    }

    /// The copy to read: one that may be relied on, else one that has not failed yet, else any.
    fn best(&self, domain: &Domain, id: &BlobId) -> Option<Location> {
        let failed = |at: &Location| self.damaged.get(&at.pack).is_some_and(|frames| frames.contains(&at.frame_offset));
        self.sound(domain, id)
            .or_else(|| self.copies(domain, id).find(|at| !failed(at)))
            .or_else(|| self.copies(domain, id).next())
    }
}
