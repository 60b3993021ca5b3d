//! Metadata on this host's disk: what a daemon needs to show, without a server, what it has in its cache.
//!
//! ```text
//! <dir>/metadata/<2>/<BlobId>     a manifest header, a manifest part or a string table: its bytes
//! <dir>/metadata/<2>/<hash part>  a path record: its text
//! ```
//!
//! The first two characters of a name make the directory. What is here was fetched before and can be fetched again, so
//! nothing of it is believed, synced or missed: a blob is hashed when it is read, a record's checksum and signatures are
//! verified, and what is damaged, cut short or signed by nobody trusted is removed and counts as not there. A file is written aside
//! and renamed. All files together are bounded in bytes; what was not used goes first.
//!
//! [`Records`] puts this before a source of records, [`Blobs`] before the fetch engine.

mod blobs;
mod records;

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use narlake_format::id::{BlobId, BlobKind};
use narlake_format::lake::record::PathRecord;
use narlake_format::limits::FRAME_RAW_MAX;
use narlake_format::nix::store_path::StorePathHash;
use quick_cache::Lifecycle;

pub use self::blobs::Blobs;
pub use self::records::Records;
use crate::lru::{Lru, Weigh, lru_with};
use crate::metrics::Metrics;
use crate::trust::TrustedKeys;

/// Largest file: a record of 1 MiB and any blob fit.
const FILE_MAX: u64 = FRAME_RAW_MAX as u64;

/// What a file takes on disk at least, and a multiple of which it takes, in bytes.
const BLOCK: u64 = 4096;

/// The metadata in one directory. Methods block on the disk; callers on a runtime thread hand them to a blocking one.
pub struct Metadata {
    dir: PathBuf,
    tmp: PathBuf,
    keys: TrustedKeys,
    // Which files there are. One that is gone all the same is found out by whoever opens it.
    files: Lru<Name, Length, Unlink>,
    temporary: AtomicU64,
    metrics: Metrics,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Name {
    Blob(BlobId),
    Record(StorePathHash),
}

impl Name {
    fn parse(text: &str) -> Option<Self> {
        let blob = text.parse().ok().map(Self::Blob);
        blob.or_else(|| text.parse().ok().map(Self::Record))
    }

    fn path(&self, dir: &Path) -> PathBuf {
        let name = match self {
            Self::Blob(id) => id.to_string(),
            Self::Record(hash) => hash.to_string(),
        };
        let mut path = dir.join(name.get(..2).unwrap_or_default());
        path.push(name);
        path
    }
}

/// The length of a file.
#[derive(Clone, Copy)]
pub(crate) struct Length(pub(crate) u64);

impl Weigh for Length {
    fn bytes(&self) -> u64 {
        self.0.next_multiple_of(BLOCK).max(BLOCK)
    }
}

/// Unlinks what is evicted.
#[derive(Clone)]
struct Unlink {
    dir: PathBuf,
}

/// Files to be unlinked, once no lock is held.
#[derive(Default)]
pub(crate) struct Evicted(pub(crate) Vec<PathBuf>);

impl Lifecycle<Name, Length> for Unlink {
    type RequestState = Evicted;

    fn on_evict(&self, evicted: &mut Evicted, name: Name, _: Length) {
        evicted.0.push(name.path(&self.dir));
    }
}

impl Drop for Evicted {
    fn drop(&mut self) {
        for path in &self.0 {
            let _ = fs::remove_file(path);
        }
    }
}

impl Metadata {
    /// Opens what there is in the cache directory `dir`, which its cache has been opened in, to hold at most about
    /// `bytes_max` bytes. Records are those of these keys.
    ///
    /// # Errors
    /// When the directory cannot be read or made.
    pub fn open(dir: &Path, bytes_max: u64, keys: TrustedKeys, metrics: &Metrics) -> io::Result<Self> {
        let (tmp, dir) = (dir.join("tmp"), dir.join("metadata"));
        fs::create_dir_all(&dir)?;
        // A record or a small blob takes a block.
        let items = usize::try_from(bytes_max / BLOCK).unwrap_or(usize::MAX).clamp(1, 1 << 20);
        let files = lru_with(items, bytes_max, Unlink { dir: dir.clone() });
        for shard in fs::read_dir(&dir)? {
            let shard = shard?.path();
            if !shard.is_dir() {
                fs::remove_file(&shard)?;
                continue;
            }
            for file in fs::read_dir(&shard)? {
                let file = file?;
                match file.file_name().to_str().and_then(Name::parse) {
                    Some(name) if name.path(&dir) == file.path() => files.insert(name, Length(file.metadata()?.len())),
                    _ => fs::remove_file(file.path())?,
                }
            }
        }
        Ok(Self { dir, tmp, keys, files, temporary: AtomicU64::new(0), metrics: metrics.clone() })
    }

