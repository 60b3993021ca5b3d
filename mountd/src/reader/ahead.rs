//! What will be read next, guessed from what is read now.
//!
//! Three things are done ahead, all in the background and behind what somebody waits for:
//!
//! - *Places.* When a part of a tree is first read, the places of all its chunks are learnt in one question, so that the
//!   files beside cost none.
//! - *Windows.* Who reads a long file from one end to the other finds the next bytes there: a window of 128 KiB at the
//!   second read, which doubles as it is used up. A seek ends it, and what has not been begun of it is dropped.
//! - *Bets.* A program that opens one file of a directory often opens the next, and one that jumps about in a long file
//!   often comes back near by. With a miss in a directory or file, some of what follows there comes along. Bets that are
//!   won are raised; after two that bring nothing there is none but for every win.
//!
//! Nothing here is needed: what is not read ahead is read when it is wanted. How much is moved in vain is bounded by the
//! fetch engine.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use narlake_format::id::BlobId;
use narlake_storage::fetch::{Ahead, Fetcher, Interest, Nearness};

use super::{WHOLE_MAX, chunks_of};
use crate::fs::nodes::{NodeId, ObjectNumber};
use crate::fs::tree::{EntryNumber, Tree, TreeFile};
use crate::lru::{Lru, Weigh, lru};

/// Entries whose chunks' places are learnt together: the first of each file, and where there is room, more of each.
const ENTRIES_TOGETHER: u32 = 1024;
const OF_ONE_FILE: usize = 8;
const MORE_OF_ONE_FILE: usize = 120;

/// Chunks of a long file whose places are learnt together: 16 MiB and more.
const CHUNKS_TOGETHER: usize = 1024;

/// Most places of one question, in number: it is a body of 128 KiB, and an answer of as much.
const LEARN_MAX: usize = 4096;

/// Smallest and largest window, in bytes of the file.
const WINDOW_MIN: u64 = 128 << 10;
const WINDOW_MAX: u64 = 8 << 20;

/// How far from where the last read ended the next may start, and be the next: the kernel has several under way, not
/// always in order.
const SLACK: u64 = 512 << 10;

/// Smallest and largest read of a window, in bytes of the pack: its first bytes should not wait for its last.
const READ_MIN: u64 = 256 << 10;
const READ_MAX: u64 = 2 << 20;

/// First bet, in bytes of the pack; each win doubles the next, this many times at most.
const BET_FIRST: u64 = 128 << 10;
const RAISES_MAX: u32 = 3;

/// Bets in a directory or file that are made before one is won.
const BETS_FREE: u32 = 2;

/// Most chunks that a bet looks at.
const BET_CHUNKS: usize = 512;

/// How many of the others' frames a byte of a pack becomes, about: what to look at for a bet of so many bytes.
const RAW_PER_STORED: u64 = 4;

/// Bytes of memory for what is remembered of files and directories: 16,000 of them.
const MEMORY_BYTES: u64 = 2 << 20;

/// Where a read is.
#[derive(Clone, Copy)]
pub(super) struct Site<'a> {
    pub(super) node: NodeId,
    pub(super) tree: &'a Tree,
    pub(super) entry: EntryNumber,
    pub(super) file: TreeFile<'a>,
}

impl Site<'_> {
    fn number(&self) -> Option<ObjectNumber> {
        self.node.split().map(|(number, _)| number)
    }

    fn is_long(&self) -> bool {
        self.file.size > WHOLE_MAX
    }
}

/// A part of an object whose places have been asked for.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Part {
    /// Consecutive entries.
    Entries(ObjectNumber, u32),
    /// Consecutive chunks of a file.
    Chunks(NodeId, usize),
}

#[derive(Clone, Copy)]
struct Asked;

impl Weigh for Asked {
    fn bytes(&self) -> u64 {
        size_of::<Part>() as u64
    }
}

/// What is remembered of a file, or a directory.
#[derive(Default)]
struct Habit {
    // Held for arithmetic.
    state: Mutex<State>,
}

impl Weigh for Habit {
    fn bytes(&self) -> u64 {
        size_of::<Self>() as u64
    }
}

#[derive(Default)]
struct State {
    /// Where the last read ended.
    at: u64,
    /// Where the window ends, as far as it has been asked for.
    window_end: u64,
    /// Bytes of the window; 0 while nobody reads on.
    window: u64,
    bets: u32,
    wins: u32,
    interest: Interest,
}

impl State {
    /// A read of this range. The range to read ahead, if there is one.
    fn read(&mut self, range: &Range<u64>, size: u64) -> Option<Range<u64>> {
        let goes_on = self.at > 0 && range.start.abs_diff(self.at) <= SLACK;
        if !goes_on {
            (self.at, self.window, self.window_end) = (range.end, 0, range.end);
            // Nobody waits for what is left of the last one.
            self.interest = Interest::default();
            return None;
        }
        self.at = self.at.max(range.end);
        if self.window_end.saturating_sub(self.at) > self.window / 2 {
            return None;
        }
        self.window = (self.window * 2).clamp(WINDOW_MIN, WINDOW_MAX);
        let start = self.window_end.max(self.at);
        let end = (self.at + self.window).min(size);
        self.window_end = end.max(start);
        (start < end).then_some(start..end)
    }

