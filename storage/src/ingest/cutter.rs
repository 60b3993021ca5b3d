//! The thread that turns NAR bytes into chunks and a manifest.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use narlake_format::id::{BlobId, BlobKind, ChunkId, FILE_ID_INLINE_MAX, FileId, LongFileHasher, ManifestId};
use narlake_format::lake::chunker::{Chunker, ChunkerVersion};
use narlake_format::lake::frame::FrameContent;
use narlake_format::lake::location::PackRef;
use narlake_format::lake::manifest::ManifestWriter;
use narlake_format::lake::scrub::{Patch, ScrubVersion, Scrubber};
use narlake_format::lake::strings::StringTable;
use narlake_format::limits::TABLE_INLINE_MAX;
use narlake_format::nar::{Event, Reader};
use narlake_format::nix::hash::{Sha256Hash, Sha256Hasher};
use tokio::sync::mpsc;

use super::outlet::Outlet;
use super::{IngestStats, Intake};
use crate::error::Error;
use crate::index::Index;
use crate::pack::writer::Session;

/// Blobs of this push whose frames may not have been appended yet; beyond, those that have are forgotten.
const FRESH_MAX: usize = 1 << 16;

/// Scrubbed bytes that are hashed and cut in one go, where a file has as many: a few pieces at full speed, and what is
/// left over and moved to the front each time is little beside it. Fits the cache of a core.
const STRETCH: usize = 4 * LongFileHasher::PIECE;

/// What cutting a whole NAR gives.
pub(super) struct Cut {
    /// Where the cutter was to compute it.
    pub(super) nar_hash: Option<Sha256Hash>,
    pub(super) finished: ManifestId,
    pub(super) strings: StringTable,
    pub(super) nar_size: u64,
    pub(super) stats: IngestStats,
    pub(super) outlet: Outlet,
    /// Packs in the bucket that dedup hits rely on.
    pub(super) relied: HashSet<PackRef>,
}

/// Reads one NAR.
pub(super) struct Cutter {
    nar_size_max: u64,
    /// For NarHash, unless another thread computes it.
    hasher: Option<Sha256Hasher>,
    scrubber: Scrubber,
    chunker: Chunker,
    tree: Tree,
    /// Scrubbed bytes of the file that is open: those behind its last chunk, and those not hashed yet.
    scrubbed: Vec<u8>,
    /// How many of them are in chunks.
    cut: usize,
    /// How many of them the file's own id covers.
    hashed: usize,
    patches: Vec<Patch>,
}

impl Cutter {
    pub(super) fn new(intake: &Intake, session: Session, hashes: bool) -> Self {
        Self {
            nar_size_max: intake.nar_size_max,
            hasher: hashes.then(Sha256Hasher::new),
            scrubber: Scrubber::new(&intake.store_dir),
            chunker: Chunker::new(),
            tree: Tree {
                manifest: ManifestWriter::new(ScrubVersion::V1, ChunkerVersion::V1),
                file: OpenFile::default(),
                blobs: Blobs {
                    index: Arc::clone(&intake.index),
                    outlet: Outlet::new(session, Arc::clone(&intake.cpu)),
                    data: FrameContent::default(),
                    metadata: FrameContent::default(),
                    fresh: HashMap::new(),
                    relied: HashSet::new(),
                    stats: IngestStats::default(),
                },
            },
            scrubbed: Vec::new(),
            cut: 0,
            hashed: 0,
            patches: Vec::new(),
        }
    }

    /// Runs until the input ends. Blocks; for a thread of its own.
    pub(super) fn run(mut self, mut input: mpsc::Receiver<Arc<[Bytes]>>) -> Result<Cut, Error> {
        let mut reader = Reader::new();
        while let Some(batch) = input.blocking_recv() {
            for bytes in batch.iter() {
                if let Some(hasher) = &mut self.hasher {
                    hasher.update(bytes);
                }
                reader.feed(bytes, &mut |event| self.event(event))?;
            }
            if reader.offset() > self.nar_size_max {
                return Err(Error::TooLarge { what: "NAR", limit: self.nar_size_max, unit: "bytes" });
            }
        }
        reader.finish()?;
        let strings = self.scrubber.finish();
        let finished = self.tree.finish(&strings)?;
        let Blobs { outlet, relied, stats, .. } = self.tree.blobs;
        outlet.drain()?;
        let nar_hash = self.hasher.map(Sha256Hasher::finish);
        Ok(Cut { nar_hash, finished, strings, nar_size: reader.offset(), stats, outlet, relied })
    }

