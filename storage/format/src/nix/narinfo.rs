//! narinfo: the metadata of one store path, as binary caches exchange it.
//!
//! Lines of `<field>: <value>`, each ended by a newline, in this order when written:
//! `StorePath URL Compression FileHash FileSize NarHash NarSize References Deriver Sig* CA`, then fields that Nix does
//! not know. The parser takes any order, as Nix's does, but refuses what Nix lets pass to nobody's good: a repeated
//! field, control characters, numbers with signs or leading zeros, a signature that is none.
//!
//! What a signature covers is the [fingerprint](NarInfo::fingerprint): path, NarHash, NarSize and references. URL,
//! deriver and CA are not covered.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::str::FromStr;

use crate::error::FormatError;
use crate::limits::{NAR_SIZE_MAX, NARINFO_MAX, REFERENCES_MAX, SIGNATURES_MAX};

use super::compression::Compression;
use super::content_address::ContentAddress;
use super::hash::Sha256Hash;
use super::signature::{PublicKey, SecretKey, Signature};
use super::store_path::{StoreDir, StorePath};

/// The metadata of one store path.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NarInfo {
    /// The path.
    pub store_path: StorePath,
    /// Where the NAR is, relative to the cache.
    pub url: String,
    /// How the NAR at `url` is compressed.
    pub compression: Compression,
    /// The digest of the bytes at `url`.
    pub file_hash: Option<Sha256Hash>,
    /// The number of bytes at `url`.
    pub file_size: Option<u64>,
    /// The digest of the NAR.
    pub nar_hash: Sha256Hash,
    /// The number of bytes of the NAR, never 0.
    pub nar_size: u64,
    /// The paths that this one refers to, itself included where it does; ascending, each once.
    pub references: Vec<StorePath>,
    /// The derivation that built the path.
    pub deriver: Option<StorePath>,
    /// Signatures over the fingerprint; ascending, each once.
    pub signatures: Vec<Signature>,
    /// What the path is addressed by, if by its content.
    pub ca: Option<ContentAddress>,
    /// Fields that Nix does not know, in order; a name may repeat.
    pub extra: Vec<(String, String)>,
}

impl NarInfo {
    /// Reads the text.
    pub fn parse(dir: &StoreDir, bytes: &[u8]) -> Result<Self, NarInfoError> {
        if bytes.len() > NARINFO_MAX {
            return Err(NarInfoError::TooLong { length: bytes.len() as u64, max: NARINFO_MAX as u64 });
        }
        let text =
            str::from_utf8(bytes).map_err(|error| NarInfoError::NotText { offset: error.valid_up_to() as u64 })?;
        if let Some(offset) = text.bytes().position(|byte| byte.is_ascii_control() && byte != b'\n') {
            return Err(NarInfoError::NotText { offset: offset as u64 });
        }
        let mut fields = Fields::default();
        for (line, number) in text.split_inclusive('\n').zip(1..) {
            let line = line.strip_suffix('\n').ok_or(NarInfoError::Unfinished { line: number })?;
            let (name, value) = line.split_once(": ").ok_or(NarInfoError::Line { line: number })?;
            fields.take(dir, number, name, value)?;
        }
        fields.finish()
    }

    /// Writes the text, as Nix does.
    ///
    /// # Panics
    /// If a text field holds a newline, which no parser lets in.
    #[must_use]
    pub fn to_text(&self, dir: &StoreDir) -> String {
        let mut text = String::with_capacity(512);
        let mut line = |name: &str, value: &dyn std::fmt::Display| {
            let start = text.len();
            // Writing to a string does not fail.
            let _ = writeln!(text, "{name}: {value}");
            assert_eq!(text[start..].find('\n'), Some(text.len() - start - 1), "newline inside the field {name}");
        };
        line("StorePath", &self.store_path.display_in(dir));
        line("URL", &self.url);
        line("Compression", &self.compression);
        if let Some(hash) = &self.file_hash {
            line("FileHash", hash);
        }
        if let Some(size) = &self.file_size {
            line("FileSize", size);
        }
        line("NarHash", &self.nar_hash);
        line("NarSize", &self.nar_size);
        line("References", &join(&ascending(&self.references), " "));
        if let Some(deriver) = &self.deriver {
            line("Deriver", deriver);
        }
        for signature in ascending(&self.signatures).iter() {
            line("Sig", signature);
        }
        if let Some(ca) = &self.ca {
            line("CA", ca);
        }
        for (name, value) in &self.extra {
            line(name, value);
        }
        text
    }

