//! Trees on disk as NARs: the bytes that Nix writes, and what is refused.

mod common;

use std::cell::RefCell;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use common::{Scratch, testdata};
use narlake_cli::dump::{self, BLOCK, Digest, DumpError};
use narlake_format::nar::{Event, NarError, Reader};
use narlake_format::nix::hash::Sha256Hash;
use proptest::prelude::*;

fn dump(root: &Path) -> Result<Vec<u8>, DumpError> {
    let mut nar = Vec::new();
    let digest = dump::dump(root, &mut |block| {
        nar.append(block);
        Ok(())
    })?;
    assert_eq!(digest, Digest { nar_hash: Sha256Hash::of(&nar), nar_size: nar.len() as u64 });
    Ok(nar)
}

/// Writes the tree of a NAR to disk.
fn unpack(nar: &[u8], root: &Path) {
    let (mut path, mut file): (PathBuf, Option<(Vec<u8>, bool)>) = (root.to_owned(), None);
    let mut open = Vec::new();
    let result: Result<(), NarError> = Reader::new().feed(nar, &mut |event| {
        match event {
            Event::Directory => {
                fs::create_dir(&path).unwrap();
                open.push(path.clone());
            }
            Event::Entry { name } => path = open.last().unwrap().join(std::ffi::OsStr::from_bytes(name)),
            Event::EndDirectory => drop(open.pop()),
            Event::File { executable, .. } => file = Some((Vec::new(), executable)),
            Event::Data(data) => file.as_mut().unwrap().0.extend_from_slice(data),
            Event::EndFile => {
                let (content, executable) = file.take().unwrap();
                fs::write(&path, content).unwrap();
                fs::set_permissions(&path, fs::Permissions::from_mode(if executable { 0o755 } else { 0o644 })).unwrap();
            }
            Event::Symlink { target } => symlink(std::ffi::OsStr::from_bytes(target), &path).unwrap(),
        }
        Ok(())
    });
    result.unwrap();
}

#[test]
fn as_nix_dumps() {
    let mut count = 0;
    for version in fs::read_dir(testdata("nix")).unwrap() {
        for file in fs::read_dir(version.unwrap().path().join("nar")).unwrap() {
            let file = file.unwrap().path();
            let scratch = Scratch::new();
            let nar = fs::read(&file).unwrap();
            unpack(&nar, &scratch.path("tree"));
            assert!(dump(&scratch.path("tree")).unwrap() == nar, "{}", file.display());
            count += 1;
        }
    }
    assert!(count > 0);
}

/// A tree that a file system can hold.
#[derive(Debug, Clone)]
enum Tree {
    Directory(Vec<(Vec<u8>, Tree)>),
    File(usize, bool),
    Link(Vec<u8>),
}

fn trees() -> impl Strategy<Value = Tree> {
    let name =
        prop::collection::vec(any::<u8>().prop_filter("no name", |byte| !matches!(byte, 0 | b'/' | b'.')), 1..20);
    let leaf = prop_oneof![
        4 => (0..40_usize, any::<bool>()).prop_map(|(size, executable)| Tree::File(size, executable)),
        1 => (BLOCK - 200..2 * BLOCK + 200).prop_map(|size| Tree::File(size, false)),
        2 => name.clone().prop_map(Tree::Link),
    ];
    leaf.prop_recursive(4, 40, 8, move |inner| {
        prop::collection::btree_map(name.clone(), inner, 0..8)
            .prop_map(|entries| Tree::Directory(entries.into_iter().collect()))
    })
}

impl Tree {
    fn write(&self, path: &Path) {
        match self {
            Self::Directory(entries) => {
                fs::create_dir(path).unwrap();
                for (name, tree) in entries.iter().rev() {
                    tree.write(&path.join(std::ffi::OsStr::from_bytes(name)));
                }
            }
            Self::File(size, executable) => {
                fs::write(path, content(*size)).unwrap();
                // Only the owner's bit counts.
                fs::set_permissions(path, fs::Permissions::from_mode(if *executable { 0o700 } else { 0o655 })).unwrap();
            }
            Self::Link(target) => symlink(std::ffi::OsStr::from_bytes(target), path).unwrap(),
        }
    }

    /// The tree as the events of its NAR.
    fn events(&self, out: &mut Vec<String>) {
        match self {
            Self::Directory(entries) => {
                out.push("(".into());
                for (name, tree) in entries {
                    out.push(format!("name {}", name.escape_ascii()));
                    tree.events(out);
                }
                out.push(")".into());
            }
            Self::File(size, executable) => out.push(format!("file {executable} {}", Sha256Hash::of(&content(*size)))),
            Self::Link(target) => out.push(format!("link {}", target.escape_ascii())),
        }
    }
}

fn content(size: usize) -> Vec<u8> {
    (0..=250_u8).cycle().take(size).collect()
}

fn events(nar: &[u8]) -> Vec<String> {
    let (mut out, mut file) = (Vec::new(), Vec::new());
    let mut reader = Reader::new();
    let result: Result<(), NarError> = reader.feed(nar, &mut |event| {
        match event {
            Event::Directory => out.push("(".into()),
            Event::EndDirectory => out.push(")".into()),
            Event::Entry { name } => out.push(format!("name {}", name.escape_ascii())),
            Event::File { executable, .. } => out.push(format!("file {executable}")),
            Event::Data(data) => file.extend_from_slice(data),
            Event::EndFile => {
                let last = out.last_mut().unwrap();
                *last = format!("{last} {}", Sha256Hash::of(&std::mem::take(&mut file)));
            }
            Event::Symlink { target } => out.push(format!("link {}", target.escape_ascii())),
        }
        Ok(())
    });
    result.and(reader.finish()).unwrap();
    out
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn the_reader_reads_what_was_on_disk(tree in trees()) {
        let scratch = Scratch::new();
        tree.write(&scratch.path("tree"));
        let mut expected = Vec::new();
        tree.events(&mut expected);
        prop_assert_eq!(events(&dump(&scratch.path("tree")).unwrap()), expected);
    }
}

