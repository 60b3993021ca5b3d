//! A manifest that is read is, written again, the same bytes; and so are headers and string tables.
#![no_main]

use libfuzzer_sys::fuzz_target;
use narlake_format::error::FormatError;
use narlake_format::id::PartId;
use narlake_format::lake::chunker::ChunkerVersion;
use narlake_format::lake::manifest::{
    Finished, ManifestEvent, ManifestHeader, ManifestReader, ManifestWriter, PartRef,
};
use narlake_format::lake::scrub::ScrubVersion;
use narlake_format::lake::strings::StringTable;

fn rewrite(header: &ManifestHeader, parts: &[&[u8]]) -> Result<Finished, FormatError> {
    let mut reader = ManifestReader::new(header);
    let mut writer = ManifestWriter::new(header.scrub, header.chunker);
    for part in parts {
        reader.part(part, &mut |event| match event {
            ManifestEvent::Directory => writer.directory(),
            ManifestEvent::Entry { name } => writer.entry(name),
            ManifestEvent::EndDirectory => writer.end_directory(),
            ManifestEvent::Symlink { target, patches } => writer.symlink(target, patches),
            ManifestEvent::BeginFile { executable, size } => writer.begin_file(executable, size),
            ManifestEvent::Chunk { id, length } => writer.chunk(id, length),
            ManifestEvent::Patch(patch) => writer.patch(patch),
            ManifestEvent::EndFile { file } => writer.end_file(file),
        })?;
    }
    reader.finish()?;
    Ok(writer.finish().expect("a writer takes what a reader gives"))
}

fuzz_target!(|parts: Vec<(u8, &[u8])>| {
    if let Some((_, bytes)) = parts.first() {
        if let Ok(header) = ManifestHeader::decode(bytes) {
            assert_eq!(header.encode(), *bytes);
        }
        if let Ok(table) = StringTable::decode(bytes) {
            assert_eq!(table.encode(), *bytes);
        }
    }
    // A header that fits the parts, so that they are all that can be wrong.
    let listed = parts.iter().map(|(entries, bytes)| PartRef {
        id: PartId::of(bytes),
        entries: u32::from(*entries),
        length: u32::try_from(bytes.len()).expect("short"),
    });
    let header = ManifestHeader {
        scrub: ScrubVersion::V1,
        chunker: ChunkerVersion::V1,
        entries: parts.iter().map(|(entries, _)| u64::from(*entries)).sum(),
        parts: listed.collect(),
    };
    let bytes: Vec<&[u8]> = parts.iter().map(|(_, bytes)| *bytes).collect();
    if let Ok(finished) = rewrite(&header, &bytes) {
        assert_eq!(finished.header, header);
        assert!(finished.parts.iter().map(|part| part.bytes.as_slice()).eq(bytes));
    }
});
