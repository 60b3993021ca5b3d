//! Frames: runs of blobs compressed together, the unit that is read.
//!
//! Chunks are cut for deduplication and are far too small to compress well alone. Ingest therefore puts new blobs of one
//! path, in NAR order, into frames of about 256 KiB, which costs a random read what readahead would fetch anyway. A frame
//! says how it is stored and how long it is; what blobs it holds stands in the footer of its [pack](super::pack) and in
//! the index.
//!
//! A *delta* frame is compressed against a base: one to four frames of a window of the same pack, which it names by
//! number and by a digest of their content. Depth is one: a base is never itself a delta, so no read decodes more than
//! a window. Ingest writes none; compaction does, backwards, old content as deltas of new.
//!
//! The header carries its own checksum, and content is verified by the ids of the blobs taken from it, so a flipped bit
//! is found wherever it is. Nothing is decoded beyond [`FRAME_RAW_MAX`] bytes. docs/format/pack.md has the bytes.

use zstd::bulk::Compressor;
use zstd::zstd_safe::{self, CCtx, CParameter, DCtx};

use super::wire::{Input, digest};
use crate::error::FormatError;
use crate::id::{BaseDigest, BlobId, BlobKind, ID_LEN};
use crate::limits::{FRAME_BASE_MAX, FRAME_RAW_MAX, FRAME_TARGET};

/// First byte of every frame.
const MAGIC: u8 = 0xf1;
const HEADER_CONTEXT: &str = "narlake 2026-11 v1 frame header";
const CHECKSUM_LEN: u32 = 8;
/// Bytes of the header of a frame without a base, and of what a base adds.
const PLAIN_LEN: u32 = 1 + 1 + 1 + 1 + 4 + 4 + CHECKSUM_LEN;
const BASE_LEN: u32 = 4 + 32;

/// Longest header, in bytes.
pub const FRAME_HEADER_MAX: usize = (PLAIN_LEN + BASE_LEN) as usize;

/// First bytes of what zstd writes.
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];

/// How a frame's content is stored.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u8)]
pub enum Codec {
    /// As it is.
    Raw = 1,
    /// Compressed with zstd.
    Zstd = 2,
    /// Compressed with zstd against a base: other frames of the same pack.
    Delta = 3,
}

impl Codec {
    /// The codec that a byte stands for.
    #[must_use]
    pub const fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Raw),
            2 => Some(Self::Zstd),
            3 => Some(Self::Delta),
            _ => None,
        }
    }

    /// Bytes of the header of a frame stored so.
    #[must_use]
    pub const fn header_length(self) -> u32 {
        match self {
            Self::Raw | Self::Zstd => PLAIN_LEN,
            Self::Delta => PLAIN_LEN + BASE_LEN,
        }
    }

    /// Whether content of `raw` bytes may be stored in this many: compression that does not shrink is not used.
    pub(super) const fn allows(self, raw: u32, stored: u32) -> bool {
        match self {
            Self::Raw => stored == raw,
            Self::Zstd | Self::Delta => stored > 0 && stored < raw,
        }
    }
}

/// The frames that a delta frame is decoded against: some of a window of consecutive frames of the same pack.
///
/// Frames are named by number, not by offset, which compaction changes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct BaseWindow {
    first: u32,
    mask: u8,
}

impl BaseWindow {
    /// The frames `first + i` for which bit `i` of `mask` is set. None unless bit 0 is, and no bit above the window's
    /// four, so that each set of frames has one spelling.
    #[must_use]
    pub fn new(first: u32, mask: u8) -> Option<Self> {
        let valid = mask & 1 == 1 && mask >> FRAME_BASE_MAX == 0 && first.checked_add(mask.ilog2()).is_some();
        valid.then_some(Self { first, mask })
    }

    /// Number of the window's first frame.
    #[must_use]
    pub const fn first(self) -> u32 {
        self.first
    }

    /// Bit `i` says that frame `first + i` is part of the base.
    #[must_use]
    pub const fn mask(self) -> u8 {
        self.mask
    }

    /// The numbers of the base's frames, in order.
    pub fn frames(self) -> impl Iterator<Item = u32> {
        (0..8_u32).filter(move |bit| self.mask >> bit & 1 == 1).map(move |bit| self.first + bit)
    }
}

/// What a frame says of itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct FrameHeader {
    /// How the content is stored.
    pub codec: Codec,
    /// Bytes of the content.
    pub raw_length: u32,
    /// Bytes after the header.
    pub stored_length: u32,
    /// The base and the digest of its content. Invariant: there for `Delta` alone.
    pub base: Option<(BaseWindow, BaseDigest)>,
}