    fn event(&mut self, event: Event<'_>) -> Result<(), Error> {
        match event {
            Event::Directory => self.tree.manifest.directory().map_err(Error::Unstorable)?,
            Event::Entry { name } => self.tree.manifest.entry(name).map_err(Error::Unstorable)?,
            Event::EndDirectory => self.tree.manifest.end_directory().map_err(Error::Unstorable)?,
            Event::Symlink { target } => self.symlink(target)?,
            Event::File { executable, size } => {
                self.tree.begin_file(executable, size)?;
                self.chunker.begin(size);
            }
            Event::Data(bytes) => {
                for bytes in bytes.chunks(STRETCH) {
                    self.scrubber.write(bytes, &mut self.scrubbed, &mut self.patches);
                    self.take_patches();
                    if self.scrubbed.len() - self.cut >= STRETCH {
                        self.forward(self.whole_pieces())?;
                    }
                }
            }
            Event::EndFile => {
                self.scrubber.end(&mut self.scrubbed, &mut self.patches);
                self.take_patches();
                self.forward(self.scrubbed.len())?;
                self.chunker.end();
                self.tree.end_file()?;
            }
        }
        self.tree.store_parts()
    }

    fn symlink(&mut self, target: &[u8]) -> Result<(), Error> {
        self.scrubber.write(target, &mut self.scrubbed, &mut self.patches);
        self.scrubber.end(&mut self.scrubbed, &mut self.patches);
        self.tree.manifest.symlink(&self.scrubbed, &self.patches).map_err(Error::Unstorable)?;
        self.scrubbed.clear();
        self.patches.clear();
        Ok(())
    }

    /// Notes what the scrubber took out.
    fn take_patches(&mut self) {
        for patch in self.patches.drain(..) {
            let length = self.scrubber.span_length(&patch);
            self.tree.file.patch(patch, length);
        }
    }

    /// The end of the last whole piece that can be hashed.
    fn whole_pieces(&self) -> usize {
        self.scrubbed.len() - (self.scrubbed.len() - self.hashed) % LongFileHasher::PIECE
    }

    /// Hashes what the scrubber let go, up to `hash_to`, and cuts all of it as far as the file has come.
    fn forward(&mut self, hash_to: usize) -> Result<(), Error> {
        if let Some(hasher) = &mut self.tree.file.long {
            hasher.update(&self.scrubbed[self.hashed..hash_to]);
        }
        self.hashed = hash_to;
        let tree = &mut self.tree;
        self.cut += self.chunker.cut(&self.scrubbed[self.cut..], &mut |chunk| tree.chunk(chunk))?;
        let done = self.cut.min(self.hashed);
        self.scrubbed.drain(..done);
        self.cut -= done;
        self.hashed -= done;
        Ok(())
    }
}

/// The manifest under construction and where its content goes.
struct Tree {
    manifest: ManifestWriter,
    file: OpenFile,
    blobs: Blobs,
}

/// The file that is being cut.
#[derive(Default)]
struct OpenFile {
    size: u64,
    long: Option<LongFileHasher>,
    only: Option<ChunkId>,
    /// Where the next chunk starts.
    offset: u64,
    /// Where the last patch ends.
    patched: u64,
    /// Patches found beyond the last chunk, with the offset at which each starts.
    ahead: VecDeque<(u64, Patch)>,
}

impl OpenFile {
    fn patch(&mut self, patch: Patch, length: u64) {
        let start = self.patched + patch.gap;
        self.patched = start + length;
        self.ahead.push_back((start, patch));
    }
}

impl Tree {
    fn begin_file(&mut self, executable: bool, size: u64) -> Result<(), Error> {
        let long = (size > FILE_ID_INLINE_MAX).then(LongFileHasher::new);
        self.file = OpenFile { size, long, ..OpenFile::default() };
        self.manifest.begin_file(executable, size).map_err(Error::Unstorable)
    }

    fn chunk(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let id = ChunkId::of(bytes);
        self.manifest.chunk(id, u32::try_from(bytes.len()).unwrap_or(u32::MAX)).map_err(Error::Unstorable)?;
        self.file.offset += bytes.len() as u64;
        while let Some((start, patch)) = self.file.ahead.front().copied()
            && start < self.file.offset
        {
            self.manifest.patch(patch).map_err(Error::Unstorable)?;
            self.file.ahead.pop_front();
        }
        self.file.only = Some(id);
        if self.blobs.store(BlobKind::Chunk, id.into(), bytes)? {
            self.blobs.stats.chunks_new += 1;
            self.blobs.stats.bytes_new += bytes.len() as u64;
        } else {
            self.blobs.stats.chunks_known += 1;
        }
        Ok(())
    }

