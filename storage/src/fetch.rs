//! Content by id: where it is, one read for what lies together, verified before anybody sees it.
//!
//! A request names blobs. Their places are looked up (one question for all that are not known yet), grouped by frame,
//! and frames that lie side by side in a pack are read in one range ([`coalesce`]). Each frame is read and decoded by
//! one flight however many ask for it ([`flight`]); decoded frames stay in a bounded cache ([`frames`]), since a reader
//! that wants one chunk of a frame mostly wants its neighbours next. Who knows what will be wanted says so: places can be
//! learnt and frames be read ahead, in the background and behind all that somebody waits for ([`turns`]). A read that
//! takes longer than nearly all others is asked for a second time ([`hedge`]).
//!
//! Invariant: bytes leave this module only after they were hashed and found to be what names them, at every call, also
//! when they come from the cache of frames.
//!
//! A pack that is gone, or a frame that does not verify, is looked up anew within the same deadline: content may have
//! been moved by compaction (docs/consistency.md, rule 13). What fails again is reported to the source, which counts it
//! as missing from then on and may know another copy (rule 7). Every wait ends at the deadline.

mod coalesce;
mod decode;
mod flight;
mod frames;
mod hedge;
mod places;
mod stats;
mod turns;

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use narlake_format::id::{BlobId, BlobKind};
use narlake_format::lake::keys;
use narlake_format::lake::location::{Location, PackRef};
use tokio::sync::Semaphore;

pub use self::flight::Nearness;
use self::flight::{Flights, FrameKey, Reads};
use self::places::Places;
pub use self::stats::FetchStats;
pub use self::turns::Interest;
use crate::error::{Error, ErrorKind};
pub use crate::metrics::FetchMetrics;

/// Where blobs come from: a bucket with an index beside it, or a server.
#[async_trait]
pub trait BlobSource: Send + Sync + 'static {
    /// The place of each id, in order; `None` for one that is nowhere.
    async fn locate(&self, ids: &[BlobId]) -> Result<Vec<Option<Location>>, Error>;

    /// Bytes `range` of a pack, all of them.
    async fn read(&self, pack: &PackRef, range: Range<u64>) -> Result<Bytes, Error>;

    /// The size of a pack, in bytes.
    async fn size(&self, pack: &PackRef) -> Result<u64, Error>;

    /// Told of a frame that was not there, or did not verify, twice in a row. By default nobody minds.
    async fn damaged(&self, pack: &PackRef, frame_offset: u32, error: &Error) {
        let _ = (pack, frame_offset, error);
    }
}

/// Limits of a [`Fetcher`].
#[derive(Debug, Clone)]
pub struct FetchSettings {
    /// Time limit of one call.
    pub deadline: Duration,
    /// Decoded frames kept, in bytes.
    pub frame_cache_bytes: u64,
    /// Places of blobs kept, in number (about 100 bytes each); none where the source keeps them itself.
    pub locations_max: usize,
    /// Reads in flight at once.
    pub parallel: usize,
    /// Of those, reads ahead of what somebody waits for.
    pub ahead_parallel: usize,
    /// Bytes nobody asked for that one read may run over to join two frames.
    pub gap_bytes: u64,
    /// Whether a read that takes longer than nearly all others is asked for a second time.
    pub hedged: bool,
}

impl Default for FetchSettings {
    fn default() -> Self {
        Self {
            deadline: Duration::from_secs(30),
            frame_cache_bytes: 64 << 20,
            locations_max: 200_000,
            parallel: 16,
            ahead_parallel: 4,
            gap_bytes: 0,
            hedged: true,
        }
    }
}

/// What to read ahead.
#[derive(Debug, Clone)]
pub struct Ahead {
    /// Blobs that may be wanted, the likeliest first.
    pub blobs: Vec<BlobId>,
    /// Blobs that are being asked for anyway: what shares a frame with them costs nothing.
    pub beside: Vec<BlobId>,
    /// Most bytes to read.
    pub bytes_max: u64,
    /// Most bytes of one read.
    pub read_max: u64,
    /// Whether this is a guess, to be covered by what other guesses have brought; else it follows somebody who reads on.
    pub suspicion: bool,
    /// Reads that have not begun when nobody keeps this any more are dropped.
    pub interest: Interest,
}

/// The fetch engine over one source. Cheap to clone; clones share caches and flights.
#[derive(Clone)]
pub struct Fetcher {
    inner: Arc<Inner>,
}

struct Inner {
    source: Arc<dyn BlobSource>,
    settings: FetchSettings,
    places: Places,
    flights: Flights,
    /// Turns of work in the background.
    background: Arc<Semaphore>,
    metrics: FetchMetrics,
}

impl Fetcher {
    /// A fetch engine over this source.
    #[must_use]
    pub fn new(source: Arc<dyn BlobSource>, settings: FetchSettings) -> Self {
        Self::metered(source, settings, FetchMetrics::unregistered())
    }

