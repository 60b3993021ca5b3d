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
//! <dir>/pins/<name>      files that stay
//! <dir>/synced           what is known to have reached the disk
//! ```
//!
//! Everything but the node table is disposable: it is filled from the lake, found again by a scan at start, and thrown
//! away where it cannot be trusted. Invariant: a file of `hot/` is complete and verified when it appears there by
//! rename, and is never written again; it goes by unlink, so whoever has it open reads on.
//!
//! The cache never stands in the way. A file of the wrong length is a miss. A disk that is full, read-only or broken
//! means that content is served and not kept, which is counted.
//!
//! Files are not synced one by one. Now and then the whole file system is, and which files that covers is written down
//! ([`synced`]). After a boot that did not follow an orderly stop the others cannot be told from blocks that were never
//! written: they are hashed again, and dropped if that cannot be done (docs/consistency.md, rule 25). Reads through FUSE
//! verify what they read and need not wait for that; whatever lets the kernel read `hot/` does
//! ([`Cache::wait_verified`]).
//!
//! The directory is scanned in the background: until that is done, a file that the ledger does not know is looked for.
//!
//! Methods block on the disk; callers on a runtime thread hand them to a blocking one.

mod boot;
mod departed;
mod evict;
mod hot;
mod partial;
mod pins;
mod resident;
mod room;
mod synced;
mod upkeep;
mod verify;

use std::collections::HashMap;
use std::fs::{self, DirBuilder, File, TryLockError};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use narlake_format::id::ContentId;

use self::boot::BootMark;
use self::departed::Departed;
use self::evict::Ledger;
pub use self::partial::Partial;
pub use self::pins::PinError;
use self::pins::Pins;
use crate::metrics::Metrics;

/// Directories of files, which are made where they are missing.
const DIRECTORIES: [&str; 4] = ["hot", "partial", "tmp", "pins"];

/// Partial files of before an unclean boot, in `tmp/`, until they have been removed.
const OLD_PARTIAL: &str = "partial";

/// How long an opening waits for the scan: that of a small cache, and never so long that a restart is felt.
const SCAN_GRACE: Duration = Duration::from_millis(100);

/// How long after the opening fills wait for the scan, of which whoever reads feels what is left after the start. Later
/// ones are served and not kept until it is done.
const FILL_PATIENCE: Duration = Duration::from_millis(250);

/// How long after the opening it is waited for by who would have files dropped.
const SHRINK_PATIENCE: Duration = Duration::from_secs(2);

/// How long an opening waits for another daemon's lock: while one ends, it may be in a last step.
const LOCK_GRACE: Duration = Duration::from_millis(200);

/// Pause between two attempts at the lock.
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// Lets go of evicted files ([`Cache::set_holders`]).
pub type Release = Arc<dyn Fn() + Send + Sync>;

/// How much the cache may hold.
#[derive(Debug, Clone, Copy)]
pub struct CacheSettings {
    /// Bytes on disk, in all; more is never kept.
    pub bytes_max: u64,
    /// Bytes of the file system that are left free, or 5 % of it if that is less.
    pub free_bytes: u64,
    /// Bytes of complete files that are read and hashed in a second to find damage; 0 for none.
    pub scrub_bytes_per_s: u64,
}

impl Default for CacheSettings {
    fn default() -> Self {
        Self { bytes_max: 20 << 30, free_bytes: 1 << 30, scrub_bytes_per_s: 8 << 20 }
    }
}

