//! The path record: the commit point of a store path in a cache.
//!
//! A record is a narinfo with three kinds of lines of our own behind those of Nix:
//!
//! ```text
//! X-Narlake-Manifest: <ManifestId, hex>
//! X-Narlake-Strings: <TableId, hex>
//! X-Narlake-Table: <the string table, base64>       only where it is short
//! X-Narlake-Sig: <key name>:<base64>                 any number
//! X-Narlake-Checksum: <16 hexadecimal digits>        the last line, over all before it
//! ```
//!
//! Nix's signatures cover the NAR as a whole. Ours cover, besides Nix's own fingerprint, the manifest and the table,
//! under which everything hangs by BLAKE3 ids: that is what lets a reader verify a single page of a path of which it
//! has fetched nothing else. No signature covers Deriver, CA and the signatures of others, so that a bit that flips in
//! them is seen, a record ends in a checksum: the first eight bytes of a digest of its text up to there. A record is
//! written by us alone, from parsed fields, and has one spelling.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

use super::strings::StringTable;
use super::wire::digest;
use crate::error::FormatError;
use crate::id::{ManifestId, TableId};
use crate::limits::{SIGNATURES_MAX, TABLE_INLINE_MAX};
use crate::nix::compression::Compression;
use crate::nix::narinfo::{NarInfo, NarInfoError};
use crate::nix::signature::{PublicKey, SecretKey, Signature};
use crate::nix::store_path::StoreDir;

const MANIFEST: &str = "X-Narlake-Manifest";
const STRINGS: &str = "X-Narlake-Strings";
const TABLE: &str = "X-Narlake-Table";
const SIG: &str = "X-Narlake-Sig";
const CHECKSUM: &str = "X-Narlake-Checksum";

const CHECKSUM_CONTEXT: &str = "narlake 2026-11 v1 path record";

/// What a cache says about one store path.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PathRecord {
    /// What Nix knows of it. Invariant: no `extra` lines, no file hash or size, compression none, and the URL that
    /// [`nar_url`] gives.
    info: NarInfo,
    /// The tree.
    manifest: ManifestId,
    /// The strings that scrubbing took out of it.
    table: TableId,
    /// The table itself where it is short. Invariant: `table` is its id.
    inline_table: Option<StringTable>,
    /// Signatures over [`PathRecord::lake_fingerprint`]; ascending, each once.
    lake_signatures: Vec<Signature>,
}

/// Where the NAR of a path is served, relative to the cache: the name follows from the content and never goes stale.
#[must_use]
pub fn nar_url(info: &NarInfo) -> String {
    format!("nar/{}-{}.nar", info.store_path.hash, info.nar_hash.to_base32())
}

impl PathRecord {
    /// The record of a path whose metadata was received, with its content as stored. Of `info`, what describes the
    /// transfer (URL, compression, file hash and size) and lines unknown to Nix are dropped. A table short enough is
    /// carried in the record.
    #[must_use]
    pub fn new(mut info: NarInfo, manifest: ManifestId, table: &StringTable) -> Self {
        info.url = nar_url(&info);
        info.compression = Compression::None;
        info.file_hash = None;
        info.file_size = None;
        info.extra.clear();
        info.references.sort_unstable();
        info.references.dedup();
        info.signatures.sort_unstable();
        info.signatures.dedup();
        let inline_table = (table.encoded_len() <= TABLE_INLINE_MAX).then(|| table.clone());
        Self { info, manifest, table: table.id(), inline_table, lake_signatures: Vec::new() }
    }

    /// What Nix knows of the path, as a binary cache serves it.
    #[must_use]
    pub const fn info(&self) -> &NarInfo {
        &self.info
    }

    /// The manifest.
    #[must_use]
    pub const fn manifest(&self) -> ManifestId {
        self.manifest
    }

    /// The string table's name.
    #[must_use]
    pub const fn table(&self) -> TableId {
        self.table
    }

    /// The string table, where the record carries it.
    #[must_use]
    pub const fn inline_table(&self) -> Option<&StringTable> {
        self.inline_table.as_ref()
    }

    /// The signatures over [`PathRecord::lake_fingerprint`].
    #[must_use]
    pub fn lake_signatures(&self) -> &[Signature] {
        &self.lake_signatures
    }

    /// What our signatures are made over: `narlake-1;<ManifestId>;<TableId>;` and Nix's fingerprint.
    #[must_use]
    pub fn lake_fingerprint(&self, dir: &StoreDir) -> String {
        format!("narlake-1;{};{};{}", self.manifest, self.table, self.info.fingerprint(dir))
    }

    /// Signs for Nix and for us, in place of earlier signatures by a key of that name.
    pub fn sign(&mut self, dir: &StoreDir, key: &SecretKey) {
        self.info.sign(dir, key);
        let signature = key.sign(self.lake_fingerprint(dir).as_bytes());
        self.lake_signatures.retain(|other| other.key_name() != key.name());
        self.lake_signatures.push(signature);
        self.lake_signatures.sort_unstable();
    }

    /// Whether one of these keys signed manifest, table and Nix's fingerprint.
    #[must_use]
    pub fn is_signed_by(&self, dir: &StoreDir, keys: &[PublicKey]) -> bool {
        let fingerprint = self.lake_fingerprint(dir);
        let valid = |signature: &Signature| keys.iter().any(|key| key.verify(fingerprint.as_bytes(), signature));
        self.lake_signatures.iter().any(valid)
    }

