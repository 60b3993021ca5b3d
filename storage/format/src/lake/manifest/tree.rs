//! The rules of a manifest's tree, kept by writer and reader alike: what may follow what, which names and sizes there
//! are.

use crate::error::FormatError;
use crate::id::{ChunkId, FILE_ID_INLINE_MAX, FileId};
use crate::lake::scrub::Patch;
use crate::limits::{CHUNK_MAX, DEPTH_MAX, ENTRIES_MAX, NAME_MAX, NAR_SIZE_MAX, STRINGS_MAX, TARGET_MAX};
use crate::nix::store_path::STORE_HASH_CHARS;

/// The shortest span that a patch stands for: a hash, or a hash, a dash and a name of one character.
const fn shortest_span(patch: &Patch) -> u64 {
    if patch.hash_only { STORE_HASH_CHARS as u64 } else { STORE_HASH_CHARS as u64 + 2 }
}

/// Where in the tree we are.
#[derive(Clone, Debug)]
pub(super) struct Tree {
    /// Entries so far.
    pub(super) entries: u64,
    /// The last name in each open directory, empty before the first.
    names: Vec<Vec<u8>>,
    next: Next,
}

/// What comes next.
#[derive(Clone, Debug)]
enum Next {
    /// The root.
    Root,
    /// A name, or the end of the directory.
    Name,
    /// The node that was named.
    Node,
    /// The file's content.
    File(OpenFile),
    /// Nothing.
    End,
}

/// A file whose chunks are coming.
#[derive(Clone, Debug)]
struct OpenFile {
    size: u64,
    /// Where the last chunk starts, and where it ends.
    chunk_at: u64,
    offset: u64,
    /// The first chunk's id: all there is to know of a short file.
    first: Option<ChunkId>,
    patches: PatchPlaces,
}

/// A lower bound of where patches are, all that can be known without the string table.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct PatchPlaces {
    end_min: u64,
}

impl PatchPlaces {
    /// Takes the next patch, which must start in a run of bytes: at `from` at the earliest, and before `to`.
    pub(super) fn next(&mut self, patch: &Patch, from: u64, to: u64) -> Result<(), FormatError> {
        let start = self.end_min.checked_add(patch.gap).map(|start| start.max(from)).filter(|start| *start < to);
        let start = start.ok_or(FormatError::Syntax { field: "offset of patch", offset: self.end_min })?;
        if patch.string as usize >= STRINGS_MAX {
            let (value, max) = (patch.string.into(), STRINGS_MAX as u64 - 1);
            return Err(FormatError::Limit { field: "string of patch", value, max, offset: start });
        }
        self.end_min = start + shortest_span(patch);
        Ok(())
    }
}

/// The rules of a symlink's target; the offset is the number of entries.
pub(super) fn check_target(target: &[u8], entries: u64) -> Result<(), FormatError> {
    if target.len() > TARGET_MAX {
        let (value, max) = (target.len() as u64, TARGET_MAX as u64);
        return Err(FormatError::Limit { field: "length of target", value, max, offset: entries });
    }
    if target.is_empty() || target.contains(&0) {
        return Err(FormatError::Syntax { field: "target", offset: entries });
    }
    Ok(())
}

impl Tree {
    pub(super) const fn new() -> Self {
        Self { entries: 0, names: Vec::new(), next: Next::Root }
    }

    /// An error about what the tree says; the offset is the number of entries before it.
    const fn invalid(&self, field: &'static str) -> FormatError {
        FormatError::Syntax { field, offset: self.entries }
    }

    const fn limit(&self, field: &'static str, value: u64, max: u64) -> FormatError {
        FormatError::Limit { field, value, max, offset: self.entries }
    }

    /// The next node needs a name.
    pub(super) const fn wants_name(&self) -> bool {
        matches!(self.next, Next::Name)
    }

    /// The next item is a chunk.
    pub(super) const fn wants_chunk(&self) -> bool {
        matches!(self.next, Next::File(_))
    }

    /// The last name in the innermost open directory.
    pub(super) fn last_name(&self) -> &[u8] {
        self.names.last().map_or(&[], Vec::as_slice)
    }

