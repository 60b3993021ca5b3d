//! The mount, as programs see it: one test an operation, and the number of messages that it takes.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::kit::{Mood, Node, World, dir, file, link, noise, outside, program};

fn read_back(path: &Path) -> Node {
    let metadata = fs::symlink_metadata(path).unwrap();
    assert_eq!((metadata.uid(), metadata.gid(), metadata.nlink()), (0, 0, 1), "{path:?}");
    assert_eq!((metadata.mtime(), metadata.ctime(), metadata.mtime_nsec()), (1, 1, 0));
    let mode = metadata.permissions().mode() & 0o7777;
    if metadata.is_dir() {
        assert_eq!(mode, 0o555);
        let entries = fs::read_dir(path).unwrap().map(|entry| {
            let entry = entry.unwrap();
            assert_eq!(entry.file_type().unwrap(), fs::symlink_metadata(entry.path()).unwrap().file_type());
            (entry.file_name().as_bytes().to_vec(), read_back(&entry.path()))
        });
        return Node::Dir(entries.collect::<BTreeMap<_, _>>());
    }
    if metadata.is_symlink() {
        return Node::Link(fs::read_link(path).unwrap().as_os_str().as_bytes().to_vec());
    }
    assert!(mode == 0o444 || mode == 0o555);
    assert!(metadata.blocks() * 512 >= metadata.len());
    Node::File { executable: mode == 0o555, content: fs::read(path).unwrap() }
}

