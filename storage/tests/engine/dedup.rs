//! What the lake has is not stored again.

use std::time::Duration;

use narlake_format::nix::store_path::StorePath;
use narlake_sim::{Node, Object, Objects};
use narlake_storage::Settings;

use crate::kit::{Kit, directory, file, noise, object, path};

#[tokio::test(flavor = "multi_thread")]
async fn a_known_nar_stores_nothing() {
    let kit = Kit::memory().await;
    let object = Objects::new(2).object(&[]);
    let first = kit.send(&object).await;
    assert!(first.stats.chunks_new > 0 && first.stats.bytes_stored > 0);
    let stored = kit.stored().await;
    let again = kit.send(&object).await;
    assert_eq!((again.stats.chunks_new, again.stats.bytes_stored), (0, 0));
    assert_eq!((again.manifest, again.table, again.nar_hash), (first.manifest, first.table, first.nar_hash));
    assert_eq!(kit.stored().await, stored);
    // Also to a server that has just come up.
    let other = Kit::over(kit.bucket.clone(), Settings::default()).await;
    assert_eq!(other.send(&object).await.stats.bytes_stored, 0);
    assert_eq!(other.stored().await, stored);
}

#[tokio::test(flavor = "multi_thread")]
async fn files_are_shared_between_paths() {
    let kit = Kit::memory().await;
    let shared = noise(1, 700_000);
    let one = object("one", &directory([("a", file(shared.clone())), ("b", file(noise(2, 50_000)))]), &[]);
    let two = object("two", &directory([("other-name", file(shared)), ("z", file(noise(3, 50_000)))]), &[]);
    kit.push(&one).await;
    let second = kit.send(&two).await;
    assert!(second.stats.bytes_new == 50_000, "{:?}", second.stats);
    kit.publish(&two).await.unwrap();
    for object in [&one, &two] {
        assert!(kit.nar(&object.path.hash).await.unwrap() == object.nar);
    }
}

/// One NAR that holds a file many times.
#[tokio::test(flavor = "multi_thread")]
async fn files_are_shared_within_a_path() {
    let kit = Kit::memory().await;
    let copies = (0..50).map(|n| (format!("{n}").into_bytes(), file(noise(1, 10_000)))).collect();
    let ingested = kit.ingest(&Node::Directory(copies).nar()).await.unwrap();
    assert_eq!((ingested.stats.chunks_new, ingested.stats.chunks_known), (1, 49));
    assert_eq!(ingested.stats.bytes_new, 10_000);
}

/// Every hash in it is another, nothing else.
#[tokio::test(flavor = "multi_thread")]
async fn a_mass_rebuild_stores_almost_nothing() {
    let kit = Kit::memory().await;
    let mut generation: Vec<Object> = Vec::new();
    for n in 0..6 {
        let name = format!("package-{n}");
        let own = path(&name);
        let below: Vec<StorePath> = generation.iter().map(|object| object.path.clone()).chain([own]).collect();
        let full = |path: &StorePath| format!("/nix/store/{path}");
        let search: Vec<String> = below.iter().map(full).collect();
        let mut program = noise(n, 400_000);
        for (place, path) in below.iter().enumerate() {
            program.splice(place * 60_000..place * 60_000, format!("{}/lib\0{}\0", full(path), path.hash).into_bytes());
        }
        let tree = directory([
            ("bin", directory([("program", file(program))])),
            ("current", Node::Symlink(full(&below[0]).into_bytes())),
            ("search", file(search.join(":"))),
        ]);
        let object = object(&name, &tree, &below.iter().collect::<Vec<_>>());
        kit.push(&object).await;
        generation.push(object);
    }
    let mut objects = Objects::new(4);
    let first = kit.stored().await;
    let mut renamed = Vec::new();
    for old in &generation {
        let new = objects.rebuild(old, &renamed);
        assert!(new.nar != old.nar);
        let ingested = kit.send(&new).await;
        assert_eq!(ingested.stats.chunks_new, 0, "{}", old.path);
        kit.publish(&new).await.unwrap();
        assert!(kit.nar(&new.path.hash).await.unwrap() == new.nar);
        renamed.push((old.path.clone(), new.path));
    }
    let second = kit.stored().await - first;
    assert!(second * 1000 < first, "{second} bytes for a rebuild of {first}");
}

/// Pushes that run at once and hold the same files store them about once: a hit on a pack that is still open counts.
#[tokio::test(flavor = "multi_thread")]
async fn pushes_at_once_share_what_is_in_flight() {
    let kit = Kit::over(
        narlake_storage::Bucket::memory(&crate::kit::metrics()),
        Settings { seal_after: Duration::from_secs(5), ..Settings::default() },
    )
    .await;
    let shared = noise(9, 4 << 20);
    let pushed: Vec<Object> = (0..4)
        .map(|n| {
            object(&format!("p{n}"), &directory([("f", file(shared.clone())), ("own", file(format!("{n}")))]), &[])
        })
        .collect();
    let sent = futures::future::join_all(pushed.iter().map(|object| kit.send(object))).await;
    for object in &pushed {
        kit.publish(object).await.unwrap();
        assert!(kit.nar(&object.path.hash).await.unwrap() == object.nar);
    }
    let new: u64 = sent.iter().map(|ingested| ingested.stats.bytes_new).sum();
    // Two that meet a chunk before either has a frame of it both store it: frames in flight, no more.
    assert!(new < 3 * shared.len() as u64, "{new}");
}
