//! A manifest's events to a tree.

use narlake_format::error::FormatError;
use narlake_format::id::{ChunkId, FileId, ManifestId};
use narlake_format::lake::manifest::ManifestEvent;
use narlake_format::lake::scrub::Patch;

use super::EntryNumber;
use super::layout::{self, CHECKED_LEN, Layout};
use crate::fs::attr::Kind;

/// Places in a row of `files`.
const CHUNKS_START: usize = 0;
const CHUNKS_END: usize = 1;
const PATCHES_END: usize = 3;

/// The columns as they grow; the module above says what is in them.
#[derive(Default)]
struct Columns {
    entries: Vec<[u32; 3]>,
    directories: Vec<[u32; 2]>,
    children: Vec<EntryNumber>,
    files: Vec<[u32; 4]>,
    sizes: Vec<u64>,
    file_ids: Vec<FileId>,
    links: Vec<[u32; 4]>,
    chunks: Vec<ChunkId>,
    chunk_ends: Vec<u64>,
    patches: Vec<Patch>,
    names: Vec<u8>,
    targets: Vec<u8>,
}

impl Columns {
    fn encode(&self, manifest: ManifestId) -> Result<Vec<u8>, FormatError> {
        let counts = [
            self.entries.len(),
            self.directories.len(),
            self.children.len(),
            self.files.len(),
            self.links.len(),
            self.chunks.len(),
            self.patches.len(),
            self.names.len(),
            self.targets.len(),
        ];
        let mut numbers = [0; 9];
        for (to, count) in numbers.iter_mut().zip(counts) {
            *to = number(count)?;
        }
        let layout = Layout::new(manifest, numbers);
        let mut out = layout.encode();
        // Where the checksum goes.
        out.resize(CHECKED_LEN + 32, 0);
        let numbers = |out: &mut Vec<u8>, column: &mut dyn Iterator<Item = u32>| {
            column.for_each(|number| out.extend_from_slice(&number.to_le_bytes()));
            pad(out);
        };
        let long = |out: &mut Vec<u8>, column: &[u64]| {
            column.iter().for_each(|number| out.extend_from_slice(&number.to_le_bytes()));
        };
        long(&mut out, &self.chunk_ends);
        long(&mut out, &self.sizes);
        for patch in &self.patches {
            out.extend_from_slice(&patch.gap.to_le_bytes());
            out.extend_from_slice(&patch.string.to_le_bytes());
            out.extend_from_slice(&u32::from(patch.hash_only).to_le_bytes());
        }
        numbers(&mut out, &mut self.entries.iter().flatten().copied());
        numbers(&mut out, &mut self.directories.iter().flatten().copied());
        numbers(&mut out, &mut self.children.iter().copied());
        numbers(&mut out, &mut self.files.iter().flatten().copied());
        numbers(&mut out, &mut self.links.iter().flatten().copied());
        self.file_ids.iter().for_each(|id| out.extend_from_slice(id.as_bytes()));
        self.chunks.iter().for_each(|id| out.extend_from_slice(id.as_bytes()));
        out.extend_from_slice(&self.names);
        pad(&mut out);
        out.extend_from_slice(&self.targets);
        pad(&mut out);
        let (header, columns) = out.split_at_mut(CHECKED_LEN + 32);
        let (checked, check) = header.split_at_mut(CHECKED_LEN);
        let hash = blake3::Hasher::new().update(checked).update(columns).finalize();
        check.copy_from_slice(hash.as_bytes());
        Ok(out)
    }
}

fn pad(out: &mut Vec<u8>) {
    out.resize(out.len().next_multiple_of(8), 0);
}

/// Builds a [`super::Tree`] from the events of a manifest.
#[derive(Default)]
pub struct TreeBuilder {
    tree: Columns,
    /// The directories that are open, with the children met so far.
    open: Vec<(EntryNumber, Vec<EntryNumber>)>,
    /// Whether the next node's name has been given.
    named: bool,
}

