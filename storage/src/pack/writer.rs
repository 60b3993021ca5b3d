//! The open pack of each trust domain, shared by all pushes: group commit.
//!
//! Frames go into the open pack as they are compressed. A pack is sealed when it is full, when a commit waits for it and
//! it is large enough to be worth a put of its own, when the last push that was still writing waits for its commit, or a
//! moment after the oldest waiting commit, whichever is first; so a lone push never waits, many small ones share a pack,
//! and while some wait for a put others go on. Sealing mints the id, puts the object, and only then enters its blobs in
//! the index.
//!
//! Invariant (docs/consistency.md, rule 1): the index never names a pack that the bucket has not confirmed. Until then
//! its blobs are *pending*: a push that meets one relies on that pack, and its own commit waits for it.
//!
//! Every wait ends: a put has the bucket's deadlines, and however it ends, a panic and the end of the runtime included,
//! [`Sealed`] makes room for the next pack and tells those who wait.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use narlake_format::id::{BlobId, PackId};
use narlake_format::lake::frame::Frame;
use narlake_format::lake::keys;
use narlake_format::lake::location::{Domain, PackRef};
use narlake_format::lake::pack::PackBuilder;
use narlake_format::limits::PACK_TARGET;
use tokio::runtime::Handle;
use tokio::sync::watch;

use crate::bucket::Bucket;
use crate::error::{Error, ErrorKind};
use crate::index::Index;
use crate::metrics::Metrics;
use crate::mint::Mint;

/// Sealed packs whose put is under way, at most; further frames wait.
const SEALED_MAX: usize = 16;
/// Bytes of them, roughly: they are in memory.
const SEALED_BYTES_MAX: u64 = 3 * PACK_TARGET as u64;

/// Bytes from which a pack that a commit waits for is put at once. Were it left open while others write, all pushes
/// would end up waiting for one put, and the processors with them.
const AWAITED_TARGET: u64 = 4 << 20;

/// What became of a pack.
type Landing = Option<Result<PackRef, Arc<Error>>>;

/// A pack that a push relies on. It is the open one, or sealed, or in the bucket.
#[derive(Clone)]
pub(crate) struct PendingPack {
    number: u64,
    landed: watch::Receiver<Landing>,
}

impl PendingPack {
    /// Tells two packs apart before they have ids.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }
}

/// The writer of all packs.
#[derive(Clone)]
pub(crate) struct PackWriter {
    shared: Arc<Shared>,
}

struct Shared {
    bucket: Bucket,
    index: Arc<Index>,
    mint: Mint,
    metrics: Metrics,
    seal_after: Duration,
    runtime: Handle,
    // Held while a frame is appended or a pack taken out, never across an await.
    domains: Mutex<Domains>,
    /// Signalled when a sealed pack has landed.
    landed: Condvar,
}

#[derive(Default)]
struct Domains {
    next_number: u64,
    sealed: usize,
    sealed_bytes: u64,
    by_domain: HashMap<Domain, OpenDomain>,
}

#[derive(Default)]
struct OpenDomain {
    open: Option<OpenPack>,
    /// Pushes that may still append.
    writing: usize,
    pending: HashMap<BlobId, PendingPack>,
}

struct OpenPack {
    builder: PackBuilder,
    pending: PendingPack,
    land: watch::Sender<Landing>,
    /// A commit waits for this pack.
    awaited: bool,
}

impl OpenPack {
    /// Whether it is large enough to be put, whoever still writes.
    fn is_due(&self) -> bool {
        let target = if self.awaited { AWAITED_TARGET } else { PACK_TARGET as u64 };
        self.builder.len() >= target
    }
}

impl PackWriter {
    /// A writer with no open pack. Must be called within the runtime that is to do the puts.
    pub(crate) fn new(bucket: Bucket, index: Arc<Index>, mint: Mint, metrics: Metrics, seal_after: Duration) -> Self {
        let (domains, landed) = Default::default();
        let runtime = Handle::current();
        Self { shared: Arc::new(Shared { bucket, index, mint, metrics, seal_after, runtime, domains, landed }) }
    }

    /// Announces a push; the pack stays open for it until it commits or is dropped.
    pub(crate) fn begin(&self, domain: Domain) -> Session {
        self.shared.lock().by_domain.entry(domain).or_default().writing += 1;
        Session { writer: self.clone(), domain, writing: true }
    }

