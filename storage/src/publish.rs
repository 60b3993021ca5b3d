//! The commit point: one narinfo, checked against what was uploaded, becomes one path record.
//!
//! Order (docs/consistency.md, rules 0 to 6): everything the record names is in the bucket already; the record is
//! written; then delete markers and references are read from the bucket, never from a local cache; only then is the push
//! acknowledged. A crash anywhere leaves unreferenced bytes or a whole path, never half of one.

use std::collections::HashSet;
use std::sync::Arc;

use futures::{Stream, StreamExt, TryStreamExt};
use narlake_format::id::ManifestId;
use narlake_format::lake::config::{FileDocument, OnConflict, UploadDocument};
use narlake_format::lake::location::PackRef;
use narlake_format::lake::record::PathRecord;
use narlake_format::lake::strings::StringTable;
use narlake_format::lake::{condemned, keys};
use narlake_format::nar::{Event, NarError, Reader};
use narlake_format::nix::content_address::ContentAddress;
use narlake_format::nix::hash::{Sha256Hash, Sha256Hasher};
use narlake_format::nix::narinfo::NarInfo;
use narlake_format::nix::signature::SecretKey;

use crate::error::{Error, ErrorKind, Rejection};
use crate::records::{Cache, same_content};
use crate::upload::UploadName;
use crate::{Lake, manifest};

/// References looked up at once.
const PARALLEL: usize = 16;

/// What publishing a path came to.
#[derive(Debug, Clone)]
pub struct Published {
    /// The record that is served now.
    pub record: Arc<PathRecord>,
    /// What was done.
    pub outcome: Outcome,
}

/// What publishing a path came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The path is new.
    New,
    /// The path was there, with the same content.
    Known,
    /// The path is there with other content, which stays: the first push wins.
    NotReproducible,
}

impl Outcome {
    const fn label(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Known => "known",
            Self::NotReproducible => "not_reproducible",
        }
    }
}

/// What a NAR came to, whichever way the narinfo's URL led to it.
struct Content {
    nar_hash: Sha256Hash,
    nar_size: u64,
    manifest: ManifestId,
    strings: StringTable,
    packs: Vec<PackRef>,
}

/// One narinfo on its way to being a record.
pub(crate) struct Publication<'a> {
    pub(crate) lake: &'a Lake,
    pub(crate) cache: &'a Cache,
    pub(crate) info: NarInfo,
    pub(crate) signers: &'a [SecretKey],
}

