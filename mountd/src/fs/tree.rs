//! A store object's tree: what the kernel asks about an object between its first lookup and its pages.
//!
//! A tree is one stretch of bytes in columns that are read where they lie, so it is the same in a mapped file
//! ([`super::trees`]) and in memory:
//!
//! ```text
//! header       "NLTREE01"
//!         32   ManifestId
//!         36   numbers of entries, directories, children, files, links, chunks, patches, bytes of names, bytes of targets
//!          4   zero
//!         32   BLAKE3 of the 80 bytes before it and of all behind it
//! chunk ends    8 per chunk: where it ends in its file
//! sizes         8 per file
//! patches      16 each: gap 8, string 4, whether only its hash part 4
//! entries      12 each: the directory it is in 4, end of its name 4, kind (2 bits) and row of that kind (30 bits) 4
//! directories   8 each: start and end of its children
//! children      4 each: entries, each directory's side by side and sorted by name
//! files        16 each: start and end of its chunks, start and end of its patches
//! links        16 each: start and end of its target, start and end of its patches
//! file ids     32 per file
//! chunks       32 each
//! names        end to end, that of the root empty
//! targets      end to end, scrubbed
//! ```
//!
//! Numbers are little endian; each column begins at a multiple of 8. What a listing or `stat` touches lies apart from
//! what only reads of content need: of a million files the former is some 40 MiB, and the latter is never mapped in.
//!
//! Entries are numbered in NAR order, the root first. An entry is found in its directory by binary search, since NAR
//! order is sorted bytewise. The tree holds scrubbed lengths and patches; restoring is done by whoever reads (`reader`).
//! A tree is immutable, and determined by its manifest: entry numbers are the same in every process that loads it.

mod build;
mod layout;

use std::fs::File;
use std::io::{self, Read};

use narlake_format::error::FormatError;
use narlake_format::id::{ChunkId, ContentId, FileId, ManifestId};
use narlake_format::lake::scrub::{Patch, PatchList};
use narlake_format::lake::strings::StringTable;
use narlake_storage::map::{MappedFile, column};

pub use self::build::TreeBuilder;
use self::layout::{CHECKED_LEN, Column, HEADER_LEN, Layout, PATCH_LEN};
use crate::fs::attr::Kind;

/// Number of an entry in its object; 0 is the object's root.
pub type EntryNumber = u32;

/// What a mapped tree counts for in memory, in bytes: its page tables and what the process keeps of it. It also bounds
/// the number of maps, of which the kernel allows a process 65,530.
const MAP_BYTES: u64 = 8192;

/// Bytes that are read at once to verify a file.
const READ: usize = 128 * 1024;

/// One store object's tree.
#[derive(Debug)]
pub struct Tree {
    map: MappedFile,
    layout: Layout,
    on_disk: bool,
}

/// A file of a tree.
#[derive(Debug, Clone, Copy)]
pub struct TreeFile<'a> {
    /// Name of its scrubbed bytes.
    pub id: FileId,
    /// Its bytes.
    pub size: u64,
    /// Its chunks.
    pub chunks: &'a [ChunkId],
    /// Per chunk, where it ends in the file.
    pub chunk_ends: &'a [u64],
    /// What was scrubbed out of it.
    pub patches: Patches<'a>,
}

impl TreeFile<'_> {
    /// Name of its restored bytes, given the string table of its object.
    ///
    /// # Errors
    /// When its patches do not fit.
    pub fn content(&self, table: &StringTable) -> Result<ContentId, FormatError> {
        let patches = PatchList::resolve(&self.patches.to_vec(), table, self.size)?;
        Ok(if patches.is_empty() { self.id.into() } else { patches.content_id(&self.id) })
    }
}

/// A symlink of a tree.
#[derive(Debug, Clone, Copy)]
pub struct TreeLink<'a> {
    /// Its scrubbed target.
    pub target: &'a [u8],
    /// What was scrubbed out of it.
    pub patches: Patches<'a>,
}

/// Patches as they lie in a tree.
#[derive(Debug, Clone, Copy)]
pub struct Patches<'a>(&'a [u8]);

