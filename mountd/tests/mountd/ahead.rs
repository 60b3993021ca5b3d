//! How many questions and reads the usual ways to read cost, and that what is read ahead stays in bounds.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use narlake_format::nix::store_path::StorePath;
use narlake_mountd::fs::attr::Attr;
use narlake_mountd::fs::nodes::NodeId;
use narlake_mountd::fs::{Found, LazyStore};

use crate::kit::{Node, Source, World, dir, file, noise};

/// What the kernel asks for at once.
const STEP: u32 = 128 << 10;

async fn walk(store: &LazyStore, path: &StorePath, names: &[&str]) -> Attr {
    let mut at = find(store, NodeId::ROOT, &path.to_string()).await;
    for name in names {
        at = find(store, at.node, name).await;
    }
    at
}

async fn find(store: &LazyStore, parent: NodeId, name: &str) -> Attr {
    match store.lookup(parent, name.as_bytes()).await.unwrap() {
        Found::Entry(attr) => attr,
        other => panic!("{name}: {other:?}"),
    }
}

fn reads(source: &Source) -> u64 {
    source.reads.load(Ordering::SeqCst)
}

fn locates(source: &Source) -> u64 {
    source.locates.load(Ordering::SeqCst)
}

fn bytes(source: &Source) -> u64 {
    source.read_bytes.load(Ordering::SeqCst)
}

/// Bytes that compress about four to one, as programs and their libraries do, and differ with the seed.
fn code(seed: u64, length: usize) -> Vec<u8> {
    noise(seed, length.div_ceil(4)).into_iter().flat_map(|byte| [byte, byte >> 7, 0, 0]).take(length).collect()
}

/// Sleeps until nothing is read any more.
async fn quiet(source: &Source) {
    let mut seen = u64::MAX;
    while seen != reads(source) + locates(source) {
        seen = reads(source) + locates(source);
        tokio::time::sleep(Duration::from_millis(150)).await;
    }
}

/// A long file, from one end to the other: reads grow, and hardly any is waited for.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_read_on_and_on() {
    let world = World::new().await;
    let content = noise(1, 10 << 20);
    let path = world.push("long", &dir([("file", file(&content))]), &[]).await;
    let store = world.store();
    let attr = walk(&store.lazy, &path, &["file"]).await;
    world.source.move_away(Duration::from_millis(5));
    world.source.count_anew();
    let mut at = 0;
    while at < content.len() {
        let some = store.lazy.read(attr.node, at as u64, STEP).await.unwrap();
        assert!(*some == content[at..at + some.len()]);
        at += some.len();
    }
    quiet(&world.source).await;
    let (reads, locates, bytes) = (reads(&world.source), locates(&world.source), bytes(&world.source));
    eprintln!("10 MiB in {reads} reads of packs, {locates} questions, {bytes} bytes");
    // 80 reads of the kernel, 40 frames.
    assert!(reads <= 20, "{reads} reads");
    assert!(locates <= 8, "{locates} questions");
    assert!(bytes < (10 << 20) + (1 << 20), "{bytes} bytes");
    let stats = store.fetcher.stats();
    assert!(stats.ahead_bytes > 8 << 20 && stats.ahead_used_bytes == stats.ahead_bytes, "{stats:?}");
}

/// Small files of one directory, in order: what comes along with one is used by the next.
#[tokio::test(flavor = "multi_thread")]
async fn a_directory_of_small_files() {
    let world = World::new().await;
    let files: BTreeMap<Vec<u8>, Node> =
        (0..50).map(|n| (format!("module-{n:02}").into_bytes(), file(noise(n, 40_000)))).collect();
    let path = world.push("modules", &Node::Dir(files.clone()), &[]).await;
    let store = world.store();
    let directory = walk(&store.lazy, &path, &[]).await;
    world.source.move_away(Duration::from_millis(5));
    world.source.count_anew();
    for (name, node) in &files {
        let attr = find(&store.lazy, directory.node, std::str::from_utf8(name).unwrap()).await;
        let Node::File { content, .. } = node else { unreachable!() };
        assert!(*store.lazy.read(attr.node, 0, STEP).await.unwrap() == *content);
    }
    quiet(&world.source).await;
    let (reads, locates, bytes) = (reads(&world.source), locates(&world.source), bytes(&world.source));
    eprintln!("50 files of 40 kB in {reads} reads of packs, {locates} questions, {bytes} bytes");
    // Eight frames or so.
    assert!(reads <= 10, "{reads} reads");
    assert!(locates <= 3, "{locates} questions");
    assert!(bytes < 2_200_000, "{bytes} bytes");
}

