//! What an entry looks like to `stat`: as Nix canonicalises store objects, whatever they were before.

use crate::fs::nodes::NodeId;

/// Modification time of everything in a store, in seconds since the epoch.
pub const MTIME_S: u64 = 1;

/// Bytes that a directory claims to have. Some programs take a directory of size 0 for an empty one.
const DIRECTORY_SIZE: u64 = 4096;

/// Bytes of a block, as `st_blocks` counts them.
const BLOCK: u64 = 512;

/// What an entry is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Kind {
    /// A directory.
    Directory,
    /// A regular file.
    File {
        /// Its executable bit.
        executable: bool,
    },
    /// A symlink.
    Symlink,
}

/// What `stat` says of an entry, beyond what is the same for all: owner 0, one link, times of [`MTIME_S`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Attr {
    /// Its nodeid, which is its inode number too.
    pub node: NodeId,
    /// What it is.
    pub kind: Kind,
    /// Its bytes.
    pub size: u64,
}

impl Attr {
    /// A directory.
    #[must_use]
    pub const fn directory(node: NodeId) -> Self {
        Self { node, kind: Kind::Directory, size: DIRECTORY_SIZE }
    }

    /// Permission bits.
    #[must_use]
    pub const fn permissions(&self) -> u16 {
        match self.kind {
            Kind::Directory | Kind::File { executable: true } => 0o555,
            Kind::File { executable: false } => 0o444,
            Kind::Symlink => 0o777,
        }
    }

    /// Blocks of 512 bytes. Never fewer than the size takes: programs read a shortfall as holes.
    #[must_use]
    pub const fn blocks(&self) -> u64 {
        match self.kind {
            Kind::Directory | Kind::File { .. } => self.size.div_ceil(BLOCK),
            Kind::Symlink => 0,
        }
    }
}
