//! Chunks: where a file is cut.
//!
//! Files are cut one by one, never across each other, so that equal files give equal chunks wherever they lie. A file up
//! to the average size is one chunk. Longer ones are cut by FastCDC as of 2020 (normalisation level 1), which looks for
//! places that the bytes themselves mark: an insertion moves the cuts near it and no others. The parameters are frozen
//! under [`ChunkerVersion::V1`], since they decide which chunks there are; docs/format/chunk.md states them.
//!
//! Cuts depend on the file's bytes alone, never on how they arrive: the algorithm is always shown as much as the largest
//! chunk could have, or all that is left of the file. What a push leaves over is kept, at most one largest chunk; where
//! a push brings enough, chunks are slices of it and nothing is copied.

use std::sync::LazyLock;

use fastcdc::v2020::{Normalization, cut, select_masks};

use crate::error::FormatError;
use crate::limits::{CHUNK_AVG, CHUNK_MAX, CHUNK_MIN};

/// The algorithm and parameters by which files are cut.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u8)]
pub enum ChunkerVersion {
    /// The rule of docs/format/chunk.md.
    V1 = 1,
}

impl ChunkerVersion {
    /// The version that a byte stands for.
    ///
    /// # Errors
    /// When this build does not know it.
    pub const fn from_byte(byte: u8) -> Result<Self, FormatError> {
        match byte {
            1 => Ok(Self::V1),
            _ => Err(FormatError::Version { format: "chunking", version: byte as u32, known: "1" }),
        }
    }
}

/// The masks of FastCDC for the average size: strict up to it, lax beyond.
static MASKS: LazyLock<(u64, u64)> = LazyLock::new(|| select_masks(CHUNK_AVG, Normalization::Level1));

/// Cuts files into chunks, one file after the other.
#[derive(Default)]
pub struct Chunker {
    /// Bytes of the file.
    size: u64,
    /// Of which this many have been pushed.
    pushed: u64,
    /// Bytes kept from earlier pushes, from `start` on.
    ///
    /// Invariant: between two pushes fewer than `CHUNK_MAX` of them, and at the end of the file none.
    kept: Vec<u8>,
    /// Where in `kept` the next chunk starts. Cutting off the front each time would move every byte for each chunk.
    start: usize,
}

impl Chunker {
    /// A chunker that is between two files.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Starts a file of this size.
    ///
    /// # Panics
    /// If the file before has not ended.
    pub fn begin(&mut self, size: u64) {
        assert_eq!(self.pushed, self.size, "a file begins where the last one has ended");
        self.size = size;
        self.pushed = 0;
    }

    /// Takes the next bytes of the file and calls `on` with each chunk that is complete. With the last byte of the
    /// file, all its chunks are.
    ///
    /// # Panics
    /// If the bytes are more than the file has left.
    pub fn push(&mut self, bytes: &[u8], on: &mut impl FnMut(&[u8])) {
        self.pushed += bytes.len() as u64;
        assert!(self.pushed <= self.size, "a file has as many bytes as it began with");
        let mut rest = bytes;
        while self.kept_len() > 0 {
            let before = self.kept_len();
            // Cutting leaves fewer than CHUNK_MAX.
            let (taken, after) = rest.split_at(rest.len().min(CHUNK_MAX - before));
            self.kept.extend_from_slice(taken);
            let Some(length) = self.next_cut(&self.kept[self.start..], after.is_empty()) else { return };
            on(&self.kept[self.start..self.start + length]);
            self.start += length;
            if length >= before {
                // All that was kept is gone: go on in the pushed bytes themselves.
                rest = &rest[length - before..];
                self.kept.clear();
                self.start = 0;
            } else {
                rest = after;
                self.compact();
            }
        }
        while let Some(length) = self.next_cut(&rest[..rest.len().min(CHUNK_MAX)], rest.len() <= CHUNK_MAX) {
            let (chunk, after) = rest.split_at(length);
            on(chunk);
            rest = after;
        }
        self.kept.extend_from_slice(rest);
    }

    /// The file ends here.
    ///
    /// # Panics
    /// If bytes are missing.
    pub fn end(&mut self) {
        assert_eq!(self.pushed, self.size, "a file has as many bytes as it began with");
        assert_eq!(self.kept_len(), 0, "the last push gives the last chunk");
    }

    fn kept_len(&self) -> usize {
        self.kept.len() - self.start
    }

    /// The length of the chunk that `bytes` start with, or none before enough of them are there. `all` says that they
    /// are all that has been pushed.
    fn next_cut(&self, bytes: &[u8], all: bool) -> Option<usize> {
        let last = all && self.pushed == self.size;
        if bytes.is_empty() || (bytes.len() < CHUNK_MAX && !last) {
            return None;
        }
        if self.size <= CHUNK_AVG as u64 {
            return Some(bytes.len());
        }
        let (strict, lax) = *MASKS;
        let (_, length) = cut(bytes, CHUNK_MIN, CHUNK_AVG, CHUNK_MAX, strict, lax, strict << 1, lax << 1);
        assert!((1..=bytes.len().min(CHUNK_MAX)).contains(&length), "length of a chunk");
        Some(length)
    }

    /// Moves what is kept to the front once as much has been cut off as is left at most, so that each byte is moved
    /// about once.
    fn compact(&mut self) {
        if self.start >= CHUNK_MAX {
            self.kept.drain(..self.start);
            self.start = 0;
        }
    }
}

#[cfg(test)]
mod tests;
