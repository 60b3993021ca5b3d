//! One bucket, the lakes that live on it one after the other, and what must be true of it at any time.

use std::path::{Path as FsPath, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use narlake_format::lake::record::PathRecord;
use narlake_format::nix::signature::SecretKey;
use narlake_format::nix::store_path::StorePathHash;

use narlake_storage::{Bucket, Cache, Components, Error, ErrorKind, Ingested, Lake, Metrics, Published, Settings};
use object_store::{ObjectStore as _, ObjectStoreExt as _};
use tempfile::TempDir;

use crate::clock::{SimClock, SimEntropy};
use crate::damage::Damage;
use crate::fault::Plan;
use crate::model::Model;
use crate::object::Object;
use crate::rng::Rng;
use crate::store::{Contents, FaultStore, Request};

/// Bytes of a NAR that a client sends at a time.
const SEND_BYTES: usize = 40_000;

/// With what local state a lake opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StateDir {
    /// What the last life left.
    Kept,
    /// As it was at an earlier time ([`World::snapshot_state`]).
    Stale,
    /// None.
    Empty,
}

/// A world. See the crate's own page.
pub struct World {
    /// The time of bucket and lakes.
    pub clock: Arc<SimClock>,
    entropy: Arc<SimEntropy>,
    contents: Contents,
    key: SecretKey,
    dir: TempDir,
    states: u32,
}

/// A lake and who acts on it.
#[derive(Clone)]
pub struct Actor {
    /// The lake.
    pub lake: Lake,
    /// Its default cache.
    pub cache: Cache,
    /// What it asks of the bucket.
    pub store: FaultStore,
    key: SecretKey,
}

/// How one life went.
#[derive(Debug)]
pub struct Life<T> {
    /// What the scenario returned; nothing where the lake did not even open.
    pub result: Result<T, Error>,
    /// Every request to the bucket.
    pub trace: Vec<Request>,
    /// Whether the server died.
    pub crashed: bool,
}

