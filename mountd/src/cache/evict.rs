//! What the cache holds and when it was last used: the ledger by which room is made.
//!
//! Least recently used goes first. Uses are counted, not timed: one number that only grows. What is being filled is
//! held, and never planned for eviction.

use narlake_format::id::ContentId;

use super::Entries;

/// What is known of one file.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    pub(super) bytes: u64,
    pub(super) partial: bool,
    /// Number of the last use.
    used: u64,
    /// Fills under way.
    held: u32,
}

/// A file that is to be evicted.
#[derive(Debug, Clone, Copy)]
pub(super) struct Planned {
    pub(super) id: ContentId,
    pub(super) partial: bool,
    /// Number of its last use when it was planned.
    used: u64,
}

#[derive(Debug, Default)]
pub(super) struct Ledger {
    entries: Entries,
    used: u64,
    uses: u64,
}

impl Ledger {
    /// Bytes on disk.
    pub(super) const fn used(&self) -> u64 {
        self.used
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn get(&self, id: &ContentId) -> Option<&Entry> {
        self.entries.get(id)
    }

    /// Takes note of a file, new or changed, as just used. One that is complete stays complete: a reader that still fills
    /// a partial one beside it has come late.
    pub(super) fn put(&mut self, id: ContentId, bytes: u64, partial: bool) {
        if partial && self.get(&id).is_some_and(|entry| !entry.partial) {
            return self.touch(&id);
        }
        self.uses += 1;
        let entry = self.entries.entry(id).or_insert(Entry { bytes: 0, partial, used: 0, held: 0 });
        self.used = self.used - entry.bytes + bytes;
        entry.bytes = bytes;
        entry.partial = partial;
        entry.used = self.uses;
    }

    pub(super) fn touch(&mut self, id: &ContentId) {
        self.uses += 1;
        if let Some(entry) = self.entries.get_mut(id) {
            entry.used = self.uses;
        }
    }

    /// A partial file is being filled, or no longer is.
    pub(super) fn hold(&mut self, id: &ContentId, held: bool) {
        if let Some(entry) = self.entries.get_mut(id) {
            entry.held = if held { entry.held + 1 } else { entry.held.saturating_sub(1) };
        }
    }

    pub(super) fn forget(&mut self, id: &ContentId) {
        if let Some(entry) = self.entries.remove(id) {
            self.used -= entry.bytes;
        }
    }

    /// Forgets a file that was unlinked as planned, unless it has been used, and so perhaps made anew, since the plan.
    pub(super) fn evicted(&mut self, planned: &Planned) {
        if self.get(&planned.id).is_some_and(|entry| entry.used == planned.used && entry.held == 0) {
            self.forget(&planned.id);
        }
    }

    /// What has to go so that at most `goal` bytes stay, oldest use first.
    pub(super) fn plan(&self, goal: u64) -> Vec<Planned> {
        if self.used <= goal {
            return Vec::new();
        }
        let mut candidates: Vec<_> = self.entries.iter().filter(|(_, entry)| entry.held == 0).collect();
        candidates.sort_unstable_by_key(|(_, entry)| entry.used);
        let mut left = self.used;
        let mut plan = Vec::new();
        for (id, entry) in candidates {
            if left <= goal {
                break;
            }
            left -= entry.bytes;
            plan.push(Planned { id: *id, partial: entry.partial, used: entry.used });
        }
        plan
    }
}