    /// Pushes under way that still write, of all domains.
    pub(crate) fn writing(&self) -> usize {
        self.shared.lock().by_domain.values().map(|state| state.writing).sum()
    }

    /// Seals every open pack and waits until nothing is under way.
    pub(crate) async fn flush(&self) -> Result<(), Error> {
        let sealed: Vec<Sealed> = {
            let mut domains = self.shared.lock();
            let all: Vec<Domain> = domains.by_domain.keys().copied().collect();
            all.into_iter().filter_map(|domain| self.seal(&mut domains, domain)).collect()
        };
        let waits: Vec<PendingPack> = sealed.iter().map(|sealed| sealed.pending.clone()).collect();
        sealed.into_iter().for_each(Sealed::start);
        for pack in waits {
            landed(pack).await?;
        }
        Ok(())
    }

    /// Takes the open pack out. The caller starts its put once `domains` is unlocked.
    fn seal(&self, domains: &mut Domains, domain: Domain) -> Option<Sealed> {
        let OpenPack { builder, pending, land, .. } = domains.by_domain.get_mut(&domain)?.open.take()?;
        let bytes = builder.len();
        domains.sealed += 1;
        domains.sealed_bytes += bytes;
        let shared = Arc::clone(&self.shared);
        Some(Sealed { shared, domain, bytes, builder: Some(builder), pending, land, landing: None })
    }

