//! What the cache holds and when it was last used: the ledger by which room is made.
//!
//! Least recently used goes first. Uses are counted, not timed: one number that only grows. What is being filled is
//! held, and never planned for eviction; neither is what is pinned.

use std::collections::HashSet;

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
    /// It was to be evicted, and put back because the kernel had it in memory. A use takes that away again.
    spared: bool,
}

/// A file that is to be evicted.
#[derive(Debug, Clone, Copy)]
pub(super) struct Planned {
    pub(super) id: ContentId,
    pub(super) partial: bool,
    pub(super) bytes: u64,
    pub(super) spared: bool,
    /// Number of its last use when it was planned.
    used: u64,
}

#[derive(Debug, Default)]
pub(super) struct Ledger {
    entries: Entries,
    used: u64,
    uses: u64,
    /// Bytes of directories.
    pub(super) directories: u64,
    /// Bytes of files that have no name any more, and that somebody has open.
    pub(super) lingering: u64,
    /// Bytes for which there is room, and which are being written.
    pub(super) reserved: u64,
    /// Files that stay.
    pub(super) pinned: HashSet<ContentId>,
}

impl Ledger {
    /// Bytes on disk: of files, of directories, and of what was unlinked and is still open.
    pub(super) const fn used(&self) -> u64 {
        self.used + self.directories + self.lingering
    }

    /// Those, and the bytes that are being written.
    pub(super) const fn spoken_for(&self) -> u64 {
        self.used() + self.reserved
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
        let uses = self.uses;
        let entry = self.entry(id, partial);
        entry.used = uses;
        entry.spared = false;
        entry.partial = partial;
        let before = std::mem::replace(&mut entry.bytes, bytes);
        self.used = self.used - before + bytes;
    }

    /// Takes note of a file that a scan has found, unless it is known: as used long ago, complete ones after partial ones.
    pub(super) fn found(&mut self, id: ContentId, bytes: u64, partial: bool) {
        if self.get(&id).is_none_or(|entry| entry.partial && !partial) {
            let before = self.entries.get(&id).map_or(0, |entry| entry.bytes);
            let entry = self.entry(id, partial);
            entry.used = entry.used.max(u64::from(!partial));
            entry.partial = partial;
            entry.bytes = bytes;
            self.used = self.used - before + bytes;
        }
    }

    fn entry(&mut self, id: ContentId, partial: bool) -> &mut Entry {
        self.uses = self.uses.max(1);
        self.entries.entry(id).or_insert(Entry { bytes: 0, partial, used: 0, held: 0, spared: false })
    }

    pub(super) fn touch(&mut self, id: &ContentId) {
        self.uses += 1;
        if let Some(entry) = self.entries.get_mut(id) {
            entry.used = self.uses;
            entry.spared = false;
        }
    }

    /// Puts back a file that was planned for eviction, once.
    pub(super) fn spare(&mut self, planned: &Planned) {
        self.uses += 1;
        if let Some(entry) = self.entries.get_mut(&planned.id).filter(|entry| entry.used == planned.used) {
            entry.used = self.uses;
            entry.spared = true;
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

    /// The directory is gone, and all files with it.
    pub(super) fn forget_all(&mut self) {
        self.entries.clear();
        self.used = 0;
        self.directories = 0;
    }

    /// Whether a file is still as it was planned: not used, and so perhaps made anew, held or pinned since.
    pub(super) fn is_as_planned(&self, planned: &Planned) -> bool {
        let entry = self.get(&planned.id).filter(|_| !self.pinned.contains(&planned.id));
        entry.is_some_and(|entry| entry.used == planned.used && entry.held == 0)
    }

    /// What has to go so that at most `goal` bytes stay, oldest use first.
    pub(super) fn plan(&self, goal: u64) -> Vec<Planned> {
        let mut left = self.spoken_for();
        if left <= goal {
            return Vec::new();
        }
        let may_go = |(id, entry): &(&ContentId, &Entry)| entry.held == 0 && !self.pinned.contains(id);
        let mut candidates: Vec<_> = self.entries.iter().filter(may_go).collect();
        candidates.sort_unstable_by_key(|(_, entry)| entry.used);
        let mut plan = Vec::new();
        for (id, entry) in candidates {
            if left <= goal {
                break;
            }
            left -= entry.bytes;
            let Entry { bytes, partial, used, spared, .. } = *entry;
            plan.push(Planned { id: *id, partial, bytes, spared, used });
        }
        plan
    }
}
