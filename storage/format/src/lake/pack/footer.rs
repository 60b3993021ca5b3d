//! The footer of a pack: its table of frames, its table of blobs, and the trailer that leads to them.
//!
//! Blobs lie end to end in their frame and frames end to end in the pack, so that neither table spells out what the
//! lengths say already, and no two spellings of a footer exist.

use std::ops::Range;

use super::{FORMAT, FramePlace, HEADER_LEN, MAGIC, check_version};
use crate::error::FormatError;
use crate::id::{BlobId, BlobKind};
use crate::lake::frame::{BaseWindow, Codec};
use crate::lake::location::{Location, PackRef};
use crate::lake::wire::{Input, digest};
use crate::limits::{FRAME_RAW_MAX, PACK_BLOBS_MAX, PACK_MAX};

/// Bytes of a line of the frame table.
pub(super) const FRAME_LEN: usize = 24;
/// Bytes of a line of the blob table.
pub(super) const BLOB_LEN: usize = 36;
/// Bytes of the trailer, and of those of its fields that stand before the checksum.
pub(super) const TRAILER_LEN: usize = TRAILER_FIELDS_LEN + 32 + MAGIC.len();
const TRAILER_FIELDS_LEN: usize = 24;

const CONTEXT: &str = "narlake 2026-11 v1 pack footer";

/// Bits of a blob's line that hold its length less one; the kind is above them.
const LENGTH_BITS: u32 = 24;

const _: () = assert!(FRAME_RAW_MAX <= 1 << LENGTH_BITS, "the length of a blob fits its field");
const _: () = assert!(TRAILER_LEN == 64);

/// A frame, as the footer lists it.
#[derive(Clone, PartialEq, Eq, Debug, Hash)]
pub struct FrameEntry {
    /// Where it lies.
    pub place: FramePlace,
    /// How it is stored.
    pub codec: Codec,
    /// Bytes of its raw content.
    pub raw_length: u32,
    /// The base of a delta frame.
    pub base: Option<BaseWindow>,
    /// Its blobs, as indices into the footer's list.
    pub blobs: Range<u32>,
}

/// A blob, as the footer lists it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct BlobEntry {
    /// What it is.
    pub kind: BlobKind,
    /// Its name.
    pub id: BlobId,
    /// Number of its frame.
    pub frame: u32,
    /// Offset in the frame's raw content.
    pub offset: u32,
    /// Its bytes.
    pub length: u32,
}

/// What a pack holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PackFooter {
    frames: Vec<FrameEntry>,
    blobs: Vec<BlobEntry>,
    pack_length: u64,
}

/// What the tail of a pack gave.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum FromTail {
    /// The footer.
    Footer(PackFooter),
    /// The footer is longer than the tail: read this range of the pack, to its end, and decode that.
    Need(Range<u64>),
}

/// The trailer's fields.
struct Trailer {
    footer_offset: u32,
    footer_length: u32,
    frames: u32,
    blobs: u32,
}

impl PackFooter {
    pub(super) const fn new(frames: Vec<FrameEntry>, blobs: Vec<BlobEntry>, pack_length: u64) -> Self {
        Self { frames, blobs, pack_length }
    }

    /// The frames, in order.
    #[must_use]
    pub fn frames(&self) -> &[FrameEntry] {
        &self.frames
    }

    /// The blobs, in order of their places.
    #[must_use]
    pub fn blobs(&self) -> &[BlobEntry] {
        &self.blobs
    }

    /// The blobs of one of the frames.
    #[must_use]
    pub fn blobs_of(&self, frame: &FrameEntry) -> &[BlobEntry] {
        self.blobs.get(frame.blobs.start as usize..frame.blobs.end as usize).unwrap_or_default()
    }

    /// Bytes of the pack.
    #[must_use]
    pub const fn pack_length(&self) -> u64 {
        self.pack_length
    }

    /// Each blob and where it lies, once the pack has a name.
    pub fn locations(&self, pack: PackRef) -> impl Iterator<Item = (BlobId, Location)> {
        self.frames.iter().flat_map(move |frame| {
            self.blobs_of(frame).iter().map(move |blob| {
                let (frame_offset, frame_length) = (frame.place.offset, frame.place.length);
                (blob.id, Location { pack, frame_offset, frame_length, offset: blob.offset, length: blob.length })
            })
        })
    }

