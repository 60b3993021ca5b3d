//! SHA-256 digests, in the spellings that Nix gives them.
//!
//! Nix names NARs, files and derivations by SHA-256 and writes the digest in four ways: `sha256:<nix32>` in narinfos,
//! `sha256:<hex>` in realisations and store path computations, bare hexadecimal in the worker protocol, and
//! `sha256-<base64>` (SRI) in expressions. One length belongs to each alphabet, so a text is never ambiguous.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use sha2::Digest as _;

use super::base32;
use crate::error::FormatError;

/// Bytes of a SHA-256 digest.
pub const SHA256_LEN: usize = 32;

/// A SHA-256 digest.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Sha256Hash([u8; SHA256_LEN]);

impl Sha256Hash {
    /// The digest of these bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(sha2::Sha256::digest(bytes).into())
    }

    /// A digest from its bytes.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; SHA256_LEN]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; SHA256_LEN] {
        &self.0
    }

    /// 64 lower-case hexadecimal digits, without a prefix.
    #[must_use]
    pub fn to_hex(&self) -> String {
        to_hex(&self.0)
    }

    /// 52 digits of nix32, without a prefix.
    #[must_use]
    pub fn to_base32(&self) -> String {
        base32::encode(&self.0)
    }

    /// `sha256-<base64>`.
    #[must_use]
    pub fn to_sri(&self) -> String {
        format!("sha256-{}", BASE64.encode(self.0))
    }

    /// Reads 64 lower-case hexadecimal digits.
    pub fn parse_hex(text: &str) -> Result<Self, FormatError> {
        let mut bytes = [0; SHA256_LEN];
        if parse_hex(text.as_bytes(), &mut bytes) { Ok(Self(bytes)) } else { Err(error()) }
    }

    /// Reads 52 digits of nix32.
    pub fn parse_base32(text: &str) -> Result<Self, FormatError> {
        let mut bytes = [0; SHA256_LEN];
        base32::decode_into(text.as_bytes(), &mut bytes)?;
        Ok(Self(bytes))
    }

    /// Reads a digest without a prefix, hexadecimal or nix32 by its length.
    pub fn parse_bare(text: &str) -> Result<Self, FormatError> {
        if text.len() == 2 * SHA256_LEN { Self::parse_hex(text) } else { Self::parse_base32(text) }
    }

    fn parse_base64(text: &str) -> Result<Self, FormatError> {
        let bytes = BASE64.decode(text).map_err(|_| error())?;
        bytes.try_into().map(Self).map_err(|_| error())
    }
}

impl fmt::Display for Sha256Hash {
    /// Writes `sha256:<nix32>`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.to_base32())
    }
}

impl fmt::Debug for Sha256Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sha256Hash({self})")
    }
}

impl FromStr for Sha256Hash {
    type Err = FormatError;

    /// Reads `sha256:` and hexadecimal, nix32 or base 64, told apart by their length, or `sha256-` and base 64.
    fn from_str(text: &str) -> Result<Self, FormatError> {
        if let Some(digits) = text.strip_prefix("sha256:") {
            if digits.len() == BASE64_LEN { Self::parse_base64(digits) } else { Self::parse_bare(digits) }
        } else {
            Self::parse_base64(text.strip_prefix("sha256-").ok_or(error())?)
        }
    }
}

const BASE64_LEN: usize = SHA256_LEN.div_ceil(3) * 4;

const fn error() -> FormatError {
    FormatError::Syntax { field: "sha256", offset: 0 }
}

/// Computes a [`Sha256Hash`] as the bytes arrive.
#[derive(Clone, Default)]
pub struct Sha256Hasher(sha2::Sha256);

impl Sha256Hasher {
    /// A hasher that has seen no bytes.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The digest of the bytes seen.
    #[must_use]
    pub fn finish(self) -> Sha256Hash {
        Sha256Hash(self.0.finalize().into())
    }
}

/// Spells bytes as lower-case hexadecimal.
pub(super) fn to_hex(bytes: &[u8]) -> String {
    let digit = |nibble: u8| char::from(b"0123456789abcdef"[usize::from(nibble & 15)]);
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(*byte)]).collect()
}

/// Reads lower-case hexadecimal that fills `out` exactly; false if it does not.
pub(super) fn parse_hex(text: &[u8], out: &mut [u8]) -> bool {
    let digit = |c: u8| match c {
        b'0'..=b'9' => Some(c - b'0'),
        b'a'..=b'f' => Some(c - b'a' + 10),
        _ => None,
    };
    let (pairs, rest) = text.as_chunks::<2>();
    if !rest.is_empty() || pairs.len() != out.len() {
        return false;
    }
    pairs.iter().zip(out).all(|([high, low], byte)| match (digit(*high), digit(*low)) {
        (Some(high), Some(low)) => {
            *byte = high << 4 | low;
            true
        }
        _ => false,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// SHA-256 of "abc", FIPS 180-2 appendix B.1, in each of Nix's spellings.
    const HEX: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
    const NIX32: &str = "1b8m03r63zqhnjf7l5wnldhh7c134ap5vpj0850ymkq1iyzicy5s";
    const SRI: &str = "sha256-ungWv48Bz+pBQUDeXa4iI7ADYaOWF3qctBD/YfIAFa0=";

    #[test]
    fn spellings_of_abc() {
        let hash = Sha256Hash::of(b"abc");
        assert_eq!(hash.to_hex(), HEX);
        assert_eq!(hash.to_base32(), NIX32);
        assert_eq!(hash.to_sri(), SRI);
        assert_eq!(hash.to_string(), format!("sha256:{NIX32}"));
        let base64 = SRI.trim_start_matches("sha256-");
        for text in [format!("sha256:{HEX}"), format!("sha256:{NIX32}"), format!("sha256:{base64}"), SRI.into()] {
            assert_eq!(text.parse(), Ok(hash), "{text}");
        }
        assert_eq!(Sha256Hash::parse_bare(HEX), Ok(hash));
        assert_eq!(Sha256Hash::parse_bare(NIX32), Ok(hash));
        let mut hasher = Sha256Hasher::new();
        hasher.update(b"a");
        hasher.update(b"bc");
        assert_eq!(hasher.finish(), hash);
    }

    #[test]
    fn refusals() {
        for text in [
            "",
            "sha256:",
            "sha256-",
            HEX,
            &format!("sha512:{HEX}"),
            &format!("sha256-{HEX}"),
            &format!("sha256:{}", HEX.to_uppercase()),
            &format!("sha256: {NIX32}"),
            &format!("sha256:{NIX32}0"),
            &SRI.replace("0=", "1="), // bits beyond the digest
            SRI.trim_end_matches('='),
        ] {
            assert!(text.parse::<Sha256Hash>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn round_trip(bytes: [u8; 32]) {
            let hash = Sha256Hash::from_bytes(bytes);
            prop_assert_eq!(hash.to_string().parse(), Ok(hash));
            prop_assert_eq!(hash.to_sri().parse(), Ok(hash));
            prop_assert_eq!(Sha256Hash::parse_bare(&hash.to_hex()), Ok(hash));
        }
    }
}