impl Patches<'_> {
    /// There are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The patches.
    #[must_use]
    pub fn to_vec(&self) -> Vec<Patch> {
        let (rows, _) = self.0.as_chunks::<PATCH_LEN>();
        let patch = |row: &[u8; PATCH_LEN]| {
            let [g0, g1, g2, g3, g4, g5, g6, g7, s0, s1, s2, s3, hash_only, ..] = *row;
            Patch {
                gap: u64::from_le_bytes([g0, g1, g2, g3, g4, g5, g6, g7]),
                string: u32::from_le_bytes([s0, s1, s2, s3]),
                hash_only: hash_only != 0,
            }
        };
        rows.iter().map(patch).collect()
    }
}

/// What was found of an entry.
#[derive(Debug, Clone, Copy)]
struct Row {
    kind: Kind,
    index: usize,
}

impl Tree {
    /// The tree in these bytes, which a [`TreeBuilder`] made, in memory.
    ///
    /// # Errors
    /// When there is no memory, or the bytes are no tree.
    pub fn in_memory(bytes: &[u8]) -> io::Result<Self> {
        let layout = Layout::decode(bytes).filter(|layout| layout.len() == bytes.len());
        let layout = layout.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not a tree"))?;
        Ok(Self { map: MappedFile::in_memory(bytes)?, layout, on_disk: false })
    }

