//! The front door of the engine: one open lake.

mod open;

use std::collections::{HashMap, HashSet};
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, TryStreamExt as _};
use narlake_format::id::{BlobId, LakeId, ManifestId};
use narlake_format::lake::config::{FileDocument, UploadDocument};
use narlake_format::lake::keys;
use narlake_format::lake::location::{Domain, Location, PackRef};
use narlake_format::lake::record::PathRecord;
use narlake_format::lake::strings::StringTable;
use narlake_format::limits::{CLOSURE_MAX, TABLE_INLINE_MAX};
use narlake_format::nix::narinfo::NarInfo;
use narlake_format::nix::realisation::RealisationKey;
use narlake_format::nix::signature::SecretKey;
use narlake_format::nix::store_path::{StoreDir, StorePath, StorePathHash};
use tokio::sync::Semaphore;

use crate::bucket::Bucket;
use crate::complete::{self, Incomplete, Roots};
use crate::config::Settings;
use crate::error::{Error, ErrorKind};
use crate::export;
use crate::fetch::{BlobSource, Fetcher};
use crate::index::Index;
use crate::ingest::{Ingested, Intake};
use crate::kv::Kv;
use crate::manifest::{self, Manifest};
use crate::metrics::Metrics;
use crate::mint::Mint;
use crate::pack::writer::PackWriter;
use crate::publish::{Publication, Published};
use crate::records::{Cache, Records};
use crate::rewrite::Rewriter;
use crate::source::BucketSource;
use crate::upload::{UploadName, Uploads, found};

/// An open lake. Cheap to clone; clones share everything.
#[derive(Clone)]
pub struct Lake {
    inner: Arc<Inner>,
}

struct Inner {
    info: LakeInfo,
    settings: Settings,
    bucket: Bucket,
    metrics: Metrics,
    mint: Mint,
    kv: Kv,
    index: Arc<Index>,
    writer: PackWriter,
    intake: Intake,
    records: Records,
    uploads: Uploads,
    /// One fetch engine per trust domain: caches of decoded frames are never shared across.
    fetchers: Mutex<HashMap<Domain, Arc<Fetcher>>>,
    incomplete: Incomplete,
    rewrites: Arc<Semaphore>,
    /// Keeps the state directory ours while the lake is open.
    _lock: std::fs::File,
}

/// What a lake is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LakeInfo {
    /// Its id.
    pub lake: LakeId,
    /// The store directory of all its paths.
    pub store_dir: StoreDir,
    /// What to call its bucket.
    pub bucket: String,
    /// Whether the bucket refuses to create an object twice.
    pub conditional_create: bool,
}

/// How much a lake holds, as far as this process knows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LakeStats {
    /// Path records seen.
    pub paths: u64,
    /// Packs.
    pub packs: u64,
    /// Bytes of all packs.
    pub stored_bytes: u64,
}

/// A small text kept beside the paths of a cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DocumentKey {
    /// The build log of a derivation.
    Log(StorePath),
    /// What a derivation's output was realised as.
    Realisation(RealisationKey),
}

impl DocumentKey {
    fn key(&self, cache: &Cache) -> String {
        match self {
            Self::Log(drv) => keys::log(&cache.id(), drv),
            Self::Realisation(key) => keys::realisation(&cache.id(), key),
        }
    }
}

/// A NAR that waits for its narinfo.
pub(crate) struct Waiting {
    pub(crate) upload: UploadDocument,
    /// Whether its content may be relied on, or why not.
    pub(crate) sound: Result<(), Error>,
}

impl Lake {
    /// What this lake is.
    #[must_use]
    pub fn info(&self) -> &LakeInfo {
        &self.inner.info
    }

    /// Takes a NAR in and makes all of it durable. Nothing is visible yet. Dropped midway it leaves unreferenced bytes.
    ///
    /// # Errors
    /// `Invalid` for a malformed NAR, `TooLarge` for one that does not end in time, `Closed` where the stream breaks
    /// off, the bucket's own where a pack cannot be written.
    pub async fn ingest<S>(&self, cache: &Cache, nar: S) -> Result<Ingested, Error>
    where
        S: Stream<Item = io::Result<Bytes>> + Unpin,
    {
        self.inner.index.check_room().await?;
        self.inner.intake.ingest(cache.domain(), nar).await
    }

    /// Remembers a NAR under the name it was uploaded with, so that its narinfo may come later and to another server.
    ///
    /// # Errors
    /// Where the bucket does not take it.
    pub async fn keep_upload(&self, cache: &Cache, name: &UploadName, ingested: &Ingested) -> Result<(), Error> {
        let inline = Some(&ingested.strings).filter(|strings| strings.encode().len() <= TABLE_INLINE_MAX).cloned();
        let Ingested { nar_hash, nar_size, manifest, table, ref packs, .. } = *ingested;
        let document = UploadDocument::new(nar_hash, nar_size, manifest, table, packs.clone(), inline);
        self.inner.uploads.keep(cache.id(), name, &document).await
    }

