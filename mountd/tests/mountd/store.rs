//! The file system without a kernel, against the trees that were pushed.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::Duration;

use narlake_format::nix::store_path::StorePath;
use narlake_mountd::fs::attr::{Attr, Kind};
use narlake_mountd::fs::error::FsError;
use narlake_mountd::fs::nodes::NodeId;
use narlake_mountd::fs::{Found, LazyStore};
use narlake_mountd::view::{OnOutage, ViewError};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

use crate::kit::{Mood, Node, World, dir, file, link, noise, program};

async fn entry(store: &LazyStore, parent: NodeId, name: impl AsRef<[u8]>) -> Attr {
    match store.lookup(parent, name.as_ref()).await.unwrap() {
        Found::Entry(attr) => attr,
        other => panic!("{other:?}"),
    }
}

async fn root_of(store: &LazyStore, path: &StorePath) -> Attr {
    entry(store, NodeId::ROOT, path.to_string()).await
}

/// Reads everything below an entry back, in reads of this size.
async fn read_back(store: &LazyStore, attr: Attr, step: u32) -> Node {
    assert_eq!(store.getattr(attr.node).await.unwrap(), attr);
    match attr.kind {
        Kind::File { executable } => {
            let mut content = Vec::new();
            loop {
                let bytes = store.read(attr.node, content.len() as u64, step).await.unwrap();
                content.extend_from_slice(&bytes);
                if bytes.len() < step as usize {
                    break;
                }
            }
            assert_eq!(content.len() as u64, attr.size);
            Node::File { executable, content }
        }
        Kind::Symlink => {
            let target = store.readlink(attr.node).await.unwrap();
            assert_eq!(target.len() as u64, attr.size);
            Node::Link(target)
        }
        Kind::Directory => {
            let listing = store.list(attr.node).await.unwrap();
            let mut entries = BTreeMap::new();
            let listed: Vec<(Vec<u8>, Attr, u64)> =
                listing.entries_from(0).map(|entry| (entry.name.to_vec(), entry.attr, entry.next)).collect();
            assert_eq!((listed[0].0.as_slice(), listed[1].0.as_slice()), (b".".as_slice(), b"..".as_slice()));
            for (name, listed_attr, next) in &listed[2..] {
                assert_eq!(entry(store, attr.node, name).await, *listed_attr);
                // A listing goes on where it was left.
                assert_eq!(listing.entries_from(*next).count(), listed.len() - usize::try_from(*next).unwrap());
                entries.insert(name.clone(), Box::pin(read_back(store, *listed_attr, step)).await);
            }
            Node::Dir(entries)
        }
    }
}

async fn check(nodes: &[Node], step: u32) {
    let world = World::new().await;
    let store = world.store();
    for (number, node) in nodes.iter().enumerate() {
        let path = world.push(&format!("object-{number}"), node, &[]).await;
        let attr = root_of(&store.lazy, &path).await;
        assert_eq!(&read_back(&store.lazy, attr, step).await, node);
        // And again, out of the cache.
        assert_eq!(&read_back(&store.lazy, attr, step * 3 + 1).await, node);
    }
}

fn reference(name: &str) -> String {
    format!("/nix/store/{}", World::path(name))
}

#[tokio::test]
async fn every_kind_of_entry() {
    let long = noise(1, 700_000);
    let mut patched = noise(2, 300_000);
    for at in [0, 16_000, 150_000, 299_900] {
        let text = reference("library-1.2");
        patched.splice(at..at, text.bytes());
    }
    let tree = dir([
        (
            "bin",
            dir([("run", program(format!("#!{}/bin/sh\nexit 0\n", reference("shell-5")))), ("tool", program(b"x"))]),
        ),
        ("empty", dir([])),
        ("empty-file", file(b"")),
        ("link", link("bin/run")),
        ("link-out", link(format!("{}/bin/sh", reference("shell-5")))),
        ("long", file(&long)),
        ("patched", file(&patched)),
        ("small", file(b"hello\n")),
    ]);
    check(&[tree, file(b"a file"), program(noise(3, 200_000)), link(reference("library-1.2")), dir([])], 128 * 1024)
        .await;
}

