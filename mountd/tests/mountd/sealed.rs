//! Sealed views: closures that the kernel serves from an image and the cache, and asks about nothing that is there.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use narlake_format::api::control::{ControlErrorKind, ControlRequest, ControlResponse, OverlayInfo};
use narlake_format::nix::store_path::StorePath;

use crate::control::Client;
use crate::kit::{Mounted, Node, World, dir, file, link, noise, outside, program};

/// What a tree looks like to programs: path to mode, size or target, and content.
type Seen = BTreeMap<PathBuf, (u32, Vec<u8>)>;

fn look(root: &Path) -> Seen {
    fn walk(at: &Path, inside: &Path, seen: &mut Seen) {
        let metadata = fs::symlink_metadata(at).unwrap();
        assert_eq!((metadata.uid(), metadata.gid(), metadata.mtime()), (0, 0, 1), "{}", at.display());
        let content = if metadata.is_symlink() {
            std::os::unix::ffi::OsStringExt::into_vec(fs::read_link(at).unwrap().into_os_string())
        } else if metadata.is_dir() {
            Vec::new()
        } else {
            let content = fs::read(at).unwrap();
            assert_eq!(content.len() as u64, metadata.len());
            content
        };
        seen.insert(inside.to_owned(), (metadata.mode(), content));
        if metadata.is_dir() {
            for entry in fs::read_dir(at).unwrap() {
                let name = entry.unwrap().file_name();
                walk(&at.join(&name), &inside.join(&name), seen);
            }
        }
    }
    let mut seen = Seen::new();
    walk(root, Path::new(""), &mut seen);
    seen
}

struct Rig {
    world: World,
    mounted: Mounted,
    top: StorePath,
    others: Vec<StorePath>,
}

impl Rig {
    /// A closure with everything in it that may go wrong: roots that are no directories, equal files, store paths in
    /// files and links, empty files and directories, a directory of many blocks.
    async fn new() -> Option<Self> {
        let world = World::new().await;
        let leaf = world.push("leaf", &program(b"#!/bin/sh\necho leaf\n"), &[]).await;
        let at = format!("/nix/store/{leaf}");
        let alias = world.push("alias", &link(&at), std::slice::from_ref(&leaf)).await;
        let twin = dir([("same", file("equal")), ("own", file("a"))]);
        let twins = [world.push("twin-1", &twin, &[]).await, world.push("twin-2", &twin, &[]).await];
        let many =
            (0..1500).map(|number| (format!("file-{number:04}").into_bytes(), file(number.to_string()))).collect();
        let tree = dir([
            ("big", file(noise(3, 700_000))),
            ("bin", dir([("tool", program(format!("#!/bin/sh\nexec {at}\n")))])),
            ("empty", dir([])),
            ("many", Node::Dir(many)),
            ("none", file("")),
            ("to", link(&at)),
        ]);
        let references = [leaf.clone(), alias.clone(), twins[0].clone(), twins[1].clone()];
        let top = world.push("top", &tree, &references).await;
        let mounted = world.mount().await?;
        Some(Self { world, mounted, top, others: references.to_vec() })
    }

    fn all(&self) -> Vec<StorePath> {
        self.others.iter().cloned().chain([self.top.clone()]).collect()
    }

    async fn ask(&self, request: ControlRequest) -> ControlResponse {
        Client::connect(&self.mounted.dir).await.ask(request).await
    }

    async fn up(&self, name: &str, writable: bool) -> OverlayInfo {
        let base = self.mounted.dir.join(name);
        fs::create_dir_all(base.join("merged")).unwrap();
        let of = |part: &str| writable.then(|| base.join(part));
        let roots = vec![format!("/nix/store/{}", self.top)];
        let request = ControlRequest::SealedUp { roots, upper: of("u"), work: of("w"), merged: base.join("merged") };
        match self.ask(request).await {
            ControlResponse::Overlay(info) => info,
            other => panic!("{other:?}"),
        }
    }