    /// What signatures are made over: `1;<path>;<NarHash>;<NarSize>;<references>`, all paths absolute, the references
    /// ascending and separated by commas.
    #[must_use]
    pub fn fingerprint(&self, dir: &StoreDir) -> String {
        let references = ascending(&self.references);
        let references: Vec<_> = references.iter().map(|path| path.display_in(dir)).collect();
        let path = self.store_path.display_in(dir);
        format!("1;{path};{};{};{}", self.nar_hash, self.nar_size, join(&references, ","))
    }

    /// Signs the fingerprint and adds the signature, in place of one by a key of that name.
    pub fn sign(&mut self, dir: &StoreDir, key: &SecretKey) {
        let signature = key.sign(self.fingerprint(dir).as_bytes());
        self.signatures.retain(|other| other.key_name() != key.name());
        self.signatures.push(signature);
        self.signatures.sort_unstable();
    }

    /// Whether one of these keys signed the fingerprint.
    #[must_use]
    pub fn is_signed_by(&self, dir: &StoreDir, keys: &[PublicKey]) -> bool {
        let fingerprint = self.fingerprint(dir);
        let valid = |signature: &Signature| keys.iter().any(|key| key.verify(fingerprint.as_bytes(), signature));
        self.signatures.iter().any(valid)
    }

    /// Whether the path is the one that its content address, name and references make. True where there is no CA.
    ///
    /// A digest over a NAR is not compared with NarHash: the two differ where the object refers to itself.
    #[must_use]
    pub fn content_address_holds(&self, dir: &StoreDir) -> bool {
        let Some(ca) = &self.ca else { return true };
        let mut references = self.references.clone();
        references.retain(|path| *path != self.store_path);
        let self_reference = references.len() < self.references.len();
        ca.store_path(dir, &self.store_path.name, &references, self_reference).as_ref() == Ok(&self.store_path)
    }
}

/// Why a text is no narinfo.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NarInfoError {
    /// The text is longer than any narinfo.
    #[error("narinfo is {length} bytes long, the limit is {max}")]
    TooLong {
        /// Its length in bytes.
        length: u64,
        /// The limit.
        max: u64,
    },
    /// The bytes are not UTF-8, or hold a control character other than the newline.
    #[error("narinfo is not text at offset {offset}")]
    NotText {
        /// Where.
        offset: u64,
    },
    /// The last line has no newline: the text may have been cut off.
    #[error("narinfo ends inside line {line}")]
    Unfinished {
        /// The line, counted from 1.
        line: u32,
    },
    /// A line is not `<field>: <value>`.
    #[error("line {line} of narinfo has no \": \"")]
    Line {
        /// The line, counted from 1.
        line: u32,
    },
    /// A field that may be there once is there twice.
    #[error("line {line} of narinfo repeats {field}")]
    Repeated {
        /// The field.
        field: &'static str,
        /// The line, counted from 1.
        line: u32,
    },
    /// A field that must be there is not.
    #[error("narinfo lacks {field}")]
    Missing {
        /// The field.
        field: &'static str,
    },
    /// A value is not what its field holds.
    #[error("line {line} of narinfo: invalid {field}")]
    Field {
        /// The field.
        field: &'static str,
        /// The line, counted from 1.
        line: u32,
        /// What is wrong with the value; offsets count from the value's start.
        #[source]
        source: FormatError,
    },
}

/// The fields met so far.
#[derive(Default)]
struct Fields {
    store_path: Option<StorePath>,
    url: Option<String>,
    compression: Option<Compression>,
    file_hash: Option<Sha256Hash>,
    file_size: Option<u64>,
    nar_hash: Option<Sha256Hash>,
    nar_size: Option<u64>,
    references: Option<Vec<StorePath>>,
    /// The outer option is whether the field was there.
    deriver: Option<Option<StorePath>>,
    signatures: Vec<Signature>,
    ca: Option<Option<ContentAddress>>,
    extra: Vec<(String, String)>,
}

