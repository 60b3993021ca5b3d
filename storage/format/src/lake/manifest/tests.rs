//! Manifests: trees there and back, their one encoding, and all that is refused.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::error::FormatError;
use crate::id::{ChunkId, FILE_ID_INLINE_MAX, FileId, PartId};
use crate::lake::chunker::ChunkerVersion;
use crate::lake::scrub::{Patch, ScrubVersion};
use crate::limits::{CHUNK_MAX, DEPTH_MAX, PART_SMALL_MAX, PARTS_SMALL};

/// A tree to write.
#[derive(Clone, Debug)]
enum Tree {
    Directory(BTreeMap<Vec<u8>, Tree>),
    Symlink(Vec<u8>, Vec<Patch>),
    /// The lengths of its chunks, and the patches in each.
    File(bool, Vec<(u32, Vec<Patch>)>),
}

fn chunk_id(number: usize, length: u32) -> ChunkId {
    ChunkId::of(format!("{number} {length}").as_bytes())
}

fn put(tree: &Tree, writer: &mut ManifestWriter) -> Result<(), FormatError> {
    match tree {
        Tree::Directory(entries) => {
            writer.directory()?;
            for (name, tree) in entries {
                writer.entry(name)?;
                put(tree, writer)?;
            }
            writer.end_directory()
        }
        Tree::Symlink(target, patches) => writer.symlink(target, patches),
        Tree::File(executable, chunks) => {
            let size = chunks.iter().map(|(length, _)| u64::from(*length)).sum();
            writer.begin_file(*executable, size)?;
            for (number, (length, patches)) in chunks.iter().enumerate() {
                writer.chunk(chunk_id(number, *length), *length)?;
                for patch in patches {
                    writer.patch(*patch)?;
                }
            }
            let short = match chunks.as_slice() {
                [] => FileId::of(b""),
                [(length, _), ..] => FileId::of_short(&chunk_id(0, *length)),
            };
            writer.end_file(if size > FILE_ID_INLINE_MAX { FileId::from_bytes([9; 32]) } else { short })
        }
    }
}

fn new_writer() -> ManifestWriter {
    ManifestWriter::new(ScrubVersion::V1, ChunkerVersion::V1)
}

fn write(tree: &Tree) -> Result<Finished, FormatError> {
    let mut writer = new_writer();
    put(tree, &mut writer)?;
    writer.finish()
}

/// Hands an event of a reader to a writer.
fn replay(event: ManifestEvent<'_>, writer: &mut ManifestWriter) -> Result<(), FormatError> {
    match event {
        ManifestEvent::Directory => writer.directory(),
        ManifestEvent::Entry { name } => writer.entry(name),
        ManifestEvent::EndDirectory => writer.end_directory(),
        ManifestEvent::Symlink { target, patches } => writer.symlink(target, patches),
        ManifestEvent::BeginFile { executable, size } => writer.begin_file(executable, size),
        ManifestEvent::Chunk { id, length } => writer.chunk(id, length),
        ManifestEvent::Patch(patch) => writer.patch(patch),
        ManifestEvent::EndFile { file } => writer.end_file(file),
    }
}

/// Reads a manifest into a writer.
fn rewrite(header: &ManifestHeader, parts: &[Vec<u8>]) -> Result<Finished, FormatError> {
    let mut reader = ManifestReader::new(header);
    let mut writer = new_writer();
    for part in parts {
        reader.part(part, &mut |event| replay(event, &mut writer))?;
    }
    reader.finish()?;
    Ok(writer.finish().expect("a writer takes what a reader gives"))
}

fn bytes_of(finished: &Finished) -> Vec<Vec<u8>> {
    finished.parts.iter().map(|part| part.bytes.clone()).collect()
}

