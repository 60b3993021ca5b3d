//! The local cache: restored file content on this host's disk, named by content.
//!
//! ```text
//! <dir>/lock             held while a daemon uses the directory
//! <dir>/boot             the boot in which it was last used, and whether it was left in order
//! <dir>/nodes            the node table (fs::nodes)
//! <dir>/hot/<2>/<62>     complete files, by the digits of their ContentId
//! <dir>/partial/<id>     files of which some chunks are there; sparse
//! <dir>/partial/<id>.map which ones
//! <dir>/metadata/        what describes it (crate::metadata)
//! <dir>/tmp/             files being written
//! ```
//!
//! Everything but the node table is disposable: it is filled from the lake, found again by a scan at start, and thrown
//! away where it cannot be trusted. Invariant: a file of `hot/` is complete and verified when it appears there by
//! rename, and is never written again; it goes by unlink, so whoever has it open reads on.
//!
//! The cache never stands in the way. A file of the wrong length is a miss. A disk that is full, read-only or broken
//! means that content is served and not kept, which is counted.
//!
//! Files are not synced: losing them costs a fetch. After a boot that did not follow an orderly stop, their content
//! cannot be told from blocks that were never written, and all of it is dropped (docs/consistency.md, rule 25).
//!
//! Methods block on the disk; callers on a runtime thread hand them to a blocking one.

mod boot;
mod evict;
mod hot;
mod partial;

use std::collections::HashMap;
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use narlake_format::id::ContentId;

use self::boot::BootMark;
use self::evict::Ledger;
pub use self::partial::Partial;
use crate::metrics::Metrics;

/// How much the cache may hold.
#[derive(Debug, Clone, Copy)]
pub struct CacheSettings {
    /// Bytes on disk, in all; more is never kept.
    pub bytes_max: u64,
}

impl CacheSettings {
    /// Share of `bytes_max` to which eviction goes down, in percent: so that it is rare and in batches.
    const LOW_WATER_PERCENT: u64 = 90;

    fn low_water(&self) -> u64 {
        self.bytes_max / 100 * Self::LOW_WATER_PERCENT
    }
}

/// Why the directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// Another daemon uses it.
    #[error("cache directory {dir} is in use by another daemon", dir = dir.display())]
    InUse {
        /// The directory.
        dir: PathBuf,
    },
    /// The file system does not do what it should.
    #[error("{operation} {path}", path = path.display())]
    Io {
        /// The operation, as a verb.
        operation: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
}

/// The cache in one directory.
pub struct Cache {
    dir: PathBuf,
    settings: CacheSettings,
    // Held for bookkeeping and to drop a single file, never while content is read, written or evicted.
    ledger: Mutex<Ledger>,
    // Evictions take turns, so that two do not free the same bytes. Taken before the ledger.
    evicting: Mutex<()>,
    temporary: AtomicU64,
    boot: BootMark,
    metrics: Metrics,
    /// Held for its lock.
    _lock: File,
}

impl Cache {
    /// Opens the cache in this directory, making it if there is none, and finds what it holds.
    ///
    /// # Errors
    /// When another daemon uses it, or it cannot be written.
    pub fn open(dir: &Path, settings: CacheSettings, metrics: &Metrics) -> Result<Self, CacheError> {
        let io = |operation, path: &Path| {
            let path = path.to_owned();
            move |source| CacheError::Io { operation, path, source }
        };
        fs::create_dir_all(dir).map_err(io("make", dir))?;
        let lock_path = dir.join("lock");
        let lock = File::options().read(true).write(true).create(true).truncate(false).open(&lock_path);
        let lock = lock.map_err(io("open", &lock_path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(CacheError::InUse { dir: dir.to_owned() }),
            Err(TryLockError::Error(source)) => return Err(io("lock", &lock_path)(source)),
        }
        let boot = BootMark::read(dir).map_err(io("read the boot mark in", dir))?;
        let tmp = dir.join("tmp");
        remove_tree(&tmp).map_err(io("clear", &tmp))?;
        if boot.is_unclean() {
            tracing::warn!(dir = %dir.display(), "the host went down without an orderly stop: dropping cached content");
            for name in ["hot", "partial"] {
                let path = dir.join(name);
                remove_tree(&path).map_err(io("clear", &path))?;
            }
        }
        boot.mark_dirty(dir).map_err(io("write the boot mark in", dir))?;
        for name in ["hot", "partial", "tmp"] {
            let path = dir.join(name);
            fs::create_dir_all(&path).map_err(io("make", &path))?;
        }
        let mut ledger = Ledger::default();
        hot::scan(&dir.join("hot"), &mut ledger).map_err(io("scan", &dir.join("hot")))?;
        partial::scan(&dir.join("partial"), &mut ledger).map_err(io("scan", &dir.join("partial")))?;
        let cache = Self {
            dir: dir.to_owned(),
            settings,
            ledger: Mutex::new(ledger),
            evicting: Mutex::default(),
            temporary: AtomicU64::new(0),
            boot,
            metrics: metrics.clone(),
            _lock: lock,
        };
        metrics.cache_limit_bytes.set(i64::try_from(settings.bytes_max).unwrap_or(i64::MAX));
        cache.make_room(0);
        cache.show(&cache.ledger());
        Ok(cache)
    }

    /// The directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether the host has been booted since the directory was last used.
    #[must_use]
    pub fn booted_since(&self) -> bool {
        self.boot.booted_since()
    }

    /// Bytes on disk, and the most there may be.
    #[must_use]
    pub fn usage(&self) -> (u64, u64) {
        (self.ledger().used(), self.settings.bytes_max)
    }

    /// Number of files, complete or not.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ledger().len()
    }