impl Fields {
    fn take(&mut self, dir: &StoreDir, line: u32, name: &str, value: &str) -> Result<(), NarInfoError> {
        // `References: ` has an empty value where there are none; an empty Deriver or CA is none either, as in Nix.
        match name {
            "StorePath" => once(&mut self.store_path, "StorePath", line, StorePath::parse_absolute(dir, value)),
            "URL" => once(&mut self.url, "URL", line, url(value)),
            "Compression" => once(&mut self.compression, "Compression", line, value.parse()),
            "FileHash" => once(&mut self.file_hash, "FileHash", line, value.parse()),
            "FileSize" => once(&mut self.file_size, "FileSize", line, size(value)),
            "NarHash" => once(&mut self.nar_hash, "NarHash", line, value.parse()),
            "NarSize" => once(&mut self.nar_size, "NarSize", line, size(value)),
            "References" => once(&mut self.references, "References", line, references(value)),
            "Deriver" => once(&mut self.deriver, "Deriver", line, optional(value, "unknown-deriver")),
            "CA" => once(&mut self.ca, "CA", line, optional(value, "")),
            "Sig" => {
                let error = |source| NarInfoError::Field { field: "Sig", line, source };
                limit("number of signatures", self.signatures.len() + 1, SIGNATURES_MAX).map_err(error)?;
                self.signatures.push(value.parse().map_err(error)?);
                Ok(())
            }
            _ => {
                self.extra.push((name.into(), value.into()));
                Ok(())
            }
        }
    }

    fn finish(mut self) -> Result<NarInfo, NarInfoError> {
        let missing = |field| NarInfoError::Missing { field };
        self.signatures.sort_unstable();
        self.signatures.dedup();
        Ok(NarInfo {
            store_path: self.store_path.ok_or(missing("StorePath"))?,
            url: self.url.ok_or(missing("URL"))?,
            compression: self.compression.unwrap_or(Compression::Bzip2),
            file_hash: self.file_hash,
            file_size: self.file_size,
            nar_hash: self.nar_hash.ok_or(missing("NarHash"))?,
            nar_size: self.nar_size.ok_or(missing("NarSize"))?,
            references: self.references.unwrap_or_default(),
            deriver: self.deriver.flatten(),
            signatures: self.signatures,
            ca: self.ca.flatten(),
            extra: self.extra,
        })
    }
}

fn once<T>(
    place: &mut Option<T>,
    field: &'static str,
    line: u32,
    value: Result<T, FormatError>,
) -> Result<(), NarInfoError> {
    let value = value.map_err(|source| NarInfoError::Field { field, line, source })?;
    match place.replace(value) {
        None => Ok(()),
        Some(_) => Err(NarInfoError::Repeated { field, line }),
    }
}

fn url(value: &str) -> Result<String, FormatError> {
    if value.is_empty() { Err(FormatError::Syntax { field: "URL", offset: 0 }) } else { Ok(value.into()) }
}

/// A size above 0 in decimal. The one spelling: Nix writes no sign and no leading zero.
fn size(value: &str) -> Result<u64, FormatError> {
    let error = FormatError::Syntax { field: "size", offset: 0 };
    if !value.starts_with(|digit: char| matches!(digit, '1'..='9')) {
        return Err(error);
    }
    let size = value.parse().map_err(|_| error)?;
    if size > NAR_SIZE_MAX {
        return Err(FormatError::Limit { field: "size", value: size, max: NAR_SIZE_MAX, offset: 0 });
    }
    Ok(size)
}

fn references(value: &str) -> Result<Vec<StorePath>, FormatError> {
    let mut paths = Vec::new();
    for word in value.split(' ').filter(|word| !word.is_empty()) {
        limit("number of references", paths.len() + 1, REFERENCES_MAX)?;
        paths.push(word.parse()?);
    }
    paths.sort_unstable();
    paths.dedup();
    Ok(paths)
}

fn optional<T: FromStr<Err = FormatError>>(value: &str, none: &str) -> Result<Option<T>, FormatError> {
    if value.is_empty() || value == none { Ok(None) } else { value.parse().map(Some) }
}

fn limit(field: &'static str, value: usize, max: usize) -> Result<(), FormatError> {
    let (value, max) = (value as u64, max as u64);
    if value > max { Err(FormatError::Limit { field, value, max, offset: 0 }) } else { Ok(()) }
}

/// The items, ascending and each once; they are so already but where a caller built the value by hand.
fn ascending<T: Ord + Clone>(items: &[T]) -> Cow<'_, [T]> {
    if items.is_sorted_by(|a, b| a < b) {
        return Cow::Borrowed(items);
    }
    let mut items = items.to_vec();
    items.sort_unstable();
    items.dedup();
    Cow::Owned(items)
}

fn join<T: std::fmt::Display>(items: &[T], separator: &str) -> String {
    let mut text = String::new();
    for (index, item) in items.iter().enumerate() {
        let separator = if index == 0 { "" } else { separator };
        // Writing to a string does not fail.
        let _ = write!(text, "{separator}{item}");
    }
    text
}

#[cfg(test)]
mod tests;