#[test]
fn blocks_are_bounded() {
    let scratch = Scratch::new();
    scratch.file("tree/large", content(5 * BLOCK + 1));
    for number in 0..300 {
        scratch.file(&format!("tree/small/{number}"), "");
    }
    let mut largest = 0;
    let digest = dump::dump(&scratch.path("tree"), &mut |block| {
        largest = largest.max(block.len());
        block.clear();
        Ok(())
    });
    assert!(digest.unwrap().nar_size > 5 * BLOCK as u64);
    assert!(largest <= BLOCK + 1024, "{largest}");
}

#[test]
fn a_path_longer_than_the_kernel_takes() {
    let scratch = Scratch::new();
    let (name, depth) = ("d".repeat(200), 40);
    // Made from the inside out, since no path reaches the bottom.
    let inner = scratch.directory("tree-0");
    fs::write(inner.join("bottom"), "x").unwrap();
    for level in 0..depth {
        let outer = scratch.directory(&format!("tree-{}", level + 1));
        fs::rename(scratch.path(&format!("tree-{level}")), outer.join(&name)).unwrap();
    }
    let nar = dump(&scratch.path(&format!("tree-{depth}"))).unwrap();
    assert_eq!(events(&nar).len(), 3 * depth + 4);
}

#[test]
fn what_no_store_path_can_hold() {
    let scratch = Scratch::new();
    scratch.directory("tree");
    std::os::unix::net::UnixListener::bind(scratch.path("tree/socket")).unwrap();
    let error = dump(&scratch.path("tree")).unwrap_err();
    assert!(error.to_string().ends_with("tree/socket is a socket, which no store path can hold"), "{error}");
    let error = dump(Path::new("/dev/null")).unwrap_err();
    assert_eq!(error.to_string(), "/dev/null is a character device, which no store path can hold");
    assert!(matches!(dump(&scratch.path("missing")), Err(DumpError::Io { operation: "stat", .. })));
    let error = dump(Path::new("/proc/self/status")).unwrap_err();
    assert!(matches!(error, DumpError::Changed { .. }), "{error}");
}

#[test]
fn depth_is_bounded() {
    let scratch = Scratch::new();
    let mut path = scratch.path("");
    for _ in 0..520 {
        path.push("d");
    }
    fs::create_dir_all(&path).unwrap();
    assert!(matches!(dump(&scratch.path("d")), Err(DumpError::Nar { source: NarError::Limit { .. }, .. })));
}

/// Something writes to the tree while it is read: what the first block leads to.
fn disturbed(disturb: impl Fn(&Path)) -> Result<Digest, DumpError> {
    let scratch = Scratch::new();
    scratch.file("tree/a", content(3 * BLOCK));
    scratch.file("tree/b", "b");
    let tree = scratch.path("tree");
    let done = RefCell::new(false);
    dump::dump(&tree, &mut |block| {
        if !done.replace(true) {
            disturb(&tree);
        }
        block.clear();
        Ok(())
    })
}

#[test]
fn changes_under_the_reader_are_noticed() {
    let check = |what: &str, disturb: fn(&Path)| {
        let outcome = disturbed(disturb);
        assert!(matches!(outcome, Err(DumpError::Changed { .. })), "{what}: {outcome:?}");
    };
    check("shorter", |tree| {
        fs::File::options().write(true).open(tree.join("a")).unwrap().set_len(BLOCK as u64).unwrap();
    });
    check("longer", |tree| {
        use std::io::Write as _;
        fs::File::options().append(true).open(tree.join("a")).unwrap().write_all(b"x").unwrap();
    });
    check("of another mode", |tree| fs::set_permissions(tree.join("a"), fs::Permissions::from_mode(0o777)).unwrap());
    check("a file more", |tree| fs::write(tree.join("c"), "").unwrap());
    check("a file less", |tree| fs::remove_file(tree.join("b")).unwrap());
    assert!(disturbed(|_| ()).is_ok());
}

#[test]
fn a_tree_that_is_not_the_one_expected_is_never_whole() {
    let scratch = Scratch::new();
    let file = scratch.file("file", content(3 * BLOCK));
    let digest = dump::measure(&file, |_| ()).unwrap();
    let read = |digest: &Digest| {
        let mut nar = Vec::new();
        let outcome = dump::dump_known(&file, digest, &mut |block| {
            nar.extend_from_slice(&block);
            Ok(())
        });
        (outcome, nar)
    };
    let (outcome, nar) = read(&digest);
    outcome.unwrap();
    assert_eq!(Sha256Hash::of(&nar), digest.nar_hash);

    let (outcome, nar) = read(&Digest { nar_hash: Sha256Hash::of(b""), ..digest });
    assert!(matches!(outcome, Err(DumpError::Differs { .. })));
    assert!(!nar.is_empty() && (nar.len() as u64) < digest.nar_size);
}