#[track_caller]
fn check(tree: &Tree) -> Finished {
    let finished = write(tree).expect("a tree");
    assert_eq!(ManifestHeader::decode(&finished.header_bytes), Ok(finished.header.clone()));
    assert_eq!(finished.header.id(), finished.id);
    for (number, part) in finished.parts.iter().enumerate() {
        assert!(part.bytes.len() <= part_max(number), "part {number}");
    }
    assert_eq!(rewrite(&finished.header, &bytes_of(&finished)), Ok(finished.clone()));
    finished
}

/// The events of a manifest of one part, as text.
fn events(finished: &Finished) -> Vec<String> {
    let mut events = Vec::new();
    let mut reader = ManifestReader::new(&finished.header);
    for part in &finished.parts {
        reader
            .part(&part.bytes, &mut |event| {
                events.push(format!("{event:?}"));
                Ok::<_, FormatError>(())
            })
            .expect("a part");
    }
    events
}

fn file(length: u32) -> Tree {
    let chunk_max = u32::try_from(CHUNK_MAX).expect("small");
    let mut chunks = vec![(chunk_max, Vec::new()); (length / chunk_max) as usize];
    if !length.is_multiple_of(chunk_max) {
        chunks.push((length % chunk_max, Vec::new()));
    }
    Tree::File(false, chunks)
}

fn directory<const N: usize>(entries: [(&str, Tree); N]) -> Tree {
    Tree::Directory(entries.into_iter().map(|(name, tree)| (name.as_bytes().to_vec(), tree)).collect())
}

fn patch(gap: u64, string: u32, hash_only: bool) -> Patch {
    Patch { gap, string, hash_only }
}

#[test]
fn one_node() {
    for tree in [directory([]), file(0), file(5), file(70_000), Tree::Symlink(b"to".to_vec(), Vec::new())] {
        let finished = check(&tree);
        assert_eq!((finished.parts.len(), finished.header.entries), (1, 1), "{tree:?}");
    }
}

#[test]
fn layout() {
    let tree = directory([
        ("bin", directory([("run", Tree::File(true, vec![(40, vec![patch(3, 0, true)])]))])),
        ("bins", Tree::Symlink(vec![b'#'; 34], vec![patch(0, 1, false)])),
        ("empty", file(0)),
    ]);
    let finished = check(&tree);
    let part = &finished.parts[0].bytes;
    let id = chunk_id(0, 40);
    let columns = [
        &[1, 1, 3, 5, 4, 2, 5][..],
        &[0, 3, 0, 3, 3, 1, 0, 5],
        b"binrunsempty",
        &[40, 34 << 1 | 1, 0],
        &[b'#'; 34],
        &[1],
        &[1, 3, 1, 1, 0, 2],
        id.as_bytes(),
    ];
    let lengths = columns.map(|column| u8::try_from(column.len()).expect("short"));
    assert_eq!(*part, [&lengths[..], &columns.concat()].concat());
    let expected = [
        "Directory".to_owned(),
        format!("Entry {{ name: {:?} }}", b"bin"),
        "Directory".to_owned(),
        format!("Entry {{ name: {:?} }}", b"run"),
        "BeginFile { executable: true, size: 40 }".to_owned(),
        format!("Chunk {{ id: {id:?}, length: 40 }}"),
        "Patch(Patch { gap: 3, string: 0, hash_only: true })".to_owned(),
        format!("EndFile {{ file: {:?} }}", FileId::of_short(&id)),
        "EndDirectory".to_owned(),
        format!("Entry {{ name: {:?} }}", b"bins"),
        format!("Symlink {{ target: {:?}, patches: [Patch {{ gap: 0, string: 1, hash_only: false }}] }}", [b'#'; 34]),
        format!("Entry {{ name: {:?} }}", b"empty"),
        "BeginFile { executable: false, size: 0 }".to_owned(),
        format!("EndFile {{ file: {:?} }}", FileId::of(b"")),
        "EndDirectory".to_owned(),
    ];
    assert_eq!(events(&finished), expected);
}

