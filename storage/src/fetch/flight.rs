//! One read per frame, however many wait for it.

use std::collections::HashMap;
use std::ops::Range;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::{BoxFuture, Shared};
use narlake_format::lake::frame::{BaseWindow, FrameDecoder, FrameHeader};
use narlake_format::lake::keys;
use narlake_format::lake::location::{Location, PackRef};
use tokio::time::Instant;

use super::coalesce::{READ_MAX, Span, coalesce};
use super::decode::{between, decode_with};
use super::frames::Frames;
use super::hedge::Hedge;
use super::turns::{Interest, Ticket, Turns};
use super::{BlobSource, FetchSettings};
use crate::error::{Error, ErrorKind};
use crate::metrics::FetchMetrics;
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

/// How near somebody is to a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nearness {
    /// Its frame is in memory, and has been used.
    Here,
    /// Its frame has been read ahead, or is on its way.
    Ahead,
    /// It takes a read, or even a question.
    Away,
}

pub(super) struct Flights {
    shared: Arc<Tower>,
}

/// What flights need while they run, apart from those who wait for them.
struct Tower {
    source: Arc<dyn BlobSource>,
    gap_bytes: u64,
    hedged: bool,
    deadline: Duration,
    turns: Turns,
    frames: Frames,
    hedge: Hedge,
    // Held for a look-up or an insert only, never across an await.
    flying: Mutex<HashMap<FrameKey, Aloft>>,
    serial: AtomicU64,
    metrics: FetchMetrics,
}

/// A frame's flight, and its ticket if it was read ahead.
#[derive(Clone)]
struct Aloft {
    serial: u64,
    flight: Flight,
    ticket: Option<Arc<Ticket>>,
}

impl Flights {
    pub(super) fn new(source: Arc<dyn BlobSource>, settings: &FetchSettings, metrics: FetchMetrics) -> Self {
        let shared = Arc::new(Tower {
            source,
            gap_bytes: settings.gap_bytes,
            hedged: settings.hedged,
            deadline: settings.deadline,
            turns: Turns::new(settings.parallel, settings.ahead_parallel),
            frames: Frames::new(settings.frame_cache_bytes, metrics.clone()),
            hedge: Hedge::new(),
            flying: Mutex::default(),
            serial: AtomicU64::new(0),
            metrics,
        });
        Self { shared }
    }

    /// The decoded content of these frames (sorted, each with its stored length), or why there is none.
    pub(super) async fn frames(&self, wanted: &[(FrameKey, u32)], reads: Reads) -> HashMap<FrameKey, Landed> {
        let mut landed = HashMap::new();
        let joined = self.board(wanted, reads, &mut landed).await;
        // What was begun for others, perhaps long ago, and came to nothing, is no answer to this question yet.
        let again: Vec<(FrameKey, u32)> = wanted
            .iter()
            .filter(|(key, _)| {
                let failed = |landed: &Landed| matches!(landed, Err(e) if e.kind() == ErrorKind::Unavailable);
                joined.contains(key) && landed.get(key).is_none_or(failed)
            })
            .copied()
            .collect();
        if !again.is_empty() {
            self.board(&again, reads, &mut landed).await;
        }
        landed
    }

    /// Waits for what is under way, and reads the rest. Says which frames were under way.
    async fn board(
        &self,
        wanted: &[(FrameKey, u32)],
        reads: Reads,
        landed: &mut HashMap<FrameKey, Landed>,
    ) -> Vec<FrameKey> {
        let mut joined = Vec::new();
        let mut waits: Vec<Flight> = Vec::new();
        let mut start: Vec<(FrameKey, u32)> = Vec::new();
        {
            let mut flying = self.shared.flying();
            for &(key, length) in wanted {
                if let Some(frame) = self.shared.frames.get(&key) {
                    landed.insert(key, Ok(frame));
                } else if let Some(aloft) =
                    flying.get(&key).filter(|aloft| aloft.ticket.as_ref().is_none_or(|ticket| ticket.lift()))
                {
                    joined.push(key);
                    waits.push(aloft.flight.clone());
                } else {
                    start.push((key, length));
                }
            }
            for (pack, spans) in by_pack(&start) {
                self.shared.frames.asked(spans.iter().map(|span| u64::from(span.length)).sum());
                let groups = match reads {
                    Reads::Joined => coalesce(&spans, self.shared.gap_bytes, READ_MAX),
                    Reads::Single => spans.into_iter().map(|span| (span.range(), vec![span])).collect(),
                };
                for (range, group) in groups {
                    waits.push(self.shared.depart(&mut flying, pack, range, group, None));
                }
            }
        }
        for landing in futures::future::join_all(waits).await {
            landed.extend(landing.iter().map(|(key, frame)| (*key, frame.clone())));
        }
        for key in &joined {
            // It was read ahead, and has been asked for now.
            self.shared.frames.get(key);
        }
        joined
    }

