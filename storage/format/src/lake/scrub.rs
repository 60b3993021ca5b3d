//! Scrubbing: store paths out of file bytes and symlink targets, before anything is cut or hashed.
//!
//! A rebuild changes every store hash and almost nothing else. With the store paths blanked at equal length, the same
//! content gives the same chunks, and what a rebuild adds to the lake is its string tables. The rule needs no list of
//! references, since a NAR arrives before its narinfo, and must run while the NAR streams in. It is frozen under
//! [`ScrubVersion::V1`], since it decides which chunks there are; docs/format/scrub.md states it, and the vectors in
//! `testdata/lake` are normative.
//!
//! In short: from left to right, `<store dir>/` + 32 digits of nix32 + `-` + a greedy run of 1 to 211 name characters is
//! a match, of which hash and name are replaced by [`PLACEHOLDER`]; where no such match starts, 32 bytes equal to a hash
//! that an earlier match of the same store object had are one too. What was taken out goes to the [`StringTable`],
//! where it stood is a [`Patch`]. [`PatchList`] and [`Restorer`] put it back.
//!
//! A match is decided once its end is seen, so at most [`Scrubber::held_max`] bytes are held back; what comes out
//! depends on the bytes alone, never on how they are split over writes. A false match costs a table entry and nothing
//! else: the exact string is kept.

mod known;
mod restore;

use std::collections::HashMap;

use memchr::memmem::Finder;

pub use self::restore::{PatchList, Restorer};

use self::known::{KnownHashes, digits_at_end, is_digit};
use super::strings::{StringTable, StringTableBuilder};
use crate::error::FormatError;
use crate::limits::{STORE_NAME_MAX, STRINGS_MAX};
use crate::nix::store_path::{STORE_HASH_CHARS, StoreDir, is_name_byte};

/// What stands in a scrubbed file for each byte taken out: neither a digit of nix32 nor a name character nor a slash,
/// so that no tool takes a scrubbed path for one.
pub const PLACEHOLDER: u8 = b'#';

/// The rule by which store paths are found.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[repr(u8)]
pub enum ScrubVersion {
    /// The rule of docs/format/scrub.md.
    V1 = 1,
}

impl ScrubVersion {
    /// The version that a byte stands for.
    ///
    /// # Errors
    /// When this build does not know it.
    pub const fn from_byte(byte: u8) -> Result<Self, FormatError> {
        match byte {
            1 => Ok(Self::V1),
            _ => Err(FormatError::Version { format: "scrubbing", version: byte as u32, known: "1" }),
        }
    }
}

/// One place in a file or symlink target from which a string was taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Patch {
    /// Bytes between the end of the previous patch of this file or target (or its start) and this one.
    pub gap: u64,
    /// Number of the string in the table.
    pub string: u32,
    /// Only the string's hash part stood here.
    pub hash_only: bool,
}

/// Takes the store paths out of the files and symlink targets of one store object, in NAR order.
pub struct Scrubber {
    /// Finds `<store dir>/`.
    prefix: Finder<'static>,
    strings: StringTableBuilder,
    /// String to its number.
    numbers: HashMap<Box<[u8]>, u32>,
    known: KnownHashes,
    /// The bytes held back.
    held: Vec<u8>,
    /// Offset in the file of the first byte held back.
    offset: u64,
    /// Where the last patch of the file ends.
    patched: u64,
}

/// What follows `<store dir>/`.
enum Pattern {
    /// A hash, a dash and a name, together of this length.
    Match(usize),
    /// Something else.
    No,
    /// What the bytes to come decide.
    Open,
}

impl Scrubber {
    /// A scrubber for a store object of this store.
    #[must_use]
    pub fn new(store_dir: &StoreDir) -> Self {
        let prefix = format!("{}/", store_dir.as_str());
        Self {
            prefix: Finder::new(prefix.as_bytes()).into_owned(),
            strings: StringTableBuilder::default(),
            numbers: HashMap::new(),
            known: KnownHashes::default(),
            held: Vec::new(),
            offset: 0,
            patched: 0,
        }
    }

    /// Most bytes held back between two writes: one less than the longest match, prefix included.
    #[must_use]
    pub fn held_max(&self) -> usize {
        self.prefix.needle().len() + STORE_HASH_CHARS + 1 + STORE_NAME_MAX - 1
    }

    /// Takes the next bytes of the file or target. Appends scrubbed bytes to `out` (not as many as came in: the last
    /// few hundred are held back while a match may still go on) and the places found to `patches`.
    pub fn write(&mut self, input: &[u8], out: &mut Vec<u8>, patches: &mut Vec<Patch>) {
        self.advance(input, false, out, patches);
        debug_assert!(self.held.len() <= self.held_max(), "bytes held back");
    }

    /// The file or target ends here. No match goes on from one into the next; what was found counts in the next.
    pub fn end(&mut self, out: &mut Vec<u8>, patches: &mut Vec<Patch>) {
        self.advance(&[], true, out, patches);
        assert!(self.held.is_empty(), "nothing is held back at a file's end");
        self.offset = 0;
        self.patched = 0;
    }

