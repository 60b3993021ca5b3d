//! The index from nothing: segments of the bucket, then the footers of packs that no segment covers.

use std::collections::HashSet;
use std::sync::{Arc, PoisonError};

use futures::{StreamExt, TryStreamExt};
use narlake_format::id::SegmentId;
use narlake_format::lake::keys::{self, Key};
use narlake_format::lake::location::PackRef;
use narlake_format::lake::pack::PackFooter;
use narlake_format::lake::segment::Segment;

use super::Index;
use super::map::MappedFile;
use crate::bucket::{Bucket, ObjectInfo};
use crate::error::{Error, ErrorKind};
use crate::pack;

/// Objects read at once.
const PARALLEL: usize = 16;
/// Packs between two lines of progress in the log.
const PROGRESS_PACKS: usize = 500;

impl Index {
    pub(super) async fn rebuild(self: &Arc<Self>) -> Result<(), Error> {
        // Packs before segments: a segment written in between then covers packs that are read twice, never too few.
        let packs: Vec<(PackRef, ObjectInfo)> = self
            .bucket
            .list(keys::PACKS, None)
            .await?
            .into_iter()
            .filter_map(|object| Some((keys::parse_pack(&object.key)?, object)))
            .collect();
        let marks = self.bucket.list(keys::DAMAGED, None).await?;
        {
            let mut tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
            tables.packs = packs.iter().map(|(pack, _)| *pack).collect();
            for (pack, frame_offset) in marks.iter().filter_map(|mark| damaged_frame(&mark.key)) {
                tables.damaged.entry(pack).or_default().insert(frame_offset);
            }
        }
        let covered = self.load_segments().await?;
        self.forget_lost_packs(&packs)?;
        let uncovered: Vec<_> = packs.into_iter().filter(|(pack, _)| !covered.contains(pack)).collect();
        if !uncovered.is_empty() {
            tracing::info!(packs = uncovered.len(), "reading the footers of packs that no segment covers");
        }
        self.take_in(uncovered).await
    }

    /// Reads the footers of these packs and enters what they hold.
    pub(super) async fn take_in(self: &Arc<Self>, packs: Vec<(PackRef, ObjectInfo)>) -> Result<(), Error> {
        let total = packs.len();
        let mut footers = futures::stream::iter(packs)
            .map(|(pack, object)| async move { (pack, object.size, footer_of(&self.bucket, &object).await) })
            .buffer_unordered(PARALLEL)
            .enumerate();
        while let Some((done, (pack, size, footer))) = footers.next().await {
            match footer {
                Ok(footer) => self.add(pack, size, footer.locations(pack)),
                // Its content is a miss then; what refers to it is reported by those who read it.
                Err(error) if error.kind() != ErrorKind::Unavailable => {
                    self.metrics.verification_failures.inc();
                    tracing::error!(pack = %keys::pack(&pack), error = error.chain(), "pack left out of the index");
                    self.reject(&pack);
                }
                Err(error) => return Err(error),
            }
            if (done + 1) % PROGRESS_PACKS == 0 {
                tracing::info!(done = done + 1, total, "taking in packs");
            }
            // What was read is known, whether a segment can be made of it or not; up to a point.
            if let Err(error) = self.flush_full().await {
                tracing::warn!(error = error.chain(), "index segment not written");
                self.check_room().await?;
            }
        }
        self.report();
        Ok(())
    }

    fn reject(&self, pack: &PackRef) {
        self.forget_pack(pack);
        self.tables.write().unwrap_or_else(PoisonError::into_inner).rejected.insert(*pack);
    }

    /// Loads every segment of the bucket and says which packs they cover.
    async fn load_segments(&self) -> Result<HashSet<PackRef>, Error> {
        let listed: Vec<SegmentId> = self
            .bucket
            .list(keys::SEGMENTS, None)
            .await?
            .into_iter()
            .filter_map(|object| keys::parse_segment(&object.key).filter(|(level, _)| *level == 0))
            .map(|(_, id)| id)
            .collect();
        self.drop_stale_copies(&listed)?;
        let segments: Vec<Option<Segment<MappedFile>>> = futures::stream::iter(listed)
            .map(|id| async move { self.load_or_fetch(&id).await })
            .buffered(PARALLEL)
            .try_collect()
            .await?;
        let mut covered = HashSet::new();
        let mut tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
        for segment in segments.into_iter().flatten() {
            covered.extend(segment.packs().iter().copied());
            if let Some(pack) = segment.packs().first() {
                let domain = pack.domain;
                tables.domains.entry(domain).or_default().segments.push(segment);
            }
        }
        Ok(covered)
    }

    /// The local copy of a segment if it is whole, else that of the bucket. A segment that is damaged in the bucket is
    /// left out: the footers of its packs are read instead.
    async fn load_or_fetch(&self, id: &SegmentId) -> Result<Option<Segment<MappedFile>>, Error> {
        let path = self.directory.join(id.to_string());
        if let Ok(mapped) = MappedFile::open(&path)
            && let Ok(segment) = Segment::open(mapped)
        {
            return Ok(Some(segment));
        }
        let bytes = match self.bucket.get(&keys::segment(0, id)).await {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let loaded = self.keep(id, &bytes).and_then(|()| self.map(id));
        match loaded {
            Ok(segment) => Ok(Some(segment)),
            Err(error) if error.kind() == ErrorKind::Corrupt => {
                tracing::error!(segment = %id, error = error.chain(), "segment left out of the index");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn drop_stale_copies(&self, listed: &[SegmentId]) -> Result<(), Error> {
        let listed: HashSet<String> = listed.iter().map(SegmentId::to_string).collect();
        let entries =
            std::fs::read_dir(&self.directory).map_err(|e| Error::state("list segments", &self.directory, e))?;
        for entry in entries.flatten() {
            if !entry.file_name().to_str().is_some_and(|name| listed.contains(name)) {
                // Only copies live here; what cannot be removed merely stays.
                let _ = std::fs::remove_file(entry.path());
            }
        }
        Ok(())
    }

    fn forget_lost_packs(&self, packs: &[(PackRef, ObjectInfo)]) -> Result<(), Error> {
        let there: HashSet<&str> = packs.iter().map(|(_, object)| object.key.as_str()).collect();
        for pair in self.kv.packs.iter() {
            let (key, _) = pair?;
            if !std::str::from_utf8(&key).is_ok_and(|key| there.contains(key)) {
                self.kv.packs.remove(&key)?;
            }
        }
        for (_, object) in packs {
            self.kv.packs.put(object.key.as_bytes(), &object.size.to_le_bytes())?;
        }
        Ok(())
    }
}

/// The frame that a mark is on.
fn damaged_frame(key: &str) -> Option<(PackRef, u32)> {
    match key.parse() {
        Ok(Key::Damaged(pack, frame_offset)) => Some((pack, frame_offset)),
        _ => None,
    }
}

async fn footer_of(bucket: &Bucket, object: &ObjectInfo) -> Result<PackFooter, Error> {
    pack::read_footer(&object.key, object.size, |range| bucket.get_range(&object.key, range)).await
}
