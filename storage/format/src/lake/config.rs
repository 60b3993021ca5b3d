//! The small JSON documents of the bucket: the lake's, a cache's, an upload's, an uploaded file's.
//!
//! Documents are created once and never changed; a change is a new document under a new id. Each carries the version of
//! its own schema. An unknown key or version is an error: a reader that guesses at configuration may publish or delete
//! what it should not. For the same reason each ends in a checksum: a flipped bit in a store directory or in a cache's
//! name is as good JSON as before.

use std::fmt;
use std::str::FromStr;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::chunker::ChunkerVersion;
use super::json;
use super::location::{Domain, PackRef};
use super::scrub::ScrubVersion;
use super::strings::StringTable;
use super::wire::digest;
use crate::error::FormatError;
use crate::id::{CacheId, ManifestId, TableId};
use crate::limits::DOCUMENT_MAX;
use crate::nix::compression::Compression;
use crate::nix::hash::Sha256Hash;
use crate::nix::signature::PublicKey;
use crate::nix::store_path::{StoreDir, StorePathHash};

/// Why bytes are not a document.
#[derive(Debug, thiserror::Error)]
pub enum DocumentError {
    /// Longer than any document.
    #[error("document has {length} bytes, the limit is {max}")]
    TooLong {
        /// Its bytes.
        length: u64,
        /// The limit.
        max: u64,
    },
    /// Not the JSON of such a document.
    #[error("read JSON document")]
    Json(#[source] serde_json::Error),
    /// Values that do not belong together, or a version this build does not read.
    #[error("read document")]
    Value(#[source] FormatError),
}

/// A document of the bucket.
pub trait Document: Serialize + DeserializeOwned {
    /// Checks what the types do not.
    ///
    /// # Errors
    /// When the document's version is unknown or its values are out of their limits.
    fn check(&self) -> Result<(), FormatError>;

    /// The document's bytes.
    fn encode(&self) -> Vec<u8> {
        let body = serde_json::to_vec_pretty(self).unwrap_or_default();
        // Maps with keys that are no strings are all that JSON cannot hold; no document has any.
        assert!(body.len() > BODY_END.len() && body.ends_with(BODY_END), "document without JSON form");
        seal(&body)
    }

    /// Reads a document.
    ///
    /// # Errors
    /// When the bytes are not such a document.
    fn decode(bytes: &[u8]) -> Result<Self, DocumentError> {
        if bytes.len() > DOCUMENT_MAX {
            return Err(DocumentError::TooLong { length: bytes.len() as u64, max: DOCUMENT_MAX as u64 });
        }
        let wrong = FormatError::Checksum { field: "document", offset: bytes.len().saturating_sub(SEAL_LEN) as u64 };
        let start = bytes.len().checked_sub(SEAL_LEN).and_then(|length| bytes.get(..length));
        let body = [start.ok_or(DocumentError::Value(wrong.clone()))?, BODY_END].concat();
        if seal(&body) != bytes {
            return Err(DocumentError::Value(wrong));
        }
        let document: Self = serde_json::from_slice(&body).map_err(DocumentError::Json)?;
        document.check().map_err(DocumentError::Value)?;
        Ok(document)
    }
}

const CHECKSUM_CONTEXT: &str = "narlake 2026-11 v1 document";
/// How the JSON of every document ends before its checksum is added.
const BODY_END: &[u8] = b"\n}";
/// Bytes from there to the end of the document.
const SEAL_LEN: usize = ",\n  \"checksum\": \"0123456789abcdef\"\n}\n".len();

/// Adds the last field: the first eight bytes of a digest of the JSON without it.
fn seal(body: &[u8]) -> Vec<u8> {
    let [a, b, c, d, e, f, g, h, ..] = digest(CHECKSUM_CONTEXT, &[body]);
    let checksum = u64::from_be_bytes([a, b, c, d, e, f, g, h]);
    let start = body.strip_suffix(BODY_END).unwrap_or(body);
    [start, format!(",\n  \"checksum\": \"{checksum:016x}\"\n}}\n").as_bytes()].concat()
}

/// The one version of every document's schema so far.
const VERSION: u32 = 1;

fn check_version(format: &'static str, version: u32) -> Result<(), FormatError> {
    if version == VERSION { Ok(()) } else { Err(FormatError::Version { format, version, known: "1" }) }
}

/// `lake/<ulid>.json`: what every reader and writer of the bucket must agree on. The smallest valid one counts.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LakeDocument {
    /// Version of the bucket's layout.
    pub format: u32,
    /// How files are cut.
    pub chunker: u8,
    /// How store paths are found in files.
    pub scrub: u8,
    /// The store directory that all paths of the lake are in.
    #[serde(with = "json::text")]
    pub store_dir: StoreDir,
    /// When it was made, in seconds of Unix time. For people to read.
    pub created: u64,
}

impl LakeDocument {
    /// The document of a new lake of the present format.
    #[must_use]
    pub fn new(store_dir: StoreDir, created: u64) -> Self {
        Self { format: VERSION, chunker: ChunkerVersion::V1 as u8, scrub: ScrubVersion::V1 as u8, store_dir, created }
    }
}

impl Document for LakeDocument {
    fn check(&self) -> Result<(), FormatError> {
        check_version("lake", self.format)?;
        ChunkerVersion::from_byte(self.chunker)?;
        ScrubVersion::from_byte(self.scrub)?;
        Ok(())
    }
}

/// The name of a cache, as it stands in URLs: 1 to 64 characters of `[a-z0-9-]`, and none of the words that the
/// server's own routes begin with.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct CacheName(Box<str>);

/// First components of the server's routes: a cache of such a name could not be reached.
const RESERVED: [&str; 11] = [
    "api",
    "build-trace-v2",
    "debuginfo",
    "health",
    "log",
    "metrics",
    "nar",
    "nix-cache-info",
    "public-key",
    "ready",
    "realisations",
];

/// Longest name of a cache.
pub const CACHE_NAME_MAX: usize = 64;

impl CacheName {
    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for CacheName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl FromStr for CacheName {
    type Err = FormatError;

    fn from_str(text: &str) -> Result<Self, FormatError> {
        let field = "cache name";
        if text.len() > CACHE_NAME_MAX {
            return Err(FormatError::Limit { field, value: text.len() as u64, max: CACHE_NAME_MAX as u64, offset: 0 });
        }
        let valid = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        if text.is_empty() || !text.bytes().all(valid) || RESERVED.contains(&text) {
            return Err(FormatError::Syntax { field, offset: 0 });
        }
        Ok(Self(text.into()))
    }
}

/// Who may read a cache.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Visibility {
    /// Anybody.
    Public,
    /// Bearers of a token for it.
    Private,
}

/// What a push of a path that is there with other content does (docs/consistency.md, rule 3).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnConflict {
    /// It succeeds, and the first content stays: clients must not fail over a build that is not reproducible.
    #[default]
    Keep,
    /// It is refused.
    Refuse,
}