    async fn down(&self, info: OverlayInfo) {
        let down = ControlRequest::OverlayDown { merged: info.merged, lazy: false };
        assert_eq!(self.ask(down).await, ControlResponse::Done);
    }

    fn messages(&self) -> u64 {
        self.world.metrics.fuse_request_counts().iter().filter(|(op, _)| op != "statfs").map(|(_, count)| count).sum()
    }
}

/// The whole tree, first with nothing in the cache, then with everything in it: the same as through the live view, and in
/// the end without a single message.
#[tokio::test(flavor = "multi_thread")]
async fn a_closure_is_served_by_the_kernel() {
    let Some(rig) = Rig::new().await else { return };
    let info = rig.up("job", false).await;
    assert!(info.sealed.is_some() && info.store_uri.is_empty());
    let (merged, mount, all) = (info.merged.clone(), rig.mounted.mount.clone(), rig.all());
    let (sealed, names) = outside({
        let all = all.clone();
        move || {
            let sealed: Vec<Seen> = all.iter().map(|path| look(&merged.join(path.to_string()))).collect();
            let live: Vec<Seen> = all.iter().map(|path| look(&mount.join(path.to_string()))).collect();
            assert!(sealed == live, "the sealed view differs from the live one");
            assert_eq!(sealed.last().unwrap()[Path::new("big")].1, noise(3, 700_000));
            let mut names: Vec<String> =
                fs::read_dir(&merged).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            (sealed, names)
        }
    })
    .await;
    let mut expected: Vec<String> = all.iter().map(ToString::to_string).collect();
    expected.sort();
    assert_eq!(names, expected, "the root lists its closure");
    // All is in the cache by now. A fresh mount of the same closure makes no image, and needs nobody.
    rig.down(info).await;
    let again = rig.up("again", false).await;
    assert_eq!(rig.world.metrics.images_made.get(), 1);
    let before = rig.messages();
    let merged = again.merged.clone();
    outside(move || {
        let second: Vec<Seen> = all.iter().map(|path| look(&merged.join(path.to_string()))).collect();
        assert!(second == sealed);
        assert!(!merged.join("00000000000000000000000000000000-absent").exists());
    })
    .await;
    assert_eq!(rig.messages() - before, 0, "{:?}", rig.world.metrics.fuse_request_counts());
    rig.down(again).await;
    rig.mounted.stop().await;
}

/// Rule 1: what is written to one of two equal files changes the other in nothing.
#[tokio::test(flavor = "multi_thread")]
async fn equal_files_are_not_one_file() {
    let Some(rig) = Rig::new().await else { return };
    let info = rig.up("job", true).await;
    let at = |name: usize, file: &str| info.merged.join(rig.others[name].to_string()).join(file);
    let (one, other, third) = (at(2, "same"), at(3, "same"), at(3, "own"));
    let (leaf, tool) =
        (info.merged.join(rig.others[0].to_string()), info.merged.join(rig.top.to_string()).join("bin/tool"));
    outside(move || {
        assert_ne!(fs::metadata(&one).unwrap().ino(), fs::metadata(&other).unwrap().ino());
        assert_eq!(fs::metadata(&one).unwrap().nlink(), 1);
        fs::set_permissions(&one, fs::Permissions::from_mode(0o640)).unwrap();
        fs::write(&one, "changed").unwrap();
        assert_eq!(
            (fs::read(&other).unwrap(), fs::metadata(&other).unwrap().mode() & 0o777),
            (b"equal".to_vec(), 0o444)
        );
        fs::remove_file(&other).unwrap();
        assert_eq!(fs::read(&one).unwrap(), b"changed");
        let dir = third.parent().unwrap();
        fs::rename(dir, dir.with_extension("moved")).unwrap();
        assert_eq!(fs::read(dir.with_extension("moved").join("own")).unwrap(), b"a");
        let ran = std::process::Command::new(&leaf).output().unwrap();
        assert_eq!(ran.stdout, b"leaf\n");
        assert!(fs::read_to_string(tool).unwrap().contains("/nix/store/"));
    })
    .await;
    // The view below is as it was.
    let below = rig.mounted.at(&rig.others[2]).join("same");
    outside(move || assert_eq!(fs::read(below).unwrap(), b"equal")).await;
    rig.down(info).await;
    rig.mounted.stop().await;
}

