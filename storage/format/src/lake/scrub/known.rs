//! The search for bare hashes: 32 bytes equal to a hash part that was found before.
//!
//! Almost all windows of almost all files hold a byte that is no digit of nix32, and so do almost all samples of every
//! eighth byte: a window has four of them in a row. Where four are digits, each window is looked at from its end, as
//! Nix's own reference scanner does, and the search goes on behind the last byte that is no digit. In runs of digits
//! every byte is looked at once, and a window costs a look into a bit set; only what passes that is hashed.

use std::collections::HashMap;

use crate::nix::base32;
use crate::nix::store_path::STORE_HASH_CHARS;

/// Which bytes are digits of nix32.
const DIGITS: [bool; 256] = {
    let mut digits = [false; 256];
    let mut byte = 0_u8;
    loop {
        digits[byte as usize] = base32::is_digit(byte);
        if byte == u8::MAX {
            break digits;
        }
        byte += 1;
    }
};

/// Whether a byte is a digit of nix32.
pub(super) const fn is_digit(byte: u8) -> bool {
    DIGITS[byte as usize]
}

/// Digits at the end of the bytes that may be the start of a hash: at most one less than a hash has.
pub(super) fn digits_at_end(bytes: &[u8]) -> usize {
    bytes.iter().rev().take(STORE_HASH_CHARS - 1).take_while(|byte| is_digit(**byte)).count()
}

type Hash = [u8; STORE_HASH_CHARS];

/// Hash parts, each with the number of the first string that has it.
#[derive(Default)]
pub(super) struct KnownHashes {
    // The hasher's random keys keep a crafted object from making all hashes collide.
    numbers: HashMap<Hash, u32>,
    filter: Filter,
}

impl KnownHashes {
    pub(super) fn is_empty(&self) -> bool {
        self.numbers.is_empty()
    }

    /// Adds the hash part that a string starts with, unless it is known from an earlier string.
    pub(super) fn insert(&mut self, string: &[u8], number: u32) {
        let hash: &Hash = string.first_chunk().expect("a string starts with a hash part");
        self.numbers.entry(*hash).or_insert(number);
        self.filter.insert(hash);
    }

    /// The first known hash in the bytes: where it starts, and the number of its string.
    pub(super) fn find(&self, bytes: &[u8]) -> Option<(usize, u32)> {
        if self.is_empty() {
            return None;
        }
        let mut from = 0;
        loop {
            from += next_group(bytes.get(from..)?)?;
            // The windows that start in the group.
            let group = bytes.get(from..bytes.len().min(from + 2 * STORE_HASH_CHARS - 1))?;
            if let Some((at, number)) = self.find_in(group) {
                return Some((from + at, number));
            }
            from += STORE_HASH_CHARS;
        }
    }

    fn find_in(&self, bytes: &[u8]) -> Option<(usize, u32)> {
        let mut at = 0;
        // Invariant: the bytes from `at` up to here are digits.
        let mut digits_to = 0;
        loop {
            let window: &Hash = bytes.get(at..)?.first_chunk()?;
            match window[digits_to - at..].iter().rposition(|byte| !is_digit(*byte)) {
                Some(last) => {
                    // What follows the last byte that is no digit are digits, up to the window's end.
                    let window_end = at + STORE_HASH_CHARS;
                    at = digits_to + last + 1;
                    digits_to = window_end;
                }
                None => {
                    if self.filter.may_have(window)
                        && let Some(number) = self.numbers.get(window)
                    {
                        return Some((at, *number));
                    }
                    digits_to = at + STORE_HASH_CHARS;
                    at += 1;
                }
            }
        }
    }
}

/// The start of the first group of 32 bytes in which a window of digits may start, groups counted from the start.
fn next_group(bytes: &[u8]) -> Option<usize> {
    let (groups, _) = bytes.as_chunks::<STORE_HASH_CHARS>();
    // A window that starts in the last group ends in what follows it, if at all; taken for digits unseen.
    let after = groups.iter().skip(1).map(samples).chain([SAMPLES]);
    let mut own = samples(groups.first()?);
    for (number, next) in after.enumerate() {
        let flags = own | next << 4;
        // Four in a row, the first of them in this group: which of the four depends on where in it the window starts.
        let pairs = flags & flags >> 1;
        if pairs & pairs >> 2 & SAMPLES != 0 {
            return Some(number * STORE_HASH_CHARS);
        }
        own = next;
    }
    None
}

/// The flags of four samples that are all digits.
const SAMPLES: u32 = 0b1111;

/// Which of every eighth byte of a group is a digit, the first in the lowest bit.
fn samples(group: &Hash) -> u32 {
    let digit = |at: usize| u32::from(is_digit(group[at]));
    digit(7) | digit(15) << 1 | digit(23) << 2 | digit(31) << 3
}

/// A set of hashes that never forgets one and seldom claims one it has not: a bit for each of 2^16 digests.
#[derive(Default)]
struct Filter(Vec<u64>);

impl Filter {
    fn insert(&mut self, hash: &Hash) {
        self.0.resize(1 << 10, 0);
        let bit = Self::bit(hash);
        if let Some(word) = self.0.get_mut(bit / 64) {
            *word |= 1 << (bit % 64);
        }
    }

    fn may_have(&self, hash: &Hash) -> bool {
        let bit = Self::bit(hash);
        self.0.get(bit / 64).is_some_and(|word| word >> (bit % 64) & 1 == 1)
    }

    /// The bit of a hash, from its first and last bytes: texts often share the one or the other.
    fn bit(hash: &Hash) -> usize {
        let (first, rest) = hash.split_first_chunk::<8>().expect("32 bytes");
        let (_, last) = rest.split_last_chunk::<8>().expect("24 bytes");
        let mixed = u64::from_le_bytes(*first) ^ u64::from_le_bytes(*last).rotate_left(29);
        (mixed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48) as usize
    }
}
