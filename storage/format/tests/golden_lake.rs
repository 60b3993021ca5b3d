//! Our own formats, frozen: every file of `testdata/lake`, read and written again.
//!
//! A file here is never changed. A new version of a format adds files, and the old ones stay readable. With
//! `NARLAKE_GOLDEN=write` in the environment a missing file is written, and the test that missed it still fails, so that
//! it is looked at before it is believed.

use std::fs;
use std::path::{Path, PathBuf};

use narlake_format::id::{
    BlobId, BlobKind, CacheId, ChunkId, FileId, LongFileHasher, ManifestId, PackId, PartId, TableId, Ulid,
};
use narlake_format::lake::chunker::{Chunker, ChunkerVersion};
use narlake_format::lake::frame::{
    BaseWindow, Codec, Frame, FrameBlob, FrameContent, FrameDecoder, FrameEncoder, FrameHeader,
};
use narlake_format::lake::location::{Domain, Location, PackRef};
use narlake_format::lake::manifest::{Finished, ManifestEvent, ManifestHeader, ManifestReader, ManifestWriter};
use narlake_format::lake::pack::{self, PackBuilder, PackFooter};
use narlake_format::lake::record::PathRecord;
use narlake_format::lake::scrub::{PLACEHOLDER, Patch, PatchList, ScrubVersion, Scrubber};
use narlake_format::lake::segment::{Segment, SegmentBuilder};
use narlake_format::lake::strings::StringTable;
use narlake_format::nix::narinfo::NarInfo;
use narlake_format::nix::signature::SecretKey;
use narlake_format::nix::store_path::StoreDir;
use serde_json::{Value, json};

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/lake").join(name)
}

fn read(name: &str) -> Vec<u8> {
    fs::read(path(name)).unwrap_or_else(|error| panic!("read golden file {name}: {error}"))
}

/// The golden file, which must be what the code writes now.
fn golden(name: &str, written: &[u8]) -> Vec<u8> {
    if !path(name).exists() && std::env::var_os("NARLAKE_GOLDEN").is_some_and(|mode| mode == "write") {
        fs::write(path(name), written).unwrap();
        panic!("golden file {name} was missing and has been written");
    }
    let bytes = read(name);
    assert!(bytes == written, "{name} is not what is written now");
    bytes
}

/// Bytes without a pattern: SplitMix64 from this seed, each number little endian.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = state;
        word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ word >> 31
    };
    let mut bytes: Vec<u8> =
        std::iter::repeat_with(|| next().to_le_bytes()).take(length.div_ceil(8)).flatten().collect();
    bytes.truncate(length);
    bytes
}

fn text(length: usize) -> Vec<u8> {
    (0..).flat_map(|n: u32| format!("line {n}\n").into_bytes()).take(length).collect()
}

fn ulid(byte: u8) -> Ulid {
    Ulid::from_bytes([byte; 16])
}

fn pack_ref(domain: Domain, byte: u8) -> PackRef {
    PackRef { domain, id: PackId(ulid(byte)) }
}

/// The vectors were made by another implementation of the rule, in another language.
#[test]
fn scrub() {
    let vectors: Value = serde_json::from_slice(&read("scrub-v1.json")).unwrap();
    assert_eq!(vectors["placeholder"].as_str().map(str::as_bytes), Some(&[PLACEHOLDER][..]));
    assert_eq!(vectors["scrub_version"], ScrubVersion::V1 as u8);
    let objects = vectors["objects"].as_array().unwrap();
    assert!(objects.len() > 30);
    for object in objects {
        // In one piece, and byte by byte.
        for piece in [usize::MAX, 1, 50] {
            check_object(object, piece);
        }
    }
}

fn check_object(object: &Value, piece: usize) {
    let what = &object["what"];
    let dir: StoreDir = object["store_dir"].as_str().unwrap().parse().unwrap();
    let mut scrubber = Scrubber::new(&dir);
    let mut found = Vec::new();
    let files = object["files"].as_array().unwrap();
    for file in files {
        let (mut out, mut patches) = (Vec::new(), Vec::new());
        for bytes in file["input"].as_str().unwrap().as_bytes().chunks(piece) {
            scrubber.write(bytes, &mut out, &mut patches);
        }
        scrubber.end(&mut out, &mut patches);
        assert_eq!(String::from_utf8_lossy(&out), file["output"].as_str().unwrap(), "{what}");
        let listed: Vec<Value> = patches
            .iter()
            .map(|patch| json!({"gap": patch.gap, "string": patch.string, "hash_only": patch.hash_only}))
            .collect();
        assert_eq!(Value::from(listed), file["patches"], "{what}");
        found.push((out, patches));
    }
    let table = scrubber.finish();
    let strings: Vec<_> = table.iter().map(String::from_utf8_lossy).collect();
    assert_eq!(json!(strings), object["strings"], "{what}");
    for ((mut out, patches), file) in found.into_iter().zip(files) {
        let list = PatchList::resolve(&patches, &table, out.len() as u64).unwrap();
        list.restore(0, &mut out);
        assert_eq!(String::from_utf8_lossy(&out), file["input"].as_str().unwrap(), "{what}");
    }
}