    /// Nothing is cached.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Drops what was used least recently until at most `bytes` are left. Returns how many bytes went.
    pub fn shrink_to(&self, bytes: u64) -> u64 {
        let _turn = self.evicting.lock().unwrap_or_else(PoisonError::into_inner);
        self.evict(bytes)
    }

    /// Says that the directory is left in order: everything is on disk. The last thing before a process ends.
    pub fn close(&self) {
        // Without the mark the content is dropped after the next boot, and fetched again: no reason to fail.
        if let Err(error) = self.boot.mark_clean(&self.dir) {
            tracing::warn!(dir = %self.dir.display(), %error, "leave the cache in order");
        }
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes room for this many bytes more. False if they can never fit.
    fn make_room(&self, bytes: u64) -> bool {
        if bytes > self.settings.bytes_max {
            return false;
        }
        let fits = || self.ledger().used() + bytes <= self.settings.bytes_max;
        if fits() {
            return true;
        }
        let _turn = self.evicting.lock().unwrap_or_else(PoisonError::into_inner);
        if !fits() {
            self.evict(self.settings.low_water().min(self.settings.bytes_max - bytes));
        }
        fits()
    }

    /// Unlinks what the plan says, for a caller who has its turn. Files may be used again meanwhile, or made anew: at
    /// worst the ledger then counts one that is gone, which whoever opens it finds out.
    fn evict(&self, goal: u64) -> u64 {
        let plan = self.ledger().plan(goal);
        let mut freed = 0;
        for planned in plan {
            let remove = if planned.partial { partial::remove } else { hot::remove };
            if remove(&self.dir, &planned.id) {
                let mut ledger = self.ledger();
                let before = ledger.used();
                ledger.evicted(&planned);
                freed += before - ledger.used();
                self.metrics.cache_evictions.inc();
            }
        }
        self.show(&self.ledger());
        freed
    }

    fn show(&self, ledger: &Ledger) {
        self.metrics.cache_bytes.set(i64::try_from(ledger.used()).unwrap_or(i64::MAX));
        self.metrics.cache_files.set(i64::try_from(ledger.len()).unwrap_or(i64::MAX));
    }

    /// Counts and logs that something could not be kept. Callers serve it all the same.
    fn not_kept(&self, id: &ContentId, error: &io::Error) {
        self.metrics.cache_not_kept.inc();
        // A full disk fails every fill: say it now and then, count it always.
        if self.metrics.cache_not_kept.get().is_power_of_two() {
            tracing::warn!(file = %id, %error, times = self.metrics.cache_not_kept.get(), "content served, not kept");
        }
    }

    fn temporary_path(&self) -> PathBuf {
        self.dir.join("tmp").join(self.temporary.fetch_add(1, Ordering::Relaxed).to_string())
    }
}

/// What `path` takes on disk, in bytes.
fn bytes_on_disk(metadata: &fs::Metadata) -> u64 {
    use std::os::unix::fs::MetadataExt;
    // A block even for what a file system keeps in its inode: the count of files is bounded too that way.
    (metadata.blocks() * 512).max(4096)
}

fn remove_tree(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

/// Content ids, with what the ledger knows of them.
type Entries = HashMap<ContentId, evict::Entry>;

#[cfg(test)]
mod tests;