#[tokio::test]
async fn reads_of_odd_sizes() {
    let mut content = noise(4, 400_000);
    let text = reference("library-1.2");
    content.splice(131_060..131_060, text.bytes());
    check(&[dir([("f", file(&content))])], 4096).await;
    check(&[dir([("f", file(&content))])], 70_001).await;
}

fn trees() -> impl Strategy<Value = Node> {
    let content = prop_oneof![
        Just(Vec::new()),
        prop::collection::vec(any::<u8>(), 1..300),
        (any::<u64>(), 1_usize..200_000).prop_map(|(seed, length)| noise(seed, length)),
        (any::<u64>(), 1_usize..60_000, any::<prop::sample::Index>()).prop_map(|(seed, length, at)| {
            let mut content = noise(seed, length);
            let at = at.index(length);
            content.splice(at..at, reference("library-1.2").bytes());
            content
        }),
    ];
    let leaf = prop_oneof![
        4 => (any::<bool>(), content).prop_map(|(executable, content)| Node::File { executable, content }),
        1 => prop_oneof![Just("../x".to_owned()), Just(reference("shell-5"))].prop_map(|target| Node::Link(target.into())),
    ];
    let name = prop::collection::vec(prop_oneof![Just(b'a'), Just(b'b'), Just(b'.'), Just(0xff)], 1..5)
        .prop_filter("reserved", |name| name != b"." && name != b"..");
    leaf.prop_recursive(4, 40, 8, move |inner| {
        prop::collection::btree_map(name.clone(), inner, 0..8).prop_map(Node::Dir)
    })
}

/// Random trees, read back through random sizes of reads.
#[tokio::test]
async fn random_trees() {
    let mut runner = TestRunner::deterministic();
    for step in [4096, 9999, 65_536, 131_072] {
        let nodes: Vec<Node> = (0..6).map(|_| trees().new_tree(&mut runner).unwrap().current()).collect();
        check(&nodes, step).await;
    }
}

#[tokio::test]
async fn the_root_lists_nothing_and_answers_by_name() {
    let world = World::new().await;
    let path = world.push("there", &file(b"x"), &[]).await;
    let store = world.store().lazy;
    assert_eq!(store.list(NodeId::ROOT).await.unwrap().entries_from(0).count(), 2);
    root_of(&store, &path).await;
    assert_eq!(store.list(NodeId::ROOT).await.unwrap().entries_from(0).count(), 2);
    let other_name = format!("{}-other", path.hash);
    for (name, found) in [
        (other_name.as_str(), Found::NotNow),
        (&World::path("absent").to_string(), Found::NotNow),
        (".links", Found::NeverThere),
        ("hello", Found::NeverThere),
        ("\u{fffd}", Found::NeverThere),
    ] {
        assert_eq!(store.lookup(NodeId::ROOT, name.as_bytes()).await.unwrap(), found, "{name}");
    }
    let inside = root_of(&store, &path).await.node;
    assert!(matches!(store.lookup(inside, b"x").await, Err(FsError::NotDirectory)));
    assert!(matches!(store.list(inside).await, Err(FsError::NotDirectory)));
    assert!(matches!(store.readlink(inside).await, Err(FsError::WrongKind(_))));
    assert!(matches!(store.read(NodeId::ROOT, 0, 1).await, Err(FsError::IsDirectory)));
    for stale in [0, 2, inside.0 + 1, 99 << 24] {
        assert!(matches!(store.getattr(NodeId(stale)).await, Err(FsError::Stale { .. })), "{stale}");
    }
}

