//! The lake's binary formats: packs, segments, manifests, string tables.

use std::io::Write;

use anyhow::{Context as _, bail};
use narlake_format::error::FormatError;
use narlake_format::id::{BlobId, BlobKind, PartId, TableId};
use narlake_format::lake::chunker::ChunkerVersion;
use narlake_format::lake::frame::{Codec, FrameDecoder};
use narlake_format::lake::manifest::{ManifestEvent, ManifestHeader, ManifestReader, PartRef};
use narlake_format::lake::pack::{FrameEntry, FromTail, PackFooter, verify};
use narlake_format::lake::scrub::ScrubVersion;
use narlake_format::lake::segment::Segment;
use narlake_format::lake::strings::StringTable;

use super::finding::{Finding, Value};

/// A pack by its footer; with `deep` down to every blob.
pub(super) fn pack(bytes: &[u8], entries: bool, deep: bool) -> anyhow::Result<Finding> {
    let footer = if deep { verify(bytes)? } else { footer(bytes)? };
    let raw: u64 = footer.frames().iter().map(|frame| u64::from(frame.raw_length)).sum();
    let stored: u64 = footer.frames().iter().map(|frame| u64::from(frame.place.length)).sum();
    let count = |kind: BlobKind| footer.blobs().iter().filter(|blob| blob.kind == kind).count();
    let facts = vec![
        ("bytes", footer.pack_length().into()),
        ("frame_bytes", stored.into()),
        ("raw_bytes", raw.into()),
        ("chunks", count(BlobKind::Chunk).into()),
        ("manifest_parts", count(BlobKind::Part).into()),
        ("manifests", count(BlobKind::Manifest).into()),
        ("string_tables", count(BlobKind::Table).into()),
        ("verified", Value::text(if deep { "every blob" } else { "footer" })),
    ];
    let frames = footer.frames().iter().map(|frame| {
        let base =
            frame.base.map(|window| window.frames().map(|number| number.to_string()).collect::<Vec<_>>().join("+"));
        vec![
            frame.place.number.into(),
            frame.place.offset.into(),
            frame.place.length.into(),
            frame.raw_length.into(),
            Value::text(codec(frame.codec)),
            Value::optional(base),
            footer.blobs_of(frame).len().into(),
        ]
    });
    const FRAMES: &[&str] = &["frame", "offset", "length", "raw_length", "codec", "base", "blobs"];
    let finding = Finding::new("pack", facts).with("frames", FRAMES, frames.collect());
    if !entries {
        return Ok(finding);
    }
    let blobs = footer.blobs().iter().map(|blob| {
        vec![
            Value::text(blob.id),
            Value::text(kind(blob.kind)),
            blob.frame.into(),
            blob.offset.into(),
            blob.length.into(),
        ]
    });
    Ok(finding.with("blobs", &["id", "kind", "frame", "offset", "length"], blobs.collect()))
}

/// Writes the content of one blob of a pack, verified.
pub(super) fn write_blob(pack: &[u8], id: &str, out: &mut impl Write) -> anyhow::Result<()> {
    let footer = footer(pack)?;
    let mut found = footer.blobs().iter().filter(|blob| blob.id.to_string().starts_with(id));
    let Some(blob) = found.next() else { bail!("no blob of it has an id that starts with {id:?}") };
    if found.any(|other| other.id != blob.id) {
        bail!("several of its blobs have ids that start with {id:?}");
    }
    let frame = footer.frames().get(blob.frame as usize).context("the blob's frame is not listed")?;
    let raw = decode(pack, &footer, frame)?;
    let content = raw.get(blob.offset as usize..).and_then(|rest| rest.get(..blob.length as usize));
    match content {
        Some(content) if BlobId::of(blob.kind, content) == blob.id => Ok(out.write_all(content)?),
        _ => Err(FormatError::Checksum { field: "blob", offset: frame.place.offset.into() }.into()),
    }
}