#[test]
fn chunks() {
    let files = [
        ("noise, seed 1", noise(1, (1 << 20) + 3)),
        ("noise, seed 2", noise(2, 16_385)),
        ("noise, seed 3", noise(3, 16_384)),
        ("text", text(300_000)),
        ("zeros", vec![0; 200_000]),
        ("nothing", Vec::new()),
    ];
    let mut listed = Vec::new();
    for (what, file) in &files {
        let mut chunks = Vec::new();
        let mut chunker = Chunker::new();
        chunker.begin(file.len() as u64);
        let mut on = |chunk: &[u8]| {
            chunks.push(json!({"length": chunk.len(), "id": ChunkId::of(chunk).to_string()}));
            Ok::<(), ()>(())
        };
        chunker.cut(file, &mut on).unwrap();
        chunker.end();
        listed.push(json!({
            "file": what, "length": file.len(), "id": FileId::of(file).to_string(), "chunks": chunks,
        }));
    }
    let document = json!({"chunker_version": ChunkerVersion::V1 as u8, "files": listed});
    golden("chunks-v1.json", format!("{document:#}\n").as_bytes());
}

const STRINGS: [&str; 3] = [
    "0123456789abcdfghijklmnpqrsvwxyz-glibc-2.40",
    "w7mbd9hgqjrp2hzq4k3cvm1avhlxxd5n-A+._?=-",
    "0123456789abcdfghijklmnpqrsvwxyz-glibc-2.40-bin",
];

fn table() -> StringTable {
    let mut scrubber = Scrubber::new(&StoreDir::default());
    let file: Vec<String> = STRINGS.iter().map(|string| format!("/nix/store/{string}")).collect();
    scrubber.write(file.join("\n").as_bytes(), &mut Vec::new(), &mut Vec::new());
    scrubber.end(&mut Vec::new(), &mut Vec::new());
    scrubber.finish()
}

#[test]
fn strings() {
    let table = table();
    assert_eq!(table.iter().collect::<Vec<_>>(), STRINGS.map(str::as_bytes));
    let bytes = golden("strings-v1.bin", &table.encode());
    assert_eq!(StringTable::decode(&bytes), Ok(table.clone()));
    assert_eq!(table.id().to_string(), TableId::of(&bytes).to_string());
}

/// A tree with every kind of item: directories, a file of each kind, patches, a symlink, shared parts of names.
fn manifest() -> Finished {
    let mut writer = ManifestWriter::new(ScrubVersion::V1, ChunkerVersion::V1);
    let patch = |gap, string, hash_only| Patch { gap, string, hash_only };
    let chunk = |n: u8| ChunkId::of(&[n]);
    let mut write = || {
        writer.directory()?;
        writer.entry(b"bin")?;
        writer.directory()?;
        writer.entry(b"hello")?;
        writer.begin_file(true, 100_000)?;
        writer.chunk(chunk(1), 60_000)?;
        writer.patch(patch(1_000, 0, false))?;
        writer.patch(patch(58_950, 1, true))?;
        writer.chunk(chunk(2), 40_000)?;
        writer.end_file(FileId::from_bytes([0xee; 32]))?;
        writer.entry(b"hello.sh")?;
        writer.begin_file(false, 300)?;
        writer.chunk(chunk(3), 300)?;
        writer.patch(patch(2, 2, false))?;
        writer.end_file(FileId::of_short(&chunk(3)))?;
        writer.entry(b"link")?;
        writer.symlink(b"/nix/store/################################-####", &[patch(11, 0, false)])?;
        writer.end_directory()?;
        writer.entry(b"empty")?;
        writer.begin_file(false, 0)?;
        writer.end_file(FileId::of(b""))?;
        writer.entry(b"lib")?;
        writer.symlink(b"bin", &[])?;
        writer.end_directory()
    };
    write().unwrap();
    writer.finish().unwrap()
}