/// Equal content in two objects, or twice in one, is never one node: an overlay would take it for one file.
#[tokio::test]
async fn nodes_are_never_shared_by_content() {
    let world = World::new().await;
    let tree = dir([("a", file(b"same")), ("b", file(b"same"))]);
    let (first, second) = (world.push("first", &tree, &[]).await, world.push("second", &tree, &[]).await);
    let store = world.store().lazy;
    let mut nodes = Vec::new();
    for path in [&first, &second] {
        let root = root_of(&store, path).await;
        nodes.push(root.node);
        for name in ["a", "b"] {
            nodes.push(entry(&store, root.node, name).await.node);
        }
    }
    let mut distinct = nodes.clone();
    distinct.sort();
    distinct.dedup();
    assert_eq!(distinct.len(), nodes.len());
}

/// The kernel may hold nodeids across daemons, and one that starts while the server is away must still know them.
#[tokio::test]
async fn nodes_outlive_the_process() {
    let world = World::new().await;
    let tree = dir([("link", link(reference("shell-5"))), ("f", file(noise(5, 50_000)))]);
    let path = world.push("kept", &tree, &[]).await;
    let before = {
        let store = world.store();
        let root = root_of(&store.lazy, &path).await;
        read_back(&store.lazy, root, 4096).await;
        root
    };
    let store = world.store();
    assert_eq!(read_back(&store.lazy, before, 4096).await, tree);
    assert_eq!(root_of(&store.lazy, &path).await, before);
}

#[tokio::test]
async fn content_is_fetched_once() {
    let world = World::new().await;
    let content = noise(6, 900_000);
    let path = world.push("big", &dir([("f", file(&content))]), &[]).await;
    let store = world.store();
    let root = root_of(&store.lazy, &path).await;
    let big = entry(&store.lazy, root.node, "f").await;
    let read = |offset: u64| {
        let store = store.lazy.clone();
        async move { store.read(big.node, offset, 131_072).await.unwrap() }
    };
    // Many readers of the same ranges at once.
    let ranges = (0..64_u64).map(|n| (n % 7) * 131_072);
    for (bytes, offset) in futures::future::join_all(ranges.clone().map(read)).await.iter().zip(ranges) {
        let end = content.len().min(usize::try_from(offset).unwrap() + 131_072);
        assert_eq!(bytes, &content[usize::try_from(offset).unwrap()..end]);
    }
    let fetched = world.source.reads.load(Ordering::SeqCst);
    assert!(fetched <= 12, "{fetched} reads for 4 frames and a manifest");
    assert_eq!(world.metrics.cache_fill_bytes.get(), content.len() as u64);
    assert_eq!(std::fs::read_dir(store.cache.dir().join("partial")).unwrap().count(), 0);
    // Later readers need nobody.
    world.source.set(Mood::Stalls);
    read(0).await;
    assert_eq!(world.source.reads.load(Ordering::SeqCst), fetched);
}

#[tokio::test]
async fn partial_files_serve_what_they_have_in_the_next_life() {
    let world = World::new().await;
    let content = noise(7, 2_000_000);
    let path = world.push("big", &file(&content), &[]).await;
    let node = {
        let store = world.store();
        let root = root_of(&store.lazy, &path).await;
        store.lazy.read(root.node, 0, 131_072).await.unwrap();
        assert!(store.cache.usage().0 < 600_000, "{:?}", store.cache.usage());
        root.node
    };
    let store = world.store();
    store.lazy.getattr(node).await.unwrap();
    world.source.set(Mood::Stalls);
    assert_eq!(store.lazy.read(node, 1000, 4096).await.unwrap(), &content[1000..5096]);
    world.source.set(Mood::Answers);
    assert_eq!(store.lazy.read(node, 0, 2_000_000).await.unwrap(), &content[..]);
    assert!(store.cache.usage().0 >= 2_000_000);
}

