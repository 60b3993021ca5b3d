//! A store object as a NAR: its tree, and content that is read as the kernel reads it, verified and cached.
//!
//! It is made piece by piece, for whoever takes the pieces; memory is bounded by one of them. Each read of content has the
//! deadline of any read. A NAR that does not come out as long as its record says ends in an error, before its last piece.

use std::sync::Arc;

use narlake_format::nar::{Event, NarError, Writer};

use super::attr::Kind;
use super::error::FsError;
use super::nodes::{NodeId, ObjectKey, ObjectNumber};
use super::tree::EntryNumber;
use super::{LazyStore, Object};
use crate::trust::TrustedRecord;

/// Bytes at which a piece is whole, but for the read that reaches it.
const PIECE_BYTES: usize = 512 * 1024;

/// Bytes of content that are read at once.
const READ_BYTES: u64 = 512 * 1024;

/// A NAR being written.
pub struct Nar {
    store: LazyStore,
    number: ObjectNumber,
    object: Arc<Object>,
    size: u64,
    writer: Writer,
    begun: bool,
    /// The directories that are open, and how many of each one's children are written.
    open: Vec<(EntryNumber, usize)>,
    /// The file that is open, what is written of it, and its size.
    file: Option<(EntryNumber, u64, u64)>,
}

/// Why a NAR breaks off.
#[derive(Debug, thiserror::Error)]
pub enum NarFailure {
    /// The tree or a file's content could not be had.
    #[error("read what is in it")]
    Read(#[from] FsError),
    /// The tree is none that a NAR can have.
    #[error("write the NAR")]
    Nar(#[from] NarError),
    /// A file ended before its size.
    #[error("a file has {found} bytes, and should have {size}")]
    Short {
        /// Bytes that it has.
        found: u64,
        /// Bytes that it should have.
        size: u64,
    },
    /// The NAR is not as long as its record says.
    #[error("the NAR has {found} bytes, its record says {size}")]
    Size {
        /// Bytes that it has.
        found: u64,
        /// Bytes that it should have.
        size: u64,
    },
}

impl LazyStore {
    /// The NAR of a path that a view shows; its tree is at hand then. Cancel safe.
    ///
    /// # Errors
    /// When the tree cannot be had.
    pub async fn nar(&self, record: &TrustedRecord) -> Result<Nar, FsError> {
        let key = ObjectKey::of(record);
        let (number, object) = self.finish("nar", NodeId::ROOT, None, self.load(key)).await?;
        let (writer, begun, open, file) = (Writer::new(), false, Vec::new(), None);
        Ok(Nar { store: self.clone(), number, object, size: record.info().nar_size, writer, begun, open, file })
    }
}

impl Nar {
    /// The next bytes; none when the NAR is whole. Not cancel safe: after that, as after an error, it is of no use.
    ///
    /// # Errors
    /// When something in it cannot be had.
    pub async fn next(&mut self) -> Result<Option<Vec<u8>>, NarFailure> {
        let mut out = Vec::new();
        while out.len() < PIECE_BYTES {
            if let Some(file) = self.file {
                self.content(file, &mut out).await?;
                continue;
            }
            let Some((directory, written)) = self.open.last_mut() else {
                if self.begun {
                    break;
                }
                self.begun = true;
                self.node(0, &mut out).await?;
                continue;
            };
            let children = self.object.tree.children(*directory).unwrap_or_default();
            match children.get(*written).copied() {
                Some(child) => {
                    *written += 1;
                    self.writer.event(Event::Entry { name: self.object.tree.name(child) }, &mut out)?;
                    self.node(child, &mut out).await?;
                }
                None => {
                    self.open.pop();
                    self.writer.event(Event::EndDirectory, &mut out)?;
                }
            }
        }
        if self.begun && self.open.is_empty() && self.file.is_none() {
            self.writer.finish()?;
            let (found, size) = (self.writer.offset(), self.size);
            if found != size {
                return Err(NarFailure::Size { found, size });
            }
        }
        Ok((!out.is_empty()).then_some(out))
    }

    /// Begins an entry.
    async fn node(&mut self, entry: EntryNumber, out: &mut Vec<u8>) -> Result<(), NarFailure> {
        match self.object.tree.kind(entry) {
            Some(Kind::Directory) => {
                self.writer.event(Event::Directory, out)?;
                self.open.push((entry, 0));
            }
            Some(Kind::File { executable }) => {
                let size = self.object.tree.size(entry);
                self.writer.event(Event::File { executable, size }, out)?;
                self.file = Some((entry, 0, size));
            }
            Some(Kind::Symlink) => {
                let target = self.store.readlink(NodeId::new(self.number, entry)).await?;
                self.writer.event(Event::Symlink { target: &target }, out)?;
            }
            None => return Err(FsError::NotFound.into()),
        }
        Ok(())
    }

    /// Goes on with a file.
    async fn content(
        &mut self,
        (entry, offset, size): (EntryNumber, u64, u64),
        out: &mut Vec<u8>,
    ) -> Result<(), NarFailure> {
        if offset == size {
            self.file = None;
            return Ok(self.writer.event(Event::EndFile, out)?);
        }
        let length = u32::try_from(READ_BYTES.min(size - offset)).unwrap_or(u32::MAX);
        let bytes = self.store.read(NodeId::new(self.number, entry), offset, length).await?;
        if bytes.is_empty() {
            return Err(NarFailure::Short { found: offset, size });
        }
        self.writer.event(Event::Data(&bytes), out)?;
        self.file = Some((entry, offset + bytes.len() as u64, size));
        Ok(())
    }
}
