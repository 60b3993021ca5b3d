//! Chunks: where a file is cut.
//!
//! Files are cut one by one, never across each other, so that equal files give equal chunks wherever they lie. A file up
//! to the average size is one chunk. Longer ones are cut by FastCDC as of 2020 (normalisation level 1), which looks for
//! places that the bytes themselves mark: an insertion moves the cuts near it and no others. The parameters are frozen
//! under [`ChunkerVersion::V1`], since they decide which chunks there are; docs/format/chunk.md states them.
//!
//! Cuts depend on the file's bytes alone, never on how they arrive: the algorithm is always shown as much as the largest
//! chunk could have, or all that is left of the file. What is left over belongs to the caller, who shows it again with
//! more behind it; so nothing is copied here.

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
    /// Of which this many are in chunks.
    cut: u64,
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
        self.end();
        self.size = size;
        self.cut = 0;
    }

    /// Takes the bytes of the file that follow the last chunk, as far as they are there, calls `on` with each chunk that
    /// is complete, and says how many bytes those have: all of them, once they are all that is left of the file, else all
    /// but fewer than [`CHUNK_MAX`]. The next call starts with the others.
    ///
    /// # Errors
    /// What `on` returns; the chunker is then void.
    ///
    /// # Panics
    /// If the bytes are more than the file has left.
    pub fn cut<E>(&mut self, bytes: &[u8], on: &mut impl FnMut(&[u8]) -> Result<(), E>) -> Result<usize, E> {
        assert!(bytes.len() as u64 <= self.size - self.cut, "a file has as many bytes as it began with");
        let mut rest = bytes;
        while let Some(length) = self.next_cut(rest) {
            let (chunk, after) = rest.split_at(length);
            self.cut += length as u64;
            rest = after;
            on(chunk)?;
        }
        Ok(bytes.len() - rest.len())
    }

    /// The file ends here.
    ///
    /// # Panics
    /// If bytes are missing.
    pub fn end(&self) {
        assert_eq!(self.cut, self.size, "a file has as many bytes as it began with");
    }

    /// The length of the chunk that `bytes` start with, or none before enough of them are there.
    fn next_cut(&self, bytes: &[u8]) -> Option<usize> {
        let last = self.size - self.cut == bytes.len() as u64;
        if bytes.is_empty() || (bytes.len() < CHUNK_MAX && !last) {
            return None;
        }
        if self.size <= CHUNK_AVG as u64 {
            return Some(bytes.len());
        }
        let window = bytes.get(..CHUNK_MAX).unwrap_or(bytes);
        let (strict, lax) = *MASKS;
        let (_, length) = cut(window, CHUNK_MIN, CHUNK_AVG, CHUNK_MAX, strict, lax, strict << 1, lax << 1);
        assert!((1..=window.len()).contains(&length), "length of a chunk");
        Some(length)
    }
}

#[cfg(test)]
mod tests;