    /// The same, with counters that are on somebody's page.
    #[must_use]
    pub fn metered(source: Arc<dyn BlobSource>, settings: FetchSettings, metrics: FetchMetrics) -> Self {
        let flights = Flights::new(Arc::clone(&source), &settings, metrics.clone());
        let places = Places::new(settings.locations_max);
        let background = Arc::new(Semaphore::new(BACKGROUND_MAX));
        Self { inner: Arc::new(Inner { source, settings, places, flights, background, metrics }) }
    }

    /// What has been moved so far.
    #[must_use]
    pub fn stats(&self) -> FetchStats {
        FetchStats::of(&self.inner.metrics)
    }

    /// Where a blob is, as far as that is known without asking.
    #[must_use]
    pub fn nearness(&self, id: &BlobId) -> Nearness {
        let place = self.inner.places.get(id);
        place.map_or(Nearness::Away, |place| self.inner.flights.nearness(&FrameKey::of(&place)))
    }

    /// Learns the places of these blobs in the background, so that reads of them need no question. What cannot be learnt
    /// now is asked for by whoever needs it. Nothing happens while much else is going on in the background.
    pub fn learn(&self, mut ids: Vec<BlobId>) {
        ids.retain(|id| self.inner.places.get(id).is_none());
        if ids.is_empty() || self.inner.settings.locations_max == 0 {
            return;
        }
        self.spawn(async move |fetcher| {
            if let Err(error) = fetcher.places(ids.iter().copied()).await {
                tracing::debug!(error = error.chain(), "places not learnt");
            }
        });
    }

    /// Reads ahead in the background. Nothing happens where that is more than may be read ahead at once.
    pub fn ahead(&self, ahead: Ahead) {
        self.spawn(async move |fetcher| {
            let ids = ahead.blobs.iter().chain(&ahead.beside).copied();
            let places = match fetcher.places(ids).await {
                Ok(places) => places,
                Err(error) => return tracing::debug!(error = error.chain(), "nothing read ahead"),
            };
            let beside = ahead.beside.iter().filter_map(|id| places.get(id));
            let mut seen: HashSet<FrameKey> = beside.map(FrameKey::of).collect();
            let wanted = ahead.blobs.iter().filter_map(|id| places.get(id));
            let wanted = wanted.map(|place| (FrameKey::of(place), place.frame_length));
            let wanted: Vec<(FrameKey, u32)> = wanted.filter(|(key, _)| seen.insert(*key)).collect();
            let Ahead { bytes_max, read_max, suspicion, interest, .. } = ahead;
            fetcher.inner.flights.ahead(&wanted, bytes_max, read_max, suspicion, &interest);
        });
    }

    /// Runs work that nobody waits for, unless there is much of it, for no longer than a call may take.
    fn spawn<F>(&self, work: impl FnOnce(Self) -> F + Send + 'static)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let Ok(turn) = Arc::clone(&self.inner.background).try_acquire_owned() else { return };
        let fetcher = self.clone();
        tokio::spawn(async move {
            let limit = fetcher.inner.settings.deadline;
            let _ = tokio::time::timeout(limit, work(fetcher)).await;
            drop(turn);
        });
    }

    /// Learns the places of these blobs with one question, so that later reads need none. Cancel safe.
    ///
    /// # Errors
    /// `Corrupt` where one of them is nowhere; `Unavailable` where the source does not answer in time.
    pub async fn locate(&self, blobs: &[(BlobKind, BlobId)]) -> Result<(), Error> {
        let ids = blobs.iter().map(|(_, id)| *id);
        let places = self.bounded(blobs.first().map(|(_, id)| id), self.places(ids)).await?;
        match blobs.iter().find(|(_, id)| !places.contains_key(id)) {
            Some((kind, id)) => Err(Error::MissingBlob { kind: *kind, id: *id }),
            None => Ok(()),
        }
    }

    /// The bytes of these blobs, verified, in the order asked. Cancel safe: reads that have begun go on for others.
    ///
    /// # Errors
    /// `Corrupt` where a blob is nowhere or does not verify, also when looked up anew; `Unavailable` where the source
    /// does not answer in time.
    pub async fn fetch(&self, blobs: &[(BlobKind, BlobId)]) -> Result<Vec<Bytes>, Error> {
        self.bounded(blobs.first().map(|(_, id)| id), async {
            let mut reads = Reads::Joined;
            for _ in 1..ATTEMPTS {
                match self.attempt(blobs, reads).await {
                    Err(failure) if !failure.damaged.is_empty() => self.look_again(blobs, failure, reads).await,
                    done => return done.map_err(|failure| failure.error),
                }
                reads = Reads::Single;
            }
            match self.attempt(blobs, reads).await {
                Ok(found) => Ok(found),
                Err(failure) => {
                    self.report(&failure).await;
                    Err(failure.error)
                }
            }
        })
        .await
    }

