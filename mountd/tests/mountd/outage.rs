//! The server is away: what a worker shows all the same, also after a restart, and what it says of the rest.

use std::fs;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use narlake_format::nix::store_path::StorePath;
use narlake_mountd::mountinfo;
use rustix::io::Errno;

use crate::kit::{Mood, Node, World, dir, file, link, noise, outside};

/// An object whose table is too long for its record, one that refers to it, and a plain file.
async fn closure(world: &World) -> Vec<(StorePath, Node)> {
    let references: Vec<String> =
        (0..100).map(|n| format!("/nix/store/{}\n", World::path(&format!("part-{n}")))).collect();
    let many = dir([("list", file(references.concat())), ("deep", dir([("link", link(references[3].trim_end()))]))]);
    let plain = dir([("a", file(noise(1, 300_000))), ("b", file(b"b")), ("empty", dir([]))]);
    let first = world.push("many", &many, &[]).await;
    let second = world.push("plain", &plain, std::slice::from_ref(&first)).await;
    let third = world.push("file", &file(b"just a file"), std::slice::from_ref(&second)).await;
    vec![(first, many), (second, plain), (third, file(b"just a file"))]
}

fn read_back(path: &Path) -> std::io::Result<Node> {
    use std::os::unix::ffi::OsStrExt;
    let metadata = fs::symlink_metadata(path)?;
    if metadata.is_symlink() {
        return Ok(Node::Link(fs::read_link(path)?.as_os_str().as_bytes().to_vec()));
    }
    if metadata.is_file() {
        let mut content = Vec::new();
        fs::File::open(path)?.read_to_end(&mut content)?;
        return Ok(Node::File { executable: false, content });
    }
    let entries = fs::read_dir(path)?.map(|entry| {
        let entry = entry?;
        Ok((entry.file_name().as_bytes().to_vec(), read_back(&entry.path())?))
    });
    Ok(Node::Dir(entries.collect::<std::io::Result<_>>()?))
}

/// What was used before is there after a restart without a server: listed, read, and valid for Nix. What was not is an
/// error, in time.
#[tokio::test(flavor = "multi_thread")]
async fn a_restart_needs_no_server() {
    let mut world = World::new().await;
    world.deadline = Duration::from_secs(3);
    let closure = closure(&world).await;
    let Some(mounted) = world.mount().await else { return };
    for (path, node) in closure.clone() {
        let at = mounted.at(&path);
        outside(move || assert_eq!(read_back(&at).unwrap(), node)).await;
    }
    mounted.stop().await;
    let unseen = world.push("unseen", &file(b"x"), &[]).await;
    for mood in [Mood::Down, Mood::Stalls] {
        world.source.set(mood);
        let mounted = world.mount().await.unwrap();
        let began = Instant::now();
        for (path, node) in closure.clone() {
            let at = mounted.at(&path);
            outside(move || assert_eq!(read_back(&at).unwrap(), node)).await;
        }
        // One question that is not answered, not one for each path.
        assert!(began.elapsed() < Duration::from_millis(2500), "{mood:?}: {:?}", began.elapsed());
        let view = mounted.daemon.as_ref().unwrap().view().clone();
        for (path, _) in &closure {
            assert!(view.valid(path).await.unwrap().is_some());
        }
        let ensured = view.ensure(std::slice::from_ref(&closure[2].0)).await.unwrap();
        assert_eq!((ensured.records.len(), ensured.missing.len()), (3, 0));
        let at = mounted.at(&unseen);
        outside(move || assert_eq!(fs::metadata(at).unwrap_err().raw_os_error(), Some(Errno::IO.raw_os_error()))).await;
        drop(view);
        mounted.stop().await;
    }
    world.source.set(Mood::Answers);
}