    /// Starts to read these frames, in this order, as long as the bytes last, and one in any case; what is here or under
    /// way costs nothing. Each read has at most `read_max` bytes, unless a frame has more. Says how many bytes are going to be read.
    pub(super) fn ahead(
        &self,
        wanted: &[(FrameKey, u32)],
        bytes_max: u64,
        read_max: u64,
        suspicion: bool,
        interest: &Interest,
    ) -> u64 {
        let mut flying = self.shared.flying();
        let mut start = Vec::new();
        let mut bytes = 0;
        for &(key, length) in wanted {
            if self.shared.frames.peek(&key).is_some() || flying.contains_key(&key) {
                continue;
            }
            let stored = u64::from(length);
            let enough = bytes > 0 && bytes + stored > bytes_max;
            if enough || !self.shared.frames.grant(stored, suspicion) {
                break;
            }
            bytes += stored;
            start.push((key, length));
        }
        start.sort_unstable();
        for (pack, spans) in by_pack(&start) {
            for (range, group) in coalesce(&spans, 0, read_max) {
                let ticket = Some(Arc::new(Ticket::new(interest)));
                drop(self.shared.depart(&mut flying, pack, range, group, ticket));
            }
        }
        bytes
    }

    /// Where a frame is.
    pub(super) fn nearness(&self, key: &FrameKey) -> Nearness {
        match self.shared.frames.peek(key) {
            Some(false) => Nearness::Here,
            Some(true) => Nearness::Ahead,
            None if self.shared.flying().contains_key(key) => Nearness::Ahead,
            None => Nearness::Away,
        }
    }

    /// Drops a decoded frame, because something in it did not verify.
    pub(super) fn forget(&self, key: &FrameKey) {
        self.shared.frames.forget(key);
    }
}

impl Tower {
    fn flying(&self) -> MutexGuard<'_, HashMap<FrameKey, Aloft>> {
        self.flying.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts one read. It runs as a task of its own, so that it lands even if all who waited have gone; and it lands
    /// at the deadline at the latest, so that a source that went silent once is asked again by whoever comes next.
    fn depart(
        self: &Arc<Self>,
        flying: &mut HashMap<FrameKey, Aloft>,
        pack: PackRef,
        range: Range<u64>,
        group: Vec<Span>,
        ticket: Option<Arc<Ticket>>,
    ) -> Flight {
        let keys: Vec<FrameKey> = group.iter().map(|span| FrameKey { pack, offset: span.offset }).collect();
        let (listed, missed) = (keys.clone(), keys.clone());
        let (deadline, first) = (self.deadline, group.first().map_or(0, |span| span.offset));
        let serial = self.serial.fetch_add(1, Ordering::Relaxed);
        let (tower, pass) = (Arc::clone(self), ticket.clone());
        let task = tokio::spawn(async move {
            // Made when the task first runs: one that a stopping runtime drops unrun would be dropped under the lock.
            let airborne = Airborne { tower: Arc::clone(&tower), serial, keys: listed };
            let landing = tokio::time::timeout(tower.deadline, tower.fly(pack, range, &group, pass.as_deref())).await;
            if landing.is_err() && pass.is_some() {
                tower.frames.returned(group.iter().map(|span| u64::from(span.length)).sum());
            }
            drop(airborne);
            landing
        });
        let flight = task
            .map(move |joined| {
                let error = match joined {
                    Ok(Ok(frames)) => return Arc::new(frames),
                    Ok(Err(_)) => late(&pack, first, deadline),
                    Err(_) => Error::Stopped("fetch task"),
                };
                let error = Arc::new(error);
                Arc::new(missed.into_iter().map(|key| (key, Err(Arc::clone(&error)))).collect())
            })
            .boxed()
            .shared();
        let aloft = Aloft { serial, flight: flight.clone(), ticket };
        flying.extend(keys.into_iter().map(|key| (key, aloft.clone())));
        flight
    }

    async fn fly(
        &self,
        pack: PackRef,
        range: Range<u64>,
        group: &[Span],
        ticket: Option<&Ticket>,
    ) -> HashMap<FrameKey, Landed> {
        let mut frames = HashMap::with_capacity(group.len());
        let start = range.start;
        let bytes = self.read_in_turn(pack, range, ticket).await.map_err(Arc::new);
        for span in group {
            let key = FrameKey { pack, offset: span.offset };
            let landed = match &bytes {
                Ok(bytes) => self.land(pack, start, bytes, *span).await.map_err(Arc::new),
                Err(error) => Err(Arc::clone(error)),
            };
            let length = u64::from(span.length);
            match &landed {
                Ok(content) => self.frames.insert(key, content.clone(), ticket.map(|_| length)),
                Err(_) if ticket.is_some() => self.frames.returned(length),
                Err(_) => {}
            }
            frames.insert(key, landed);
        }
        if let Ok(bytes) = bytes {
            self.keep_between(pack, start, &bytes, group).await;
        }
        frames
    }

