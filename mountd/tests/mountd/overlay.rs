//! Overlays over the mount: what an overlay does to two equal files, and how a name that did not exist shows up.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use narlake_format::api::control::OverlayInfo;
use narlake_mountd::mount_error::MountError;
use narlake_mountd::mountinfo;

use narlake_mountd::view::ViewError;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::kit::{Mounted, World, dir, file, noise, outside, program};

/// An overlay of this test: `<name>/{upper,work,merged}` beside the mount.
async fn up(mounted: &Mounted, name: &str) -> Result<OverlayInfo, MountError> {
    let base = mounted.dir.join(name);
    fs::create_dir_all(base.join("merged")).unwrap();
    let overlays = mounted.daemon.as_ref().unwrap().overlays();
    overlays.up(base.join("upper"), base.join("work"), base.join("merged")).await
}

fn view(mounted: &Mounted) -> &narlake_mountd::view::View {
    mounted.daemon.as_ref().unwrap().view()
}

fn refusal(result: Result<OverlayInfo, MountError>) -> String {
    match result {
        Err(MountError::Refused { reason, .. }) => reason,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn options_are_as_documented() {
    let world = World::new().await;
    let Some(mounted) = world.mount().await else { return };
    let info = up(&mounted, "a").await.unwrap();
    let lines = || {
        let text = fs::read_to_string("/proc/self/mounts").unwrap();
        let merged = info.merged.to_str().unwrap();
        text.lines().find(|line| line.contains(merged)).unwrap().to_owned()
    };
    let line = lines();
    assert!(line.starts_with("overlay "), "{line}");
    let lowerdir = format!("lowerdir={}", mounted.mount.display());
    for option in ["rw", "nosuid", "nodev", lowerdir.as_str(), "redirect_dir=on", "metacopy=on"] {
        assert!(line.split([' ', ',']).any(|word| word == option), "{option} in {line}");
    }
    // What is off is not shown.
    for option in ["index=on", "xino=on", "nfs_export=on"] {
        assert!(!line.contains(option), "{line}");
    }
    let overlays = mounted.daemon.as_ref().unwrap().overlays();
    assert_eq!(overlays.list(), std::slice::from_ref(&info));
    assert!(info.store_uri.contains(&format!("%3Freal={}", mounted.mount.display())), "{}", info.store_uri);
    // A refresh keeps what a remount would drop.
    assert_eq!(overlays.refresh(Duration::from_secs(10)).await.unwrap(), 1);
    assert_eq!(lines(), line);
    overlays.down(info.merged.clone(), false, None).await.unwrap();
    assert!(mountinfo::mount_on(&info.merged).unwrap().is_none());
    assert!(matches!(overlays.down(info.merged.clone(), false, None).await, Err(MountError::Unknown { .. })));
    mounted.stop().await;
}

/// Two equal files in two objects are two files: what happens to one through the overlay does not happen to the other.
#[tokio::test(flavor = "multi_thread")]
async fn equal_files_stay_apart() {
    let world = World::new().await;
    let tree = dir([("a", file(b"same content")), ("b", file(b"same content"))]);
    let first = world.push("first", &tree, &[]).await.to_string();
    let second = world.push("second", &tree, &[]).await.to_string();
    let Some(mounted) = world.mount().await else { return };
    let merged = up(&mounted, "a").await.unwrap().merged;
    outside(move || {
        let (changed, other, twin) =
            (merged.join(&first).join("a"), merged.join(&second).join("a"), merged.join(&first).join("b"));
        let untouched = |what: &str| {
            for path in [&other, &twin] {
                let metadata = fs::metadata(path).unwrap();
                assert_eq!(metadata.permissions().mode() & 0o7777, 0o444, "{what}");
                assert_eq!(metadata.nlink(), 1);
                assert_eq!(fs::read(path).unwrap(), b"same content", "{what}");
            }
        };
        let inodes: Vec<u64> = [&changed, &other, &twin].map(|path| fs::metadata(path).unwrap().ino()).to_vec();
        assert!(inodes[0] != inodes[1] && inodes[0] != inodes[2] && inodes[1] != inodes[2]);
        fs::set_permissions(&changed, fs::Permissions::from_mode(0o755)).unwrap();
        untouched("after chmod");
        fs::write(&changed, b"written").unwrap();
        assert_eq!(fs::read(&changed).unwrap(), b"written");
        untouched("after write");
        fs::remove_file(&changed).unwrap();
        assert!(!changed.exists());
        untouched("after unlink");
        // Directories of the lower can be renamed, and links be made.
        fs::rename(merged.join(&second), merged.join("moved")).unwrap();
        assert_eq!(fs::read(merged.join("moved").join("a")).unwrap(), b"same content");
        fs::hard_link(&twin, merged.join("linked")).unwrap();
        assert_eq!(fs::read(merged.join("linked")).unwrap(), b"same content");
    })
    .await;
    mounted.stop().await;
}

/// An overlay never asks again for a name that did not exist. Before such a path is called valid, it is seen.
#[tokio::test(flavor = "multi_thread")]
async fn names_that_did_not_exist_show_up_before_they_are_valid() {
    let world = World::new().await;
    let Some(mounted) = world.mount().await else { return };
    let merged: Vec<PathBuf> = vec![up(&mounted, "a").await.unwrap().merged, up(&mounted, "b").await.unwrap().merged];
    let path = World::path("later");
    let look = |expect: bool| {
        let paths: Vec<PathBuf> = merged.iter().map(|merged| merged.join(path.to_string())).collect();
        outside(move || paths.iter().for_each(|path| assert_eq!(path.exists(), expect, "{path:?}")))
    };
    look(false).await;
    assert!(view(&mounted).valid(&path).await.unwrap().is_none());
    world.push("later", &dir([("f", file(b"x"))]), &[]).await;
    // This is what the overlay does, and why there is work to do.
    look(false).await;
    assert!(view(&mounted).valid(&path).await.unwrap().is_some());
    look(true).await;
    assert_eq!(view(&mounted).negative_len(), 0);
    assert_eq!(world.metrics.paths_healed.get(), 1);
    // From now on it costs nothing.
    let refreshes = world.metrics.overlay_refreshes.get();
    assert!(view(&mounted).valid(&path).await.unwrap().is_some());
    assert_eq!(world.metrics.overlay_refreshes.get(), refreshes);
    mounted.stop().await;
}

/// Files may be open in the overlay meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn a_refresh_disturbs_nobody() {
    let world = World::new().await;
    let path = world.push("busy", &dir([("run", program(noise(1, 200_000)))]), &[]).await;
    let Some(mounted) = world.mount().await else { return };
    let merged = up(&mounted, "a").await.unwrap().merged;
    let open = merged.join(path.to_string()).join("run");
    let mut held = outside(move || fs::File::open(open).unwrap()).await;
    let later = World::path("later");
    let at = merged.join(later.to_string());
    let looked = at.clone();
    outside(move || assert!(!looked.exists())).await;
    world.push("later", &file(b"x"), &[]).await;
    view(&mounted).valid(&later).await.unwrap().unwrap();
    outside(move || {
        use std::io::Read;
        let mut bytes = Vec::new();
        held.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes, noise(1, 200_000));
        assert!(at.exists());
    })
    .await;
    mounted.stop().await;
}