/// Damaged metadata is fetched anew, and is no file of another path.
#[tokio::test(flavor = "multi_thread")]
async fn damaged_metadata_is_fetched_again() {
    let world = World::new().await;
    let closure = closure(&world).await;
    for _ in 0..2 {
        let Some(mounted) = world.mount().await else { return };
        for (path, node) in closure.clone() {
            let at = mounted.at(&path);
            outside(move || assert_eq!(read_back(&at).unwrap(), node)).await;
        }
        mounted.stop().await;
        // A tree that is there already asks for no manifest.
        fs::remove_dir_all(world.dir.path().join("cache/trees")).unwrap();
        for shard in fs::read_dir(world.dir.path().join("cache/metadata")).unwrap() {
            for file in fs::read_dir(shard.unwrap().path()).unwrap() {
                let file = file.unwrap().path();
                let mut bytes = fs::read(&file).unwrap();
                let middle = bytes.len() / 2;
                bytes[middle] ^= 1;
                fs::write(&file, bytes).unwrap();
            }
        }
    }
    // Three records, three heads, three trees and a table.
    assert!(world.metrics.cache_damaged.get() >= 10, "{}", world.metrics.cache_damaged.get());
}

/// Content that does not verify is an error that says where it was read from, never other bytes; and it is well again
/// as soon as the source is.
#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_lies() {
    use narlake_mountd::fs::Found;
    use narlake_mountd::fs::nodes::NodeId;
    let world = World::new().await;
    let content = noise(5, 400_000);
    let path = world.push("file", &file(&content), &[]).await;
    let store = world.store();
    let Found::Entry(attr) = store.lazy.lookup(NodeId::ROOT, path.to_string().as_bytes()).await.unwrap() else {
        panic!("it is there");
    };
    world.source.lies.store(true, Ordering::SeqCst);
    for offset in [0, 200_000] {
        let error = store.lazy.read(attr.node, offset, 4096).await.unwrap_err();
        assert_eq!(error.errno(), Errno::IO);
        let text = narlake_format::error::chain(&error);
        assert!(text.contains("packs/public/") && text.contains("frame at"), "{text}");
    }
    world.source.lies.store(false, Ordering::SeqCst);
    assert!(*store.lazy.read(attr.node, 0, 131_072).await.unwrap() == content[..131_072]);
    assert!(*store.lazy.read(attr.node, 200_000, 4096).await.unwrap() == content[200_000..204_096]);
}

/// Threads of this process that the kernel does not let go of.
fn stuck_threads() -> usize {
    let states = fs::read_dir("/proc/self/task").unwrap().filter_map(|task| {
        let stat = fs::read_to_string(task.unwrap().path().join("stat")).ok()?;
        stat.rsplit_once(") ").map(|(_, rest)| rest.starts_with('D'))
    });
    states.filter(|stuck| *stuck).count()
}

/// The server is down for several deadlines, with readers at work all the time, and comes back: every read ends in time,
/// with the right bytes or an error, and afterwards nothing is left of it. `NARLAKE_OUTAGE_S=600` makes it the long form.
#[tokio::test(flavor = "multi_thread")]
async fn an_outage_under_readers() {
    let outage = std::env::var("NARLAKE_OUTAGE_S").ok().and_then(|text| text.parse().ok());
    let outage = Duration::from_secs(outage.unwrap_or(5));
    for on_outage in [narlake_mountd::view::OnOutage::Fail, narlake_mountd::view::OnOutage::Build] {
        readers_through_an_outage(on_outage, outage).await;
    }
}

