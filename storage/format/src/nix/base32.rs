//! Nix's base 32, in which hash parts and hashes are written.
//!
//! The alphabet leaves out `e`, `o`, `t` and `u`. The bytes count as one little-endian number, written most significant
//! digit first, so the first character holds the highest bits of the *last* byte. A length that is not a multiple of
//! five bits leaves the first character with bits to spare; they must be zero, or a digest would have two spellings.

use crate::error::FormatError;

/// The 32 digits, in ascending order, of value and of ASCII alike: texts of one length sort as the numbers they spell.
pub const ALPHABET: &[u8; 32] = b"0123456789abcdfghijklmnpqrsvwxyz";

/// Marks a byte that is no digit.
const NONE: u8 = 0xff;

/// The value of every byte as a digit.
const VALUES: [u8; 256] = {
    let mut values = [NONE; 256];
    let mut digit = 0;
    while digit < ALPHABET.len() {
        #[expect(clippy::cast_possible_truncation, reason = "below 32")]
        let value = digit as u8;
        values[ALPHABET[digit] as usize] = value;
        digit += 1;
    }
    values
};

/// Whether a byte is a digit.
#[must_use]
pub const fn is_digit(byte: u8) -> bool {
    VALUES[byte as usize] != NONE
}

/// Characters that a number of bytes takes.
#[must_use]
pub const fn encoded_len(bytes: usize) -> usize {
    (bytes * 8).div_ceil(5)
}

/// Spells bytes.
#[must_use]
pub fn encode(bytes: &[u8]) -> String {
    let mut text = vec![0; encoded_len(bytes.len())];
    encode_into(bytes, &mut text);
    text.into_iter().map(char::from).collect()
}

/// Spells bytes into a buffer of exactly [`encoded_len`] bytes, as ASCII.
pub fn encode_into(bytes: &[u8], text: &mut [u8]) {
    assert_eq!(text.len(), encoded_len(bytes.len()), "buffer does not fit the bytes");
    let digit = |bits: u16| ALPHABET[usize::from(bits & 31)];
    let mut bytes = bytes.iter();
    let (mut held, mut count) = (0_u16, 0_u32);
    for character in text.iter_mut().rev() {
        if count < 5
            && let Some(byte) = bytes.next()
        {
            held |= u16::from(*byte) << count;
            count += 8;
        }
        *character = digit(held);
        held >>= 5;
        count = count.saturating_sub(5);
    }
}

/// Reads the bytes that a text spells, of which there must be exactly `out_len`.
pub fn decode(text: &str, out_len: usize) -> Result<Vec<u8>, FormatError> {
    let mut out = vec![0; out_len];
    decode_into(text.as_bytes(), &mut out)?;
    Ok(out)
}

/// Reads the bytes that a text spells into a buffer of exactly as many.
pub fn decode_into(text: &[u8], out: &mut [u8]) -> Result<(), FormatError> {
    let error = |offset: usize| FormatError::Syntax { field: "nix32", offset: offset as u64 };
    if text.len() != encoded_len(out.len()) {
        return Err(error(text.len()));
    }
    let mut bytes = out.iter_mut();
    let (mut held, mut count) = (0_u16, 0_u32);
    for (offset, character) in text.iter().enumerate().rev() {
        let value = VALUES[usize::from(*character)];
        if value == NONE {
            return Err(error(offset));
        }
        held |= u16::from(value) << count;
        count += 5;
        if count >= 8 {
            if let Some(byte) = bytes.next() {
                *byte = held.to_le_bytes()[0];
            }
            held >>= 8;
            count -= 8;
        }
    }
    if held == 0 { Ok(()) } else { Err(error(0)) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[track_caller]
    fn check(bytes: &[u8], text: &str) {
        assert_eq!(encode(bytes), text);
        assert_eq!(decode(text, bytes.len()).unwrap(), bytes);
    }

    #[test]
    fn known_spellings() {
        check(b"", "");
        check(&[0], "00");
        check(&[0x1f], "0z");
        check(&[0xff], "7z");
        // The text runs from the last byte's highest bits to the first byte's lowest.
        check(&[0x01, 0x00], "0001");
        check(&[0x00, 0x80], "1000");
        // printf 'abc' | sha1sum, and Nix's own spelling of it (tests/unit/libutil/hash.cc).
        let sha1 = [
            0xa9, 0x99, 0x3e, 0x36, 0x47, 0x06, 0x81, 0x6a, 0xba, 0x3e, 0x25, 0x71, 0x78, 0x50, 0xc2, 0x6c, 0x9c, 0xd0,
            0xd8, 0x9d,
        ];
        check(&sha1, "kpcd173cq987hw957sx6m0868wv3x6d9");
    }

    #[test]
    fn refusals() {
        for (text, length) in [
            ("0", 1),       // too short
            ("000", 1),     // too long
            ("80", 1),      // bits beyond the byte
            ("zz", 1),      // likewise
            ("0e", 1),      // not in the alphabet
            ("0Z", 1),      // no upper case
            ("0\u{e9}", 1), // not ASCII
            ("", 1),
        ] {
            assert!(decode(text, length).is_err(), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn round_trip(bytes in proptest::collection::vec(any::<u8>(), 0..70)) {
            let text = encode(&bytes);
            prop_assert!(text.bytes().all(is_digit));
            prop_assert_eq!(decode(&text, bytes.len()).unwrap(), bytes);
        }

        #[test]
        fn one_spelling(text in "[0-9a-z]{0,60}", length in 0_usize..40) {
            if let Ok(bytes) = decode(&text, length) {
                prop_assert_eq!(encode(&bytes), text);
            }
        }
    }
}
