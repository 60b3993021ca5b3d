//! Decoded frames, and what of them was read before anybody asked.
//!
//! Reading ahead is a bet. Two rules keep the stakes small: what is under way or lies unused takes a small part of the
//! cache, so that readers do not push each other's frames out unread; and the bytes that were read on mere suspicion
//! and never used are at most as many as those that were asked for, and a little to begin with, so that a worker never
//! moves more than about twice what its programs touch.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use bytes::Bytes;
use quick_cache::sync::Cache;
use quick_cache::{DefaultHashBuilder, Lifecycle, OptionsBuilder, Weighter};
use tokio::time::Instant;

use super::flight::FrameKey;
use crate::metrics::FetchMetrics;

/// Bytes that may be read on suspicion before anything was asked for.
const CREDIT_FIRST: u64 = 512 << 10;

/// Most that is saved up: what was used long ago says little of what will be.
const CREDIT_MAX: u64 = 32 << 20;

/// Share of the cache that is for frames asked for again after others had come. The rest takes what is new, which must
/// last until whoever reads on comes to it: by default it would be 3 %, less than one frame in each shard.
const AGAIN_SHARE: f64 = 0.25;

/// How long a frame that was read ahead counts as about to be used.
const FRESH: Duration = Duration::from_secs(10);

/// A decoded frame.
pub(super) struct Frame {
    pub(super) content: Bytes,
    /// Its bytes in the pack, while it has been read ahead and nobody has asked for it yet; else 0.
    unused: AtomicU64,
}

#[derive(Clone)]
struct ByLength;

impl Weighter<FrameKey, Arc<Frame>> for ByLength {
    fn weight(&self, _: &FrameKey, frame: &Arc<Frame>) -> u64 {
        frame.content.len() as u64 + 160
    }
}

/// Settles what is evicted.
#[derive(Clone)]
struct Settle(Arc<Ledger>);

impl Lifecycle<FrameKey, Arc<Frame>> for Settle {
    type RequestState = ();

    fn on_evict(&self, (): &mut (), _: FrameKey, frame: Arc<Frame>) {
        self.0.unused(&frame);
    }
}

/// Frames in memory, bounded in bytes.
pub(super) struct Frames {
    decoded: Cache<FrameKey, Arc<Frame>, ByLength, DefaultHashBuilder, Settle>,
    ledger: Arc<Ledger>,
}

/// What reading ahead has cost and brought.
struct Ledger {
    /// Most bytes that may be under way or lie unused.
    ahead_max: u64,
    // Held for arithmetic only. No lock is taken under it.
    balance: Mutex<Balance>,
    metrics: FetchMetrics,
}

struct Balance {
    /// Bytes that may be read on suspicion.
    credit: u64,
    /// Bytes under way, or unused.
    out: u64,
    /// Frames that lie unused, the oldest first; some have been used or evicted since.
    fresh: VecDeque<(Instant, Weak<Frame>)>,
}

impl Ledger {
    fn balance(&self) -> MutexGuard<'_, Balance> {
        self.balance.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A frame that was read ahead goes, or has lain for too long.
    fn unused(&self, frame: &Frame) {
        let bytes = frame.unused.swap(0, Ordering::AcqRel);
        if bytes > 0 {
            let mut balance = self.balance();
            balance.out = balance.out.saturating_sub(bytes);
        }
    }
}

impl Frames {
    pub(super) fn new(bytes_max: u64, metrics: FetchMetrics) -> Self {
        let balance = Balance { credit: CREDIT_FIRST, out: 0, fresh: VecDeque::new() };
        // Packed three to one and more, that is up to half of the cache.
        let ledger = Arc::new(Ledger { ahead_max: bytes_max / 6, balance: Mutex::new(balance), metrics });
        let items = usize::try_from(bytes_max / (256 << 10)).unwrap_or(usize::MAX).max(16);
        // One shard: split, no part of the budget would hold many frames.
        let mut options = OptionsBuilder::new();
        options.shards(1).hot_allocation(AGAIN_SHARE).estimated_items_capacity(items).weight_capacity(bytes_max);
        let options = options.build();
        let lifecycle = Settle(Arc::clone(&ledger));
        // Absent numbers leave an untuned cache of that budget, which differs in speed alone.
        let decoded = match options {
            Ok(options) => Cache::with_options(options, ByLength, DefaultHashBuilder::default(), lifecycle),
            Err(_) => Cache::with(items, bytes_max, ByLength, DefaultHashBuilder::default(), lifecycle),
        };
        Self { decoded, ledger }
    }

    /// A frame, for somebody who asked for it.
    pub(super) fn get(&self, key: &FrameKey) -> Option<Bytes> {
        let frame = self.decoded.get(key)?;
        self.used(&frame);
        Some(frame.content.clone())
    }

    /// Whether a frame is here, and whether it has been read ahead and not been used.
    pub(super) fn peek(&self, key: &FrameKey) -> Option<bool> {
        self.decoded.peek(key).map(|frame| frame.unused.load(Ordering::Acquire) > 0)
    }

    /// Keeps a frame. `ahead` are its bytes in the pack, if nobody has asked for it.
    pub(super) fn insert(&self, key: FrameKey, content: Bytes, ahead: Option<u64>) {
        let frame = Arc::new(Frame { content, unused: AtomicU64::new(ahead.unwrap_or(0)) });
        if let Some(bytes) = ahead {
            self.ledger.metrics.ahead_bytes.inc_by(bytes);
            self.ledger.balance().fresh.push_back((Instant::now(), Arc::downgrade(&frame)));
        }
        self.decoded.insert(key, frame);
    }