/// `caches/<ulid>/config/<ulid>`: one cache. The newest counts.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CacheDocument {
    /// Version of this document.
    pub version: u32,
    /// The name, unique among the caches of the lake.
    #[serde(with = "json::text")]
    pub name: CacheName,
    /// Who may read it.
    pub visibility: Visibility,
    /// A private cache whose packs are nevertheless those of the public domain: it gives up that nobody can learn which
    /// chunks it has, and gains deduplication.
    #[serde(default)]
    pub shares_public_packs: bool,
    /// The keys that its signatures are checked with. A replica that signs with any other refuses to.
    #[serde(with = "json::texts")]
    pub public_keys: Vec<PublicKey>,
    /// Priority among substituters; the lower is asked first.
    pub priority: u32,
    /// What a push of other content under the same path does.
    #[serde(default)]
    pub on_conflict: OnConflict,
}

impl CacheDocument {
    /// A new cache without keys.
    #[must_use]
    pub const fn new(name: CacheName, visibility: Visibility) -> Self {
        Self {
            version: VERSION,
            name,
            visibility,
            shares_public_packs: false,
            public_keys: Vec::new(),
            priority: 30,
            on_conflict: OnConflict::Keep,
        }
    }

    /// The trust domain of the cache of this id and configuration.
    #[must_use]
    pub const fn domain(&self, id: CacheId) -> Domain {
        match self.visibility {
            Visibility::Private if !self.shares_public_packs => Domain::Cache(id),
            Visibility::Public | Visibility::Private => Domain::Public,
        }
    }
}