impl FrameHeader {
    /// Reads the header at the start of a frame; the bytes may go on behind it, or end with it.
    ///
    /// # Errors
    /// When it is no valid header.
    pub fn decode(frame: &[u8]) -> Result<Self, FormatError> {
        let mut input = Input::new(frame);
        input.expect("magic of frame", &[MAGIC])?;
        let codec = Codec::from_byte(input.u8("codec of frame")?);
        let codec = codec.ok_or(FormatError::Syntax { field: "codec of frame", offset: 1 })?;
        let mask = input.u8("base mask of frame")?;
        input.expect("reserved byte of frame", &[0])?;
        let raw_length = input.u32("raw length of frame")?;
        let stored_length = input.u32("stored length of frame")?;
        let base = match codec {
            Codec::Raw | Codec::Zstd => None,
            Codec::Delta => Some((input.u32("base of frame")?, BaseDigest::from_bytes(input.array("base digest")?))),
        };
        let covered = input.consumed();
        let checksum: [u8; CHECKSUM_LEN as usize] = input.array("checksum of frame header")?;
        if checksum != header_checksum(frame.get(..covered).unwrap_or_default()) {
            return Err(FormatError::Checksum { field: "frame header", offset: 0 });
        }
        if raw_length == 0 || raw_length as usize > FRAME_RAW_MAX {
            let (value, max) = (raw_length.into(), FRAME_RAW_MAX as u64);
            return Err(FormatError::Limit { field: "raw length of frame", value, max, offset: 4 });
        }
        if !codec.allows(raw_length, stored_length) {
            return Err(FormatError::Syntax { field: "stored length of frame", offset: 8 });
        }
        let invalid = FormatError::Syntax { field: "base mask of frame", offset: 2 };
        let base = match base {
            None if mask == 0 => None,
            None => return Err(invalid),
            Some((first, digest)) => Some((BaseWindow::new(first, mask).ok_or(invalid)?, digest)),
        };
        Ok(Self { codec, raw_length, stored_length, base })
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(FRAME_HEADER_MAX);
        out.extend([MAGIC, self.codec as u8, self.base.map_or(0, |(window, _)| window.mask), 0]);
        out.extend_from_slice(&self.raw_length.to_le_bytes());
        out.extend_from_slice(&self.stored_length.to_le_bytes());
        if let Some((window, digest)) = &self.base {
            out.extend_from_slice(&window.first.to_le_bytes());
            out.extend_from_slice(digest.as_bytes());
        }
        out.extend_from_slice(&header_checksum(&out));
        assert_eq!(out.len(), self.codec.header_length() as usize, "length of a frame header");
        out
    }

    /// Bytes of the whole frame.
    #[must_use]
    pub const fn frame_length(&self) -> u32 {
        self.codec.header_length() + self.stored_length
    }
}

fn header_checksum(header: &[u8]) -> [u8; CHECKSUM_LEN as usize] {
    let [a, b, c, d, e, f, g, h, ..] = digest(HEADER_CONTEXT, &[header]);
    [a, b, c, d, e, f, g, h]
}

/// A blob in a frame's raw content.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct FrameBlob {
    /// What it is.
    pub kind: BlobKind,
    /// Its name.
    pub id: BlobId,
    /// Offset in the raw content.
    pub offset: u32,
    /// Its bytes, at least one.
    pub length: u32,
}

/// The raw content of a frame to be: blobs end to end.
#[derive(Clone, Default, Debug)]
pub struct FrameContent {
    raw: Vec<u8>,
    blobs: Vec<FrameBlob>,
}

impl FrameContent {
    /// Adds a blob.
    ///
    /// # Panics
    /// If the blob is empty, or the frame becomes longer than any reader accepts.
    pub fn push(&mut self, kind: BlobKind, id: BlobId, bytes: &[u8]) {
        assert!(!bytes.is_empty(), "blobs have bytes");
        assert!(self.raw.len() + bytes.len() <= FRAME_RAW_MAX, "raw length of a frame");
        debug_assert_eq!(BlobId::of(kind, bytes), id, "id of a blob");
        let (offset, length) = (to_u32(self.raw.len()), to_u32(bytes.len()));
        self.blobs.push(FrameBlob { kind, id, offset, length });
        self.raw.extend_from_slice(bytes);
    }