#[tokio::test(flavor = "multi_thread")]
async fn trees_are_what_was_pushed() {
    let world = World::new().await;
    let shell = format!("/nix/store/{}", World::path("shell-5"));
    let trees = [
        dir([
            ("bin", dir([("hello", program(format!("#!{shell}\n")))])),
            ("empty", dir([])),
            ("nothing", file(b"")),
            ("share", dir([("big", file(noise(1, 1_500_000))), ("sh", link(&shell))])),
        ]),
        // The object itself may be a file, or a link.
        file(b"just a file\n"),
        program(noise(2, 70_000)),
        link(format!("{shell}/bin/sh")),
        dir([]),
    ];
    let Some(mounted) = world.mount().await else { return };
    for (number, tree) in trees.iter().enumerate() {
        let path = mounted.at(&world.push(&format!("object-{number}"), tree, &[]).await);
        let expect = tree.clone();
        outside(move || assert_eq!(read_back(&path), expect)).await;
    }
    mounted.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_directory_lists_whole() {
    let world = World::new().await;
    let names: Vec<String> = (0..5000).map(|number| format!("file-with-a-name-of-some-length-{number:05}")).collect();
    let tree = Node::Dir(names.iter().map(|name| (name.as_bytes().to_vec(), file(name))).collect());
    let path = world.push("wide", &tree, &[]).await;
    let Some(mounted) = world.mount().await else { return };
    let at = mounted.at(&path);
    let before = world.messages("lookup");
    let listed = outside(move || {
        let mut listed = Vec::new();
        for entry in fs::read_dir(at).unwrap() {
            let entry = entry.unwrap();
            assert_eq!(entry.metadata().unwrap().ino(), std::os::unix::fs::DirEntryExt::ino(&entry));
            listed.push(entry.file_name().into_string().unwrap());
        }
        listed.sort();
        listed
    });
    assert_eq!(listed.await, names);
    // Attributes came with the listing: one look-up for the directory itself.
    assert_eq!(world.messages("lookup") - before, 1);
    mounted.stop().await;
}

/// Nix's garbage collector would take what the root lists for its own.
#[tokio::test(flavor = "multi_thread")]
async fn the_root_lists_nothing() {
    let world = World::new().await;
    let path = world.push("there", &file(b"x"), &[]).await;
    let Some(mounted) = world.mount().await else { return };
    let (root, at, absent) = (mounted.mount.clone(), mounted.at(&path), mounted.at(&World::path("absent")));
    outside(move || {
        assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
        assert!(at.exists());
        assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
        for path in [absent, root.join(".links"), root.join("x"), at.join("below-a-file")] {
            let error = fs::symlink_metadata(&path).unwrap_err().kind();
            assert!(matches!(error, ErrorKind::NotFound | ErrorKind::NotADirectory), "{path:?}");
        }
    })
    .await;
    mounted.stop().await;
}

/// A path shows up by itself once it is pushed, also under a name that did not exist before.
#[tokio::test(flavor = "multi_thread")]
async fn pushed_paths_show_up() {
    let world = World::new().await;
    let Some(mounted) = world.mount().await else { return };
    let at = mounted.at(&World::path("later"));
    let looked = at.clone();
    outside(move || assert!(!looked.exists())).await;
    world.push("later", &file(b"now"), &[]).await;
    outside(move || assert_eq!(fs::read(&at).unwrap(), b"now")).await;
    mounted.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_can_be_written() {
    let world = World::new().await;
    let path = world.push("tree", &dir([("f", file(b"x"))]), &[]).await;
    let Some(mounted) = world.mount().await else { return };
    let at = mounted.at(&path);
    outside(move || {
        let refused = |result: std::io::Result<()>| {
            assert_eq!(result.unwrap_err().raw_os_error(), Some(Errno::ROFS.raw_os_error()));
        };
        refused(fs::write(at.join("f"), b"y"));
        refused(fs::write(at.join("g"), b"y"));
        refused(fs::create_dir(at.join("d")));
        refused(fs::remove_file(at.join("f")));
        refused(fs::rename(at.join("f"), at.join("g")));
        refused(fs::set_permissions(at.join("f"), fs::Permissions::from_mode(0o777)));
    })
    .await;
    mounted.stop().await;
}

/// What the kernel has once asked it does not ask again; opening takes no message at all.
#[tokio::test(flavor = "multi_thread")]
async fn warm_access_sends_no_message() {
    let world = World::new().await;
    let tree = dir([("a", file(b"aaa")), ("b", program(noise(3, 300_000))), ("l", link("a")), ("d", dir([]))]);
    let path = world.push("tree", &tree, &[]).await;
    let Some(mounted) = world.mount().await else { return };
    let at = mounted.at(&path);
    let work = move || {
        let again = read_back(&at);
        assert_eq!(fs::read(at.join("l")).unwrap(), b"aaa");
        assert!(!at.join("absent").exists());
        assert!(rustix::fs::access(at.join("a"), rustix::fs::Access::READ_OK).is_ok());
        let mut buffer = [0; 100];
        let _ = rustix::fs::getxattr(at.join("a"), "user.x", &mut buffer);
        let _ = rustix::fs::listxattr(at.join("a"), &mut buffer);
        let file = File::open(at.join("b")).unwrap();
        let _ = rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(0));
        assert_eq!(again, read_back(&at));
    };
    outside(work.clone()).await;
    let cold = world.metrics.fuse_request_counts();
    for (operation, most) in
        [("open", 1), ("opendir", 1), ("flush", 1), ("access", 1), ("getxattr", 1), ("listxattr", 1), ("lseek", 1)]
    {
        assert!(world.messages(operation) <= most, "{cold:?}");
    }
    assert_eq!(world.messages("readdir"), 0);
    outside(move || {
        for _ in 0..5 {
            work();
        }
    })
    .await;
    assert_eq!(world.metrics.fuse_request_counts(), cold);
    mounted.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn random_reads_and_maps() {
    let world = World::new().await;
    let mut content = noise(4, 3_000_000);
    let text = format!("/nix/store/{}", World::path("library-1.2"));
    for at in [65_530, 1_000_000, 2_999_000] {
        content[at..at + text.len()].copy_from_slice(text.as_bytes());
    }
    let path = world.push("big", &file(&content), &[]).await;
    let Some(mounted) = world.mount().await else { return };
    let at = mounted.at(&path);
    outside(move || {
        let file = File::open(&at).unwrap();
        for offset in [2_999_990, 0, 65_500, 999_999, 1_700_003, 131_071] {
            let mut buffer = [0; 5000];
            let length = file.read_at(&mut buffer, offset).unwrap();
            let offset = usize::try_from(offset).unwrap();
            assert_eq!(buffer[..length], content[offset..content.len().min(offset + 5000)]);
        }
        let mut whole = Vec::new();
        File::open(&at).unwrap().read_to_end(&mut whole).unwrap();
        assert!(whole == content);
        // cmp maps or reads as it likes.
        let copy = at.parent().unwrap().parent().unwrap().join("copy");
        fs::write(&copy, &content).unwrap();
        assert!(Command::new("cmp").args([&at, &copy]).status().unwrap().success());
    })
    .await;
    mounted.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn programs_run() {
    let world = World::new().await;
    let tree = dir([
        ("true", program(fs::read("/bin/true").unwrap())),
        ("script", program(b"#!/bin/sh\necho \"from the mount: $0\"\n")),
        ("data", file(b"#!/bin/sh\n")),
    ]);
    let path = world.push("programs", &tree, &[]).await;
    let Some(mounted) = world.mount().await else { return };
    let at = mounted.at(&path);
    outside(move || {
        assert!(Command::new(at.join("true")).status().unwrap().success());
        let out = Command::new(at.join("script")).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&out.stdout), format!("from the mount: {}\n", at.join("script").display()));
        assert_eq!(Command::new(at.join("data")).status().unwrap_err().kind(), ErrorKind::PermissionDenied);
    })
    .await;
    mounted.stop().await;
}

/// No wait without an end: a source that never answers is an I/O error at the deadline, and other files go on.
#[tokio::test(flavor = "multi_thread")]
async fn a_stuck_source_ends_in_an_error() {
    let mut world = World::new().await;
    world.deadline = Duration::from_secs(1);
    let stuck = world.push("stuck", &file(noise(5, 200_000)), &[]).await;
    let warm = world.push("warm", &file(b"warm"), &[]).await;
    let Some(mounted) = world.mount().await else { return };
    let (stuck, warm, absent) = (mounted.at(&stuck), mounted.at(&warm), mounted.at(&World::path("absent")));
    let (first, second) = (stuck.clone(), warm.clone());
    outside(move || {
        fs::metadata(first).unwrap();
        fs::read(second).unwrap();
    })
    .await;
    world.source.set(Mood::Stalls);
    let began = Instant::now();
    let eio = Some(Errno::IO.raw_os_error());
    let (first, second) = (stuck.clone(), absent.clone());
    let (read, looked, other) = tokio::join!(
        outside(move || fs::read(first).unwrap_err().raw_os_error()),
        outside(move || fs::metadata(second).unwrap_err().raw_os_error()),
        outside(move || (fs::read(warm).unwrap(), Instant::now())),
    );
    assert_eq!((read, looked, other.0.as_slice()), (eio, eio, b"warm".as_slice()));
    assert!(other.1 - began < Duration::from_millis(500));
    // A read of more than one request is more than one wait.
    assert!(began.elapsed() < Duration::from_secs(6), "{:?}", began.elapsed());
    world.source.set(Mood::Answers);
    outside(move || {
        assert_eq!(fs::read(stuck).unwrap().len(), 200_000);
        assert_eq!(fs::metadata(absent).unwrap_err().kind(), ErrorKind::NotFound);
    })
    .await;
    mounted.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_mount_is_as_nix_needs_it() {
    let world = World::new().await;
    let Some(mounted) = world.mount().await else { return };
    let mount = narlake_mountd::mountinfo::mount_on(&mounted.mount).unwrap().unwrap();
    assert_eq!((mount.fs_type.as_str(), mount.source.as_str()), ("fuse.narlake", "narlake"));
    let line = fs::read_to_string("/proc/self/mounts").unwrap();
    let line = line.lines().find(|line| line.contains(mounted.mount.to_str().unwrap())).unwrap().to_owned();
    for option in ["ro", "nosuid", "nodev", "default_permissions", "allow_other", "user_id=0", "group_id=0"] {
        assert!(line.split([' ', ',']).any(|word| word == option), "{line}");
    }
    let stat = rustix::fs::statvfs(&mounted.mount).unwrap();
    assert_eq!(stat.f_namemax, 255);
    mounted.stop().await;
}