/// What is evicted while a view has it goes from the disk, and is fetched again when it is read again.
#[tokio::test(flavor = "multi_thread")]
async fn evicted_content_comes_again() {
    let Some(rig) = Rig::new().await else { return };
    let info = rig.up("job", false).await;
    let big = info.merged.join(rig.top.to_string()).join("big");
    let read = |path: PathBuf| outside(move || assert!(fs::read(path).unwrap() == noise(3, 700_000)));
    read(big.clone()).await;
    assert!(
        matches!(rig.ask(ControlRequest::Evict { keep_bytes: 0 }).await, ControlResponse::Evicted { bytes } if bytes >= 700_000)
    );
    read(big.clone()).await;
    // Dropped from the page cache too, so that it has to come from somewhere.
    outside(|| fs::write("/proc/sys/vm/drop_caches", "3").unwrap()).await;
    read(big).await;
    rig.down(info).await;
    rig.mounted.stop().await;
}

/// An image that is damaged on disk is made again, and never mounted.
#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_image_is_made_again() {
    let Some(rig) = Rig::new().await else { return };
    let info = rig.up("job", false).await;
    let image = info.lower.clone();
    rig.down(info).await;
    for (number, damage) in [image.clone(), image.with_extension("index")].iter().enumerate() {
        let mut bytes = fs::read(damage).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(damage, bytes).unwrap();
        let info = rig.up("again", false).await;
        let file = info.merged.join(rig.others[2].to_string()).join("own");
        outside(move || assert_eq!(fs::read(file).unwrap(), b"a")).await;
        assert_eq!(rig.world.metrics.images_made.get(), number as u64 + 2);
        rig.down(info).await;
    }
    rig.mounted.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn mistakes_are_told() {
    let Some(rig) = Rig::new().await else { return };
    let merged = rig.mounted.dir.join("m");
    fs::create_dir_all(&merged).unwrap();
    let up = |root: &str, upper: Option<PathBuf>, merged: &Path| ControlRequest::SealedUp {
        roots: vec![root.to_owned()],
        upper,
        work: None,
        merged: merged.to_owned(),
    };
    let absent = World::path("absent").to_string();
    let top = rig.top.to_string();
    for (request, kind) in [
        (up(&absent, None, &merged), ControlErrorKind::NotFound),
        (up("nonsense", None, &merged), ControlErrorKind::Invalid),
        (up(&top, Some(merged.join("u")), &merged), ControlErrorKind::Invalid),
        (up(&top, None, &rig.mounted.mount), ControlErrorKind::Invalid),
        (up(&top, None, &rig.mounted.dir), ControlErrorKind::Invalid),
        (up(&top, None, &merged.join("not-there")), ControlErrorKind::Failed),
    ] {
        match rig.ask(request.clone()).await {
            ControlResponse::Error { kind: found, .. } => assert_eq!(found, kind, "{request:?}"),
            other => panic!("{request:?}: {other:?}"),
        }
    }
    let info = rig.up("job", false).await;
    let held = fs::File::open(&info.merged).unwrap();
    let down = ControlRequest::OverlayDown { merged: info.merged.clone(), lazy: false };
    assert!(matches!(rig.ask(down).await, ControlResponse::Error { kind: ControlErrorKind::Busy, .. }));
    drop(held);
    let ControlResponse::Overlays { overlays } = rig.ask(ControlRequest::OverlayList).await else { panic!() };
    assert_eq!(overlays, std::slice::from_ref(&info));
    rig.down(info).await;
    rig.mounted.stop().await;
}
