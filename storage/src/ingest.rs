//! A NAR comes in: read strictly, scrubbed, cut, deduplicated, compressed, packed.
//!
//! ```text
//! stream -+-> NarHash (own thread, or the cutter's)
//!         +-> cutter (own thread): nar::Reader -> Scrubber -> Chunker -> known? -> frames -> CpuPool -> open pack
//!                                                     \-> ManifestWriter -> parts -> frames ---/
//! ```
//!
//! Memory is bounded whatever the NAR's size: queues between the stages are short and block, so a slow bucket slows the
//! client down. When [`ingest`] returns, everything it names is in the bucket; nothing is visible to anybody yet, that
//! is up to `publish`.

mod cutter;
mod outlet;

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use futures::stream::Fuse;
use futures::{FutureExt, Stream, StreamExt};
use narlake_format::id::{ManifestId, TableId};
use narlake_format::lake::location::{Domain, PackRef};
use narlake_format::lake::strings::StringTable;
use narlake_format::nix::hash::{Sha256Hash, Sha256Hasher};
use narlake_format::nix::store_path::StoreDir;
use tokio::sync::mpsc;

use self::cutter::{Cut, Cutter};
use crate::cpu::CpuPool;
use crate::error::Error;
use crate::index::Index;
use crate::metrics::Metrics;
use crate::pack::writer::PackWriter;

/// Bytes of the client's that go to a stage at once, where as many are there: each handing over wakes a thread.
const BATCH_BYTES: usize = 256 << 10;

/// Pieces in such a batch, at most: a client may send a byte at a time.
const BATCH_PIECES: usize = 64;

/// Batches that may wait before a stage.
const QUEUE: usize = 4;

/// What one NAR came to.
#[derive(Debug, Clone)]
pub struct Ingested {
    /// SHA-256 of the NAR.
    pub nar_hash: Sha256Hash,
    /// Bytes of the NAR.
    pub nar_size: u64,
    /// The tree.
    pub manifest: ManifestId,
    /// What scrubbing took out.
    pub table: TableId,
    /// The same, itself.
    pub strings: StringTable,
    /// Every pack relied on, new or old, sorted.
    pub packs: Vec<PackRef>,
    /// What was new and what was known.
    pub stats: IngestStats,
}

/// What was new in one NAR and what was known.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct IngestStats {
    /// Chunks that the lake did not have.
    pub chunks_new: u64,
    /// Chunks that it had, or that this NAR repeats.
    pub chunks_known: u64,
    /// Bytes of new chunks.
    pub bytes_new: u64,
    /// Bytes of new chunks, manifest parts and tables as stored, compressed.
    pub bytes_stored: u64,
}

/// The parts of the engine that taking in a NAR needs.
#[derive(Clone)]
pub(crate) struct Intake {
    pub(crate) store_dir: StoreDir,
    pub(crate) nar_size_max: u64,
    pub(crate) index: Arc<Index>,
    pub(crate) writer: PackWriter,
    pub(crate) cpu: Arc<CpuPool>,
    pub(crate) metrics: Metrics,
}

impl Intake {
    /// Takes a NAR in. Dropped midway it leaves unreferenced bytes at most.
    ///
    /// # Errors
    /// `Invalid` for a malformed NAR, `TooLarge` for one that does not end in time, `Closed` where the stream breaks
    /// off, the bucket's own where a pack cannot be written.
    pub(crate) async fn ingest<S>(&self, domain: Domain, nar: S) -> Result<Ingested, Error>
    where
        S: Stream<Item = io::Result<Bytes>> + Unpin,
    {
        let start = tokio::time::Instant::now();
        let (to_hash, hash_input) = mpsc::channel(QUEUE);
        let (to_cut, cut_input) = mpsc::channel(QUEUE);
        let session = self.writer.begin(domain);
        // One stream is twice as fast with two threads; where there are as many pushes as processors, a second thread
        // has nowhere to run, and the bytes are read from memory twice.
        let beside = self.writer.writing() < self.cpu.threads();
        let hashing = beside.then(|| tokio::task::spawn_blocking(move || hash(hash_input)));
        let cutter = Cutter::new(self, session, !beside);
        let cutting = tokio::task::spawn_blocking(move || cutter.run(cut_input));
        let mut nar = nar.fuse();
        while let Some(batch) = batch(&mut nar).await {
            let batch: Arc<[Bytes]> = batch.map_err(Error::Body)?.into();
            // A stage that has stopped says why when it is joined.
            if to_cut.send(Arc::clone(&batch)).await.is_err() || (beside && to_hash.send(batch).await.is_err()) {
                break;
            }
        }
        drop((to_cut, to_hash));
        let Cut { nar_hash, finished, strings, nar_size, stats, outlet, relied } =
            cutting.await.map_err(|_| Error::Stopped("cutter"))??;
        let nar_hash = match (nar_hash, hashing) {
            (Some(nar_hash), _) => nar_hash,
            (None, Some(hashing)) => hashing.await.map_err(|_| Error::Stopped("hasher"))?,
            (None, None) => return Err(Error::Stopped("hasher")),
        };
        let (session, pending, bytes_stored) = outlet.close()?;
        let mut packs = session.commit(pending).await?;
        packs.extend(relied);
        packs.sort_unstable();
        packs.dedup();
        let stats = IngestStats { bytes_stored, ..stats };
        self.metrics.ingest_nar_bytes.inc_by(nar_size);
        self.metrics.ingest_chunks.with_label_values(&["new"]).inc_by(stats.chunks_new);
        self.metrics.ingest_chunks.with_label_values(&["known"]).inc_by(stats.chunks_known);
        self.metrics.ingest_new_bytes.inc_by(stats.bytes_new);
        self.metrics.ingest_seconds.observe(start.elapsed().as_secs_f64());
        Ok(Ingested { nar_hash, nar_size, manifest: finished, table: strings.id(), strings, packs, stats })
    }
}

