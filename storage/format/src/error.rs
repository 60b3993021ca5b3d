//! What can be wrong with bytes that claim to be one of our formats.

/// Bytes that are not a valid encoding. Carries where, and which field; the caller adds the key or path.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// The bytes end inside a field.
    #[error("truncated at offset {offset}, in {field}")]
    Truncated {
        /// The field being read.
        field: &'static str,
        /// Offset in bytes of the end.
        offset: u64,
    },
    /// A field's bytes are none of the values that the format allows, or not the one canonical spelling.
    #[error("invalid {field} at offset {offset}")]
    Syntax {
        /// The field being read.
        field: &'static str,
        /// Offset in bytes at which the field starts.
        offset: u64,
    },
    /// A field goes beyond its limit (`limits`).
    #[error("{field} is {value} at offset {offset}, the limit is {max}")]
    Limit {
        /// The field being read.
        field: &'static str,
        /// What the bytes say.
        value: u64,
        /// The limit.
        max: u64,
        /// Offset in bytes at which the field starts.
        offset: u64,
    },
    /// The format's version is not one that this build reads.
    #[error("{format} has version {version}, this build reads {known}")]
    Version {
        /// The format.
        format: &'static str,
        /// The version found.
        version: u32,
        /// The versions this build reads.
        known: &'static str,
    },
    /// The bytes do not hash to what names or guards them.
    #[error("checksum of {field} does not match at offset {offset}")]
    Checksum {
        /// What was hashed.
        field: &'static str,
        /// Offset in bytes at which it starts.
        offset: u64,
    },
}

/// An error and all its causes, on one line.
#[must_use]
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
