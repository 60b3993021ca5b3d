//! The CA field, and how a store path follows from content.
//!
//! A store path's hash part is a digest, folded to 160 bits, of `<type>:<inner digest>:<store dir>:<name>`. For
//! content-addressed objects type and inner digest follow from the content and its references, so anybody can check that
//! such a path has the right name, and `narlake push` can name a directory as `nix-store --add` would without Nix.
//!
//! | method | CA field | type | inner digest |
//! |---|---|---|---|
//! | text | `text:sha256:<nix32>` | `text` and references | SHA-256 of the file |
//! | NAR, SHA-256 | `fixed:r:sha256:<nix32>` | `source` and references | SHA-256 of the NAR, self-references zeroed |
//! | all else | `fixed:[r:\|git:]<algorithm>:<nix32>` | `output:out` | SHA-256 of `fixed:out:[r:\|git:]<algorithm>:<hex>:` |

use std::fmt;
use std::str::FromStr;

use super::base32;
use super::hash::{Sha256Hash, to_hex};
use super::store_path::{STORE_HASH_LEN, StoreDir, StorePath, StorePathHash, StorePathName};
use crate::error::FormatError;

/// What an object is addressed by: the value of a narinfo's CA line.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum ContentAddress {
    /// A file by the digest of its bytes, with references: derivations and `builtins.toFile`.
    Text(Sha256Hash),
    /// A file by the digest of its bytes, without references.
    Flat(Sha256Hash),
    /// A tree by the digest of its NAR, in which references to itself count as zeros.
    NixArchive(Sha256Hash),
    /// Any other method and algorithm that Nix knows.
    Other(OtherAddress),
}

impl ContentAddress {
    /// The store path of an object with this content, this name and these references.
    ///
    /// The references do not include the object itself, which `self_reference` stands for. Fails where the method
    /// allows no references and there are some.
    pub fn store_path(
        &self,
        dir: &StoreDir,
        name: &StorePathName,
        references: &[StorePath],
        self_reference: bool,
    ) -> Result<StorePath, FormatError> {
        let with_references = |kind: &str| {
            let mut sorted: Vec<&StorePath> = references.iter().collect();
            sorted.sort_unstable();
            sorted.dedup();
            let mut kind = kind.to_owned();
            for reference in sorted {
                kind.push(':');
                kind.push_str(&reference.display_in(dir).to_string());
            }
            if self_reference {
                kind.push_str(":self");
            }
            kind
        };
        let fixed = |payload: String| {
            if references.is_empty() && !self_reference {
                Ok(make_store_path(dir, "output:out", &Sha256Hash::of(payload.as_bytes()), name))
            } else {
                Err(FormatError::Syntax { field: "references of a fixed output", offset: 0 })
            }
        };
        match self {
            Self::Text(_) if self_reference => {
                Err(FormatError::Syntax { field: "self reference of a text", offset: 0 })
            }
            Self::Text(hash) => Ok(make_store_path(dir, &with_references("text"), hash, name)),
            Self::NixArchive(hash) => Ok(make_store_path(dir, &with_references("source"), hash, name)),
            Self::Flat(hash) => fixed(format!("fixed:out:sha256:{}:", hash.to_hex())),
            Self::Other(other) => {
                let OtherAddress { method, algorithm, digest } = other;
                fixed(format!("fixed:out:{}{}:{}:", method.prefix(), algorithm.name(), to_hex(digest)))
            }
        }
    }
}

/// The store path for a type and an inner digest, as Nix computes it. [`ContentAddress::store_path`] is the safe way in.
#[must_use]
pub fn make_store_path(dir: &StoreDir, kind: &str, inner: &Sha256Hash, name: &StorePathName) -> StorePath {
    let digest = Sha256Hash::of(format!("{kind}:sha256:{}:{dir}:{name}", inner.to_hex()).as_bytes());
    let mut folded = [0; STORE_HASH_LEN];
    for (place, byte) in (0..STORE_HASH_LEN).cycle().zip(digest.as_bytes()) {
        folded[place] ^= byte;
    }
    StorePath { hash: StorePathHash::from_bytes(folded), name: name.clone() }
}

impl fmt::Display for ContentAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(hash) => write!(f, "text:{hash}"),
            Self::Flat(hash) => write!(f, "fixed:{hash}"),
            Self::NixArchive(hash) => write!(f, "fixed:r:{hash}"),
            Self::Other(OtherAddress { method, algorithm, digest }) => {
                write!(f, "fixed:{}{}:{}", method.prefix(), algorithm.name(), base32::encode(digest))
            }
        }
    }
}

impl FromStr for ContentAddress {
    type Err = FormatError;

    fn from_str(text: &str) -> Result<Self, FormatError> {
        if let Some(hash) = text.strip_prefix("text:") {
            return parse_sha256(hash).map(Self::Text);
        }
        let rest = text.strip_prefix("fixed:").ok_or(error())?;
        let (method, hash) = if let Some(hash) = rest.strip_prefix("r:") {
            (Method::NixArchive, hash)
        } else if let Some(hash) = rest.strip_prefix("git:") {
            (Method::Git, hash)
        } else {
            (Method::Flat, rest)
        };
        let (name, digits) = hash.split_once(':').ok_or(error())?;
        let algorithm = Algorithm::ALL.into_iter().find(|algorithm| algorithm.name() == name).ok_or(error())?;
        match (method, algorithm) {
            (Method::Flat, Algorithm::Sha256) => parse_sha256(hash).map(Self::Flat),
            (Method::NixArchive, Algorithm::Sha256) => parse_sha256(hash).map(Self::NixArchive),
            _ => {
                let digest = base32::decode(digits, algorithm.digest_len())?.into();
                Ok(Self::Other(OtherAddress { method, algorithm, digest }))
            }
        }
    }
}

/// An address whose method or algorithm is none of those with a variant of their own.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct OtherAddress {
    method: Method,
    algorithm: Algorithm,
    digest: Box<[u8]>,
}

/// How the file tree becomes bytes to hash.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
enum Method {
    Flat,
    NixArchive,
    Git,
}

impl Method {
    const fn prefix(self) -> &'static str {
        match self {
            Self::Flat => "",
            Self::NixArchive => "r:",
            Self::Git => "git:",
        }
    }
}

/// The hash algorithms that Nix knows.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
enum Algorithm {
    Blake3,
    Md5,
    Sha1,
    Sha256,
    Sha512,
}

impl Algorithm {
    const ALL: [Self; 5] = [Self::Blake3, Self::Md5, Self::Sha1, Self::Sha256, Self::Sha512];

    const fn name(self) -> &'static str {
        match self {
            Self::Blake3 => "blake3",
            Self::Md5 => "md5",
            Self::Sha1 => "sha1",
            Self::Sha256 => "sha256",
            Self::Sha512 => "sha512",
        }
    }

    const fn digest_len(self) -> usize {
        match self {
            Self::Md5 => 16,
            Self::Sha1 => 20,
            Self::Blake3 | Self::Sha256 => 32,
            Self::Sha512 => 64,
        }
    }
}

/// Nix writes nix32 here, and reads other spellings too; one is enough.
fn parse_sha256(text: &str) -> Result<Sha256Hash, FormatError> {
    Sha256Hash::parse_base32(text.strip_prefix("sha256:").ok_or(error())?)
}

const fn error() -> FormatError {
    FormatError::Syntax { field: "content address", offset: 0 }
}

#[cfg(test)]
mod tests;
