//! The open pack of each trust domain, shared by all pushes: group commit.
//!
//! Frames go into the open pack as they are compressed. A pack is sealed when it is full, when the last push that was
//! still writing waits for its commit, or a moment after the oldest waiting commit, whichever is first; so a lone push
//! never waits and many small ones share a pack. Sealing mints the id, puts the object, and only then enters its blobs
//! in the index.
//!
//! Invariant (docs/consistency.md, rule 1): the index never names a pack that the bucket has not confirmed. Until then
//! its blobs are *pending*: a push that meets one relies on that pack, and its own commit waits for it.

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
const SEALED_MAX: usize = 3;

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

    /// Seals every open pack and waits until nothing is under way.
    pub(crate) async fn flush(&self) -> Result<(), Error> {
        let waits: Vec<PendingPack> = {
            let mut domains = self.shared.lock();
            let all: Vec<Domain> = domains.by_domain.keys().copied().collect();
            all.into_iter().filter_map(|domain| self.seal(&mut domains, domain)).collect()
        };
        for pack in waits {
            landed(pack).await?;
        }
        Ok(())
    }

    /// Takes the open pack out and starts its put.
    fn seal(&self, domains: &mut Domains, domain: Domain) -> Option<PendingPack> {
        let open = domains.by_domain.get_mut(&domain)?.open.take()?;
        domains.sealed += 1;
        let pending = open.pending.clone();
        let shared = Arc::clone(&self.shared);
        self.shared.runtime.spawn(async move { shared.put(domain, open).await });
        Some(pending)
    }

    async fn seal_later(self, domain: Domain, number: u64) {
        tokio::time::sleep(self.shared.seal_after).await;
        let mut domains = self.shared.lock();
        let open = domains.by_domain.get(&domain).and_then(|d| d.open.as_ref());
        if open.is_some_and(|open| open.pending.number == number) {
            self.seal(&mut domains, domain);
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Domains> {
        self.domains.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a sealed pack and tells everybody who waits.
    async fn put(&self, domain: Domain, open: OpenPack) {
        let pack = PackRef { domain, id: PackId(self.mint.ulid()) };
        let (parts, footer) = open.builder.finish();
        let bytes: u64 = parts.iter().map(|part| part.len() as u64).sum();
        let payload = parts.into_iter().map(Bytes::from).collect::<Vec<Bytes>>();
        let result = self.bucket.put_new(&keys::pack(&pack), payload).await;
        let landing = match result {
            Ok(_) => {
                self.index.add(pack, bytes, footer.locations(pack));
                self.metrics.packs_written.inc();
                self.metrics.packs_written_bytes.inc_by(bytes);
                Ok(pack)
            }
            Err(error) => {
                tracing::error!(pack = %keys::pack(&pack), error = error.chain(), "pack not written");
                Err(Arc::new(error))
            }
        };
        {
            let mut domains = self.lock();
            domains.sealed -= 1;
            if let Some(state) = domains.by_domain.get_mut(&domain) {
                state.pending.retain(|_, pending| pending.number != open.pending.number);
            }
        }
        self.landed.notify_all();
        open.land.send_replace(Some(landing));
        if let Err(error) = self.index.flush_full().await {
            // The memtable stays in memory and is tried again with the next pack.
            tracing::warn!(error = error.chain(), "index segment not written");
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
        let mut domains = shared.lock();
        while domains.sealed >= SEALED_MAX {
            domains = shared.landed.wait(domains).unwrap_or_else(PoisonError::into_inner);
        }
        let full = domains
            .by_domain
            .get(&self.domain)
            .and_then(|d| d.open.as_ref())
            .is_some_and(|open| !open.builder.fits(&frame));
        if full {
            self.writer.seal(&mut domains, self.domain);
        }
        domains.next_number += 1;
        let number = domains.next_number;
        let state = domains.by_domain.entry(self.domain).or_default();
        let open = state.open.get_or_insert_with(|| {
            let (land, landed) = watch::channel(None);
            OpenPack { builder: PackBuilder::new(), pending: PendingPack { number, landed }, land, awaited: false }
        });
        let pending = open.pending.clone();
        state.pending.extend(frame.blobs.iter().map(|blob| (blob.id, pending.clone())));
        open.builder.push(frame);
        if open.builder.len() >= PACK_TARGET as u64 {
            self.writer.seal(&mut domains, self.domain);
        }
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
        let mut domains = self.writer.shared.lock();
        let Some(state) = domains.by_domain.get_mut(&self.domain) else { return };
        state.writing -= 1;
        let nobody_writes = state.writing == 0;
        let Some(open) = &mut state.open else { return };
        let number = open.pending.number;
        let newly_awaited = !open.awaited && relied.iter().any(|pack| pack.number == number);
        open.awaited |= newly_awaited;
        if nobody_writes && open.awaited {
            self.writer.seal(&mut domains, self.domain);
        } else if newly_awaited {
            self.writer.shared.runtime.spawn(self.writer.clone().seal_later(self.domain, number));
        }
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