async fn readers_through_an_outage(on_outage: narlake_mountd::view::OnOutage, outage: Duration) {
    use narlake_mountd::view::OnOutage;
    const READERS: u64 = 12;
    let mut world = World::new().await;
    world.deadline = Duration::from_secs(1);
    world.on_outage = on_outage;
    let warm = world.push("warm", &file(noise(1, 200_000)), &[]).await;
    let cold: Vec<StorePath> = {
        let mut cold = Vec::new();
        for number in 0..READERS {
            cold.push(world.push(&format!("cold-{number}"), &file(noise(100 + number, 150_000)), &[]).await);
        }
        cold
    };
    let Some(mounted) = world.mount().await else { return };
    let base = mounted.dir.join("job");
    fs::create_dir_all(base.join("merged")).unwrap();
    let overlays = mounted.daemon.as_ref().unwrap().overlays().clone();
    let merged = overlays.up(base.join("upper"), base.join("work"), base.join("merged")).await.unwrap().merged;
    let at = merged.join(warm.to_string());
    outside(move || assert_eq!(fs::read(at).unwrap(), noise(1, 200_000))).await;

    let (stop, right, failed) =
        (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let slowest = Arc::new(AtomicU64::new(0));
    let readers: Vec<_> = (0..READERS)
        .map(|number| {
            let (stop, right, failed) = (Arc::clone(&stop), Arc::clone(&right), Arc::clone(&failed));
            let slowest = Arc::clone(&slowest);
            let index = usize::try_from(number).unwrap();
            let (warm, cold) = (merged.join(warm.to_string()), merged.join(cold[index].to_string()));
            std::thread::spawn(move || {
                while !stop.load(Ordering::SeqCst) {
                    let began = Instant::now();
                    // What is cached is read throughout.
                    assert_eq!(fs::read(&warm).unwrap(), noise(1, 200_000));
                    match fs::read(&cold) {
                        Ok(bytes) => {
                            assert_eq!(bytes, noise(100 + number, 150_000));
                            right.fetch_add(1, Ordering::SeqCst);
                        }
                        Err(error) => {
                            let expect = if on_outage == OnOutage::Build { Errno::NOENT } else { Errno::IO };
                            let eio = Errno::IO.raw_os_error();
                            let code = error.raw_os_error().unwrap();
                            assert!(code == expect.raw_os_error() || code == eio, "{error}");
                            failed.fetch_add(1, Ordering::SeqCst);
                            std::thread::park_timeout(Duration::from_millis(5));
                        }
                    }
                    let took = u64::try_from(began.elapsed().as_millis()).unwrap();
                    slowest.fetch_max(took, Ordering::SeqCst);
                }
            })
        })
        .collect();
    // Nobody has read the cold ones: the outage begins with the readers.
    world.source.set(Mood::Stalls);
    tokio::time::sleep(outage / 2).await;
    world.source.set(Mood::Down);
    tokio::time::sleep(outage / 2).await;
    assert!(failed.load(Ordering::SeqCst) > 0);
    world.source.set(Mood::Answers);
    // Names that were called absent are healed by whoever asks for them.
    let view = mounted.daemon.as_ref().unwrap().view().clone();
    let until = Instant::now() + Duration::from_secs(20);
    for path in &cold {
        while !matches!(view.valid(path).await, Ok(Some(_))) {
            assert!(Instant::now() < until, "{path} does not come back");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    let seen = right.load(Ordering::SeqCst);
    while right.load(Ordering::SeqCst) < seen + 5 * READERS {
        assert!(Instant::now() < until, "no reader gets well");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    stop.store(true, Ordering::SeqCst);
    for reader in readers {
        outside(move || reader.join().unwrap()).await;
    }
    // A read of this size is two messages and a look-up, each with its deadline.
    let slowest = slowest.load(Ordering::SeqCst);
    eprintln!(
        "{on_outage:?}: {} reads, {} errors, slowest round {slowest} ms",
        right.load(Ordering::SeqCst),
        failed.load(Ordering::SeqCst)
    );
    assert!(slowest < 8000, "{slowest} ms");
    for path in &cold {
        let at = merged.join(path.to_string());
        outside(move || assert_eq!(fs::read(at).unwrap().len(), 150_000)).await;
    }
    drop(view);
    mounted.stop().await;
    assert!(mountinfo::mount_on(&merged).unwrap().is_none());
    let until = Instant::now() + Duration::from_secs(5);
    while stuck_threads() > 0 {
        assert!(Instant::now() < until, "threads are stuck in the kernel");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