/// Every local build looks its own output up, makes it in the upper and then pushes it.
#[tokio::test(flavor = "multi_thread")]
async fn what_the_upper_has_needs_no_refresh() {
    let world = World::new().await;
    let Some(mounted) = world.mount().await else { return };
    let merged = up(&mounted, "a").await.unwrap().merged;
    let path = World::path("built-here");
    let at = merged.join(path.to_string());
    outside(move || {
        assert!(!at.exists());
        fs::write(&at, b"built").unwrap();
    })
    .await;
    world.push("built-here", &file(b"built"), &[]).await;
    assert!(view(&mounted).valid(&path).await.unwrap().is_some());
    assert_eq!(world.metrics.overlay_refreshes.get(), 0);
    mounted.stop().await;
}

/// What was deleted through the overlay stays hidden there, and is not called valid.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_deleted_in_the_overlay_is_not_valid() {
    let world = World::new().await;
    let Some(mounted) = world.mount().await else { return };
    let merged = up(&mounted, "a").await.unwrap().merged;
    let path = World::path("deleted");
    let upper = mounted.dir.join("a/upper");
    let name = path.to_string();
    let at = merged.join(&name);
    outside(move || {
        assert!(!at.exists());
        // As the kernel marks it.
        let mode = rustix::fs::Mode::empty();
        rustix::fs::mknodat(rustix::fs::CWD, upper.join(&name), rustix::fs::FileType::CharacterDevice, mode, 0)
            .unwrap();
    })
    .await;
    world.push("deleted", &file(b"x"), &[]).await;
    let began = Instant::now();
    assert!(matches!(view(&mounted).valid(&path).await, Err(ViewError::Hidden { .. })));
    assert!(began.elapsed() < Duration::from_secs(5));
    mounted.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn refreshes_are_shared() {
    let world = World::new().await;
    let Some(mounted) = world.mount().await else { return };
    let merged = up(&mounted, "a").await.unwrap().merged;
    let names: Vec<String> = (0..40).map(|number| format!("storm-{number}")).collect();
    let looks: Vec<PathBuf> = names.iter().map(|name| merged.join(World::path(name).to_string())).collect();
    outside(move || looks.iter().for_each(|path| assert!(!path.exists()))).await;
    for name in &names {
        world.push(name, &file(name), &[]).await;
    }
    let view = view(&mounted);
    let paths: Vec<_> = names.iter().map(|name| World::path(name)).collect();
    let began = Instant::now();
    let valid = futures::future::join_all(paths.iter().map(|path| view.valid(path))).await;
    assert!(valid.iter().all(|valid| valid.as_ref().unwrap().is_some()));
    let refreshes = world.metrics.overlay_refreshes.get();
    assert!(
        refreshes <= 2 + u64::try_from(began.elapsed().as_millis() / 200).unwrap(),
        "{refreshes} in {:?}",
        began.elapsed()
    );
    assert!(refreshes < 20, "{refreshes}");
    mounted.stop().await;
}

