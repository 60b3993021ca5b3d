//! A bucket that takes requests and then says nothing more: every wait ends.

use std::fmt;
use std::ops::Range;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::{self, BoxStream, StreamExt};
use narlake_storage::{Bucket, ErrorKind};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use tokio::time::Instant;

use crate::kit::metrics;

/// Writes work; bodies, listings and deletions begin and never end.
#[derive(Debug, Default)]
struct Silent(InMemory);

impl fmt::Display for Silent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("silent")
    }
}

#[async_trait]
impl ObjectStore for Silent {
    async fn put_opts(&self, at: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        self.0.put_opts(at, payload, options).await
    }

    async fn put_multipart_opts(&self, at: &Path, options: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        self.0.put_multipart_opts(at, options).await
    }

    async fn get_opts(&self, at: &Path, options: GetOptions) -> Result<GetResult> {
        let found = self.0.get_opts(at, options).await?;
        Ok(GetResult { payload: GetResultPayload::Stream(stream::pending().boxed()), ..found })
    }

    async fn get_ranges(&self, _: &Path, _: &[Range<u64>]) -> Result<Vec<Bytes>> {
        std::future::pending().await
    }

    fn delete_stream(&self, _: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        stream::pending().boxed()
    }

    fn list(&self, _: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        stream::pending().boxed()
    }

    async fn list_with_delimiter(&self, _: Option<&Path>) -> Result<ListResult> {
        std::future::pending().await
    }

    async fn copy_opts(&self, _: &Path, _: &Path, _: CopyOptions) -> Result<()> {
        std::future::pending().await
    }
}

/// Longest time that any request may take with all its repetitions.
const LIMIT: Duration = Duration::from_secs(180);

#[tokio::test(start_paused = true)]
async fn no_request_waits_for_ever() {
    let bucket = Bucket::stacked(Silent::default(), "silent".to_owned(), &metrics());
    let first = || Bytes::from_static(b"first");
    bucket.put_new("k/1", first()).await.unwrap();
    let start = Instant::now();
    for (what, error) in [
        ("get", bucket.get("k/1").await.expect_err("no body")),
        ("range", bucket.get_range("k/1", 0..3).await.expect_err("no body")),
        ("list", bucket.list("k/", None).await.expect_err("no page")),
        ("list from", bucket.list("k/", Some("k/0")).await.expect_err("no page")),
        ("folders", bucket.list_folders("").await.expect_err("no page")),
        ("delete", bucket.delete("k/1").await.expect_err("no answer")),
        ("compare", bucket.put_new("k/1", first()).await.expect_err("no body to compare with")),
    ] {
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{what}: {}", error.chain());
        assert!(error.chain().contains("no answer within"), "{what}: {}", error.chain());
    }
    assert!(start.elapsed() < 7 * LIMIT, "{:?}", start.elapsed());
}
