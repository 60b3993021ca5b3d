//! The commit point: one narinfo, checked against what was uploaded, becomes one path record.
//!
//! Order (docs/consistency.md, rules 0 to 6): everything the record names is in the bucket already; the record is
//! written; then delete markers and references are read from the bucket, never from a local cache; only then is the push
//! acknowledged. A crash anywhere leaves unreferenced bytes or a whole path, never half of one.
//!
//! A record that was written is not taken back because of markers or references found after: another push may have seen
//! it, and been acknowledged on its strength.

mod content_address;

use std::collections::HashSet;
use std::sync::Arc;

use futures::{StreamExt, TryStreamExt};
use narlake_format::id::ManifestId;
use narlake_format::lake::config::{FileDocument, OnConflict, UploadDocument};
use narlake_format::lake::record::PathRecord;
use narlake_format::lake::strings::StringTable;
use narlake_format::nix::hash::Sha256Hash;
use narlake_format::nix::narinfo::NarInfo;
use narlake_format::nix::signature::{SecretKey, Signature};

use crate::complete::Roots;
use crate::error::{Error, ErrorKind, Rejection};
use crate::lake::Waiting;
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
}

/// One narinfo on its way to being a record.
pub(crate) struct Publication<'a> {
    pub(crate) lake: &'a Lake,
    pub(crate) cache: &'a Cache,
    pub(crate) info: NarInfo,
    pub(crate) signers: &'a [SecretKey],
}

/// How often content is moved out of condemned packs before a push gives up: each time there was news of more.
const REWRITES_MAX: u32 = 3;

/// Signatures that a path may bring along or gather. Those of its cache come on top.
const FOREIGN_SIGNATURES_MAX: usize = 64;

impl Publication<'_> {
    /// Checks and commits.
    pub(crate) async fn run(self) -> Result<Published, Error> {
        let hash = self.info.store_path.hash;
        if self.info.signatures.len() > FOREIGN_SIGNATURES_MAX {
            return Err(self.rejected(Rejection::Signatures(self.info.signatures.len(), FOREIGN_SIGNATURES_MAX)));
        }
        let _turn = self.lake.records().turn(&self.info.store_path).await?;
        let condemnations = self.lake.index().condemnations();
        let published = match self.lake.records().in_bucket(self.cache, &hash).await {
            Ok(Some(record)) => self.again(record).await?,
            Ok(None) => self.first().await?,
            // No generation of it can be read: this push heals it.
            Err(error) if error.kind() == ErrorKind::Corrupt => self.first().await?,
            Err(error) => return Err(error),
        };
        if published.outcome != Outcome::NotReproducible {
            self.confirm(&published.record, condemnations).await?;
        }
        self.lake.metrics().published.with_label_values(&[published.outcome.label()]).inc();
        Ok(published)
    }

    /// The path is there already.
    async fn again(&self, record: Arc<PathRecord>) -> Result<Published, Error> {
        let there = record.info();
        if there.nar_hash != self.info.nar_hash {
            return self.not_reproducible(record);
        }
        let (domain, roots) = (self.cache.domain(), Roots::from(&*record));
        // A push that brought the NAR again has stored what was missing; what is merely suspect is moved.
        self.make_sound(roots, self.lake.check_sound(domain, roots).await).await?;
        if let Some(name) = UploadName::parse(&self.info.url) {
            let waiting = self.lake.waiting(self.cache, &name).await?;
            // Only bytes that were uploaded here: a name is not to be had by claiming it.
            if waiting.is_some_and(|waiting| waiting.upload.nar_hash == there.nar_hash) {
                self.became(&name).await?;
            }
        }
        let own = |signature: &Signature| self.signers.iter().any(|key| key.name() == signature.key_name());
        let foreign = there.signatures.iter().filter(|signature| !own(signature)).count();
        let room = FOREIGN_SIGNATURES_MAX.saturating_sub(foreign);
        let pushed = self.info.signatures.iter().filter(|signature| !own(signature));
        let new: Vec<Signature> = pushed.filter(|s| !there.signatures.contains(s)).take(room).cloned().collect();
        if new.is_empty() {
            return Ok(Published { record, outcome: Outcome::Known });
        }
        let strings = self.lake.strings(self.cache, &record).await?;
        let mut info = there.clone();
        info.signatures.extend(new);
        let signed = self.signed(info, record.manifest(), &strings);
        let record = self.lake.records().publish(self.cache, &signed).await?;
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
        let record = self.lake.records().publish(self.cache, &pushed).await?;
        if !same_content(&record, &pushed) {
            // Another server was first.
            return self.not_reproducible(record);
        }
        self.became(&name).await?;
        Ok(Published { record, outcome: Outcome::New })
    }

    /// Reads from the bucket, now that the record is there, whether what it relies on stays (rule 0). `known` is how
    /// many condemnations there were before anything was relied on.
    async fn confirm(&self, record: &PathRecord, mut known: u64) -> Result<(), Error> {
        let index = self.lake.index();
        for _ in 0..REWRITES_MAX {
            index.read_condemned().await?;
            if index.condemnations() == known {
                return self.check_references(record.info()).await;
            }
            known = index.condemnations();
            let blobs = self.lake.rewrite(self.cache.domain(), record.into()).await?;
            tracing::info!(path = %record.info().store_path, blobs, "content moved out of condemned packs");
        }
        Err(self.rejected(Rejection::Condemned))
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
        if let Some(Waiting { upload, sound }) = self.lake.waiting(self.cache, name).await? {
            self.make_sound(Roots::from(&upload), sound).await?;
            let UploadDocument { nar_hash, nar_size, manifest, table, inline_table, .. } = upload;
            let strings = match inline_table {
                Some(strings) => strings,
                None => manifest::table(&self.lake.fetcher(self.cache.domain()), &table).await?,
            };
            return Ok(Content { nar_hash, nar_size, manifest, strings });
        }
        let Some(record) = self.lake.uploaded(self.cache, name).await? else {
            return Err(self.rejected(Rejection::NoUpload(self.info.url.clone())));
        };
        let roots = Roots::from(&*record);
        self.make_sound(roots, self.lake.check_sound(self.cache.domain(), roots).await).await?;
        Ok(Content {
            nar_hash: record.info().nar_hash,
            nar_size: record.info().nar_size,
            manifest: record.manifest(),
            strings: self.lake.strings(self.cache, &record).await?,
        })
    }

    /// Moves content that may not be relied on any more. Where it cannot be read either, the NAR must come again.
    async fn make_sound(&self, roots: Roots, sound: Result<(), Error>) -> Result<(), Error> {
        match sound {
            Err(error) if error.kind() == ErrorKind::Corrupt => {}
            sound => return sound,
        }
        let path = &self.info.store_path;
        match self.lake.rewrite(self.cache.domain(), roots).await {
            Ok(blobs) => {
                tracing::info!(%path, blobs, "content written again");
                Ok(())
            }
            Err(error) if error.kind() == ErrorKind::Corrupt => {
                tracing::warn!(%path, error = error.chain(), "content is lost, its NAR must come again");
                Err(self.rejected(Rejection::Condemned))
            }
            Err(error) => Err(error),
        }
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
        self.check_references(&self.info).await
    }

    /// Every reference is there, by a read of the bucket: what is known here may be of the past (rule 6).
    async fn check_references(&self, info: &NarInfo) -> Result<(), Error> {
        let own = &info.store_path;
        // Collected: a borrowing filter held across an await would keep the future from being provably `Send`.
        let others: Vec<_> = info.references.iter().filter(|reference| *reference != own).cloned().collect();
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