/// Whatever somebody or something does to files of the cache, what is served is right, and the cache gets well.
#[tokio::test]
async fn damage_in_the_cache_is_never_served() {
    let world = World::new().await;
    let mut patched = noise(12, 600_000);
    let text = reference("library-1.2");
    patched.splice(100_000..100_000, text.bytes());
    let tree = dir([("big", file(noise(13, 900_000))), ("patched", file(&patched)), ("small", file(noise(14, 9000)))]);
    let path = world.push("damaged", &tree, &[]).await;
    let root = {
        let store = world.store();
        let root = root_of(&store.lazy, &path).await;
        // Two complete files, and a part of one.
        for (name, length) in [("small", 9000), ("patched", 700_000), ("big", 100_000)] {
            let entry = entry(&store.lazy, root.node, name).await;
            store.lazy.read(entry.node, 0, length).await.unwrap();
        }
        root
    };
    let cache = world.dir.path().join("cache");
    let mut files = vec![cache];
    let mut damaged = 0;
    while let Some(path) = files.pop() {
        if path.is_dir() {
            files.extend(std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()));
        } else if path.extension().is_none()
            && path.components().any(|part| ["hot", "partial"].map(Some).contains(&part.as_os_str().to_str()))
        {
            damaged += flip(&path);
        }
    }
    assert_eq!(damaged, 3);
    let store = world.store();
    assert_eq!(read_back(&store.lazy, root, 100_000).await, tree);
    assert!(world.metrics.cache_damaged.get() >= 2);
    // And from now on out of the cache.
    world.source.set(Mood::Stalls);
    assert_eq!(read_back(&store.lazy, root, 100_000).await, tree);
}

/// Flips bits all over a file, holes left alone as far as they are whole.
fn flip(path: &std::path::Path) -> u32 {
    let mut bytes = std::fs::read(path).unwrap();
    for at in (50..bytes.len()).step_by(5000) {
        bytes[at] ^= 1;
    }
    // In the middle of a restored store path too.
    if bytes.len() > 100_040 {
        bytes[100_020] ^= 1;
    }
    std::fs::write(path, bytes).unwrap();
    1
}

#[tokio::test]
async fn a_cache_too_small_serves_all_the_same() {
    let mut world = World::new().await;
    world.cache_bytes = 300_000;
    let tree = dir([("a", file(noise(8, 250_000))), ("b", file(noise(9, 250_000))), ("c", file(noise(10, 900_000)))]);
    let path = world.push("large", &tree, &[]).await;
    let store = world.store();
    let root = root_of(&store.lazy, &path).await;
    for _ in 0..3 {
        assert_eq!(read_back(&store.lazy, root, 100_000).await, tree);
        assert!(store.cache.usage().0 <= 300_000);
    }
}

#[tokio::test]
async fn a_source_that_never_answers_ends_in_an_error() {
    let mut world = World::new().await;
    world.deadline = Duration::from_millis(300);
    let path = world.push("slow", &file(noise(11, 50_000)), &[]).await;
    let store = world.store().lazy;
    let root = root_of(&store, &path).await;
    world.source.set(Mood::Stalls);
    let read = store.read(root.node, 0, 4096).await;
    assert!(matches!(&read, Err(error) if error.is_deadline()), "{read:?}");
    let absent = World::path("absent").to_string();
    assert!(matches!(store.lookup(NodeId::ROOT, absent.as_bytes()).await, Err(error) if error.is_deadline()));
    assert!(world.metrics.deadline_expirations.get() >= 1);
    world.source.set(Mood::Answers);
    assert_eq!(store.read(root.node, 0, 4096).await.unwrap().len(), 4096);
    assert_eq!(store.lookup(NodeId::ROOT, absent.as_bytes()).await.unwrap(), Found::NotNow);
}

