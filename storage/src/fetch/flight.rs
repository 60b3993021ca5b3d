//! One read per frame, however many wait for it.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use narlake_format::error::FormatError;
use narlake_format::lake::frame::{BaseWindow, FrameDecoder, FrameHeader};
use narlake_format::lake::keys;
use narlake_format::lake::location::{Location, PackRef};
use quick_cache::Weighter;
use quick_cache::sync::Cache;
use tokio::sync::Semaphore;

use super::coalesce::{Span, coalesce};
use super::{BlobSource, Counters, FetchSettings};
use crate::error::{Error, ErrorKind};
use crate::pack;

/// A frame, by where it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct FrameKey {
    pub(super) pack: PackRef,
    pub(super) offset: u32,
}

impl FrameKey {
    pub(super) fn of(place: &Location) -> Self {
        Self { pack: place.pack, offset: place.frame_offset }
    }
}

/// What became of a frame. Shared by all who wait, so errors are kept by reference.
pub(super) type Landed = Result<Bytes, Arc<Error>>;
/// The frames of one read, each for itself: one that is damaged does not take its neighbours along.
type Landing = Arc<HashMap<FrameKey, Landed>>;
type Flight = Shared<BoxFuture<'static, Landing>>;

/// How frames are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reads {
    /// What lies together in one range.
    Joined,
    /// Each frame alone, so that a pack that breaks off is blamed for what it lacks and nothing else.
    Single,
}

pub(super) struct Flights {
    shared: Arc<Tower>,
}

/// What flights need while they run, apart from those who wait for them.
struct Tower {
    source: Arc<dyn BlobSource>,
    gap_bytes: u64,
    deadline: Duration,
    permits: Semaphore,
    decoded: Cache<FrameKey, Bytes, ByLength>,
    // Held for a look-up or an insert only, never across an await.
    flying: Mutex<HashMap<FrameKey, Flight>>,
    counters: Arc<Counters>,
}

#[derive(Clone)]
struct ByLength;

impl Weighter<FrameKey, Bytes> for ByLength {
    fn weight(&self, _: &FrameKey, frame: &Bytes) -> u64 {
        frame.len() as u64 + 128
    }
}

impl Flights {
    pub(super) fn new(source: Arc<dyn BlobSource>, settings: &FetchSettings, counters: Arc<Counters>) -> Self {
        let items = usize::try_from(settings.frame_cache_bytes / (256 << 10)).unwrap_or(usize::MAX).max(16);
        let shared = Arc::new(Tower {
            source,
            gap_bytes: settings.gap_bytes,
            deadline: settings.deadline,
            permits: Semaphore::new(settings.parallel.max(1)),
            decoded: Cache::with_weighter(items, settings.frame_cache_bytes, ByLength),
            flying: Mutex::default(),
            counters,
        });
        Self { shared }
    }

    /// The decoded content of these frames (sorted, each with its stored length), or why there is none.
    pub(super) async fn frames(&self, wanted: &[(FrameKey, u32)], reads: Reads) -> HashMap<FrameKey, Landed> {
        let mut landed = HashMap::new();
        let mut waits: Vec<Flight> = Vec::new();
        let mut start: Vec<(FrameKey, u32)> = Vec::new();
        {
            let mut flying = self.shared.flying.lock().unwrap_or_else(PoisonError::into_inner);
            for &(key, length) in wanted {
                if let Some(frame) = self.shared.decoded.get(&key) {
                    landed.insert(key, Ok(frame));
                } else if let Some(flight) = flying.get(&key) {
                    waits.push(flight.clone());
                } else {
                    start.push((key, length));
                }
            }
            for (pack, spans) in by_pack(&start) {
                let groups = match reads {
                    Reads::Joined => coalesce(&spans, self.shared.gap_bytes),
                    Reads::Single => spans.into_iter().map(|span| (span.range(), vec![span])).collect(),
                };
                for (range, group) in groups {
                    let keys: Vec<FrameKey> = group.iter().map(|span| FrameKey { pack, offset: span.offset }).collect();
                    let flight = Arc::clone(&self.shared).depart(pack, range, group);
                    flying.extend(keys.into_iter().map(|key| (key, flight.clone())));
                    waits.push(flight);
                }
            }
        }
        for landing in futures::future::join_all(waits).await {
            landed.extend(landing.iter().map(|(key, frame)| (*key, frame.clone())));
        }
        landed
    }

    /// Drops a decoded frame, because something in it did not verify.
    pub(super) fn forget(&self, key: &FrameKey) {
        self.shared.decoded.remove(key);
    }
}

impl Tower {
    /// Starts one read. It runs as a task of its own, so that it lands even if all who waited have gone; and it lands
    /// at the deadline at the latest, so that a source that went silent once is asked again by whoever comes next.
    fn depart(self: Arc<Self>, pack: PackRef, range: Range<u64>, group: Vec<Span>) -> Flight {
        let keys: Vec<FrameKey> = group.iter().map(|span| FrameKey { pack, offset: span.offset }).collect();
        let listed = keys.clone();
        let deadline = self.deadline;
        let task = tokio::spawn(async move {
            // Made when the task first runs: one that a stopping runtime drops unrun would be dropped under the lock.
            let airborne = Airborne { tower: Arc::clone(&self), keys: listed };
            let landing = tokio::time::timeout(self.deadline, self.fly(pack, range, &group)).await;
            drop(airborne);
            landing
        });
        task.map(move |joined| {
            let error = match joined {
                Ok(Ok(frames)) => return Arc::new(frames),
                Ok(Err(_)) => late(&pack, deadline),
                Err(_) => Error::Stopped("fetch task"),
            };
            let error = Arc::new(error);
            Arc::new(keys.into_iter().map(|key| (key, Err(Arc::clone(&error)))).collect())
        })
        .boxed()
        .shared()
    }

