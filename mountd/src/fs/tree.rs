//! A store object's tree, in memory: what the kernel asks about an object between its first lookup and its pages.
//!
//! Entries are numbered in NAR order, the root first, and lie in columns beside each other: a million files cost about
//! a hundred megabytes. An entry is found in its directory by binary search, since NAR order is sorted bytewise. The
//! tree holds scrubbed lengths and patches; restoring is done by whoever reads (`reader`).
//!
//! A tree is immutable, and determined by its manifest: entry numbers are the same in every process that loads it.

use std::ops::Range;

use narlake_format::error::FormatError;
use narlake_format::id::{ChunkId, FileId};
use narlake_format::lake::manifest::ManifestEvent;
use narlake_format::lake::scrub::Patch;

use crate::fs::attr::Kind;

/// Number of an entry in its object; 0 is the object's root.
pub type EntryNumber = u32;

/// One store object's tree.
#[derive(Debug, Default)]
pub struct Tree {
    /// Names end to end, that of the root empty.
    names: Vec<u8>,
    /// Per entry: the directory it is in. The root is its own.
    parents: Vec<EntryNumber>,
    /// Per entry: where its name ends in `names`; it starts where the one before ends.
    name_ends: Vec<u32>,
    /// Per entry: what it is, and which row of `directories`, `files` or `links` describes it.
    rows: Vec<Row>,
    /// The children of all directories, each directory's side by side and sorted by name.
    children: Vec<EntryNumber>,
    /// Per directory: its children.
    directories: Vec<Range<u32>>,
    files: Vec<FileRow>,
    links: Vec<LinkRow>,
    /// Targets end to end, scrubbed.
    targets: Vec<u8>,
    chunks: Vec<ChunkId>,
    /// Per chunk: where it ends in its file.
    chunk_ends: Vec<u64>,
    patches: Vec<Patch>,
}

#[derive(Debug, Clone, Copy)]
struct Row {
    kind: Kind,
    index: u32,
}

#[derive(Debug, Clone, Copy)]
struct FileRow {
    id: FileId,
    size: u64,
    chunks_end: u32,
    patches_end: u32,
    chunks_start: u32,
    patches_start: u32,
}

#[derive(Debug, Clone, Copy)]
struct LinkRow {
    target_start: u32,
    target_end: u32,
    patches_start: u32,
    patches_end: u32,
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
    pub patches: &'a [Patch],
}

/// A symlink of a tree.
#[derive(Debug, Clone, Copy)]
pub struct TreeLink<'a> {
    /// Its scrubbed target.
    pub target: &'a [u8],
    /// What was scrubbed out of it.
    pub patches: &'a [Patch],
}

impl Tree {
    /// Number of entries.
    #[must_use]
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// There is not even a root: no manifest gives such a tree.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// About how many bytes of memory it takes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let per = |count: usize, size: usize| (count * size) as u64;
        size_of::<Self>() as u64
            + per(self.names.len() + self.targets.len(), 1)
            + per(self.parents.len() + self.name_ends.len() + self.children.len(), 4)
            + per(self.rows.len(), size_of::<Row>())
            + per(self.directories.len(), size_of::<Range<u32>>())
            + per(self.files.len(), size_of::<FileRow>())
            + per(self.links.len(), size_of::<LinkRow>())
            + per(self.chunks.len(), size_of::<ChunkId>() + 8)
            + per(self.patches.len(), size_of::<Patch>())
    }

    /// What the entry is; `None` if there is none of this number.
    #[must_use]
    pub fn kind(&self, entry: EntryNumber) -> Option<Kind> {
        self.row(entry).map(|row| row.kind)
    }

    /// The directory that holds the entry; the root's is the root.
    #[must_use]
    pub fn parent(&self, entry: EntryNumber) -> Option<EntryNumber> {
        self.parents.get(entry as usize).copied()
    }

    /// The entry's name; empty for the root.
    #[must_use]
    pub fn name(&self, entry: EntryNumber) -> &[u8] {
        let entry = entry as usize;
        let start = entry.checked_sub(1).and_then(|before| self.name_ends.get(before)).copied().unwrap_or(0);
        let end = self.name_ends.get(entry).copied().unwrap_or(start);
        self.names.get(start as usize..end as usize).unwrap_or_default()
    }

    /// The entries of a directory, sorted by name; `None` if the entry is no directory.
    #[must_use]
    pub fn children(&self, directory: EntryNumber) -> Option<&[EntryNumber]> {
        let row = self.row(directory).filter(|row| row.kind == Kind::Directory)?;
        let range = self.directories.get(row.index as usize)?;
        self.children.get(range.start as usize..range.end as usize)
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
        let file = self.files.get(row.index as usize)?;
        let chunks = file.chunks_start as usize..file.chunks_end as usize;
        Some(TreeFile {
            id: file.id,
            size: file.size,
            chunks: self.chunks.get(chunks.clone())?,
            chunk_ends: self.chunk_ends.get(chunks)?,
            patches: self.patches.get(file.patches_start as usize..file.patches_end as usize)?,
        })
    }

    /// The symlink of this number; `None` if the entry is none.
    #[must_use]
    pub fn link(&self, entry: EntryNumber) -> Option<TreeLink<'_>> {
        let row = self.row(entry).filter(|row| row.kind == Kind::Symlink)?;
        let link = self.links.get(row.index as usize)?;
        Some(TreeLink {
            target: self.targets.get(link.target_start as usize..link.target_end as usize)?,
            patches: self.patches.get(link.patches_start as usize..link.patches_end as usize)?,
        })
    }

    /// Size as `stat` shows it: a file's bytes, or the length of a symlink's target.
    #[must_use]
    pub fn size(&self, entry: EntryNumber) -> u64 {
        match self.kind(entry) {
            Some(Kind::File { .. }) => self.file(entry).map_or(0, |file| file.size),
            Some(Kind::Symlink) => self.link(entry).map_or(0, |link| link.target.len() as u64),
            Some(Kind::Directory) | None => 0,
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
        self.rows.get(entry as usize).copied()
    }
}