impl Publication<'_> {
    /// Checks and commits.
    pub(crate) async fn run(self) -> Result<Published, Error> {
        let hash = self.info.store_path.hash;
        let _turn = self.lake.records().turn(&hash).await;
        let published = match self.lake.records().in_bucket(self.cache, &hash).await {
            Ok(Some(record)) => self.again(record).await?,
            Ok(None) => self.first().await?,
            // No generation of it can be read: this push heals it.
            Err(error) if error.kind() == ErrorKind::Corrupt => self.first().await?,
            Err(error) => return Err(error),
        };
        self.lake.metrics().published.with_label_values(&[published.outcome.label()]).inc();
        Ok(published)
    }

    /// The path is there already.
    async fn again(&self, record: Arc<PathRecord>) -> Result<Published, Error> {
        let there = record.info();
        if there.nar_hash != self.info.nar_hash {
            return self.not_reproducible(record);
        }
        // A push that brought the NAR again has stored whatever chunk was missing, so this heals or says what is wrong.
        self.lake.check_sound(self.cache.domain(), record.manifest()).await?;
        if let Some(name) = UploadName::parse(&self.info.url) {
            let upload = self.lake.waiting(self.cache, &name).await?;
            // Only bytes that were uploaded here: a name is not to be had by claiming it.
            if upload.is_some_and(|upload| upload.nar_hash == there.nar_hash) {
                self.became(&name).await?;
            }
        }
        let new_signatures = self.info.signatures.iter().any(|s| !there.signatures.contains(s));
        if !new_signatures {
            return Ok(Published { record, outcome: Outcome::Known });
        }
        let strings = self.lake.strings(self.cache, &record).await?;
        let mut info = there.clone();
        info.signatures.extend(self.info.signatures.iter().cloned());
        info.signatures.sort_unstable();
        info.signatures.dedup();
        let signed = self.signed(info, record.manifest(), &strings);
        let (_, record) = self.lake.records().publish(self.cache, &signed).await?;
        Ok(Published { record, outcome: Outcome::Known })
    }

    /// The path is new.
    async fn first(&self) -> Result<Published, Error> {
        let url = &self.info.url;
        let name = UploadName::parse(url).ok_or_else(|| self.rejected(Rejection::Url(url.clone())))?;
        let content = self.content(&name).await?;
        self.check(&content).await?;
        self.count_missed_references(&content.strings);
        let pushed = self.signed(self.info.clone(), content.manifest, &content.strings);
        let (key, record) = self.lake.records().publish(self.cache, &pushed).await?;
        let hash = &self.info.store_path.hash;
        if !same_content(&record, &pushed) {
            // Another server was first.
            return self.not_reproducible(record);
        }
        match self.check_after_commit(&content.packs).await {
            Ok(()) => {}
            Err(error @ Error::Rejected { .. }) => {
                self.lake.records().withdraw(self.cache, hash, &key).await?;
                return Err(error);
            }
            // What was to be checked is unknown. The path is whole, and somebody may rely on it already: it stays, and
            // the client, who got no answer, asks again.
            Err(error) => return Err(error),
        }
        self.became(&name).await?;
        Ok(Published { record, outcome: Outcome::New })
    }

    /// The path is served with other content than this push's.
    fn not_reproducible(&self, record: Arc<PathRecord>) -> Result<Published, Error> {
        let there = record.info();
        tracing::warn!(path = %there.store_path, there = %there.nar_hash, pushed = %self.info.nar_hash,
            "pushed again with other content; the first stays");
        if self.cache.document().on_conflict == OnConflict::Refuse {
            return Err(self.rejected(Rejection::NotReproducible {
                there: there.nar_hash.to_string(),
                pushed: self.info.nar_hash.to_string(),
            }));
        }
        Ok(Published { record, outcome: Outcome::NotReproducible })
    }

    /// Keeps the name of the upload resolvable.
    async fn became(&self, name: &UploadName) -> Result<(), Error> {
        let file = FileDocument::new(self.info.store_path.hash, self.info.nar_hash, name.compression);
        self.lake.uploads().became(self.cache.id(), name, &file).await
    }

    /// What the narinfo's URL stands for: an upload to this cache, or a path of it that had the same upload.
    async fn content(&self, name: &UploadName) -> Result<Content, Error> {
        if let Some(upload) = self.lake.waiting(self.cache, name).await? {
            // Content may have been lost since.
            if !self.lake.has_content(self.cache, &upload) {
                return Err(self.rejected(Rejection::Condemned));
            }
            let UploadDocument { nar_hash, nar_size, manifest, table, packs, inline_table, .. } = upload;
            let strings = match inline_table {
                Some(strings) => strings,
                None => manifest::table(&self.lake.fetcher(self.cache.domain()), &table).await?,
            };
            return Ok(Content { nar_hash, nar_size, manifest, strings, packs });
        }
        let Some(record) = self.lake.uploaded(self.cache, name).await? else {
            return Err(self.rejected(Rejection::NoUpload(self.info.url.clone())));
        };
        self.lake.check_sound(self.cache.domain(), record.manifest()).await?;
        Ok(Content {
            nar_hash: record.info().nar_hash,
            nar_size: record.info().nar_size,
            manifest: record.manifest(),
            strings: self.lake.strings(self.cache, &record).await?,
            packs: Vec::new(),
        })
    }

    /// Everything that can be known to be wrong before the record is written.
    async fn check(&self, content: &Content) -> Result<(), Error> {
        if self.info.nar_hash != content.nar_hash {
            return Err(self.rejected(Rejection::NarHash {
                claimed: self.info.nar_hash.to_string(),
                found: content.nar_hash.to_string(),
            }));
        }
        if self.info.nar_size != content.nar_size {
            return Err(self.rejected(Rejection::NarSize { claimed: self.info.nar_size, found: content.nar_size }));
        }
        self.check_content_address(content).await?;
        self.check_references().await
    }

    /// Markers and references, from the bucket.
    async fn check_after_commit(&self, packs: &[PackRef]) -> Result<(), Error> {
        let relied: HashSet<&PackRef> = packs.iter().collect();
        for object in self.lake.bucket().list(keys::CONDEMNED, None).await? {
            let bytes = self.lake.bucket().get(&object.key).await?;
            let batch = condemned::decode(&bytes).map_err(Error::format(object.key))?;
            if batch.iter().any(|pack| relied.contains(pack)) {
                return Err(self.rejected(Rejection::Condemned));
            }
        }
        self.check_references().await
    }

    /// Every reference is there, by a read of the bucket: what is known here may be of the past (rule 6).
    async fn check_references(&self) -> Result<(), Error> {
        let own = &self.info.store_path;
        // Collected: a borrowing filter held across an await would keep the future from being provably `Send`.
        let others: Vec<_> = self.info.references.iter().filter(|reference| *reference != own).cloned().collect();
        futures::stream::iter(others)
            .map(|reference| async move {
                match self.lake.records().in_bucket(self.cache, &reference.hash).await? {
                    Some(record) if record.info().store_path == reference => Ok(()),
                    _ => Err(self.rejected(Rejection::MissingReference(reference.to_string()))),
                }
            })
            .buffer_unordered(PARALLEL)
            .try_collect()
            .await
    }

    /// A content-addressed path must be the one that its content stands for.
    async fn check_content_address(&self, content: &Content) -> Result<(), Error> {
        let Some(ca) = &self.info.ca else { return Ok(()) };
        let wrong = || self.rejected(Rejection::ContentAddress(ca.to_string()));
        if !self.info.content_address_holds(&self.lake.info().store_dir) {
            return Err(wrong());
        }
        let holds = match ca {
            // With a reference to itself the address is over the NAR with that reference blanked, which the path itself
            // attests; without, it is the NAR's own hash.
            ContentAddress::NixArchive(hash) => {
                self.info.references.contains(&self.info.store_path) || *hash == self.info.nar_hash
            }
            ContentAddress::Text(hash) | ContentAddress::Flat(hash) => {
                let nar = self.lake.nar_of(self.cache.domain(), content.manifest, &content.strings).await?;
                flat_hash(nar).await? == Some(*hash)
            }
            ContentAddress::Other(_) => {
                return Err(self.rejected(Rejection::UnsupportedContentAddress(ca.to_string())));
            }
        };
        if holds { Ok(()) } else { Err(wrong()) }
    }

    fn count_missed_references(&self, strings: &StringTable) {
        let found: HashSet<&[u8]> = strings.iter().filter_map(|string| string.get(..32)).collect();
        let missed = self.info.references.iter().filter(|r| !found.contains(&r.hash.to_ascii()[..])).count();
        self.lake.metrics().scrub_missed_references.inc_by(missed as u64);
    }

    /// The record, signed with the cache's keys: as a Nix path and as a lake record.
    fn signed(&self, mut info: NarInfo, manifest: ManifestId, strings: &StringTable) -> PathRecord {
        let dir = &self.lake.info().store_dir;
        info.extra.clear();
        for key in self.signers {
            info.sign(dir, key);
        }
        let mut record = PathRecord::new(info, manifest, strings);
        for key in self.signers {
            record.sign(dir, key);
        }
        record
    }

    fn rejected(&self, reason: Rejection) -> Error {
        Error::Rejected { path: self.info.store_path.to_string(), reason }
    }
}

/// SHA-256 of the one file that a NAR holds, `None` where it holds something else.
async fn flat_hash(nar: impl Stream<Item = Result<bytes::Bytes, Error>>) -> Result<Option<Sha256Hash>, Error> {
    let mut nar = std::pin::pin!(nar);
    let mut reader = Reader::new();
    let mut hasher = Sha256Hasher::new();
    let mut is_file = true;
    while let Some(bytes) = nar.next().await {
        reader.feed(&bytes?, &mut |event| {
            match event {
                Event::File { .. } | Event::EndFile => {}
                Event::Data(bytes) => hasher.update(bytes),
                _ => is_file = false,
            }
            Ok::<(), NarError>(())
        })?;
    }
    reader.finish()?;
    Ok(is_file.then(|| hasher.finish()))
}
