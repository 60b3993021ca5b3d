//! Trees on disk: used again without a server, made again when damaged, and cheap by the million.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use narlake_mountd::fs::nodes::NodeId;
use narlake_mountd::fs::{Found, LazyStore};

use crate::kit::{Mood, Node, World, dir, file, link, outside};

async fn entry(store: &LazyStore, parent: NodeId, name: &str) -> NodeId {
    match store.lookup(parent, name.as_bytes()).await.unwrap() {
        Found::Entry(attr) => attr.node,
        other => panic!("{name}: {other:?}"),
    }
}

fn tree_files(world: &World) -> Vec<PathBuf> {
    let shards = fs::read_dir(world.dir.path().join("cache/trees")).unwrap();
    shards.flat_map(|shard| fs::read_dir(shard.unwrap().path()).unwrap()).map(|file| file.unwrap().path()).collect()
}

/// What the kernel remembers from a daemon is answered by the next one out of its own disk, by the nodeid alone.
#[tokio::test(flavor = "multi_thread")]
async fn the_next_life_needs_no_server_for_what_was_shown() {
    let world = World::new().await;
    let text = format!("see /nix/store/{}", World::path("other"));
    let node = dir([("f", file(&text)), ("l", link("f"))]);
    let path = world.push("kept", &node, &[]).await;
    let (file, link) = {
        let store = world.store();
        let root = entry(&store.lazy, NodeId::ROOT, &path.to_string()).await;
        let file = entry(&store.lazy, root, "f").await;
        assert_eq!(store.lazy.read(file, 0, 4096).await.unwrap(), text.as_bytes());
        (file, entry(&store.lazy, root, "l").await)
    };
    assert_eq!((tree_files(&world).len(), world.metrics.trees_loaded.get()), (1, 1));
    world.source.set(Mood::Stalls);
    let (lookups, reads) = (&world.source.lookups, &world.source.reads);
    let before = (lookups.load(std::sync::atomic::Ordering::SeqCst), reads.load(std::sync::atomic::Ordering::SeqCst));
    let store = world.store();
    assert_eq!(store.lazy.readlink(link).await.unwrap(), b"f");
    assert_eq!(store.lazy.read(file, 0, 4096).await.unwrap(), text.as_bytes());
    assert_eq!(store.lazy.getattr(file).await.unwrap().size, text.len() as u64);
    let after = (lookups.load(std::sync::atomic::Ordering::SeqCst), reads.load(std::sync::atomic::Ordering::SeqCst));
    assert_eq!(before, after, "the server was asked");
    assert_eq!(world.metrics.trees_loaded.get(), 1, "the manifest was parsed again");
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_trees_are_made_again_from_their_manifest() {
    let world = World::new().await;
    let path = world.push("damaged", &dir([("f", file("content"))]), &[]).await;
    let name = path.to_string();
    entry(&world.store().lazy, NodeId::ROOT, &name).await;
    let [tree] = tree_files(&world).try_into().unwrap();
    let whole = fs::read(&tree).unwrap();
    // As far as a disk can do it to a file that is not mapped.
    for damage in [whole[..whole.len() - 1].to_vec(), Vec::new(), whole.iter().map(|byte| byte ^ 1).collect()] {
        fs::write(&tree, damage).unwrap();
        let (made, found) = (world.metrics.trees_loaded.get(), world.metrics.cache_damaged.get());
        let store = world.store();
        let root = entry(&store.lazy, NodeId::ROOT, &name).await;
        let file = entry(&store.lazy, root, "f").await;
        assert_eq!(store.lazy.read(file, 0, 10).await.unwrap(), b"content".as_slice());
        assert_eq!(world.metrics.trees_loaded.get(), made + 1);
        assert_eq!(world.metrics.cache_damaged.get(), found + 1);
        assert_eq!(fs::read(&tree).unwrap(), whole);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_takes_no_tree_is_no_error() {
    let world = World::new().await;
    let path = world.push("full", &dir([("f", file("content"))]), &[]).await;
    let store = world.store();
    fs::remove_dir(world.dir.path().join("cache/trees")).unwrap();
    fs::write(world.dir.path().join("cache/trees"), b"in the way").unwrap();
    let root = entry(&store.lazy, NodeId::ROOT, &path.to_string()).await;
    let file = entry(&store.lazy, root, "f").await;
    assert_eq!(store.lazy.getattr(file).await.unwrap().size, 7);
    assert!(world.metrics.cache_not_kept.get() > 0);
}

/// Objects of the big picture, and files of all together where `NARLAKE_FILES` does not say.
const OBJECTS: usize = 100;
const FILES: usize = 30_000;

fn files_each() -> usize {
    let files = std::env::var("NARLAKE_FILES").map_or(FILES, |files| files.parse().unwrap());
    files / OBJECTS
}

/// Set for the second process: the directory of the first one's world.
const AGAIN: &str = "NARLAKE_TEST_MILLION";

/// A million files with `NARLAKE_FILES=1000000`, found and looked at through the mount. The daemon under measurement is a process of its own, which
/// has no lake: it starts on the cache directory of the one before, with a server that is down.
#[test]
fn many_files_are_cheap() {
    let runtime = || tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    if let Some(dir) = std::env::var_os(AGAIN) {
        runtime().block_on(second_life(Path::new(&dir)));
        return;
    }
    if !crate::kit::can_mount() {
        return;
    }
    let world = runtime().block_on(async {
        let mut world = World::new().await;
        world.deadline = std::time::Duration::from_secs(60);
        for object in 0..OBJECTS {
            let files = (0..files_each()).map(|number| {
                let name = format!("file-{number:05}.{object}.h");
                (name.into_bytes(), file(format!("content {}", number % 64)))
            });
            world.push(&format!("object-{object}"), &Node::Dir(files.collect()), &[]).await;
        }
        let mounted = world.mount().await.unwrap();
        let paths: Vec<PathBuf> = (0..OBJECTS).map(|n| mounted.at(&World::path(&format!("object-{n}")))).collect();
        let entries = outside(move || paths.iter().map(|path| stat_all(path)).sum::<usize>()).await;
        assert_eq!(entries, OBJECTS * files_each());
        mounted.stop().await;
        world
    });
    let mut again = Command::new(std::env::current_exe().unwrap());
    again.args(["--exact", "--nocapture", "trees::many_files_are_cheap"]).env(AGAIN, world.dir.path());
    assert!(again.status().unwrap().success());
}

async fn second_life(dir: &Path) {
    let mut world = World::new().await;
    world.deadline = std::time::Duration::from_secs(60);
    world.source.set(Mood::Down);
    fs::rename(dir.join("cache"), world.dir.path().join("cache")).unwrap();
    let (slab, idle) = (memory("/proc/meminfo", "SReclaimable:"), memory("/proc/self/status", "VmRSS:"));
    let mounted = world.mount().await.unwrap();
    let paths: Vec<PathBuf> = (0..OBJECTS).map(|n| mounted.at(&World::path(&format!("object-{n}")))).collect();
    let entries = outside(move || paths.iter().map(|path| stat_all(path)).sum::<usize>()).await;
    assert_eq!(entries, OBJECTS * files_each());
    let status = |field| memory("/proc/self/status", field);
    eprintln!(
        "{entries} files found and looked at: resident {} MiB (anonymous {}, mapped files {}; {idle} before), \
         highest {} MiB; kernel slab grew by {} MiB; trees on disk {} MiB",
        status("VmRSS:"),
        status("RssAnon:"),
        status("RssFile:"),
        status("VmHWM:"),
        memory("/proc/meminfo", "SReclaimable:").saturating_sub(slab),
        world.metrics.tree_bytes.get() >> 20,
    );
    assert_eq!(world.metrics.trees_loaded.get(), 0, "no manifest was parsed");
    assert!(status("VmHWM:") < 300);
    mounted.stop().await;
}

fn stat_all(dir: &Path) -> usize {
    fs::read_dir(dir).unwrap().map(|entry| assert!(entry.unwrap().metadata().unwrap().len() > 0)).count()
}

/// MiB of a line of a file of /proc.
fn memory(file: &str, field: &str) -> u64 {
    let text = fs::read_to_string(file).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(field)).unwrap();
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() / 1024
}
