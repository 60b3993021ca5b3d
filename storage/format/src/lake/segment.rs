//! Index segments: immutable tables from blob ids to locations.
//!
//! A segment covers some packs, which its header lists, and holds an entry for each blob of theirs, sorted by id, behind
//! a fan-out table over the first bits of the id: the shape of git's pack index. Ids are evenly spread, so a lookup is
//! one look at the fan-out and a binary search of about a hundred entries, most of them on one page of the memory map.
//! A blob that lies in several packs has an entry for each: an entry whose pack is gone is void, and the others count
//! (docs/consistency.md, rule 24).
//!
//! Segments are derived from the footers of packs and can be made again. All of a segment is checked when it is opened,
//! by checksum and by its own rules, and nothing after. docs/format/segment.md has the bytes.

use std::cmp::Ordering;
use std::collections::HashMap;

use super::frame::FRAME_HEADER_MAX;
use super::location::{Domain, Location, PackRef};
use super::pack::PackFooter;
use super::wire::{Input, digest};
use crate::error::FormatError;
use crate::id::{BlobId, CacheId, ID_LEN, PackId, Ulid};
use crate::limits::{FRAME_RAW_MAX, PACK_MAX};

const MAGIC: [u8; 8] = *b"NLKSEGM\n";
const FORMAT: u32 = 1;
const CONTEXT: &str = "narlake 2026-11 v1 segment";

const HEADER_LEN: usize = 32;
/// Bytes of a line of the pack list.
const PACK_LEN: usize = 32;
/// Bytes of an entry.
const ENTRY_LEN: usize = ID_LEN + 16;
const CHECKSUM_LEN: usize = 32;

/// Entries that a slot of the fan-out is for, about: a page or two.
const ENTRIES_PER_SLOT: u64 = 64;
const FAN_OUT_BITS_MAX: u32 = 24;

/// A location in an entry is one number of 128 bits, of these fields from the highest to the lowest, so that numbers
/// order as locations do.
const PACK_BITS: u32 = 29;
const FRAME_OFFSET_BITS: u32 = 26;
const FRAME_LENGTH_BITS: u32 = 25;
const OFFSET_BITS: u32 = 24;
const LENGTH_BITS: u32 = 24;

const _: () = assert!(PACK_BITS + FRAME_OFFSET_BITS + FRAME_LENGTH_BITS + OFFSET_BITS + LENGTH_BITS == 128);
const _: () = assert!(PACK_MAX <= 1 << FRAME_OFFSET_BITS);
const _: () = assert!(FRAME_RAW_MAX + FRAME_HEADER_MAX < 1 << FRAME_LENGTH_BITS);
const _: () = assert!(FRAME_RAW_MAX <= 1 << OFFSET_BITS && FRAME_RAW_MAX <= 1 << LENGTH_BITS);
const _: () = assert!(ENTRY_LEN == 48);

/// Number of bits of the id that the fan-out of a segment of so many entries is over.
fn fan_out_bits(entries: u64) -> u32 {
    (entries / ENTRIES_PER_SLOT).checked_ilog2().unwrap_or(0).min(FAN_OUT_BITS_MAX)
}

/// The slot of the fan-out that an id belongs to.
fn slot(id: &[u8], bits: u32) -> usize {
    let first = id.first_chunk::<4>().map_or(0, |bytes| u32::from_be_bytes(*bytes));
    // `None` where there is but one slot, a shift by all bits.
    first.checked_shr(32 - bits).unwrap_or(0) as usize
}

/// A location in the packs of one segment.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Packed(u128);

impl Packed {
    fn new(pack: u32, location: &Location) -> Self {
        let fields = [
            (pack, PACK_BITS),
            (location.frame_offset, FRAME_OFFSET_BITS),
            (location.frame_length, FRAME_LENGTH_BITS),
            (location.offset, OFFSET_BITS),
            (location.length.wrapping_sub(1), LENGTH_BITS),
        ];
        Self(fields.iter().fold(0, |packed, (value, bits)| {
            assert!(u64::from(*value) < 1 << bits, "a location within the limits of packs");
            packed << bits | u128::from(*value)
        }))
    }

