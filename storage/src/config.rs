//! What a lake is opened with: numbers in [`Settings`], objects in [`Components`].

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use narlake_format::limits::NAR_SIZE_MAX;
use narlake_format::nix::store_path::StoreDir;

use crate::bucket::Bucket;
use crate::clock::{Clock, Entropy};
use crate::fetch::FetchSettings;
use crate::metrics::Metrics;

/// Numbers and names.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Directory of the derived local state.
    pub state_dir: PathBuf,
    /// The store directory of a lake that is made now; an existing lake keeps its own.
    pub store_dir: StoreDir,
    /// zstd level of new frames, 1 to 19.
    pub zstd_level: i32,
    /// Threads that compress.
    pub cpu_threads: usize,
    /// How long a commit waits for others to share its pack while some are still writing.
    pub seal_after: Duration,
    /// Largest NAR taken, in bytes.
    pub nar_size_max: u64,
    /// How content is read back.
    pub fetch: FetchSettings,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            state_dir: PathBuf::from("narlake-data/state"),
            store_dir: StoreDir::default(),
            zstd_level: 3,
            cpu_threads: std::thread::available_parallelism().map_or(2, usize::from),
            seal_after: Duration::from_millis(200),
            nar_size_max: NAR_SIZE_MAX,
            fetch: FetchSettings {
                // Packs of the same bucket are near: joining frames over a small gap beats another request.
                gap_bytes: 64 << 10,
                // The index is in this process, and knows first what may not be relied on any more.
                locations_max: 0,
                ..FetchSettings::default()
            },
        }
    }
}

/// Objects.
#[derive(Clone)]
pub struct Components {
    /// The truth.
    pub bucket: Bucket,
    /// Time.
    pub clock: Arc<dyn Clock>,
    /// Randomness.
    pub entropy: Arc<dyn Entropy>,
    /// Where everything is counted.
    pub metrics: Metrics,
}
