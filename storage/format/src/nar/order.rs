//! The directories that are open, and the rules that reader and writer share: names, their order, depth, entries.

use crate::limits::{DEPTH_MAX, ENTRIES_MAX, NAR_SIZE_MAX, TARGET_MAX};

use super::{NarError, is_entry_name};

/// The open directories, each with the name of its last entry.
///
/// The names lie one behind the other in one buffer, so that opening a directory allocates nothing.
#[derive(Default)]
pub(super) struct Tree {
    names: Vec<u8>,
    /// Where the name of each open directory starts in `names`; it ends where the next starts. Empty before the first.
    starts: Vec<usize>,
    entries: u64,
}

impl Tree {
    /// Whether a directory is open.
    pub(super) fn is_inside(&self) -> bool {
        !self.starts.is_empty()
    }

    /// Counts a node of any kind.
    pub(super) fn node(&mut self, offset: u64) -> Result<(), NarError> {
        self.entries += 1;
        limit("number of entries", self.entries, ENTRIES_MAX, offset)
    }

    /// Opens a directory.
    pub(super) fn open(&mut self, offset: u64) -> Result<(), NarError> {
        limit("depth", self.starts.len() as u64 + 1, DEPTH_MAX as u64, offset)?;
        self.starts.push(self.names.len());
        Ok(())
    }

    /// Takes the next name in the innermost directory, of which there must be one.
    pub(super) fn entry(&mut self, name: &[u8], offset: u64) -> Result<(), NarError> {
        if !is_entry_name(name) {
            return Err(NarError::Name { name: name.into(), offset });
        }
        let start = self.starts.last().copied().unwrap_or_default();
        let previous = self.names.get(start..).unwrap_or_default();
        // No name is empty, so every name sorts after "no name yet".
        if name <= previous {
            return Err(NarError::Order { name: name.into(), previous: previous.into(), offset });
        }
        self.names.truncate(start);
        self.names.extend_from_slice(name);
        Ok(())
    }

    /// Closes the innermost directory; false if none is open.
    pub(super) fn close(&mut self) -> bool {
        let Some(start) = self.starts.pop() else { return false };
        self.names.truncate(start);
        true
    }
}

/// Checks a symlink's target. Its length is bounded by the caller, which may know it before the bytes.
pub(super) fn check_target(target: &[u8], offset: u64) -> Result<(), NarError> {
    limit("length of symlink target", target.len() as u64, TARGET_MAX as u64, offset)?;
    if target.is_empty() || memchr::memchr(0, target).is_some() {
        return Err(NarError::Syntax { expected: "symlink target", offset });
    }
    Ok(())
}

/// Checks the length of a file whose content would start at `offset`.
pub(super) fn check_size(size: u64, offset: u64) -> Result<(), NarError> {
    limit("file size", size, NAR_SIZE_MAX, offset)?;
    limit("size", offset.saturating_add(size), NAR_SIZE_MAX, offset)
}

pub(super) const fn limit(what: &'static str, value: u64, max: u64, offset: u64) -> Result<(), NarError> {
    if value > max { Err(NarError::Limit { what, value, max, offset }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_counted() {
        let mut tree = Tree { entries: ENTRIES_MAX - 1, ..Tree::default() };
        assert_eq!(tree.node(7), Ok(()));
        let (value, max) = (ENTRIES_MAX + 1, ENTRIES_MAX);
        assert_eq!(tree.node(7), Err(NarError::Limit { what: "number of entries", value, max, offset: 7 }));
    }
}
