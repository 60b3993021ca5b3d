//! Packs: immutable objects of many frames.
//!
//! A pack is written in one go and never changed: header, frames end to end, footer, trailer. The footer lists every
//! frame and every blob in it, the trailer of fixed length says where the footer is, so a reader asks for the tail of a
//! pack and mostly needs nothing else; the footer is at the end because only then is it known. A pack is enough for
//! itself: the base of a delta frame lies in the same pack.
//!
//! Nobody reads a pack's header but to tell what the object is. The checksum of footer and trailer guards the tables,
//! each frame's own that frame's header, the blob ids all content. docs/format/pack.md has the bytes.

mod footer;

use std::collections::HashMap;

pub use self::footer::{BlobEntry, FrameEntry, FromTail, PackFooter};

use self::footer::{BLOB_LEN, FRAME_LEN, TRAILER_LEN};
use super::frame::{Codec, Frame, FrameBlob, FrameDecoder, FrameHeader};
use super::location::{Location, PackRef};
use super::wire::Input;
use crate::error::FormatError;
use crate::id::BlobId;
use crate::limits::{PACK_BLOBS_MAX, PACK_MAX};

/// Bytes at the end of a pack that most footers fit in: what a reader asks for first.
pub const TAIL_LEN: u64 = 64 * 1024;

const MAGIC: [u8; 8] = *b"NLKPACK\n";
const FORMAT: u32 = 1;
const HEADER_LEN: u32 = 16;

/// Where a frame lies in its pack.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct FramePlace {
    /// Number of the frame in the pack.
    pub number: u32,
    /// Offset in the pack.
    pub offset: u32,
    /// Bytes in the pack, header included.
    pub length: u32,
}

impl FramePlace {
    /// Where a blob of the frame lies, once the pack has a name.
    #[must_use]
    pub const fn locate(&self, pack: PackRef, blob: &FrameBlob) -> Location {
        Location {
            pack,
            frame_offset: self.offset,
            frame_length: self.length,
            offset: blob.offset,
            length: blob.length,
        }
    }
}

/// Lays frames end to end. Keeps the bytes as they come, so that a pack is never copied as a whole.
pub struct PackBuilder {
    parts: Vec<Vec<u8>>,
    frames: Vec<FrameEntry>,
    blobs: Vec<BlobEntry>,
    /// Where the next frame begins.
    offset: u32,
}

impl PackBuilder {
    /// An empty pack.
    #[must_use]
    pub fn new() -> Self {
        let header = [&MAGIC[..], &FORMAT.to_le_bytes(), &[0; 4]].concat();
        Self { parts: vec![header], frames: Vec::new(), blobs: Vec::new(), offset: HEADER_LEN }
    }

    /// Whether the pack with this frame added would still be one that readers accept.
    #[must_use]
    pub fn fits(&self, frame: &Frame) -> bool {
        let more = frame.bytes.len() + FRAME_LEN + BLOB_LEN * frame.blobs.len();
        self.len() + more as u64 <= PACK_MAX as u64 && self.blobs.len() + frame.blobs.len() <= PACK_BLOBS_MAX
    }

    /// Adds a frame that fits, and says where it lies.
    ///
    /// # Panics
    /// If it does not fit, or is a delta of frames that are not in the pack or deltas themselves.
    pub fn push(&mut self, frame: Frame) -> FramePlace {
        assert!(self.fits(&frame), "room in a pack");
        assert_eq!(frame.bytes.len(), frame.header.frame_length() as usize, "length of a frame");
        let base = frame.header.base.map(|(window, _)| window);
        for number in base.iter().flat_map(|window| window.frames()) {
            let entry = self.frames.get(number as usize);
            assert!(entry.is_some_and(|entry| entry.base.is_none()), "the base of a delta is in the pack, and plain");
        }
        let place =
            FramePlace { number: count(&self.frames), offset: self.offset, length: frame.header.frame_length() };
        let first = count(&self.blobs);
        self.blobs.extend(frame.blobs.iter().map(|blob| BlobEntry {
            kind: blob.kind,
            id: blob.id,
            frame: place.number,
            offset: blob.offset,
            length: blob.length,
        }));
        let blobs = first..count(&self.blobs);
        let (codec, raw_length) = (frame.header.codec, frame.header.raw_length);
        self.frames.push(FrameEntry { place, codec, raw_length, base, blobs });
        self.offset += place.length;
        self.parts.push(frame.bytes);
        place
    }