    /// Whether a NAR of this name needs no upload: it waits for its narinfo or became a path, and is complete.
    ///
    /// # Errors
    /// Where the bucket does not answer.
    pub async fn has_upload(&self, cache: &Cache, name: &UploadName) -> Result<bool, Error> {
        match self.find_upload(cache, name).await {
            // "No" makes the client send it again, which heals.
            Err(error) if error.kind() == ErrorKind::Corrupt => {
                tracing::warn!(file = %name.file_hash, error = error.chain(), "upload is not whole");
                Ok(false)
            }
            answer => answer,
        }
    }

    async fn find_upload(&self, cache: &Cache, name: &UploadName) -> Result<bool, Error> {
        if let Some(Waiting { upload, sound }) = self.waiting(cache, name).await? {
            sound?;
            self.inner.uploads.renew(cache.id(), name, &upload).await?;
            return Ok(true);
        }
        match self.uploaded(cache, name).await? {
            Some(record) => self.check_sound(cache.domain(), Roots::from(&*record)).await.map(|()| true),
            None => Ok(false),
        }
    }

    /// The upload of this name that waits for its narinfo: the newest whose content may be relied on, else the newest.
    pub(crate) async fn waiting(&self, cache: &Cache, name: &UploadName) -> Result<Option<Waiting>, Error> {
        // Mostly every pack of the newest is as it was, and nothing more has to be read.
        let index = &self.inner.index;
        let untouched = |upload: &UploadDocument| upload.packs.iter().all(|pack| index.is_sound(pack));
        let mut uploads = self.inner.uploads.find(cache.id(), name, untouched).await?;
        if let Some(at) = uploads.iter().position(untouched) {
            return Ok(Some(Waiting { upload: uploads.swap_remove(at), sound: Ok(()) }));
        }
        // The same bytes are the same content: what is true of one is true of all.
        let Some(upload) = uploads.into_iter().next() else { return Ok(None) };
        match self.check_sound(cache.domain(), Roots::from(&upload)).await {
            Err(error) if error.kind() != ErrorKind::Corrupt => Err(error),
            sound => Ok(Some(Waiting { upload, sound })),
        }
    }

    /// The path that a NAR of this name became, if it did.
    ///
    /// # Errors
    /// Where the bucket does not answer.
    pub async fn uploaded(&self, cache: &Cache, name: &UploadName) -> Result<Option<Arc<PathRecord>>, Error> {
        let Some(FileDocument { path, nar_hash, .. }) = self.inner.uploads.path_of(cache.id(), name).await? else {
            return Ok(None);
        };
        Ok(self.lookup(cache, &path).await?.filter(|record| record.info().nar_hash == nar_hash))
    }

    /// Checks a narinfo against what was uploaded and makes its path visible, signed with these keys. Not cancel safe:
    /// dropped midway the path may be visible or not, and is whole if it is.
    ///
    /// # Errors
    /// `Invalid` where the push does not hold together, `Conflict` where the cache refuses a second content, `Corrupt`
    /// where content went missing, the bucket's own otherwise.
    pub async fn publish(&self, cache: &Cache, info: NarInfo, signers: &[SecretKey]) -> Result<Published, Error> {
        Publication { lake: self, cache, info, signers }.run().await
    }

    /// The record of a path, `None` where the bucket has none.
    ///
    /// # Errors
    /// `Corrupt` where the record is damaged, the bucket's own otherwise: never "none" because of an outage.
    pub async fn lookup(&self, cache: &Cache, hash: &StorePathHash) -> Result<Option<Arc<PathRecord>>, Error> {
        self.inner.records.lookup(cache, hash).await
    }

    /// The NAR of a path. When this returns, every chunk has a place; the stream ends in an error, never short.
    ///
    /// # Errors
    /// `Corrupt` where content is missing or damaged, the bucket's own otherwise.
    pub async fn export(
        &self,
        cache: &Cache,
        record: &PathRecord,
    ) -> Result<impl Stream<Item = Result<Bytes, Error>> + Send + use<>, Error> {
        self.check_complete(cache, record).await?;
        let strings = self.strings_in(cache.domain(), record).await?;
        self.inner.metrics.export_nar_bytes.inc_by(record.info().nar_size);
        let nar = self.nar_of(cache.domain(), record.manifest(), &strings).await?;
        let (lake, path) = (self.clone(), (cache.id(), record.info().store_path.hash));
        Ok(nar.inspect_err(move |error| lake.inner.incomplete.note(path, error)))
    }

