//! The columns of a part: one run of bytes for each kind of value.

use crate::error::FormatError;
use crate::lake::wire::{Input, put_varint, varint_len};
use crate::limits::PART_MAX;

/// Number of columns.
const COLUMNS: usize = 8;

/// A column of a part, in the order in which they stand.
#[derive(Clone, Copy)]
pub(super) enum Column {
    /// A byte for each item that is not a chunk (`shape`).
    Shape,
    /// For each name: bytes shared with the name before it in the same directory, and bytes of its own; one byte each.
    NameLength,
    /// Each name's own bytes.
    Name,
    /// For each file its size; for each symlink twice the length of its target, plus one where it has patches.
    Size,
    /// The bytes of symlink targets.
    Target,
    /// For each chunk twice its length, plus one where patches start in it; the length of a file's last chunk, which
    /// follows from the file's size, is written as 0.
    Chunk,
    /// For each symlink and chunk with patches their number, and for each patch its gap, and twice its string's number,
    /// plus one where only the hash stood.
    Patch,
    /// For each chunk its id; behind those of a long file its own.
    Id,
}

/// What each column is called in errors.
const NAMES: [&str; COLUMNS] = [
    "shape column",
    "name length column",
    "name column",
    "size column",
    "target column",
    "chunk column",
    "patch column",
    "id column",
];

/// Bytes in each column.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Lengths([usize; COLUMNS]);

impl Lengths {
    /// Bytes of the part that has these columns.
    pub(super) fn part_len(&self) -> usize {
        self.0.iter().map(|length| varint_len(*length as u64) + length).sum()
    }

    pub(super) fn plus(mut self, other: Self) -> Self {
        for (length, more) in self.0.iter_mut().zip(other.0) {
            *length += more;
        }
        self
    }
}

/// Columns being written.
#[derive(Default)]
pub(super) struct Columns([Vec<u8>; COLUMNS]);

impl Columns {
    pub(super) fn column(&mut self, column: Column) -> &mut Vec<u8> {
        &mut self.0[column as usize]
    }

    pub(super) fn lengths(&self) -> Lengths {
        Lengths(self.0.each_ref().map(Vec::len))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.iter().all(Vec::is_empty)
    }

    /// Moves all bytes of `other` behind these.
    pub(super) fn append(&mut self, other: &mut Self) {
        for (column, more) in self.0.iter_mut().zip(&mut other.0) {
            column.append(more);
        }
    }

    /// The part's bytes; empties the columns.
    pub(super) fn take_part(&mut self) -> Vec<u8> {
        let length = self.lengths().part_len();
        let mut bytes = Vec::with_capacity(length);
        for column in &self.0 {
            put_varint(column.len() as u64, &mut bytes);
        }
        for column in &mut self.0 {
            bytes.append(column);
        }
        assert_eq!(bytes.len(), length, "length of a part");
        bytes
    }
}

/// Columns being read.
pub(super) struct ColumnInputs<'a>([Input<'a>; COLUMNS]);

impl<'a> ColumnInputs<'a> {
    /// Takes a part apart.
    pub(super) fn open(part: &'a [u8]) -> Result<Self, FormatError> {
        let mut input = Input::new(part);
        let mut lengths = [0; COLUMNS];
        for (length, name) in lengths.iter_mut().zip(NAMES) {
            *length = input.varint_max(name, PART_MAX as u64)?;
        }
        let mut inputs = [const { Input::new(&[]) }; COLUMNS];
        for ((column, length), name) in inputs.iter_mut().zip(lengths).zip(NAMES) {
            let offset = input.offset();
            *column = Input::at(input.take(name, usize::try_from(length).unwrap_or(usize::MAX))?, offset);
        }
        input.finish("end of part")?;
        Ok(Self(inputs))
    }

    pub(super) const fn column(&mut self, column: Column) -> &mut Input<'a> {
        &mut self.0[column as usize]
    }

    /// Bytes read so far.
    pub(super) fn consumed(&self) -> Lengths {
        Lengths(self.0.each_ref().map(Input::consumed))
    }

    /// All columns must be read to their ends.
    pub(super) fn finish(self) -> Result<(), FormatError> {
        self.0.into_iter().zip(NAMES).try_for_each(|(column, name)| column.finish(name))
    }
}