    async fn seal_later(self, domain: Domain, number: u64) {
        tokio::time::sleep(self.shared.seal_after).await;
        let sealed = {
            let mut domains = self.shared.lock();
            let open = domains.by_domain.get(&domain).and_then(|d| d.open.as_ref());
            let is_open = open.is_some_and(|open| open.pending.number == number);
            is_open.then(|| self.seal(&mut domains, domain)).flatten()
        };
        sealed.into_iter().for_each(Sealed::start);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Domains> {
        self.domains.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A pack taken out to be put. Dropped it makes room for the next one and tells everybody who waits what became of it:
/// nothing, where its put did not run to its end. Dropping it takes the lock of `domains`, so it is never done under it.
#[must_use]
struct Sealed {
    shared: Arc<Shared>,
    domain: Domain,
    bytes: u64,
    builder: Option<PackBuilder>,
    pending: PendingPack,
    land: watch::Sender<Landing>,
    landing: Landing,
}

impl Sealed {
    fn start(self) {
        let runtime = self.shared.runtime.clone();
        runtime.spawn(self.put());
    }

    async fn put(mut self) {
        let shared = Arc::clone(&self.shared);
        let pack = PackRef { domain: self.domain, id: PackId(shared.mint.ulid()) };
        let Some((parts, footer)) = self.builder.take().map(PackBuilder::finish) else { return };
        let bytes: u64 = parts.iter().map(|part| part.len() as u64).sum();
        let payload = parts.into_iter().map(Bytes::from).collect::<Vec<Bytes>>();
        let result = shared.bucket.put_new(&keys::pack(&pack), payload).await;
        self.landing = Some(match result {
            Ok(_) => {
                shared.index.add(pack, bytes, footer.locations(pack));
                shared.metrics.packs_written.inc();
                shared.metrics.packs_written_bytes.inc_by(bytes);
                Ok(pack)
            }
            Err(error) => {
                tracing::error!(pack = %keys::pack(&pack), error = error.chain(), "pack not written");
                Err(Arc::new(error))
            }
        });
        drop(self);
        if let Err(error) = shared.index.flush_full().await {
            // The memtable stays in memory and is tried again with the next pack.
            tracing::warn!(error = error.chain(), "index segment not written");
        }
    }
}

impl Drop for Sealed {
    fn drop(&mut self) {
        {
            let mut domains = self.shared.lock();
            domains.sealed -= 1;
            domains.sealed_bytes -= self.bytes;
            if let Some(state) = domains.by_domain.get_mut(&self.domain) {
                state.pending.retain(|_, pending| pending.number != self.pending.number);
            }
        }
        self.shared.landed.notify_all();
        // Where there is no outcome, those who wait see the sender go.
        if self.landing.is_some() {
            self.land.send_replace(self.landing.take());
        }
    }
}

/// One push among those that share the open pack. Dropped without a commit it leaves at most unreferenced bytes.
pub(crate) struct Session {
    writer: PackWriter,
    domain: Domain,
    writing: bool,
}

impl Session {
    /// The domain written to.
    pub(crate) fn domain(&self) -> Domain {
        self.domain
    }

    /// The pack in flight that holds this blob, if there is one.
    pub(crate) fn pending(&self, id: &BlobId) -> Option<PendingPack> {
        self.writer.shared.lock().by_domain.get(&self.domain)?.pending.get(id).cloned()
    }

    /// Appends a frame to the open pack and says which that is. Blocks while too many sealed packs are on their way to
    /// the bucket, each of which has a deadline; so not for a runtime's thread.
    pub(crate) fn append(&self, frame: Frame) -> PendingPack {
        let shared = &self.writer.shared;
        // Outlives the lock, whatever happens under it.
        let mut sealed: Vec<Sealed> = Vec::new();
        let mut domains = shared.lock();
        while domains.sealed >= SEALED_MAX || domains.sealed_bytes >= SEALED_BYTES_MAX {
            domains = shared.landed.wait(domains).unwrap_or_else(PoisonError::into_inner);
        }
        let full = domains
            .by_domain
            .get(&self.domain)
            .and_then(|d| d.open.as_ref())
            .is_some_and(|open| !open.builder.fits(&frame));
        if full {
            sealed.extend(self.writer.seal(&mut domains, self.domain));
        }
        domains.next_number += 1;
        let number = domains.next_number;
        let state = domains.by_domain.entry(self.domain).or_default();
        let open = state.open.get_or_insert_with(|| {
            let (land, landed) = watch::channel(None);
            OpenPack { builder: PackBuilder::new(), pending: PendingPack { number, landed }, land, awaited: false }
        });
        let pending = open.pending.clone();
        // In the pack before they are pending: nobody may rely on a pack that does not hold them.
        let ids: Vec<BlobId> = frame.blobs.iter().map(|blob| blob.id).collect();
        open.builder.push(frame);
        state.pending.extend(ids.into_iter().map(|id| (id, pending.clone())));
        if open.is_due() {
            sealed.extend(self.writer.seal(&mut domains, self.domain));
        }
        drop(domains);
        sealed.into_iter().for_each(Sealed::start);
        pending
    }

    /// Waits until every pack relied on is in the bucket. Not cancel safe in the sense that packs land all the same.
    ///
    /// # Errors
    /// Where one of them could not be written.
    pub(crate) async fn commit(mut self, relied: Vec<PendingPack>) -> Result<Vec<PackRef>, Error> {
        self.stop_writing(&relied);
        let mut packs = Vec::with_capacity(relied.len());
        for pack in relied {
            packs.push(landed(pack).await?);
        }
        packs.sort_unstable();
        packs.dedup();
        Ok(packs)
    }

    fn stop_writing(&mut self, relied: &[PendingPack]) {
        if !std::mem::take(&mut self.writing) {
            return;
        }
        let mut sealed = None;
        let mut domains = self.writer.shared.lock();
        let Some(state) = domains.by_domain.get_mut(&self.domain) else { return };
        state.writing -= 1;
        let nobody_writes = state.writing == 0;
        let Some(open) = &mut state.open else { return };
        let number = open.pending.number;
        let newly_awaited = !open.awaited && relied.iter().any(|pack| pack.number == number);
        open.awaited |= newly_awaited;
        if open.awaited && (nobody_writes || open.is_due()) {
            sealed = self.writer.seal(&mut domains, self.domain);
        } else if newly_awaited {
            self.writer.shared.runtime.spawn(self.writer.clone().seal_later(self.domain, number));
        }
        drop(domains);
        sealed.into_iter().for_each(Sealed::start);
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.stop_writing(&[]);
    }
}

async fn landed(mut pack: PendingPack) -> Result<PackRef, Error> {
    let landing = pack.landed.wait_for(Option::is_some).await.map_err(|_| Error::Stopped("pack writer"))?.clone();
    match landing {
        Some(Ok(pack)) => Ok(pack),
        Some(Err(error)) => Err(Error::Bucket {
            operation: "write pack",
            key: String::new(),
            kind: error.kind(),
            source: error.chain().into(),
        }),
        None => Err(Error::Bucket {
            operation: "write pack",
            key: String::new(),
            kind: ErrorKind::Unavailable,
            source: "no outcome".into(),
        }),
    }
}

#[cfg(test)]
pub(crate) mod tests;
