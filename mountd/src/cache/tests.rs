//! The cache: found again, bounded, one daemon at a time, and never in the way.

use std::io::{Read, Seek};
use std::sync::Arc;

use narlake_format::id::FileId;

use super::*;

fn open(dir: &Path, bytes_max: u64) -> Arc<Cache> {
    Arc::new(Cache::open(dir, CacheSettings { bytes_max }, &Metrics::new()).unwrap())
}

fn id(seed: u64) -> ContentId {
    FileId::of(&seed.to_le_bytes()).into()
}

fn content(seed: u64, length: usize) -> Vec<u8> {
    seed.to_le_bytes().into_iter().cycle().take(length).collect()
}

fn read(cache: &Cache, seed: u64, length: usize) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    cache.open_hot(&id(seed), length as u64)?.read_to_end(&mut bytes).unwrap();
    Some(bytes)
}

#[test]
fn complete_files_are_found_again() {
    let dir = tempfile::tempdir().unwrap();
    {
        let cache = open(dir.path(), 1 << 20);
        for seed in 0..20 {
            assert!(read(&cache, seed, 5000).is_none());
            assert!(cache.put_hot(&id(seed), &content(seed, 5000)).is_some());
        }
        assert_eq!(cache.len(), 20);
    }
    let cache = open(dir.path(), 1 << 20);
    for seed in 0..20 {
        assert_eq!(read(&cache, seed, 5000), Some(content(seed, 5000)));
    }
    assert_eq!(cache.usage().0, 20 * 8192);
}

#[test]
fn the_bound_holds_and_the_oldest_go_first() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 100 * 4096);
    for seed in 0..1000 {
        assert!(cache.put_hot(&id(seed), &content(seed, 4096)).is_some());
        assert!(read(&cache, 0, 4096).is_some(), "used all the time");
        assert!(cache.usage().0 <= 100 * 4096);
    }
    assert!(read(&cache, 999, 4096).is_some());
    assert!(read(&cache, 1, 4096).is_none());
    assert!(cache.len() >= 80);
    // A smaller bound in the next life holds from the start.
    drop(cache);
    assert!(open(dir.path(), 10 * 4096).usage().0 <= 10 * 4096);
}

/// Whoever has a file open reads it to its end, though it has been evicted.
#[test]
fn eviction_disturbs_no_reader() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 1 << 20);
    let mut file = cache.put_hot(&id(1), &content(1, 9000)).unwrap();
    assert!(cache.shrink_to(0) > 0);
    assert_eq!((cache.len(), cache.usage().0), (0, 0));
    let mut bytes = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, content(1, 9000));
}

#[test]
fn a_wrong_length_is_a_miss() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 1 << 20);
    cache.put_hot(&id(1), &content(1, 5000));
    let name = id(1).to_string();
    let path = dir.path().join("hot").join(&name[..2]).join(&name[2..]);
    File::options().write(true).open(&path).unwrap().set_len(10).unwrap();
    assert!(read(&cache, 1, 5000).is_none());
    assert!(!path.exists());
    assert_eq!(cache.usage().0, 0);
    // Filled anew, and one that somebody removed is a miss too.
    cache.put_hot(&id(1), &content(1, 5000));
    fs::remove_file(&path).unwrap();
    assert!(read(&cache, 1, 5000).is_none());
}

#[test]
fn two_daemons_are_one_too_many() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 1 << 20);
    let second = Cache::open(dir.path(), CacheSettings { bytes_max: 1 }, &Metrics::new());
    assert!(matches!(second, Err(CacheError::InUse { .. })));
    drop(cache);
    open(dir.path(), 1 << 20);
}

#[test]
fn partial_files_become_hot() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 1 << 20);
    let whole = content(7, 30_000);
    {
        let (partial, present) = Partial::open(&cache, &id(7), 30_000, 3).unwrap();
        assert_eq!(present, [false; 3]);
        assert!(partial.put(1, 1, 10_000, &whole[10_000..20_000]));
    }
    drop(cache);
    let cache = open(dir.path(), 1 << 20);
    {
        let (partial, present) = Partial::open(&cache, &id(7), 30_000, 3).unwrap();
        assert_eq!(present, [false, true, false]);
        assert!(partial.put(0, 1, 0, &whole[..10_000]));
        assert!(partial.put(2, 1, 20_000, &whole[20_000..]));
        // Held: not even an empty budget takes it.
        assert_eq!(cache.shrink_to(0), 0);
        partial.complete();
    }
    assert_eq!(read(&cache, 7, 30_000), Some(whole));
    assert_eq!(fs::read_dir(dir.path().join("partial")).unwrap().count(), 0);
    assert!(cache.shrink_to(0) > 0);
}