    /// About how many bytes it takes on disk.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.files.weight()
    }

    /// A blob, if it is here and is what its id says.
    #[must_use]
    pub fn blob(&self, kind: BlobKind, id: &BlobId) -> Option<Bytes> {
        let name = Name::Blob(*id);
        let bytes = self.read(name)?;
        if BlobId::of(kind, &bytes) == *id {
            return Some(bytes.into());
        }
        self.damaged(name);
        None
    }

    /// Whether a blob seems to be here.
    #[must_use]
    pub fn has_blob(&self, id: &BlobId) -> bool {
        self.files.contains_key(&Name::Blob(*id))
    }

    /// Keeps a blob that the caller has verified.
    pub fn keep_blob(&self, id: &BlobId, bytes: &[u8]) {
        self.write(Name::Blob(*id), bytes);
    }

    /// The record of the path with this hash part, if it is here and a trusted key signed it.
    #[must_use]
    pub fn record(&self, hash: &StorePathHash) -> Option<PathRecord> {
        let name = Name::Record(*hash);
        let record = PathRecord::parse(self.keys.store_dir(), &self.read(name)?).ok();
        // Signed by nobody trusted: the keys have changed, or whoever wrote it is not who fetched it.
        let record = record.filter(|record| {
            record.info().store_path.hash == *hash && self.keys.verify(PathRecord::clone(record)).is_ok()
        });
        if record.is_none() {
            self.damaged(name);
        }
        record
    }

    /// Whether the record of a path seems to be here.
    #[must_use]
    pub fn has_record(&self, hash: &StorePathHash) -> bool {
        self.files.contains_key(&Name::Record(*hash))
    }

    /// Keeps a record. It need not be verified: that is done when it is read.
    pub fn keep_record(&self, record: &PathRecord) {
        let text = record.to_text(self.keys.store_dir());
        self.write(Name::Record(record.info().store_path.hash), text.as_bytes());
    }

    /// The server says that there is no such path any more.
    pub fn forget_record(&self, hash: &StorePathHash) {
        self.remove(Name::Record(*hash));
    }

    fn read(&self, name: Name) -> Option<Vec<u8>> {
        self.files.get(&name)?;
        let read = || {
            let mut bytes = Vec::new();
            File::open(name.path(&self.dir))?.take(FILE_MAX + 1).read_to_end(&mut bytes)?;
            Ok::<_, io::Error>(bytes)
        };
        match read() {
            Ok(bytes) => Some(bytes),
            Err(error) => {
                // Evicted since the look, or somebody removed it.
                if error.kind() != io::ErrorKind::NotFound {
                    tracing::warn!(file = %name.path(&self.dir).display(), %error, "read metadata");
                }
                self.remove(name);
                None
            }
        }
    }

    fn write(&self, name: Name, bytes: &[u8]) {
        let temporary = self.tmp.join(format!("metadata-{}", self.temporary.fetch_add(1, Ordering::Relaxed)));
        match write_aside(&temporary, &name.path(&self.dir), bytes) {
            Ok(()) => {
                // Replaced, an entry counts as evicted, and its file would go. Should two write the same at once, it does,
                // and is missed by the next reader.
                self.files.remove(&name);
                self.files.insert(name, Length(bytes.len() as u64));
            }
            Err(error) => {
                let _ = fs::remove_file(&temporary);
                self.metrics.cache_not_kept.inc();
                // A full disk fails every time: say it now and then, count it always.
                if self.metrics.cache_not_kept.get().is_power_of_two() {
                    tracing::warn!(file = %name.path(&self.dir).display(), %error, "metadata used, not kept");
                }
            }
        }
    }

    fn damaged(&self, name: Name) {
        tracing::warn!(file = %name.path(&self.dir).display(), "metadata does not verify, removed");
        self.metrics.cache_damaged.inc();
        self.remove(name);
    }

    fn remove(&self, name: Name) {
        self.files.remove(&name);
        let _ = fs::remove_file(name.path(&self.dir));
    }
}

/// Writes a file under another name and renames it; makes its directory if need be.
pub(crate) fn write_aside(temporary: &Path, to: &Path, bytes: &[u8]) -> io::Result<()> {
    File::options().write(true).create_new(true).open(temporary)?.write_all(bytes)?;
    match fs::rename(temporary, to) {
        // The first of its directory.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if let Some(parent) = to.parent() {
                fs::create_dir_all(parent)?;
            }
            fs::rename(temporary, to)
        }
        done => done,
    }
}

/// Hands work on the disk to a thread that may wait for it.
async fn on_disk<T: Send + 'static>(metadata: &Arc<Metadata>, work: impl FnOnce(&Metadata) -> T + Send + 'static) -> T {
    let metadata = Arc::clone(metadata);
    crate::error::joined(tokio::task::spawn_blocking(move || work(&metadata))).await
}

#[cfg(test)]
mod tests;