#[test]
fn long_manifests_are_cut() {
    let many = (0..40_000).map(|n| (format!("file {n:07}").into_bytes(), file(n)));
    let finished = check(&Tree::Directory(many.collect()));
    let small = finished.parts.iter().take(PARTS_SMALL);
    assert!(small.clone().count() == PARTS_SMALL && small.clone().all(|part| part.bytes.len() <= PART_SMALL_MAX));
    assert!(finished.parts[PARTS_SMALL].bytes.len() > PART_SMALL_MAX, "later parts are large");
    assert_eq!(finished.parts.iter().map(|part| part.entries).sum::<u32>(), 40_001);
    // The first parts are small, the later ones large.
    let lengths: Vec<usize> = finished.parts.iter().map(|part| part.bytes.len()).collect();
    assert!(lengths[PARTS_SMALL - 1] > PART_SMALL_MAX - 100 && lengths[PARTS_SMALL] > PART_SMALL_MAX, "{lengths:?}");
    // A file goes on in the next part.
    let finished = check(&directory([("long", file(1 << 30)), ("other", file(1))]));
    let entries: Vec<u32> = finished.parts.iter().map(|part| part.entries).collect();
    assert_eq!((entries[0], entries[entries.len() - 1], entries.iter().sum::<u32>()), (2, 1, 3));
    assert!(entries.len() > 3, "a file over several parts");
    // Parts can be taken as they come.
    let mut writer = new_writer();
    let mut taken = Vec::new();
    writer.begin_file(false, 1 << 30).expect("a file");
    for number in 0..1 << 14 {
        writer.chunk(chunk_id(number, 1 << 16), 1 << 16).expect("a chunk");
        taken.extend(writer.take_parts());
    }
    writer.end_file(FileId::from_bytes([9; 32])).expect("a file");
    let rest = writer.finish().expect("a manifest");
    assert!(!taken.is_empty());
    taken.extend(rest.parts);
    assert_eq!(taken, check(&file(1 << 30)).parts);
}

/// A part that could have held the next part's first item is another encoding of the same tree.
#[test]
fn parts_cut_too_early() {
    let parts = [vec![1, 0, 0, 0, 0, 0, 0, 0, 1], vec![1, 0, 0, 0, 0, 0, 0, 0, 5]];
    let listed = parts.iter().zip([1, 0]).map(|(bytes, entries)| PartRef {
        id: PartId::of(bytes),
        entries,
        length: u32::try_from(bytes.len()).expect("short"),
    });
    let (scrub, chunker) = (ScrubVersion::V1, ChunkerVersion::V1);
    let header = ManifestHeader { scrub, chunker, entries: 1, parts: listed.collect() };
    let error = rewrite(&header, &parts).expect_err("a cut too early");
    assert_eq!(error, FormatError::Syntax { field: "cut between manifest parts", offset: 0 });
    let whole = vec![2, 0, 0, 0, 0, 0, 0, 0, 1, 5];
    assert_eq!(check(&directory([])).parts[0].bytes, whole);
}

