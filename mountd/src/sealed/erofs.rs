//! Writes the tree of store objects as an EROFS image that redirects file content into a cache.
//!
//! The layout is the kernel's (Documentation/filesystems/erofs.rst, fs/erofs/erofs_fs.h), the attributes are overlayfs's
//! (Documentation/filesystems/overlayfs.rst, "Data-only lower layers"). A file has its size and no data: a chunk map of
//! holes, `trusted.overlay.metacopy`, and `trusted.overlay.redirect`, which names its content as [`redirect_of`] says.
//!
//! ```text
//! block 0      at 1024 the superblock, then the one shared attribute, then the root's inode
//! per object   inodes in the order of its entries, short directories and symlinks behind theirs;
//!              then blocks of longer directories
//! at the end   the root's directory blocks
//! ```
//!
//! Canonical: the same objects under the same names, in whatever order, come out the same only if they are given in the
//! same order; callers sort by name. One object's tree is in memory at a time, with eight bytes an entry beside it and
//! the names of all objects.

use std::io::{self, Seek, SeekFrom, Write};

use narlake_format::error::FormatError;
use narlake_format::id::ContentId;
use narlake_format::lake::scrub::PatchList;
use narlake_format::lake::strings::StringTable;

use crate::fs::attr::{Attr, Kind, MTIME_S};
use crate::fs::nodes::NodeId;
use crate::fs::tree::{EntryNumber, Tree};

/// Bytes of a block, the page size of every machine that can mount it.
const BLOCK: u64 = 4096;
/// The same, for memory.
const BLOCK_LEN: usize = 4096;
const BLOCK_BITS: u8 = 12;

/// Where the superblock lies.
const SUPER_AT: usize = 1024;
const SUPER_LEN: usize = 128;
const MAGIC: u32 = 0xe0f5_e1e2;

/// `EROFS_FEATURE_COMPAT_SB_CHKSUM`.
const COMPAT_CHECKSUM: u32 = 1;
/// `EROFS_FEATURE_INCOMPAT_CHUNKED_FILE`.
const INCOMPAT_CHUNKED: u32 = 4;

/// Unit of inode addresses.
const SLOT: u64 = 32;
/// The shared attribute, as a multiple of four bytes from the image's start.
const SHARED_ID: u32 = 288;
const _: () = assert!(SHARED_ID as usize * 4 == SUPER_AT + SUPER_LEN, "it follows the superblock");
/// Inode address of the root. It has 16 bits in the superblock.
const ROOT_NID: u64 = (SUPER_AT + SUPER_LEN) as u64 / SLOT + 1;

const COMPACT_LEN: u64 = 32;
const EXTENDED_LEN: u64 = 64;

const FLAT_PLAIN: u16 = 0;
const FLAT_INLINE: u16 = 2;
const CHUNK_BASED: u16 = 4;

/// Chunks as large as the format has them: 2^31 blocks.
const CHUNK_FORMAT: u32 = 31;
const CHUNK_BYTES: u64 = BLOCK << CHUNK_FORMAT;
/// A chunk that is a hole.
const HOLE: u32 = u32::MAX;

/// `EROFS_XATTR_INDEX_TRUSTED`.
const TRUSTED: u8 = 4;
const METACOPY: &[u8] = b"overlay.metacopy";
const REDIRECT: &[u8] = b"overlay.redirect";
/// Length of a redirect: `/ab/` and 62 digits.
const REDIRECT_LEN: usize = 66;
/// Header, id of the shared attribute, and the redirect rounded up to four bytes.
const XATTRS_LEN: u64 = 12 + 4 + (4 + REDIRECT.len() + REDIRECT_LEN).next_multiple_of(4) as u64;
/// The same as an inode counts it.
const XATTR_COUNT: u16 = 24;
const _: () = assert!(XATTR_COUNT as u64 == (XATTRS_LEN - 12) / 4 + 1, "as the kernel counts");

const DIRENT_LEN: usize = 12;

