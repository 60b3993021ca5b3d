//! NARs that wait for their narinfo.
//!
//! A Nix client sends a path in two requests that may reach two servers. In between, an upload document in the bucket
//! holds what the NAR came to; it counts for a day (docs/consistency.md, rule 5). After the path is published, the name
//! under which its NAR was uploaded stays resolvable, since the client remembers it for 30 days (rule 18).

use narlake_format::id::{CacheId, UploadId};
use narlake_format::lake::config::{Document as _, FileDocument, UploadDocument};
use narlake_format::lake::keys;
use narlake_format::nix::compression::Compression;
use narlake_format::nix::hash::Sha256Hash;

use crate::bucket::{Bucket, decode_document};
use crate::error::{Error, ErrorKind};
use crate::mint::Mint;

/// How long an upload counts, in milliseconds of the bucket's clock.
const LIFETIME_MS: u64 = 24 * 60 * 60 * 1000;

/// Uploads of one name that are looked at: whoever sends the same NAR again and again makes no work for others.
const FOUND_MAX: usize = 16;

/// The name under which a client uploads a NAR: the hash of the bytes it sends, and how it compressed them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct UploadName {
    /// SHA-256 of the file uploaded, compressed as it is.
    pub file_hash: Sha256Hash,
    /// How the NAR in it is compressed.
    pub compression: Compression,
}

impl UploadName {
    /// Reads the `URL` of a narinfo, `nar/<hash in nix32>.nar[.<suffix>]`; `None` for any other.
    #[must_use]
    pub fn parse(url: &str) -> Option<Self> {
        let (hash, suffix) = url.strip_prefix("nar/")?.split_once(".nar")?;
        Some(Self { file_hash: Sha256Hash::parse_base32(hash).ok()?, compression: Compression::from_suffix(suffix)? })
    }
}

/// The uploads of all caches.
pub(crate) struct Uploads {
    bucket: Bucket,
    mint: Mint,
}

impl Uploads {
    pub(crate) fn new(bucket: Bucket, mint: Mint) -> Self {
        Self { bucket, mint }
    }

    /// Remembers an upload. Everything it names is in the bucket.
    pub(crate) async fn keep(&self, cache: CacheId, name: &UploadName, upload: &UploadDocument) -> Result<(), Error> {
        let key = keys::upload(&cache, &name.file_hash, &UploadId(self.mint.ulid()));
        self.bucket.put_new(&key, upload.encode()).await.map(|_| ())
    }

    /// The uploads of this name that still count, newest first, as far as the first that will do.
    ///
    /// # Errors
    /// `Corrupt` where there are some and none can be read.
    pub(crate) async fn find(
        &self,
        cache: CacheId,
        name: &UploadName,
        will_do: impl Fn(&UploadDocument) -> bool,
    ) -> Result<Vec<UploadDocument>, Error> {
        self.younger(cache, name, LIFETIME_MS, will_do).await
    }

    /// Makes an upload that still counts do so for at least half its lifetime more: whoever is told that it is there
    /// relies on it.
    pub(crate) async fn renew(&self, cache: CacheId, name: &UploadName, upload: &UploadDocument) -> Result<(), Error> {
        let young = match self.younger(cache, name, LIFETIME_MS / 2, |found| found == upload).await {
            Err(error) if error.kind() == ErrorKind::Corrupt => Vec::new(),
            young => young?,
        };
        if young.contains(upload) { Ok(()) } else { self.keep(cache, name, upload).await }
    }

    async fn younger(
        &self,
        cache: CacheId,
        name: &UploadName,
        age_ms: u64,
        will_do: impl Fn(&UploadDocument) -> bool,
    ) -> Result<Vec<UploadDocument>, Error> {
        let prefix = keys::uploads(&cache, &name.file_hash);
        let oldest_ms = self.mint.now_ms().saturating_sub(age_ms);
        let (mut read, mut damaged) = (Vec::new(), None);
        let listed = self.bucket.list(&prefix, None).await?;
        for object in listed.into_iter().rev().filter(|object| object.modified_ms >= oldest_ms).take(FOUND_MAX) {
            let Some(bytes) = found(self.bucket.get(&object.key).await)? else { continue };
            match decode_document(&object.key, &bytes) {
                Ok(document) => {
                    let done = will_do(&document);
                    read.push(document);
                    if done {
                        break;
                    }
                }
                // Another upload of the same bytes is as good.
                Err(error) => {
                    tracing::error!(key = object.key, error = error.chain(), "upload left out");
                    damaged.get_or_insert(error);
                }
            }
        }
        match damaged {
            Some(error) if read.is_empty() => Err(error),
            _ => Ok(read),
        }
    }

    /// Remembers which path an upload became.
    pub(crate) async fn became(&self, cache: CacheId, name: &UploadName, file: &FileDocument) -> Result<(), Error> {
        let key = keys::file(&cache, &name.file_hash);
        match self.bucket.put_new(&key, file.encode()).await {
            // The same bytes were uploaded for another path before; one path to resolve the name to is enough.
            Err(error) if error.kind() == ErrorKind::Conflict => Ok(()),
            done => done.map(|_| ()),
        }
    }

    /// Which path an upload became.
    pub(crate) async fn path_of(&self, cache: CacheId, name: &UploadName) -> Result<Option<FileDocument>, Error> {
        let key = keys::file(&cache, &name.file_hash);
        found(self.bucket.get(&key).await)?.map(|bytes| decode_document(&key, &bytes)).transpose()
    }
}

/// Absence as `None`.
pub(crate) fn found<T>(result: Result<T, Error>) -> Result<Option<T>, Error> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}