/// What a single part, whose header fits it, is refused for.
#[test]
fn refusals() {
    let name = |shared: u8, own: &[u8]| (vec![shared, u8::try_from(own.len()).unwrap_or(255)], own.to_vec());
    let check = |what: &str, entries: u32, columns: [Vec<u8>; 8], valid: bool| {
        let mut bytes = Vec::new();
        for column in &columns {
            crate::lake::wire::put_varint(column.len() as u64, &mut bytes);
        }
        bytes.extend(columns.concat());
        let (scrub, chunker) = (ScrubVersion::V1, ChunkerVersion::V1);
        let length = u32::try_from(bytes.len()).expect("short");
        let parts = vec![PartRef { id: PartId::of(&bytes), entries, length }];
        let header = ManifestHeader { scrub, chunker, entries: entries.into(), parts };
        let result = rewrite(&header, std::slice::from_ref(&bytes));
        assert_eq!(result.is_ok(), valid, "{what}: {result:?}");
        if let Ok(finished) = result {
            assert_eq!(finished.header_bytes, header.encode(), "{what}");
        }
    };
    let two = |first: (Vec<u8>, Vec<u8>), second: (Vec<u8>, Vec<u8>)| {
        let (lengths, names) = ([first.0, second.0].concat(), [first.1, second.1].concat());
        [vec![1, 2, 2, 5], lengths, names, vec![0, 0], vec![], vec![], vec![], vec![]]
    };
    check("two names", 3, two(name(0, b"a"), name(0, b"b")), true);
    check("a longer name", 3, two(name(0, b"a"), name(1, b"b")), true);
    check("names out of order", 3, two(name(0, b"b"), name(0, b"a")), false);
    check("a name twice", 3, two(name(0, b"a"), name(0, b"a")), false);
    check("a name twice, all of it shared", 3, two(name(0, b"a"), name(1, b"")), false);
    check("less shared than could be", 3, two(name(0, b"ab"), name(0, b"ac")), false);
    check("more shared than there is", 3, two(name(0, b"a"), name(2, b"b")), false);
    check("shared with no name", 3, two(name(1, b"a"), name(0, b"b")), false);
    check("an empty name", 3, two(name(0, b""), name(0, b"b")), false);
    check("a name with a slash", 3, two(name(0, b"a/"), name(0, b"b")), false);
    check("a name with NUL", 3, two(name(0, b"a\0"), name(0, b"b")), false);
    check("a dot", 3, two(name(0, b"."), name(0, b"b")), false);
    check("two dots", 3, two(name(0, b"."), name(1, b".")), false);
    check("two dots alone", 3, two(name(0, b".."), name(0, b"b")), false);
    check("three dots", 3, two(name(0, b"..."), name(0, b"b")), true);
    check("longest name", 3, two(name(0, &[b'a'; 255]), name(0, b"b")), true);
    check("name too long", 3, two(name(0, &[b'a'; 255]), name(255, b"b")), false);
    let one = |shapes: &[u8], sizes: &[u8], chunks: &[u8], ids: usize| {
        [shapes.to_vec(), vec![], vec![], sizes.to_vec(), vec![], chunks.to_vec(), vec![], vec![7; 32 * ids]]
    };
    check("a file", 1, one(&[2], &[5], &[0], 1), true);
    check("no items", 1, one(&[], &[], &[], 0), false);
    check("too few entries", 2, one(&[2], &[5], &[0], 1), false);
    check("an unknown shape", 1, one(&[6], &[5], &[0], 1), false);
    check("no shape", 1, one(&[0], &[5], &[0], 1), false);
    check("two roots", 2, one(&[2, 2], &[0, 0], &[], 0), false);
    check("an end without a directory", 1, one(&[2, 5], &[0], &[], 0), false);
    check("a directory without an end", 1, one(&[1], &[], &[], 0), false);
    check("a file without its chunk", 1, one(&[2], &[5], &[], 0), false);
    check("the last chunk's length spelled out", 1, one(&[2], &[5], &[10], 1), false);
    check("a chunk too many", 1, one(&[2], &[5], &[0, 0], 2), false);
    check("a chunk for an empty file", 1, one(&[2], &[0], &[0], 1), false);
    check("two chunks in a short file", 1, one(&[2], &[5], &[2, 0], 2), false);
    check("an id too many", 1, one(&[2], &[5], &[0], 2), false);
    check("a size in a longer spelling", 1, one(&[2], &[0x85, 0], &[0], 1), false);
    check("a long file", 1, one(&[2], &[0x81, 0x80, 4], &[0x80, 0x80, 8, 0], 3), true);
    check("a chunk too long", 1, one(&[2], &[0x81, 0x80, 4], &[0], 2), false);
    check("a long file without its id", 1, one(&[2], &[0x81, 0x80, 4], &[0x80, 0x80, 8, 0], 2), false);
    check("a file of 2^40 bytes and more", 1, one(&[2], &[0x81, 0x80, 0x80, 0x80, 0x80, 0x20], &[], 0), false);
    let patched = |chunk: u8, patches: &[u8]| {
        [vec![2], vec![], vec![], vec![50], vec![], vec![chunk], patches.to_vec(), vec![7; 32]]
    };
    // The second of two chunks, full of hashes.
    let patched_chunk = |count: u64| {
        let mut patches = Vec::new();
        crate::lake::wire::put_varint(count, &mut patches);
        (0..count).for_each(|_| patches.extend([0, 1]));
        let size = vec![0x80, 0x80, 8];
        [vec![2], vec![], vec![], size.clone(), vec![], [&size[..], &[1]].concat(), patches, vec![7; 96]]
    };
    check("a patch", 1, patched(1, &[1, 49, 0]), true);
    check("two patches", 1, patched(1, &[2, 0, 1, 0, 0]), true);
    check("patches said to be there", 1, patched(1, &[]), false);
    check("patches not said to be there", 1, patched(0, &[1, 49, 0]), false);
    check("no patches", 1, patched(1, &[0]), false);
    check("a patch beyond the chunk", 1, patched(1, &[1, 50, 0]), false);
    check("a second patch beyond the chunk", 1, patched(1, &[2, 18, 1, 0, 1]), false);
    check("a string that no table has", 1, patched(1, &[1, 0, 0x80, 0x80, 8]), false);
    check("as many patches as a chunk has room for", 1, patched_chunk(2048), true);
    check("more patches than a chunk has room for", 1, patched_chunk(2049), false);
    check("a gap that overflows", 1, patched(1, &[&[2, 1, 0][..], &[255; 9], &[1, 0]].concat()), false);
    let link = |size: &[u8], target: &[u8], patches: &[u8]| {
        [vec![4], vec![], vec![], size.to_vec(), target.to_vec(), vec![], patches.to_vec(), vec![]]
    };
    check("a symlink", 1, link(&[2], b"a", &[]), true);
    check("a symlink to nothing", 1, link(&[0], b"", &[]), false);
    check("a target with NUL", 1, link(&[4], b"a\0", &[]), false);
    check("a target that is not all there", 1, link(&[4], b"a", &[]), false);
    check("a target that goes on", 1, link(&[2], b"ab", &[]), false);
    check("a patch in a target", 1, link(&[3], b"a", &[1, 0, 0]), true);
    check("a patch beyond a target", 1, link(&[3], b"a", &[1, 1, 0]), false);
    check("longest target", 1, link(&[0xfe, 0x3f], &[b'a'; 4095], &[]), true);
    check("target too long", 1, link(&[0x80, 0x40], &[b'a'; 4096], &[]), false);
}

