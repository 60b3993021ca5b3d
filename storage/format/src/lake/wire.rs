//! Reading and writing fixed-width integers and varints, shared by the binary formats.
//!
//! Integers are little endian. A varint is LEB128 of a `u64`: seven bits a byte, low bits first, the high bit set on
//! all bytes but the last. Only the shortest spelling of a number is valid, so that formats which promise one encoding
//! can keep the promise.

use crate::error::FormatError;

/// Longest varint, in bytes.
pub(super) const VARINT_LEN_MAX: usize = 10;

/// Appends a varint.
pub(super) fn put_varint(mut value: u64, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    out.push((value & 0x7f) as u8);
}

/// Bytes of a number as a varint.
pub(super) const fn varint_len(value: u64) -> usize {
    let bits = 64 - (value | 1).leading_zeros() as usize;
    bits.div_ceil(7)
}

/// A check value over runs of bytes, under a context of its own for each format.
pub(super) fn digest(context: &'static str, runs: &[&[u8]]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key(context);
    for run in runs {
        hasher.update(run);
    }
    *hasher.finalize().as_bytes()
}

/// Bytes being decoded, and how far.
#[derive(Clone)]
pub(super) struct Input<'a> {
    bytes: &'a [u8],
    at: usize,
    /// Offset of `bytes` in what the caller calls the whole, for errors.
    base: u64,
}

impl<'a> Input<'a> {
    pub(super) const fn new(bytes: &'a [u8]) -> Self {
        Self::at(bytes, 0)
    }

    /// Bytes that start `base` bytes into the whole.
    pub(super) const fn at(bytes: &'a [u8], base: u64) -> Self {
        Self { bytes, at: 0, base }
    }

    /// Offset in the whole of the next byte.
    pub(super) const fn offset(&self) -> u64 {
        self.base + self.at as u64
    }

    /// Bytes read so far.
    pub(super) const fn consumed(&self) -> usize {
        self.at
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.at == self.bytes.len()
    }

    pub(super) fn take(&mut self, field: &'static str, length: usize) -> Result<&'a [u8], FormatError> {
        let taken = self.at.checked_add(length).and_then(|end| self.bytes.get(self.at..end));
        let taken = taken.ok_or(FormatError::Truncated { field, offset: self.base + self.bytes.len() as u64 })?;
        self.at += length;
        Ok(taken)
    }

    pub(super) fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], FormatError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(field, N)?);
        Ok(out)
    }

    pub(super) fn u8(&mut self, field: &'static str) -> Result<u8, FormatError> {
        self.array::<1>(field).map(|[byte]| byte)
    }

    pub(super) fn u16(&mut self, field: &'static str) -> Result<u16, FormatError> {
        self.array(field).map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self, field: &'static str) -> Result<u32, FormatError> {
        self.array(field).map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self, field: &'static str) -> Result<u64, FormatError> {
        self.array(field).map(u64::from_le_bytes)
    }

    /// Reads a varint, refusing any but its shortest spelling.
    pub(super) fn varint(&mut self, field: &'static str) -> Result<u64, FormatError> {
        let offset = self.offset();
        let mut value = 0_u64;
        for index in 0..VARINT_LEN_MAX {
            let byte = self.u8(field)?;
            let bits = u64::from(byte & 0x7f);
            // The tenth byte holds the one bit that is left of 64.
            if index == VARINT_LEN_MAX - 1 && bits > 1 {
                break;
            }
            value |= bits << (7 * index);
            if byte & 0x80 == 0 {
                if byte == 0 && index > 0 {
                    break;
                }
                return Ok(value);
            }
        }
        Err(FormatError::Syntax { field, offset })
    }

    /// Reads a varint that has a limit.
    pub(super) fn varint_max(&mut self, field: &'static str, max: u64) -> Result<u64, FormatError> {
        let offset = self.offset();
        let value = self.varint(field)?;
        if value > max { Err(FormatError::Limit { field, value, max, offset }) } else { Ok(value) }
    }

    /// Reads bytes that must be exactly these.
    pub(super) fn expect(&mut self, field: &'static str, expected: &[u8]) -> Result<(), FormatError> {
        let offset = self.offset();
        if self.take(field, expected.len())? == expected { Ok(()) } else { Err(FormatError::Syntax { field, offset }) }
    }

    /// Nothing may be left.
    pub(super) fn finish(self, field: &'static str) -> Result<(), FormatError> {
        if self.is_empty() { Ok(()) } else { Err(FormatError::Syntax { field, offset: self.offset() }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn varints_have_one_spelling() {
        for shift in 0..64 {
            for value in [(1_u64 << shift) - 1, 1 << shift, u64::MAX >> shift] {
                let mut bytes = Vec::new();
                put_varint(value, &mut bytes);
                assert_eq!(bytes.len(), varint_len(value), "{value}");
                let mut input = Input::new(&bytes);
                assert_eq!(input.varint("n"), Ok(value));
                assert!(input.is_empty());
            }
        }
        let refused: [&[u8]; 5] = [
            &[],
            &[0x80],
            &[0x80, 0x00],
            &[0xff, 0x80, 0x00],
            &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02],
        ];
        for bytes in refused {
            assert!(Input::new(bytes).varint("n").is_err(), "{bytes:x?}");
        }
    }
}