    /// The footer's bytes, trailer included: what stands in a pack behind the frames.
    #[must_use]
    pub(super) fn encode(&self) -> Vec<u8> {
        let footer_length = FRAME_LEN * self.frames.len() + BLOB_LEN * self.blobs.len();
        let mut out = Vec::with_capacity(footer_length + TRAILER_LEN);
        for frame in &self.frames {
            for field in [frame.place.offset, frame.place.length, frame.raw_length, super::count(self.blobs_of(frame))]
            {
                out.extend_from_slice(&field.to_le_bytes());
            }
            out.extend_from_slice(&frame.base.map_or(0, BaseWindow::first).to_le_bytes());
            out.extend([frame.codec as u8, frame.base.map_or(0, BaseWindow::mask), 0, 0]);
        }
        for blob in &self.blobs {
            out.extend_from_slice(blob.id.as_bytes());
            out.extend_from_slice(&(u32::from(blob.kind as u8) << LENGTH_BITS | (blob.length - 1)).to_le_bytes());
        }
        assert_eq!(out.len(), footer_length, "length of a pack's footer");
        let footer_length = u32::try_from(footer_length).expect("PACK_MAX fits");
        let footer_offset = self.frames.last().map_or(HEADER_LEN, |frame| frame.place.offset + frame.place.length);
        for field in
            [footer_offset, footer_length, super::count(&self.frames), super::count(&self.blobs), FORMAT, 0_u32]
        {
            out.extend_from_slice(&field.to_le_bytes());
        }
        let checksum = digest(CONTEXT, &[&out]);
        out.extend_from_slice(&checksum);
        out.extend_from_slice(&MAGIC);
        out
    }

    /// Reads the footer from the last bytes of a pack of this length.
    ///
    /// # Errors
    /// When the pack's trailer or footer is not valid.
    pub fn decode_from_tail(tail: &[u8], pack_length: u64) -> Result<FromTail, FormatError> {
        if pack_length > PACK_MAX as u64 {
            let (value, max) = (pack_length, PACK_MAX as u64);
            return Err(FormatError::Limit { field: "length of pack", value, max, offset: 0 });
        }
        let tail_offset = pack_length
            .checked_sub(tail.len() as u64)
            .ok_or(FormatError::Syntax { field: "length of pack", offset: pack_length })?;
        let (before, trailer) = tail
            .len()
            .checked_sub(TRAILER_LEN)
            .and_then(|at| tail.split_at_checked(at))
            .ok_or(FormatError::Truncated { field: "trailer of pack", offset: pack_length })?;
        let trailer_offset = pack_length - TRAILER_LEN as u64;
        let (fields, checksum) = decode_trailer(trailer, trailer_offset)?;
        let footer_offset = u64::from(fields.footer_offset);
        let Some(start) = footer_offset.checked_sub(tail_offset) else {
            return Ok(FromTail::Need(footer_offset..pack_length));
        };
        let tables = usize::try_from(start).ok().and_then(|start| before.get(start..)).unwrap_or_default();
        if digest(CONTEXT, &[tables, trailer.get(..TRAILER_FIELDS_LEN).unwrap_or_default()]) != checksum {
            return Err(FormatError::Checksum { field: "footer of pack", offset: footer_offset });
        }
        decode_tables(tables, &fields, pack_length).map(FromTail::Footer)
    }
}

/// Reads the trailer and the checksum in it, and sees that the footer it leads to lies in the pack as it must.
fn decode_trailer(trailer: &[u8], offset: u64) -> Result<(Trailer, [u8; 32]), FormatError> {
    let mut input = Input::at(trailer, offset);
    let footer_offset = input.u32("offset of footer")?;
    let footer_length = input.u32("length of footer")?;
    let frames = input.u32("number of frames")?;
    let blobs = input.u32("number of blobs")?;
    let version = input.u32("version of pack")?;
    let reserved = input.u32("reserved field of trailer")?;
    let checksum = input.array("checksum of footer")?;
    input.expect("magic of trailer", &MAGIC)?;
    check_version(version)?;
    // The tables end where the trailer begins, and are as long as they have lines.
    let tables = FRAME_LEN as u64 * u64::from(frames) + BLOB_LEN as u64 * u64::from(blobs);
    let in_place = footer_offset >= HEADER_LEN
        && u64::from(footer_offset) + u64::from(footer_length) == offset
        && u64::from(footer_length) == tables;
    if !in_place || reserved != 0 || frames == 0 || blobs < frames || blobs as usize > PACK_BLOBS_MAX {
        return Err(FormatError::Syntax { field: "trailer of pack", offset });
    }
    Ok((Trailer { footer_offset, footer_length, frames, blobs }, checksum))
}