impl TreeBuilder {
    /// Takes the next event.
    ///
    /// # Errors
    /// When the events are not those of a tree, or of one larger than numbers here can hold. A manifest reader lets
    /// neither through.
    pub fn event(&mut self, event: ManifestEvent<'_>) -> Result<(), FormatError> {
        match event {
            ManifestEvent::Entry { name } => {
                if self.named || self.open.is_empty() {
                    return Err(self.misplaced("entry name"));
                }
                self.named = true;
                self.tree.names.extend_from_slice(name);
            }
            ManifestEvent::Directory => {
                let index = number(self.tree.directories.len())?;
                let entry = self.node(Kind::Directory, index)?;
                self.tree.directories.push([0, 0]);
                self.open.push((entry, Vec::new()));
            }
            ManifestEvent::EndDirectory => {
                let (entry, children) = self.open.pop().ok_or_else(|| self.misplaced("end of directory"))?;
                let start = number(self.tree.children.len())?;
                self.tree.children.extend_from_slice(&children);
                let end = number(self.tree.children.len())?;
                let what = self.tree.entries.get(entry as usize).map_or(0, |[_, _, what]| *what);
                let (_, row) = layout::unpack(what);
                if let Some(range) = self.tree.directories.get_mut(row) {
                    *range = [start, end];
                }
            }
            ManifestEvent::Symlink { target, patches } => {
                let index = number(self.tree.links.len())?;
                self.node(Kind::Symlink, index)?;
                let (target_start, patches_start) =
                    (number(self.tree.targets.len())?, number(self.tree.patches.len())?);
                self.tree.targets.extend_from_slice(target);
                self.tree.patches.extend_from_slice(patches);
                let (target_end, patches_end) = (number(self.tree.targets.len())?, number(self.tree.patches.len())?);
                self.tree.links.push([target_start, target_end, patches_start, patches_end]);
            }
            ManifestEvent::BeginFile { executable, size } => {
                let index = number(self.tree.files.len())?;
                self.node(Kind::File { executable }, index)?;
                let (chunks, patches) = (number(self.tree.chunks.len())?, number(self.tree.patches.len())?);
                self.tree.files.push([chunks, chunks, patches, patches]);
                self.tree.sizes.push(size);
            }
            ManifestEvent::Chunk { id, length } => {
                let start = self.file_end();
                self.tree.chunks.push(id);
                self.tree.chunk_ends.push(start + u64::from(length));
                let end = number(self.tree.chunks.len())?;
                let at = self.offset();
                let file = self.tree.files.last_mut();
                file.ok_or(FormatError::Syntax { field: "chunk", offset: at })?[CHUNKS_END] = end;
            }
            ManifestEvent::Patch(patch) => {
                self.tree.patches.push(patch);
                let end = number(self.tree.patches.len())?;
                let at = self.offset();
                let file = self.tree.files.last_mut();
                file.ok_or(FormatError::Syntax { field: "patch", offset: at })?[PATCHES_END] = end;
            }
            ManifestEvent::EndFile { file: id } => {
                let (end, at) = (self.file_end(), self.offset());
                if self.tree.sizes.last() != Some(&end) {
                    return Err(FormatError::Syntax { field: "file size", offset: at });
                }
                self.tree.file_ids.push(id);
                if self.tree.file_ids.len() != self.tree.files.len() {
                    return Err(FormatError::Syntax { field: "end of file", offset: at });
                }
            }
        }
        Ok(())
    }

    /// The bytes of the tree, which belongs to this manifest.
    ///
    /// # Errors
    /// When it is not whole.
    pub fn finish(self, manifest: &ManifestId) -> Result<Vec<u8>, FormatError> {
        let tree = &self.tree;
        if !self.open.is_empty() || self.named || tree.entries.is_empty() || tree.file_ids.len() != tree.files.len() {
            return Err(FormatError::Truncated { field: "tree", offset: self.offset() });
        }
        tree.encode(*manifest)
    }

    /// Adds a node below the innermost open directory.
    fn node(&mut self, kind: Kind, index: u32) -> Result<EntryNumber, FormatError> {
        let entry = number(self.tree.entries.len())?;
        let is_root = entry == 0;
        if self.named == is_root || (!is_root && self.open.is_empty()) {
            return Err(self.misplaced("node"));
        }
        self.named = false;
        let mut parent = 0;
        if let Some((directory, children)) = self.open.last_mut() {
            parent = *directory;
            children.push(entry);
        }
        self.tree.entries.push([parent, number(self.tree.names.len())?, layout::pack(kind, index)]);
        Ok(entry)
    }

    /// Where the open file's last chunk ends.
    fn file_end(&self) -> u64 {
        let file = self.tree.files.last();
        let has_chunks = file.is_some_and(|file| file[CHUNKS_END] > file[CHUNKS_START]);
        if has_chunks { self.tree.chunk_ends.last().copied().unwrap_or(0) } else { 0 }
    }

    /// There is no byte offset here: the entry's number stands for it.
    fn offset(&self) -> u64 {
        self.tree.entries.len() as u64
    }

    fn misplaced(&self, field: &'static str) -> FormatError {
        FormatError::Syntax { field, offset: self.offset() }
    }
}

fn number(value: usize) -> Result<u32, FormatError> {
    u32::try_from(value).map_err(|_| FormatError::Limit {
        field: "size of tree",
        value: value as u64,
        max: u64::from(u32::MAX),
        offset: 0,
    })
}