    /// Names the next node: the first `shared` bytes of the name before it, then `rest`.
    pub(super) fn name(&mut self, shared: usize, rest: &[u8]) -> Result<(), FormatError> {
        let error = self.invalid("name of entry");
        let (Next::Name, Some(last)) = (&self.next, self.names.last_mut()) else { return Err(error) };
        let Some(first) = rest.first() else { return Err(error) };
        // One comparison for two rules: the name is behind the last one, and shares no more with it than is said.
        let follows = match last.get(shared) {
            Some(replaced) => first > replaced,
            None => shared == last.len(),
        };
        if !follows || rest.iter().any(|byte| matches!(byte, b'/' | 0)) {
            return Err(error);
        }
        last.truncate(shared);
        last.extend_from_slice(rest);
        if matches!(last.as_slice(), b"." | b"..") {
            return Err(error);
        }
        let length = last.len();
        if length > NAME_MAX {
            return Err(self.limit("length of name", length as u64, NAME_MAX as u64));
        }
        self.next = Next::Node;
        Ok(())
    }

    pub(super) fn directory(&mut self) -> Result<(), FormatError> {
        self.node()?;
        if self.names.len() == DEPTH_MAX {
            return Err(self.limit("depth of directories", DEPTH_MAX as u64 + 1, DEPTH_MAX as u64));
        }
        self.names.push(Vec::new());
        self.next = Next::Name;
        Ok(())
    }

    pub(super) fn end_directory(&mut self) -> Result<(), FormatError> {
        if !self.wants_name() || self.names.pop().is_none() {
            return Err(self.invalid("end of directory"));
        }
        self.node_done();
        Ok(())
    }

    pub(super) fn symlink(&mut self) -> Result<(), FormatError> {
        self.node()?;
        self.node_done();
        Ok(())
    }

    /// Starts a file; one of no bytes ends at once, with the id given back.
    pub(super) fn begin_file(&mut self, size: u64) -> Result<(), FormatError> {
        self.node()?;
        if size > NAR_SIZE_MAX {
            return Err(self.limit("size of file", size, NAR_SIZE_MAX));
        }
        let patches = PatchPlaces::default();
        self.next = Next::File(OpenFile { size, chunk_at: 0, offset: 0, first: None, patches });
        Ok(())
    }

    /// Bytes of the open file that no chunk has covered yet.
    pub(super) fn remaining(&self) -> Result<u64, FormatError> {
        match &self.next {
            Next::File(file) => Ok(file.size - file.offset),
            _ => Err(self.invalid("chunk outside of a file")),
        }
    }

    /// Takes the next chunk, whose length is not 0 and not more than what remains.
    pub(super) fn chunk(&mut self, id: ChunkId, length: u64) -> Result<(), FormatError> {
        let (error, too_long) = (self.invalid("chunk"), self.limit("length of chunk", length, CHUNK_MAX as u64));
        let Next::File(file) = &mut self.next else { return Err(error) };
        if length > CHUNK_MAX as u64 {
            return Err(too_long);
        }
        let whole = length == file.size;
        if length == 0 || length > file.size - file.offset || (file.size <= FILE_ID_INLINE_MAX && !whole) {
            return Err(error);
        }
        file.chunk_at = file.offset;
        file.offset += length;
        file.first.get_or_insert(id);
        Ok(())
    }

    /// Takes a patch that starts inside the last chunk.
    pub(super) fn patch(&mut self, patch: &Patch) -> Result<(), FormatError> {
        let error = self.invalid("patch outside of a file");
        let Next::File(file) = &mut self.next else { return Err(error) };
        file.patches.next(patch, file.chunk_at, file.offset)
    }

    /// The id of the open file where it follows from the chunks, none where it has to be given.
    pub(super) fn short_id(&self) -> Result<Option<FileId>, FormatError> {
        match &self.next {
            Next::File(file) if file.offset < file.size => Err(self.invalid("end of file")),
            Next::File(file) if file.size > FILE_ID_INLINE_MAX => Ok(None),
            Next::File(file) => Ok(Some(file.first.map_or_else(|| FileId::of(b""), |first| FileId::of_short(&first)))),
            _ => Err(self.invalid("end of file")),
        }
    }

    /// Ends the file, which `short_id` has found to be whole.
    pub(super) fn end_file(&mut self) {
        self.node_done();
    }

    /// The tree must be whole.
    pub(super) const fn finish(&self) -> Result<(), FormatError> {
        if matches!(self.next, Next::End) { Ok(()) } else { Err(self.invalid("end of manifest")) }
    }

    fn node(&mut self) -> Result<(), FormatError> {
        if !matches!(self.next, Next::Root | Next::Node) {
            return Err(self.invalid("entry"));
        }
        self.entries += 1;
        if self.entries > ENTRIES_MAX {
            return Err(self.limit("number of entries", self.entries, ENTRIES_MAX));
        }
        Ok(())
    }

    fn node_done(&mut self) {
        self.next = if self.names.is_empty() { Next::End } else { Next::Name };
    }
}
