//! Content that is harmed, lost, away for a while, or only another server's.

use std::time::Duration;

use narlake_format::id::{BlobId, ChunkId};
use narlake_format::lake::keys;
use narlake_sim::{Object, Objects};
use narlake_storage::{Bucket, ErrorKind, Metrics, Settings};
use prometheus::Registry;

use crate::kit::{Kit, directory, file, noise, object, path};

/// Puts other bytes in an object's place.
async fn replace(kit: &Kit, key: &str, bytes: Vec<u8>) {
    kit.bucket.delete(key).await.unwrap();
    kit.bucket.put_new(key, bytes).await.unwrap();
}

/// One whose string table is too long for its record.
async fn with_a_long_table(kit: &Kit) -> Object {
    let below: Vec<Object> =
        (0..60).map(|n| object(&format!("below-{n}-{}", "x".repeat(60)), &file("leaf"), &[])).collect();
    for object in &below {
        kit.push(object).await;
    }
    let names: Vec<String> = below.iter().map(|below| format!("/nix/store/{}", below.path)).collect();
    let tree = directory([("f", file(noise(5, 300_000))), ("names", file(names.join(":")))]);
    object("long", &tree, &below.iter().map(|below| &below.path).collect::<Vec<_>>())
}

/// A string table that is a blob of its own is content like any other: a path without it is not called whole, and
/// sending the NAR again brings it back.
#[tokio::test(flavor = "multi_thread")]
async fn a_string_table_does_not_verify() {
    let kit = Kit::memory().await;
    let object = with_a_long_table(&kit).await;
    let record = kit.push(&object).await.record;
    assert!(record.inline_table().is_none(), "the table is short");
    let table: BlobId = record.table().into();
    let place = kit.lake.locate(&kit.cache.domain(), &[table]).await.unwrap()[0].expect("it has a place");
    let key = keys::pack(&place.pack);
    let mut bytes = kit.bucket.get(&key).await.unwrap().to_vec();
    bytes[place.frame_offset as usize + place.frame_length as usize / 2] ^= 1;
    replace(&kit, &key, bytes).await;
    // A server that has read nothing of it yet.
    let kit = Kit::over(kit.bucket.clone(), Settings::default()).await;
    let record = kit.lake.lookup(&kit.cache, &object.path.hash).await.unwrap().unwrap();
    assert!(kit.lake.check_complete(&kit.cache, &record).await.is_err(), "called complete");
    assert!(!kit.lake.has_upload(&kit.cache, &object.upload()).await.unwrap(), "called whole");
    assert!(!kit.lake.is_whole(&kit.cache, &record).await.unwrap(), "called whole");
    kit.push(&object).await;
    assert!(kit.lake.is_whole(&kit.cache, &record).await.unwrap());
    assert!(kit.nar(&object.path.hash).await.unwrap() == object.nar);
}

/// The same where the pack that holds it is gone.
#[tokio::test(flavor = "multi_thread")]
async fn a_string_table_is_lost() {
    let kit = Kit::memory().await;
    let object = with_a_long_table(&kit).await;
    let record = kit.push(&object).await.record;
    let table: BlobId = record.table().into();
    let place = kit.lake.locate(&kit.cache.domain(), &[table]).await.unwrap()[0].expect("it has a place");
    kit.bucket.delete(&keys::pack(&place.pack)).await.unwrap();
    let kit = Kit::over(kit.bucket.clone(), Settings::default()).await;
    let error = kit.nar(&object.path.hash).await.expect_err("content is lost");
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{}", error.chain());
    kit.push(&object).await;
    assert!(kit.nar(&object.path.hash).await.unwrap() == object.nar);
}

/// A path is whole until reading it has failed, and again once it was pushed; its neighbours are whole all the time.
#[tokio::test(flavor = "multi_thread")]
async fn whole_or_not() {
    let kit = Kit::memory().await;
    let good = kit.push(&object("good", &file(noise(1, 10_000)), &[])).await.record;
    let bad_object = object("bad", &file(noise(2, 2_000_000)), &[]);
    let bad = kit.push(&bad_object).await.record;
    let whole = async |record| kit.lake.is_whole(&kit.cache, record).await.unwrap();
    // One bit of some chunk, which nobody notices before its turn comes.
    let place = kit.lake.locate(&kit.cache.domain(), &[bad.manifest().into()]).await.unwrap()[0].unwrap();
    let key = keys::pack(&place.pack);
    let mut bytes = kit.bucket.get(&key).await.unwrap().to_vec();
    bytes[1_000_000] ^= 1;
    replace(&kit, &key, bytes).await;
    assert!(whole(&bad).await, "nobody has noticed");
    let error = kit.nar(&bad_object.path.hash).await.expect_err("a chunk does not verify");
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{}", error.chain());
    assert!(!whole(&bad).await && whole(&good).await);
    kit.push(&bad_object).await;
    assert!(whole(&bad).await);
    assert!(kit.nar(&bad_object.path.hash).await.unwrap() == bad_object.nar);
}

/// A bucket that denies for a while what it has is believed again when it lists it.
#[tokio::test(start_paused = true)]
async fn a_pack_was_away() {
    let kit = Kit::memory().await;
    let object = Objects::new(9).object(&[]);
    kit.push(&object).await;
    let mut away = Vec::new();
    for pack in kit.bucket.list(keys::PACKS, None).await.unwrap() {
        away.push((pack.key.clone(), kit.bucket.get(&pack.key).await.unwrap()));
        kit.bucket.delete(&pack.key).await.unwrap();
    }
    let error = kit.nar(&object.path.hash).await.expect_err("its content is away");
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{}", error.chain());
    for (key, bytes) in away {
        kit.bucket.put_new(&key, bytes).await.unwrap();
    }
    // All of the bucket is not listed again and again.
    tokio::time::sleep(Duration::from_secs(31)).await;
    assert!(kit.nar(&object.path.hash).await.unwrap() == object.nar);
}