    async fn fly(&self, pack: PackRef, range: Range<u64>, group: &[Span]) -> HashMap<FrameKey, Landed> {
        let mut frames = HashMap::with_capacity(group.len());
        let start = range.start;
        let bytes = self.read_in_turn(pack, range).await.map_err(Arc::new);
        for span in group {
            let key = FrameKey { pack, offset: span.offset };
            let landed = match &bytes {
                Ok(bytes) => self.land(pack, start, bytes, *span).await.map_err(Arc::new),
                Err(error) => Err(Arc::clone(error)),
            };
            if let Ok(content) = &landed {
                self.decoded.insert(key, content.clone());
            }
            frames.insert(key, landed);
        }
        frames
    }

    async fn read_in_turn(&self, pack: PackRef, range: Range<u64>) -> Result<Bytes, Error> {
        let _permit = self.permits.acquire().await.map_err(|_| Error::Stopped("fetch"))?;
        self.read(pack, range).await
    }

    /// Takes one frame out of what was read from `start` on.
    async fn land(&self, pack: PackRef, start: u64, bytes: &Bytes, span: Span) -> Result<Bytes, Error> {
        let at = usize::try_from(u64::from(span.offset) - start).unwrap_or(usize::MAX);
        let stored = at
            .checked_add(span.length as usize)
            .filter(|end| *end <= bytes.len())
            .map(|end| bytes.slice(at..end))
            .ok_or_else(|| short(&pack, span.offset))?;
        let content = self.decode(pack, span.offset, stored).await?;
        self.counters.frames.fetch_add(1, Ordering::Relaxed);
        Ok(content)
    }

    async fn decode(&self, pack: PackRef, offset: u32, stored: Bytes) -> Result<Bytes, Error> {
        let at = format!("{} frame at {offset}", keys::pack(&pack));
        let header = FrameHeader::decode(&stored).map_err(Error::format(at.clone()))?;
        let base = match header.base {
            None => Vec::new(),
            Some((window, _)) => self.base(pack, window).await?,
        };
        // A frame takes about 0.2 ms to decode: too long for a thread that others wait for.
        tokio::task::spawn_blocking(move || decode_with(&stored, &base).map(Bytes::from))
            .await
            .map_err(|_| Error::Stopped("frame decoder"))?
            .map_err(Error::format(at))
    }

    /// The content of a delta's base: up to four plain frames of the same pack, found through the pack's footer.
    async fn base(&self, pack: PackRef, window: BaseWindow) -> Result<Vec<Vec<u8>>, Error> {
        let size = self.source.size(&pack).await?;
        let footer = pack::read_footer(&keys::pack(&pack), size, |range| self.read(pack, range)).await?;
        let mut contents = Vec::new();
        for number in window.frames() {
            let place =
                usize::try_from(number).ok().and_then(|n| footer.frames().get(n)).ok_or_else(|| short(&pack, 0))?.place;
            let start = u64::from(place.offset);
            let stored = self.read(pack, start..start + u64::from(place.length)).await?;
            let at = format!("{} frame at {start}", keys::pack(&pack));
            contents.push(FrameDecoder::new().decode(&stored).map_err(Error::format(at))?);
        }
        Ok(contents)
    }

    async fn read(&self, pack: PackRef, range: Range<u64>) -> Result<Bytes, Error> {
        let bytes = self.source.read(&pack, range).await?;
        self.counters.requests.fetch_add(1, Ordering::Relaxed);
        self.counters.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(bytes)
    }
}

/// Frames on their way. They are struck off the list however their flight ends, a panic included.
struct Airborne {
    tower: Arc<Tower>,
    keys: Vec<FrameKey>,
}

impl Drop for Airborne {
    fn drop(&mut self) {
        let mut flying = self.tower.flying.lock().unwrap_or_else(PoisonError::into_inner);
        for key in &self.keys {
            flying.remove(key);
        }
    }
}

thread_local! {
    /// A decompressor for each thread that decodes.
    static DECODER: RefCell<FrameDecoder> = RefCell::new(FrameDecoder::new());
}

fn decode_with(stored: &[u8], base: &[Vec<u8>]) -> Result<Vec<u8>, FormatError> {
    DECODER.with_borrow_mut(|decoder| {
        if base.is_empty() {
            decoder.decode(stored)
        } else {
            let base: Vec<&[u8]> = base.iter().map(Vec::as_slice).collect();
            decoder.decode_delta(stored, &base)
        }
    })
}

fn by_pack(sorted: &[(FrameKey, u32)]) -> Vec<(PackRef, Vec<Span>)> {
    let mut packs: Vec<(PackRef, Vec<Span>)> = Vec::new();
    for &(key, length) in sorted {
        let span = Span { offset: key.offset, length };
        match packs.last_mut() {
            Some((pack, spans)) if *pack == key.pack => spans.push(span),
            _ => packs.push((key.pack, vec![span])),
        }
    }
    packs
}

fn short(pack: &PackRef, offset: u32) -> Error {
    Error::Bucket {
        operation: "read",
        key: keys::pack(pack),
        kind: ErrorKind::Corrupt,
        source: format!("the pack ends inside the frame at {offset}").into(),
    }
}

fn late(pack: &PackRef, limit: Duration) -> Error {
    let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
    Error::Deadline { operation: "read", key: keys::pack(pack), limit_ms }
}
