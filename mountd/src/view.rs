//! The view: which store paths this mount shows, and what the kernel believes about them.
//!
//! A live view shows every path that the cache has and a trusted key has signed. Records are kept in memory, bounded;
//! one that is not there is asked for, and with it, in the background, the rest of its closure. The view also keeps
//! NEG, the names that the kernel was told do not exist ([`negative`]): an overlay above never asks again for those, so
//! before this daemon calls such a path valid it refreshes the overlays and looks through them ([`View::show`]).
//!
//! "Does not exist" is said only when the server says so (docs/semantics.md). When it does not answer, a look-up fails,
//! or, with [`OnOutage::Build`], is answered "does not exist" and healed later; a question for validity always fails.

mod closure;
mod negative;
mod prefetch;
mod realised;

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use narlake_format::error::chain;
use narlake_format::lake::record::PathRecord;
use narlake_format::nix::realisation::{Realisation, RealisationKey};
use narlake_format::nix::store_path::{StoreDir, StorePath, StorePathHash};
use narlake_storage::ErrorKind;
use tokio::sync::Semaphore;
use tokio::time::Instant;

pub use self::closure::Closures;
use self::negative::Negative;
use self::prefetch::Prefetches;
use self::realised::Realised;
use crate::fs::nodes::NodeTable;
use crate::lru::{Lru, lru};
use crate::metadata::Blobs;
use crate::metrics::Metrics;
use crate::mount_error::MountError;
use crate::overlay::Overlays;
use crate::remote::RemoteError;
use crate::trust::{TrustedKeys, TrustedRecord, Untrusted};

/// Bytes of records that a daemon's own view keeps in memory: 60,000 of the usual 2 KiB, 120 of the largest.
pub const RECORDS_BYTES: u64 = 128 << 20;

/// Bytes of a usual record in memory.
const RECORD_BYTES: u64 = 2048;

/// Look-ups of unknown names at the server at once; further ones wait. A program that probes a store directory at
/// random is slowed down by this, never told a falsehood.
const LOOKUPS_MAX: usize = 32;

/// Paths that are looked for through the overlays in one go.
const SHOWN_AT_ONCE: usize = 256;

/// With [`OnOutage::Build`]: how long a look-up waits for the server before the name does not exist.
const OUTAGE_WAIT: Duration = Duration::from_secs(2);

/// With [`OnOutage::Build`]: how long after that the server is not asked again.
const OUTAGE_PAUSE: Duration = Duration::from_secs(1);

/// Where path records come from.
#[async_trait]
pub trait RecordSource: Send + Sync + 'static {
    /// The record of the path with this hash part. `None` is authoritative: the cache has no such path.
    async fn lookup(&self, hash: &StorePathHash) -> Result<Option<PathRecord>, RemoteError>;

    /// The records of these closures, references first, each handed to `on`; hashes of paths that the cache lacks are
    /// returned.
    async fn closure(
        &self,
        roots: &[StorePathHash],
        on: &mut (dyn FnMut(PathRecord) + Send),
    ) -> Result<Vec<StorePathHash>, RemoteError>;

    /// What an output of a content-addressed derivation turned out to be. `None` is authoritative.
    async fn realisation(&self, key: &RealisationKey) -> Result<Option<Realisation>, RemoteError>;
}

/// What a look-up of an unknown name is told when the server does not answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, serde::Serialize, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum OnOutage {
    /// An I/O error, at the deadline.
    #[default]
    Fail,
    /// That it does not exist, so that builds go on.
    Build,
}

/// Numbers of a view.
#[derive(Clone, Debug)]
pub struct ViewSettings {
    /// Time limit of one question.
    pub deadline: Duration,
    /// What unknown names are during an outage.
    pub on_outage: OnOutage,
    /// Most bytes of records in memory.
    pub records_bytes: u64,
}