    /// The record's text.
    #[must_use]
    pub fn to_text(&self, dir: &StoreDir) -> String {
        let mut info = self.info.clone();
        info.extra.push((MANIFEST.into(), self.manifest.to_string()));
        info.extra.push((STRINGS.into(), self.table.to_string()));
        if let Some(table) = &self.inline_table {
            info.extra.push((TABLE.into(), BASE64.encode(table.encode())));
        }
        info.extra.extend(self.lake_signatures.iter().map(|signature| (SIG.into(), signature.to_string())));
        let text = info.to_text(dir);
        let checksum = checksum(&text);
        text + &checksum
    }

    /// Reads a record, refusing any text that `to_text` would not write.
    ///
    /// # Errors
    /// When the text is not a record.
    pub fn parse(dir: &StoreDir, text: &[u8]) -> Result<Self, RecordError> {
        let mut info = NarInfo::parse(dir, text)?;
        if info.extra.pop().is_none_or(|(name, _)| name != CHECKSUM) {
            return Err(RecordError::Missing { field: CHECKSUM });
        }
        check(text)?;
        let mut fields = Fields::default();
        for (name, value) in std::mem::take(&mut info.extra) {
            fields.take(&name, &value)?;
        }
        let manifest = fields.manifest.ok_or(RecordError::Missing { field: MANIFEST })?;
        let table = fields.table.ok_or(RecordError::Missing { field: STRINGS })?;
        if fields.inline_table.as_ref().is_some_and(|inline| inline.id() != table) {
            return Err(RecordError::Field { field: TABLE, source: FormatError::Checksum { field: TABLE, offset: 0 } });
        }
        let record =
            Self { info, manifest, table, inline_table: fields.inline_table, lake_signatures: fields.signatures };
        // One spelling: fields in our order, none of those that describe an upload.
        if record.info.url != nar_url(&record.info)
            || record.info.compression != Compression::None
            || record.info.file_hash.is_some()
            || record.info.file_size.is_some()
            || record.to_text(dir).as_bytes() != text
        {
            return Err(RecordError::NotCanonical);
        }
        Ok(record)
    }
}

/// Why a text is no path record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// It is no narinfo.
    #[error(transparent)]
    NarInfo(#[from] NarInfoError),
    /// It is a narinfo, but lacks a field of ours.
    #[error("path record lacks {field}")]
    Missing {
        /// The field.
        field: &'static str,
    },
    /// A field of ours is there twice.
    #[error("path record repeats {field}")]
    Repeated {
        /// The field.
        field: &'static str,
    },
    /// A field that is neither Nix's nor ours.
    #[error("path record has the unknown field {name:?}")]
    Unknown {
        /// Its name.
        name: String,
    },
    /// A value is not what its field holds.
    #[error("path record: invalid {field}")]
    Field {
        /// The field.
        field: &'static str,
        /// What is wrong with the value.
        #[source]
        source: FormatError,
    },
    /// The values are fine, their spelling is not the one a record has.
    #[error("path record is not in canonical form")]
    NotCanonical,
}

/// The fields of our own met so far.
#[derive(Default)]
struct Fields {
    manifest: Option<ManifestId>,
    table: Option<TableId>,
    inline_table: Option<StringTable>,
    signatures: Vec<Signature>,
}

impl Fields {
    fn take(&mut self, name: &str, value: &str) -> Result<(), RecordError> {
        match name {
            MANIFEST => once(MANIFEST, &mut self.manifest, value.parse()),
            STRINGS => once(STRINGS, &mut self.table, value.parse()),
            TABLE => once(TABLE, &mut self.inline_table, decode_table(value)),
            SIG => {
                let signature = value.parse().map_err(|source| RecordError::Field { field: SIG, source })?;
                if self.signatures.last().is_some_and(|last| *last >= signature) {
                    return Err(RecordError::NotCanonical);
                }
                self.signatures.push(signature);
                let (value, max) = (self.signatures.len() as u64, SIGNATURES_MAX as u64);
                let too_many = FormatError::Limit { field: "number of signatures", value, max, offset: 0 };
                if value > max { Err(RecordError::Field { field: SIG, source: too_many }) } else { Ok(()) }
            }
            _ => Err(RecordError::Unknown { name: name.into() }),
        }
    }
}

/// The last line, over the text of those before it.
fn checksum(text: &str) -> String {
    let [a, b, c, d, e, f, g, h, ..] = digest(CHECKSUM_CONTEXT, &[text.as_bytes()]);
    format!("{CHECKSUM}: {:016x}\n", u64::from_be_bytes([a, b, c, d, e, f, g, h]))
}

/// Checks a text that ends in such a line.
fn check(text: &[u8]) -> Result<(), RecordError> {
    let text = str::from_utf8(text).unwrap_or_default();
    let start = text.rfind(CHECKSUM).unwrap_or_default();
    let (body, line) = text.split_at_checked(start).unwrap_or_default();
    let source = FormatError::Checksum { field: CHECKSUM, offset: start as u64 };
    if checksum(body) == line { Ok(()) } else { Err(RecordError::Field { field: CHECKSUM, source }) }
}

fn once<T>(field: &'static str, slot: &mut Option<T>, value: Result<T, FormatError>) -> Result<(), RecordError> {
    let value = value.map_err(|source| RecordError::Field { field, source })?;
    if slot.replace(value).is_some() { Err(RecordError::Repeated { field }) } else { Ok(()) }
}

fn decode_table(text: &str) -> Result<StringTable, FormatError> {
    let bytes = BASE64.decode(text).map_err(|_| FormatError::Syntax { field: TABLE, offset: 0 })?;
    if bytes.len() > TABLE_INLINE_MAX {
        let (value, max) = (bytes.len() as u64, TABLE_INLINE_MAX as u64);
        return Err(FormatError::Limit { field: "length of inline string table", value, max, offset: 0 });
    }
    StringTable::decode(&bytes)
}

#[cfg(test)]
mod tests;
