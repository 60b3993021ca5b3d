//! Frames of one push on their way into the open pack: compressed by many threads, appended in NAR order.
//!
//! Every wait ends: each frame handed over either arrives or, where its job panics or never runs, an [`Arrival`] says
//! that it will not; and what a job waits for itself, a put of the pack writer, has a deadline.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use narlake_format::id::BlobId;
use narlake_format::lake::frame::{Frame, FrameContent};
use narlake_format::lake::location::Domain;

use crate::cpu::CpuPool;
use crate::error::Error;
use crate::pack::writer::{PendingPack, Session};

/// Orders frames and remembers the packs they went into.
pub(super) struct Outlet {
    cpu: Arc<CpuPool>,
    domain: Domain,
    shared: Arc<Shared>,
    submitted: u64,
}

struct Shared {
    // Held while frames are appended, never across an await.
    state: Mutex<State>,
    advanced: Condvar,
}

struct State {
    /// Taken out when the outlet closes; jobs that have done their work may still hold on to the rest for a moment.
    session: Option<Session>,
    appended: u64,
    /// A frame was lost: the push cannot go on.
    failed: bool,
    waiting: BTreeMap<u64, Frame>,
    packs: Vec<PendingPack>,
    bytes: u64,
}

impl Outlet {
    pub(super) fn new(session: Session, cpu: Arc<CpuPool>) -> Self {
        let domain = session.domain();
        let state = State {
            session: Some(session),
            appended: 0,
            failed: false,
            waiting: BTreeMap::new(),
            packs: Vec::new(),
            bytes: 0,
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), advanced: Condvar::new() });
        Self { cpu, domain, shared, submitted: 0 }
    }

    /// The domain written to.
    pub(super) fn domain(&self) -> Domain {
        self.domain
    }

    /// Hands a frame over to be compressed and appended. Blocks while too many are under way.
    pub(super) fn submit(&mut self, content: FrameContent) -> Result<(), Error> {
        let in_flight_max = 2 * self.cpu.threads() as u64;
        self.shared.wait_until(|state| self.submitted - state.appended < in_flight_max)?;
        let arrival = Arrival { shared: Arc::clone(&self.shared), number: self.submitted, arrived: false };
        self.submitted += 1;
        self.cpu.run(move |encoder| arrival.arrive(encoder.encode(&content)))
    }

    /// Frames handed over so far; the number that the next one gets.
    pub(super) fn submitted(&self) -> u64 {
        self.submitted
    }

    /// Frames appended so far: their blobs are pending or in the index.
    pub(super) fn appended(&self) -> u64 {
        self.shared.lock().appended
    }

    /// Relies on a pack of another push that is still on its way.
    pub(super) fn rely(&self, pack: PendingPack) {
        self.shared.lock().rely(pack);
    }

    /// Whether another push's pack, not yet in the bucket, holds this blob.
    pub(super) fn pending(&self, id: &BlobId) -> Option<PendingPack> {
        self.shared.lock().session.as_ref()?.pending(id)
    }

    /// Waits until every frame is appended and gives back the session, the packs relied on and the bytes stored.
    pub(super) fn close(self) -> Result<(Session, Vec<PendingPack>, u64), Error> {
        self.drain()?;
        let mut state = self.shared.lock();
        let session = state.session.take().ok_or(Error::Stopped("ingest"))?;
        Ok((session, std::mem::take(&mut state.packs), state.bytes))
    }

    /// Waits until every frame is appended. Blocks.
    ///
    /// # Errors
    /// `Stopped` where one was lost.
    pub(super) fn drain(&self) -> Result<(), Error> {
        self.shared.wait_until(|state| state.appended == self.submitted)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_until(&self, done: impl Fn(&State) -> bool) -> Result<(), Error> {
        let mut state = self.lock();
        while !state.failed && !done(&state) {
            state = self.advanced.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.failed { Err(Error::Stopped("compression")) } else { Ok(()) }
    }

    fn arrive(&self, number: u64, frame: Frame) {
        let mut state = self.lock();
        state.waiting.insert(number, frame);
        loop {
            let next = state.appended;
            let Some(frame) = state.waiting.remove(&next) else { break };
            state.bytes += frame.bytes.len() as u64;
            if let Some(pack) = state.session.as_ref().map(|session| session.append(frame)) {
                state.rely(pack);
            }
            state.appended += 1;
        }
        drop(state);
        self.advanced.notify_all();
    }
}

/// One frame on its way. Dropped before it arrives it fails the push.
struct Arrival {
    shared: Arc<Shared>,
    number: u64,
    arrived: bool,
}

impl Arrival {
    fn arrive(mut self, frame: Frame) {
        self.shared.arrive(self.number, frame);
        self.arrived = true;
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        if !self.arrived {
            self.shared.lock().failed = true;
            self.shared.advanced.notify_all();
        }
    }
}

impl State {
    fn rely(&mut self, pack: PendingPack) {
        if !self.packs.iter().any(|known| known.number() == pack.number()) {
            self.packs.push(pack);
        }
    }
}

#[cfg(test)]
mod tests {
    use narlake_format::id::{BlobKind, ChunkId};

    use super::*;
    use crate::pack::writer::tests::writer;

    fn content(byte: u8) -> FrameContent {
        let mut content = FrameContent::default();
        content.push(BlobKind::Chunk, ChunkId::of(&[byte]).into(), &[byte]);
        content
    }

    /// An empty frame makes the encoder panic.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_lost_frame_fails_its_push_and_no_other() {
        let state = tempfile::tempdir().unwrap();
        let writer = writer(state.path()).await;
        let cpu = Arc::new(CpuPool::start(2, 3).unwrap());
        let mut outlet = Outlet::new(writer.begin(Domain::Public), Arc::clone(&cpu));
        let mut other = Outlet::new(writer.begin(Domain::Public), cpu);
        let lost = tokio::task::spawn_blocking(move || {
            outlet.submit(content(1)).unwrap();
            outlet.submit(FrameContent::default()).unwrap();
            // More than may be under way.
            let submitted = (2..20).try_for_each(|byte| outlet.submit(content(byte)));
            (submitted, outlet.close().map(|_| ()))
        });
        let (submitted, closed) = tokio::time::timeout(PATIENCE, lost).await.expect("no wait without an end").unwrap();
        assert!(matches!(submitted, Err(Error::Stopped(_))), "{submitted:?}");
        assert!(matches!(closed, Err(Error::Stopped(_))), "{closed:?}");
        let whole = tokio::task::spawn_blocking(move || {
            other.submit(content(30))?;
            other.close()
        });
        let (session, packs, _) = whole.await.unwrap().unwrap();
        assert_eq!(session.commit(packs).await.unwrap().len(), 1);
    }

    const PATIENCE: std::time::Duration = std::time::Duration::from_secs(10);
}
