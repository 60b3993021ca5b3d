//! What the benchmarks share: real NARs from a flat binary cache, the parts of an ingest run alone, and the engine.

pub mod corpus;
pub mod engine;
pub mod link;
pub mod parts;
pub mod span;
pub mod tree;

/// Megabytes (10^6) a second.
#[must_use]
pub fn rate(bytes: u64, seconds: f64) -> f64 {
    bytes as f64 / 1e6 / seconds.max(1e-9)
}