    /// Looks up every blob of a path: whether its NAR can be given out.
    ///
    /// # Errors
    /// `Corrupt` where content is missing, the bucket's own otherwise.
    pub async fn check_complete(&self, cache: &Cache, record: &PathRecord) -> Result<(), Error> {
        // A damaged copy may still do for what is asked of it; what is read is verified.
        let checked = complete::check(&self.fetcher(cache.domain()), record.into(), |_| true).await;
        checked.inspect_err(|error| self.inner.incomplete.note((cache.id(), record.info().store_path.hash), error))
    }

    /// Whether a path is to be had whole, as far as is known: false where reading it has failed for want of content, and
    /// would again. Reads nothing of a path that never failed.
    ///
    /// # Errors
    /// Where the bucket does not answer.
    pub async fn is_whole(&self, cache: &Cache, record: &PathRecord) -> Result<bool, Error> {
        let path = (cache.id(), record.info().store_path.hash);
        if !self.inner.incomplete.contains(&path) {
            return Ok(true);
        }
        let (domain, index) = (cache.domain(), &self.inner.index);
        let readable = |id: &BlobId| index.is_readable(&domain, id);
        match complete::check(&self.fetcher(domain), record.into(), readable).await {
            Err(error) if error.kind() == ErrorKind::Corrupt => Ok(false),
            checked => {
                checked?;
                self.inner.incomplete.strike(&path);
                Ok(true)
            }
        }
    }

    /// The records of the closure of `roots`, references before those who refer to them where there is no cycle; and
    /// those of it that are not in the cache.
    ///
    /// # Errors
    /// `Corrupt` where a record does not decode, `TooLarge` beyond 100,000 paths, the bucket's own otherwise.
    pub async fn closure(
        &self,
        cache: &Cache,
        roots: &[StorePathHash],
    ) -> Result<(Vec<Arc<PathRecord>>, Vec<StorePathHash>), Error> {
        let mut seen: HashSet<StorePathHash> = HashSet::new();
        let mut missing = Vec::new();
        let mut order = Vec::new();
        // Depth first with a stack of our own: a chain of references can be longer than a thread's stack.
        let mut stack: Vec<(StorePathHash, Option<Arc<PathRecord>>)> =
            roots.iter().rev().map(|root| (*root, None)).collect();
        while let Some((hash, visited)) = stack.pop() {
            if let Some(record) = visited {
                order.push(record);
                continue;
            }
            if !seen.insert(hash) {
                continue;
            }
            if seen.len() > CLOSURE_MAX {
                return Err(Error::TooLarge { what: "closure", limit: CLOSURE_MAX as u64, unit: "paths" });
            }
            let Some(record) = self.lookup(cache, &hash).await? else {
                missing.push(hash);
                continue;
            };
            stack.push((hash, Some(Arc::clone(&record))));
            stack.extend(
                record.info().references.iter().rev().map(|r| (r.hash, None)).filter(|(h, _)| !seen.contains(h)),
            );
        }
        Ok((order, missing))
    }

    /// Writes a small text. The first one stays where two differ.
    ///
    /// # Errors
    /// Where the bucket does not take it.
    pub async fn put_document(&self, cache: &Cache, document: &DocumentKey, bytes: Bytes) -> Result<(), Error> {
        match self.inner.bucket.put_new(&document.key(cache), bytes).await {
            Err(error) if error.kind() == ErrorKind::Conflict => Ok(()),
            done => done.map(|_| ()),
        }
    }

    /// Reads a small text, `None` where there is none.
    ///
    /// # Errors
    /// Where the bucket does not answer.
    pub async fn get_document(&self, cache: &Cache, document: &DocumentKey) -> Result<Option<Bytes>, Error> {
        found(self.inner.bucket.get(&document.key(cache)).await)
    }

    /// Where blobs of a domain lie, in order. Of one that is not known here the bucket is asked first.
    ///
    /// # Errors
    /// Where the bucket does not answer.
    pub async fn locate(&self, domain: &Domain, ids: &[BlobId]) -> Result<Vec<Option<Location>>, Error> {
        let limit = self.inner.settings.fetch.deadline;
        let located = tokio::time::timeout(limit, self.source(*domain).locate(ids)).await;
        located.unwrap_or_else(|_| {
            let key = ids.first().map(ToString::to_string).unwrap_or_default();
            let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
            Err(Error::Deadline { operation: "locate", key, limit_ms })
        })
    }

