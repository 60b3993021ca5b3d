//! The string table: what scrubbing took out of one store object, in order of first occurrence.
//!
//! A string is `<hash>-<name>`, the base name of a store path as it stood in a file. The table never says whether that
//! path exists or is a reference: strings are opaque, and putting them back is a copy. It is kept apart from the
//! manifest body, so that a rebuild which changes nothing but hashes changes the table alone.
//!
//! Bytes: docs/format/manifest.md. Every table has one encoding; the decoder accepts no other.

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;

use super::wire::{Input, put_varint, varint_len};
use crate::error::FormatError;
use crate::id::TableId;
use crate::limits::{STORE_NAME_MAX, STRINGS_MAX, TABLE_MAX};
use crate::nix::store_path::{STORE_HASH_CHARS, STORE_HASH_LEN, StorePathHash, is_name_byte};

/// First byte of an encoded table: the version of its layout.
const FORMAT: u8 = 1;

#[expect(clippy::cast_possible_truncation, reason = "32")]
const HASH_CHARS: u32 = STORE_HASH_CHARS as u32;

/// The strings taken out of one store object. Cloning shares them.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct StringTable(Arc<Strings>);

/// All strings end to end, and where each one ends.
///
/// Invariant: every string is 32 digits of nix32, a dash and 1 to 211 name characters; no two are equal.
#[derive(PartialEq, Eq, Default, Clone)]
struct Strings {
    text: Vec<u8>,
    ends: Vec<u32>,
}

impl StringTable {
    /// Number of strings.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.ends.len()
    }

    /// No strings: nothing was scrubbed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.ends.is_empty()
    }

    /// The string of this number, `<hash>-<name>`.
    #[must_use]
    pub fn get(&self, number: u32) -> Option<&[u8]> {
        let (start, length) = self.span(number, false)?;
        self.text().get(start as usize..)?.get(..length as usize)
    }

    /// All strings, in order of their numbers.
    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        (0_u32..).map_while(|number| self.get(number))
    }

    /// All strings end to end.
    pub(super) fn text(&self) -> &[u8] {
        &self.0.text
    }

    /// Where in `text` a string or its hash part is: offset and length.
    pub(super) fn span(&self, number: u32, hash_only: bool) -> Option<(u32, u32)> {
        let number = number as usize;
        let end = *self.0.ends.get(number)?;
        let start = number.checked_sub(1).and_then(|before| self.0.ends.get(before)).copied().unwrap_or(0);
        Some((start, if hash_only { HASH_CHARS } else { end - start }))
    }

    /// The hash parts of all strings; one that stands in several strings comes as often.
    pub fn hashes(&self) -> impl Iterator<Item = StorePathHash> {
        self.iter().filter_map(|string| StorePathHash::parse_ascii(string.get(..STORE_HASH_CHARS)?).ok())
    }

    /// The table's name.
    #[must_use]
    pub fn id(&self) -> TableId {
        TableId::of(&self.encode())
    }

    /// Bytes that `encode` gives.
    #[must_use]
    pub fn encoded_len(&self) -> usize {
        // A string of 32 + 1 + n characters takes 20 + 1 + n bytes.
        1 + varint_len(self.len() as u64) + self.0.text.len() - self.len() * (STORE_HASH_CHARS - STORE_HASH_LEN)
    }

    /// The table's bytes.
    ///
    /// # Panics
    /// Never: that strings have the form they have is this module's own promise.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.encoded_len());
        out.push(FORMAT);
        put_varint(self.len() as u64, &mut out);
        for string in self.iter() {
            let (hash, name) = string.split_at(STORE_HASH_CHARS);
            let hash = StorePathHash::parse_ascii(hash).expect("a string starts with a hash part");
            let name = name.strip_prefix(b"-").expect("a dash follows the hash part");
            out.extend_from_slice(hash.as_bytes());
            out.push(u8::try_from(name.len()).expect("names are short"));
            out.extend_from_slice(name);
        }
        assert_eq!(out.len(), self.encoded_len(), "length of an encoded table");
        out
    }

    /// Reads a table, refusing any bytes that `encode` would not write.
    ///
    /// # Errors
    /// When the bytes are not the encoding of a table.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        if bytes.len() > TABLE_MAX {
            let (value, max) = (bytes.len() as u64, TABLE_MAX as u64);
            return Err(FormatError::Limit { field: "length of string table", value, max, offset: 0 });
        }
        let mut input = Input::new(bytes);
        let version = input.u8("version of string table")?;
        if version != FORMAT {
            return Err(FormatError::Version { format: "string table", version: version.into(), known: "1" });
        }
        let count = input.varint_max("number of strings", STRINGS_MAX as u64)?;
        let mut table = StringTableBuilder::default();
        let mut seen = HashSet::new();
        for _ in 0..count {
            let offset = input.offset();
            let start = input.consumed();
            let hash = StorePathHash::from_bytes(input.array("hash of string")?);
            let length = usize::from(input.u8("length of string")?);
            let name = input.take("name of string", length)?;
            let valid = (1..=STORE_NAME_MAX).contains(&length) && name.iter().all(|byte| is_name_byte(*byte));
            // Two strings are equal when their bytes here are.
            if !valid || !seen.insert(bytes.get(start..input.consumed())) {
                return Err(FormatError::Syntax { field: "string", offset });
            }
            table.push(&[&hash.to_ascii(), b"-", name]);
        }
        input.finish("end of string table")?;
        Ok(table.finish())
    }
}

impl fmt::Debug for StringTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter().map(String::from_utf8_lossy)).finish()
    }
}

/// A table that grows.
#[derive(Default)]
pub(super) struct StringTableBuilder(Strings);

impl StringTableBuilder {
    /// Adds a string, given in pieces, and returns its number. That it has the form of one, is new and has room is the
    /// caller's promise.
    pub(super) fn push(&mut self, pieces: &[&[u8]]) -> u32 {
        let number = self.len();
        assert!((number as usize) < STRINGS_MAX, "room in the string table");
        for piece in pieces {
            self.0.text.extend_from_slice(piece);
        }
        self.0.ends.push(u32::try_from(self.0.text.len()).expect("STRINGS_MAX strings are less than 4 GiB"));
        number
    }

    /// Number of strings.
    pub(super) fn len(&self) -> u32 {
        u32::try_from(self.0.ends.len()).expect("at most STRINGS_MAX")
    }

    /// Bytes of a string.
    pub(super) fn length_of(&self, number: u32) -> Option<u32> {
        let number = number as usize;
        let end = self.0.ends.get(number)?;
        let start = number.checked_sub(1).and_then(|before| self.0.ends.get(before)).unwrap_or(&0);
        Some(end - start)
    }

    pub(super) fn finish(self) -> StringTable {
        StringTable(Arc::new(self.0))
    }
}

#[cfg(test)]
pub(super) mod tests;