/// Builds a [`Tree`] from the events of a manifest.
#[derive(Default)]
pub struct TreeBuilder {
    tree: Tree,
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
                self.tree.directories.push(0..0);
                self.open.push((entry, Vec::new()));
            }
            ManifestEvent::EndDirectory => {
                let (entry, children) = self.open.pop().ok_or_else(|| self.misplaced("end of directory"))?;
                let start = number(self.tree.children.len())?;
                self.tree.children.extend_from_slice(&children);
                let end = number(self.tree.children.len())?;
                let row = self.tree.row(entry).map_or(0, |row| row.index);
                if let Some(range) = self.tree.directories.get_mut(row as usize) {
                    *range = start..end;
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
                self.tree.links.push(LinkRow { target_start, target_end, patches_start, patches_end });
            }
            ManifestEvent::BeginFile { executable, size } => {
                let index = number(self.tree.files.len())?;
                self.node(Kind::File { executable }, index)?;
                let (chunks, patches) = (number(self.tree.chunks.len())?, number(self.tree.patches.len())?);
                self.tree.files.push(FileRow {
                    id: FileId::from_bytes([0; 32]),
                    size,
                    chunks_start: chunks,
                    chunks_end: chunks,
                    patches_start: patches,
                    patches_end: patches,
                });
            }
            ManifestEvent::Chunk { id, length } => {
                let start = self.file_end();
                self.tree.chunks.push(id);
                self.tree.chunk_ends.push(start + u64::from(length));
                let end = number(self.tree.chunks.len())?;
                let at = self.offset();
                let file = self.tree.files.last_mut();
                file.ok_or(FormatError::Syntax { field: "chunk", offset: at })?.chunks_end = end;
            }
            ManifestEvent::Patch(patch) => {
                self.tree.patches.push(patch);
                let end = number(self.tree.patches.len())?;
                let at = self.offset();
                let file = self.tree.files.last_mut();
                file.ok_or(FormatError::Syntax { field: "patch", offset: at })?.patches_end = end;
            }
            ManifestEvent::EndFile { file: id } => {
                let (end, at) = (self.file_end(), self.offset());
                let file = self.tree.files.last_mut();
                let file = file.ok_or(FormatError::Syntax { field: "end of file", offset: at })?;
                if file.size != end {
                    return Err(FormatError::Syntax { field: "file size", offset: at });
                }
                file.id = id;
            }
        }
        Ok(())
    }

    /// The tree.
    ///
    /// # Errors
    /// When it is not whole.
    pub fn finish(mut self) -> Result<Tree, FormatError> {
        if !self.open.is_empty() || self.named || self.tree.rows.is_empty() {
            return Err(FormatError::Truncated { field: "tree", offset: self.offset() });
        }
        let tree = &mut self.tree;
        tree.names.shrink_to_fit();
        tree.parents.shrink_to_fit();
        tree.name_ends.shrink_to_fit();
        tree.rows.shrink_to_fit();
        tree.children.shrink_to_fit();
        tree.directories.shrink_to_fit();
        tree.files.shrink_to_fit();
        tree.links.shrink_to_fit();
        tree.targets.shrink_to_fit();
        tree.chunks.shrink_to_fit();
        tree.chunk_ends.shrink_to_fit();
        tree.patches.shrink_to_fit();
        Ok(self.tree)
    }

    /// Adds a node below the innermost open directory.
    fn node(&mut self, kind: Kind, index: u32) -> Result<EntryNumber, FormatError> {
        let entry = number(self.tree.rows.len())?;
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
        self.tree.parents.push(parent);
        self.tree.name_ends.push(number(self.tree.names.len())?);
        self.tree.rows.push(Row { kind, index });
        Ok(entry)
    }

    /// Where the open file's last chunk ends.
    fn file_end(&self) -> u64 {
        let file = self.tree.files.last();
        let has_chunks = file.is_some_and(|file| file.chunks_end > file.chunks_start);
        if has_chunks { self.tree.chunk_ends.last().copied().unwrap_or(0) } else { 0 }
    }

    /// There is no byte offset here: the entry's number stands for it.
    fn offset(&self) -> u64 {
        self.tree.rows.len() as u64
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