impl Document for CacheDocument {
    fn check(&self) -> Result<(), FormatError> {
        check_version("cache document", self.version)
    }
}

/// `caches/<ulid>/uploads/<filehash>/<ulid>`: a NAR that was uploaded and waits for its narinfo.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UploadDocument {
    /// Version of this document.
    pub version: u32,
    /// Digest of the NAR.
    #[serde(with = "json::text")]
    pub nar_hash: Sha256Hash,
    /// Bytes of the NAR.
    pub nar_size: u64,
    /// Its manifest.
    #[serde(with = "json::text")]
    pub manifest: ManifestId,
    /// Its string table.
    #[serde(with = "json::text")]
    pub table: TableId,
    /// The packs that hold its content, all of which must be there for the upload to count.
    #[serde(with = "json::texts")]
    pub packs: Vec<PackRef>,
    /// The string table itself, where it is short: it then is in no pack.
    #[serde(default, with = "inline_table", skip_serializing_if = "Option::is_none")]
    pub inline_table: Option<StringTable>,
}

/// A short string table as base64 text.
mod inline_table {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD as BASE64;
    use serde::{Deserialize, Deserializer, Serializer, de};

    use crate::lake::strings::StringTable;

    pub(super) fn serialize<S: Serializer>(table: &Option<StringTable>, serializer: S) -> Result<S::Ok, S::Error> {
        match table {
            Some(table) => serializer.serialize_some(&BASE64.encode(table.encode())),
            None => serializer.serialize_none(),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<StringTable>, D::Error> {
        let Some(text) = Option::<String>::deserialize(deserializer)? else { return Ok(None) };
        let bytes = BASE64.decode(text).map_err(de::Error::custom)?;
        StringTable::decode(&bytes).map(Some).map_err(de::Error::custom)
    }
}

impl UploadDocument {
    /// The document of an upload.
    #[must_use]
    pub const fn new(
        nar_hash: Sha256Hash,
        nar_size: u64,
        manifest: ManifestId,
        table: TableId,
        packs: Vec<PackRef>,
        inline_table: Option<StringTable>,
    ) -> Self {
        Self { version: VERSION, nar_hash, nar_size, manifest, table, packs, inline_table }
    }
}

impl Document for UploadDocument {
    fn check(&self) -> Result<(), FormatError> {
        check_version("upload document", self.version)?;
        match &self.inline_table {
            Some(table) if table.id() != self.table => {
                Err(FormatError::Checksum { field: "inline string table", offset: 0 })
            }
            _ => Ok(()),
        }
    }
}

/// `caches/<ulid>/files/<filehash>`: the name under which a client uploaded a NAR and may ask for it again, long after
/// we serve it under another (docs/consistency.md, rule 18).
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileDocument {
    /// Version of this document.
    pub version: u32,
    /// Hash part of the path that it was published as.
    #[serde(with = "json::text")]
    pub path: StorePathHash,
    /// Digest of the NAR.
    #[serde(with = "json::text")]
    pub nar_hash: Sha256Hash,
    /// How the uploaded bytes were compressed.
    #[serde(with = "json::text")]
    pub compression: Compression,
}

impl FileDocument {
    /// The document of an uploaded file.
    #[must_use]
    pub const fn new(path: StorePathHash, nar_hash: Sha256Hash, compression: Compression) -> Self {
        Self { version: VERSION, path, nar_hash, compression }
    }
}

impl Document for FileDocument {
    fn check(&self) -> Result<(), FormatError> {
        check_version("file document", self.version)
    }
}

#[cfg(test)]
mod tests;