fn footer(pack: &[u8]) -> Result<PackFooter, FormatError> {
    match PackFooter::decode_from_tail(pack, pack.len() as u64)? {
        FromTail::Footer(footer) => Ok(footer),
        // All of the pack is there, so nothing more can be asked for.
        FromTail::Need(range) => Err(FormatError::Truncated { field: "footer of pack", offset: range.start }),
    }
}

fn decode(pack: &[u8], footer: &PackFooter, frame: &FrameEntry) -> Result<Vec<u8>, FormatError> {
    let bytes = |frame: &FrameEntry| {
        let rest = pack.get(frame.place.offset as usize..).and_then(|rest| rest.get(..frame.place.length as usize));
        rest.ok_or(FormatError::Truncated { field: "frame", offset: frame.place.offset.into() })
    };
    let mut decoder = FrameDecoder::new();
    let Some(window) = frame.base else { return decoder.decode(bytes(frame)?) };
    let mut base = Vec::new();
    for number in window.frames() {
        let missing = FormatError::Syntax { field: "base of frame", offset: frame.place.offset.into() };
        base.push(decoder.decode(bytes(footer.frames().get(number as usize).ok_or(missing)?)?)?);
    }
    let base: Vec<&[u8]> = base.iter().map(Vec::as_slice).collect();
    decoder.decode_delta(bytes(frame)?, &base)
}

const fn codec(codec: Codec) -> &'static str {
    match codec {
        Codec::Raw => "raw",
        Codec::Zstd => "zstd",
        Codec::Delta => "zstd with base",
    }
}

const fn kind(kind: BlobKind) -> &'static str {
    match kind {
        BlobKind::Chunk => "chunk",
        BlobKind::Part => "manifest part",
        BlobKind::Manifest => "manifest",
        BlobKind::Table => "string table",
    }
}

/// An index segment.
pub(super) fn segment(bytes: &[u8], entries: bool) -> anyhow::Result<Finding> {
    let segment = Segment::open(bytes)?;
    let facts = vec![("bytes", bytes.len().into()), ("blobs", segment.len().into())];
    let packs = segment.packs().iter().map(|pack| vec![Value::text(pack)]).collect();
    let finding = Finding::new("index segment", facts).with("packs", &["pack"], packs);
    if !entries {
        return Ok(finding);
    }
    let rows = segment.iter().map(|(id, location)| {
        vec![
            Value::text(id),
            Value::text(location.pack),
            location.frame_offset.into(),
            location.frame_length.into(),
            location.offset.into(),
            location.length.into(),
        ]
    });
    const COLUMNS: &[&str] = &["id", "pack", "frame_offset", "frame_length", "offset", "length"];
    Ok(finding.with("entries", COLUMNS, rows.collect()))
}

/// The header of a manifest.
pub(super) fn manifest(bytes: &[u8]) -> anyhow::Result<Finding> {
    let header = ManifestHeader::decode(bytes)?;
    let facts = vec![
        ("id", Value::text(header.id())),
        ("scrub_version", u32::from(header.scrub as u8).into()),
        ("chunker_version", u32::from(header.chunker as u8).into()),
        ("entries", header.entries.into()),
    ];
    let rows = header.parts.iter().map(|part| vec![Value::text(part.id), part.entries.into(), part.length.into()]);
    Ok(Finding::new("manifest header", facts).with("parts", &["id", "entries", "length"], rows.collect()))
}

/// The first part of a manifest, which is the only one of nearly every manifest. Later parts go on inside a tree that
/// only those before them tell.
pub(super) fn part(bytes: &[u8], entries: bool) -> anyhow::Result<Finding> {
    // How many entries there should be stands in the header, which is not here: they are counted first.
    let mut counted = 0_u32;
    let first = read_part(bytes, u32::MAX, &mut |event| {
        let is_entry =
            matches!(event, ManifestEvent::Directory | ManifestEvent::BeginFile { .. } | ManifestEvent::Symlink { .. });
        counted += u32::from(is_entry);
    });
    if !matches!(first, Err(FormatError::Syntax { field: "entries of part", .. })) {
        first.context("only the first part of a manifest can be read on its own")?;
    }
    let mut tree = PartTree::default();
    let complete = read_part(bytes, counted, &mut |event| tree.take(event))?;
    let facts = vec![
        ("id", Value::text(PartId::of(bytes))),
        ("bytes", bytes.len().into()),
        ("entries", counted.into()),
        ("chunks", tree.chunks.into()),
        ("patches", tree.patches.into()),
        ("file_bytes", tree.bytes.into()),
        ("whole_tree", complete.into()),
    ];
    let finding = Finding::new("manifest part", facts);
    const COLUMNS: &[&str] = &["path", "type", "size", "chunks", "patches", "scrubbed_target"];
    Ok(if entries { finding.with("entries", COLUMNS, tree.rows) } else { finding })
}