#[test]
fn the_writer_takes_trees_only() {
    type Call = fn(&mut ManifestWriter) -> Result<(), FormatError>;
    let misuse: [&[Call]; 9] = [
        &[|w| w.end_directory()],
        &[|w| w.entry(b"a")],
        &[|w| w.directory(), |w| w.directory()],
        &[|w| w.directory(), |w| w.entry(b"a"), |w| w.end_directory()],
        &[|w| w.chunk(chunk_id(0, 1), 1)],
        &[|w| w.begin_file(false, 5), |w| w.chunk(chunk_id(0, 6), 6)],
        &[|w| w.begin_file(false, 5), |w| w.end_file(FileId::of(b""))],
        &[|w| w.begin_file(false, 5), |w| w.chunk(chunk_id(0, 5), 5), |w| w.end_file(FileId::of(b"hello"))],
        &[|w| w.begin_file(false, 0), |w| w.patch(patch(0, 0, true))],
    ];
    for (number, calls) in misuse.into_iter().enumerate() {
        let mut writer = new_writer();
        let results: Vec<bool> = calls.iter().map(|call| call(&mut writer).is_ok()).collect();
        let (last, before) = results.split_last().expect("a call");
        assert!(!last && before.iter().all(|ok| *ok), "case {number}: {results:?}");
    }
    assert!(new_writer().finish().is_err());
    let mut deep = file(0);
    for _ in 0..DEPTH_MAX {
        deep = directory([("d", deep)]);
    }
    check(&deep);
    assert!(write(&directory([("d", deep)])).is_err());
}

