use std::io::Write;

use narlake_format::lake::manifest::ManifestEvent;

use super::*;

fn built() -> (ManifestId, Vec<u8>) {
    let (id, patch) = (ManifestId::of(b"m"), Patch { gap: 3, string: 7, hash_only: true });
    let chunk = |number: u8, length| ManifestEvent::Chunk { id: ChunkId::of(&[number]), length };
    let name = |name| ManifestEvent::Entry { name };
    let events = [
        ManifestEvent::Directory,
        name(b"a"),
        ManifestEvent::BeginFile { executable: true, size: 30 },
        chunk(1, 10),
        chunk(2, 20),
        ManifestEvent::Patch(patch),
        ManifestEvent::EndFile { file: FileId::of(b"a") },
        name(b"bc"),
        ManifestEvent::Directory,
        name(b"d"),
        ManifestEvent::Symlink { target: b"../a", patches: &[patch] },
        name(b"e"),
        ManifestEvent::BeginFile { executable: false, size: 0 },
        ManifestEvent::EndFile { file: FileId::of(b"") },
        ManifestEvent::EndDirectory,
        ManifestEvent::EndDirectory,
    ];
    let mut builder = TreeBuilder::default();
    events.into_iter().for_each(|event| builder.event(event).unwrap());
    (id, builder.finish(&id).unwrap())
}

fn check(tree: &Tree) {
    assert_eq!(tree.len(), 5);
    assert_eq!(tree.children(0).unwrap(), [1, 2]);
    assert_eq!(tree.children(2).unwrap(), [3, 4]);
    assert_eq!((tree.child(0, b"bc"), tree.child(2, b"e"), tree.child(0, b"b")), (Some(2), Some(4), None));
    assert_eq!((tree.path(4).as_str(), tree.parent(4), tree.parent(5)), ("bc/e", Some(2), None));
    assert!(tree.children(1).is_none() && tree.file(2).is_none() && tree.link(1).is_none());
    let patch = Patch { gap: 3, string: 7, hash_only: true };
    let file = tree.file(1).unwrap();
    assert_eq!((file.id, file.size, file.chunk_ends), (FileId::of(b"a"), 30, [10, 30].as_slice()));
    assert_eq!(file.chunks, [ChunkId::of(&[1]), ChunkId::of(&[2])]);
    assert_eq!(file.patches.to_vec(), [patch]);
    let empty = tree.file(4).unwrap();
    assert!(empty.id == FileId::of(b"") && empty.chunks.is_empty() && empty.patches.is_empty());
    let link = tree.link(3).unwrap();
    assert_eq!((link.target, link.patches.to_vec(), tree.size(3)), (b"../a".as_slice(), vec![patch], 4));
    assert_eq!(tree.kind(1), Some(Kind::File { executable: true }));
    assert_eq!((tree.kind(3), tree.kind(5)), (Some(Kind::Symlink), None));
}

#[test]
fn the_same_in_memory_and_mapped() {
    let (id, bytes) = built();
    check(&Tree::in_memory(&bytes).unwrap());
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&bytes).unwrap();
    std::io::Seek::rewind(&mut file).unwrap();
    check(&Tree::mapped(&file, &id).unwrap().unwrap());
}

/// Each byte flipped, and each cut: not the tree that was written.
#[test]
fn damaged_files_are_none() {
    let (id, bytes) = built();
    let dir = tempfile::tempdir().unwrap();
    let open = |bytes: &[u8], id: &ManifestId| {
        let path = dir.path().join("tree");
        std::fs::write(&path, bytes).unwrap();
        Tree::mapped(&File::open(path).unwrap(), id).unwrap()
    };
    assert!(open(&bytes, &id).is_some() && open(&bytes, &ManifestId::of(b"other")).is_none());
    for at in 0..bytes.len() {
        let mut changed = bytes.clone();
        changed[at] ^= 0x81;
        assert!(open(&changed, &id).is_none(), "{at}");
        assert!(open(&bytes[..at], &id).is_none(), "{at}");
    }
    assert!(open(&[bytes.as_slice(), &[0; 8]].concat(), &id).is_none());
}
