//! What a fetch engine has moved, in numbers.

use crate::metrics::FetchMetrics;

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

impl FetchStats {
    /// What the counters say now.
    pub(super) fn of(metrics: &FetchMetrics) -> Self {
        Self {
            requests: metrics.requests.get(),
            bytes: metrics.bytes.get(),
            frames: metrics.frames.get(),
            locates: metrics.locates.get(),
            ahead_bytes: metrics.ahead_bytes.get(),
            ahead_used_bytes: metrics.ahead_used_bytes.get(),
            hedges: metrics.hedges.get(),
        }
    }
}
