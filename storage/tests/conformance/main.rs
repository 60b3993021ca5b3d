//! object_store's own conformance suite over our stack of decorators, on every backend that there is: memory, a
//! directory, and a real S3 service.

mod seaweedfs;

use std::sync::Arc;
use std::time::Duration;

use futures::TryStreamExt;
use narlake_storage::bucket::meter::Meter;
use narlake_storage::bucket::retry::{Retry, RetrySettings};
use narlake_storage::{Bucket, Metrics};
use object_store::integration as suite;
use object_store::limit::LimitStore;
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::prefix::PrefixStore;
use object_store::{ObjectStore, ObjectStoreExt as _};
use prometheus::Registry;

use self::seaweedfs::SeaweedFs;

type Backend = Arc<dyn ObjectStore>;

/// The stack as `Bucket::stacked` builds it.
fn stacked(backend: Backend) -> Retry<Meter<LimitStore<Backend>>> {
    let metrics = Metrics::new(&Registry::new()).bucket;
    let metered = Meter::new(LimitStore::new(backend, 128), metrics.clone());
    Retry::new(metered, RetrySettings::default(), metrics)
}

/// What every backend must do. Each test of the suite wants to begin with nothing: `make` gives it a place of its own.
async fn check(make: impl Fn(&str) -> Backend, supports_update: bool) {
    let make = |name| stacked(make(name));
    suite::get_opts(&make("get_opts")).await;
    suite::put_opts(&make("put_opts"), supports_update).await;
    suite::stream_get(&make("stream_get")).await;
    suite::list_uses_directories_correctly(&make("list_uses_directories_correctly")).await;
    suite::list_with_delimiter(&make("list_with_delimiter")).await;
    suite::list_with_offset_exclusivity(&make("list_with_offset_exclusivity")).await;
    suite::rename_and_copy(&make("rename_and_copy")).await;
}

/// A listing goes on after each key, across folders. Keys of our shape: no name beside another is the beginning of it,
/// which SeaweedFS would sort by folder and not by key.
async fn check_list_after_keys(store: &impl ObjectStore) {
    let keys =
        ["lake/01.json", "packs/01x/01a", "packs/01x/01b", "packs/public/01a", "packs/public/01c", "segments/00/01"];
    let mut sorted: Vec<Path> = keys.iter().map(|key| Path::from(*key)).collect();
    sorted.sort_unstable();
    for key in &sorted {
        store.put(key, "x".into()).await.unwrap();
    }
    for (n, key) in sorted.iter().enumerate() {
        let listed = store.list_with_offset(None, key).map_ok(|meta| meta.location).try_collect::<Vec<_>>().await;
        let mut listed = listed.unwrap();
        listed.sort_unstable();
        assert_eq!(listed, sorted[n + 1..], "after {key}");
    }
    for key in &sorted {
        store.delete(key).await.unwrap();
        assert!(matches!(store.get(key).await, Err(object_store::Error::NotFound { .. })), "{key}");
    }
}

#[tokio::test]
async fn memory() {
    check(|_| Arc::new(InMemory::new()), true).await;
    suite::put_get_delete_list(&stacked(Arc::new(InMemory::new()))).await;
    suite::copy_if_not_exists(&stacked(Arc::new(InMemory::new()))).await;
    suite::copy_rename_nonexistent_object(&stacked(Arc::new(InMemory::new()))).await;
    check_list_after_keys(&stacked(Arc::new(InMemory::new()))).await;
    suite::put_get_attributes(&stacked(Arc::new(InMemory::new()))).await;
    suite::multipart_out_of_order(&stacked(Arc::new(InMemory::new()))).await;
    suite::multipart_race_condition(&stacked(Arc::new(InMemory::new())), true).await;
}

#[tokio::test]
async fn local_directory() {
    let directory = tempfile::tempdir().unwrap();
    let make = |name: &str| -> Backend {
        let place = directory.path().join(name);
        std::fs::create_dir(&place).unwrap();
        Arc::new(LocalFileSystem::new_with_prefix(place).unwrap().with_fsync(true))
    };
    check(make, false).await;
    suite::put_get_delete_list(&stacked(make("put_get_delete_list"))).await;
    suite::copy_if_not_exists(&stacked(make("copy_if_not_exists"))).await;
    suite::copy_rename_nonexistent_object(&stacked(make("copy_rename_nonexistent_object"))).await;
}

#[tokio::test]
async fn s3() {
    let service = SeaweedFs::start().await;
    let client: Backend = Arc::new(service.client());
    let make = |name: &str| -> Backend { Arc::new(PrefixStore::new(Arc::clone(&client), name)) };
    check(make, true).await;
    // Of SeaweedFS 4.48 two things are not asked that we do not need: `put_get_delete_list` goes on after names of
    // folders and finds what is in them missing; and we never copy, where its errors differ.
    check_list_after_keys(&stacked(make("list_after_keys"))).await;
    suite::multipart_out_of_order(&stacked(make("multipart_out_of_order"))).await;
    check_signed_urls(&service).await;
}

/// A signed URL reads a range of its object without keys, for as long as was said, and no other object.
async fn check_signed_urls(service: &SeaweedFs) {
    let metrics = Metrics::new(&Registry::new());
    let read = |url: String| async move {
        let output = tokio::process::Command::new("curl")
            .args(["--silent", "--max-time", "10", "--write-out", "\n%{http_code}", "--range", "3-5", &url])
            .output()
            .await
            .expect("curl runs");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    for prefix in [None, Some("some/prefix")] {
        let bucket = Bucket::s3(&service.settings(prefix), &metrics).unwrap();
        bucket.put_new("packs/public/01a", b"0123456789".to_vec()).await.unwrap();
        bucket.put_new("packs/public/01b", b"other".to_vec()).await.unwrap();
        let url = |valid_s| {
            let bucket = bucket.clone();
            async move { bucket.signed_url("packs/public/01a", Duration::from_secs(valid_s)).await.unwrap().unwrap() }
        };
        assert_eq!(read(url(60).await).await, "345\n206");
        let other = url(60).await.replace("01a", "01b");
        assert!(read(other).await.ends_with("\n403"));
        let short = url(1).await;
        tokio::time::sleep(Duration::from_secs(3)).await;
        assert!(read(short).await.ends_with("\n403"));
    }
    assert_eq!(Bucket::memory(&metrics).signed_url("packs/public/01a", Duration::from_secs(60)).await.unwrap(), None);
}