/// Maps that are cut short, of another file, or without their data.
#[test]
fn torn_partial_files_begin_anew() {
    let dir = tempfile::tempdir().unwrap();
    let (data, map) =
        (dir.path().join("partial").join(id(7).to_string()), dir.path().join(format!("partial/{}.map", id(7))));
    let damages: [&dyn Fn(); 5] = [
        &|| File::options().write(true).open(&map).unwrap().set_len(25).unwrap(),
        &|| fs::write(&map, [0xff; 27]).unwrap(),
        &|| File::options().write(true).open(&data).unwrap().set_len(7).unwrap(),
        &|| fs::remove_file(&data).unwrap(),
        &|| fs::remove_file(&map).unwrap(),
    ];
    for damage in damages {
        let cache = open(dir.path(), 1 << 20);
        let (partial, _) = Partial::open(&cache, &id(7), 30_000, 3).unwrap();
        assert!(partial.put(1, 1, 10_000, &[1; 10_000]));
        drop((partial, cache));
        damage();
        let cache = open(dir.path(), 1 << 20);
        let (_, present) = Partial::open(&cache, &id(7), 30_000, 3).unwrap();
        assert_eq!(present, [false; 3]);
    }
}

#[test]
fn strays_are_removed() {
    let dir = tempfile::tempdir().unwrap();
    drop(open(dir.path(), 1 << 20));
    let strays = ["tmp/7", "hot/zz", "hot/ab/notes", "partial/notes", "partial/x.map"];
    fs::create_dir_all(dir.path().join("hot/ab")).unwrap();
    // The layout before this one.
    let old = format!("hot/{}/{}", &id(1).to_string()[..2], id(1));
    fs::create_dir_all(dir.path().join(&old).parent().unwrap()).unwrap();
    let strays = strays.into_iter().map(str::to_owned).chain([old]).collect::<Vec<_>>();
    for stray in &strays {
        fs::write(dir.path().join(stray), b"stray").unwrap();
    }
    assert!(open(dir.path(), 1 << 20).is_empty());
    for stray in &strays {
        assert!(!dir.path().join(stray).exists(), "{stray}");
    }
}

/// After a boot that followed no orderly stop, content may be zeros of the right length.
#[test]
fn content_is_dropped_after_an_unclean_boot() {
    for (mark, kept) in [("dirty", false), ("clean", true), ("", false)] {
        let dir = tempfile::tempdir().unwrap();
        let cache = open(dir.path(), 1 << 20);
        cache.put_hot(&id(1), &content(1, 5000));
        cache.close();
        drop(cache);
        fs::write(dir.path().join("boot"), format!("another-boot {mark}\n")).unwrap();
        let cache = open(dir.path(), 1 << 20);
        assert!(cache.booted_since());
        assert_eq!(read(&cache, 1, 5000).is_some(), kept, "{mark}");
    }
    // Within one boot a daemon may end as it likes.
    let dir = tempfile::tempdir().unwrap();
    open(dir.path(), 1 << 20).put_hot(&id(1), &content(1, 5000));
    let cache = open(dir.path(), 1 << 20);
    assert!(!cache.booted_since() && read(&cache, 1, 5000).is_some());
}

/// A file system of a few pages: fills fail, nothing else does.
#[test]
fn a_full_disk_keeps_nothing_and_breaks_nothing() {
    use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIP: not root, cannot mount");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    mount("tmpfs", dir.path(), "tmpfs", MountFlags::empty(), c"size=256k,mode=700").unwrap();
    let metrics = Metrics::new();
    let cache = Arc::new(Cache::open(dir.path(), CacheSettings { bytes_max: 1 << 30 }, &metrics).unwrap());
    let kept = (0..100).filter(|seed| cache.put_hot(&id(*seed), &content(*seed, 16_384)).is_some()).count();
    assert!((1..16).contains(&kept), "{kept}");
    assert_eq!(metrics.cache_not_kept.get(), 100 - kept as u64);
    assert_eq!(fs::read_dir(dir.path().join("tmp")).unwrap().count(), 0);
    if let Some((partial, _)) = Partial::open(&cache, &id(200), 500_000, 1) {
        assert!(!partial.put(0, 1, 0, &content(200, 500_000)));
    }
    assert_eq!(read(&cache, 0, 16_384), Some(content(0, 16_384)));
    drop(cache);
    unmount(dir.path(), UnmountFlags::DETACH).unwrap();
}
