//! Reads a manifest body, part by part, refusing any that the writer would not have written.

use super::column::{Column, ColumnInputs, Lengths};
use super::header::{ManifestHeader, PartRef};
use super::tree::{PatchPlaces, Tree, check_target};
use super::{part_max, shape};
use crate::error::FormatError;
use crate::id::{ChunkId, FileId, PartId};
use crate::lake::scrub::Patch;
use crate::limits::{CHUNK_MAX, TARGET_MAX};

/// What a manifest says next, in the order of the NAR.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ManifestEvent<'a> {
    /// A directory starts.
    Directory,
    /// The name of the next node of the directory.
    Entry {
        /// The name.
        name: &'a [u8],
    },
    /// The directory ends.
    EndDirectory,
    /// A symlink.
    Symlink {
        /// The scrubbed target.
        target: &'a [u8],
        /// What was taken out of it.
        patches: &'a [Patch],
    },
    /// A file starts.
    BeginFile {
        /// Its executable bit.
        executable: bool,
        /// Its bytes.
        size: u64,
    },
    /// The next chunk of the file.
    Chunk {
        /// Name of the chunk.
        id: ChunkId,
        /// Its bytes.
        length: u32,
    },
    /// A patch that starts inside the last chunk. A chunk and its patches are always in the same part.
    Patch(Patch),
    /// The file ends.
    EndFile {
        /// Name of its scrubbed bytes.
        file: FileId,
    },
}

/// Takes the parts of a manifest in order and gives its events. Memory is bounded by a part and the depth of the tree.
///
/// Events are given while the part is being read: one that turns out to be invalid may have given some.
#[derive(Clone, Debug)]
pub struct ManifestReader {
    entries: u64,
    parts: std::vec::IntoIter<PartRef>,
    tree: Tree,
    /// The columns of the part before, to see that it had no room for more.
    previous: Option<Lengths>,
    /// Parts read so far.
    read: usize,
    /// The patches of a symlink.
    patches: Vec<Patch>,
}

impl ManifestReader {
    /// A reader that expects the first part of this manifest.
    #[must_use]
    pub fn new(header: &ManifestHeader) -> Self {
        Self {
            entries: header.entries,
            parts: header.parts.clone().into_iter(),
            tree: Tree::new(),
            previous: None,
            read: 0,
            patches: Vec::new(),
        }
    }