    /// Whether a blob of this many bytes had better go into the next frame. An empty frame takes any.
    #[must_use]
    pub const fn is_full_for(&self, length: usize) -> bool {
        !self.is_empty() && self.raw.len() + length > FRAME_TARGET
    }

    /// The blobs.
    #[must_use]
    pub fn blobs(&self) -> &[FrameBlob] {
        &self.blobs
    }

    /// The bytes.
    #[must_use]
    pub fn raw(&self) -> &[u8] {
        &self.raw
    }

    /// Nothing was pushed.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.blobs.is_empty()
    }

    /// Forgets the content, keeps the memory.
    pub fn clear(&mut self) {
        self.raw.clear();
        self.blobs.clear();
    }
}

fn to_u32(length: usize) -> u32 {
    u32::try_from(length).expect("FRAME_RAW_MAX fits")
}

/// A frame ready to be put into a pack.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Frame {
    /// The bytes: header and stored content.
    pub bytes: Vec<u8>,
    /// What the header says.
    pub header: FrameHeader,
    /// What it holds.
    pub blobs: Vec<FrameBlob>,
}

/// Makes frames, with one compressor for all.
pub struct FrameEncoder {
    level: i32,
    compressor: Compressor<'static>,
    buffer: Vec<u8>,
}

impl FrameEncoder {
    /// An encoder at this zstd level.
    ///
    /// # Panics
    /// If there is no memory for a compressor, or zstd has no such level.
    #[must_use]
    pub fn new(level: i32) -> Self {
        let compressor = Compressor::new(level).expect("zstd compressor");
        Self { level, compressor, buffer: Vec::new() }
    }

    /// Compresses a frame. Content that hardly gets smaller is stored as it is, so that reading it costs nothing.
    ///
    /// # Panics
    /// If the content is empty.
    #[must_use]
    pub fn encode(&mut self, content: &FrameContent) -> Frame {
        self.buffer.clear();
        self.buffer.reserve(zstd_safe::compress_bound(content.raw.len()));
        let compressed = self.compressor.compress_to_buffer(&content.raw, &mut self.buffer);
        // All that can go wrong is memory, and storing needs none.
        if compressed.is_ok_and(|length| is_worth_it(content.raw.len(), length)) {
            build(content, Codec::Zstd, None, &self.buffer)
        } else {
            build(content, Codec::Raw, None, &content.raw)
        }
    }

    /// Compresses a frame against a base: the frames of `window`, whose raw content is `base`, one after the other. A
    /// frame that does not get smaller by that is stored without a base.
    ///
    /// # Panics
    /// If the content is empty, or the base is not as many frames as the window says, or too long.
    #[must_use]
    pub fn encode_delta(&mut self, content: &FrameContent, window: BaseWindow, base: &[&[u8]]) -> Frame {
        let base = join_base(window, base).expect("a base that readers accept");
        let plain = self.encode(content);
        match compress_delta(self.level, &content.raw, &base) {
            Ok(delta) if delta.len() + (BASE_LEN as usize) < plain.header.stored_length as usize => {
                build(content, Codec::Delta, Some((window, BaseDigest::of(&base))), &delta)
            }
            _ => plain,
        }
    }
}

/// Whether compression has taken off at least a 32nd.
const fn is_worth_it(raw: usize, compressed: usize) -> bool {
    compressed < raw - raw / 32
}

fn build(content: &FrameContent, codec: Codec, base: Option<(BaseWindow, BaseDigest)>, stored: &[u8]) -> Frame {
    assert!(!content.is_empty(), "frames have blobs");
    let header =
        FrameHeader { codec, raw_length: to_u32(content.raw.len()), stored_length: to_u32(stored.len()), base };
    let mut bytes = header.encode();
    bytes.reserve_exact(stored.len());
    bytes.extend_from_slice(stored);
    Frame { bytes, header, blobs: content.blobs.clone() }
}

fn compress_delta(level: i32, raw: &[u8], base: &[u8]) -> Result<Vec<u8>, zstd_safe::ErrorCode> {
    // The window must reach back over the whole base, and the table of hashes be as large: at the defaults for a
    // content as short as a frame, zstd forgets most of the base.
    let window_log = (base.len() + raw.len()).next_power_of_two().ilog2().clamp(10, 27);
    let mut context = CCtx::create();
    context.set_parameter(CParameter::CompressionLevel(level))?;
    context.set_parameter(CParameter::WindowLog(window_log))?;
    context.set_parameter(CParameter::HashLog(window_log))?;
    context.ref_prefix(base)?;
    let mut out = Vec::with_capacity(zstd_safe::compress_bound(raw.len()));
    context.compress2(&mut out, raw)?;
    Ok(out)
}

