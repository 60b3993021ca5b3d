//! Putting the strings back: the exact inverse of scrubbing, and a copy.
//!
//! [`PatchList`] serves any window of a file, [`Restorer`] a file whose chunks pass in order. Both check what a manifest
//! cannot know of itself, since the lengths of strings are the table's: that a patch names a string that is there, and
//! lies inside its file.

use super::{PLACEHOLDER, Patch};
use crate::error::FormatError;
use crate::id::{ContentId, FileId, PatchedFileHasher};
use crate::lake::strings::StringTable;
use crate::nix::store_path::STORE_HASH_CHARS;

/// One restored span of a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Span {
    /// Offset in the file.
    offset: u64,
    /// Offset in the table's text.
    text: u32,
    length: u32,
}

impl Span {
    /// The patch that follows one which ends at `previous`.
    fn resolve(patch: &Patch, table: &StringTable, previous: u64) -> Result<Self, FormatError> {
        let invalid = |field| FormatError::Syntax { field, offset: previous };
        let (text, length) = table.span(patch.string, patch.hash_only).ok_or(invalid("string of patch"))?;
        let offset = previous.checked_add(patch.gap).ok_or(invalid("offset of patch"))?;
        offset.checked_add(u64::from(length)).ok_or(invalid("offset of patch"))?;
        Ok(Self { offset, text, length })
    }

    /// Invariant: does not overflow, `resolve` saw to it.
    const fn end(&self) -> u64 {
        self.offset + self.length as u64
    }

    fn bytes<'a>(&self, table: &'a StringTable) -> &'a [u8] {
        table.text().get(self.text as usize..).and_then(|text| text.get(..self.length as usize)).unwrap_or_default()
    }

    /// Copies what of the span lies in `window`, which starts at `offset` of the file.
    fn copy_to(&self, table: &StringTable, offset: u64, window: &mut [u8]) {
        let bytes = self.bytes(table);
        let skipped = usize::try_from(offset.saturating_sub(self.offset)).unwrap_or(usize::MAX);
        let at = usize::try_from(self.offset.saturating_sub(offset)).unwrap_or(usize::MAX);
        if let (Some(from), Some(to)) = (bytes.get(skipped..), window.get_mut(at..)) {
            let length = from.len().min(to.len());
            to[..length].copy_from_slice(&from[..length]);
        }
    }
}

/// The patches of one file or target, checked against its size and the table, for restoring any part of it.
#[derive(Clone, Debug, Default)]
pub struct PatchList {
    table: StringTable,
    /// Invariant: ascending, not overlapping, inside the file.
    spans: Box<[Span]>,
}

impl PatchList {
    /// Places the patches of a file of this size.
    ///
    /// # Errors
    /// When a patch names a string that the table does not have, or reaches beyond the file's end.
    pub fn resolve(patches: &[Patch], table: &StringTable, file_size: u64) -> Result<Self, FormatError> {
        let mut spans = Vec::with_capacity(patches.len());
        let mut previous = 0;
        for patch in patches {
            let span = Span::resolve(patch, table, previous)?;
            previous = span.end();
            if previous > file_size {
                let (value, max) = (previous, file_size);
                return Err(FormatError::Limit { field: "end of patch", value, max, offset: span.offset });
            }
            spans.push(span);
        }
        Ok(Self { table: table.clone(), spans: spans.into() })
    }

    /// Number of patches.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.spans.len()
    }

    /// The file has no patches.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// Each restored span: its offset in the file and its bytes, in order.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &[u8])> {
        self.spans.iter().map(|span| (span.offset, span.bytes(&self.table)))
    }

    /// Puts the strings back into `window`, which holds the scrubbed bytes from `offset` of the file on.
    pub fn restore(&self, offset: u64, window: &mut [u8]) {
        let end = offset.saturating_add(window.len() as u64);
        let first = self.spans.partition_point(|span| span.end() <= offset);
        for span in self.spans.iter().skip(first).take_while(|span| span.offset < end) {
            span.copy_to(&self.table, offset, window);
        }
    }

    /// Takes the strings out of `window` again, which holds the restored bytes from `offset` of the file on. False if
    /// something else stands where a string should.
    #[must_use]
    pub fn take_out(&self, offset: u64, window: &mut [u8]) -> bool {
        let end = offset.saturating_add(window.len() as u64);
        let first = self.spans.partition_point(|span| span.end() <= offset);
        self.spans.iter().skip(first).take_while(|span| span.offset < end).all(|span| {
            let bytes = span.bytes(&self.table);
            let skipped = usize::try_from(offset.saturating_sub(span.offset)).unwrap_or(usize::MAX);
            let at = usize::try_from(span.offset.saturating_sub(offset)).unwrap_or(usize::MAX);
            let (Some(from), Some(to)) = (bytes.get(skipped..), window.get_mut(at..)) else { return false };
            let (from, to) = (from.iter(), to.iter_mut());
            // The hyphen between hash and name was never taken out.
            (skipped..).zip(from.zip(to)).all(|(place, (byte, found))| {
                let is_right = *byte == *found;
                if place != STORE_HASH_CHARS {
                    *found = PLACEHOLDER;
                }
                is_right
            })
        })
    }

    /// The name of the restored file, whose scrubbed bytes are `file`.
    #[must_use]
    pub fn content_id(&self, file: &FileId) -> ContentId {
        if self.is_empty() {
            return (*file).into();
        }
        let mut hasher = PatchedFileHasher::new(file);
        for (offset, bytes) in self.iter() {
            hasher.patch(offset, bytes);
        }
        hasher.finish()
    }
}

/// Puts strings back into one file whose chunks pass one after the other.
#[derive(Clone, Debug)]
pub struct Restorer {
    table: StringTable,
    /// Offset in the file of the next chunk.
    offset: u64,
    /// The last patch, which may reach into the next chunk.
    last: Span,
}

impl Restorer {
    /// Starts a file.
    #[must_use]
    pub fn new(table: &StringTable) -> Self {
        Self { table: table.clone(), offset: 0, last: Span { offset: 0, text: 0, length: 0 } }
    }

    /// Restores the next chunk of the file, in place. `patches` are those that start inside it.
    ///
    /// # Errors
    /// When a patch names a string that the table does not have, or does not start inside the chunk.
    pub fn chunk(&mut self, bytes: &mut [u8], patches: &[Patch]) -> Result<(), FormatError> {
        let end = self.offset.saturating_add(bytes.len() as u64);
        self.last.copy_to(&self.table, self.offset, bytes);
        for patch in patches {
            let span = Span::resolve(patch, &self.table, self.last.end())?;
            if span.offset < self.offset || span.offset >= end {
                return Err(FormatError::Syntax { field: "offset of patch", offset: span.offset });
            }
            span.copy_to(&self.table, self.offset, bytes);
            self.last = span;
        }
        self.offset = end;
        Ok(())
    }

    /// The file ends here.
    ///
    /// # Errors
    /// When a patch reaches beyond the file's end.
    pub fn finish(self) -> Result<(), FormatError> {
        let (value, max) = (self.last.end(), self.offset);
        if value > max {
            return Err(FormatError::Limit { field: "end of patch", value, max, offset: self.last.offset });
        }
        Ok(())
    }
}