impl World {
    /// An empty world.
    ///
    /// # Panics
    /// Where this host has no room for a temporary directory.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let clock = Arc::new(SimClock::new());
        Self {
            entropy: Arc::new(SimEntropy::new(Rng::part(seed, "entropy"))),
            contents: Contents::new(Arc::clone(&clock)),
            clock,
            key: SecretKey::generate("sim-1", [7; 32]).expect("a valid key name"),
            dir: tempfile::tempdir().expect("a temporary directory"),
            states: 0,
        }
    }

    /// A world that begins with another's bucket.
    #[must_use]
    pub fn holding(seed: u64, bucket: &[(String, Bytes)]) -> Self {
        let world = Self::new(seed);
        for (key, bytes) in bucket {
            world.set(key, bytes.clone());
        }
        world
    }

    /// Opens a lake, lets `scenario` act on it, and ends its life: in peace, without being closed, or by the plan's
    /// crash. Nothing of it runs afterwards.
    ///
    /// # Panics
    /// Where there is no runtime to be had.
    pub fn life<T>(&mut self, plan: Plan, state: StateDir, scenario: impl AsyncFnOnce(Actor) -> T) -> Life<T> {
        let store = FaultStore::new(self.contents.clone(), plan);
        let state_dir = self.state_dir(state);
        let runtime = runtime();
        let result = runtime.block_on(async { Ok(scenario(self.actor(&store, state_dir).await?).await) });
        let crashed = store.crashed();
        // Whatever still runs must not reach the bucket any more.
        store.crash();
        drop(runtime);
        Life { result, trace: store.trace(), crashed }
    }

    /// As [`World::life`], with a second server beside the first, which answers without faults.
    ///
    /// # Panics
    /// Where there is no runtime to be had.
    pub fn two_servers<T>(&mut self, plan: Plan, scenario: impl AsyncFnOnce(Actor, Actor) -> T) -> Result<T, Error> {
        let stores = [plan, Plan::Calm].map(|plan| FaultStore::new(self.contents.clone(), plan));
        let dirs = [self.state_dir(StateDir::Empty), self.dir.path().join("other-server")];
        let runtime = runtime();
        let result = runtime.block_on(async {
            let [faulty, calm] = &stores;
            let [dir, other_dir] = dirs;
            Ok(scenario(self.actor(faulty, dir).await?, self.actor(calm, other_dir).await?).await)
        });
        for store in &stores {
            store.crash();
        }
        result
    }

    async fn actor(&self, store: &FaultStore, state_dir: PathBuf) -> Result<Actor, Error> {
        let lake = self.open(store, state_dir).await?;
        let cache = lake.default_cache("default", &[self.key.public()]).await?;
        Ok(Actor { lake, cache, store: store.clone(), key: self.key.clone() })
    }

    async fn open(&self, store: &FaultStore, state_dir: PathBuf) -> Result<Lake, Error> {
        let metrics = Metrics::new(&prometheus::Registry::new());
        let components = Components {
            bucket: Bucket::stacked(store.clone(), "simulated".to_owned(), &metrics),
            clock: Arc::clone(&self.clock) as _,
            entropy: Arc::clone(&self.entropy) as _,
            metrics,
        };
        let settings = Settings { state_dir, cpu_threads: 1, zstd_level: 1, ..Settings::default() };
        Lake::open(settings, components).await
    }

    /// Keeps a copy of the local state for [`StateDir::Stale`].
    ///
    /// # Panics
    /// Where the copy fails.
    pub fn snapshot_state(&mut self) {
        let stale = self.dir.path().join("stale");
        let _ = std::fs::remove_dir_all(&stale);
        let current = self.current();
        if current.exists() {
            copy(&current, &stale);
        }
    }

    fn current(&self) -> PathBuf {
        self.dir.path().join(format!("state-{}", self.states))
    }

    fn state_dir(&mut self, state: StateDir) -> PathBuf {
        if state != StateDir::Kept {
            let _ = std::fs::remove_dir_all(self.current());
            self.states += 1;
        }
        let stale = self.dir.path().join("stale");
        if state == StateDir::Stale && stale.exists() {
            copy(&stale, &self.current());
        }
        self.current()
    }

    /// Opens the lake from the bucket alone, without faults, and holds it against the model:
    ///
    /// - every acknowledged path is there, byte for byte, with the content that was acknowledged;
    /// - any other path that somebody tried to push is absent, or there and whole;
    /// - whatever a visible path refers to is visible.
    ///
    /// # Panics
    /// Where that is not so.
    pub fn check(&mut self, model: &Model) {
        let life = self.life(Plan::Calm, StateDir::Empty, async |actor: Actor| {
            for path in model.paths() {
                let read = actor.read(&path).await.unwrap_or_else(|e| panic!("{path} is not readable: {}", e.chain()));
                match read {
                    Some((record, nar)) => {
                        let expected = model.expect(&path, record.info().nar_hash);
                        assert!(nar == expected.nar, "{path} is not what was pushed");
                        for reference in &record.info().references {
                            let found = actor.lake.lookup(&actor.cache, &reference.hash).await;
                            assert!(matches!(found, Ok(Some(_))), "{path} refers to {reference}, which is not there");
                        }
                    }
                    None => assert!(!model.is_acknowledged(&path), "{path} was acknowledged and is lost"),
                }
            }
        });
        if let Err(error) = life.result {
            panic!("the lake does not open: {}", error.chain());
        }
    }

    /// Every object of the bucket and its bytes, by key.
    ///
    /// # Panics
    /// Never: the bucket is in memory.
    #[must_use]
    pub fn bucket(&self) -> Vec<(String, Bytes)> {
        let memory = &self.contents.memory;
        futures::executor::block_on(async {
            let mut found = Vec::new();
            for meta in memory.list(None).try_collect::<Vec<_>>().await.expect("memory lists") {
                let bytes =
                    memory.get(&meta.location).await.expect("memory reads").bytes().await.expect("memory reads");
                found.push((meta.location.to_string(), bytes));
            }
            found
        })
    }

    /// Harms an object behind the engine's back.
    ///
    /// # Panics
    /// Where there is no such object.
    pub fn damage(&self, key: &str, damage: Damage) {
        futures::executor::block_on(FaultStore::new(self.contents.clone(), Plan::Calm).damage(key, damage));
    }

    /// Puts an object, as another world's bucket has it.
    ///
    /// # Panics
    /// Where the key is none.
    pub fn set(&self, key: &str, bytes: Bytes) {
        futures::executor::block_on(FaultStore::new(self.contents.clone(), Plan::Calm).set(key, bytes));
    }
}

