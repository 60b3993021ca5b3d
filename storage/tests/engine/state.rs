//! Local state that is somebody else's, of another lake, harmed, or in use.

use std::path::Path;

use narlake_format::nix::signature::SecretKey;
use narlake_sim::Objects;
use narlake_storage::{Bucket, Settings};

use crate::kit::{Kit, key, metrics, open};

async fn reads_back(bucket: &Bucket, state: &Path, object: &narlake_sim::Object) {
    let lake = open(bucket, state, Settings::default()).await.unwrap();
    let cache = lake.default_cache("default", &[key().public()]).await.unwrap();
    let record = lake.lookup(&cache, &object.path.hash).await.unwrap().expect("the path is there");
    let parts =
        futures::TryStreamExt::try_collect::<Vec<_>>(lake.export(&cache, &record).await.unwrap()).await.unwrap();
    assert!(parts.concat() == object.nar);
    lake.close().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn in_use() {
    let kit = Kit::memory().await;
    let state = tempfile::tempdir().unwrap();
    let first = open(&kit.bucket, state.path(), Settings::default()).await.unwrap();
    let Err(error) = open(&kit.bucket, state.path(), Settings::default()).await else { panic!("two owners") };
    assert!(error.chain().contains("another process has this state directory open"), "{}", error.chain());
    drop(first);
    open(&kit.bucket, state.path(), Settings::default()).await.unwrap();
}

/// A state directory of one lake under the bucket of another gives no dedup hits that the bucket does not have.
#[tokio::test(flavor = "multi_thread")]
async fn of_another_lake() {
    let (one, other) = (Kit::memory().await, Kit::memory().await);
    let object = Objects::new(3).object(&[]);
    let state = tempfile::tempdir().unwrap();
    let lake = open(&one.bucket, state.path(), Settings::default()).await.unwrap();
    let cache = lake.default_cache("default", &[key().public()]).await.unwrap();
    let kit = Kit { lake, cache, ..one };
    kit.push(&object).await;
    kit.lake.close().await.unwrap();
    drop(kit);
    let lake = open(&other.bucket, state.path(), Settings::default()).await.unwrap();
    let cache = lake.default_cache("default", &[key().public()]).await.unwrap();
    let kit = Kit { lake, cache, ..other };
    assert!(kit.lake.lookup(&kit.cache, &object.path.hash).await.unwrap().is_none());
    let ingested = kit.send(&object).await;
    assert_eq!(ingested.stats.chunks_known, 0);
    kit.publish(&object).await.unwrap();
    assert!(kit.nar(&object.path.hash).await.unwrap() == object.nar);
}

/// Rule 21: a server that made itself a key does not sign in a cache that is signed with others, unless told to.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_of_its_own() {
    let kit = Kit::memory().await;
    let own = SecretKey::generate("own-1", [2; 32]).unwrap().public();
    let error = kit.lake.default_cache("default", std::slice::from_ref(&own)).await.expect_err("not one of its keys");
    assert!(error.to_string().contains("signed with kit-1, of which own-1"), "{error}");
    let cache = kit.lake.default_cache_adding("default", std::slice::from_ref(&own)).await.unwrap();
    assert_eq!((cache.id(), cache.public_keys()), (kit.cache.id(), &[key().public(), own.clone()][..]));
    // From then on it is one of them, everywhere.
    let other = Kit::over(kit.bucket.clone(), Settings::default()).await;
    assert_eq!(other.lake.default_cache("default", &[own]).await.unwrap().id(), kit.cache.id());
}

fn empty(_: &[u8]) -> Vec<u8> {
    Vec::new()
}

fn halve(bytes: &[u8]) -> Vec<u8> {
    bytes[..bytes.len() / 2].to_vec()
}

fn overwrite(bytes: &[u8]) -> Vec<u8> {
    vec![0x5a; bytes.len()]
}

fn flip(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let middle = bytes.len() / 2;
    if let Some(byte) = bytes.get_mut(middle) {
        *byte ^= 1;
    }
    bytes
}

/// Every file of it, in every way.
#[tokio::test(flavor = "multi_thread")]
async fn harmed() {
    let kit = Kit::memory().await;
    let object = Objects::new(4).object(&[]);
    kit.push(&object).await;
    kit.lake.close().await.unwrap();
    let state = tempfile::tempdir().unwrap();
    reads_back(&kit.bucket, state.path(), &object).await;
    for harm in [empty, halve, overwrite, flip] {
        for folder in ["sled", "segments"] {
            for entry in std::fs::read_dir(state.path().join(folder)).unwrap() {
                let file = entry.unwrap().path();
                if file.is_file() {
                    std::fs::write(&file, harm(&std::fs::read(&file).unwrap())).unwrap();
                }
            }
            reads_back(&kit.bucket, state.path(), &object).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn set_aside() {
    let directory = tempfile::tempdir().unwrap();
    let bucket = Bucket::local(&directory.path().join("bucket"), &metrics()).unwrap();
    let state = directory.path().join("state");
    let lake = open(&bucket, &state, Settings::default()).await.unwrap();
    narlake_storage::Lake::set_state_aside(&state).expect_err("it is in use");
    drop(lake);
    narlake_storage::Lake::set_state_aside(&state).unwrap();
    assert!(!state.join("sled").exists());
    open(&bucket, &state, Settings::default()).await.unwrap();
}