/// Why no image was made.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It cannot be written.
    #[error("write the image")]
    Io(#[from] io::Error),
    /// An object's strings do not fit its tree.
    #[error("restore {path}")]
    Restore {
        /// The entry.
        path: String,
        /// What is wrong.
        #[source]
        source: FormatError,
    },
    /// The tree refers to itself wrongly.
    #[error("{path} is not a whole tree")]
    Tree {
        /// The object.
        path: String,
    },
    /// More than the format's numbers hold.
    #[error("the image would have more than {max} blocks")]
    TooLarge {
        /// Most blocks.
        max: u64,
    },
}

/// Where a layer has the content of this id: `/ab/cdef...`, below the directory of complete files.
#[must_use]
pub fn redirect_of(content: &ContentId) -> String {
    let name = content.to_string();
    let (shard, rest) = name.split_at(2);
    format!("/{shard}/{rest}")
}

/// Writes one image.
pub struct ImageWriter<W> {
    out: W,
    at: u64,
    inodes: u32,
    objects: Vec<(Vec<u8>, u64, u8)>,
}

/// What follows an inode: blocks elsewhere, and bytes right behind it.
#[derive(Clone, Copy)]
struct Body {
    size: u64,
    blocks: u64,
    tail: u64,
}

impl<W: Write + Seek> ImageWriter<W> {
    /// Begins an image in this file, which is empty.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn new(mut out: W) -> Result<Self, ImageError> {
        out.write_all(&[0; BLOCK_LEN])?;
        Ok(Self { out, at: BLOCK, inodes: 1, objects: Vec::new() })
    }

    /// Adds a store object. `on` hears of every file that redirects, with its content and size.
    ///
    /// # Errors
    /// When the image cannot be written, or the object is damaged. The image is of no use then.
    pub fn object(
        &mut self,
        name: &[u8],
        (tree, table): (&Tree, &StringTable),
        on: &mut dyn FnMut(EntryNumber, ContentId, u64),
    ) -> Result<(), ImageError> {
        let damaged = || ImageError::Tree { path: String::from_utf8_lossy(name).into_owned() };
        let count = EntryNumber::try_from(tree.len()).map_err(|_| damaged())?;
        // Where everything goes: a directory names its children by their places.
        let mut nids = Vec::with_capacity(tree.len());
        let (mut end, mut blocks, mut with_blocks) = (self.at, 0, Vec::new());
        for entry in 0..count {
            let (body, length) = measure(tree, entry).ok_or_else(damaged)?;
            let start = place(end, length - body.tail, body.tail);
            nids.push(start / SLOT);
            end = start + length;
            if body.blocks > 0 {
                blocks += body.blocks;
                with_blocks.push(entry);
            }
        }
        let data = if blocks > 0 { end.next_multiple_of(BLOCK) } else { end };
        if data / BLOCK + blocks >= u64::from(HOLE) {
            return Err(ImageError::TooLarge { max: u64::from(HOLE) });
        }
        let root = *nids.first().ok_or_else(damaged)?;
        let directory = |entry| {
            let parent = if entry == 0 { Some(ROOT_NID) } else { nid_of(&nids, tree.parent(entry)?) };
            pack(tree, entry, &nids, parent?)
        };
        let mut block = data / BLOCK;
        for (entry, nid) in (0..count).zip(&nids) {
            let (body, _) = measure(tree, entry).ok_or_else(damaged)?;
            self.pad_to(nid * SLOT)?;
            let kind = tree.kind(entry).ok_or_else(damaged)?;
            let inode = Inode { kind, body, ino: self.inodes, block: u32::try_from(block).unwrap_or(HOLE) };
            self.inodes = self.inodes.wrapping_add(1);
            block += body.blocks;
            let restore = |source| {
                let path = format!("{}/{}", String::from_utf8_lossy(name), tree.path(entry));
                ImageError::Restore { path, source }
            };
            match kind {
                Kind::Directory => {
                    self.put(&inode.encode())?;
                    let bytes = directory(entry).ok_or_else(damaged)?;
                    self.put(tail_of(&bytes, body))?;
                }
                Kind::Symlink => {
                    self.put(&inode.encode())?;
                    let target = target(tree, table, entry).ok_or_else(damaged)?.map_err(restore)?;
                    self.put(tail_of(&target, body))?;
                }
                Kind::File { .. } => {
                    self.put(&inode.encode())?;
                    if body.size > 0 {
                        let file = tree.file(entry).ok_or_else(damaged)?;
                        let content = file.content(table).map_err(restore)?;
                        self.put(&xattrs(&content))?;
                        for _ in 0..chunks(body.size) {
                            self.put(&HOLE.to_le_bytes())?;
                        }
                        on(entry, content, file.size);
                    }
                }
            }
        }
        if blocks > 0 {
            self.pad_to(data)?;
        }
        for entry in with_blocks {
            let (body, _) = measure(tree, entry).ok_or_else(damaged)?;
            let bytes = match tree.kind(entry) {
                Some(Kind::Directory) => directory(entry).ok_or_else(damaged)?,
                _ => target(tree, table, entry).ok_or_else(damaged)?.map_err(|_| damaged())?,
            };
            let end = self.at + body.blocks * BLOCK;
            let whole = bytes.len() - tail_of(&bytes, body).len();
            self.put(bytes.get(..whole).unwrap_or_default())?;
            self.pad_to(end)?;
        }
        let kind = tree.kind(0).ok_or_else(damaged)?;
        self.objects.push((name.to_vec(), root, file_type(kind)));
        Ok(())
    }

    /// Ends the image, and gives the file back; it is not synced.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn finish(mut self) -> Result<W, ImageError> {
        let mut entries = std::mem::take(&mut self.objects);
        let directory = file_type(Kind::Directory);
        entries.push((b".".to_vec(), ROOT_NID, directory));
        entries.push((b"..".to_vec(), ROOT_NID, directory));
        entries.sort_unstable();
        let listing: Vec<_> = entries.iter().map(|(name, nid, kind)| (name.as_slice(), *nid, *kind)).collect();
        let bytes = encode_directory(&listing);
        self.pad_to(self.at.next_multiple_of(BLOCK))?;
        let too_large = ImageError::TooLarge { max: u64::from(HOLE) };
        let Ok(block) = u32::try_from(self.at / BLOCK) else { return Err(too_large) };
        self.put(&bytes)?;
        self.pad_to(self.at.next_multiple_of(BLOCK))?;
        let Ok(blocks) = u32::try_from(self.at / BLOCK) else { return Err(too_large) };
        let size = bytes.len() as u64;
        let body = Body { size, blocks: size.div_ceil(BLOCK), tail: 0 };
        let root = Inode { kind: Kind::Directory, body, ino: 0, block };
        let first = first_block(&root, blocks, u64::from(self.inodes));
        self.out.seek(SeekFrom::Start(0))?;
        self.out.write_all(&first)?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.at += bytes.len() as u64;
        self.out.write_all(bytes)
    }

    fn pad_to(&mut self, at: u64) -> io::Result<()> {
        const ZEROS: [u8; BLOCK_LEN] = [0; BLOCK_LEN];
        while self.at < at {
            let length = usize::try_from((at - self.at).min(BLOCK)).unwrap_or(0);
            self.put(ZEROS.get(..length).unwrap_or_default())?;
        }
        Ok(())
    }
}