    /// Reads the next part.
    ///
    /// # Errors
    /// When the bytes are not that part of a manifest, or `on` says so.
    pub fn part<E: From<FormatError>>(
        &mut self,
        bytes: &[u8],
        on: &mut impl FnMut(ManifestEvent<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let listed = self.parts.next().ok_or(FormatError::Syntax { field: "number of parts", offset: 0 })?;
        if bytes.len() as u64 != u64::from(listed.length) || PartId::of(bytes) != listed.id {
            return Err(FormatError::Checksum { field: "manifest part", offset: 0 }.into());
        }
        let entries_before = self.tree.entries;
        let mut columns = ColumnInputs::open(bytes)?;
        while self.item(&mut columns, on)? {
            if let Some(previous) = self.previous.take() {
                // The rule by which parts are cut: this item would not have fitted.
                let previous_number = self.read - 1;
                if previous.plus(columns.consumed()).part_len() <= part_max(previous_number) {
                    return Err(FormatError::Syntax { field: "cut between manifest parts", offset: 0 }.into());
                }
            }
        }
        if self.tree.entries - entries_before != u64::from(listed.entries) {
            return Err(FormatError::Syntax { field: "entries of part", offset: 0 }.into());
        }
        let lengths = columns.consumed();
        columns.finish()?;
        if lengths == Lengths::default() {
            return Err(FormatError::Syntax { field: "part without items", offset: 0 }.into());
        }
        self.previous = Some(lengths);
        self.read += 1;
        Ok(())
    }

    /// Checks that the manifest is whole.
    ///
    /// # Errors
    /// When parts are missing or the tree is not closed.
    pub fn finish(&self) -> Result<(), FormatError> {
        self.tree.finish()?;
        if self.parts.len() > 0 || self.tree.entries != self.entries {
            return Err(FormatError::Syntax { field: "end of manifest", offset: self.tree.entries });
        }
        Ok(())
    }

    /// Reads one item; false where the part has no more.
    fn item<E: From<FormatError>>(
        &mut self,
        columns: &mut ColumnInputs<'_>,
        on: &mut impl FnMut(ManifestEvent<'_>) -> Result<(), E>,
    ) -> Result<bool, E> {
        if self.tree.wants_chunk() {
            return self.chunk(columns, on);
        }
        if columns.column(Column::Shape).is_empty() {
            return Ok(false);
        }
        let offset = columns.column(Column::Shape).offset();
        let shape = columns.column(Column::Shape).u8("shape")?;
        if shape == shape::END_DIRECTORY {
            self.tree.end_directory()?;
            on(ManifestEvent::EndDirectory)?;
            return Ok(true);
        }
        if self.tree.wants_name() {
            let shared = columns.column(Column::NameLength).u8("shared length of name")?;
            let own = columns.column(Column::NameLength).u8("own length of name")?;
            self.tree.name(shared.into(), columns.column(Column::Name).take("name", own.into())?)?;
            on(ManifestEvent::Entry { name: self.tree.last_name() })?;
        }
        match shape {
            shape::DIRECTORY => {
                self.tree.directory()?;
                on(ManifestEvent::Directory)?;
            }
            shape::FILE | shape::EXECUTABLE => {
                let size = columns.column(Column::Size).varint("size of file")?;
                self.tree.begin_file(size)?;
                on(ManifestEvent::BeginFile { executable: shape == shape::EXECUTABLE, size })?;
                if size == 0 {
                    self.end_file(columns, on)?;
                }
            }
            shape::SYMLINK => self.symlink(columns, on)?,
            _ => return Err(FormatError::Syntax { field: "shape", offset }.into()),
        }
        Ok(true)
    }

    fn symlink<E: From<FormatError>>(
        &mut self,
        columns: &mut ColumnInputs<'_>,
        on: &mut impl FnMut(ManifestEvent<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        self.tree.symlink()?;
        let number = columns.column(Column::Size).varint_max("length of target", (TARGET_MAX as u64) << 1 | 1)?;
        let length = number >> 1;
        let target = columns.column(Column::Target).take("target", usize::try_from(length).unwrap_or(usize::MAX))?;
        check_target(target, self.tree.entries)?;
        self.patches.clear();
        let mut places = PatchPlaces::default();
        for _ in 0..patch_count(columns, number)? {
            let patch = read_patch(columns)?;
            places.next(&patch, 0, length)?;
            self.patches.push(patch);
        }
        on(ManifestEvent::Symlink { target, patches: &self.patches })
    }

    /// Reads a chunk with its patches, and with the last one of a file the file's end.
    fn chunk<E: From<FormatError>>(
        &mut self,
        columns: &mut ColumnInputs<'_>,
        on: &mut impl FnMut(ManifestEvent<'_>) -> Result<(), E>,
    ) -> Result<bool, E> {
        if columns.column(Column::Chunk).is_empty() {
            return Ok(false);
        }
        let remaining = self.tree.remaining()?;
        let offset = columns.column(Column::Chunk).offset();
        let number = columns.column(Column::Chunk).varint_max("length of chunk", (CHUNK_MAX as u64) << 1 | 1)?;
        // Zero stands for all that remains, and nothing else does.
        let length = match number >> 1 {
            0 => remaining,
            length if length < remaining => length,
            _ => return Err(FormatError::Syntax { field: "length of chunk", offset }.into()),
        };
        let id = ChunkId::from_bytes(columns.column(Column::Id).array("chunk id")?);
        self.tree.chunk(id, length)?;
        let length = u32::try_from(length).map_err(|_| FormatError::Syntax { field: "length of chunk", offset })?;
        on(ManifestEvent::Chunk { id, length })?;
        for _ in 0..patch_count(columns, number)? {
            let patch = read_patch(columns)?;
            self.tree.patch(&patch)?;
            on(ManifestEvent::Patch(patch))?;
        }
        if self.tree.remaining()? == 0 {
            self.end_file(columns, on)?;
        }
        Ok(true)
    }

    fn end_file<E: From<FormatError>>(
        &mut self,
        columns: &mut ColumnInputs<'_>,
        on: &mut impl FnMut(ManifestEvent<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let file = match self.tree.short_id()? {
            Some(file) => file,
            None => FileId::from_bytes(columns.column(Column::Id).array("file id")?),
        };
        self.tree.end_file();
        on(ManifestEvent::EndFile { file })
    }
}

/// The number of patches of a symlink or chunk, whose own number says in its lowest bit whether there are any.
fn patch_count(columns: &mut ColumnInputs<'_>, number: u64) -> Result<u64, FormatError> {
    if number & 1 == 0 {
        return Ok(0);
    }
    let offset = columns.column(Column::Patch).offset();
    match columns.column(Column::Patch).varint("number of patches")? {
        0 => Err(FormatError::Syntax { field: "number of patches", offset }),
        count => Ok(count),
    }
}

fn read_patch(columns: &mut ColumnInputs<'_>) -> Result<Patch, FormatError> {
    let input = columns.column(Column::Patch);
    let gap = input.varint("gap of patch")?;
    let offset = input.offset();
    let number = input.varint("string of patch")?;
    let string = u32::try_from(number >> 1).map_err(|_| FormatError::Syntax { field: "string of patch", offset })?;
    Ok(Patch { gap, string, hash_only: number & 1 == 1 })
}