    /// Something was read that had to be fetched. The bytes to bet on what follows, if any.
    fn missed(&mut self, nearness: Nearness) -> Option<u64> {
        match nearness {
            Nearness::Here => return None,
            Nearness::Ahead => self.wins += 1,
            Nearness::Away => {}
        }
        if self.bets >= BETS_FREE.saturating_add(self.wins) {
            return None;
        }
        self.bets += 1;
        Some(BET_FIRST << self.wins.min(RAISES_MAX))
    }
}

/// Reads ahead for one reader.
pub(super) struct Foresight {
    fetcher: Fetcher,
    asked: Lru<Part, Asked>,
    /// Of long files by their node, and of directories by theirs.
    habits: Lru<NodeId, Arc<Habit>>,
}

impl Foresight {
    pub(super) fn new(fetcher: Fetcher) -> Self {
        Self { fetcher, asked: lru(16_384, MEMORY_BYTES), habits: lru(16_384, MEMORY_BYTES) }
    }

    /// A range of a file is read that the cache may not have: places near it are learnt, and its window goes on. Chunks
    /// that `missing` does not name are there already.
    pub(super) fn read(&self, site: &Site<'_>, range: &Range<u64>, missing: impl FnOnce(Range<usize>) -> Vec<usize>) {
        self.learn(site, range);
        if !site.is_long() {
            return;
        }
        let habit = self.habit(site.node);
        let mut state = habit.state.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(next) = state.read(range, site.file.size) else { return };
        let (window, interest) = (state.window, state.interest.clone());
        drop(state);
        let chunks = missing(chunks_of(&site.file, &next));
        let chunks = chunks.into_iter().filter_map(|chunk| site.file.chunks.get(chunk));
        let blobs: Vec<BlobId> = chunks.map(|id| (*id).into()).collect();
        if blobs.is_empty() {
            return;
        }
        let read_max = (window / 4).clamp(READ_MIN, READ_MAX);
        let beside = Vec::new();
        self.fetcher.ahead(Ahead { blobs, beside, bytes_max: window, read_max, suspicion: false, interest });
    }

    /// A run of chunks is about to be fetched: perhaps some of what follows should come along.
    pub(super) fn fetch(&self, site: &Site<'_>, run: &Range<usize>) {
        let Some(mine) = site.file.chunks.get(run.clone()) else { return };
        let Some(first) = mine.first() else { return };
        let home = if site.is_long() { Some(site.node) } else { self.directory(site) };
        let Some(home) = home else { return };
        let habit = self.habit(home);
        let mut state = habit.state.lock().unwrap_or_else(PoisonError::into_inner);
        // Who reads on has a window.
        if state.window > 0 {
            return;
        }
        let Some(bytes_max) = state.missed(self.fetcher.nearness(&(*first).into())) else { return };
        let interest = state.interest.clone();
        drop(state);
        let blobs = if site.is_long() { following(&site.file, run.end, bytes_max) } else { beside(site, bytes_max) };
        if !blobs.is_empty() {
            let beside = mine.iter().map(|id| (*id).into()).collect();
            self.fetcher.ahead(Ahead { blobs, beside, bytes_max, read_max: READ_MIN, suspicion: true, interest });
        }
    }

    fn directory(&self, site: &Site<'_>) -> Option<NodeId> {
        // The root of an object has nothing beside it.
        let parent = site.tree.parent(site.entry).filter(|parent| *parent != site.entry)?;
        Some(NodeId::new(site.number()?, parent))
    }

    fn habit(&self, node: NodeId) -> Arc<Habit> {
        let made: Result<_, std::convert::Infallible> = self.habits.get_or_insert_with(&node, || Ok(Arc::default()));
        match made {
            Ok(habit) => habit,
            Err(never) => match never {},
        }
    }

    /// Learns the places around a read, unless that has been done.
    fn learn(&self, site: &Site<'_>, range: &Range<u64>) {
        let Some(number) = site.number() else { return };
        let block = site.entry / ENTRIES_TOGETHER;
        if self.first(Part::Entries(number, block)) {
            let entries = block * ENTRIES_TOGETHER..(block + 1).saturating_mul(ENTRIES_TOGETHER);
            let files = || entries.clone().filter_map(|entry| site.tree.file(entry));
            let first = files().flat_map(|file| file.chunks.iter().take(OF_ONE_FILE));
            let more = files().flat_map(|file| file.chunks.iter().skip(OF_ONE_FILE).take(MORE_OF_ONE_FILE));
            self.fetcher.learn(first.chain(more).take(LEARN_MAX).map(|id| (*id).into()).collect());
        }
        if site.file.chunks.len() > OF_ONE_FILE {
            let block = chunks_of(&site.file, range).start / CHUNKS_TOGETHER;
            if self.first(Part::Chunks(site.node, block)) {
                let chunks = site.file.chunks.iter().skip(block * CHUNKS_TOGETHER).take(CHUNKS_TOGETHER);
                self.fetcher.learn(chunks.map(|id| (*id).into()).collect());
            }
        }
    }

