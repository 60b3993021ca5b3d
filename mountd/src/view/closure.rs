//! Closures: the metadata of everything a path needs, in one answer of the server.

use std::collections::HashSet;
use std::sync::Arc;

use bytes::Bytes;
use narlake_format::error::chain;
use narlake_format::id::{BlobId, BlobKind};
use narlake_format::lake::manifest::ManifestHeader;
use narlake_format::limits::CLOSURE_MAX;
use narlake_format::nix::store_path::{StorePath, StorePathHash};
use narlake_storage::fetch::Nearness;

use super::{View, ViewError};
use crate::error::joined;
use crate::fs::nodes::ObjectKey;
use crate::trust::{TrustedRecord, Untrusted};

/// Trees whose heads are fetched ahead; those of a larger closure come when they are looked at.
const WARM_MAX: usize = 4096;

/// Heads fetched at once.
const WARM_AT_ONCE: usize = 128;

/// Parts of a tree whose places are learnt ahead: nearly all trees have fewer.
const PARTS_WARM: usize = 64;

/// What a view has of some closures.
#[derive(Debug, Default)]
pub struct Closures {
    /// The records, each once.
    pub records: Vec<TrustedRecord>,
    /// What the cache does not have, of the paths asked for and of those they refer to.
    pub missing: Vec<String>,
}

impl Closures {
    /// Bytes of the NARs together.
    #[must_use]
    pub fn nar_bytes(&self) -> u64 {
        self.records.iter().map(|record| record.info().nar_size).sum()
    }
}

impl View {
    /// Makes the closures of these paths known, and seen through every overlay. Cancel safe.
    ///
    /// # Errors
    /// When the server does not answer, or an overlay does not show a path.
    pub async fn ensure(&self, paths: &[StorePath]) -> Result<Closures, ViewError> {
        let roots: Vec<StorePathHash> = paths.iter().map(|path| path.hash).collect();
        let mut closures = match self.closures_in_memory(paths) {
            Some(closures) => closures,
            None => self.load_closures(&roots).await?,
        };
        let found: HashSet<StorePath> =
            closures.records.iter().map(|record| record.info().store_path.clone()).collect();
        let missing: Vec<String> = paths.iter().filter(|path| !found.contains(path)).map(ToString::to_string).collect();
        // One that the server called missing by its hash is in there by its name now.
        closures.missing.retain(|hash| !missing.iter().any(|path| path.starts_with(hash.as_str())));
        closures.missing.extend(missing);
        let show: Vec<StorePath> = found.into_iter().collect();
        // Whoever looks through an overlay for them needs their trees.
        self.warm(&closures.records).await;
        self.show(&show).await?;
        Ok(closures)
    }

    /// Those of these paths that are valid, in their order; of any number of unknown ones the server is asked at once.
    /// Cancel safe.
    ///
    /// # Errors
    /// As [`View::valid`].
    pub async fn valid_of(&self, paths: &[StorePath]) -> Result<Vec<StorePath>, ViewError> {
        let unknown = |path: &&StorePath| self.may_show(&path.hash) && !self.inner.records.contains_key(&path.hash);
        let unknown: Vec<StorePathHash> = paths.iter().filter(unknown).map(|path| path.hash).collect();
        let mut absent = HashSet::new();
        if unknown.len() > 1 {
            match self.bounded(self.load_closures(&unknown)).await {
                Ok(closures) => absent.extend(closures.missing),
                Err(error) if error.is_outage() => return Err(error),
                // A path of which nothing is believed may be in the closure of one only: each speaks for itself.
                Err(error) => tracing::warn!(error = chain(&error), "load closures, going on path by path"),
            }
        }
        let mut valid = Vec::new();
        for path in paths {
            if !absent.contains(&path.hash.to_string()) && self.find(path).await?.is_some() {
                valid.push(path.clone());
            }
        }
        self.show(&valid).await?;
        Ok(valid)
    }

    /// Every path that the view shows, if it shows only some; else those that are known. Cancel safe.
    ///
    /// # Errors
    /// As [`View::valid`].
    pub async fn all_paths(&self) -> Result<Vec<StorePath>, ViewError> {
        let path = |record: &TrustedRecord| record.info().store_path.clone();
        let mut paths: Vec<StorePath> = match &self.inner.scope {
            None => self.inner.records.iter().map(|(_, record)| path(&record)).collect(),
            Some(scope) => {
                let known: Vec<TrustedRecord> = scope.iter().filter_map(|hash| self.inner.records.get(hash)).collect();
                let mut paths: Vec<StorePath> = known.iter().map(path).collect();
                if known.len() < scope.len() {
                    let known: HashSet<StorePathHash> = paths.iter().map(|path| path.hash).collect();
                    let unknown: Vec<StorePathHash> =
                        scope.iter().filter(|hash| !known.contains(*hash)).copied().collect();
                    let loaded = self.bounded(self.load_closures(&unknown)).await?;
                    paths.extend(loaded.records.iter().map(path));
                }
                paths.retain(|path| scope.contains(&path.hash));
                paths
            }
        };
        paths.sort();
        paths.dedup();
        self.show(&paths).await?;
        Ok(paths)
    }

