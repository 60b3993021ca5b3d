//! Counts and times every request that reaches the backend. It sits under the retries, so an attempt is a request; what
//! a cache above answers is not seen here.

use std::fmt;
use std::ops::Range;

use async_trait::async_trait;
use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMultipartOptions,
    PutOptions, PutPayload, PutResult, RenameOptions, Result,
};
use tokio::time::Instant;

pub use crate::metrics::BucketMetrics;

/// An `ObjectStore` that meters the one beneath.
#[derive(Debug)]
pub struct Meter<T> {
    inner: T,
    metrics: BucketMetrics,
}

impl<T: ObjectStore> Meter<T> {
    /// Wraps a store.
    pub fn new(inner: T, metrics: BucketMetrics) -> Self {
        Self { inner, metrics }
    }

    async fn timed<R>(&self, operation: &'static str, request: impl Future<Output = Result<R>>) -> Result<R> {
        let start = Instant::now();
        let result = request.await;
        // "Not there" and "already there" are answers, not failures.
        let failed = match &result {
            Ok(_) => false,
            Err(object_store::Error::NotFound { .. } | object_store::Error::AlreadyExists { .. }) => false,
            Err(_) => true,
        };
        self.metrics.request(operation, failed, start.elapsed());
        result
    }
}

impl<T: ObjectStore> fmt::Display for Meter<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Meter({})", self.inner)
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl<T: ObjectStore> ObjectStore for Meter<T> {
    async fn put_opts(&self, location: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        let length = payload.content_length() as u64;
        let result = self.timed("put", self.inner.put_opts(location, payload, options)).await?;
        self.metrics.written(length);
        Ok(result)
    }

    async fn put_multipart_opts(&self, at: &Path, options: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        self.timed("put", self.inner.put_multipart_opts(at, options)).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let head = options.head;
        let operation = if head { "head" } else { "get" };
        let found = self.timed(operation, self.inner.get_opts(location, options)).await?;
        if !head {
            self.metrics.read(found.range.end - found.range.start);
        }
        Ok(found)
    }

    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        let found = self.timed("get", self.inner.get_ranges(location, ranges)).await?;
        self.metrics.read(found.iter().map(|bytes| bytes.len() as u64).sum());
        Ok(found)
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let metrics = self.metrics.clone();
        let start = Instant::now();
        self.inner
            .delete_stream(locations)
            .inspect(move |deleted| metrics.request("delete", deleted.is_err(), start.elapsed()))
            .boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.metrics.request("list", false, std::time::Duration::ZERO);
        self.inner.list(prefix)
    }

    fn list_with_offset(&self, prefix: Option<&Path>, offset: &Path) -> BoxStream<'static, Result<ObjectMeta>> {
        self.metrics.request("list", false, std::time::Duration::ZERO);
        self.inner.list_with_offset(prefix, offset)
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.timed("list", self.inner.list_with_delimiter(prefix)).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.timed("copy", self.inner.copy_opts(from, to, options)).await
    }

    async fn rename_opts(&self, from: &Path, to: &Path, options: RenameOptions) -> Result<()> {
        self.timed("copy", self.inner.rename_opts(from, to, options)).await
    }
}