#[test]
fn headers_have_one_encoding() {
    let good = check(&directory([("a", file(9))])).header_bytes;
    for at in 0..good.len() {
        assert!(ManifestHeader::decode(&good[..at]).is_err(), "cut at {at}");
        for bit in 0..8 {
            let mut bytes = good.clone();
            bytes[at] ^= 1 << bit;
            if let Ok(header) = ManifestHeader::decode(&bytes) {
                assert_eq!(header.encode(), bytes);
                assert_ne!(header.id(), crate::id::ManifestId::of(&good));
            }
        }
    }
    assert!(ManifestHeader::decode(&[&good[..], &[0]].concat()).is_err());
}

/// A tree with patches in legal places: at most one for each 64 bytes.
fn tree() -> impl Strategy<Value = Tree> {
    let patches = || prop::collection::vec((0..30_u64, 0..300_u32, any::<bool>()), 0..3);
    let to_patches = |list: Vec<(u64, u32, bool)>| list.into_iter().map(|(g, s, h)| patch(g, s, h)).collect::<Vec<_>>();
    let short = (any::<bool>(), 0..=16_384_u32, patches()).prop_map(move |(executable, length, list)| {
        let patches = if length < 300 { Vec::new() } else { to_patches(list) };
        Tree::File(executable, if length == 0 { Vec::new() } else { vec![(length, patches)] })
    });
    let chunks = prop::collection::vec((8193..=65_536_u32, patches()), 2..5);
    let long = (any::<bool>(), chunks).prop_map(move |(executable, chunks)| {
        // Each chunk's patches start where the lower bound has caught up, so that they lie in it whatever their strings.
        let mut offset = 0;
        let mut bound = 0;
        let chunks = chunks.into_iter().map(|(length, list)| {
            let mut patches = to_patches(list);
            if let Some(first) = patches.first_mut() {
                first.gap += offset - bound;
            }
            for patch in &patches {
                bound += patch.gap + if patch.hash_only { 32 } else { 34 };
            }
            offset += u64::from(length);
            (length, patches)
        });
        Tree::File(executable, chunks.collect())
    });
    let link = ("[a-z/.]{40,60}", patches()).prop_map(move |(target, list)| {
        Tree::Symlink(target.into_bytes(), to_patches(list).into_iter().take(1).collect())
    });
    prop_oneof![short, long, link].prop_recursive(5, 60, 8, |inner| {
        let name = prop_oneof!["[a-c]{1,4}", "[ -.0-~]{3,20}"];
        prop::collection::btree_map(name.prop_map(String::into_bytes), inner, 0..8).prop_map(Tree::Directory)
    })
}

proptest! {
    #[test]
    fn reading_is_the_inverse_of_writing(tree in tree()) {
        check(&tree);
    }

    /// Bytes that are read are what would be written for what they say, so a tree has one encoding.
    #[test]
    fn one_encoding(tree in tree(), mutations in prop::collection::vec(any::<(prop::sample::Index, u8)>(), 1..4)) {
        let finished = check(&tree);
        prop_assume!(finished.parts.len() == 1);
        let mut bytes = finished.parts[0].bytes.clone();
        for (at, value) in mutations {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        let mut header = finished.header.clone();
        header.parts[0].id = PartId::of(&bytes);
        if let Ok(rewritten) = rewrite(&header, &[bytes.clone()]) {
            prop_assert_eq!(&rewritten.parts[0].bytes, &bytes);
        }
    }

    #[test]
    fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 1..100), entries in 0..4_u32) {
        let length = u32::try_from(bytes.len()).expect("short");
        let parts = vec![PartRef { id: PartId::of(&bytes), entries, length }];
        let (scrub, chunker) = (ScrubVersion::V1, ChunkerVersion::V1);
        let header = ManifestHeader { scrub, chunker, entries: entries.into(), parts };
        let _ = rewrite(&header, &[bytes]);
    }
}