    /// Bytes of the pack if it were finished now.
    #[must_use]
    pub fn len(&self) -> u64 {
        let tables = FRAME_LEN * self.frames.len() + BLOB_LEN * self.blobs.len();
        u64::from(self.offset) + (tables + TRAILER_LEN) as u64
    }

    /// No frame was added.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Number of blobs.
    #[must_use]
    pub const fn blobs(&self) -> usize {
        self.blobs.len()
    }

    /// The pack's bytes, to be written in order, and its footer.
    ///
    /// # Panics
    /// If the pack is empty.
    #[must_use]
    pub fn finish(mut self) -> (Vec<Vec<u8>>, PackFooter) {
        assert!(!self.is_empty(), "packs have frames");
        let length = self.len();
        let footer = PackFooter::new(self.frames, self.blobs, length);
        self.parts.push(footer.encode());
        let written: usize = self.parts.iter().map(Vec::len).sum();
        assert_eq!(written as u64, length, "length of a pack");
        (self.parts, footer)
    }
}

impl Default for PackBuilder {
    fn default() -> Self {
        Self::new()
    }
}

fn count<T>(list: &[T]) -> u32 {
    u32::try_from(list.len()).expect("PACK_BLOBS_MAX fits")
}

/// Checks a whole pack: header, footer, every frame, and every blob against its id. For fsck and tests; holds the
/// content of the frames that deltas refer to in memory.
///
/// # Errors
/// At the first thing that is wrong.
pub fn verify(pack: &[u8]) -> Result<PackFooter, FormatError> {
    let mut header = Input::new(pack);
    header.expect("magic of pack", &MAGIC)?;
    check_version(header.u32("version of pack")?)?;
    header.expect("reserved bytes of pack", &[0; 4])?;
    let FromTail::Footer(footer) = PackFooter::decode_from_tail(pack, pack.len() as u64)? else {
        return Err(FormatError::Truncated { field: "footer of pack", offset: pack.len() as u64 });
    };
    let bases: Vec<u32> =
        footer.frames().iter().filter_map(|frame| frame.base).flat_map(|window| window.frames()).collect();
    let mut base_content: HashMap<u32, Vec<u8>> = HashMap::new();
    let mut decoder = FrameDecoder::new();
    for entry in footer.frames() {
        let number = entry.place.number;
        let at = u64::from(entry.place.offset);
        let bytes = frame_bytes(pack, entry)?;
        let header = FrameHeader::decode(bytes)?;
        let as_listed = (header.codec, header.raw_length, header.frame_length(), header.base.map(|(window, _)| window));
        if as_listed != (entry.codec, entry.raw_length, entry.place.length, entry.base) {
            return Err(FormatError::Syntax { field: "frame and its line in the footer", offset: at });
        }
        let raw = match entry.base {
            None => decoder.decode(bytes)?,
            Some(window) => {
                let base = window.frames().map(|number| base_content.get(&number).map_or(&[][..], Vec::as_slice));
                decoder.decode_delta(bytes, &base.collect::<Vec<_>>())?
            }
        };
        for blob in footer.blobs_of(entry) {
            let content = raw.get(blob.offset as usize..).and_then(|rest| rest.get(..blob.length as usize));
            if content.map(|content| BlobId::of(blob.kind, content)) != Some(blob.id) {
                return Err(FormatError::Checksum { field: "blob", offset: at });
            }
        }
        if entry.codec != Codec::Delta && bases.contains(&number) {
            base_content.insert(number, raw);
        }
    }
    Ok(footer)
}

fn frame_bytes<'a>(pack: &'a [u8], entry: &FrameEntry) -> Result<&'a [u8], FormatError> {
    let offset = entry.place.offset;
    pack.get(offset as usize..)
        .and_then(|rest| rest.get(..entry.place.length as usize))
        .ok_or(FormatError::Truncated { field: "frame", offset: offset.into() })
}

fn check_version(version: u32) -> Result<(), FormatError> {
    if version == FORMAT { Ok(()) } else { Err(FormatError::Version { format: "pack", version, known: "1" }) }
}

#[cfg(test)]
mod tests;
