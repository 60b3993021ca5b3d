//! The storage engine of narlake over one bucket.
//!
//! [`Lake`] is the front door. A push goes [`Lake::ingest`] (`ingest`, `pack::writer`, `bucket`), [`Lake::keep_upload`],
//! [`Lake::publish`] (`publish`, `records`); a read goes [`Lake::lookup`], then [`Lake::export`] (`manifest`, `fetch`)
//! or, from a worker, [`fetch::Fetcher`] over its own source. Knows nothing of HTTP, FUSE or command lines.
//!
//! The bucket is the only truth. The state directory (an index of what lies where, records seen) is derived from it, may
//! be deleted at any time, and belongs to one process, which a lock file sees to.

pub mod bucket;
mod clock;
mod complete;
mod config;
mod cpu;
mod error;
mod export;
pub mod fetch;
mod index;
mod ingest;
mod kv;
mod lake;
pub mod manifest;
mod metrics;
mod mint;
mod pack;
mod publish;
mod records;
mod rewrite;
mod source;
mod upload;

pub use bucket::Bucket;
pub use clock::{Clock, Entropy, OsEntropy, SystemClock};
pub use config::{Components, Settings};
pub use error::{Error, ErrorKind, Rejection};
pub use index::map;
pub use ingest::{IngestStats, Ingested};
pub use lake::{DocumentKey, Lake, LakeInfo, LakeStats};
pub use metrics::Metrics;
pub use publish::{Outcome, Published};
pub use records::Cache;
pub use upload::UploadName;
