//! What is pushed comes back, byte for byte, also after everything but the bucket is gone.

use narlake_format::lake::record::nar_url;
use narlake_sim::{Node, Objects};
use narlake_storage::{Bucket, Outcome, Settings};

use crate::kit::{Kit, directory, file, metrics, noise, object};

async fn check(bucket: Bucket) {
    let kit = Kit::over(bucket.clone(), Settings::default()).await;
    let mut objects = Objects::new(1);
    let mut pushed = Vec::new();
    for _ in 0..8 {
        let below: Vec<_> = pushed.iter().map(|object: &narlake_sim::Object| object.path.clone()).collect();
        let object = objects.object(&below);
        let published = kit.push(&object).await;
        assert_eq!(published.outcome, Outcome::New);
        assert_eq!(published.record.info().url, nar_url(&object.info()));
        pushed.push(object);
    }
    // Half of them into a segment.
    kit.lake.close().await.unwrap();
    let last = objects.object(&[]);
    kit.push(&last).await;
    pushed.push(last);

    let other = Kit::over(bucket, Settings::default()).await;
    for object in &pushed {
        assert!(kit.nar(&object.path.hash).await.unwrap() == object.nar, "{}", object.path);
        assert!(other.nar(&object.path.hash).await.unwrap() == object.nar, "{}, reopened", object.path);
    }
    assert_eq!(other.lake.info().lake, kit.lake.info().lake);
    let (closure, missing) = other.lake.closure(&other.cache, &[pushed[7].path.hash]).await.unwrap();
    assert!(missing.is_empty());
    for (n, record) in closure.iter().enumerate() {
        let own = &record.info().store_path;
        for reference in record.info().references.iter().filter(|reference| *reference != own) {
            assert!(closure[..n].iter().any(|below| below.info().store_path == *reference), "references come first");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn memory() {
    check(Bucket::memory(&metrics())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn local() {
    let directory = tempfile::tempdir().unwrap();
    check(Bucket::local(&directory.path().join("bucket"), &metrics()).unwrap()).await;
}

/// Shapes at the edges of the formats.
#[tokio::test(flavor = "multi_thread")]
async fn edges() {
    let kit = Kit::memory().await;
    let own = crate::kit::path("edge").hash.to_string();
    let store_path = format!("/nix/store/{own}-edge");
    let mut deep = file("");
    for _ in 0..400 {
        deep = directory([("d", deep)]);
    }
    let trees = [
        file(""),
        file("x"),
        Node::File { executable: true, bytes: Vec::new() },
        Node::Symlink(b"/".to_vec()),
        Node::Symlink(store_path.clone().into_bytes()),
        directory([]),
        deep,
        file(noise(1, 16 << 10)),
        file(noise(1, (16 << 10) + 1)),
        file(vec![0; 3 << 20]),
        file(noise(2, 5 << 20)),
        file(store_path.repeat(20_000)),
        file([noise(3, (64 << 10) - 20), store_path.clone().into_bytes(), noise(4, 100)].concat()),
        directory([("a", file("")), ("b", file("")), ("c", Node::Symlink(b"a".to_vec()))]),
    ];
    for (n, tree) in trees.iter().enumerate() {
        let object = object("edge", tree, &[]);
        let ingested = kit.ingest(&object.nar).await.unwrap();
        assert_eq!(ingested.nar_size, object.nar.len() as u64);
        assert_eq!(ingested.nar_hash, object.info().nar_hash);
        let path = crate::kit::object(&format!("edge-{n}"), tree, &[]);
        kit.push(&path).await;
        assert!(kit.nar(&path.path.hash).await.unwrap() == object.nar, "tree {n}");
    }
}

/// More names than a part of a manifest holds, more chunks than a frame, more bytes than a pack.
#[tokio::test(flavor = "multi_thread")]
async fn large() {
    let kit = Kit::memory().await;
    let many = (0..12_000).map(|n| (format!("file-{n:06}").into_bytes(), file(format!("content {n}")))).collect();
    let tree = directory([("big", file(noise(5, 40 << 20))), ("many", Node::Directory(many))]);
    let object = object("large", &tree, &[]);
    let ingested = kit.send(&object).await;
    assert!(ingested.packs.len() >= 2, "{:?}", ingested.packs);
    kit.publish(&object).await.unwrap();
    assert!(kit.nar(&object.path.hash).await.unwrap() == object.nar);
}