    /// Bytes that a patch stands for.
    ///
    /// # Panics
    /// If the patch is not one that this scrubber gave out.
    #[must_use]
    pub fn span_length(&self, patch: &Patch) -> u64 {
        let length = self.strings.length_of(patch.string).expect("a patch of this scrubber");
        if patch.hash_only { STORE_HASH_CHARS as u64 } else { u64::from(length) }
    }

    /// The strings taken out.
    #[must_use]
    pub fn finish(self) -> StringTable {
        self.strings.finish()
    }

    fn advance(&mut self, input: &[u8], last: bool, out: &mut Vec<u8>, patches: &mut Vec<Patch>) {
        let start = out.len();
        out.append(&mut self.held);
        out.extend_from_slice(input);
        let done = self.scrub(&mut out[start..], last, patches);
        self.held.extend_from_slice(&out[start + done..]);
        out.truncate(start + done);
        self.offset += done as u64;
    }

    /// Scrubs what can be decided and says how many bytes that are.
    fn scrub(&mut self, bytes: &mut [u8], last: bool, patches: &mut Vec<Patch>) -> usize {
        // Invariant: all matches that start before `from` are found, and no pattern starts in `from..search`.
        let (mut from, mut search) = (0, 0);
        loop {
            let candidate = self.prefix.find(&bytes[search..]).map(|at| search + at);
            let prefix_at = candidate.unwrap_or_else(|| self.prefix_begun(bytes, search, last));
            // A bare hash holds no slash, so none reaches over the start of a prefix. Behind it there may be one, in a
            // store directory that looks like a hash, but a match that starts further left comes first.
            from = self.scrub_bare(bytes, from, prefix_at, patches);
            let Some(at) = candidate else {
                let digits = if last || self.known.is_empty() { 0 } else { digits_at_end(&bytes[from..]) };
                return prefix_at.min(bytes.len() - digits);
            };
            from = at;
            let hash_at = at + self.prefix.needle().len();
            match pattern(&bytes[hash_at..], last) {
                Pattern::Open => return at,
                Pattern::No => search = at + 1,
                Pattern::Match(length) => match self.number_of(&bytes[hash_at..hash_at + length]) {
                    Some(number) => {
                        let (hash, name) = bytes[hash_at..hash_at + length].split_at_mut(STORE_HASH_CHARS);
                        hash.fill(PLACEHOLDER);
                        name[1..].fill(PLACEHOLDER);
                        patches.push(self.patch(hash_at, length, number, false));
                        from = hash_at + length;
                        search = from;
                    }
                    // The table is full: the string stays, and what it holds may still be a hash already known.
                    None => search = at + 1,
                },
            }
        }
    }

    /// Scrubs the bare hashes of `from..to` and says where the last one ends, or `from`.
    fn scrub_bare(&mut self, bytes: &mut [u8], mut from: usize, to: usize, patches: &mut Vec<Patch>) -> usize {
        while let Some((after, number)) = self.known.find(&bytes[from..to]) {
            let at = from + after;
            from = at + STORE_HASH_CHARS;
            bytes[at..from].fill(PLACEHOLDER);
            patches.push(self.patch(at, STORE_HASH_CHARS, number, true));
        }
        from
    }

    /// Where behind `search` the bytes end in the start of a prefix, or their end if they do not or are the last.
    fn prefix_begun(&self, bytes: &[u8], search: usize, last: bool) -> usize {
        let prefix = self.prefix.needle();
        let shortest = if last { bytes.len() } else { bytes.len().saturating_sub(prefix.len() - 1).max(search) };
        (shortest..bytes.len()).find(|at| prefix.starts_with(&bytes[*at..])).unwrap_or(bytes.len())
    }

    /// The string's number in the table, a new one where there is room.
    fn number_of(&mut self, string: &[u8]) -> Option<u32> {
        if let Some(number) = self.numbers.get(string) {
            return Some(*number);
        }
        if self.numbers.len() == STRINGS_MAX {
            return None;
        }
        let number = self.strings.push(&[string]);
        self.numbers.insert(string.into(), number);
        self.known.insert(string, number);
        Some(number)
    }

    /// Records a match at `at` of the bytes being scrubbed.
    fn patch(&mut self, at: usize, length: usize, string: u32, hash_only: bool) -> Patch {
        let offset = self.offset + at as u64;
        let gap = offset - self.patched;
        self.patched = offset + length as u64;
        Patch { gap, string, hash_only }
    }
}

fn pattern(after_prefix: &[u8], last: bool) -> Pattern {
    let undecided = if last { Pattern::No } else { Pattern::Open };
    let digits = after_prefix.iter().take(STORE_HASH_CHARS).take_while(|byte| is_digit(**byte)).count();
    let rest = &after_prefix[digits..];
    match rest.split_first() {
        None => return undecided,
        Some((b'-', _)) if digits == STORE_HASH_CHARS => {}
        Some(_) => return Pattern::No,
    }
    let name = &rest[1..];
    let run = name.iter().take(STORE_NAME_MAX).take_while(|byte| is_name_byte(**byte)).count();
    if run == name.len() && run < STORE_NAME_MAX && !last {
        Pattern::Open
    } else if run == 0 {
        Pattern::No
    } else {
        Pattern::Match(STORE_HASH_CHARS + 1 + run)
    }
}

#[cfg(test)]
mod tests;
