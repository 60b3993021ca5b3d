//! Path records: what makes a store path visible.
//!
//! A record is written in *generations*, create-only objects under one prefix per path, so that a delete can never meet
//! a newer write. The oldest generation fixes what the path is (NarHash, manifest); served is the newest that agrees
//! with it (docs/consistency.md, rules 2 and 3).
//!
//! Records seen are kept in memory and in the local state. What is not known locally is looked for in the bucket before
//! anybody hears "no"; and whoever acknowledges a push asks the bucket itself ([`Records::in_bucket`]).

use std::sync::Arc;
use std::time::Duration;

use narlake_format::id::{CacheId, GenerationId};
use narlake_format::lake::config::CacheDocument;
use narlake_format::lake::keys::{self, Key};
use narlake_format::lake::record::PathRecord;
use narlake_format::nix::signature::PublicKey;
use narlake_format::nix::store_path::{StoreDir, StorePath, StorePathHash};
use quick_cache::sync::Cache as MemoryCache;
use tokio::sync::{Mutex, MutexGuard};

use crate::bucket::Bucket;
use crate::error::{Error, ErrorKind, Rejection};
use crate::kv::Kv;
use crate::mint::Mint;

/// Records kept in memory, in number (about 1 KB each).
const MEMORY_MAX: usize = 50_000;

/// Paths that may be published at once, roughly: those whose hashes begin with the same byte take turns.
const TURNS: usize = 256;

/// How long a push waits for its turn. Less than Nix waits for an answer, 300 s.
const TURN_LIMIT: Duration = Duration::from_secs(120);

/// A cache of the lake, as far as reading and writing paths needs it.
#[derive(Debug, Clone)]
pub struct Cache {
    pub(crate) id: CacheId,
    pub(crate) document: Arc<CacheDocument>,
}

impl Cache {
    /// The id under which its records live.
    #[must_use]
    pub fn id(&self) -> CacheId {
        self.id
    }

    /// Its configuration.
    #[must_use]
    pub fn document(&self) -> &CacheDocument {
        &self.document
    }

    /// The trust domain that its content is stored in.
    #[must_use]
    pub fn domain(&self) -> narlake_format::lake::location::Domain {
        self.document.domain(self.id)
    }

    /// The keys whose signatures make its records believed.
    #[must_use]
    pub fn public_keys(&self) -> &[PublicKey] {
        &self.document.public_keys
    }
}

/// The records of all caches.
pub(crate) struct Records {
    store_dir: StoreDir,
    bucket: Bucket,
    kv: Kv,
    mint: Mint,
    memory: MemoryCache<(CacheId, StorePathHash), Arc<PathRecord>>,
    // Held across the publishing of one path; paths that share one merely wait a little.
    turns: [Mutex<()>; TURNS],
}

impl Records {
    pub(crate) fn new(store_dir: StoreDir, bucket: Bucket, kv: Kv, mint: Mint) -> Self {
        Self {
            store_dir,
            bucket,
            kv,
            mint,
            memory: MemoryCache::new(MEMORY_MAX),
            turns: std::array::from_fn(|_| Mutex::default()),
        }
    }

    /// The record of a path, from the nearest place that has it.
    pub(crate) async fn lookup(&self, cache: &Cache, hash: &StorePathHash) -> Result<Option<Arc<PathRecord>>, Error> {
        if let Some(record) = self.memory.get(&(cache.id, *hash)) {
            return Ok(Some(record));
        }
        if let Some(record) = self.in_state(cache, hash) {
            self.memory.insert((cache.id, *hash), Arc::clone(&record));
            return Ok(Some(record));
        }
        self.in_bucket(cache, hash).await
    }

    /// The record of a path as the bucket has it now.
    pub(crate) async fn in_bucket(
        &self,
        cache: &Cache,
        hash: &StorePathHash,
    ) -> Result<Option<Arc<PathRecord>>, Error> {
        let generations = self.generations(cache, hash).await?;
        let mut served: Option<&PathRecord> = None;
        for (_, record) in &generations {
            match served {
                Some(first) if !same_content(first, record) => {}
                _ => served = Some(record),
            }
        }
        Ok(served.map(|record| self.remember(cache, record.clone())))
    }

    /// Every generation of a path that can be read, oldest first.
    ///
    /// # Errors
    /// `Corrupt` where there are some and none can be read.
    async fn generations(&self, cache: &Cache, hash: &StorePathHash) -> Result<Vec<(String, PathRecord)>, Error> {
        let mut found = Vec::new();
        let mut damaged = None;
        for object in self.bucket.list(&keys::path_generations(&cache.id, hash), None).await? {
            if !matches!(object.key.parse(), Ok(Key::PathRecord(..))) {
                continue;
            }
            match self.read_generation(cache, hash, &object.key).await {
                Ok(record) => found.push((object.key, record)),
                // Deleted between the listing and the read: it was not the one that counts.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                // The path is what its other generations say; if there are none, a push may write one.
                Err(error) if error.kind() == ErrorKind::Corrupt => {
                    tracing::error!(key = object.key, error = error.chain(), "path record left out");
                    damaged.get_or_insert(error);
                }
                Err(error) => return Err(error),
            }
        }
        match damaged {
            Some(error) if found.is_empty() => Err(error),
            _ => Ok(found),
        }
    }

