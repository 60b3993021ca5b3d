//! The digest of a NAR that names its own store path: Nix's *hash modulo*.
//!
//! A path cannot be named by a digest of content that holds that very name. So the content is hashed with each
//! occurrence of the path's hash part as zero bytes. Older Nix hashed `|<offset>` behind it for each occurrence, in decimal,
//! so that content in which some were zeros from the start differs (`HashModuloSink` in its `references.cc`); 2.26.3 and
//! 2.34.8 do not. Store paths outlive the Nix that made them: an address of either kind is one.

use memchr::memmem::Finder;

use super::hash::{Sha256Hash, Sha256Hasher};
use super::store_path::STORE_HASH_CHARS;

/// Occurrences whose offsets are kept: no real content has a millionth of it, and each takes memory.
const OCCURRENCES_MAX: usize = 4 << 20;

/// Takes a NAR in and gives its digest.
pub struct HashModulo {
    own: Finder<'static>,
    hasher: Sha256Hasher,
    /// The end of what came, which may be the beginning of an occurrence.
    held: Vec<u8>,
    /// Bytes hashed so far: the offset of `held`.
    hashed: u64,
    found: Vec<u64>,
}

impl HashModulo {
    /// For a path of this hash part, as 32 characters.
    #[must_use]
    pub fn new(own: &[u8; STORE_HASH_CHARS]) -> Self {
        let (hasher, held, found) = Default::default();
        Self { own: Finder::new(own).into_owned(), hasher, held, hashed: 0, found }
    }

    /// Takes in the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.held.extend_from_slice(bytes);
        let mut from = 0;
        while let Some(at) = self.held.get(from..).and_then(|rest| self.own.find(rest)) {
            from += at;
            // One more than the limit says that it was exceeded.
            if self.found.len() <= OCCURRENCES_MAX {
                self.found.push(self.hashed + from as u64);
            }
            let occurrence = self.held.iter_mut().skip(from).take(STORE_HASH_CHARS);
            occurrence.for_each(|byte| *byte = 0);
            from += STORE_HASH_CHARS;
        }
        let done = self.held.len().saturating_sub(STORE_HASH_CHARS - 1);
        self.hash(done);
    }

    fn hash(&mut self, length: usize) {
        self.hasher.update(self.held.get(..length).unwrap_or_default());
        self.held.drain(..length);
        self.hashed += length as u64;
    }

    /// Whether this is an address of what came, in either way.
    #[must_use]
    pub fn is(mut self, address: &Sha256Hash) -> bool {
        self.hash(self.held.len());
        if self.hasher.clone().finish() == *address {
            return true;
        }
        for offset in &self.found {
            self.hasher.update(format!("|{offset}").as_bytes());
        }
        self.found.len() <= OCCURRENCES_MAX && self.hasher.finish() == *address
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: &[u8; 32] = b"0123456789abcdfghijklmnpqrsvwxyz";

    fn is(pieces: &[&[u8]], hashed: &[u8]) -> bool {
        let mut hash = HashModulo::new(OWN);
        for piece in pieces {
            hash.update(piece);
        }
        hash.is(&Sha256Hash::of(hashed))
    }

    #[test]
    fn occurrences_are_zeros_and_their_offsets_may_follow() {
        assert!(is(&[], b""));
        assert!(is(&[b"plain"], b"plain"));
        assert!(!is(&[b"plain"], b"other"));
        let content = [b"ab".as_slice(), OWN, b"-", OWN].concat();
        let blank = [b"ab".as_slice(), &[0; 32], b"-", &[0; 32]].concat();
        let with_offsets = [&blank, b"|2|35".as_slice()].concat();
        let other_offsets = [&blank, b"|2|36".as_slice()].concat();
        // Wherever the pieces end.
        for (first, second) in (0..=content.len()).map(|at| content.split_at(at)) {
            assert!(is(&[first, second], &blank), "{}", first.len());
            assert!(is(&[first, second], &with_offsets), "{}", first.len());
        }
        let bytes: Vec<&[u8]> = content.chunks(1).collect();
        assert!(is(&bytes, &blank) && is(&bytes, &with_offsets));
        assert!(!is(&bytes, &content) && !is(&bytes, &other_offsets));
    }
}