    fn end_file(&mut self) -> Result<(), Error> {
        // The reader gave exactly `size` bytes and the chunker has let all of them go.
        assert_eq!(self.file.offset, self.file.size, "the chunks of a file are the file");
        assert!(self.file.ahead.is_empty(), "every patch starts inside a chunk");
        let id = match (&self.file.long, self.file.only) {
            (Some(hasher), _) => hasher.finish(),
            (None, Some(only)) => FileId::of_short(&only),
            (None, None) => FileId::of(b""),
        };
        self.manifest.end_file(id).map_err(Error::Unstorable)
    }

    /// Stores the parts of the manifest that are complete.
    fn store_parts(&mut self) -> Result<(), Error> {
        for part in self.manifest.take_parts() {
            self.blobs.store(BlobKind::Part, part.id.into(), &part.bytes)?;
        }
        Ok(())
    }

    fn finish(&mut self, strings: &StringTable) -> Result<ManifestId, Error> {
        let manifest = std::mem::replace(&mut self.manifest, ManifestWriter::new(ScrubVersion::V1, ChunkerVersion::V1));
        let finished = manifest.finish().map_err(Error::Unstorable)?;
        for part in &finished.parts {
            self.blobs.store(BlobKind::Part, part.id.into(), &part.bytes)?;
        }
        self.blobs.store(BlobKind::Manifest, finished.id.into(), &finished.header_bytes)?;
        let table = strings.encode();
        // A short table goes into the path record.
        if table.len() > TABLE_INLINE_MAX {
            self.blobs.store(BlobKind::Table, strings.id().into(), &table)?;
        }
        self.blobs.flush()?;
        Ok(finished.id)
    }
}

/// Blobs on their way into frames, those that are known left out.
struct Blobs {
    index: Arc<Index>,
    outlet: Outlet,
    data: FrameContent,
    metadata: FrameContent,
    /// Blobs put into a frame by this push, with the frame's number.
    fresh: HashMap<BlobId, u64>,
    relied: HashSet<PackRef>,
    stats: IngestStats,
}

impl Blobs {
    /// Stores a blob, unless the lake or this push has it. True if it was new.
    fn store(&mut self, kind: BlobKind, id: BlobId, bytes: &[u8]) -> Result<bool, Error> {
        if self.fresh.contains_key(&id) {
            return Ok(false);
        }
        if let Some(at) = self.index.get(&self.outlet.domain(), &id) {
            self.relied.insert(at.pack);
            return Ok(false);
        }
        if let Some(pack) = self.outlet.pending(&id) {
            self.outlet.rely(pack);
            return Ok(false);
        }
        let data = kind == BlobKind::Chunk;
        let open = if data { &mut self.data } else { &mut self.metadata };
        if open.is_full_for(bytes.len()) {
            let full = std::mem::take(open);
            self.submit(full)?;
        }
        // The number of the frame it will be in, or an earlier one; good enough to know when it may be forgotten.
        self.fresh.insert(id, self.outlet.submitted());
        if data { &mut self.data } else { &mut self.metadata }.push(kind, id, bytes);
        Ok(true)
    }

    fn submit(&mut self, content: FrameContent) -> Result<(), Error> {
        if self.fresh.len() > FRESH_MAX {
            // A blob that is still in an open frame carries a number that may already be appended, so ask both.
            let appended = self.outlet.appended();
            let open: HashSet<BlobId> = self.data.blobs().iter().chain(self.metadata.blobs()).map(|b| b.id).collect();
            self.fresh.retain(|id, number| *number >= appended || open.contains(id));
        }
        for blob in content.blobs() {
            self.fresh.insert(blob.id, self.outlet.submitted());
        }
        self.outlet.submit(content)
    }

    /// Sends the open frames off: frames never hold content of two paths.
    fn flush(&mut self) -> Result<(), Error> {
        for content in [std::mem::take(&mut self.data), std::mem::take(&mut self.metadata)] {
            if !content.is_empty() {
                self.submit(content)?;
            }
        }
        Ok(())
    }
}