/// Who jumps about in a long file costs what is touched, and at most as much again.
#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_seeks_wildly() {
    let world = World::new().await;
    let content = noise(3, 32 << 20);
    let path = world.push("long", &dir([("file", file(&content))]), &[]).await;
    let store = world.store();
    let attr = walk(&store.lazy, &path, &["file"]).await;
    world.source.count_anew();
    let count = 20_usize;
    for n in 0..count {
        let at = (n * 7919 % 31) << 20;
        let some = store.lazy.read(attr.node, at as u64, 4096).await.unwrap();
        assert!(*some == content[at..at + 4096]);
    }
    quiet(&world.source).await;
    let stats = store.fetcher.stats();
    let bytes = bytes(&world.source);
    eprintln!("{count} jumps: {} reads of packs, {bytes} bytes, {stats:?}", reads(&world.source));
    // A jump touches one frame of 256 KiB, or two; and two bets may be lost.
    assert!(bytes <= (count as u64) * 2 * (300 << 10) + (512 << 10), "{bytes}");
    assert!(stats.ahead_bytes - stats.ahead_used_bytes <= 512 << 10, "{stats:?}");
}

/// Ten thousand readers of one file are one read.
#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_readers_of_one_file() {
    let world = World::new().await;
    let content = noise(4, 100_000);
    let path = world.push("one", &file(&content), &[]).await;
    let store = world.store();
    let attr = walk(&store.lazy, &path, &[]).await;
    world.source.move_away(Duration::from_millis(50));
    world.source.count_anew();
    let readers = (0..10_000).map(|_| store.lazy.read(attr.node, 0, STEP));
    for read in futures::future::join_all(readers).await {
        assert!(*read.unwrap() == content);
    }
    quiet(&world.source).await;
    assert_eq!(reads(&world.source), 1);
    assert!(locates(&world.source) <= 2);
}

/// A program starts on a cold worker, 20 ms and 100 Mbit/s away from the server: its executable by pages here and there,
/// a dozen libraries of as many store objects, then modules one after the other. The time is compared with what the
/// frames that are touched take on the line, and four round trips.
#[tokio::test(flavor = "multi_thread")]
async fn a_program_starts_far_away() {
    const LIBRARIES: u64 = 12;
    let world = World::new().await;
    let mut libraries = Vec::new();
    for n in 0..LIBRARIES {
        let lib = dir([("lib", dir([("lib.so", file(code(n, 1 << 20))), ("lib.a", file(code(100 + n, 1 << 20)))]))]);
        libraries.push(world.push(&format!("library-{n}"), &lib, &[]).await);
    }
    let modules: BTreeMap<Vec<u8>, Node> = (0..300_usize)
        .map(|n| (format!("m{n:03}.pyc").into_bytes(), file(code(1000 + n as u64, 4_000 + (n * 997) % 40_000))))
        .collect();
    let program = dir([
        ("bin", dir([("python", file(code(50, 4 << 20)))])),
        ("lib", dir([("modules", Node::Dir(modules)), ("static.a", file(code(51, 30 << 20)))])),
    ]);
    let path = world.push("python", &program, &libraries).await;
    world.source.move_away(Duration::from_millis(20));
    world.source.count_anew();
    let store = world.store();
    let began = Instant::now();
    let binary = walk(&store.lazy, &path, &["bin", "python"]).await;
    for page in [0, 31, 1, 2, 5, 6, 9, 20, 21, 12] {
        store.lazy.read(binary.node, page * u64::from(STEP), STEP).await.unwrap();
    }
    for library in &libraries {
        let attr = walk(&store.lazy, library, &["lib", "lib.so"]).await;
        for page in [0, 7, 1, 3] {
            store.lazy.read(attr.node, page * u64::from(STEP), STEP).await.unwrap();
        }
    }
    let directory = walk(&store.lazy, &path, &["lib", "modules"]).await;
    for n in (0..300).filter(|n| n % 7 != 3 && n % 5 != 1) {
        let attr = find(&store.lazy, directory.node, &format!("m{n:03}.pyc")).await;
        store.lazy.read(attr.node, 0, STEP).await.unwrap();
    }
    let took = began.elapsed();
    quiet(&world.source).await;
    let source = &world.source;
    let stats = store.fetcher.stats();
    let moved = bytes(source);
    let touched = moved - (stats.ahead_bytes - stats.ahead_used_bytes);
    let ideal = Duration::from_nanos(touched * 80) + 4 * Duration::from_millis(20);
    eprintln!(
        "{took:?}, ideal {ideal:?}: {:.1} times; {} look-ups, {} closures, {} questions, {} reads; {moved} bytes, {:.2} of \
         those touched; {stats:?}",
        took.as_secs_f64() / ideal.as_secs_f64(),
        source.lookups.load(Ordering::SeqCst),
        source.closures.load(Ordering::SeqCst),
        locates(source),
        reads(source),
        moved as f64 / touched as f64,
    );
    assert!(moved < 2 * touched, "{moved} bytes moved, {touched} touched");
    // Each look-up and each first question is waited for, most reads are not; in all far fewer than files and pages.
    assert!(locates(source) < 80, "{} questions", locates(source));
    assert!(took < ideal * 5, "{took:?}, ideal {ideal:?}");
}
