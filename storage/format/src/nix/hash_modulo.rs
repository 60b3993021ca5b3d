//! The digest of a NAR that names its own store path: Nix's *hash modulo*.
//!
//! A path cannot be named by a digest of content that holds that very name. So the content is hashed with each
//! occurrence of the path's hash part as zero bytes; behind it, `|<offset>` for each, in decimal, so that content in
//! which some were zeros from the start hashes differently (`HashModuloSink` in Nix's `references.cc`).

use memchr::memmem::Finder;

use super::hash::{Sha256Hash, Sha256Hasher};
use super::store_path::STORE_HASH_CHARS;

/// Occurrences beyond which there is no digest: no real content has a millionth of it, and each takes memory.
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

    /// The digest of all that came; `None` where there were more occurrences than a path has.
    #[must_use]
    pub fn finish(mut self) -> Option<Sha256Hash> {
        self.hash(self.held.len());
        for offset in &self.found {
            self.hasher.update(format!("|{offset}").as_bytes());
        }
        (self.found.len() <= OCCURRENCES_MAX).then(|| self.hasher.finish())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: &[u8; 32] = b"0123456789abcdfghijklmnpqrsvwxyz";

    fn digest(pieces: &[&[u8]]) -> Option<Sha256Hash> {
        let mut hash = HashModulo::new(OWN);
        for piece in pieces {
            hash.update(piece);
        }
        hash.finish()
    }

    #[test]
    fn occurrences_are_zeros_and_their_offsets_follow() {
        assert_eq!(digest(&[]), Some(Sha256Hash::of(b"")));
        assert_eq!(digest(&[b"plain"]), Some(Sha256Hash::of(b"plain")));
        let content = [b"ab".as_slice(), OWN, b"-", OWN].concat();
        let expect = [b"ab".as_slice(), &[0; 32], b"-", &[0; 32], b"|2|35"].concat();
        assert_eq!(digest(&[&content]), Some(Sha256Hash::of(&expect)));
        // Wherever the pieces end.
        for (first, second) in (0..=content.len()).map(|at| content.split_at(at)) {
            assert_eq!(digest(&[first, second]), Some(Sha256Hash::of(&expect)), "{}", first.len());
        }
        let bytes: Vec<&[u8]> = content.chunks(1).collect();
        assert_eq!(digest(&bytes), Some(Sha256Hash::of(&expect)));
        // One that was blank from the start is not one that was blanked.
        let blank = [b"ab".as_slice(), &[0; 32], b"-", OWN].concat();
        assert_ne!(digest(&[&blank]), digest(&[&content]));
    }
}