    /// Keeps what came along between the frames that were asked for.
    async fn keep_between(&self, pack: PackRef, start: u64, bytes: &Bytes, group: &[Span]) {
        for (span, stored) in between(bytes, start, group) {
            let (key, length) = (FrameKey { pack, offset: span.offset }, u64::from(span.length));
            if self.frames.peek(&key).is_some() || !self.frames.grant(length, false) {
                continue;
            }
            match self.decode(pack, span.offset, stored).await {
                Ok(content) => self.frames.insert(key, content, Some(length)),
                // Whoever asks for it reads it again, and hears what is wrong.
                Err(_) => self.frames.returned(length),
            }
        }
    }

    async fn read_in_turn(&self, pack: PackRef, range: Range<u64>, ticket: Option<&Ticket>) -> Result<Bytes, Error> {
        let turn = match ticket {
            None => self.turns.demand().await,
            Some(ticket) => self.turns.ahead(ticket).await,
        };
        let _turn = turn.ok_or(Error::Stopped("fetch"))?;
        let mut first = std::pin::pin!(self.read(pack, range.clone()));
        if let Some(ticket) = ticket {
            // Late is late only for somebody who waits.
            tokio::select! {
                read = &mut first => return read,
                () = ticket.lifted() => {}
            }
        }
        self.hedged(first, pack, range).await
    }

    /// Takes one frame out of what was read from `start` on.
    async fn land(&self, pack: PackRef, start: u64, bytes: &Bytes, span: Span) -> Result<Bytes, Error> {
        let at = usize::try_from(u64::from(span.offset) - start).unwrap_or(usize::MAX);
        let stored = at
            .checked_add(span.length as usize)
            .filter(|end| *end <= bytes.len())
            .map(|end| bytes.slice(at..end))
            .ok_or_else(|| short(&pack, span.offset))?;
        self.decode(pack, span.offset, stored).await
    }

    async fn decode(&self, pack: PackRef, offset: u32, stored: Bytes) -> Result<Bytes, Error> {
        let at = format!("{} frame at {offset}", keys::pack(&pack));
        let header = FrameHeader::decode(&stored).map_err(Error::format(at.clone()))?;
        let base = match header.base {
            None => Vec::new(),
            Some((window, _)) => self.base(pack, window).await?,
        };
        // A frame takes about 0.2 ms to decode: too long for a thread that others wait for.
        let content = tokio::task::spawn_blocking(move || decode_with(&stored, &base).map(Bytes::from))
            .await
            .map_err(|_| Error::Stopped("frame decoder"))?
            .map_err(Error::format(at))?;
        self.metrics.frames.inc();
        Ok(content)
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

    /// Waits for a read, and reads a second time where it takes longer than nearly all do. The first answer counts.
    async fn hedged(
        &self,
        mut first: Pin<&mut impl Future<Output = Result<Bytes, Error>>>,
        pack: PackRef,
        range: Range<u64>,
    ) -> Result<Bytes, Error> {
        let Some(patience) = self.hedge.patience(range.end - range.start).filter(|_| self.hedged) else {
            return first.await;
        };
        if let Ok(read) = tokio::time::timeout(patience, &mut first).await {
            return read;
        }
        if !self.hedge.take() {
            return first.await;
        }
        self.metrics.hedges.inc();
        let mut second = std::pin::pin!(self.read(pack, range));
        // One that fails leaves the other.
        tokio::select! {
            read = &mut first => if read.is_ok() { read } else { second.await },
            read = &mut second => {
                if read.is_ok() {
                    self.metrics.hedges_won.inc();
                    return read;
                }
                first.await
            }
        }
    }

    async fn read(&self, pack: PackRef, range: Range<u64>) -> Result<Bytes, Error> {
        let (began, length) = (Instant::now(), range.end - range.start);
        let bytes = self.source.read(&pack, range).await?;
        self.hedge.saw(length, began.elapsed());
        self.metrics.requests.inc();
        self.metrics.bytes.inc_by(bytes.len() as u64);
        Ok(bytes)
    }
}

/// Frames on their way. They are struck off the list however their flight ends, a panic included.
struct Airborne {
    tower: Arc<Tower>,
    serial: u64,
    keys: Vec<FrameKey>,
}

impl Drop for Airborne {
    fn drop(&mut self) {
        let mut flying = self.tower.flying();
        for key in &self.keys {
            // Not a later flight of the same frame.
            if flying.get(key).is_some_and(|aloft| aloft.serial == self.serial) {
                flying.remove(key);
            }
        }
    }
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

fn late(pack: &PackRef, offset: u32, limit: Duration) -> Error {
    let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
    Error::Deadline { operation: "read", key: format!("{} from frame at {offset} on", keys::pack(pack)), limit_ms }
}