    /// The field of this many bits that ends above the lowest `below`.
    #[expect(clippy::cast_possible_truncation, reason = "masked to at most 29 bits")]
    const fn field(self, bits: u32, below: u32) -> u32 {
        (self.0 >> below) as u32 & ((1 << bits) - 1)
    }

    const fn pack(self) -> u32 {
        self.field(PACK_BITS, 128 - PACK_BITS)
    }

    const fn location(self, pack: PackRef) -> Location {
        Location {
            pack,
            frame_offset: self.field(FRAME_OFFSET_BITS, FRAME_LENGTH_BITS + OFFSET_BITS + LENGTH_BITS),
            frame_length: self.field(FRAME_LENGTH_BITS, OFFSET_BITS + LENGTH_BITS),
            offset: self.field(OFFSET_BITS, LENGTH_BITS),
            length: self.field(LENGTH_BITS, 0) + 1,
        }
    }
}

/// Collects locations for a segment.
#[derive(Default)]
pub struct SegmentBuilder {
    packs: Vec<PackRef>,
    numbers: HashMap<PackRef, u32>,
    /// Entries, with packs numbered as they came.
    entries: Vec<(BlobId, Packed)>,
}

impl SegmentBuilder {
    /// An empty segment.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Covers a pack and adds all its blobs.
    pub fn pack(&mut self, pack: PackRef, footer: &PackFooter) {
        self.cover(pack);
        for (id, location) in footer.locations(pack) {
            self.add(id, &location);
        }
    }

    /// Covers a pack, whose entries may follow.
    pub fn cover(&mut self, pack: PackRef) {
        self.number(pack);
    }

    /// Adds one blob, and covers its pack.
    ///
    /// # Panics
    /// If the location is beyond what a pack may have, as none is that comes from a footer or a segment.
    pub fn add(&mut self, id: BlobId, location: &Location) {
        let number = self.number(location.pack);
        self.entries.push((id, Packed::new(number, location)));
    }

    fn number(&mut self, pack: PackRef) -> u32 {
        *self.numbers.entry(pack).or_insert_with(|| {
            self.packs.push(pack);
            u32::try_from(self.packs.len() - 1).expect("fewer packs than 2^29")
        })
    }

    /// Number of entries added.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.entries.len()
    }

    /// No entry was added.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The segment's bytes: the same for the same packs and entries, in whatever order they were added.
    ///
    /// # Panics
    /// If there are 2^32 entries or more.
    #[must_use]
    pub fn finish(self) -> Vec<u8> {
        let Self { packs: by_number, mut entries, .. } = self;
        let mut packs = by_number.clone();
        packs.sort_unstable();
        let sorted_number = |pack: u32| {
            let at = by_number.get(pack as usize).and_then(|pack| packs.binary_search(pack).ok());
            u32::try_from(at.expect("every number stands for a pack")).expect("a pack's number")
        };
        let renumbered: Vec<u32> = (0..).zip(&by_number).map(|(number, _)| sorted_number(number)).collect();
        for (_, packed) in &mut entries {
            let (old, rest) = (packed.pack(), packed.0 << PACK_BITS >> PACK_BITS);
            packed.0 = u128::from(renumbered[old as usize]) << (128 - PACK_BITS) | rest;
        }
        entries.sort_unstable();
        entries.dedup();
        encode(&packs, &entries)
    }
}