impl Actor {
    /// Pushes an object as a Nix client does: asks whether its NAR is there, sends it if not, then its narinfo.
    ///
    /// # Errors
    /// The engine's.
    pub async fn push(&self, object: &Object) -> Result<Published, Error> {
        if !self.lake.has_upload(&self.cache, &object.upload()).await? {
            self.send(object).await?;
        }
        self.publish(object).await
    }

    /// Sends the NAR whatever is there, then the narinfo.
    ///
    /// # Errors
    /// The engine's.
    pub async fn push_again(&self, object: &Object) -> Result<Published, Error> {
        self.send(object).await?;
        self.publish(object).await
    }

    /// Sends the NAR.
    ///
    /// # Errors
    /// The engine's.
    pub async fn send(&self, object: &Object) -> Result<Ingested, Error> {
        let pieces: Vec<_> = object.nar.chunks(SEND_BYTES).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
        let ingested = self.lake.ingest(&self.cache, futures::stream::iter(pieces)).await?;
        self.lake.keep_upload(&self.cache, &object.upload(), &ingested).await?;
        Ok(ingested)
    }

    /// Sends the narinfo.
    ///
    /// # Errors
    /// The engine's.
    pub async fn publish(&self, object: &Object) -> Result<Published, Error> {
        self.lake.publish(&self.cache, object.info(), std::slice::from_ref(&self.key)).await
    }

    /// Pushes until it is acknowledged, as a client does that does not give up, or the server has died.
    ///
    /// # Errors
    /// The last one.
    pub async fn push_until_done(&self, object: &Object) -> Result<Published, Error> {
        let mut last = None;
        for _ in 0..PUSHES_MAX {
            match self.push(object).await {
                Ok(published) => return Ok(published),
                Err(error) => last = Some(error),
            }
            if self.store.crashed() {
                break;
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        Err(last.expect("pushed at least once"))
    }

    /// Reads a path: its record and its NAR, if it is there.
    ///
    /// # Errors
    /// The engine's.
    pub async fn read(&self, path: &StorePathHash) -> Result<Option<(Arc<PathRecord>, Vec<u8>)>, Error> {
        let Some(record) = self.lake.lookup(&self.cache, path).await? else { return Ok(None) };
        let mut stream = std::pin::pin!(self.lake.export(&self.cache, &record).await?);
        let mut nar = Vec::new();
        while let Some(bytes) = stream.next().await {
            nar.extend_from_slice(&bytes?);
        }
        Ok(Some((record, nar)))
    }

    /// Reads a path while things go wrong: it may fail, and it may be absent if it was never acknowledged, but what
    /// comes is what was pushed. True if it came.
    ///
    /// # Panics
    /// Where other bytes came, or an acknowledged path is said to be absent.
    pub async fn read_and_compare(&self, model: &Model, path: &StorePathHash) -> bool {
        match self.read(path).await {
            Ok(Some((record, nar))) => {
                let expected = model.expect(path, record.info().nar_hash);
                assert!(nar == expected.nar, "{path}: other bytes than were pushed");
                true
            }
            Ok(None) => {
                assert!(!model.is_acknowledged(path), "{path} was acknowledged and is said to be absent");
                false
            }
            Err(error) => {
                let allowed = matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Corrupt | ErrorKind::NotFound);
                assert!(allowed, "{path}: an odd error: {}", error.chain());
                false
            }
        }
    }
}

/// A runtime on which waiting takes no time.
fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().expect("a runtime")
}

/// Pushes before a client gives up.
const PUSHES_MAX: usize = 8;

fn copy(from: &FsPath, to: &FsPath) {
    std::fs::create_dir_all(to).expect("make a directory");
    for entry in std::fs::read_dir(from).expect("list a directory") {
        let entry = entry.expect("list a directory");
        let target = to.join(entry.file_name());
        if entry.file_type().expect("look at a file").is_dir() {
            copy(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).expect("copy a file");
        }
    }
}