    /// Waits until no other push of this path is being published here, so that the second sees what the first wrote.
    ///
    /// # Errors
    /// `Unavailable` where that takes too long.
    pub(crate) async fn turn(&self, path: &StorePath) -> Result<MutexGuard<'_, ()>, Error> {
        let [first, ..] = *path.hash.as_bytes();
        let turn = self.turns[usize::from(first) % TURNS].lock();
        tokio::time::timeout(TURN_LIMIT, turn).await.map_err(|_| Error::Deadline {
            operation: "wait for another push of",
            key: path.to_string(),
            limit_ms: u64::try_from(TURN_LIMIT.as_millis()).unwrap_or(u64::MAX),
        })
    }

    /// Writes a record as a new generation, the commit point of a push, and says what the bucket serves now: another
    /// server may have been first with other content.
    ///
    /// The oldest id fixes the content, and ours may be older than one that was written, and acknowledged, before it. So
    /// where a younger one differs, ours is taken back; the youngest never is, so the path stays visible.
    ///
    /// Not cancel safe: a dropped write may still happen, and then the path is visible, whole.
    pub(crate) async fn publish(&self, cache: &Cache, record: &PathRecord) -> Result<Arc<PathRecord>, Error> {
        let generation = GenerationId(self.mint.ulid());
        let hash = record.info().store_path.hash;
        let key = keys::path_record(&cache.id, &hash, &generation);
        let text = record.to_text(&self.store_dir).into_bytes();
        // A record that nobody can read would hide the path for good.
        if let Err(error) = PathRecord::parse(&self.store_dir, &text) {
            let path = record.info().store_path.to_string();
            return Err(Error::Rejected { path, reason: Rejection::Record(error.to_string()) });
        }
        self.bucket.put_new(&key, text).await?;
        let generations = self.generations(cache, &hash).await?;
        if generations.iter().any(|(other, theirs)| *other > key && !same_content(theirs, record)) {
            self.bucket.delete(&key).await?;
        }
        match self.in_bucket(cache, &hash).await? {
            Some(served) => Ok(served),
            None => Err(Error::Bucket {
                operation: "read back",
                key,
                kind: ErrorKind::Unavailable,
                source: "the record just written is not there".into(),
            }),
        }
    }

    /// How many records are known here.
    pub(crate) fn known(&self) -> usize {
        self.kv.records.len()
    }

    async fn read_generation(&self, cache: &Cache, hash: &StorePathHash, key: &str) -> Result<PathRecord, Error> {
        match self.parse(cache, hash, key, &self.bucket.get(key).await?) {
            // What does not check may have been harmed on its way here.
            Err(_) => self.parse(cache, hash, key, &self.bucket.get(key).await?),
            Ok(record) => Ok(record),
        }
    }

    /// Checks a record read from the bucket: it is the path's, and one of the cache's keys signed all of it.
    fn parse(&self, cache: &Cache, hash: &StorePathHash, key: &str, bytes: &[u8]) -> Result<PathRecord, Error> {
        let wrong = |source: Box<dyn std::error::Error + Send + Sync>| Error::Bucket {
            operation: "decode",
            key: key.to_owned(),
            kind: ErrorKind::Corrupt,
            source,
        };
        let record = PathRecord::parse(&self.store_dir, bytes).map_err(|e| wrong(Box::new(e)))?;
        if record.info().store_path.hash != *hash {
            return Err(wrong("the record is of another path".into()));
        }
        if !record.is_signed_by(&self.store_dir, cache.public_keys()) {
            return Err(wrong("none of the cache's keys signed this record".into()));
        }
        Ok(record)
    }

    fn in_state(&self, cache: &Cache, hash: &StorePathHash) -> Option<Arc<PathRecord>> {
        let bytes = self.kv.records.get(&state_key(cache, hash)).ok()??;
        // Local state is derived: what does not check is as good as absent.
        self.parse(cache, hash, "local state", &bytes).ok().map(Arc::new)
    }

    fn remember(&self, cache: &Cache, record: PathRecord) -> Arc<PathRecord> {
        let hash = record.info().store_path.hash;
        let text = record.to_text(&self.store_dir);
        if let Err(error) = self.kv.records.put(&state_key(cache, &hash), text.as_bytes()) {
            tracing::warn!(path = %record.info().store_path, error = error.chain(), "record not kept in local state");
        }
        let record = Arc::new(record);
        self.memory.insert((cache.id, hash), Arc::clone(&record));
        record
    }
}

/// Whether two generations are the same path content.
pub(crate) fn same_content(a: &PathRecord, b: &PathRecord) -> bool {
    a.info().nar_hash == b.info().nar_hash && a.manifest() == b.manifest() && a.table() == b.table()
}

fn state_key(cache: &Cache, hash: &StorePathHash) -> Vec<u8> {
    format!("{}/{hash}", cache.id).into_bytes()
}
