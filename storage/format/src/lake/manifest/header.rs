//! The header of a manifest body: versions, and the list of its parts.

use super::part_max;
use crate::error::FormatError;
use crate::id::{ID_LEN, ManifestId, PartId};
use crate::lake::chunker::ChunkerVersion;
use crate::lake::scrub::ScrubVersion;
use crate::lake::wire::Input;
use crate::limits::{ENTRIES_MAX, MANIFEST_HEADER_MAX};

const MAGIC: [u8; 4] = *b"NLKM";
const FORMAT: u16 = 1;

/// Bytes before the list of parts.
const FIXED_LEN: usize = 20;
/// Bytes of one line of the list.
const LINE_LEN: usize = ID_LEN + 4 + 4;

/// Most parts that a header can list.
pub(super) const PARTS_MAX: usize = (MANIFEST_HEADER_MAX - FIXED_LEN) / LINE_LEN;

/// One part, as the header lists it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PartRef {
    /// Name of the part.
    pub id: PartId,
    /// Entries (directories, files, symlinks) that begin in it.
    pub entries: u32,
    /// Its bytes.
    pub length: u32,
}

/// The head of a manifest body.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ManifestHeader {
    /// How its files were scrubbed.
    pub scrub: ScrubVersion,
    /// How its files were cut.
    pub chunker: ChunkerVersion,
    /// Entries in all.
    pub entries: u64,
    /// The parts, in order.
    pub parts: Vec<PartRef>,
}

impl ManifestHeader {
    /// The header's bytes.
    ///
    /// # Panics
    /// If there are more parts than any manifest has.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let count = u32::try_from(self.parts.len()).expect("number of parts");
        let mut out = Vec::with_capacity(FIXED_LEN + LINE_LEN * self.parts.len());
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&FORMAT.to_le_bytes());
        out.push(self.scrub as u8);
        out.push(self.chunker as u8);
        out.extend_from_slice(&self.entries.to_le_bytes());
        out.extend_from_slice(&count.to_le_bytes());
        assert_eq!(out.len(), FIXED_LEN, "length of the fixed part of a manifest header");
        for part in &self.parts {
            out.extend_from_slice(part.id.as_bytes());
            out.extend_from_slice(&part.entries.to_le_bytes());
            out.extend_from_slice(&part.length.to_le_bytes());
        }
        out
    }

    /// Reads a header, refusing any bytes that `encode` would not write.
    ///
    /// # Errors
    /// When the bytes are not the encoding of a header.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        if bytes.len() > MANIFEST_HEADER_MAX {
            let (value, max) = (bytes.len() as u64, MANIFEST_HEADER_MAX as u64);
            return Err(FormatError::Limit { field: "length of manifest header", value, max, offset: 0 });
        }
        let mut input = Input::new(bytes);
        input.expect("magic of manifest header", &MAGIC)?;
        let format = input.u16("version of manifest")?;
        if format != FORMAT {
            return Err(FormatError::Version { format: "manifest", version: format.into(), known: "1" });
        }
        let scrub = ScrubVersion::from_byte(input.u8("scrub version")?)?;
        let chunker = ChunkerVersion::from_byte(input.u8("chunker version")?)?;
        let entries_at = input.offset();
        let entries = input.u64("number of entries")?;
        if entries > ENTRIES_MAX {
            let (value, max) = (entries, ENTRIES_MAX);
            return Err(FormatError::Limit { field: "number of entries", value, max, offset: entries_at });
        }
        let count = input.u32("number of parts")?;
        let mut parts = Vec::new();
        let mut entries_left = entries;
        for _ in 0..count {
            let offset = input.offset();
            let id = PartId::from_bytes(input.array("part id")?);
            let entries = input.u32("entries of part")?;
            let length = input.u32("length of part")?;
            if length == 0 || length as usize > part_max(parts.len()) {
                let (value, max) = (length.into(), part_max(parts.len()) as u64);
                return Err(FormatError::Limit { field: "length of part", value, max, offset });
            }
            entries_left = entries_left
                .checked_sub(entries.into())
                .ok_or(FormatError::Syntax { field: "entries of part", offset })?;
            parts.push(PartRef { id, entries, length });
        }
        input.finish("end of manifest header")?;
        // A tree has a root.
        if entries == 0 || entries_left != 0 || parts.is_empty() {
            return Err(FormatError::Syntax { field: "number of entries", offset: entries_at });
        }
        Ok(Self { scrub, chunker, entries, parts })
    }

    /// The manifest's name.
    #[must_use]
    pub fn id(&self) -> ManifestId {
        ManifestId::of(&self.encode())
    }
}
