//! Opening a lake: whose bucket it is, what kind of bucket, and the local state made good.

use std::collections::HashMap;
use std::fs::{File, TryLockError};
use std::path::Path;
use std::sync::{Arc, Mutex};

use narlake_format::id::{CacheId, ConfigId, LakeId};
use narlake_format::lake::config::{CacheDocument, CacheName, Document as _, LakeDocument, Visibility};
use narlake_format::lake::keys::{self, Key};
use narlake_format::nix::signature::PublicKey;
use tokio::sync::Semaphore;

use super::{Inner, Lake, LakeInfo};
use crate::bucket::{Bucket, decode_document};
use crate::complete::Incomplete;
use crate::config::{Components, Settings};
use crate::cpu::CpuPool;
use crate::error::{Error, ErrorKind};
use crate::index::Index;
use crate::ingest::Intake;
use crate::kv::{Kv, set_aside};
use crate::mint::Mint;
use crate::pack::writer::PackWriter;
use crate::records::{Cache, Records};
use crate::rewrite::REWRITES;
use crate::upload::Uploads;

/// Parts of the state directory that are derived from the bucket.
const DERIVED: [&str; 2] = ["sled", "segments"];

impl Lake {
    /// Opens the lake of a bucket, or makes one in an empty bucket.
    ///
    /// # Errors
    /// `Unusable` where the bucket does not read its own writes or the clocks are far apart, `Corrupt` for a lake of
    /// another format, `State` where another process has the state directory.
    pub async fn open(settings: Settings, components: Components) -> Result<Self, Error> {
        let Components { bucket, clock, entropy, metrics } = components;
        let lock = lock(&settings.state_dir)?;
        let mint = Mint::new(Arc::clone(&clock), entropy);
        let probe = bucket.probe(&format!("probe/{}", LakeId(mint.ulid())), &*clock).await?;
        metrics.bucket_conditional_create.set(i64::from(probe.conditional_create));
        metrics.bucket_clock_offset_seconds.set(probe.clock_offset_ms / 1000);
        if !probe.conditional_create {
            tracing::warn!(
                bucket = bucket.name(),
                "the bucket overwrites where it should refuse; nothing relies on it"
            );
        }
        let (lake, document) = lake_document(&bucket, &mint, &settings).await?;
        let info = LakeInfo {
            lake,
            store_dir: document.store_dir,
            bucket: bucket.name().to_owned(),
            conditional_create: probe.conditional_create,
        };
        let (kv, fresh) = Kv::open(&settings.state_dir, lake)?;
        if fresh {
            metrics.index_rebuilds.inc();
        }
        let index = Index::open(&settings.state_dir, bucket.clone(), kv.clone(), mint.clone(), metrics.clone()).await?;
        let seal_after = settings.seal_after;
        let writer = PackWriter::new(bucket.clone(), Arc::clone(&index), mint.clone(), metrics.clone(), seal_after);
        let intake = Intake {
            store_dir: info.store_dir.clone(),
            nar_size_max: settings.nar_size_max,
            index: Arc::clone(&index),
            writer: writer.clone(),
            cpu: Arc::new(CpuPool::start(settings.cpu_threads, settings.zstd_level)?),
            metrics: metrics.clone(),
        };
        let records = Records::new(info.store_dir.clone(), bucket.clone(), kv.clone(), mint.clone());
        let uploads = Uploads::new(bucket.clone(), mint.clone());
        let fetchers = Mutex::new(HashMap::new());
        let inner = Inner {
            info,
            settings,
            bucket,
            metrics,
            mint,
            kv,
            index,
            writer,
            intake,
            records,
            uploads,
            fetchers,
            incomplete: Incomplete::default(),
            rewrites: Arc::new(Semaphore::new(REWRITES)),
            _lock: lock,
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Sets the derived local state aside, so that the next [`Lake::open`] rebuilds it from the bucket.
    ///
    /// # Errors
    /// `State` where another process has the directory or it cannot be changed.
    pub fn set_state_aside(state_dir: &Path) -> Result<(), Error> {
        let _lock = lock(state_dir)?;
        for name in DERIVED {
            if state_dir.join(name).exists() {
                set_aside(state_dir, name)?;
            }
        }
        Ok(())
    }

    /// The public cache of this name, made if it is not there, whose records are signed with these keys.
    ///
    /// # Errors
    /// `Invalid` for a name that is none, `Unusable` where the cache has keys and one of these is not among them, the
    /// bucket's own otherwise.
    pub async fn default_cache(&self, name: &str, keys: &[PublicKey]) -> Result<Cache, Error> {
        self.cache_with(name, keys, Unknown::Refuse).await
    }

    /// As [`Lake::default_cache`], but keys that the cache does not have yet become its own: an operator wants that.
    ///
    /// # Errors
    /// `Invalid` for a name that is none, the bucket's own otherwise.
    pub async fn default_cache_adding(&self, name: &str, keys: &[PublicKey]) -> Result<Cache, Error> {
        self.cache_with(name, keys, Unknown::Add).await
    }

    async fn cache_with(&self, name: &str, keys: &[PublicKey], unknown: Unknown) -> Result<Cache, Error> {
        let name: CacheName =
            name.parse().map_err(|source| Error::Format { key: format!("cache name {name:?}"), source })?;
        let found = self.cache_named(&name).await?;
        let (id, mut document) = match &found {
            Some(cache) => (cache.id, CacheDocument::clone(&cache.document)),
            None => (CacheId(self.inner.mint.ulid()), CacheDocument::new(name.clone(), Visibility::Public)),
        };
        let new: Vec<PublicKey> = keys.iter().filter(|key| !document.public_keys.contains(key)).cloned().collect();
        if let Some(cache) = found {
            let Some(key) = new.first() else { return Ok(cache) };
            if unknown == Unknown::Refuse && !document.public_keys.is_empty() {
                let (key, known) = (key.name(), names(&document.public_keys));
                return Err(Error::Unusable(format!(
                    "its cache {name} is signed with {known}, of which {key}, this server's, is none"
                )));
            }
        }
        document.public_keys.extend(new);
        let key = keys::config(&id, &ConfigId(self.inner.mint.ulid()));
        self.inner.bucket.put_new(&key, document.encode()).await?;
        // Two servers that start at once agree on the older one.
        let made = Cache { id, document: Arc::new(document) };
        match self.cache_named(&name).await? {
            Some(first) if first.id != id => Box::pin(self.cache_with(name.as_str(), keys, unknown)).await,
            _ => Ok(made),
        }
    }

    async fn cache_named(&self, name: &CacheName) -> Result<Option<Cache>, Error> {
        Ok(self.caches().await?.into_iter().find(|cache| cache.document.name == *name))
    }

    /// Every cache of the lake, by its newest configuration, oldest cache first.
    ///
    /// # Errors
    /// `Corrupt` for a configuration that does not decode, the bucket's own otherwise.
    pub async fn caches(&self) -> Result<Vec<Cache>, Error> {
        let mut caches = Vec::new();
        for prefix in self.inner.bucket.list_folders(keys::CACHES).await? {
            let Some(id) = prefix.rsplit('/').next().and_then(|name| name.parse::<CacheId>().ok()) else { continue };
            let configs = self.inner.bucket.list(&keys::configs(&id), None).await?;
            let newest = configs.iter().rev().find(|object| matches!(object.key.parse(), Ok(Key::Config(..))));
            // A cache's configuration is written before anything else of it. To go on without one would be to make a new
            // cache of its name, in which its paths are not.
            let newest = newest.ok_or_else(|| Error::Bucket {
                operation: "find a configuration under",
                key: keys::configs(&id),
                kind: ErrorKind::Corrupt,
                source: "the cache has other objects, but no configuration".into(),
            })?;
            let document = decode_document(&newest.key, &self.inner.bucket.get(&newest.key).await?)?;
            caches.push(Cache { id, document: Arc::new(document) });
        }
        caches.sort_by_key(|cache| cache.id);
        Ok(caches)
    }
}

/// What becomes of a key that a cache does not have yet (docs/consistency.md, rule 21).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Unknown {
    /// It becomes one.
    Add,
    /// Clients trust other keys, and readers would not believe what it signs.
    Refuse,
}

fn names(keys: &[PublicKey]) -> String {
    keys.iter().map(PublicKey::name).collect::<Vec<_>>().join(", ")
}

/// Folders that only a lake has. To make a second lake beside what is left of one would be to lose what that holds.
const IN_EVERY_LAKE: [&str; 2] = ["caches", "packs"];

/// The smallest valid lake document, made first if there is none: two servers that start at once agree on one.
async fn lake_document(bucket: &Bucket, mint: &Mint, settings: &Settings) -> Result<(LakeId, LakeDocument), Error> {
    if let Some(found) = smallest_lake(bucket).await? {
        return Ok(found);
    }
    if let Some(left) = bucket.list_folders("").await?.iter().find(|folder| IN_EVERY_LAKE.contains(&folder.as_str())) {
        return Err(Error::Bucket {
            operation: "find a lake document under",
            key: keys::LAKE.to_owned(),
            kind: ErrorKind::Corrupt,
            source: format!("there is none, but there are objects under {left}/; restore it").into(),
        });
    }
    let id = LakeId(mint.ulid());
    let document = LakeDocument::new(settings.store_dir.clone(), mint.now_ms() / 1000);
    bucket.put_new(&keys::lake(&id), document.encode()).await?;
    smallest_lake(bucket)
        .await?
        .ok_or_else(|| Error::Unusable("the lake document just written is not there".to_owned()))
}

async fn smallest_lake(bucket: &Bucket) -> Result<Option<(LakeId, LakeDocument)>, Error> {
    for object in bucket.list(keys::LAKE, None).await? {
        if let Ok(Key::Lake(id)) = object.key.parse() {
            // One that does not decode may be of a newer format: going on beside it could harm what it describes.
            return Ok(Some((id, decode_document(&object.key, &bucket.get(&object.key).await?)?)));
        }
    }
    Ok(None)
}

fn lock(state_dir: &Path) -> Result<File, Error> {
    std::fs::create_dir_all(state_dir).map_err(|e| Error::state("create state directory", state_dir, e))?;
    let path = state_dir.join("lock");
    let file = File::create(&path).map_err(|e| Error::state("create lock file", &path, e))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            Err(Error::state("lock", &path, std::io::Error::other("another process has this state directory open")))
        }
        Err(TryLockError::Error(error)) => Err(Error::state("lock", &path, error)),
    }
}
