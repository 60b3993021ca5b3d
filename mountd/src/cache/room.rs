//! Room on the disk: who may write how much, and what goes for it.
//!
//! What counts as used is what the file system counts: blocks of files, directories, what is being written, and files
//! that were evicted and that somebody still has open. Those who hold such files on the cache's behalf, overlays, are
//! asked to let go after each batch ([`Cache::set_holders`]); if that is not enough more is evicted, and if nothing is
//! left to evict content is served and not kept.

use std::fs::File;
use std::sync::PoisonError;

use super::{Cache, FILL_PATIENCE, SHRINK_PATIENCE, hot, partial, resident};

/// Rounds of eviction for one request: some may only spare, and one may only unlink what is still open.
const ROUNDS: usize = 4;

/// The first of those, in which files that the kernel has in memory are spared.
const SPARING_ROUNDS: usize = 2;

/// The least free space is at most this share of the file system, in percent, whatever is set.
const FREE_PERCENT_MAX: u64 = 5;

/// Room for bytes that are about to be written. They count as used until it is dropped, which is to be after they are in
/// the ledger.
pub(super) struct Room<'a> {
    cache: &'a Cache,
    bytes: u64,
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        self.cache.ledger().reserved -= self.bytes;
    }
}

impl Cache {
    /// Names who is to let go of evicted files: called after each batch of unlinks after which files are still open,
    /// and before used space is measured again. It must not call the cache, and must return within seconds.
    pub fn set_holders(&self, release: super::Release) {
        *self.holders.lock().unwrap_or_else(PoisonError::into_inner) = Some(release);
    }

    /// Drops what was used least recently until at most `bytes` are used, as far as that can be. Returns how many bytes
    /// were unlinked. Waits a little for the first scan; 0 if it is not done by then.
    pub fn shrink_to(&self, bytes: u64) -> u64 {
        if !self.wait_scanned(SHRINK_PATIENCE) {
            return 0;
        }
        let _turn = self.evicting.lock().unwrap_or_else(PoisonError::into_inner);
        self.evict(bytes, false)
    }

    /// Room for this many bytes more, made if need be. `None` if there is none.
    pub(super) fn room(&self, bytes: u64) -> Option<Room<'_>> {
        if bytes > self.settings.bytes_max || !self.wait_scanned(FILL_PATIENCE) {
            return None;
        }
        if let Some(room) = self.reserve(bytes) {
            return Some(room);
        }
        let _turn = self.evicting.lock().unwrap_or_else(PoisonError::into_inner);
        for round in 0..ROUNDS {
            if let Some(room) = self.reserve(bytes) {
                return Some(room);
            }
            self.evict_for(bytes, round < SPARING_ROUNDS);
        }
        self.reserve(bytes)
    }

    /// Goes below the bounds again if others have filled the disk, or what is on it has grown.
    pub(super) fn keep_bounds(&self) {
        let within = self.ledger().spoken_for() <= self.settings.bytes_max;
        if !within || self.lacking(0) > 0 {
            let _turn = self.evicting.lock().unwrap_or_else(PoisonError::into_inner);
            self.evict_for(0, false);
        }
    }

    fn evict_for(&self, bytes: u64, sparing: bool) {
        let mut goal = self.settings.low_water().min(self.settings.bytes_max - bytes);
        let lacking = self.lacking(bytes);
        if lacking > 0 {
            goal = goal.min(self.ledger().spoken_for().saturating_sub(lacking));
        }
        self.evict(goal, sparing);
    }

    fn reserve(&self, bytes: u64) -> Option<Room<'_>> {
        let lacking = self.lacking(bytes);
        let mut ledger = self.ledger();
        let fits = lacking == 0 && ledger.spoken_for() + bytes <= self.settings.bytes_max;
        fits.then(|| {
            ledger.reserved += bytes;
            Room { cache: self, bytes }
        })
    }

    /// By how much the file system would be short of the free space it is to keep, with this many bytes more in it.
    fn lacking(&self, bytes: u64) -> u64 {
        // One that does not answer says so at the write.
        let Ok(counts) = rustix::fs::statvfs(&self.dir) else { return 0 };
        let least = self.settings.free_bytes.min(counts.f_blocks * counts.f_frsize / 100 * FREE_PERCENT_MAX);
        (least + bytes).saturating_sub(counts.f_bavail * counts.f_frsize)
    }

    /// Unlinks what the plan says, for a caller who has its turn; files that the kernel has in memory are spared once if
    /// `sparing`. Files may be made anew meanwhile: at worst the ledger then counts one that is gone, which whoever
    /// opens it finds out.
    fn evict(&self, goal: u64, sparing: bool) -> u64 {
        let plan = self.ledger().plan(goal);
        let mut unlinked = 0;
        for planned in plan {
            if sparing && !planned.partial && !planned.spared && self.is_in_memory(&planned.id) {
                self.ledger().spare(&planned);
                self.metrics.cache_spared.inc();
                continue;
            }
            let remove = if planned.partial { partial::remove } else { hot::remove };
            let mut ledger = self.ledger();
            if ledger.is_as_planned(&planned) && remove(&self.dir, &planned.id, planned.bytes, &mut self.departed()) {
                ledger.forget(&planned.id);
                unlinked += planned.bytes;
                self.metrics.cache_evictions.inc();
            }
        }
        if self.settle() > 0 && unlinked > 0 {
            let release = self.holders.lock().unwrap_or_else(PoisonError::into_inner).clone();
            if let Some(release) = release {
                release();
                self.settle();
            }
        }
        unlinked
    }

    /// Takes note of evicted files that are gone at last; returns the bytes of the others.
    pub(super) fn settle(&self) -> u64 {
        let mut ledger = self.ledger();
        ledger.lingering = self.departed().settle();
        self.show(&ledger);
        ledger.lingering
    }

    /// Whether the kernel has at least half of a complete file in memory.
    fn is_in_memory(&self, id: &narlake_format::id::ContentId) -> bool {
        let Ok(file) = File::open(hot::path(&self.dir, id)) else { return false };
        let Ok(length) = file.metadata().map(|metadata| metadata.len()) else { return false };
        resident::resident_bytes(&file).is_some_and(|resident| resident > 0 && resident >= length / 2)
    }
}