struct Inode {
    kind: Kind,
    body: Body,
    ino: u32,
    block: u32,
}

impl Inode {
    fn encode(&self) -> Vec<u8> {
        let Body { size, blocks, tail } = self.body;
        let is_file = matches!(self.kind, Kind::File { .. });
        let chunked = is_file && size > 0;
        let layout = match (chunked, tail) {
            (true, _) => CHUNK_BASED,
            (false, 0) => FLAT_PLAIN,
            (false, _) => FLAT_INLINE,
        };
        let xattrs = if chunked { XATTR_COUNT } else { 0 };
        let value = match (chunked, blocks) {
            (true, _) => CHUNK_FORMAT,
            (false, 0) => 0,
            (false, _) => self.block,
        };
        let mode = mode_of(self.kind);
        let mut out = Vec::with_capacity(64);
        let compact = u32::try_from(size);
        out.extend(((layout << 1) | u16::from(compact.is_err())).to_le_bytes());
        out.extend(xattrs.to_le_bytes());
        out.extend(mode.to_le_bytes());
        match compact {
            // Its time is the superblock's.
            Ok(size) => {
                out.extend(1_u16.to_le_bytes());
                out.extend(size.to_le_bytes());
                out.extend([0; 4]);
                out.extend(value.to_le_bytes());
                out.extend(self.ino.to_le_bytes());
                out.extend([0; 8]);
            }
            Err(_) => {
                out.extend([0; 2]);
                out.extend(size.to_le_bytes());
                out.extend(value.to_le_bytes());
                out.extend(self.ino.to_le_bytes());
                out.extend([0; 8]);
                out.extend(MTIME_S.to_le_bytes());
                out.extend([0; 4]);
                out.extend(1_u32.to_le_bytes());
                out.extend([0; 16]);
            }
        }
        out
    }
}