/// How far the look at what was there has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Scanning,
    Verifying,
    Ready,
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
    // Held for bookkeeping and to drop a single file, never while content is read or written.
    ledger: Mutex<Ledger>,
    // Taken after the ledger, held for an unlink or to read what the kernel has queued.
    departed: Mutex<Departed>,
    // Evictions take turns, so that two do not free the same bytes. Taken before the ledger.
    evicting: Mutex<()>,
    // Held while a set is stored. Taken before the ledger.
    pins: Mutex<Pins>,
    // Held to look at it or to replace it.
    holders: Mutex<Option<Release>>,
    phase: Mutex<Phase>,
    advanced: Condvar,
    opened: Instant,
    // Read while a file gets its name, written when a sync begins.
    period: RwLock<u64>,
    /// Something was written since the last sync began.
    unsynced: AtomicBool,
    /// After an unclean boot, the last period that was on disk.
    doubted: Option<u64>,
    /// Hashes can be kept beside files.
    remembers: bool,
    temporary: AtomicU64,
    boot: BootMark,
    metrics: Metrics,
    /// Dropped, it ends the threads.
    _running: upkeep::Running,
    /// Held for its lock.
    _lock: File,
}

impl Cache {
    /// Opens the cache in this directory, making it if there is none, and begins to find what it holds.
    ///
    /// # Errors
    /// When another daemon uses it, or it cannot be written.
    pub fn open(dir: &Path, settings: CacheSettings, metrics: &Metrics) -> Result<Arc<Self>, CacheError> {
        Self::open_waiting(dir, settings, metrics, LOCK_GRACE)
    }

    /// Opens the cache as soon as the daemon that uses it lets go, within this time.
    ///
    /// # Errors
    /// When it does not, or the directory cannot be written.
    pub fn open_waiting(
        dir: &Path,
        settings: CacheSettings,
        metrics: &Metrics,
        limit: Duration,
    ) -> Result<Arc<Self>, CacheError> {
        let io = |operation, path: &Path| {
            let path = path.to_owned();
            move |source| CacheError::Io { operation, path, source }
        };
        fs::create_dir_all(dir).map_err(io("make", dir))?;
        let lock = lock(dir, limit)?;
        let boot = BootMark::read(dir).map_err(io("read the boot mark in", dir))?;
        let tmp = dir.join("tmp");
        remove_tree(&tmp).map_err(io("clear", &tmp))?;
        make_directories(dir).map_err(io("make directories in", dir))?;
        let last = synced::read(dir);
        let doubted = boot.is_unclean().then_some(last);
        if doubted.is_some() {
            tracing::warn!(dir = %dir.display(), "the host went down without an orderly stop: verifying cached content");
            // Of a partial file, nobody knows which chunks had reached the disk.
            let partial = dir.join("partial");
            fs::rename(&partial, tmp.join(OLD_PARTIAL)).map_err(io("clear", &partial))?;
            make_directories(dir).map_err(io("make directories in", dir))?;
        }
        let pins = pins::load(dir).map_err(io("read the pins in", dir))?;
        let marked = if doubted.is_some() { boot.mark_doubted(dir) } else { boot.mark_dirty(dir) };
        marked.map_err(io("write the boot mark in", dir))?;
        let (running, ends) = upkeep::channels();
        let cache = Arc::new(Self {
            dir: dir.to_owned(),
            settings,
            ledger: Mutex::default(),
            departed: Mutex::new(Departed::new()),
            evicting: Mutex::default(),
            pins: Mutex::default(),
            holders: Mutex::default(),
            phase: Mutex::new(Phase::Scanning),
            advanced: Condvar::new(),
            opened: Instant::now(),
            period: RwLock::new(last + 1),
            // Files of a daemon that was killed may be.
            unsynced: AtomicBool::new(true),
            doubted,
            remembers: verify::remembers(&lock),
            temporary: AtomicU64::new(0),
            boot,
            metrics: metrics.clone(),
            _running: running,
            _lock: lock,
        });
        metrics.cache_limit_bytes.set(i64::try_from(settings.bytes_max).unwrap_or(i64::MAX));
        cache.apply(&pins);
        *cache.pins() = pins;
        upkeep::start(&cache, ends).map_err(io("start the upkeep of", dir))?;
        cache.wait_for(Phase::Verifying, SCAN_GRACE);
        Ok(cache)
    }