fn encode(packs: &[PackRef], entries: &[(BlobId, Packed)]) -> Vec<u8> {
    let bits = fan_out_bits(entries.len() as u64);
    let slots = 1_usize << bits;
    let length = HEADER_LEN + PACK_LEN * packs.len() + 4 * slots + ENTRY_LEN * entries.len() + CHECKSUM_LEN;
    let mut out = Vec::with_capacity(length);
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&FORMAT.to_le_bytes());
    out.extend_from_slice(&u32::try_from(packs.len()).expect("a number of packs").to_le_bytes());
    out.extend_from_slice(&(entries.len() as u64).to_le_bytes());
    out.extend_from_slice(&bits.to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    for pack in packs {
        let domain = match pack.domain {
            Domain::Public => Ulid::nil(),
            Domain::Cache(id) => id.0,
        };
        out.extend_from_slice(&domain.to_bytes());
        out.extend_from_slice(&pack.id.0.to_bytes());
    }
    let mut at = 0;
    for number in 0..slots {
        at += entries[at..].partition_point(|(id, _)| slot(id.as_bytes(), bits) == number);
        out.extend_from_slice(&u32::try_from(at).expect("fewer than 2^32 entries").to_le_bytes());
    }
    for (id, packed) in entries {
        out.extend_from_slice(id.as_bytes());
        out.extend_from_slice(&packed.0.to_le_bytes());
    }
    let checksum = digest(CONTEXT, &[&out]);
    out.extend_from_slice(&checksum);
    assert_eq!(out.len(), length, "length of a segment");
    out
}

/// A segment over its bytes, which may be a memory map.
pub struct Segment<T> {
    bytes: T,
    packs: Vec<PackRef>,
    fan_out_bits: u32,
    /// Offsets in `bytes`.
    fan_out_at: usize,
    entries_at: usize,
    entries: usize,
}

impl<T: AsRef<[u8]>> Segment<T> {
    /// Checks the bytes, all of them, and opens the segment.
    ///
    /// # Errors
    /// When they are not a valid segment.
    pub fn open(bytes: T) -> Result<Self, FormatError> {
        let all = bytes.as_ref();
        let checksum_at = all.len().checked_sub(CHECKSUM_LEN);
        let (body, checksum) = checksum_at
            .and_then(|at| all.split_at_checked(at))
            .ok_or(FormatError::Truncated { field: "segment", offset: all.len() as u64 })?;
        let mut input = Input::new(body);
        input.expect("magic of segment", &MAGIC)?;
        let version = input.u32("version of segment")?;
        if version != FORMAT {
            return Err(FormatError::Version { format: "segment", version, known: "1" });
        }
        if digest(CONTEXT, &[body]) != checksum {
            return Err(FormatError::Checksum { field: "segment", offset: 0 });
        }
        let pack_count = input.u32("number of packs")?;
        let entry_count = input.u64("number of entries")?;
        let fan_out_bits = input.u32("bits of fan-out")?;
        input.expect("reserved bytes of segment", &[0; 4])?;
        if fan_out_bits != self::fan_out_bits(entry_count) {
            return Err(FormatError::Syntax { field: "bits of fan-out", offset: 24 });
        }
        let packs = read_packs(&mut input, pack_count)?;
        let fan_out_at = input.consumed();
        let fan_out = input.take("fan-out of segment", 4 << fan_out_bits)?;
        let entries_at = input.consumed();
        let entries = usize::try_from(entry_count).ok();
        let entries_length = entries.and_then(|entries| entries.checked_mul(ENTRY_LEN));
        let table = input.take("entries of segment", entries_length.unwrap_or(usize::MAX))?;
        input.finish("end of segment")?;
        check_entries(fan_out, fan_out_bits, table, packs.len())
            .map_err(|at| FormatError::Syntax { field: "entry of segment", offset: (entries_at + at) as u64 })?;
        let entries = table.len() / ENTRY_LEN;
        Ok(Self { bytes, packs, fan_out_bits, fan_out_at, entries_at, entries })
    }

    /// The packs that the segment covers, in order.
    #[must_use]
    pub fn packs(&self) -> &[PackRef] {
        &self.packs
    }