/// What an entry's inode is followed by, and how many bytes it takes with what is right behind it.
fn measure(tree: &Tree, entry: EntryNumber) -> Option<(Body, u64)> {
    let room = BLOCK - COMPACT_LEN;
    let body = match tree.kind(entry)? {
        Kind::Directory => {
            let (mut blocks, mut tail) = (0, 0);
            for (name, _) in listed(tree, entry)? {
                let need = (DIRENT_LEN + name.len()) as u64;
                if tail + need > BLOCK {
                    (blocks, tail) = (blocks + 1, 0);
                }
                tail += need;
            }
            let size = blocks * BLOCK + tail;
            if tail > room { Body { size, blocks: blocks + 1, tail: 0 } } else { Body { size, blocks, tail } }
        }
        Kind::Symlink => match tree.size(entry) {
            size if size > room => Body { size, blocks: size.div_ceil(BLOCK), tail: 0 },
            size => Body { size, blocks: 0, tail: size },
        },
        Kind::File { .. } => Body { size: tree.size(entry), blocks: 0, tail: 0 },
    };
    let head = if u32::try_from(body.size).is_ok() { COMPACT_LEN } else { EXTENDED_LEN };
    let is_file = matches!(tree.kind(entry)?, Kind::File { .. });
    let more = if is_file && body.size > 0 { XATTRS_LEN + chunks(body.size) * 4 } else { body.tail };
    Some((body, head + more))
}

/// The first place from `end` on for an inode. What is inline must not cross into another block.
fn place(end: u64, head: u64, tail: u64) -> u64 {
    let start = end.next_multiple_of(SLOT);
    if tail > 0 && (start + head) / BLOCK != (start + head + tail - 1) / BLOCK {
        return start.next_multiple_of(BLOCK);
    }
    start
}

const fn chunks(size: u64) -> u64 {
    size.div_ceil(CHUNK_BYTES)
}

fn nid_of(nids: &[u64], entry: EntryNumber) -> Option<u64> {
    nids.get(entry as usize).copied()
}

fn tail_of(bytes: &[u8], body: Body) -> &[u8] {
    let tail = usize::try_from(body.tail).unwrap_or(0);
    bytes.get(bytes.len().saturating_sub(tail)..).unwrap_or_default()
}

/// What a directory lists.
#[derive(Clone, Copy)]
enum Listed {
    Itself,
    Parent,
    Child(EntryNumber),
}

/// A directory's names, sorted as the kernel searches them.
fn listed(tree: &Tree, directory: EntryNumber) -> Option<Vec<(&[u8], Listed)>> {
    let children = tree.children(directory)?;
    let mut names: Vec<(&[u8], Listed)> = Vec::with_capacity(children.len() + 2);
    names.push((b".", Listed::Itself));
    names.push((b"..", Listed::Parent));
    names.extend(children.iter().map(|child| (tree.name(*child), Listed::Child(*child))));
    names.sort_unstable_by_key(|(name, _)| *name);
    Some(names)
}

fn pack(tree: &Tree, directory: EntryNumber, nids: &[u64], parent: u64) -> Option<Vec<u8>> {
    let entries = listed(tree, directory)?.into_iter().map(|(name, what)| {
        Some(match what {
            Listed::Itself => (name, nid_of(nids, directory)?, file_type(Kind::Directory)),
            Listed::Parent => (name, parent, file_type(Kind::Directory)),
            Listed::Child(child) => (name, nid_of(nids, child)?, file_type(tree.kind(child)?)),
        })
    });
    Some(encode_directory(&entries.collect::<Option<Vec<_>>>()?))
}

