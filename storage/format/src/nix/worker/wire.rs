//! Numbers, strings and lists of the worker protocol.

use crate::error::FormatError;
use crate::limits::{WORKER_LIST_MAX, WORKER_REQUEST_MAX, WORKER_STRING_MAX};

use super::WorkerError;

/// The outcome of decoding the start of a buffer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Decoded<T> {
    /// The message goes on; decode again once the buffer holds at least this many bytes.
    Incomplete {
        /// A length that the message has at least, more than the buffer's.
        needed: usize,
    },
    /// A whole message.
    Complete {
        /// The message.
        value: T,
        /// Bytes it took.
        length: usize,
    },
}

/// Appends a number.
pub fn put_u64(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_le_bytes());
}

/// Appends a string.
pub fn put_string(out: &mut Vec<u8>, text: &str) {
    put_u64(out, text.len() as u64);
    out.extend_from_slice(text.as_bytes());
    out.resize(out.len() + padding(text.len()), 0);
}

/// Appends a list of strings.
pub fn put_list<T: AsRef<str>>(out: &mut Vec<u8>, items: impl ExactSizeIterator<Item = T>) {
    put_u64(out, items.len() as u64);
    for item in items {
        put_string(out, item.as_ref());
    }
}

/// Why a decoder stops short of a value.
pub(super) enum Stop {
    /// The message needs at least this many bytes in all.
    Incomplete(usize),
    /// The connection cannot go on.
    Error(WorkerError),
}

impl From<WorkerError> for Stop {
    fn from(error: WorkerError) -> Self {
        Self::Error(error)
    }
}

impl From<FormatError> for Stop {
    fn from(source: FormatError) -> Self {
        Self::Error(WorkerError::Frame { source })
    }
}

/// Runs a decoder over the start of a buffer.
pub(super) fn decode<T>(
    bytes: &[u8],
    read: impl FnOnce(&mut Cursor<'_>) -> Result<T, Stop>,
) -> Result<Decoded<T>, WorkerError> {
    let mut cursor = Cursor { bytes, at: 0 };
    match read(&mut cursor) {
        Ok(value) => Ok(Decoded::Complete { value, length: cursor.at }),
        Err(Stop::Incomplete(needed)) if needed > WORKER_REQUEST_MAX => {
            Err(WorkerError::Frame { source: limit_error("length of message", needed as u64, WORKER_REQUEST_MAX, 0) })
        }
        Err(Stop::Incomplete(needed)) => Ok(Decoded::Incomplete { needed }),
        Err(Stop::Error(error)) => Err(error),
    }
}

/// Reads a message from its start.
pub(super) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn u64(&mut self) -> Result<u64, Stop> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let word = rest.first_chunk::<8>().ok_or(Stop::Incomplete(self.at + 8))?;
        self.at += 8;
        Ok(u64::from_le_bytes(*word))
    }

    pub(super) fn bool(&mut self, field: &'static str) -> Result<bool, Stop> {
        let offset = self.at as u64;
        match self.u64()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(FormatError::Syntax { field, offset }.into()),
        }
    }

    pub(super) fn bytes(&mut self) -> Result<&'a [u8], Stop> {
        self.bytes_to(WORKER_STRING_MAX)
    }

    fn bytes_to(&mut self, max: usize) -> Result<&'a [u8], Stop> {
        let offset = self.at;
        let length = self.length("length of string", max)?;
        let padded = length + padding(length);
        let end = self.at + padded;
        let bytes = self.bytes.get(self.at..end).ok_or(Stop::Incomplete(end))?;
        let (text, zeros) = bytes.split_at(length);
        if zeros.iter().any(|byte| *byte != 0) {
            return Err(FormatError::Syntax { field: "padding of string", offset: offset as u64 }.into());
        }
        self.at = end;
        Ok(text)
    }

    pub(super) fn list(&mut self) -> Result<Vec<&'a [u8]>, Stop> {
        self.list_to(WORKER_LIST_MAX, WORKER_STRING_MAX)
    }

    /// A list of at most so many strings, each of at most so many bytes.
    pub(super) fn list_to(&mut self, count_max: usize, string_max: usize) -> Result<Vec<&'a [u8]>, Stop> {
        let count = self.length("length of list", count_max)?;
        // Each string takes a length word at the least. Asking for those of all strings that are still to come keeps a
        // long list that arrives in pieces from being decoded from its start for each string.
        let least = |at: usize, strings: usize| at.saturating_add(8 * strings);
        if self.bytes.len() < least(self.at, count) {
            return Err(Stop::Incomplete(least(self.at, count)));
        }
        let mut strings = Vec::with_capacity(count);
        for remaining in (0..count).rev() {
            strings.push(self.bytes_to(string_max).map_err(|stop| match stop {
                Stop::Incomplete(needed) => Stop::Incomplete(least(needed, remaining)),
                Stop::Error(error) => Stop::Error(error),
            })?);
        }
        Ok(strings)
    }

    /// The count of a list whose items are two values each.
    pub(super) fn pairs(&mut self) -> Result<usize, Stop> {
        let count = self.length("length of list", WORKER_LIST_MAX)?;
        let least = self.at + 16 * count;
        if self.bytes.len() < least { Err(Stop::Incomplete(least)) } else { Ok(count) }
    }

    fn length(&mut self, field: &'static str, max: usize) -> Result<usize, Stop> {
        let offset = self.at as u64;
        let value = self.u64()?;
        match usize::try_from(value) {
            Ok(length) if length <= max => Ok(length),
            _ => Err(limit_error(field, value, max, offset).into()),
        }
    }
}

/// A string's text.
pub(super) fn text(bytes: &[u8]) -> Result<&str, FormatError> {
    str::from_utf8(bytes).map_err(|error| FormatError::Syntax { field: "string", offset: error.valid_up_to() as u64 })
}

const fn limit_error(field: &'static str, value: u64, max: usize, offset: u64) -> FormatError {
    FormatError::Limit { field, value, max: max as u64, offset }
}

const fn padding(length: usize) -> usize {
    length.wrapping_neg() % 8
}