/// Reads frames, with one decompressor for all.
pub struct FrameDecoder {
    context: DCtx<'static>,
}

impl FrameDecoder {
    /// A decoder.
    #[must_use]
    pub fn new() -> Self {
        Self { context: DCtx::create() }
    }

    /// The raw content of a frame that has no base.
    ///
    /// # Errors
    /// When the bytes are not exactly one valid frame, or it is a delta.
    pub fn decode(&mut self, frame: &[u8]) -> Result<Vec<u8>, FormatError> {
        let (header, stored) = split(frame)?;
        match header.codec {
            Codec::Raw => Ok(stored.to_vec()),
            Codec::Zstd => decompress(&mut self.context, &header, stored),
            Codec::Delta => Err(FormatError::Syntax { field: "frame with a base where none may be", offset: 1 }),
        }
    }

    /// The raw content of a delta frame, given that of each frame of its base, in order. As those come from
    /// [`decode`](Self::decode), none can be a delta itself.
    ///
    /// # Errors
    /// When the bytes are not exactly one valid delta frame, or the base is not the one that it was made of.
    pub fn decode_delta(&mut self, frame: &[u8], base: &[&[u8]]) -> Result<Vec<u8>, FormatError> {
        let (header, stored) = split(frame)?;
        let (window, digest) = header.base.ok_or(FormatError::Syntax { field: "frame without a base", offset: 1 })?;
        let base = join_base(window, base)?;
        if BaseDigest::of(&base) != digest {
            return Err(FormatError::Checksum { field: "base of frame", offset: 0 });
        }
        // A context that refers to a base may not outlive it, so this one is not kept.
        let mut context = DCtx::create();
        context.ref_prefix(&base).map_err(|_| FormatError::Syntax { field: "base of frame", offset: 0 })?;
        decompress(&mut context, &header, stored)
    }
}

impl Default for FrameDecoder {
    fn default() -> Self {
        Self::new()
    }
}

/// A frame's header and stored content; nothing may follow.
fn split(frame: &[u8]) -> Result<(FrameHeader, &[u8]), FormatError> {
    let header = FrameHeader::decode(frame)?;
    let stored = frame.get(header.codec.header_length() as usize..).unwrap_or_default();
    match stored.len().cmp(&(header.stored_length as usize)) {
        std::cmp::Ordering::Equal => Ok((header, stored)),
        std::cmp::Ordering::Less => {
            Err(FormatError::Truncated { field: "content of frame", offset: frame.len() as u64 })
        }
        std::cmp::Ordering::Greater => {
            Err(FormatError::Syntax { field: "end of frame", offset: header.frame_length().into() })
        }
    }
}

/// The content of a base, one frame after the other.
fn join_base(window: BaseWindow, base: &[&[u8]]) -> Result<Vec<u8>, FormatError> {
    if base.len() != window.mask.count_ones() as usize {
        return Err(FormatError::Syntax { field: "number of frames of base", offset: base.len() as u64 });
    }
    let length: usize = base.iter().map(|content| content.len()).sum();
    if length > FRAME_RAW_MAX {
        let (value, max) = (length as u64, FRAME_RAW_MAX as u64);
        return Err(FormatError::Limit { field: "length of base", value, max, offset: 0 });
    }
    Ok(base.concat())
}

fn decompress(context: &mut DCtx<'_>, header: &FrameHeader, stored: &[u8]) -> Result<Vec<u8>, FormatError> {
    let error =
        FormatError::Syntax { field: "compressed content of frame", offset: header.codec.header_length().into() };
    let raw_length = header.raw_length as usize;
    // Exactly one frame of today's zstd, of exactly the length that the header promises: the library would also take
    // several, and formats of before version 1.
    let is_one = stored.starts_with(&ZSTD_MAGIC)
        && zstd_safe::find_frame_compressed_size(stored) == Ok(stored.len())
        && matches!(zstd_safe::get_frame_content_size(stored), Ok(Some(length)) if length == raw_length as u64);
    if !is_one {
        return Err(error);
    }
    let mut raw = Vec::with_capacity(raw_length);
    match context.decompress(&mut raw, stored) {
        Ok(length) if length == raw_length => Ok(raw),
        _ => Err(error),
    }
}

const _: () = assert!(FRAME_BASE_MAX <= 8 && ID_LEN == 32, "fields of the frame header");

#[cfg(test)]
mod tests;