    /// Forgets where these blobs were. What failed when read alone is reported, so that the source may name another
    /// copy next; a first failure may have been the way here.
    async fn look_again(&self, blobs: &[(BlobKind, BlobId)], failure: Failure, reads: Reads) {
        tracing::warn!(error = failure.error.chain(), "content looked up anew");
        if reads == Reads::Single {
            self.report(&failure).await;
        }
        // Not the bytes that failed, once more.
        for frame in &failure.damaged {
            self.inner.flights.forget(frame);
        }
        for (_, id) in blobs {
            self.inner.places.forget(id);
        }
    }

    async fn report(&self, failure: &Failure) {
        for frame in &failure.damaged {
            self.inner.source.damaged(&frame.pack, frame.offset, &failure.error).await;
        }
    }

    async fn bounded<T>(
        &self,
        first: Option<&BlobId>,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        let deadline = self.inner.settings.deadline;
        tokio::time::timeout(deadline, work).await.unwrap_or_else(|_| {
            Err(Error::Deadline {
                operation: "fetch",
                key: first.map(BlobId::to_string).unwrap_or_default(),
                limit_ms: u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX),
            })
        })
    }

    async fn attempt(&self, blobs: &[(BlobKind, BlobId)], reads: Reads) -> Result<Vec<Bytes>, Failure> {
        let places = self.places(blobs.iter().map(|(_, id)| *id)).await?;
        let mut wanted: Vec<(FrameKey, u32)> =
            places.values().map(|place| (FrameKey::of(place), place.frame_length)).collect();
        wanted.sort_unstable();
        wanted.dedup();
        let frames = self.inner.flights.frames(&wanted, reads).await;
        let mut found = Vec::with_capacity(blobs.len());
        let mut failure: Option<Failure> = None;
        for (kind, id) in blobs {
            let place = places.get(id).ok_or(Error::MissingBlob { kind: *kind, id: *id })?;
            let key = FrameKey::of(place);
            let error = match frames.get(&key) {
                Some(Ok(frame)) => match blob_in(frame, *kind, id, place) {
                    Some(bytes) => {
                        found.push(bytes);
                        continue;
                    }
                    None => Error::DamagedBlob { kind: *kind, id: *id, pack: place.pack, offset: place.frame_offset },
                },
                Some(Err(error)) => copy_of(error, place),
                None => Error::Stopped("fetch"),
            };
            if !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Corrupt) {
                return Err(error.into());
            }
            let failure = failure.get_or_insert_with(|| error.into());
            if !failure.damaged.contains(&key) {
                failure.damaged.push(key);
            }
        }
        failure.map_or(Ok(found), Err)
    }

    /// The place of each id, from the cache or the source.
    async fn places(&self, ids: impl Iterator<Item = BlobId>) -> Result<HashMap<BlobId, Location>, Error> {
        let mut places = HashMap::new();
        let mut unknown = Vec::new();
        for id in ids {
            match self.inner.places.get(&id) {
                Some(place) => {
                    places.insert(id, place);
                }
                None => unknown.push(id),
            }
        }
        unknown.sort_unstable();
        unknown.dedup();
        for batch in unknown.chunks(LOCATE_BATCH) {
            self.inner.metrics.locates.inc();
            let found = self.inner.source.locate(batch).await?;
            for (id, place) in batch.iter().zip(found) {
                if let Some(place) = place {
                    self.inner.places.insert(*id, &place);
                    places.insert(*id, place);
                }
            }
        }
        Ok(places)
    }
}

/// Why an attempt came to nothing.
struct Failure {
    error: Error,
    /// Frames that are gone or do not verify; none where something else is wrong.
    damaged: Vec<FrameKey>,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self { error, damaged: Vec::new() }
    }
}

/// A blob of a decoded frame, if it is there and is what its id says.
fn blob_in(frame: &Bytes, kind: BlobKind, id: &BlobId, place: &Location) -> Option<Bytes> {
    let start = place.offset as usize;
    let span = start..start.checked_add(place.length as usize)?;
    let bytes = (frame.len() >= span.end).then(|| frame.slice(span))?;
    (BlobId::of(kind, &bytes) == *id).then_some(bytes)
}

/// An error for each of those who waited for one flight: the same kind and text.
fn copy_of(error: &Arc<Error>, place: &Location) -> Error {
    let key = format!("{} frame at {}", keys::pack(&place.pack), place.frame_offset);
    Error::Bucket { operation: "fetch from", key, kind: error.kind(), source: error.chain().into() }
}

/// Attempts at content that is gone or does not verify: where it was thought to be, looked up anew, and, if that copy
/// is bad too, wherever else there is one.
const ATTEMPTS: u32 = 3;

/// Ids in one question to the source.
const LOCATE_BATCH: usize = 16 * 1024;

/// Questions and reads ahead under way in the background at once. Each has at most [`LOCATE_BATCH`] ids at a time.
const BACKGROUND_MAX: usize = 16;