#[test]
fn manifests() {
    let written = manifest();
    assert_eq!(written.parts.len(), 1);
    let part = golden("manifest-part-v1.bin", &written.parts[0].bytes);
    let header_bytes = golden("manifest-header-v1.bin", &written.header_bytes);
    let header = ManifestHeader::decode(&header_bytes).unwrap();
    assert_eq!(header, written.header);
    assert_eq!((header.id(), header.parts[0].id), (ManifestId::of(&header_bytes), PartId::of(&part)));
    let mut reader = ManifestReader::new(&header);
    let mut writer = ManifestWriter::new(header.scrub, header.chunker);
    reader
        .part(&part, &mut |event| match event {
            ManifestEvent::Directory => writer.directory(),
            ManifestEvent::Entry { name } => writer.entry(name),
            ManifestEvent::EndDirectory => writer.end_directory(),
            ManifestEvent::Symlink { target, patches } => writer.symlink(target, patches),
            ManifestEvent::BeginFile { executable, size } => writer.begin_file(executable, size),
            ManifestEvent::Chunk { id, length } => writer.chunk(id, length),
            ManifestEvent::Patch(patch) => writer.patch(patch),
            ManifestEvent::EndFile { file } => writer.end_file(file),
        })
        .unwrap();
    reader.finish().unwrap();
    assert_eq!(writer.finish(), Ok(written));
}

/// The content of the frames of the golden pack: raw, compressed, and as a delta of the first and the third.
fn frame_contents() -> [Vec<(BlobKind, Vec<u8>)>; 4] {
    let manifest = manifest();
    let (first, third) = (noise(4, 3_000), noise(5, 2_000));
    let delta = [&first[500..], b"something new", &third[..1_900]].concat();
    [
        vec![(BlobKind::Chunk, first)],
        vec![
            (BlobKind::Chunk, text(2_000)),
            (BlobKind::Part, manifest.parts[0].bytes.clone()),
            (BlobKind::Manifest, manifest.header_bytes),
            (BlobKind::Table, table().encode()),
        ],
        vec![(BlobKind::Chunk, third)],
        vec![(BlobKind::Chunk, delta)],
    ]
}

fn new_pack() -> Vec<u8> {
    let contents = frame_contents();
    let mut encoder = FrameEncoder::new(3);
    let mut builder = PackBuilder::new();
    for (number, blobs) in contents.iter().enumerate() {
        let mut content = FrameContent::default();
        for (kind, bytes) in blobs {
            content.push(*kind, BlobId::of(*kind, bytes), bytes);
        }
        builder.push(if number == 3 {
            let window = BaseWindow::new(0, 0b101).unwrap();
            encoder.encode_delta(&content, window, &[&contents[0][0].1, &contents[2][0].1])
        } else {
            encoder.encode(&content)
        });
    }
    builder.finish().0.concat()
}

/// The frames of a pack, as they were before they were laid into it.
fn frames_of(pack: &[u8], footer: &PackFooter) -> Vec<Frame> {
    let frame = |entry: &pack::FrameEntry| {
        let start = entry.place.offset as usize;
        let bytes = pack[start..start + entry.place.length as usize].to_vec();
        let blobs = footer.blobs_of(entry).iter();
        let blobs = blobs.map(|b| FrameBlob { kind: b.kind, id: b.id, offset: b.offset, length: b.length }).collect();
        Frame { header: FrameHeader::decode(&bytes).unwrap(), bytes, blobs }
    };
    footer.frames().iter().map(frame).collect()
}

/// What zstd makes of the same content changes with its version, and may; so the frames of the golden pack are decoded
/// and laid into a pack again, not compressed again.
#[test]
fn packs() {
    let name = "pack-v1.bin";
    let pack = if path(name).exists() { read(name) } else { golden(name, &new_pack()) };
    let footer = pack::verify(&pack).unwrap();
    let frames = frames_of(&pack, &footer);
    let codecs: Vec<Codec> = frames.iter().map(|frame| frame.header.codec).collect();
    assert_eq!(codecs, [Codec::Raw, Codec::Zstd, Codec::Raw, Codec::Delta]);
    let mut decoder = FrameDecoder::new();
    let contents = frame_contents();
    for (frame, blobs) in frames.iter().zip(&contents) {
        let raw = match frame.header.base {
            None => decoder.decode(&frame.bytes),
            Some((window, _)) => {
                assert_eq!(window.frames().collect::<Vec<_>>(), [0, 2]);
                decoder.decode_delta(&frame.bytes, &[&contents[0][0].1, &contents[2][0].1])
            }
        };
        let raw = raw.unwrap();
        for (listed, (kind, bytes)) in frame.blobs.iter().zip(blobs) {
            assert_eq!((listed.kind, listed.id), (*kind, BlobId::of(*kind, bytes)));
            assert_eq!(&raw[listed.offset as usize..][..listed.length as usize], bytes);
        }
        assert_eq!(frame.blobs.len(), blobs.len());
    }
    // Stored as it is, content has one form.
    let mut content = FrameContent::default();
    content.push(BlobKind::Chunk, ChunkId::of(&contents[0][0].1).into(), &contents[0][0].1);
    assert_eq!(FrameEncoder::new(3).encode(&content), frames[0]);
    let mut builder = PackBuilder::new();
    for frame in frames {
        builder.push(frame);
    }
    assert!(builder.finish().0.concat() == pack, "the same frames make the same pack");
}