    /// The tree of this manifest in a file, read through once to see that it is what was written; then mapped. `None`
    /// if it is anything else. Blocks.
    ///
    /// # Errors
    /// When the file cannot be read or mapped.
    pub fn mapped(file: &File, manifest: &ManifestId) -> io::Result<Option<Self>> {
        let mut header = [0; HEADER_LEN];
        let mut reader = file;
        match reader.read_exact(&mut header) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            read => read?,
        }
        let length = file.metadata()?.len();
        let layout = Layout::decode(&header).filter(|layout| layout.len() as u64 == length);
        let Some(layout) = layout.filter(|layout| layout.manifest == *manifest) else { return Ok(None) };
        // By reads, not through the map: what is mapped in counts as memory of this process.
        let mut hasher = blake3::Hasher::new();
        let (checked, check) = header.split_at(CHECKED_LEN);
        hasher.update(checked);
        let mut buffer = vec![0; READ];
        loop {
            let read = reader.read(&mut buffer)?;
            if read == 0 {
                break;
            }
            hasher.update(buffer.get(..read).unwrap_or_default());
        }
        if hasher.finalize().as_bytes() != check {
            return Ok(None);
        }
        Ok(Some(Self { map: MappedFile::of(file)?, layout, on_disk: true }))
    }

    /// Number of entries.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.layout.entries()
    }

    /// There is not even a root: no manifest gives such a tree.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// About how many bytes of this process's memory it takes that the kernel cannot take back.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        if self.on_disk { MAP_BYTES } else { self.map.as_ref().len() as u64 }
    }

    /// What the entry is; `None` if there is none of this number.
    #[must_use]
    pub fn kind(&self, entry: EntryNumber) -> Option<Kind> {
        self.row(entry).map(|row| row.kind)
    }

    /// The directory that holds the entry; the root's is the root.
    #[must_use]
    pub fn parent(&self, entry: EntryNumber) -> Option<EntryNumber> {
        self.numbers::<3>(Column::Entries, entry as usize).map(|[parent, ..]| parent)
    }

    /// The entry's name; empty for the root.
    #[must_use]
    pub fn name(&self, entry: EntryNumber) -> &[u8] {
        let end_of = |entry: usize| self.numbers::<3>(Column::Entries, entry).map_or(0, |[_, end, _]| end as usize);
        let entry = entry as usize;
        let start = entry.checked_sub(1).map_or(0, end_of);
        self.column(Column::Names).get(start..end_of(entry)).unwrap_or_default()
    }

    /// The entries of a directory, sorted by name; `None` if the entry is no directory.
    #[must_use]
    pub fn children(&self, directory: EntryNumber) -> Option<&[EntryNumber]> {
        let row = self.row(directory).filter(|row| row.kind == Kind::Directory)?;
        let [start, end] = self.numbers(Column::Directories, row.index)?;
        column::<u32>(self.column(Column::Children))?.get(start as usize..end as usize)
    }

    /// The entry of this name in a directory.
    #[must_use]
    pub fn child(&self, directory: EntryNumber, name: &[u8]) -> Option<EntryNumber> {
        let children = self.children(directory)?;
        let at = children.binary_search_by(|child| self.name(*child).cmp(name)).ok()?;
        children.get(at).copied()
    }

    /// The file of this number; `None` if the entry is none.
    #[must_use]
    pub fn file(&self, entry: EntryNumber) -> Option<TreeFile<'_>> {
        let row = self.row(entry).filter(|row| matches!(row.kind, Kind::File { .. }))?;
        let [start, end, patches_start, patches_end] = self.numbers(Column::Files, row.index)?;
        let (ids, _) = self.column(Column::FileIds).as_chunks::<32>();
        let chunks = start as usize..end as usize;
        Some(TreeFile {
            id: FileId::from_bytes(*ids.get(row.index)?),
            size: self.file_size(row)?,
            chunks: column::<ChunkId>(self.column(Column::Chunks))?.get(chunks.clone())?,
            chunk_ends: column::<u64>(self.column(Column::ChunkEnds))?.get(chunks)?,
            patches: self.patches(patches_start, patches_end)?,
        })
    }

    /// The symlink of this number; `None` if the entry is none.
    #[must_use]
    pub fn link(&self, entry: EntryNumber) -> Option<TreeLink<'_>> {
        let row = self.row(entry).filter(|row| row.kind == Kind::Symlink)?;
        let [start, end, patches_start, patches_end] = self.numbers(Column::Links, row.index)?;
        Some(TreeLink {
            target: self.column(Column::Targets).get(start as usize..end as usize)?,
            patches: self.patches(patches_start, patches_end)?,
        })
    }

    /// Size as `stat` shows it: a file's bytes, or the length of a symlink's target.
    #[must_use]
    pub fn size(&self, entry: EntryNumber) -> u64 {
        match self.row(entry) {
            Some(row @ Row { kind: Kind::File { .. }, .. }) => self.file_size(row).unwrap_or(0),
            Some(Row { kind: Kind::Symlink, .. }) => self.link(entry).map_or(0, |link| link.target.len() as u64),
            Some(Row { kind: Kind::Directory, .. }) | None => 0,
        }
    }

    /// The entry's path below the object's root, for messages; empty for the root.
    #[must_use]
    pub fn path(&self, entry: EntryNumber) -> String {
        let mut names = Vec::new();
        let mut at = entry;
        while at != 0 {
            names.push(String::from_utf8_lossy(self.name(at)));
            // Parents have smaller numbers, so this ends.
            match self.parent(at) {
                Some(parent) if parent < at => at = parent,
                _ => break,
            }
        }
        names.reverse();
        names.join("/")
    }

    fn row(&self, entry: EntryNumber) -> Option<Row> {
        let [_, _, what] = self.numbers(Column::Entries, entry as usize)?;
        let (kind, index) = layout::unpack(what);
        Some(Row { kind, index })
    }

    fn file_size(&self, row: Row) -> Option<u64> {
        column::<u64>(self.column(Column::Sizes))?.get(row.index).copied()
    }

    fn patches(&self, start: u32, end: u32) -> Option<Patches<'_>> {
        let range = start as usize * PATCH_LEN..end as usize * PATCH_LEN;
        self.column(Column::Patches).get(range).map(Patches)
    }

    /// One row of a column of numbers.
    fn numbers<const N: usize>(&self, of: Column, row: usize) -> Option<[u32; N]> {
        let (rows, _) = column::<u32>(self.column(of))?.as_chunks::<N>();
        rows.get(row).copied()
    }

    fn column(&self, column: Column) -> &[u8] {
        self.map.as_ref().get(self.layout.range(column)).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests;