/// Directory blocks: each has its entries first, then their names. The last one ends with its last name.
fn encode_directory(entries: &[(&[u8], u64, u8)]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut rest = entries;
    while !rest.is_empty() {
        let mut used = 0;
        let fits = |(name, _, _): &&(&[u8], u64, u8)| {
            used += DIRENT_LEN + name.len();
            used as u64 <= BLOCK
        };
        let count = rest.iter().take_while(fits).count().max(1);
        let (block, after) = rest.split_at(count);
        out.resize(out.len().next_multiple_of(BLOCK_LEN), 0);
        let mut name_at = DIRENT_LEN * count;
        for (name, nid, kind) in block {
            out.extend(nid.to_le_bytes());
            out.extend(u16::try_from(name_at).unwrap_or(u16::MAX).to_le_bytes());
            out.extend([*kind, 0]);
            name_at += name.len();
        }
        block.iter().for_each(|(name, _, _)| out.extend_from_slice(name));
        rest = after;
    }
    out
}

fn target(tree: &Tree, table: &StringTable, entry: EntryNumber) -> Option<Result<Vec<u8>, FormatError>> {
    let link = tree.link(entry)?;
    let mut target = link.target.to_vec();
    let patches = PatchList::resolve(&link.patches.to_vec(), table, target.len() as u64);
    Some(patches.map(|patches| {
        patches.restore(0, &mut target);
        target
    }))
}

fn xattrs(content: &ContentId) -> Vec<u8> {
    let mut out = vec![0; 12];
    out[4] = 1;
    out.extend(SHARED_ID.to_le_bytes());
    out.extend(xattr(REDIRECT, redirect_of(content).as_bytes()));
    out
}

fn xattr(name: &[u8], value: &[u8]) -> Vec<u8> {
    let mut out = vec![u8::try_from(name.len()).unwrap_or(0), TRUSTED];
    out.extend(u16::try_from(value.len()).unwrap_or(0).to_le_bytes());
    out.extend_from_slice(name);
    out.extend_from_slice(value);
    out.resize(out.len().next_multiple_of(4), 0);
    out
}

fn first_block(root: &Inode, blocks: u32, inodes: u64) -> Vec<u8> {
    let mut out = vec![0; BLOCK_LEN];
    let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
    put(SUPER_AT, &MAGIC.to_le_bytes());
    put(SUPER_AT + 8, &COMPAT_CHECKSUM.to_le_bytes());
    put(SUPER_AT + 12, &[BLOCK_BITS]);
    put(SUPER_AT + 14, &u16::try_from(ROOT_NID).unwrap_or(0).to_le_bytes());
    put(SUPER_AT + 16, &inodes.to_le_bytes());
    put(SUPER_AT + 24, &MTIME_S.to_le_bytes());
    put(SUPER_AT + 36, &blocks.to_le_bytes());
    put(SUPER_AT + 80, &INCOMPAT_CHUNKED.to_le_bytes());
    put(SUPER_AT + SUPER_LEN, &xattr(METACOPY, b""));
    put(usize::try_from(ROOT_NID * SLOT).unwrap_or(0), &root.encode());
    let checksum = crc32c(&out[SUPER_AT..]);
    out[SUPER_AT + 4..SUPER_AT + 8].copy_from_slice(&checksum.to_le_bytes());
    out
}

/// CRC-32C as the kernel has it: not inverted at the end. Of three kilobytes, so there is no table.
fn crc32c(bytes: &[u8]) -> u32 {
    bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 })
    })
}

/// File type and permissions, those that every other view shows.
const fn mode_of(kind: Kind) -> u16 {
    let format = match kind {
        Kind::Directory => 0o040_000,
        Kind::File { .. } => 0o100_000,
        Kind::Symlink => 0o120_000,
    };
    format | Attr { node: NodeId::ROOT, kind, size: 0 }.permissions()
}

const fn file_type(kind: Kind) -> u8 {
    match kind {
        Kind::File { .. } => 1,
        Kind::Directory => 2,
        Kind::Symlink => 7,
    }
}

#[cfg(test)]
mod tests;
