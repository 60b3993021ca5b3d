//! What the lake has is not stored again.

use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use narlake_format::nix::store_path::StorePath;
use narlake_sim::{Node, Object, Objects};
use narlake_storage::Settings;

use crate::kit::{Kit, directory, file, noise, object, path, stream};

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

/// A push that hangs half way has its chunks in a pack that is still open; a hit on them counts, and brings that pack to
/// the bucket.
#[tokio::test(flavor = "multi_thread")]
async fn a_chunk_in_an_open_pack_is_known() {
    let kit = Kit::memory().await;
    let shared = noise(9, 4 << 20);
    let slow = object("slow", &directory([("f", file(shared.clone())), ("own", file("slow"))]), &[]);
    let quick = object("quick", &directory([("f", file(shared.clone())), ("own", file("quick"))]), &[]);
    let (resume, resumed) = tokio::sync::oneshot::channel::<()>();
    let (head, tail) = slow.nar.split_at(slow.nar.len() - 100);
    let tail = Bytes::copy_from_slice(tail);
    let rest = futures::stream::once(Box::pin(async move {
        resumed.await.map_err(std::io::Error::other)?;
        Ok(tail)
    }));
    let hanging = kit.lake.ingest(&kit.cache, stream(head).chain(rest));
    let (slow_sent, quick_sent) = tokio::join!(hanging, async {
        // Long enough for what the slow one has sent to be cut and compressed.
        tokio::time::sleep(Duration::from_secs(2)).await;
        let sent = kit.send(&quick).await;
        kit.publish(&quick).await.unwrap();
        assert!(kit.nar(&quick.path.hash).await.unwrap() == quick.nar, "acknowledged while the other hangs");
        resume.send(()).unwrap();
        sent
    });
    // All but what the slow one has not filled a frame with yet.
    assert!(quick_sent.stats.bytes_new < 512 << 10, "{:?}", quick_sent.stats);
    kit.lake.keep_upload(&kit.cache, &slow.upload(), &slow_sent.unwrap()).await.unwrap();
    kit.publish(&slow).await.unwrap();
    assert!(kit.nar(&slow.path.hash).await.unwrap() == slow.nar);
}