    /// Bytes of a pack, as stored.
    ///
    /// # Errors
    /// `NotFound` where the pack is gone, `Corrupt` where it is shorter.
    pub async fn read_pack(&self, pack: &PackRef, range: Range<u64>) -> Result<Bytes, Error> {
        self.source(pack.domain).read(pack, range).await
    }

    /// A URL that reads a pack straight from the bucket for so long; `None` where the bucket signs nothing.
    ///
    /// # Errors
    /// Where the bucket's credentials cannot be had.
    pub async fn pack_url(&self, pack: &PackRef, valid: Duration) -> Result<Option<String>, Error> {
        self.inner.bucket.signed_url(&keys::pack(pack), valid).await
    }

    /// The size of a pack, in bytes.
    ///
    /// # Errors
    /// `NotFound` where the pack is gone.
    pub async fn pack_size(&self, pack: &PackRef) -> Result<u64, Error> {
        self.source(pack.domain).size(pack).await
    }

    /// What this process knows of the lake's size.
    ///
    /// # Errors
    /// Where the local state does not answer.
    pub fn stats(&self) -> Result<LakeStats, Error> {
        let (packs, stored_bytes) = self.inner.index.catalogue()?;
        Ok(LakeStats { paths: self.inner.records.known() as u64, packs, stored_bytes })
    }

    /// Seals what is open and writes the index and the local state down, so that the next start is quick. A lake that is
    /// dropped without this loses nothing that was acknowledged.
    ///
    /// # Errors
    /// Where the bucket or the disk does not take it.
    pub async fn close(&self) -> Result<(), Error> {
        self.inner.writer.flush().await?;
        self.inner.index.flush(1).await?;
        let kv = self.inner.kv.clone();
        tokio::task::spawn_blocking(move || kv.flush()).await.map_err(|_| Error::Stopped("state database"))?
    }

    /// The fetch engine of a domain.
    #[must_use]
    pub fn fetcher(&self, domain: Domain) -> Arc<Fetcher> {
        let mut fetchers = self.inner.fetchers.lock().unwrap_or_else(PoisonError::into_inner);
        let make = || Arc::new(Fetcher::new(Arc::new(self.source(domain)), self.inner.settings.fetch.clone()));
        Arc::clone(fetchers.entry(domain).or_insert_with(make))
    }

    /// The string table of a path.
    ///
    /// # Errors
    /// `Corrupt` where it is missing or damaged.
    pub async fn strings(&self, cache: &Cache, record: &PathRecord) -> Result<StringTable, Error> {
        self.strings_in(cache.domain(), record).await
    }

    async fn strings_in(&self, domain: Domain, record: &PathRecord) -> Result<StringTable, Error> {
        match record.inline_table() {
            Some(strings) => Ok(strings.clone()),
            None => manifest::table(&self.fetcher(domain), &record.table()).await,
        }
    }

    /// Whether every blob under these roots is there and may be relied on.
    pub(crate) async fn check_sound(&self, domain: Domain, roots: Roots) -> Result<(), Error> {
        complete::check(&self.fetcher(domain), roots, |id| self.inner.index.get(&domain, id).is_some()).await
    }

    /// Writes what is under these roots again, as far as it lies where it may not be relied on.
    pub(crate) async fn rewrite(&self, domain: Domain, roots: Roots) -> Result<u64, Error> {
        let (fetcher, index) = (self.fetcher(domain), Arc::clone(&self.inner.index));
        let (writer, turns) = (self.inner.writer.clone(), Arc::clone(&self.inner.rewrites));
        let zstd_level = self.inner.settings.zstd_level;
        Rewriter { domain, fetcher, index, writer, zstd_level, turns }.run(roots).await
    }

    /// The NAR of a tree.
    pub(crate) async fn nar_of(
        &self,
        domain: Domain,
        id: ManifestId,
        strings: &StringTable,
    ) -> Result<impl Stream<Item = Result<Bytes, Error>> + Send + use<>, Error> {
        let fetcher = self.fetcher(domain);
        let manifest = Manifest::open(&fetcher, &id).await?;
        Ok(export::nar(Fetcher::clone(&fetcher), manifest, strings, format!("manifest {id}")))
    }

    pub(crate) fn index(&self) -> &Arc<Index> {
        &self.inner.index
    }

    pub(crate) fn records(&self) -> &Records {
        &self.inner.records
    }

    pub(crate) fn uploads(&self) -> &Uploads {
        &self.inner.uploads
    }

    pub(crate) fn metrics(&self) -> &Metrics {
        &self.inner.metrics
    }

    fn source(&self, domain: Domain) -> BucketSource {
        let (index, bucket) = (Arc::clone(&self.inner.index), self.inner.bucket.clone());
        BucketSource { domain, index, bucket, metrics: self.inner.metrics.clone() }
    }
}