/// More names than NEG holds: one refresh, and then paths that nobody looked for cost no look through the overlays again.
#[tokio::test(flavor = "multi_thread")]
async fn an_overflow_costs_one_refresh() {
    let world = World::new().await;
    let Some(mounted) = world.mount().await else { return };
    let merged = up(&mounted, "a").await.unwrap().merged;
    let forgotten = World::path("forgotten");
    let at = merged.join(forgotten.to_string());
    let looked = at.clone();
    outside(move || assert!(!looked.exists())).await;
    world.push("forgotten", &file(b"x"), &[]).await;
    let view = view(&mounted).clone();
    for number in 0..65_536 {
        // Names that are answered from memory.
        assert!(view.lookup(&World::path(&format!("{number}.lock"))).await.unwrap().is_none());
    }
    assert!(view.negative_len() < 10);
    // It is none of those that are remembered, and is not called valid unseen.
    let before = world.messages("lookup");
    view.valid(&forgotten).await.unwrap().unwrap();
    assert!(world.messages("lookup") > before);
    let looked = at.clone();
    outside(move || assert!(looked.exists())).await;
    let refreshed = world.metrics.overlay_refreshes.get();
    let began = Instant::now();
    while world.metrics.overlay_refreshes.get() == refreshed {
        assert!(began.elapsed() < Duration::from_secs(20));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    let fresh = world.push("fresh", &file(b"x"), &[]).await;
    let before = world.messages("lookup");
    view.valid(&fresh).await.unwrap().unwrap();
    assert_eq!((world.messages("lookup"), world.metrics.overlay_refreshes.get()), (before, refreshed + 1));
    drop(view);
    mounted.stop().await;
}

/// Another daemon, or a person, may mount an overlay; its names are healed once it is in care.
#[tokio::test(flavor = "multi_thread")]
async fn overlays_of_others_are_adopted() {
    let world = World::new().await;
    let Some(mut mounted) = world.mount().await else { return };
    let base = mounted.dir.join("other");
    for name in ["upper", "work", "merged"] {
        fs::create_dir_all(base.join(name)).unwrap();
    }
    let merged = base.join("merged");
    let overlays = mounted.daemon.as_ref().unwrap().overlays().clone();
    assert!(matches!(overlays.adopt(merged.clone(), None).await, Err(MountError::Unknown { .. })));
    let options = format!(
        "lowerdir={},upperdir={},workdir={},metacopy=on,redirect_dir=on",
        mounted.mount.display(),
        base.join("upper").display(),
        base.join("work").display()
    );
    let (data, target) = (std::ffi::CString::new(options).unwrap(), merged.clone());
    outside(move || mount("overlay", &target, "overlay", MountFlags::empty(), data.as_c_str()).unwrap()).await;
    let info = overlays.adopt(merged.clone(), None).await.unwrap();
    assert!(info.adopted);
    assert_eq!(info.upper, base.join("upper"));
    let path = World::path("later");
    let at = merged.join(path.to_string());
    let looked = at.clone();
    outside(move || assert!(!looked.exists())).await;
    world.push("later", &file(b"x"), &[]).await;
    view(&mounted).valid(&path).await.unwrap().unwrap();
    outside(move || assert!(at.exists())).await;
    mounted.end().await;
    // It is not ours to take away.
    assert!(mountinfo::mount_on(&merged).unwrap().is_some());
    unmount(&merged, UnmountFlags::DETACH).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn busy_overlays_stay_unless_told_otherwise() {
    let world = World::new().await;
    let path = world.push("busy", &file(b"x"), &[]).await;
    let Some(mounted) = world.mount().await else { return };
    let merged = up(&mounted, "a").await.unwrap().merged;
    let at = merged.join(path.to_string());
    let held = outside(move || fs::File::open(at).unwrap()).await;
    let overlays = mounted.daemon.as_ref().unwrap().overlays();
    assert!(matches!(overlays.down(merged.clone(), false, None).await, Err(MountError::Busy { .. })));
    assert_eq!(overlays.list().len(), 1);
    overlays.down(merged.clone(), true, None).await.unwrap();
    assert!(overlays.list().is_empty() && mountinfo::mount_on(&merged).unwrap().is_none());
    drop(held);
    mounted.stop().await;
}

/// What would hang or hurt is refused, with what to do about it.
#[tokio::test(flavor = "multi_thread")]
async fn dangerous_places_are_refused() {
    let world = World::new().await;
    let path = world.push("tree", &dir([("d", dir([]))]), &[]).await;
    let Some(mounted) = world.mount().await else { return };
    let base = mounted.dir.join("x");
    for name in ["merged", "with,comma", "upper"] {
        fs::create_dir_all(base.join(name)).unwrap();
    }
    let overlays = mounted.daemon.as_ref().unwrap().overlays().clone();
    let at = |name: &str| base.join(name);
    let attempt =
        async |upper: PathBuf, work: PathBuf, merged: PathBuf| refusal(overlays.up(upper, work, merged).await);
    let inside = mounted.at(&path).join("d");
    let own = "wait for itself";
    assert!(attempt(inside.clone(), at("work"), at("merged")).await.contains(own));
    assert!(attempt(at("upper"), inside.join("w"), at("merged")).await.contains(own));
    assert!(attempt(at("with,comma"), at("work"), at("merged")).await.contains("comma"));
    assert!(attempt(at("upper"), at("upper/work"), at("merged")).await.contains("in each other"));
    assert!(
        attempt(at("upper"), PathBuf::from("/dev/shm/narlake-work"), at("merged")).await.contains("same file system")
    );
    fs::remove_dir("/dev/shm/narlake-work").unwrap();
    assert!(attempt(at("upper"), at("work"), mounted.dir.clone()).await.contains("this daemon needs"));
    // Stacked too deep, or twice.
    let merged = up(&mounted, "a").await.unwrap().merged;
    assert!(attempt(merged.join("u"), merged.join("w"), at("merged")).await.contains("overlay itself"));
    assert!(refusal(up(&mounted, "a").await).contains("mounted here already"));
    mounted.stop().await;
}

/// A container runtime puts an overlay of its own on top: that must still fit.
#[tokio::test(flavor = "multi_thread")]
async fn one_more_overlay_fits_on_top() {
    let world = World::new().await;
    let path = world.push("image", &dir([("f", file(b"x"))]), &[]).await;
    let Some(mounted) = world.mount().await else { return };
    let lower = up(&mounted, "a").await.unwrap().merged;
    let base = mounted.dir.join("container");
    for name in ["upper", "work", "merged"] {
        fs::create_dir_all(base.join(name)).unwrap();
    }
    let options = format!(
        "lowerdir={},upperdir={},workdir={}",
        lower.display(),
        base.join("upper").display(),
        base.join("work").display()
    );
    let (data, merged) = (std::ffi::CString::new(options).unwrap(), base.join("merged"));
    outside(move || {
        mount("overlay", &merged, "overlay", MountFlags::empty(), data.as_c_str()).unwrap();
        let file = merged.join(path.to_string()).join("f");
        assert_eq!(fs::read(&file).unwrap(), b"x");
        fs::write(&file, b"y").unwrap();
        assert_eq!(fs::read(&file).unwrap(), b"y");
        unmount(&merged, UnmountFlags::DETACH).unwrap();
    })
    .await;
    mounted.stop().await;
}

/// One upper over three lives of the lower, the last with a new node table: nothing goes stale.
#[tokio::test(flavor = "multi_thread")]
async fn an_upper_outlives_the_lower() {
    let world = World::new().await;
    let kept = world.push("kept", &dir([("a", file(b"aaa")), ("b", file(b"bbb"))]), &[]).await;
    for life in 0..3_u8 {
        let Some(mounted) = world.mount().await else { return };
        let merged = up(&mounted, "a").await.unwrap().merged;
        let added = world.push(&format!("generation-{life}"), &file([life]), &[]).await;
        let (kept, added) = (merged.join(kept.to_string()), merged.join(added.to_string()));
        outside(move || {
            assert_eq!(fs::read(&added).unwrap(), [life]);
            assert_eq!(fs::read(kept.join("b")).unwrap(), b"bbb");
            if life == 0 {
                fs::set_permissions(kept.join("a"), fs::Permissions::from_mode(0o600)).unwrap();
                fs::write(kept.join("c"), b"written").unwrap();
            }
            // Metadata alone was copied up; the content still comes from the lower of today.
            assert_eq!(fs::read(kept.join("a")).unwrap(), b"aaa");
            assert_eq!(fs::metadata(kept.join("a")).unwrap().permissions().mode() & 0o777, 0o600);
            assert_eq!(fs::read(kept.join("c")).unwrap(), b"written");
        })
        .await;
        mounted.stop().await;
        if life == 1 {
            fs::remove_file(world.dir.path().join("cache/nodes")).unwrap();
            // So that numbers are given in another order.
            let other = world.push("first-now", &file(b"first"), &[]).await;
            let Some(mounted) = world.mount().await else { return };
            let at = mounted.at(&other);
            outside(move || assert_eq!(fs::read(at).unwrap(), b"first")).await;
            mounted.stop().await;
        }
    }
}

/// A look-up whose answer is on its way while the path is published, and called valid, is not forgotten.
#[tokio::test(flavor = "multi_thread")]
async fn answers_on_their_way_are_known() {
    let world = World::new().await;
    let Some(mounted) = world.mount().await else { return };
    let merged = up(&mounted, "a").await.unwrap().merged;
    for round in 0..20 {
        let name = format!("race-{round}");
        let path = World::path(&name);
        let at = merged.join(path.to_string());
        let looked = at.clone();
        let content = file(&name);
        let (_, _) = tokio::join!(outside(move || looked.exists()), world.push(&name, &content, &[]));
        view(&mounted).valid(&path).await.unwrap().unwrap();
        outside(move || assert!(at.exists(), "round {round}")).await;
    }
    assert!(world.source.lookups.load(Ordering::SeqCst) > 0);
    mounted.stop().await;
}

/// Errors of the lower are errors in the overlay, never absence.
#[tokio::test(flavor = "multi_thread")]
async fn outages_are_errors_through_the_overlay_too() {
    let mut world = World::new().await;
    world.deadline = Duration::from_secs(1);
    let Some(mounted) = world.mount().await else { return };
    let merged = up(&mounted, "a").await.unwrap().merged;
    let path = World::path("later");
    let at = merged.join(path.to_string());
    world.source.set(crate::kit::Mood::Stalls);
    let look = |path: &Path| {
        let path = path.to_owned();
        outside(move || fs::symlink_metadata(path).map(|metadata| metadata.len()).map_err(|error| error.kind()))
    };
    let error = look(&at).await.unwrap_err();
    assert_ne!(error, ErrorKind::NotFound);
    world.source.set(crate::kit::Mood::Answers);
    world.push("later", &file(b"now"), &[]).await;
    assert_eq!(look(&at).await, Ok(3));
    mounted.stop().await;
}