    /// Number of entries.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.entries
    }

    /// The segment has no entries.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.entries == 0
    }

    /// The first location of a blob, in the order of packs.
    #[must_use]
    pub fn get(&self, id: &BlobId) -> Option<Location> {
        self.get_all(id).next()
    }

    /// All locations of a blob: it may lie in several packs.
    pub fn get_all(&self, id: &BlobId) -> impl Iterator<Item = Location> {
        let id = *id;
        let number = slot(id.as_bytes(), self.fan_out_bits);
        let start = number.checked_sub(1).map_or(0, |before| self.slot_end(before));
        let slot = self.table().get(start..self.slot_end(number)).unwrap_or_default();
        let first = slot.partition_point(|entry| entry[..ID_LEN] < id.as_bytes()[..]);
        let found = slot.get(first..).unwrap_or_default();
        found
            .iter()
            .take_while(move |entry| entry[..ID_LEN] == id.as_bytes()[..])
            .filter_map(|e| self.entry(e))
            .map(|(_, location)| location)
    }

    /// All entries, in order of id.
    pub fn iter(&self) -> impl Iterator<Item = (BlobId, Location)> {
        self.table().iter().filter_map(|entry| self.entry(entry))
    }

    fn table(&self) -> &[[u8; ENTRY_LEN]] {
        let table = self.bytes.as_ref().get(self.entries_at..).unwrap_or_default();
        table.as_chunks().0.get(..self.entries).unwrap_or_default()
    }

    /// Number of the entry behind the last one of a slot.
    fn slot_end(&self, number: usize) -> usize {
        let at = self.fan_out_at + 4 * number;
        let end = self.bytes.as_ref().get(at..).and_then(|rest| rest.first_chunk()).copied();
        u32::from_le_bytes(end.unwrap_or_default()) as usize
    }

    /// What an entry says. `open` has seen that its pack is listed.
    fn entry(&self, entry: &[u8; ENTRY_LEN]) -> Option<(BlobId, Location)> {
        let (id, packed) = split(entry);
        let pack = self.packs.get(packed.pack() as usize)?;
        Some((BlobId::from_bytes(*id), packed.location(*pack)))
    }
}

fn split(entry: &[u8; ENTRY_LEN]) -> (&[u8; ID_LEN], Packed) {
    let (id, rest) = entry.split_first_chunk().expect("an entry starts with an id");
    let packed = rest.first_chunk().expect("a location follows");
    (id, Packed(u128::from_le_bytes(*packed)))
}

fn read_packs(input: &mut Input<'_>, count: u32) -> Result<Vec<PackRef>, FormatError> {
    let mut packs = Vec::new();
    for _ in 0..count {
        let offset = input.offset();
        let domain = Ulid::from_bytes(input.array("domain of pack")?);
        let id = PackId(Ulid::from_bytes(input.array("id of pack")?));
        let domain = if domain.is_nil() { Domain::Public } else { Domain::Cache(CacheId(domain)) };
        let pack = PackRef { domain, id };
        if packs.last().is_some_and(|last| *last >= pack) {
            return Err(FormatError::Syntax { field: "order of packs", offset });
        }
        packs.push(pack);
    }
    Ok(packs)
}

/// Checks that entries ascend, name listed packs, and stand in the slots that the fan-out says. The error is the offset
/// in the table of what does not.
fn check_entries(fan_out: &[u8], bits: u32, table: &[u8], packs: usize) -> Result<(), usize> {
    let (ends, _) = fan_out.as_chunks::<4>();
    let (entries, _) = table.as_chunks::<ENTRY_LEN>();
    let mut last: Option<(&[u8; ID_LEN], Packed)> = None;
    let mut checked = 0_usize;
    for (number, end) in ends.iter().enumerate() {
        let end = u32::from_le_bytes(*end) as usize;
        for entry in entries.get(checked..end).ok_or(checked * ENTRY_LEN)? {
            let (id, packed) = split(entry);
            let ascends = last.is_none_or(|last| last.cmp(&(id, packed)) == Ordering::Less);
            if !ascends || slot(id, bits) != number || packed.pack() as usize >= packs {
                return Err(checked * ENTRY_LEN);
            }
            last = Some((id, packed));
            checked += 1;
        }
    }
    if checked == entries.len() { Ok(()) } else { Err(checked * ENTRY_LEN) }
}

#[cfg(test)]
mod tests;
