//! Where the columns of a tree lie in its bytes.

use std::ops::Range;

use narlake_format::id::{ID_LEN, ManifestId};

use crate::fs::attr::Kind;

pub(super) const MAGIC: &[u8; 8] = b"NLTREE01";

const COUNTS_AT: usize = 8 + ID_LEN;
const COUNTS: usize = 9;

/// The part of the header that the checksum covers, padded to a multiple of 8.
pub(super) const CHECKED_LEN: usize = (COUNTS_AT + COUNTS * 4).next_multiple_of(8);
pub(super) const HEADER_LEN: usize = CHECKED_LEN + 32;

pub(super) const PATCH_LEN: usize = 16;

const KIND_BITS: u32 = 2;
const INDEX_MASK: u32 = u32::MAX >> KIND_BITS;

/// The columns, in the order in which they lie.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Column {
    ChunkEnds,
    Sizes,
    Patches,
    Entries,
    Directories,
    Children,
    Files,
    Links,
    FileIds,
    Chunks,
    Names,
    Targets,
}

/// Of each column: which count it has a row for, and the bytes of a row.
const COLUMNS: [(Column, usize, usize); 12] = [
    (Column::ChunkEnds, 5, 8),
    (Column::Sizes, 3, 8),
    (Column::Patches, 6, PATCH_LEN),
    (Column::Entries, 0, 12),
    (Column::Directories, 1, 8),
    (Column::Children, 2, 4),
    (Column::Files, 3, 16),
    (Column::Links, 4, 16),
    (Column::FileIds, 3, 32),
    (Column::Chunks, 5, 32),
    (Column::Names, 7, 1),
    (Column::Targets, 8, 1),
];

/// The header of a tree, and what follows from it.
#[derive(Debug)]
pub(super) struct Layout {
    pub(super) manifest: ManifestId,
    counts: [u32; COUNTS],
    starts: [usize; COLUMNS.len()],
    length: usize,
}

impl Layout {
    /// For counts in the order of the header.
    pub(super) fn new(manifest: ManifestId, counts: [u32; COUNTS]) -> Self {
        let mut starts = [0; COLUMNS.len()];
        // 32-bit counts of rows of at most 32 bytes: far from overflow in 64 bits.
        let mut at = HEADER_LEN;
        for (start, (_, count, row)) in starts.iter_mut().zip(COLUMNS) {
            *start = at;
            at = (at + counts[count] as usize * row).next_multiple_of(8);
        }
        Self { manifest, counts, starts, length: at }
    }

    /// From the start of a tree; `None` if it is none of this version.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let header = bytes.get(..CHECKED_LEN)?;
        if !header.starts_with(MAGIC) {
            return None;
        }
        let manifest = ManifestId::from_bytes(header.get(8..COUNTS_AT)?.try_into().ok()?);
        let (numbers, _) = header.get(COUNTS_AT..)?.as_chunks::<4>();
        let mut counts = [0; COUNTS];
        for (count, number) in counts.iter_mut().zip(numbers) {
            *count = u32::from_le_bytes(*number);
        }
        Some(Self::new(manifest, counts))
    }

    /// The part of the header that the checksum covers.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut header = Vec::with_capacity(self.length);
        header.extend_from_slice(MAGIC);
        header.extend_from_slice(self.manifest.as_bytes());
        self.counts.iter().for_each(|count| header.extend_from_slice(&count.to_le_bytes()));
        header.resize(CHECKED_LEN, 0);
        header
    }

    /// Bytes of the whole tree.
    pub(super) const fn len(&self) -> usize {
        self.length
    }

    pub(super) const fn entries(&self) -> usize {
        self.counts[0] as usize
    }

    pub(super) fn range(&self, column: Column) -> Range<usize> {
        let (_, count, row) = COLUMNS[column as usize];
        let start = self.starts[column as usize];
        start..start + self.counts[count] as usize * row
    }
}

/// What an entry is and which row of that kind describes it, in one number.
pub(super) fn pack(kind: Kind, index: u32) -> u32 {
    let kind = match kind {
        Kind::Directory => 0,
        Kind::File { executable: false } => 1,
        Kind::File { executable: true } => 2,
        Kind::Symlink => 3,
    };
    kind << (32 - KIND_BITS) | index & INDEX_MASK
}

pub(super) const fn unpack(what: u32) -> (Kind, usize) {
    let kind = match what >> (32 - KIND_BITS) {
        0 => Kind::Directory,
        1 => Kind::File { executable: false },
        2 => Kind::File { executable: true },
        _ => Kind::Symlink,
    };
    (kind, (what & INDEX_MASK) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_follow_each_other() {
        let layout = Layout::new(ManifestId::of(b""), [1, 2, 3, 4, 5, 6, 7, 8, 9]);
        let mut end = HEADER_LEN;
        for (number, (column, ..)) in COLUMNS.iter().enumerate() {
            assert_eq!(*column as usize, number);
            let range = layout.range(*column);
            assert!(range.start == end.next_multiple_of(8) && range.end > range.start, "{column:?}");
            end = range.end;
        }
        assert_eq!(layout.len(), end.next_multiple_of(8));
        let again = Layout::decode(&layout.encode()).unwrap();
        assert_eq!((again.manifest, again.counts), (layout.manifest, layout.counts));
    }
}