    pub(super) fn forget(&self, key: &FrameKey) {
        if let Some((_, frame)) = self.decoded.remove(key) {
            self.ledger.unused(&frame);
        }
    }

    /// Somebody has asked for bytes that were not read ahead.
    pub(super) fn asked(&self, bytes: u64) {
        let mut balance = self.ledger.balance();
        balance.credit = (balance.credit + bytes).min(CREDIT_MAX);
    }

    /// Leave to read this many bytes ahead; on suspicion, only with credit.
    pub(super) fn grant(&self, bytes: u64, suspicion: bool) -> bool {
        let now = Instant::now();
        let mut balance = self.ledger.balance();
        if suspicion && balance.credit < bytes {
            return false;
        }
        while let Some((since, frame)) = balance.fresh.front() {
            let frame = frame.upgrade().filter(|frame| frame.unused.load(Ordering::Acquire) > 0);
            if frame.is_some() && now.duration_since(*since) < FRESH {
                break;
            }
            balance.fresh.pop_front();
            let bytes = frame.map_or(0, |frame| frame.unused.swap(0, Ordering::AcqRel));
            balance.out = balance.out.saturating_sub(bytes);
        }
        if balance.out + bytes > self.ledger.ahead_max {
            return false;
        }
        balance.credit = balance.credit.saturating_sub(bytes);
        balance.out += bytes;
        true
    }

    /// What was granted has come to nothing, unread.
    pub(super) fn returned(&self, bytes: u64) {
        let mut balance = self.ledger.balance();
        balance.out = balance.out.saturating_sub(bytes);
        balance.credit = (balance.credit + bytes).min(CREDIT_MAX);
    }

    fn used(&self, frame: &Frame) {
        let bytes = frame.unused.swap(0, Ordering::AcqRel);
        if bytes > 0 {
            self.ledger.metrics.ahead_used_bytes.inc_by(bytes);
            let mut balance = self.ledger.balance();
            balance.out = balance.out.saturating_sub(bytes);
            // What it took, and what somebody has asked for now.
            balance.credit = (balance.credit + 2 * bytes).min(CREDIT_MAX);
        }
    }
}

#[cfg(test)]
mod tests {
    use narlake_format::id::{PackId, Ulid};
    use narlake_format::lake::location::{Domain, PackRef};

    use super::*;

    fn key(offset: u32) -> FrameKey {
        FrameKey { pack: PackRef { domain: Domain::Public, id: PackId(Ulid::from(1)) }, offset }
    }

    #[tokio::test(start_paused = true)]
    async fn bets_are_covered() {
        let frames = Frames::new(64 << 20, FetchMetrics::unregistered());
        let some = CREDIT_FIRST / 2;
        assert!(frames.grant(some, true) && frames.grant(some, true) && !frames.grant(1, true));
        // What was lost stays lost, what was used comes back twice.
        frames.insert(key(1), Bytes::from_static(b"x"), Some(some));
        frames.insert(key(2), Bytes::from_static(b"y"), Some(some));
        assert_eq!(frames.peek(&key(1)), Some(true));
        assert!(frames.get(&key(1)).is_some());
        assert_eq!(frames.peek(&key(1)), Some(false));
        assert!(frames.grant(2 * some, true) && !frames.grant(1, true));
        frames.asked(10);
        assert!(frames.grant(10, true));
    }

    /// A cache that is full of what was used, some of it often, still takes as much as may be read ahead.
    #[tokio::test(start_paused = true)]
    async fn what_was_read_ahead_lasts_until_it_is_used() {
        const FRAME: usize = 256 << 10;
        let frames = Frames::new(64 << 20, FetchMetrics::unregistered());
        let content = Bytes::from(vec![0; FRAME]);
        for number in 0..1000 {
            frames.insert(key(number), content.clone(), None);
            assert!(frames.get(&key(number)).is_some());
            if number % 3 > 0 {
                frames.get(&key(number - 1));
            }
        }
        let stored = FRAME as u64 / 3;
        let mut ahead = Vec::new();
        while frames.grant(stored, false) {
            let number = 2000 + u32::try_from(ahead.len()).unwrap();
            frames.insert(key(number), content.clone(), Some(stored));
            ahead.push(key(number));
        }
        assert!(ahead.len() > 100, "{}", ahead.len());
        let kept = ahead.iter().filter(|key| frames.get(key).is_some()).count();
        assert_eq!(kept, ahead.len());
    }

    #[tokio::test(start_paused = true)]
    async fn what_lies_unused_is_bounded() {
        let frames = Frames::new(6000, FetchMetrics::unregistered());
        assert!(frames.grant(1000, false) && !frames.grant(1, false));
        frames.insert(key(1), Bytes::from_static(b"x"), Some(600));
        frames.returned(400);
        assert!(frames.grant(400, false) && !frames.grant(1, false));
        // After a while nobody will come for it.
        tokio::time::sleep(FRESH).await;
        assert!(frames.grant(600, false));
        assert_eq!(frames.peek(&key(1)), Some(false));
        // Pushed out, it does not count either.
        frames.insert(key(2), Bytes::from_static(b"x"), Some(600));
        frames.forget(&key(2));
        assert!(frames.grant(600, false));
    }
}
