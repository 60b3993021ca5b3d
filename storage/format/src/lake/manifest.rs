//! The manifest body: one store object's tree, without anything that a rebuild changes.
//!
//! Entries stand in the order of the NAR: a directory, its entries by name, its end. A file has its size, its executable
//! bit, its chunks with their lengths, the patches that start inside each chunk, and its [`FileId`](crate::id::FileId);
//! a symlink has its scrubbed target and patches. The strings that patches name are in the
//! [string table](super::strings), outside.
//!
//! A body is cut into *parts* by a fixed rule: the first 64 of at most 16 KiB, so that a rebuild which changes one file
//! of a package stores little of its manifest anew, the rest of at most 256 KiB, so that ten million entries or a file
//! of a terabyte are written and read in bounded memory, and a *header* that lists them; the id of the
//! manifest is that of its header. Inside a part the items are taken apart into columns, like to like, which zstd likes
//! better than rows. docs/format/manifest.md has the bytes.
//!
//! Invariant: a tree has one encoding (for given versions of scrubbing and chunking). The reader refuses every other:
//! a part that could have held one more item, a number in a longer spelling than need be, a name that repeats more of
//! the one before than is said. Where an object's files are the same, so is its [`ManifestId`](crate::id::ManifestId).
//!
//! What neither side checks is what patches mean: that needs the table, and happens where they are
//! [resolved](super::scrub::PatchList::resolve).

use crate::limits::{PART_MAX, PART_SMALL_MAX, PARTS_SMALL};

mod column;
mod header;
mod reader;
mod tree;
mod writer;

pub use self::header::{ManifestHeader, PartRef};
pub use self::reader::{ManifestEvent, ManifestReader};
pub use self::writer::{Finished, ManifestWriter, Part};

/// The kinds of items that have a byte in the shape column. Zero is no shape.
mod shape {
    pub(super) const DIRECTORY: u8 = 1;
    pub(super) const FILE: u8 = 2;
    pub(super) const EXECUTABLE: u8 = 3;
    pub(super) const SYMLINK: u8 = 4;
    pub(super) const END_DIRECTORY: u8 = 5;
}

/// The largest that the part of this number may be, in bytes.
const fn part_max(number: usize) -> usize {
    if number < PARTS_SMALL { PART_SMALL_MAX } else { PART_MAX }
}

#[cfg(test)]
mod tests;
