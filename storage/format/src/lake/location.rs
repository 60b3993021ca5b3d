//! Where a blob lies: which pack, which frame of it, which bytes of the frame.
//!
//! A pack belongs to one *trust domain* and is named by it (docs/consistency.md, rule 15): what all public caches hold
//! is in one domain, each private cache has its own, and no location ever leads from one into another.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use crate::error::FormatError;
use crate::id::{CacheId, PackId};

/// A trust domain: the caches whose content may share packs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Domain {
    /// All public caches.
    Public,
    /// One private cache.
    Cache(CacheId),
}

/// How [`Domain::Public`] is spelled in keys. No ULID is spelled so: theirs have 26 characters.
const PUBLIC: &str = "public";

impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Public => f.write_str(PUBLIC),
            Self::Cache(id) => id.fmt(f),
        }
    }
}

impl FromStr for Domain {
    type Err = FormatError;

    fn from_str(text: &str) -> Result<Self, FormatError> {
        if text == PUBLIC { Ok(Self::Public) } else { text.parse().map(Self::Cache) }
    }
}

/// The full name of a pack.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PackRef {
    /// The domain that may read it.
    pub domain: Domain,
    /// Its id, unique in the lake.
    pub id: PackId,
}

impl fmt::Display for PackRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.domain, self.id)
    }
}

impl FromStr for PackRef {
    type Err = FormatError;

    /// Parses `<domain>/<ulid>`, as `Display` writes it.
    fn from_str(text: &str) -> Result<Self, FormatError> {
        let (domain, id) = text.split_once('/').ok_or(FormatError::Syntax { field: "pack name", offset: 0 })?;
        Ok(Self { domain: domain.parse()?, id: id.parse()? })
    }
}

/// Where one blob lies.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Location {
    /// The pack.
    pub pack: PackRef,
    /// Offset of the frame in the pack.
    pub frame_offset: u32,
    /// Bytes of the frame in the pack, its header included.
    pub frame_length: u32,
    /// Offset of the blob in the frame's raw content.
    pub offset: u32,
    /// Bytes of the blob.
    pub length: u32,
}

impl Location {
    /// The bytes of the pack to read.
    #[must_use]
    pub fn frame_range(&self) -> Range<u64> {
        u64::from(self.frame_offset)..u64::from(self.frame_offset) + u64::from(self.frame_length)
    }

    /// The blob's bytes in its decoded frame, if they are there.
    #[must_use]
    pub fn slice<'a>(&self, raw: &'a [u8]) -> Option<&'a [u8]> {
        let start = usize::try_from(self.offset).ok()?;
        let length = usize::try_from(self.length).ok()?;
        raw.get(start..start.checked_add(length)?)
    }
}
