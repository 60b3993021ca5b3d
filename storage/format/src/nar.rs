//! NAR: a file tree as one stream of bytes, the same bytes for the same tree.
//!
//! ```text
//! nar       = str("nix-archive-1") node
//! node      = str("(") str("type") ( regular | symlink | directory ) str(")")
//! regular   = str("regular") [ str("executable") str("") ] str("contents") str(bytes)
//! symlink   = str("symlink") str("target") str(target)
//! directory = str("directory") { entry }
//! entry     = str("entry") str("(") str("name") str(name) str("node") node str(")")
//! str(s)    = length of s as u64, little endian; s; zeros up to a multiple of 8
//! ```
//!
//! [`Reader`] and [`Writer`] are strict inverses: what the reader accepts, its events make the writer write again, byte
//! for byte. To that end the reader takes the one spelling of each tree that Nix writes, names in strictly ascending
//! byte order, and nothing after the end. It also enforces what a file system would: a name is 1 to 255 bytes, holds
//! neither `/` nor NUL, and is not `.` or `..`; a target is 1 to 4095 bytes without NUL. `limits` bounds depth, entries
//! and size.
//!
//! Both are sans-IO and hold no file content: memory is one name for each open directory.

mod order;
mod reader;
mod writer;

pub use reader::Reader;
pub use writer::Writer;

use crate::limits::NAME_MAX;

/// What every NAR starts with, as a string token.
pub const MAGIC: &[u8] = b"nix-archive-1";

/// One step through a tree, in NAR order.
///
/// The root node comes first and has no [`Event::Entry`]; every other node follows its own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event<'a> {
    /// A directory starts; its entries follow, ascending by name.
    Directory,
    /// The next node is the entry of this name in the directory that is open.
    Entry {
        /// The name.
        name: &'a [u8],
    },
    /// The directory that was opened last ends.
    EndDirectory,
    /// A file starts; exactly `size` bytes follow in [`Event::Data`].
    File {
        /// Whether the file is executable.
        executable: bool,
        /// Its length in bytes.
        size: u64,
    },
    /// The next bytes of the file, never none.
    Data(&'a [u8]),
    /// The file ends.
    EndFile,
    /// A symlink.
    Symlink {
        /// Its target.
        target: &'a [u8],
    },
}

impl Event<'_> {
    const fn name(&self) -> &'static str {
        match self {
            Self::Directory => "directory",
            Self::Entry { .. } => "entry",
            Self::EndDirectory => "end of directory",
            Self::File { .. } => "file",
            Self::Data(_) => "data",
            Self::EndFile => "end of file",
            Self::Symlink { .. } => "symlink",
        }
    }
}

/// Whether a name may be that of an entry: what a file system takes, and nothing that leads out of the directory.
#[must_use]
pub fn is_entry_name(name: &[u8]) -> bool {
    !name.is_empty()
        && name.len() <= NAME_MAX
        && !matches!(name, b"." | b"..")
        && memchr::memchr2(b'/', 0, name).is_none()
}

/// Why bytes are no NAR, or events no tree. Offsets count bytes from the start of the NAR.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NarError {
    /// The NAR ends too early.
    #[error("NAR is truncated at offset {offset}")]
    Truncated {
        /// Where it ends.
        offset: u64,
    },
    /// Another token is there than the grammar asks for.
    #[error("NAR has no {expected} at offset {offset}")]
    Syntax {
        /// What should be there.
        expected: &'static str,
        /// Where the token starts.
        offset: u64,
    },
    /// A name is none that a file may have.
    #[error("NAR entry at offset {offset} has the invalid name \"{}\"", .name.escape_ascii())]
    Name {
        /// The name.
        name: Box<[u8]>,
        /// Where its token starts.
        offset: u64,
    },
    /// A name does not sort after the one before it in its directory.
    #[error("NAR entry \"{}\" at offset {offset} does not sort after \"{}\"", .name.escape_ascii(), .previous.escape_ascii())]
    Order {
        /// The name.
        name: Box<[u8]>,
        /// The name before it.
        previous: Box<[u8]>,
        /// Where its token starts.
        offset: u64,
    },
    /// A limit is exceeded.
    #[error("NAR has {what} {value} at offset {offset}, the limit is {max}")]
    Limit {
        /// What is limited.
        what: &'static str,
        /// What the NAR says.
        value: u64,
        /// The limit.
        max: u64,
        /// Where.
        offset: u64,
    },
    /// Bytes follow the end of the NAR.
    #[error("bytes follow the end of the NAR at offset {offset}")]
    Trailing {
        /// Where the NAR ends.
        offset: u64,
    },
    /// The reader or writer has failed before; it cannot go on.
    #[error("NAR was already refused before offset {offset}")]
    Failed {
        /// How far it had come.
        offset: u64,
    },
    /// An event was given to the writer that cannot come next.
    #[error("NAR writer was given {event} at offset {offset}, where it cannot be")]
    Event {
        /// The event.
        event: &'static str,
        /// Where it would have been written.
        offset: u64,
    },
}

/// Zeros that follow a string of this length.
const fn padding(length: u64) -> u64 {
    length.wrapping_neg() % 8
}

#[cfg(test)]
mod tests;
