//! The engine under load: a generation in, a generation out.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use futures::{StreamExt, TryStreamExt};
use narlake_format::id::BlobKind;
use narlake_format::nix::signature::SecretKey;
use narlake_storage::{Bucket, Cache, Components, Lake, Metrics, OsEntropy, Settings, SystemClock, UploadName};

use crate::corpus::Item;
use crate::span::{Span, Timer};

/// Pushes at once. A Nix client copies as many paths at once as it has cores, and a lake has more than one client.
pub const PUSHES: usize = 8;
/// Bytes of one buffer of an upload.
const BODY_BYTES: usize = 64 << 10;

/// An open lake over a directory.
pub struct Engine {
    lake: Lake,
    cache: Cache,
    key: SecretKey,
}

impl Engine {
    /// Opens a lake in an empty directory.
    ///
    /// # Panics
    /// Where that fails.
    pub async fn open(directory: &Path, cpu_threads: usize) -> Self {
        let metrics = Metrics::new(&prometheus::Registry::new());
        let bucket = Bucket::local(&directory.join("bucket"), &metrics).expect("a bucket");
        let settings = Settings { state_dir: directory.join("state"), cpu_threads, ..Settings::default() };
        let parts = Components { bucket, clock: Arc::new(SystemClock), entropy: Arc::new(OsEntropy), metrics };
        let lake = Lake::open(settings, parts).await.expect("a lake");
        let key = SecretKey::generate("bench-1", [7; 32]).expect("a key");
        let cache = lake.default_cache("default", &[key.public()]).await.expect("a cache");
        Self { lake, cache, key }
    }

    /// Takes a generation in, [`PUSHES`] paths at a time, everything durable, and says what that took.
    ///
    /// # Panics
    /// Where a push fails.
    pub async fn ingest(&self, items: &[Item]) -> Span {
        let timer = Timer::process();
        futures::stream::iter(items.iter().map(Ok::<_, narlake_storage::Error>))
            .try_for_each_concurrent(PUSHES, |item| async move {
                let name = UploadName::parse(&item.info.url).expect("an uploaded NAR");
                let buffers: Vec<_> = (0..item.nar.len())
                    .step_by(BODY_BYTES)
                    .map(|at| Ok(item.nar.slice(at..item.nar.len().min(at + BODY_BYTES))))
                    .collect();
                let ingested = self.lake.ingest(&self.cache, futures::stream::iter(buffers)).await?;
                self.lake.keep_upload(&self.cache, &name, &ingested).await
            })
            .await
            .expect("a push");
        timer.stop()
    }

    /// Publishes what was taken in.
    ///
    /// # Panics
    /// Where a path is refused.
    pub async fn publish(&self, items: &[Item]) {
        for item in items {
            let keys = std::slice::from_ref(&self.key);
            self.lake.publish(&self.cache, item.info.clone(), keys).await.expect("a whole path");
        }
    }

    /// Bytes of the string tables of published paths, wherever they are kept.
    ///
    /// # Panics
    /// Where one is not there.
    pub async fn table_bytes(&self, items: &[Item]) -> u64 {
        let mut bytes = 0;
        for item in items {
            let record =
                self.lake.lookup(&self.cache, &item.info.store_path.hash).await.expect("a bucket that answers");
            let strings = self.lake.strings(&self.cache, &record.expect("a published path")).await.expect("a table");
            bytes += strings.encode().len() as u64;
        }
        bytes
    }

    /// Assembles every NAR and returns the seconds it took.
    ///
    /// # Panics
    /// Where one is not whole.
    pub async fn export(&self, items: &[Item]) -> f64 {
        let start = Instant::now();
        futures::stream::iter(items.iter().map(Ok::<_, narlake_storage::Error>))
            .try_for_each_concurrent(PUSHES, |item| async move {
                let record =
                    self.lake.lookup(&self.cache, &item.info.store_path.hash).await?.expect("a published path");
                let mut nar = std::pin::pin!(self.lake.export(&self.cache, &record).await?);
                let mut length = 0;
                while let Some(bytes) = nar.next().await {
                    length += bytes?.len();
                }
                assert_eq!(length, item.nar.len(), "{}", item.info.store_path);
                Ok(())
            })
            .await
            .expect("whole NARs");
        start.elapsed().as_secs_f64()
    }

    /// Writes down what is open.
    ///
    /// # Panics
    /// Where that fails.
    pub async fn close(&self) {
        self.lake.close().await.expect("a clean end");
    }
}

/// Bytes of all files below each folder of a bucket directory.
#[must_use]
pub fn bucket_bytes(directory: &Path) -> Vec<(String, u64)> {
    let mut sums: Vec<(String, u64)> = Vec::new();
    for entry in std::fs::read_dir(directory.join("bucket")).into_iter().flatten().flatten() {
        sums.push((entry.file_name().to_string_lossy().into_owned(), bytes_below(&entry.path())));
    }
    sums.sort();
    sums
}

fn bytes_below(path: &Path) -> u64 {
    if path.is_dir() {
        std::fs::read_dir(path).into_iter().flatten().flatten().map(|entry| bytes_below(&entry.path())).sum()
    } else {
        path.metadata().map_or(0, |meta| meta.len())
    }
}

/// What the packs of a bucket directory hold, in bytes as stored, by what it is.
#[derive(Debug, Clone, Copy, Default)]
pub struct PackBytes {
    /// Frames of file data.
    pub data: u64,
    /// Frames of manifests and string tables.
    pub metadata: u64,
    /// Headers, footers and trailers.
    pub tables: u64,
}

/// Adds up the packs of a bucket directory.
///
/// # Panics
/// Where a pack is damaged.
#[must_use]
pub fn pack_bytes(directory: &Path) -> PackBytes {
    let mut sum = PackBytes::default();
    for entry in std::fs::read_dir(directory.join("bucket/packs/public")).into_iter().flatten().flatten() {
        let pack = std::fs::read(entry.path()).expect("a pack");
        let footer = narlake_format::lake::pack::verify(&pack).expect("a whole pack");
        sum.tables += pack.len() as u64;
        for frame in footer.frames() {
            let first = footer.blobs().get(frame.blobs.start as usize).map(|blob| blob.kind);
            let length = u64::from(frame.place.length);
            sum.tables -= length;
            match first {
                Some(BlobKind::Chunk) => sum.data += length,
                _ => sum.metadata += length,
            }
        }
    }
    sum
}