    /// The closures of these paths, if every record is in memory.
    fn closures_in_memory(&self, paths: &[StorePath]) -> Option<Closures> {
        let mut closures = Closures::default();
        let mut seen: HashSet<StorePathHash> = HashSet::new();
        let mut next: Vec<StorePath> = paths.to_vec();
        while let Some(path) = next.pop() {
            if seen.len() > CLOSURE_MAX {
                return None;
            }
            if seen.insert(path.hash) {
                let record = self.known(&path)?;
                next.extend_from_slice(&record.info().references);
                closures.records.push(record);
            }
        }
        Some(closures)
    }

    pub(super) async fn load_closures(&self, roots: &[StorePathHash]) -> Result<Closures, ViewError> {
        let mut records = Vec::new();
        let mut take = |record| records.push(record);
        let missing = self.inner.source.closure(roots, &mut take).await.map_err(ViewError::Remote)?;
        // A large closure has thousands of signatures: too long for a thread that others wait for.
        let view = self.clone();
        let verify = move || records.into_iter().map(|record| view.verify(record)).collect::<Result<_, Untrusted>>();
        let records = joined(tokio::task::spawn_blocking(verify)).await?;
        let closures = Closures { records, missing: missing.iter().map(ToString::to_string).collect() };
        // Numbered before they are known, so that the first look-ups find their numbers.
        self.number(&closures.records).await;
        for record in &closures.records {
            self.inner.records.insert(record.info().store_path.hash, record.clone());
        }
        Ok(closures)
    }

    /// Fetches the heads of these objects' trees, many in one request: a sandbox that is laid out looks at each path of a
    /// closure, one after the other, and the rest of a small tree lies in the frame of its head. What goes wrong here
    /// goes wrong again for whoever needs it, and is told there.
    pub(super) async fn warm(&self, records: &[TrustedRecord]) {
        let heads: Vec<BlobId> = records.iter().map(|record| record.manifest().into()).take(WARM_MAX).collect();
        let blobs = &self.inner.blobs;
        let heads = blobs.absent(&heads);
        let located: Vec<(BlobKind, BlobId)> = heads.iter().map(|id| (BlobKind::Manifest, *id)).collect();
        if blobs.fetcher().locate(&located).await.is_err() {
            return;
        }
        for some in heads.chunks(WARM_AT_ONCE) {
            let Ok(fetched) = blobs.fetch(BlobKind::Manifest, some).await else { return };
            if self.warm_parts(&fetched).await.is_err() {
                return;
            }
        }
    }

    /// Learns where the parts of these trees are, with one question, and takes those that have come with their heads.
    async fn warm_parts(&self, heads: &[Bytes]) -> Result<(), narlake_storage::Error> {
        let headers = heads.iter().filter_map(|head| ManifestHeader::decode(head).ok());
        let parts = headers.flat_map(|header| header.parts.into_iter().take(PARTS_WARM));
        let parts: Vec<BlobId> = parts.map(|part| part.id.into()).collect();
        let blobs = &self.inner.blobs;
        let parts = blobs.absent(&parts);
        let located: Vec<(BlobKind, BlobId)> = parts.iter().map(|id| (BlobKind::Part, *id)).collect();
        blobs.fetcher().locate(&located).await?;
        let near: Vec<BlobId> = parts.into_iter().filter(|id| blobs.fetcher().nearness(id) != Nearness::Away).collect();
        blobs.fetch(BlobKind::Part, &near).await.map(|_| ())
    }

    /// Gives these objects their nodeids. If that fails, so will their look-ups, and say why.
    async fn number(&self, records: &[TrustedRecord]) {
        let nodes = Arc::clone(&self.inner.nodes);
        let keys: Vec<ObjectKey> = records.iter().map(ObjectKey::of).collect();
        let metrics = self.inner.metrics.clone();
        let numbered = tokio::task::spawn_blocking(move || {
            let result = nodes.register(&keys);
            metrics.objects.set(i64::try_from(nodes.len()).unwrap_or(i64::MAX));
            result
        });
        if let Ok(Err(error)) = numbered.await {
            tracing::error!(error = chain(&error), "number the objects of a closure");
        }
    }
}