/// The next bytes, and those behind them that are there already. Not cancel safe: bytes taken are lost.
async fn batch<S>(nar: &mut Fuse<S>) -> Option<io::Result<Vec<Bytes>>>
where
    S: Stream<Item = io::Result<Bytes>> + Unpin,
{
    let mut batch = Vec::new();
    let mut length = 0;
    let mut next = nar.next().await;
    while let Some(bytes) = next {
        match bytes {
            Ok(bytes) => {
                length += bytes.len();
                batch.push(bytes);
            }
            Err(error) => return Some(Err(error)),
        }
        if length >= BATCH_BYTES || batch.len() == BATCH_PIECES {
            break;
        }
        next = nar.next().now_or_never().flatten();
    }
    (!batch.is_empty()).then_some(Ok(batch))
}

fn hash(mut input: mpsc::Receiver<Arc<[Bytes]>>) -> Sha256Hash {
    let mut hasher = Sha256Hasher::new();
    while let Some(batch) = input.blocking_recv() {
        batch.iter().for_each(|bytes| hasher.update(bytes));
    }
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use narlake_format::limits::NAR_SIZE_MAX;
    use narlake_format::nar::{Event, Writer};

    use super::*;
    use crate::pack::writer::tests::{index, writer};

    /// NarHash is the same whichever thread computes it.
    #[tokio::test(flavor = "multi_thread")]
    async fn hashed_beside_the_cutter_or_in_it() {
        let state = tempfile::tempdir().unwrap();
        let writer = writer(state.path()).await;
        let file: Vec<u8> = (0..1_000_000_u32).flat_map(u32::to_le_bytes).collect();
        let events = [Event::File { executable: false, size: file.len() as u64 }, Event::Data(&file), Event::EndFile];
        let (mut nar, mut events_to_nar) = (Vec::new(), Writer::new());
        events.into_iter().for_each(|event| events_to_nar.event(event, &mut nar).unwrap());
        for threads in [1, 2] {
            let intake = Intake {
                store_dir: StoreDir::default(),
                nar_size_max: NAR_SIZE_MAX,
                index: index(&writer),
                writer: writer.clone(),
                cpu: Arc::new(CpuPool::start(threads, 3).unwrap()),
                metrics: Metrics::new(&prometheus::Registry::new()),
            };
            let pieces: Vec<_> = nar.chunks(50_000).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
            let ingested = intake.ingest(Domain::Public, futures::stream::iter(pieces)).await.unwrap();
            assert_eq!(ingested.nar_hash, Sha256Hash::of(&nar), "{threads} threads");
            assert_eq!(writer.writing(), 0);
        }
    }

    /// A stream that has these pieces now and no more for a while.
    fn pieces(count: usize, length: usize) -> Fuse<impl Stream<Item = io::Result<Bytes>> + Unpin> {
        let there = futures::stream::iter((0..count).map(move |_| Ok(Bytes::from(vec![7; length]))));
        there.chain(futures::stream::pending()).fuse()
    }

    #[tokio::test]
    async fn a_batch_is_what_is_there_within_its_limits() {
        for (count, length, expected) in [(1, 10, 1), (3, 10, 3), (100, 1, BATCH_PIECES), (9, BATCH_BYTES / 2, 2)] {
            let mut stream = pieces(count, length);
            let first = batch(&mut stream).now_or_never().expect("no wait for more").unwrap().unwrap();
            assert_eq!(first.len(), expected, "{count} pieces of {length}");
        }
        let mut broken = futures::stream::iter([Ok(Bytes::from_static(b"x")), Err(io::Error::other("broken"))]).fuse();
        assert!(batch(&mut broken).await.unwrap().is_err());
        assert!(batch(&mut futures::stream::empty().fuse()).await.is_none());
    }
}
