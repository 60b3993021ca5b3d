//! Store directory, hash part, name: the parts of `/nix/store/<hash>-<name>`.
//!
//! Nix calls `<hash>-<name>` the base name of a store path. That is what a [`StorePath`] is and how it is displayed; the
//! absolute spelling needs a [`StoreDir`]. Store paths are ordered by their spelling, as Nix orders sets of them, since
//! the order of references is part of what a signature covers.

use std::borrow::Borrow;
use std::cmp::Ordering;
use std::fmt;
use std::str::FromStr;

use super::base32;
use crate::error::FormatError;
use crate::limits::{STORE_DIR_MAX, STORE_NAME_MAX};

/// Bytes of a hash part.
pub const STORE_HASH_LEN: usize = 20;
/// Characters of a hash part.
pub const STORE_HASH_CHARS: usize = base32::encoded_len(STORE_HASH_LEN);

/// The directory that store paths are in: absolute, normalised, without a trailing slash.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct StoreDir(Box<str>);

impl StoreDir {
    /// The directory.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for StoreDir {
    /// `/nix/store`.
    fn default() -> Self {
        Self("/nix/store".into())
    }
}

impl fmt::Display for StoreDir {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for StoreDir {
    type Err = FormatError;

    fn from_str(text: &str) -> Result<Self, FormatError> {
        let error = FormatError::Syntax { field: "store directory", offset: 0 };
        if text.len() > STORE_DIR_MAX {
            let (value, max) = (text.len() as u64, STORE_DIR_MAX as u64);
            return Err(FormatError::Limit { field: "length of store directory", value, max, offset: 0 });
        }
        // Part of line-based texts and of comma-separated fingerprints, where these would end a field early.
        if text.bytes().any(|byte| byte.is_ascii_control() || matches!(byte, b',' | b';' | b' ')) {
            return Err(error);
        }
        let components = text.strip_prefix('/').ok_or(error.clone())?;
        if components.split('/').any(|component| matches!(component, "" | "." | "..")) {
            return Err(error);
        }
        Ok(Self(text.into()))
    }
}

/// The hash part of a store path, 160 bits.
///
/// Invariant: the order is that of the spelling. nix32 is most significant digit first over a little-endian number, so
/// that is the order of the bytes from last to first.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct StorePathHash([u8; STORE_HASH_LEN]);

impl StorePathHash {
    /// A hash part from its bytes.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; STORE_HASH_LEN]) -> Self {
        Self(bytes)
    }

    /// The 20 bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; STORE_HASH_LEN] {
        &self.0
    }

    /// The 32 characters, as ASCII.
    #[must_use]
    pub fn to_ascii(&self) -> [u8; STORE_HASH_CHARS] {
        let mut text = [0; STORE_HASH_CHARS];
        base32::encode_into(&self.0, &mut text);
        text
    }

    /// Reads 32 characters of nix32.
    pub fn parse_ascii(text: &[u8]) -> Result<Self, FormatError> {
        let mut bytes = [0; STORE_HASH_LEN];
        match base32::decode_into(text, &mut bytes) {
            Ok(()) => Ok(Self(bytes)),
            Err(FormatError::Syntax { offset, .. }) => Err(FormatError::Syntax { field: "store path hash", offset }),
            Err(error) => Err(error),
        }
    }
}

impl Ord for StorePathHash {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.iter().rev().cmp(other.0.iter().rev())
    }
}

impl PartialOrd for StorePathHash {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for StorePathHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(str::from_utf8(&self.to_ascii()).map_err(|_| fmt::Error)?)
    }
}

impl fmt::Debug for StorePathHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StorePathHash({self})")
    }
}

impl FromStr for StorePathHash {
    type Err = FormatError;

    fn from_str(text: &str) -> Result<Self, FormatError> {
        Self::parse_ascii(text.as_bytes())
    }
}

/// Whether a byte may be part of a store path's name.
#[must_use]
pub const fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'-' | b'.' | b'_' | b'?' | b'=')
}

/// The name of a store path: 1 to 211 characters of `[A-Za-z0-9+._?=-]`, neither `.` nor `..`, nor one of these two
/// followed by a dash. Output names of derivations follow the same rule.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StorePathName(Box<str>);

impl StorePathName {
    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Borrow<str> for StorePathName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for StorePathName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for StorePathName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StorePathName({self})")
    }
}

impl FromStr for StorePathName {
    type Err = FormatError;

    fn from_str(text: &str) -> Result<Self, FormatError> {
        let field = "store path name";
        if text.len() > STORE_NAME_MAX {
            let (value, max) = (text.len() as u64, STORE_NAME_MAX as u64);
            return Err(FormatError::Limit { field: "length of store path name", value, max, offset: 0 });
        }
        if let Some(offset) = text.bytes().position(|byte| !is_name_byte(byte)) {
            return Err(FormatError::Syntax { field, offset: offset as u64 });
        }
        // Nix refuses a first dash-separated part of one or two dots, since `.` and `..` are not names of files.
        if text.is_empty() || matches!(text.split('-').next(), Some("." | "..")) {
            return Err(FormatError::Syntax { field, offset: 0 });
        }
        Ok(Self(text.into()))
    }
}

/// A store path's base name: `<hash>-<name>`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StorePath {
    /// The hash part.
    pub hash: StorePathHash,
    /// The name.
    pub name: StorePathName,
}

impl StorePath {
    /// Reads `<store directory>/<hash>-<name>`.
    pub fn parse_absolute(dir: &StoreDir, text: &str) -> Result<Self, FormatError> {
        text.strip_prefix(dir.as_str())
            .and_then(|rest| rest.strip_prefix('/'))
            .ok_or(FormatError::Syntax { field: "store path", offset: 0 })?
            .parse()
    }

    /// The absolute spelling, for display.
    #[must_use]
    pub const fn display_in<'a>(&'a self, dir: &'a StoreDir) -> DisplayIn<'a> {
        DisplayIn { path: self, dir }
    }
}

impl fmt::Display for StorePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.hash, self.name)
    }
}

impl fmt::Debug for StorePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StorePath({self})")
    }
}

impl FromStr for StorePath {
    type Err = FormatError;

    /// Reads `<hash>-<name>`.
    fn from_str(text: &str) -> Result<Self, FormatError> {
        let error = FormatError::Syntax { field: "store path", offset: 0 };
        let (hash, rest) = text.as_bytes().split_at_checked(STORE_HASH_CHARS).ok_or(error.clone())?;
        let hash = StorePathHash::parse_ascii(hash)?;
        // The hash part was ASCII, so what follows it starts at a character.
        let name = text.get(STORE_HASH_CHARS..).filter(|_| rest.first() == Some(&b'-')).and_then(|rest| rest.get(1..));
        Ok(Self { hash, name: name.ok_or(error)?.parse()? })
    }
}

/// Displays a [`StorePath`] as `<store directory>/<hash>-<name>`.
#[derive(Clone, Copy, Debug)]
pub struct DisplayIn<'a> {
    path: &'a StorePath,
    dir: &'a StoreDir,
}

impl fmt::Display for DisplayIn<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.dir, self.path)
    }
}

#[cfg(test)]
mod tests;
