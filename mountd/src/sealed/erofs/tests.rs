use std::fs::{self, File};
use std::io::Cursor;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use narlake_format::id::{FileId, ManifestId};
use narlake_format::lake::manifest::ManifestEvent;
use rustix::fs::{Mode, OFlags};
use rustix::mount::{UnmountFlags, unmount};

use super::*;
use crate::fs::tree::TreeBuilder;
use crate::sealed::kernel;

enum Node {
    File(bool, u64, u8),
    Link(Vec<u8>),
    Dir(Vec<(Vec<u8>, Node)>),
}

fn build(node: &Node, builder: &mut TreeBuilder) {
    let mut event = |event| builder.event(event).unwrap();
    match node {
        Node::File(executable, size, id) => {
            event(ManifestEvent::BeginFile { executable: *executable, size: *size });
            let mut left = *size;
            while left > 0 {
                let length = u32::try_from(left.min(1 << 31)).unwrap();
                let id = narlake_format::id::ChunkId::from_bytes([*id; 32]);
                event(ManifestEvent::Chunk { id, length });
                left -= u64::from(length);
            }
            event(ManifestEvent::EndFile { file: FileId::from_bytes([*id; 32]) });
        }
        Node::Link(target) => event(ManifestEvent::Symlink { target, patches: &[] }),
        Node::Dir(entries) => {
            event(ManifestEvent::Directory);
            for (name, node) in entries {
                builder.event(ManifestEvent::Entry { name }).unwrap();
                build(node, builder);
            }
            builder.event(ManifestEvent::EndDirectory).unwrap();
        }
    }
}

fn image(objects: &[(&str, Node)]) -> Vec<u8> {
    let mut writer = ImageWriter::new(Cursor::new(Vec::new())).unwrap();
    for (name, node) in objects {
        let mut builder = TreeBuilder::default();
        build(node, &mut builder);
        let bytes = builder.finish(&ManifestId::from_bytes([0; 32])).unwrap();
        let tree = Tree::in_memory(&bytes).unwrap();
        writer.object(name.as_bytes(), (&tree, &StringTable::default()), &mut |_, _, _| {}).unwrap();
    }
    writer.finish().unwrap().into_inner()
}

fn name(text: impl Into<Vec<u8>>) -> Vec<u8> {
    text.into()
}

/// Directories of one block and of many, names before and after the dots, links of every length about a block's end.
fn sample() -> Vec<(&'static str, Node)> {
    let many =
        (0..3000).map(|n| (name(format!("entry-with-a-name-{n:06}")), Node::File(n % 2 == 0, n % 3, 3))).collect();
    let links = (1..120_usize).map(|n| (name(format!("{n:04}")), Node::Link(vec![b'x'; n * 34]))).collect();
    let odd = vec![
        (name("!before"), Node::File(false, 5, 1)),
        (name("-x"), Node::Link(name("../tool"))),
        (name("..."), Node::Dir(vec![])),
        (name("a"), Node::Dir(vec![(name("b"), Node::Dir(vec![(name("c"), Node::File(true, 7, 2))]))])),
        (name(vec![0xff; 255]), Node::File(false, 0, 9)),
    ];
    vec![
        ("a-file", Node::File(true, 5, 1)),
        ("b-link", Node::Link(name("a-file"))),
        ("c-many", Node::Dir(many)),
        ("d-links", Node::Dir(links)),
        ("e-odd", Node::Dir(odd)),
        ("f-huge", Node::Dir(vec![(name("five-gigabytes"), Node::File(false, 5 << 30, 4))])),
    ]
}

fn compare(at: &Path, node: &Node) {
    let metadata = fs::symlink_metadata(at).unwrap();
    assert_eq!((metadata.mtime(), metadata.mtime_nsec(), metadata.uid(), metadata.gid()), (1, 0, 0, 0), "{at:?}");
    assert_eq!(metadata.nlink(), 1, "{at:?}");
    match node {
        Node::File(executable, size, _) => {
            assert!(metadata.is_file() && metadata.len() == *size, "{at:?}");
            assert_eq!(metadata.permissions().mode() & 0o7777, if *executable { 0o555 } else { 0o444 });
        }
        Node::Link(target) => {
            use std::os::unix::ffi::OsStrExt;
            assert_eq!(fs::read_link(at).unwrap().as_os_str().as_bytes(), target, "{at:?}");
        }
        Node::Dir(entries) => {
            use std::os::unix::ffi::{OsStrExt, OsStringExt};
            assert_eq!(metadata.permissions().mode() & 0o7777, 0o555);
            let names = fs::read_dir(at).unwrap().map(|entry| entry.unwrap().file_name().into_vec());
            let mut names: Vec<_> = names.collect();
            names.sort();
            assert_eq!(names, entries.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>(), "{at:?}");
            for (name, node) in entries {
                compare(&at.join(std::ffi::OsStr::from_bytes(name)), node);
            }
            assert!(!at.join("absent").exists());
        }
    }
}

struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

fn scratch() -> Option<tempfile::TempDir> {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIP: not root, cannot mount");
        return None;
    }
    // On the disk that holds this program: /tmp may be an overlay.
    let program = std::env::current_exe().unwrap();
    Some(tempfile::tempdir_in(program.parent().unwrap()).unwrap())
}

#[test]
fn the_same_objects_make_the_same_bytes() {
    let objects =
        || vec![("x", Node::Dir(vec![(name("f"), Node::File(false, 3, 1)), (name("l"), Node::Link(name("f")))]))];
    let bytes = image(&objects());
    assert_eq!(bytes, image(&objects()));
    assert_eq!(bytes.len(), 3 * 4096);
    let golden = "e1e6176e71e7334ae7175c80a2a26736cd8853218b5a9747a0c44c3863d12969";
    assert_eq!(blake3::hash(&bytes).to_hex().as_str(), golden);
}

#[test]
fn fsck_finds_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().join("image");
    fs::write(&at, image(&sample())).unwrap();
    let Ok(fsck) = Command::new("fsck.erofs").arg("-d3").arg(&at).output() else {
        eprintln!("SKIP: no fsck.erofs");
        return;
    };
    assert!(fsck.status.success(), "{}", String::from_utf8_lossy(&fsck.stderr));
    let said = String::from_utf8_lossy(&fsck.stderr).into_owned() + &String::from_utf8_lossy(&fsck.stdout);
    assert!(said.contains("No errors found"), "{said}");
    // A superblock that was changed does not pass, although the program may end well.
    let mut damaged = fs::read(&at).unwrap();
    damaged[1024 + 16] ^= 1;
    fs::write(&at, damaged).unwrap();
    let fsck = Command::new("fsck.erofs").arg("-d3").arg(&at).output().unwrap();
    let said = String::from_utf8_lossy(&fsck.stderr).into_owned() + &String::from_utf8_lossy(&fsck.stdout);
    assert!(!said.contains("No errors found"), "{said}");
}

#[test]
fn the_kernel_shows_what_was_written() {
    let Some(dir) = scratch() else { return };
    let (at, on) = (dir.path().join("image"), dir.path().join("mnt"));
    let objects = sample();
    fs::write(&at, image(&objects)).unwrap();
    fs::create_dir(&on).unwrap();
    kernel::attach(kernel::mount_image(&at).unwrap().as_fd(), &on).unwrap();
    let _mounted = Mounted(on.clone());
    compare(&on, &Node::Dir(objects.into_iter().map(|(text, node)| (name(text), node)).collect()));
}

/// Two equal files of two objects read from one file of the cache, and stay two files to whoever writes.
#[test]
fn content_comes_from_another_layer() {
    let Some(dir) = scratch() else { return };
    let path = |name: &str| dir.path().join(name);
    let twin = || Node::Dir(vec![(name("f"), Node::File(false, 5, 0xab))]);
    fs::write(path("image"), image(&[("one", twin()), ("single", Node::File(true, 5, 0xab)), ("two", twin())]))
        .unwrap();
    for name in ["upper", "work", "merged", "hot"] {
        fs::create_dir(path(name)).unwrap();
    }
    let content = FileId::from_bytes([0xab; 32]).into();
    let file = path("hot").join(redirect_of(&content).trim_start_matches('/'));
    fs::create_dir(file.parent().unwrap()).unwrap();
    fs::write(&file, b"bytes").unwrap();
    let meta = kernel::mount_image(&path("image")).unwrap();
    let hot = rustix::fs::open(path("hot"), OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).unwrap();
    let (upper, work) = (path("upper"), path("work"));
    let merged = path("merged");
    for upper in [None, Some((upper.as_path(), work.as_path()))] {
        let overlay = kernel::mount_layers(meta.as_fd(), &[hot.as_fd()], upper).unwrap();
        kernel::attach(overlay.as_fd(), &merged).unwrap();
        let _mounted = Mounted(merged.clone());
        for name in ["one/f", "two/f", "single"] {
            assert_eq!(fs::read(merged.join(name)).unwrap(), b"bytes", "{name}");
        }
        if upper.is_none() {
            assert!(File::create(merged.join("new")).is_err());
            continue;
        }
        fs::set_permissions(merged.join("one/f"), fs::Permissions::from_mode(0o644)).unwrap();
        fs::write(merged.join("one/f"), b"other").unwrap();
        assert_eq!(fs::read(merged.join("two/f")).unwrap(), b"bytes");
        assert_eq!(fs::metadata(merged.join("two/f")).unwrap().mode() & 0o777, 0o444);
        fs::remove_file(merged.join("one/f")).unwrap();
        assert!(merged.join("two/f").exists() && !merged.join("one/f").exists());
        assert_eq!(fs::read(&file).unwrap(), b"bytes");
    }
}