/// Reads a first part that has so many entries; true if the tree ends with it.
fn read_part(bytes: &[u8], entries: u32, on: &mut impl FnMut(ManifestEvent<'_>)) -> Result<bool, FormatError> {
    let length = u32::try_from(bytes.len()).map_err(|_| FormatError::Syntax { field: "length of part", offset: 0 })?;
    let header = ManifestHeader {
        scrub: ScrubVersion::V1,
        chunker: ChunkerVersion::V1,
        entries: entries.into(),
        parts: vec![PartRef { id: PartId::of(bytes), entries, length }],
    };
    let mut reader = ManifestReader::new(&header);
    reader.part::<FormatError>(bytes, &mut |event| {
        on(event);
        Ok(())
    })?;
    Ok(reader.finish().is_ok())
}

/// The entries of a part.
#[derive(Default)]
struct PartTree {
    path: Vec<u8>,
    open: Vec<usize>,
    chunks: u64,
    patches: u64,
    bytes: u64,
    /// Of the open file: its size and executable bit, and the chunks and patches before it.
    file: (u64, bool, u64, u64),
    rows: Vec<Vec<Value>>,
}

impl PartTree {
    fn take(&mut self, event: ManifestEvent<'_>) {
        match event {
            ManifestEvent::Directory => {
                self.row("directory", [Value::None, Value::None, Value::None, Value::None]);
                self.open.push(self.path.len());
            }
            ManifestEvent::Entry { name } => {
                self.path.truncate(self.open.last().copied().unwrap_or_default());
                if !self.path.is_empty() {
                    self.path.push(b'/');
                }
                self.path.extend_from_slice(name);
            }
            ManifestEvent::EndDirectory => drop(self.open.pop()),
            ManifestEvent::Symlink { target, patches } => {
                self.patches += patches.len() as u64;
                let target = Value::text(String::from_utf8_lossy(target));
                self.row("symlink", [Value::None, Value::None, patches.len().into(), target]);
            }
            ManifestEvent::BeginFile { executable, size } => {
                self.bytes += size;
                self.file = (size, executable, self.chunks, self.patches);
            }
            ManifestEvent::Chunk { .. } => self.chunks += 1,
            ManifestEvent::Patch(_) => self.patches += 1,
            ManifestEvent::EndFile { .. } => {
                let (size, executable, chunks, patches) = self.file;
                let kind = if executable { "executable" } else { "regular" };
                let counts = [size.into(), (self.chunks - chunks).into(), (self.patches - patches).into(), Value::None];
                self.row(kind, counts);
            }
        }
    }

    fn row(&mut self, kind: &str, values: [Value; 4]) {
        let path = if self.path.is_empty() { ".".into() } else { String::from_utf8_lossy(&self.path) };
        self.rows.push([Value::text(path), Value::text(kind)].into_iter().chain(values).collect());
    }
}

/// A string table.
pub(super) fn strings(bytes: &[u8]) -> anyhow::Result<Finding> {
    let table = StringTable::decode(bytes)?;
    let facts = vec![("id", Value::text(TableId::of(bytes))), ("bytes", bytes.len().into())];
    let rows = table
        .iter()
        .zip(0_u32..)
        .map(|(string, number)| vec![number.into(), Value::text(String::from_utf8_lossy(string))]);
    Ok(Finding::new("string table", facts).with("strings", &["number", "string"], rows.collect()))
}
