//! Writes a manifest body as the entries of a NAR go by.

use super::column::{Column, Columns};
use super::header::{ManifestHeader, PARTS_MAX, PartRef};
use super::tree::{PatchPlaces, Tree, check_target};
use super::{part_max, shape};
use crate::error::FormatError;
use crate::id::{ChunkId, FileId, ManifestId, PartId};
use crate::lake::chunker::ChunkerVersion;
use crate::lake::scrub::{Patch, ScrubVersion};
use crate::lake::wire::put_varint;

/// A complete part.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Part {
    /// Name of the part.
    pub id: PartId,
    /// The part.
    pub bytes: Vec<u8>,
    /// Entries that begin in it.
    pub entries: u32,
}

/// A complete manifest.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Finished {
    /// The parts that `take_parts` has not given out.
    pub parts: Vec<Part>,
    /// The header, which lists all parts.
    pub header: ManifestHeader,
    /// The header's bytes.
    pub header_bytes: Vec<u8>,
    /// The manifest's name.
    pub id: ManifestId,
}

/// Takes the events of a tree and gives parts. Memory is bounded by one part and those not taken yet.
///
/// Methods fail on a tree that no NAR has: events out of order, names that are none or not ascending, sizes and counts
/// beyond their limits. After an error the manifest is void.
pub struct ManifestWriter {
    scrub: ScrubVersion,
    chunker: ChunkerVersion,
    tree: Tree,
    /// The item being put together: what a part is never cut inside of.
    item: Columns,
    item_entries: u32,
    /// The last chunk, whose patches are still coming: the value for the chunk column without its lowest bit.
    chunk: Option<u64>,
    patches: u64,
    patch_bytes: Vec<u8>,
    /// The part being filled.
    part: Columns,
    part_entries: u32,
    parts: Vec<Part>,
    list: Vec<PartRef>,
}

impl ManifestWriter {
    /// An empty manifest.
    #[must_use]
    pub fn new(scrub: ScrubVersion, chunker: ChunkerVersion) -> Self {
        Self {
            scrub,
            chunker,
            tree: Tree::new(),
            item: Columns::default(),
            item_entries: 0,
            chunk: None,
            patches: 0,
            patch_bytes: Vec::new(),
            part: Columns::default(),
            part_entries: 0,
            parts: Vec::new(),
            list: Vec::new(),
        }
    }

    /// Starts a directory.
    ///
    /// # Errors
    /// Where the tree is not one.
    pub fn directory(&mut self) -> Result<(), FormatError> {
        self.tree.directory()?;
        self.node(shape::DIRECTORY);
        self.commit()
    }

    /// Names the next node of the directory.
    ///
    /// # Errors
    /// Where the tree is not one.
    pub fn entry(&mut self, name: &[u8]) -> Result<(), FormatError> {
        let shared = self.tree.last_name().iter().zip(name).take_while(|(a, b)| a == b).count();
        let rest = name.get(shared..).unwrap_or_default();
        self.tree.name(shared, rest)?;
        let error = FormatError::Syntax { field: "name of entry", offset: self.tree.entries };
        let (Ok(shared), Ok(own)) = (u8::try_from(shared), u8::try_from(rest.len())) else { return Err(error) };
        self.item.column(Column::NameLength).extend([shared, own]);
        self.item.column(Column::Name).extend_from_slice(rest);
        Ok(())
    }

    /// Ends the directory.
    ///
    /// # Errors
    /// Where the tree is not one.
    pub fn end_directory(&mut self) -> Result<(), FormatError> {
        self.tree.end_directory()?;
        self.item.column(Column::Shape).push(shape::END_DIRECTORY);
        self.commit()
    }

    /// Adds a symlink: its scrubbed target and what was taken out of it.
    ///
    /// # Errors
    /// Where the tree is not one.
    pub fn symlink(&mut self, target: &[u8], patches: &[Patch]) -> Result<(), FormatError> {
        self.tree.symlink()?;
        check_target(target, self.tree.entries)?;
        let length = target.len() as u64;
        self.node(shape::SYMLINK);
        let mut places = PatchPlaces::default();
        for patch in patches {
            places.next(patch, 0, length)?;
            self.put_patch(*patch);
        }
        self.item.column(Column::Target).extend_from_slice(target);
        self.put_patched(Column::Size, length << 1);
        self.commit()
    }

