//! Repeats what may succeed later, under one time limit for all attempts.
//!
//! A create that is repeated may find that its first try had arrived after all; the backend then says "already exists",
//! which [`super::Bucket::put_new`] settles by comparing contents. Streams (listings, bodies, deletions) pass through:
//! whoever reads them knows from where to go on.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMultipartOptions,
    PutOptions, PutPayload, PutResult, RenameOptions, Result,
};

use super::meter::BucketMetrics;

/// How often, how long, how far apart.
#[derive(Debug, Clone, Copy)]
pub struct RetrySettings {
    /// Attempts in all.
    pub attempts_max: u32,
    /// Time limit of one attempt to write.
    pub write_timeout: Duration,
    /// Time limit of one attempt to read, until the answer begins. Less than half of what a fetch may take, so that one
    /// request without an answer is repeated before somebody gives up.
    pub read_timeout: Duration,
    /// Time limit of all attempts and the pauses between them.
    pub deadline: Duration,
    /// The first pause; each further one is twice as long, less a random part.
    pub backoff_first: Duration,
    /// The longest pause.
    pub backoff_max: Duration,
}

impl Default for RetrySettings {
    fn default() -> Self {
        Self {
            attempts_max: 5,
            write_timeout: Duration::from_secs(60),
            read_timeout: Duration::from_secs(10),
            deadline: Duration::from_secs(120),
            backoff_first: Duration::from_millis(50),
            backoff_max: Duration::from_secs(5),
        }
    }
}

/// An `ObjectStore` that repeats transient failures of the one beneath.
#[derive(Debug)]
pub struct Retry<T> {
    inner: T,
    settings: RetrySettings,
    metrics: BucketMetrics,
    /// State of the pauses' jitter; only has to differ between callers, so a plain counter mixed well will do.
    jitter: AtomicU64,
}

impl<T: ObjectStore> Retry<T> {
    /// Wraps a store.
    pub fn new(inner: T, settings: RetrySettings, metrics: BucketMetrics) -> Self {
        Self { inner, settings, metrics, jitter: AtomicU64::new(0) }
    }

    async fn repeat<R, F>(&self, operation: &'static str, mut attempt: impl FnMut() -> F) -> Result<R>
    where
        F: Future<Output = Result<R>>,
    {
        let limit = if operation == "put" || operation == "copy" {
            self.settings.write_timeout
        } else {
            self.settings.read_timeout
        };
        let start = tokio::time::Instant::now();
        let mut tries = 0;
        loop {
            tries += 1;
            let error = match tokio::time::timeout(limit, attempt()).await {
                Ok(Ok(done)) => return Ok(done),
                Ok(Err(error)) if !is_transient(&error) => return Err(error),
                Ok(Err(error)) => error,
                Err(_) => timed_out(operation, limit),
            };
            let pause = self.pause(tries);
            if tries >= self.settings.attempts_max || start.elapsed() + pause >= self.settings.deadline {
                return Err(error);
            }
            self.metrics.retried(operation);
            tracing::debug!(operation, tries, error = %error, pause_ms = pause.as_millis(), "bucket request repeated");
            tokio::time::sleep(pause).await;
        }
    }

    fn pause(&self, tries: u32) -> Duration {
        let full = self.settings.backoff_first.saturating_mul(1 << tries.min(16)).min(self.settings.backoff_max);
        let seed = self.jitter.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        let mixed = (seed ^ (seed >> 31)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 48;
        full.mul_f64(0.5 + mixed as f64 / f64::from(1u32 << 17))
    }
}

/// Whether the same request may succeed later.
pub(super) fn is_transient(error: &object_store::Error) -> bool {
    match error {
        // A full or read-only disk does not mend itself within a retry.
        object_store::Error::Generic { .. } => io_cause(error).is_none_or(|io| {
            !matches!(
                io.kind(),
                std::io::ErrorKind::StorageFull
                    | std::io::ErrorKind::QuotaExceeded
                    | std::io::ErrorKind::ReadOnlyFilesystem
                    | std::io::ErrorKind::PermissionDenied
                    | std::io::ErrorKind::InvalidInput
            )
        }),
        object_store::Error::JoinError { .. } => true,
        _ => false,
    }
}

/// The operating system's error underneath, if there is one.
pub(super) fn io_cause(error: &object_store::Error) -> Option<&std::io::Error> {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = std::error::Error::source(error);
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref() {
            return Some(io);
        }
        cause = error.source();
    }
    None
}

pub(super) fn timed_out(operation: &'static str, limit: Duration) -> object_store::Error {
    object_store::Error::Generic {
        store: "bucket",
        source: format!("{operation}: no answer within {} ms", limit.as_millis()).into(),
    }
}

impl<T: ObjectStore> fmt::Display for Retry<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Retry({})", self.inner)
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<T: ObjectStore> ObjectStore for Retry<T> {
    async fn put_opts(&self, location: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        self.repeat("put", || self.inner.put_opts(location, payload.clone(), options.clone())).await
    }

    async fn put_multipart_opts(&self, at: &Path, options: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        self.repeat("put", || self.inner.put_multipart_opts(at, options.clone())).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.repeat("get", || self.inner.get_opts(location, options.clone())).await
    }

    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        self.repeat("get", || self.inner.get_ranges(location, ranges)).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    fn list_with_offset(&self, prefix: Option<&Path>, offset: &Path) -> BoxStream<'static, Result<ObjectMeta>> {
        self.inner.list_with_offset(prefix, offset)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.repeat("list", || self.inner.list_with_delimiter(prefix)).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.repeat("copy", || self.inner.copy_opts(from, to, options.clone())).await
    }

    async fn rename_opts(&self, from: &Path, to: &Path, options: RenameOptions) -> Result<()> {
        self.repeat("copy", || self.inner.rename_opts(from, to, options.clone())).await
    }
}
