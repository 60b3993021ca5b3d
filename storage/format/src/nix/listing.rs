//! `.ls`: the tree of a store object as JSON, with the place of each file's content in the NAR.
//!
//! Version 1 of Nix's NAR listing, without any white space and with sorted keys, as Nix writes it:
//!
//! ```text
//! {"root":NODE,"version":1}
//! NODE = {"entries":{NAME:NODE,..},"type":"directory"}
//!      | {"executable":true,"narOffset":N,"size":N,"type":"regular"}
//!      | {"target":TEXT,"type":"symlink"}
//! ```
//!
//! `executable` is there only where it is true. The keys of every object sort in NAR order, so [`ListingWriter`] turns
//! events into the text as they come, for any number of entries in little memory. [`Listing`] is the tree in memory, for
//! whoever wants to walk a listing. JSON knows no bytes: a name or target that is not UTF-8 cannot be listed.

mod writer;

pub use writer::ListingWriter;

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::error::FormatError;
use crate::nar::{Event, NarError, is_entry_name};

/// The tree of a store object.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Listing {
    /// The root of the tree.
    pub root: Node,
}

/// A node of the tree.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
#[serde(tag = "type", rename_all = "lowercase", deny_unknown_fields)]
pub enum Node {
    /// A directory.
    Directory {
        /// The entries by name.
        entries: BTreeMap<String, Node>,
    },
    /// A file.
    Regular {
        /// Its length in bytes.
        size: u64,
        /// Whether it is executable.
        #[serde(default)]
        executable: bool,
        /// Where its content starts in the NAR.
        #[serde(rename = "narOffset")]
        nar_offset: Option<u64>,
    },
    /// A symlink.
    Symlink {
        /// Its target.
        target: String,
    },
}

impl Listing {
    /// Reads the text. A tree deeper than serde_json's limit, about 60 directories, is refused.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        #[derive(Deserialize)]
        struct Document {
            version: u32,
            root: Node,
        }
        let document: Document =
            serde_json::from_slice(bytes).map_err(|_| FormatError::Syntax { field: "listing", offset: 0 })?;
        if document.version != 1 {
            return Err(FormatError::Version { format: "listing", version: document.version, known: "1" });
        }
        document.root.check()?;
        Ok(Self { root: document.root })
    }
}

impl Node {
    /// Follows a path of names separated by slashes; the empty one leads to the node itself.
    #[must_use]
    pub fn get(&self, path: &str) -> Option<&Self> {
        path.split('/').filter(|name| !name.is_empty()).try_fold(self, |node, name| match node {
            Self::Directory { entries } => entries.get(name),
            Self::Regular { .. } | Self::Symlink { .. } => None,
        })
    }

    fn check(&self) -> Result<(), FormatError> {
        let Self::Directory { entries } = self else { return Ok(()) };
        for (name, node) in entries {
            if !is_entry_name(name.as_bytes()) {
                return Err(FormatError::Syntax { field: "name in listing", offset: 0 });
            }
            node.check()?;
        }
        Ok(())
    }
}

/// Why a tree cannot be listed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ListingError {
    /// The events are no tree.
    #[error("list a tree")]
    Tree {
        /// What is wrong.
        #[source]
        source: NarError,
    },
    /// A name or target is not UTF-8.
    #[error("\"{}\" is not UTF-8 and cannot be in a listing", .text.escape_ascii())]
    NotUtf8 {
        /// The name or target.
        text: Box<[u8]>,
    },
}

impl From<NarError> for ListingError {
    fn from(source: NarError) -> Self {
        Self::Tree { source }
    }
}

#[cfg(test)]
mod tests;