/// Why the view cannot say whether it shows a path.
#[derive(Debug, thiserror::Error)]
pub enum ViewError {
    /// The server does not answer, or with something else than it should.
    #[error("ask the server")]
    Remote(#[source] RemoteError),
    /// The server's answer is not signed by anybody trusted.
    #[error(transparent)]
    Untrusted(#[from] Untrusted),
    /// The path is in the lake, but the kernel cannot be brought to show it.
    #[error("{path} is in the lake, but an overlay does not show it within {limit_ms} ms; was it deleted there?")]
    Hidden {
        /// The store path.
        path: String,
        /// How long was tried, in milliseconds.
        limit_ms: u64,
    },
    /// An overlay could not be refreshed.
    #[error("refresh the overlays")]
    Overlay(#[source] MountError),
    /// The time was up.
    #[error("no answer within {limit_ms} ms")]
    Deadline {
        /// The limit, in milliseconds.
        limit_ms: u64,
    },
}

/// Hash parts of the only paths that a view shows.
pub type Scope = Arc<HashSet<StorePathHash>>;

/// A view. Cloning shares it.
#[derive(Clone)]
pub struct View {
    inner: Arc<Inner>,
}

struct Inner {
    source: Arc<dyn RecordSource>,
    keys: TrustedKeys,
    settings: ViewSettings,
    /// The only paths that it shows, if it does not show all.
    scope: Option<Scope>,
    records: Arc<Lru<StorePathHash, TrustedRecord>>,
    negative: Negative,
    overlays: Arc<Overlays>,
    lookups: Arc<Semaphore>,
    prefetches: Arc<Prefetches>,
    realised: Arc<Realised>,
    /// With [`OnOutage::Build`]: until when the server is not asked.
    down_until: Arc<Mutex<Option<Instant>>>,
    nodes: Arc<NodeTable>,
    blobs: Blobs,
    metrics: Metrics,
}

impl View {
    /// A view of what this source has and these keys signed. Objects of a closure get their nodeids as its records
    /// come in, many in one write.
    #[must_use]
    pub fn new(
        source: Arc<dyn RecordSource>,
        keys: TrustedKeys,
        (blobs, nodes, overlays): (Blobs, Arc<NodeTable>, Arc<Overlays>),
        settings: ViewSettings,
        metrics: &Metrics,
    ) -> Self {
        let items = usize::try_from(settings.records_bytes / RECORD_BYTES).unwrap_or(usize::MAX);
        let inner = Inner {
            source,
            keys,
            scope: None,
            records: Arc::new(lru(items, settings.records_bytes)),
            settings,
            negative: Negative::new(metrics),
            overlays,
            lookups: Arc::new(Semaphore::new(LOOKUPS_MAX)),
            prefetches: Arc::default(),
            realised: Arc::default(),
            down_until: Arc::default(),
            nodes,
            blobs,
            metrics: metrics.clone(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// A view with the same right as this one, so out of the same memory, with overlays of its own. With a scope it shows
    /// those paths and no others: of others, records are not even asked for.
    #[must_use]
    pub fn part(&self, scope: Option<Scope>, overlays: Arc<Overlays>) -> Self {
        let inner = &self.inner;
        let inner = Inner {
            source: Arc::clone(&inner.source),
            keys: inner.keys.clone(),
            settings: inner.settings.clone(),
            scope,
            records: Arc::clone(&inner.records),
            negative: Negative::new(&inner.metrics),
            overlays,
            lookups: Arc::clone(&inner.lookups),
            prefetches: Arc::clone(&inner.prefetches),
            realised: Arc::clone(&inner.realised),
            down_until: Arc::clone(&inner.down_until),
            nodes: Arc::clone(&inner.nodes),
            blobs: inner.blobs.clone(),
            metrics: inner.metrics.clone(),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Whether a path with this hash part may be shown at all.
    #[must_use]
    pub fn may_show(&self, hash: &StorePathHash) -> bool {
        self.inner.scope.as_ref().is_none_or(|scope| scope.contains(hash))
    }

    /// The store directory of its paths.
    #[must_use]
    pub fn store_dir(&self) -> &StoreDir {
        self.inner.keys.store_dir()
    }

    /// The record of a path, if it is in memory.
    #[must_use]
    pub fn known(&self, path: &StorePath) -> Option<TrustedRecord> {
        let known = self.inner.records.get(&path.hash).filter(|_| self.may_show(&path.hash));
        known.filter(|record| record.info().store_path == *path)
    }

    /// Number of paths in memory.
    #[must_use]
    pub fn known_len(&self) -> usize {
        self.inner.records.len()
    }

    /// Number of names in NEG.
    #[must_use]
    pub fn negative_len(&self) -> usize {
        self.inner.negative.len()
    }

    /// The record of a path, from memory or the server. Cancel safe.
    ///
    /// # Errors
    /// When the server does not answer, or with a record that nobody trusted signed.
    pub async fn find(&self, path: &StorePath) -> Result<Option<TrustedRecord>, ViewError> {
        Ok(self.find_hash(&path.hash).await?.filter(|record| record.info().store_path == *path))
    }

    /// The record of the path with this hash part, from memory or the server. Cancel safe.
    ///
    /// # Errors
    /// As [`View::find`].
    pub async fn find_hash(&self, hash: &StorePathHash) -> Result<Option<TrustedRecord>, ViewError> {
        if !self.may_show(hash) {
            return Ok(None);
        }
        if let Some(record) = self.inner.records.get(hash) {
            return Ok(Some(record));
        }
        self.bounded(self.ask(hash)).await
    }

    async fn ask(&self, hash: &StorePathHash) -> Result<Option<TrustedRecord>, ViewError> {
        if let Some(record) = self.prefetched(hash).await {
            return Ok(Some(record));
        }
        let _turn = self.inner.lookups.acquire().await;
        self.ask_in_turn(hash).await
    }

    /// Asks, for a caller who has its turn.
    async fn ask_in_turn(&self, hash: &StorePathHash) -> Result<Option<TrustedRecord>, ViewError> {
        // Those who ask at the same time wait for the first one's answer.
        let asked = self.inner.records.get_or_insert_async(hash, async {
            let found = self.inner.source.lookup(hash).await.map_err(|error| Some(ViewError::Remote(error)))?;
            let record = found.ok_or(None)?;
            let record = self.verify(record).map_err(|error| Some(error.into()))?;
            self.prefetch(&record);
            Ok(record)
        });
        match asked.await {
            Ok(record) => Ok(Some(record)),
            Err(None) => Ok(None),
            Err(Some(error)) => Err(error),
        }
    }

    /// What the kernel is told of a name in the store directory. `None`, "does not exist", is remembered in NEG.
    ///
    /// # Errors
    /// As [`View::find`].
    pub async fn lookup(&self, path: &StorePath) -> Result<Option<TrustedRecord>, ViewError> {
        // It never will be, so no overlay needs to forget it.
        if !self.may_show(&path.hash) {
            return Ok(None);
        }
        // Into NEG before anything is asked: from here on, whoever calls this path valid looks through the overlays
        // first, whatever answer is on its way to the kernel now.
        let asking = self.inner.negative.ask(path);
        if asking.owes {
            self.pay();
        }
        let found = self.lookup_noted(path).await;
        // Any other answer leaves nothing behind in the kernel.
        if matches!(found, Ok(None)) {
            asking.absent();
        }
        found
    }

    /// Says that the kernel may have been told of any name that it does not exist: by a daemon before this one.
    pub fn owes_refresh(&self) {
        self.inner.negative.drop_all();
        self.pay();
    }

    /// Sees to the refresh that is owed since NEG was full: again if that happens again, or if an overlay cannot be
    /// refreshed. Meanwhile paths cost a look through the overlays, and nothing is wrong.
    fn pay(&self) {
        let inner = Arc::downgrade(&self.inner);
        tokio::spawn(async move {
            while let Some(due) = inner.upgrade().and_then(|inner| inner.negative.due()) {
                tokio::time::sleep_until(due).await;
                let Some(inner) = inner.upgrade() else { return };
                let (view, began) = (Self { inner }, Instant::now());
                match view.refresh().await {
                    Ok(_) => view.inner.negative.paid(began),
                    Err(error) => {
                        let error = chain(&error);
                        tracing::warn!(error, "refresh the overlays, for names that were forgotten");
                        tokio::time::sleep(negative::SETTLE).await;
                    }
                }
            }
        });
    }

    async fn lookup_noted(&self, path: &StorePath) -> Result<Option<TrustedRecord>, ViewError> {
        if let Some(record) = self.known(path) {
            return Ok(Some(record));
        }
        // What was shown once is not denied because the server does not answer, nor because of its name.
        if self.inner.nodes.has_path(path) {
            return self.find(path).await;
        }
        // Nix takes a lock file beside each path that it builds, and lays out a sandbox. Such a name is almost never a
        // store path; one that is, is in memory the first time that anybody uses it, since validity is asked first.
        if is_scratch_name(path) {
            return Ok(None);
        }
        match self.inner.settings.on_outage {
            OnOutage::Fail => self.find(path).await,
            OnOutage::Build => self.find_or_build(path).await,
        }
    }

    /// As [`View::find`], but a server that does not answer means that the path does not exist.
    async fn find_or_build(&self, path: &StorePath) -> Result<Option<TrustedRecord>, ViewError> {
        // The wait for a turn says nothing about the server: it is not part of the time that an outage takes.
        let _turn = self.bounded(async { Ok(self.inner.lookups.acquire().await) }).await?;
        let down_until = || self.inner.down_until.lock().unwrap_or_else(PoisonError::into_inner);
        if down_until().is_some_and(|until| Instant::now() < until) {
            return Ok(None);
        }
        let wait = OUTAGE_WAIT.min(self.inner.settings.deadline);
        let limit_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        let asked = tokio::time::timeout(wait, self.ask_in_turn(&path.hash)).await;
        match asked.unwrap_or(Err(ViewError::Deadline { limit_ms })) {
            Err(error) if error.is_outage() => {
                tracing::warn!(path = %path, error = chain(&error), "server is down, path taken as absent");
                *down_until() = Some(Instant::now() + OUTAGE_PAUSE);
                Ok(None)
            }
            found => Ok(found?.filter(|record| record.info().store_path == *path)),
        }
    }

    /// What Nix is told of a path: its record, once every overlay shows it. Cancel safe.
    ///
    /// # Errors
    /// As [`View::find`] and [`View::show`].
    pub async fn valid(&self, path: &StorePath) -> Result<Option<TrustedRecord>, ViewError> {
        let Some(record) = self.find(path).await? else { return Ok(None) };
        self.show(std::slice::from_ref(path)).await?;
        Ok(Some(record))
    }

    /// Makes sure that these paths, which the lake has, are seen through every overlay, although the kernel may have
    /// been told that they do not exist. Cancel safe: names leave NEG only once they are seen.
    ///
    /// # Errors
    /// When an overlay cannot be refreshed, or does not show a path until the deadline.
    pub async fn show(&self, paths: &[StorePath]) -> Result<(), ViewError> {
        let inner = &self.inner;
        let noted: Vec<&StorePath> = paths.iter().filter(|path| inner.negative.contains(path)).collect();
        let limit = inner.settings.deadline;
        // Each part has the whole time: a closure of thousands is no less alive for taking longer than a path.
        for part in noted.chunks(SHOWN_AT_ONCE) {
            let names: Vec<String> = part.iter().map(ToString::to_string).collect();
            let shown = inner.overlays.show(&names, limit).await;
            if let Some(hidden) = shown.map_err(ViewError::Overlay)? {
                let path = format!("{}/{hidden}", self.store_dir().as_str());
                let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
                return Err(ViewError::Hidden { path, limit_ms });
            }
            part.iter().for_each(|path| inner.negative.seen(path));
            inner.metrics.paths_healed.inc_by(part.len() as u64);
        }
        Ok(())
    }

    /// Refreshes overlays because a human or Nix asks for it: afterwards no name is negative in them.
    ///
    /// # Errors
    /// When one cannot be refreshed.
    pub async fn refresh(&self) -> Result<usize, ViewError> {
        self.inner.overlays.refresh(self.inner.settings.deadline).await.map_err(ViewError::Overlay)
    }

    fn verify(&self, record: PathRecord) -> Result<TrustedRecord, Untrusted> {
        self.inner.keys.verify(record).inspect_err(|_| self.inner.metrics.records_untrusted.inc())
    }

    async fn bounded<T>(&self, work: impl Future<Output = Result<T, ViewError>>) -> Result<T, ViewError> {
        let limit = self.inner.settings.deadline;
        let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        tokio::time::timeout(limit, work).await.unwrap_or(Err(ViewError::Deadline { limit_ms }))
    }
}

impl ViewError {
    /// Whether the server is what fails, and may come back.
    #[must_use]
    pub fn is_outage(&self) -> bool {
        match self {
            Self::Remote(error) => error.kind() == ErrorKind::Unavailable,
            Self::Deadline { .. } => true,
            Self::Untrusted(_) | Self::Hidden { .. } | Self::Overlay(_) => false,
        }
    }
}

/// A name that Nix makes up for itself beside a store path.
fn is_scratch_name(path: &StorePath) -> bool {
    [".lock", ".chroot", ".check"].iter().any(|suffix| path.name.as_str().ends_with(suffix))
}
