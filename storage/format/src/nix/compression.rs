//! The compressions that Nix uploads NARs with.
//!
//! A narinfo names one by [`Compression::name`]; the uploaded object's URL ends in `.nar` and [`Compression::suffix`].
//! The two do not determine each other: gzip has no suffix, so `nar/<hash>.nar` may be a gzip stream.

use std::fmt;
use std::str::FromStr;

use crate::error::FormatError;

/// A compression of a NAR.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Compression {
    /// Not compressed.
    None,
    /// Brotli.
    Brotli,
    /// bzip2, which a narinfo without a `Compression` line means.
    Bzip2,
    /// gzip.
    Gzip,
    /// The LZ4 frame format.
    Lz4,
    /// lzip.
    Lzip,
    /// The legacy `.lzma` format.
    Lzma,
    /// xz, what Nix uploads unless told otherwise.
    Xz,
    /// Zstandard.
    Zstd,
}

impl Compression {
    /// Every compression.
    pub const ALL: [Self; 9] =
        [Self::None, Self::Brotli, Self::Bzip2, Self::Gzip, Self::Lz4, Self::Lzip, Self::Lzma, Self::Xz, Self::Zstd];

    /// The name in a narinfo.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Brotli => "br",
            Self::Bzip2 => "bzip2",
            Self::Gzip => "gzip",
            Self::Lz4 => "lz4",
            Self::Lzip => "lzip",
            Self::Lzma => "lzma",
            Self::Xz => "xz",
            Self::Zstd => "zstd",
        }
    }

    /// What follows `.nar` in the URL that Nix uploads to; empty where nothing does.
    #[must_use]
    pub const fn suffix(self) -> &'static str {
        match self {
            Self::None | Self::Gzip | Self::Lzma => "",
            Self::Brotli => ".br",
            Self::Bzip2 => ".bz2",
            Self::Lz4 => ".lz4",
            Self::Lzip => ".lzip",
            Self::Xz => ".xz",
            Self::Zstd => ".zst",
        }
    }

    /// The compression that a suffix stands for; none for the empty one.
    #[must_use]
    pub fn from_suffix(suffix: &str) -> Option<Self> {
        // `None` comes first in `ALL`, before the others that have no suffix.
        Self::ALL.into_iter().find(|compression| compression.suffix() == suffix)
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Compression {
    type Err = FormatError;

    fn from_str(text: &str) -> Result<Self, FormatError> {
        Self::ALL
            .into_iter()
            .find(|compression| compression.name() == text)
            .ok_or(FormatError::Syntax { field: "compression", offset: 0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_suffixes() {
        for compression in Compression::ALL {
            assert_eq!(compression.to_string().parse(), Ok(compression));
            if !compression.suffix().is_empty() {
                assert_eq!(Compression::from_suffix(compression.suffix()), Some(compression));
            }
        }
        assert_eq!(Compression::from_suffix(""), Some(Compression::None));
        assert_eq!(Compression::from_suffix(".zip"), None);
        assert!("XZ".parse::<Compression>().is_err());
        assert!("".parse::<Compression>().is_err());
    }
}