    /// Starts a file.
    ///
    /// # Errors
    /// Where the tree is not one.
    pub fn begin_file(&mut self, executable: bool, size: u64) -> Result<(), FormatError> {
        self.tree.begin_file(size)?;
        self.node(if executable { shape::EXECUTABLE } else { shape::FILE });
        put_varint(size, self.item.column(Column::Size));
        self.commit()
    }

    /// Adds the next chunk of the file.
    ///
    /// # Errors
    /// Where the tree is not one.
    pub fn chunk(&mut self, id: ChunkId, length: u32) -> Result<(), FormatError> {
        self.end_chunk()?;
        let last = self.tree.remaining()? == u64::from(length);
        self.tree.chunk(id, length.into())?;
        self.item.column(Column::Id).extend_from_slice(id.as_bytes());
        self.chunk = Some(if last { 0 } else { u64::from(length) << 1 });
        Ok(())
    }

    /// Adds a patch that starts inside the last chunk.
    ///
    /// # Errors
    /// Where the tree is not one.
    pub fn patch(&mut self, patch: Patch) -> Result<(), FormatError> {
        self.tree.patch(&patch)?;
        self.put_patch(patch);
        Ok(())
    }

    /// Ends the file.
    ///
    /// # Errors
    /// Where the tree is not one, or the id is not that of the file's one chunk.
    pub fn end_file(&mut self, file: FileId) -> Result<(), FormatError> {
        match self.tree.short_id()? {
            None => self.item.column(Column::Id).extend_from_slice(file.as_bytes()),
            Some(id) if id == file => {}
            Some(_) => return Err(FormatError::Checksum { field: "file id", offset: self.tree.entries }),
        }
        self.end_chunk()?;
        self.tree.end_file();
        Ok(())
    }

    /// The parts completed since the last call.
    pub fn take_parts(&mut self) -> Vec<Part> {
        std::mem::take(&mut self.parts)
    }

    /// Ends the manifest.
    ///
    /// # Errors
    /// Where the tree is not whole, or too large for any manifest.
    pub fn finish(mut self) -> Result<Finished, FormatError> {
        self.tree.finish()?;
        self.close_part()?;
        let (scrub, chunker, entries) = (self.scrub, self.chunker, self.tree.entries);
        let header = ManifestHeader { scrub, chunker, entries, parts: self.list };
        let header_bytes = header.encode();
        let id = ManifestId::of(&header_bytes);
        Ok(Finished { parts: self.parts, header, header_bytes, id })
    }

    fn node(&mut self, shape: u8) {
        self.item.column(Column::Shape).push(shape);
        self.item_entries += 1;
    }

    fn put_patch(&mut self, patch: Patch) {
        self.patches += 1;
        put_varint(patch.gap, &mut self.patch_bytes);
        put_varint(u64::from(patch.string) << 1 | u64::from(patch.hash_only), &mut self.patch_bytes);
    }

    /// Writes a number whose lowest bit says that patches follow, and the patches put since the last.
    fn put_patched(&mut self, column: Column, number: u64) {
        put_varint(number | u64::from(self.patches > 0), self.item.column(column));
        if self.patches > 0 {
            put_varint(self.patches, self.item.column(Column::Patch));
            self.item.column(Column::Patch).append(&mut self.patch_bytes);
            self.patches = 0;
        }
    }

    fn end_chunk(&mut self) -> Result<(), FormatError> {
        let Some(number) = self.chunk.take() else { return Ok(()) };
        self.put_patched(Column::Chunk, number);
        self.commit()
    }

    /// Puts the item into the part, or into the next one where the part has no room.
    fn commit(&mut self) -> Result<(), FormatError> {
        if self.part.lengths().plus(self.item.lengths()).part_len() > part_max(self.list.len()) {
            self.close_part()?;
        }
        self.part.append(&mut self.item);
        self.part_entries += std::mem::take(&mut self.item_entries);
        Ok(())
    }

    fn close_part(&mut self) -> Result<(), FormatError> {
        assert!(!self.part.is_empty(), "no item is longer than a part");
        let bytes = self.part.take_part();
        assert!(bytes.len() <= part_max(self.list.len()), "length of a part");
        let (id, entries) = (PartId::of(&bytes), std::mem::take(&mut self.part_entries));
        let length = u32::try_from(bytes.len()).expect("parts are small");
        if self.list.len() == PARTS_MAX {
            let (value, max) = (PARTS_MAX as u64 + 1, PARTS_MAX as u64);
            return Err(FormatError::Limit { field: "number of parts", value, max, offset: self.tree.entries });
        }
        self.list.push(PartRef { id, entries, length });
        self.parts.push(Part { id, bytes, entries });
        Ok(())
    }
}