#[test]
fn segments() {
    let footer = pack::verify(&read("pack-v1.bin")).unwrap();
    let cache = Domain::Cache(CacheId(ulid(7)));
    let packs = [pack_ref(Domain::Public, 1), pack_ref(Domain::Public, 2), pack_ref(cache, 3), pack_ref(cache, 4)];
    let mut builder = SegmentBuilder::new();
    builder.pack(packs[2], &footer);
    builder.pack(packs[0], &footer);
    builder.cover(packs[3]);
    // Enough for a fan-out of two bits.
    let place = Location { pack: packs[1], frame_offset: 1 << 20, frame_length: 70_000, offset: 1_000, length: 16_384 };
    for n in 0..300_u32 {
        builder.add(ChunkId::of(&n.to_le_bytes()).into(), &Location { offset: 500 * n, ..place });
    }
    let bytes = golden("segment-v1.bin", &builder.finish());
    let segment = Segment::open(&bytes).unwrap();
    assert_eq!(segment.packs(), packs);
    assert_eq!(segment.len(), 300 + 2 * footer.blobs().len());
    for pack in [packs[0], packs[2]] {
        for (id, location) in footer.locations(pack) {
            assert!(segment.get_all(&id).any(|found| found == location));
        }
    }
    assert_eq!(segment.get(&ChunkId::of(&7_u32.to_le_bytes()).into()), Some(Location { offset: 3_500, ..place }));
    let mut again = SegmentBuilder::new();
    segment.packs().iter().for_each(|pack| again.cover(*pack));
    segment.iter().for_each(|(id, location)| again.add(id, &location));
    assert!(again.finish() == bytes);
}

#[test]
fn records() {
    let dir = StoreDir::default();
    let hash = "0".repeat(52);
    let narinfo = format!(
        "StorePath: /nix/store/{own}\nURL: nar/{hash}.nar.xz\nCompression: xz\nFileHash: sha256:{hash}\nFileSize: 1234\n\
         NarHash: sha256:{hash}\nNarSize: 104120\nReferences: {own} {glibc}\nDeriver: {own}.drv\n",
        own = STRINGS[1],
        glibc = STRINGS[0],
    );
    let info = NarInfo::parse(&dir, narinfo.as_bytes()).unwrap();
    let key = SecretKey::generate("lake-1", [1; 32]).unwrap();
    let mut record = PathRecord::new(info, manifest().id, &table());
    record.sign(&dir, &key);
    let text = golden("record-v1.narinfo", record.to_text(&dir).as_bytes());
    assert_eq!(PathRecord::parse(&dir, &text), Ok(record.clone()));
    assert!(record.is_signed_by(&dir, &[key.public()]));
}

/// Ids hash under contexts that are frozen too.
#[test]
fn ids() {
    let mut long = LongFileHasher::new();
    long.update(&text(20_000));
    let ids = json!({
        "chunk": ChunkId::of(b"narlake").to_string(),
        "part": PartId::of(b"narlake").to_string(),
        "manifest": ManifestId::of(b"narlake").to_string(),
        "table": TableId::of(b"narlake").to_string(),
        "empty file": FileId::of(b"").to_string(),
        "short file": FileId::of(b"narlake").to_string(),
        "long file": long.finish().to_string(),
        "patched file": patched().to_string(),
    });
    assert_eq!(long.finish(), FileId::of(&text(20_000)));
    golden("ids-v1.json", format!("{ids:#}\n").as_bytes());
}

fn patched() -> narlake_format::id::ContentId {
    let patches = [Patch { gap: 11, string: 0, hash_only: false }, Patch { gap: 5, string: 1, hash_only: true }];
    PatchList::resolve(&patches, &table(), 1_000).unwrap().content_id(&FileId::of(b"narlake"))
}