#[tokio::test]
async fn outages_are_errors_or_absence_as_configured() {
    let mut world = World::new().await;
    world.deadline = Duration::from_secs(2);
    let known = world.push("known", &file(b"x"), &[]).await;
    let unknown = World::path("unknown").to_string();
    for on_outage in [OnOutage::Fail, OnOutage::Build] {
        world.on_outage = on_outage;
        let store = world.store();
        root_of(&store.lazy, &known).await;
        world.source.set(Mood::Down);
        root_of(&store.lazy, &known).await;
        let looked = store.lazy.lookup(NodeId::ROOT, unknown.as_bytes()).await;
        match on_outage {
            OnOutage::Fail => {
                assert!(matches!(looked, Err(FsError::View(ViewError::Remote(_)))), "{looked:?}");
                // Nothing was answered, so nothing needs healing.
                assert_eq!(store.view.negative_len(), 0);
            }
            OnOutage::Build => {
                assert_eq!(looked.unwrap(), Found::NotNow);
                assert_eq!(store.view.negative_len(), 1);
            }
        }
        // Validity is never a matter of configuration.
        assert!(store.view.valid(&World::path("unknown")).await.is_err());
        world.source.set(Mood::Answers);
    }
}

/// Nix asks for these beside each path that it builds; some are real all the same.
#[tokio::test]
async fn scratch_names_are_answered_from_memory() {
    let world = World::new().await;
    let real = world.push("Cargo.lock", &file(b"[package]"), &[]).await;
    let store = world.store();
    for name in [&real, &World::path("x.drv.chroot"), &World::path("y.check")] {
        let found = store.lazy.lookup(NodeId::ROOT, name.to_string().as_bytes()).await.unwrap();
        assert_eq!(found, Found::NotNow);
    }
    assert_eq!(world.source.lookups.load(Ordering::SeqCst), 0);
    assert_eq!(store.view.negative_len(), 3);
    assert!(store.view.valid(&real).await.unwrap().is_some());
    root_of(&store.lazy, &real).await;
}

/// A record that nobody trusted signed is an error, and never shown.
#[tokio::test]
async fn untrusted_records_are_errors() {
    let world = World::new().await;
    let path = World::path("forged");
    world.push_as(&path, &file(b"x"), &[], std::slice::from_ref(&world.other_key)).await;
    let store = world.store();
    let looked = store.lazy.lookup(NodeId::ROOT, path.to_string().as_bytes()).await;
    assert!(matches!(looked, Err(FsError::View(ViewError::Untrusted(_)))), "{looked:?}");
    assert!(matches!(store.view.valid(&path).await, Err(ViewError::Untrusted(_))));
    assert!(matches!(store.view.ensure(&[path]).await, Err(ViewError::Untrusted(_))));
    assert!(world.metrics.records_untrusted.get() >= 3);
}

#[tokio::test]
async fn ensure_brings_whole_closures() {
    let world = World::new().await;
    let leaf = world.push("leaf", &file(b"leaf"), &[]).await;
    let middle = world.push("middle", &file(b"middle"), &[leaf.clone(), World::path("middle")]).await;
    let top = world.push("top", &file(b"top"), std::slice::from_ref(&middle)).await;
    let store = world.store();
    let absent = World::path("absent");
    let closures = store.view.ensure(&[top.clone(), absent.clone()]).await.unwrap();
    assert_eq!(closures.records.len(), 3);
    assert_eq!(closures.missing, [absent.to_string()]);
    assert!(closures.nar_bytes() > 0);
    world.source.set(Mood::Stalls);
    let again = store.view.ensure(std::slice::from_ref(&top)).await.unwrap();
    assert_eq!((again.records.len(), again.missing.len()), (3, 0));
    for path in [leaf, middle, top] {
        assert!(store.view.valid(&path).await.unwrap().is_some());
    }
}

/// The first question for a path brings the rest of its closure along.
#[tokio::test]
async fn a_first_touch_prefetches_the_closure() {
    let world = World::new().await;
    let leaf = world.push("leaf", &file(b"leaf"), &[]).await;
    let top = world.push("top", &file(b"top"), std::slice::from_ref(&leaf)).await;
    let store = world.store();
    root_of(&store.lazy, &top).await;
    for _ in 0..100 {
        if store.view.known(&leaf).is_some() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(store.view.known(&leaf).is_some());
    assert_eq!(world.source.closures.load(Ordering::SeqCst), 1);
}
