//! What a fetch engine counts.

use prometheus::IntCounter;

/// Counters of a fetch engine, to be registered by whoever has a page for them. Cloning shares them.
#[derive(Debug, Clone)]
pub struct FetchMetrics {
    /// Ranged reads of packs.
    pub requests: IntCounter,
    /// Bytes those returned.
    pub bytes: IntCounter,
    /// Frames decoded.
    pub frames: IntCounter,
    /// Questions where blobs are.
    pub locates: IntCounter,
    /// Bytes of frames that were read before anybody asked for them.
    pub ahead_bytes: IntCounter,
    /// Bytes of those that somebody asked for afterwards.
    pub ahead_used_bytes: IntCounter,
    /// Reads that were asked for a second time because the first took long.
    pub hedges: IntCounter,
    /// Reads of those in which the second answer came first.
    pub hedges_won: IntCounter,
}

impl FetchMetrics {
    /// Counters that are on no page.
    #[must_use]
    pub fn unregistered() -> Self {
        let counter = |name: &str| {
            // The names are here, and well-formed: a mistake is ours, and any test meets it.
            IntCounter::new(name, name).unwrap_or_else(|error| panic!("define {name}: {error}"))
        };
        Self {
            requests: counter("requests"),
            bytes: counter("bytes"),
            frames: counter("frames"),
            locates: counter("locates"),
            ahead_bytes: counter("ahead_bytes"),
            ahead_used_bytes: counter("ahead_used_bytes"),
            hedges: counter("hedges"),
            hedges_won: counter("hedges_won"),
        }
    }

    /// What they say now.
    pub(super) fn stats(&self) -> FetchStats {
        FetchStats {
            requests: self.requests.get(),
            bytes: self.bytes.get(),
            frames: self.frames.get(),
            locates: self.locates.get(),
            ahead_bytes: self.ahead_bytes.get(),
            ahead_used_bytes: self.ahead_used_bytes.get(),
            hedges: self.hedges.get(),
        }
    }
}

/// What a fetch engine has moved since it was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FetchStats {
    /// Ranged reads of packs.
    pub requests: u64,
    /// Bytes those reads returned.
    pub bytes: u64,
    /// Frames decoded.
    pub frames: u64,
    /// Questions where blobs are.
    pub locates: u64,
    /// Bytes of frames that were read before anybody asked for them.
    pub ahead_bytes: u64,
    /// Bytes of those that somebody asked for afterwards.
    pub ahead_used_bytes: u64,
    /// Reads that were asked for a second time.
    pub hedges: u64,
}