fn decode_tables(tables: &[u8], trailer: &Trailer, pack_length: u64) -> Result<PackFooter, FormatError> {
    let base = u64::from(trailer.footer_offset);
    let frames_length = FRAME_LEN * trailer.frames as usize;
    let (frame_table, blob_table) = tables
        .split_at_checked(frames_length)
        .ok_or(FormatError::Truncated { field: "footer of pack", offset: base + u64::from(trailer.footer_length) })?;
    let mut frame_input = Input::at(frame_table, base);
    let mut blob_input = Input::at(blob_table, base + frames_length as u64);
    let mut frames: Vec<FrameEntry> = Vec::with_capacity(trailer.frames as usize);
    let mut blobs = Vec::with_capacity(trailer.blobs as usize);
    let mut offset = HEADER_LEN;
    for number in 0..trailer.frames {
        let at = frame_input.offset();
        let (entry, blob_count) = decode_frame(&mut frame_input, number, offset, super::count(&blobs))?;
        for base in entry.base.iter().flat_map(|window| window.frames()) {
            // Depth is one, and a base comes before its delta.
            if frames.get(base as usize).is_none_or(|base| base.base.is_some()) {
                return Err(FormatError::Syntax { field: "base of frame", offset: at });
            }
        }
        decode_blobs(&mut blob_input, &entry, blob_count, &mut blobs)?;
        offset = offset
            .checked_add(entry.place.length)
            .filter(|end| *end <= trailer.footer_offset)
            .ok_or(FormatError::Syntax { field: "length of frame", offset: at })?;
        frames.push(entry);
    }
    if offset != trailer.footer_offset {
        return Err(FormatError::Syntax { field: "end of frames", offset: base });
    }
    blob_input.finish("end of footer")?;
    Ok(PackFooter { frames, blobs, pack_length })
}

/// Reads a line of the frame table: the frame, and how many blobs it has.
fn decode_frame(
    input: &mut Input<'_>,
    number: u32,
    offset: u32,
    first_blob: u32,
) -> Result<(FrameEntry, u32), FormatError> {
    let at = input.offset();
    let invalid = |field| FormatError::Syntax { field, offset: at };
    if input.u32("offset of frame")? != offset {
        return Err(invalid("offset of frame"));
    }
    let length = input.u32("length of frame")?;
    let raw_length = input.u32("raw length of frame")?;
    let blob_count = input.u32("number of blobs of frame")?;
    let base_first = input.u32("base of frame")?;
    let codec = Codec::from_byte(input.u8("codec of frame")?).ok_or(invalid("codec of frame"))?;
    let base_mask = input.u8("base mask of frame")?;
    input.expect("reserved bytes of frame", &[0; 2])?;
    let base = match codec {
        Codec::Delta => Some(BaseWindow::new(base_first, base_mask).ok_or(invalid("base of frame"))?),
        Codec::Raw | Codec::Zstd if base_first == 0 && base_mask == 0 => None,
        Codec::Raw | Codec::Zstd => return Err(invalid("base of frame")),
    };
    let stored = length.checked_sub(codec.header_length());
    let fits = raw_length > 0 && raw_length as usize <= FRAME_RAW_MAX;
    if !fits || !stored.is_some_and(|stored| codec.allows(raw_length, stored)) {
        return Err(invalid("length of frame"));
    }
    let blobs_end = first_blob.checked_add(blob_count).filter(|_| blob_count > 0);
    let blobs = first_blob..blobs_end.ok_or(invalid("number of blobs of frame"))?;
    Ok((FrameEntry { place: FramePlace { number, offset, length }, codec, raw_length, base, blobs }, blob_count))
}

/// Reads the blobs of a frame, which must fill it.
fn decode_blobs(
    input: &mut Input<'_>,
    frame: &FrameEntry,
    count: u32,
    blobs: &mut Vec<BlobEntry>,
) -> Result<(), FormatError> {
    let mut offset = 0;
    for _ in 0..count {
        let at = input.offset();
        let id = BlobId::from_bytes(input.array("id of blob")?);
        let [low, middle, high, kind] = input.array("length of blob")?;
        let kind = BlobKind::from_byte(kind).ok_or(FormatError::Syntax { field: "kind of blob", offset: at })?;
        let length = u32::from_le_bytes([low, middle, high, 0]) + 1;
        blobs.push(BlobEntry { kind, id, frame: frame.place.number, offset, length });
        offset += length;
        if offset > frame.raw_length {
            return Err(FormatError::Syntax { field: "length of blob", offset: at });
        }
    }
    if offset != frame.raw_length {
        return Err(FormatError::Syntax { field: "raw length of frame", offset: input.offset() });
    }
    Ok(())
}