    /// Waits until every complete file is known to be as it was put, for at most this long; true if they are. At once
    /// unless the host went down without an orderly stop.
    #[must_use]
    pub fn wait_verified(&self, limit: Duration) -> bool {
        // Before the scan is done, nothing is doubted either after a clean boot.
        self.doubted.is_none() || self.wait_for(Phase::Ready, limit)
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

    /// Says that the directory is left in order: everything is on disk. The last thing before a process ends.
    pub fn close(&self) {
        // Without the mark the content is dropped after the next boot, and fetched again: no reason to fail.
        // Nor is it clean while content is doubted.
        if self.doubted.is_some() && !self.wait_for(Phase::Ready, Duration::ZERO) {
            return;
        }
        if let Err(error) = self.sync().and_then(|()| self.boot.mark_clean(&self.dir)) {
            tracing::warn!(dir = %self.dir.display(), %error, "leave the cache in order");
        }
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn departed(&self) -> MutexGuard<'_, Departed> {
        self.departed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pins(&self) -> MutexGuard<'_, Pins> {
        self.pins.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_scanning(&self) -> bool {
        !self.wait_for(Phase::Verifying, Duration::ZERO)
    }

    /// Waits for the scan until this long after the opening. True if it is done.
    fn wait_scanned(&self, patience: Duration) -> bool {
        self.wait_for(Phase::Verifying, patience.saturating_sub(self.opened.elapsed()))
    }

    fn wait_for(&self, wanted: Phase, limit: Duration) -> bool {
        let phase = self.phase.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.advanced.wait_timeout_while(phase, limit, |phase| *phase < wanted);
        *waited.unwrap_or_else(PoisonError::into_inner).0 >= wanted
    }

    fn enter(&self, phase: Phase) {
        *self.phase.lock().unwrap_or_else(PoisonError::into_inner) = phase;
        self.advanced.notify_all();
    }

    /// Makes the directory again if this error comes from its having been removed. True if something may work now.
    fn is_recreated(&self, error: &io::Error) -> bool {
        if error.kind() != io::ErrorKind::NotFound || DIRECTORIES.iter().all(|name| self.dir.join(name).is_dir()) {
            return false;
        }
        tracing::error!(dir = %self.dir.display(), "directories of the cache were removed; making them again");
        let mut ledger = self.ledger();
        if !self.dir.join("hot").is_dir() {
            ledger.forget_all();
        }
        fs::create_dir_all(&self.dir).and_then(|()| make_directories(&self.dir)).is_ok()
    }

    fn show(&self, ledger: &Ledger) {
        self.metrics.cache_bytes.set(i64::try_from(ledger.used()).unwrap_or(i64::MAX));
        self.metrics.cache_lingering_bytes.set(i64::try_from(ledger.lingering).unwrap_or(i64::MAX));
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

/// Takes the lock of a cache directory, within this time. The kernel has no wait for a file lock that ends at a deadline.
fn lock(dir: &Path, limit: Duration) -> Result<File, CacheError> {
    let path = dir.join("lock");
    let failed = |operation| {
        let path = path.clone();
        move |source| CacheError::Io { operation, path, source }
    };
    let lock = File::options().read(true).write(true).create(true).truncate(false).open(&path);
    let lock = lock.map_err(failed("open"))?;
    let begun = Instant::now();
    loop {
        match lock.try_lock() {
            Ok(()) => return Ok(lock),
            Err(TryLockError::WouldBlock) if begun.elapsed() < limit => std::thread::park_timeout(LOCK_PAUSE),
            Err(TryLockError::WouldBlock) => return Err(CacheError::InUse { dir: dir.to_owned() }),
            Err(TryLockError::Error(source)) => return Err(failed("lock")(source)),
        }
    }
}

/// Makes the directories that are missing, for this user alone: content may be of a private cache. Overlays read `hot/`
/// with the credentials of whoever mounted them.
fn make_directories(dir: &Path) -> io::Result<()> {
    DIRECTORIES.iter().try_for_each(|name| DirBuilder::new().recursive(true).mode(0o700).create(dir.join(name)))
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
