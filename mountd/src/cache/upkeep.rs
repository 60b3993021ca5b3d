//! What the cache does by itself: finds what it holds, keeps within its bounds, syncs, and scrubs.
//!
//! Two threads, which end with the cache: they hold it only for single steps. The first one scans, verifies after an
//! unclean boot, and then keeps the bounds; the second one reads complete files at a fixed rate and drops those that
//! are not what they should be.

use std::convert::Infallible;
use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

use narlake_format::id::ContentId;

use super::verify::{Verdict, verify};
use super::{Cache, Phase, hot, partial, resident};

/// Time between two looks at what is used.
const TICK: Duration = Duration::from_secs(1);

/// Ticks between two syncs, of which one is left out if nothing was written.
const TICKS_PER_SYNC: u32 = 120;

/// Pause between two scrubs of everything.
const SCRUB_PAUSE: Duration = Duration::from_secs(3600);

/// Nice value of the scrub, the lowest claim to a processor.
const SCRUB_NICE: i32 = 19;

/// Ends the threads when it is dropped.
pub(super) type Running = [Sender<Infallible>; 2];

/// What [`start`] starts with.
pub(super) struct Ends([Receiver<Infallible>; 2]);

pub(super) fn channels() -> (Running, Ends) {
    let ((first, of_first), (second, of_second)) = (channel(), channel());
    ([first, second], Ends([of_first, of_second]))
}

pub(super) fn start(cache: &Arc<Cache>, ends: Ends) -> io::Result<()> {
    let Ends([first, second]) = ends;
    let rate = cache.settings.scrub_bytes_per_s;
    let weak = Arc::downgrade(cache);
    thread::Builder::new().name("cache".into()).spawn(move || keep(&weak, &first))?;
    if rate > 0 {
        let weak = Arc::downgrade(cache);
        thread::Builder::new().name("scrub".into()).spawn(move || scrub_for_ever(&weak, rate, &second))?;
    }
    Ok(())
}

/// Waits; `None` when the cache is gone.
fn pause(end: &Receiver<Infallible>, time: Duration) -> Option<()> {
    matches!(end.recv_timeout(time), Err(RecvTimeoutError::Timeout)).then_some(())
}

fn keep(weak: &Weak<Cache>, end: &Receiver<Infallible>) -> Option<Infallible> {
    let (dir, doubted) = {
        let cache = weak.upgrade()?;
        (cache.dir.clone(), cache.doubted)
    };
    let mut suspects = Vec::new();
    for shard in hot::shards(&dir.join("hot")) {
        let cache = weak.upgrade()?;
        if let Err(error) = hot::scan(&cache, &shard, doubted, &mut suspects) {
            tracing::warn!(dir = %shard.display(), %error, "scan the cache");
        }
    }
    {
        let cache = weak.upgrade()?;
        if let Err(error) = partial::scan(&dir.join("partial"), &cache) {
            tracing::warn!(%error, "scan partial files of the cache");
        }
        cache.measure_directories();
        cache.keep_bounds();
        cache.enter(if doubted.is_none() { Phase::Ready } else { Phase::Verifying });
    }
    let (mut kept, mut dropped) = (0_u64, 0_u64);
    for id in suspects {
        let path = hot::path(&dir, &id);
        // Gone meanwhile, or never to be read again: both a miss.
        let Ok(file) = File::open(&path) else { continue };
        let verdict = verify(&file, &id, &mut |_| weak.strong_count() > 0);
        let cache = weak.upgrade()?;
        if verdict == Verdict::Right {
            kept += 1;
        } else {
            dropped += 1;
            cache.drop_hot(&id);
        }
    }
    if doubted.is_some() {
        let cache = weak.upgrade()?;
        tracing::info!(kept, dropped, "verified cached files that were perhaps not on disk at the unclean boot");
        // Else the next daemon verifies once more.
        if let Err(error) = cache.boot.mark_dirty(&dir) {
            tracing::warn!(%error, "write the boot mark");
        }
        cache.enter(Phase::Ready);
    }
    // Emptied by the boot; its removal is nobody's hurry.
    let _ = super::remove_tree(&dir.join("tmp").join(super::OLD_PARTIAL));
    for tick in 1_u32.. {
        pause(end, TICK)?;
        let cache = weak.upgrade()?;
        cache.measure_directories();
        cache.settle();
        cache.keep_bounds();
        if tick.is_multiple_of(TICKS_PER_SYNC)
            && let Err(error) = cache.sync()
        {
            tracing::warn!(dir = %dir.display(), %error, "sync the cache");
        }
    }
    None
}

fn scrub_for_ever(weak: &Weak<Cache>, rate: u64, end: &Receiver<Infallible>) -> Option<Infallible> {
    // Of this thread alone; without it the rate still holds.
    let _ = rustix::process::setpriority_process(None, SCRUB_NICE);
    let dir = weak.upgrade()?.dir.clone();
    loop {
        pause(end, TICK)?;
        for shard in hot::shards(&dir.join("hot")) {
            for id in hot::ids(&shard) {
                scrub(weak, &dir, &id, rate, end)?;
            }
        }
        pause(end, SCRUB_PAUSE)?;
    }
}

fn scrub(weak: &Weak<Cache>, dir: &Path, id: &ContentId, rate: u64, end: &Receiver<Infallible>) -> Option<()> {
    let Ok(file) = File::open(hot::path(dir, id)) else { return Some(()) };
    let was_in_memory = resident::resident_bytes(&file) != Some(0);
    let scrubbed = weak.upgrade()?.metrics.cache_scrubbed_bytes.clone();
    let verdict = verify(&file, id, &mut |bytes| {
        scrubbed.inc_by(bytes as u64);
        pause(end, Duration::from_micros(bytes as u64 * 1_000_000 / rate)).is_some()
    });
    if !was_in_memory {
        // What was read for this is of no use to others, and would look like a use. Best effort.
        let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
    }
    let cache = weak.upgrade()?;
    if verdict == Verdict::Wrong || verdict == Verdict::Unknown && cache.remembers {
        cache.drop_damaged(id);
    }
    Some(())
}

impl Cache {
    /// Counts the blocks of directories.
    pub(super) fn measure_directories(&self) {
        use std::os::unix::fs::MetadataExt;
        let own = ["hot", "partial", "tmp", "pins"].map(|name| self.dir.join(name));
        let bytes = own.into_iter().chain(hot::shards(&self.dir.join("hot")));
        let bytes = bytes.filter_map(|path| fs::metadata(path).ok()).map(|metadata| metadata.blocks() * 512).sum();
        self.ledger().directories = bytes;
    }

    /// Puts everything on disk, and writes down that it is, if anything was written.
    pub(super) fn sync(&self) -> io::Result<()> {
        use std::sync::atomic::Ordering;
        if !self.unsynced.swap(false, Ordering::Relaxed) {
            return Ok(());
        }
        let ended = {
            let mut period = self.period.write().unwrap_or_else(std::sync::PoisonError::into_inner);
            *period += 1;
            *period - 1
        };
        let synced = File::open(&self.dir).and_then(|dir| Ok(rustix::fs::syncfs(dir)?));
        let written = synced.and_then(|()| super::synced::write(&self.dir, ended));
        if written.is_err() {
            self.unsynced.store(true, Ordering::Relaxed);
        }
        written
    }
}