/// What two servers stored, each for itself, is lost only with both copies, also after a restart.
#[tokio::test(start_paused = true)]
async fn the_other_copy() {
    let one = Kit::memory().await;
    let other = Kit::over(one.bucket.clone(), Settings::default()).await;
    let shared = object("shared", &file(noise(1, 100_000)), &[]);
    let far = object("far", &file(noise(2, 100_000)), &[]);
    let first = one.send(&shared).await;
    one.publish(&shared).await.unwrap();
    let second = other.send(&shared).await;
    assert!(second.packs.iter().all(|pack| !first.packs.contains(pack)), "each stored it for itself");
    // Missing something else, the one learns of the other's packs.
    other.push(&far).await;
    assert!(one.nar(&far.path.hash).await.unwrap() == far.nar);
    one.lake.close().await.unwrap();
    for packs in [&second.packs, &first.packs] {
        for kit in [&one, &Kit::over(one.bucket.clone(), Settings::default()).await] {
            let mut away = Vec::new();
            for key in packs.iter().map(keys::pack) {
                away.push((key.clone(), kit.bucket.get(&key).await.unwrap()));
                kit.bucket.delete(&key).await.unwrap();
            }
            let nar = kit.nar(&shared.path.hash).await;
            assert!(nar.expect("there is another copy") == shared.nar);
            for (key, bytes) in away {
                kit.bucket.put_new(&key, bytes).await.unwrap();
            }
            tokio::time::sleep(Duration::from_secs(31)).await;
        }
    }
}

/// Listings of a bucket: who asks together shares one, who asks for what is nowhere does not cause one each time.
#[tokio::test(start_paused = true)]
async fn listings_are_shared() {
    let registry = Registry::new();
    let kit = Kit::over(Bucket::memory(&Metrics::new(&registry)), Settings::default()).await;
    let listings = || -> f64 {
        let families = registry.gather().into_iter().filter(|family| family.name() == "narlake_bucket_requests_total");
        let samples = families.flat_map(|family| family.get_metric().to_vec());
        let lists = samples.filter(|sample| sample.get_label().iter().any(|label| label.value() == "list"));
        lists.map(|sample| sample.get_counter().get_value()).sum()
    };
    let nowhere = async |n: u8| {
        let ids = [BlobId::from(ChunkId::of(&[n]))];
        // Time stands still here unless somebody waits.
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert_eq!(kit.lake.locate(&kit.cache.domain(), &ids).await.unwrap(), [None]);
    };
    let before = listings();
    futures::future::join_all((0..50).map(&nowhere)).await;
    // One of the end, one of everything, and at most one of the end for those who asked while that was under way.
    assert!(listings() - before <= 3.0, "{}", listings() - before);
    let (start, before) = (tokio::time::Instant::now(), listings());
    for n in 50..60 {
        nowhere(n).await;
    }
    assert!(listings() - before <= 10.0 && start.elapsed() >= Duration::from_secs(9), "{:?}", start.elapsed());
    // A listing goes on when those who asked for it have gone.
    let before = listings();
    tokio::time::timeout(Duration::from_millis(10), nowhere(60)).await.expect_err("it waits for its turn");
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert!((1.0..2.0).contains(&(listings() - before)));
}

/// Two servers on one bucket, each of which learns of the other's packs only when it misses something.
#[tokio::test(flavor = "multi_thread")]
async fn another_servers_content() {
    let one = Kit::memory().await;
    let other = Kit::over(one.bucket.clone(), Settings::default()).await;
    let object = object("far", &directory([("f", file(noise(1, 400_000)))]), &[]);
    one.push(&object).await;
    assert!(other.nar(&object.path.hash).await.unwrap() == object.nar);
    // The NAR goes to the one, the narinfo to the other.
    let split =
        Object { path: path("split"), nar: file(noise(2, 400_000)).nar(), references: vec![object.path.clone()] };
    one.send(&split).await;
    assert!(other.lake.has_upload(&other.cache, &split.upload()).await.unwrap());
    other.publish(&split).await.unwrap();
    for kit in [&one, &other] {
        assert!(kit.nar(&split.path.hash).await.unwrap() == split.nar);
    }
}

/// While segments cannot be written to a full or broken disk, none go to the bucket in vain, and nothing is lost.
#[tokio::test(flavor = "multi_thread")]
async fn no_place_for_segments() {
    let kit = Kit::memory().await;
    let object = Objects::new(10).object(&[]);
    kit.push(&object).await;
    let segments = kit.state.path().join("segments");
    std::fs::remove_dir_all(&segments).unwrap();
    std::fs::write(&segments, b"in the way").unwrap();
    for _ in 0..2 {
        let error = kit.lake.close().await.expect_err("there is no place");
        assert!(error.chain().contains("segments"), "{}", error.chain());
    }
    assert!(kit.bucket.list(keys::SEGMENTS, None).await.unwrap().is_empty());
    std::fs::remove_file(&segments).unwrap();
    std::fs::create_dir(&segments).unwrap();
    let (first, second) = tokio::join!(kit.lake.close(), kit.lake.close());
    first.and(second).unwrap();
    assert_eq!(kit.bucket.list(keys::SEGMENTS, None).await.unwrap().len(), 1, "the same blobs twice");
    assert!(kit.nar(&object.path.hash).await.unwrap() == object.nar);
}