    fn first(&self, part: Part) -> bool {
        let first = self.asked.get(&part).is_none();
        if first {
            self.asked.insert(part, Asked);
        }
        first
    }
}

/// What follows a chunk in its file, and then what is at its beginning: programs go back to their headers and tables.
fn following(file: &TreeFile<'_>, chunk: usize, stored: u64) -> Vec<BlobId> {
    let mut raw = stored * RAW_PER_STORED;
    let start_of = |chunk: usize| chunk.checked_sub(1).and_then(|last| file.chunk_ends.get(last)).copied().unwrap_or(0);
    let mut blobs = Vec::new();
    for chunk in (chunk..file.chunks.len()).chain(0..chunk).take(BET_CHUNKS) {
        let (Some(id), Some(end)) = (file.chunks.get(chunk), file.chunk_ends.get(chunk)) else { break };
        let Some(left) = raw.checked_sub(end.saturating_sub(start_of(chunk))) else { break };
        raw = left;
        blobs.push((*id).into());
    }
    blobs
}

/// The files beside one: those that follow it in its directory, then those before it, the nearest first.
fn beside(site: &Site<'_>, stored: u64) -> Vec<BlobId> {
    let siblings = site.tree.parent(site.entry).and_then(|parent| site.tree.children(parent)).unwrap_or_default();
    let at = siblings.partition_point(|sibling| *sibling < site.entry);
    let before = siblings.iter().take(at).rev();
    let after = siblings.iter().skip(at + 1);
    let (mut blobs, mut raw) = (Vec::new(), 0);
    for sibling in after.chain(before) {
        let Some(file) = site.tree.file(*sibling).filter(|file| file.size <= WHOLE_MAX) else { continue };
        raw += file.size;
        if raw > stored * RAW_PER_STORED || blobs.len() >= BET_CHUNKS {
            break;
        }
        blobs.extend(file.chunks.iter().map(|id| BlobId::from(*id)));
    }
    blobs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_double_and_end_with_a_seek() {
        const K: u64 = 1024;
        let size = 100 << 20;
        let mut state = State::default();
        assert_eq!(state.read(&(0..128 * K), size), None, "a first read says nothing");
        assert_eq!(state.read(&(128 * K..256 * K), size), Some(256 * K..384 * K));
        assert_eq!(state.read(&(256 * K..384 * K), size), Some(384 * K..640 * K));
        assert_eq!(state.read(&(384 * K..512 * K), size), Some(640 * K..1024 * K));
        let (mut at, mut reads) = (512 * K, 0);
        while at < 50 << 20 {
            if let Some(next) = state.read(&(at..at + 128 * K), size) {
                assert!(next.end - at <= WINDOW_MAX + 128 * K && next.start >= at + 128 * K);
                reads += 1;
            }
            at += 128 * K;
        }
        assert_eq!(state.window, WINDOW_MAX);
        assert!(reads < 25, "{reads}");
        // The end of the file is the end of the window.
        let mut last = 0..0;
        while at < size {
            last = state.read(&(at..at + 128 * K), size).unwrap_or(last);
            at += 128 * K;
        }
        assert_eq!(last.end, size);
        assert_eq!(state.read(&(0..128 * K), size), None);
        assert_eq!(state.window, 0);
    }

    #[test]
    fn who_seeks_wildly_gets_no_window() {
        let mut state = State::default();
        for n in 0..1000_u64 {
            let at = (n * 7919 % 1000) << 20;
            assert_eq!(state.read(&(at..at + 4096), 1 << 30), None);
        }
    }

    #[test]
    fn bets_follow_luck() {
        use Nearness::{Ahead, Away, Here};
        let mut state = State::default();
        assert_eq!(state.missed(Here), None);
        assert_eq!(state.missed(Away), Some(BET_FIRST));
        assert_eq!(state.missed(Away), Some(BET_FIRST));
        for _ in 0..100 {
            assert_eq!(state.missed(Away), None, "two in vain");
        }
        assert_eq!(state.missed(Ahead), Some(2 * BET_FIRST));
        assert_eq!(state.missed(Away), None);
        for _ in 0..10 {
            state.missed(Ahead);
        }
        assert_eq!(state.missed(Ahead), Some(BET_FIRST << RAISES_MAX));
    }
}
