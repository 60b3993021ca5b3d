//! An `ObjectStore` over memory that goes wrong as planned.
//!
//! The objects belong to the world, a store to one life of a lake: once that life has crashed, its store answers nothing
//! but errors, whoever still asks, and the next life gets a new one over the same objects. Objects carry the
//! simulation's time.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use narlake_storage::Clock as _;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    ObjectStoreExt as _, PutMultipartOptions, PutOptions, PutPayload, PutResult, RenameOptions, Result,
};

use crate::clock::SimClock;
use crate::damage::Damage;
use crate::fault::{Fault, Plan};
use crate::rng::{Rng, hash};

/// Shorter than the engine gives one attempt to write, and longer.
const SLOW: Duration = Duration::from_secs(20);
const STUCK: Duration = Duration::from_secs(90);

/// The objects of a world.
#[derive(Debug, Clone)]
pub(crate) struct Contents {
    pub(crate) memory: Arc<InMemory>,
    clock: Arc<SimClock>,
    /// When each object was last written, by the simulation's clock.
    written_ms: Arc<Mutex<HashMap<Path, u64>>>,
}

impl Contents {
    pub(crate) fn new(clock: Arc<SimClock>) -> Self {
        Self { memory: Arc::new(InMemory::new()), clock, written_ms: Arc::default() }
    }

    fn dated(&self, mut meta: ObjectMeta) -> ObjectMeta {
        let written_ms = self.written_ms.lock().unwrap_or_else(PoisonError::into_inner).get(&meta.location).copied();
        let written_ms = written_ms.unwrap_or_else(|| self.clock.now_ms());
        let real_ms = u64::try_from(meta.last_modified.timestamp_millis()).unwrap_or(0);
        if written_ms > real_ms {
            meta.last_modified += Duration::from_millis(written_ms - real_ms);
        } else {
            meta.last_modified -= Duration::from_millis(real_ms - written_ms);
        }
        meta
    }

    fn date(&self, location: &Path) {
        let now_ms = self.clock.now_ms();
        self.written_ms.lock().unwrap_or_else(PoisonError::into_inner).insert(location.clone(), now_ms);
    }
}

/// One request that the bucket was sent.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Request {
    /// What it asked for.
    pub name: String,
    /// How it went wrong.
    pub fault: Option<&'static str>,
}

/// The bucket as one life of a lake sees it. Clones are the same life's.
#[derive(Debug, Clone)]
pub struct FaultStore {
    contents: Contents,
    plan: Plan,
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    crashed: bool,
    repeats: HashMap<String, u64>,
    trace: Vec<Request>,
}

/// What is to happen to one request.
#[derive(Debug, Clone, Copy)]
struct Fate {
    fault: Option<Fault>,
    /// For whatever else has to be drawn.
    seed: u64,
}

impl FaultStore {
    pub(crate) fn new(contents: Contents, plan: Plan) -> Self {
        Self { contents, plan, state: Arc::default() }
    }

    /// Every request so far.
    #[must_use]
    pub fn trace(&self) -> Vec<Request> {
        self.lock().trace.clone()
    }

    /// Whether the server has died.
    #[must_use]
    pub fn crashed(&self) -> bool {
        self.lock().crashed
    }

    /// Lets the server die now.
    pub fn crash(&self) {
        self.lock().crashed = true;
    }

    /// Harms an object behind the engine's back.
    ///
    /// # Panics
    /// Where there is no such object.
    pub async fn damage(&self, key: &str, damage: Damage) {
        let at = Path::parse(key).expect("a valid key");
        let memory = &self.contents.memory;
        let found = memory.get(&at).await.expect("an object to harm").bytes().await.expect("memory reads");
        match damage.of(&found) {
            Some(bytes) => memory.put(&at, bytes.into()).await.map(|_| ()),
            None => memory.delete(&at).await,
        }
        .expect("memory writes");
    }

    /// Puts an object behind the engine's back, whatever else goes wrong.
    ///
    /// # Panics
    /// Where the key is none.
    pub async fn set(&self, key: &str, bytes: impl Into<PutPayload>) {
        let at = Path::parse(key).expect("a valid key");
        self.contents.memory.put(&at, bytes.into()).await.expect("memory writes");
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Draws the fate of a request, and waits where it is to arrive late.
    async fn arrive(&self, name: String, possible: &[Fault]) -> Result<Fate> {
        let fate = self.fate(name, possible)?;
        if fate.fault == Some(Fault::Slow) {
            tokio::time::sleep(SLOW).await;
            if self.crashed() {
                return Err(failure("the server is dead"));
            }
        }
        Ok(fate)
    }

    /// Draws the fate of a request. Only faults that can befall its kind count.
    fn fate(&self, name: String, possible: &[Fault]) -> Result<Fate> {
        let mut state = self.lock();
        if state.crashed {
            return Err(failure("the server is dead"));
        }
        let number = state.trace.len() as u64;
        let repeat = state.repeats.entry(name.clone()).or_default();
        let seed = hash(name.as_bytes()) ^ *repeat;
        let fault = self.plan.fault(number, &name, *repeat).filter(|fault| {
            matches!(fault, Fault::CrashBefore | Fault::CrashAfter | Fault::Before) || possible.contains(fault)
        });
        *repeat += 1;
        state.trace.push(Request { name, fault: fault.map(Fault::name) });
        match fault {
            Some(Fault::CrashBefore) => {
                state.crashed = true;
                Err(failure("the server died"))
            }
            Some(Fault::Before) => Err(failure("the request was lost")),
            fault => Ok(Fate { fault, seed }),
        }
    }

    /// What remains of a request that was carried out.
    async fn answer<T>(&self, fate: Fate, done: T) -> Result<T> {
        match fate.fault {
            Some(Fault::CrashAfter) => {
                self.crash();
                Err(failure("the server died"))
            }
            Some(Fault::After) => Err(failure("the answer was lost")),
            Some(Fault::Stuck) => {
                tokio::time::sleep(STUCK).await;
                Ok(done)
            }
            _ => Ok(done),
        }
    }

    fn listing(
        &self,
        name: String,
        listed: BoxStream<'static, Result<ObjectMeta>>,
    ) -> BoxStream<'static, Result<ObjectMeta>> {
        let contents = self.contents.clone();
        let fate = match self.fate(name, &[Fault::Reset]) {
            Ok(fate) => fate,
            Err(error) => return futures::stream::iter([Err(error)]).boxed(),
        };
        let listed = listed.map_ok(move |meta| contents.dated(meta));
        match fate.fault {
            Some(Fault::Reset) => {
                listed.take(1).chain(futures::stream::iter([Err(failure("the listing broke off"))])).boxed()
            }
            Some(Fault::CrashAfter) => {
                self.crash();
                futures::stream::iter([Err(failure("the server died"))]).boxed()
            }
            _ => listed.boxed(),
        }
    }
}

impl Fault {
    const fn name(self) -> &'static str {
        match self {
            Self::Before => "before",
            Self::After => "after",
            Self::Slow => "slow",
            Self::Stuck => "stuck",
            Self::Truncated => "truncated",
            Self::Flipped => "flipped",
            Self::Reset => "reset",
            Self::CrashBefore => "crash before",
            Self::CrashAfter => "crash after",
        }
    }
}

fn failure(what: &'static str) -> Error {
    Error::Generic { store: "simulated bucket", source: what.into() }
}

/// A body as it arrives.
fn body(bytes: &Bytes, fate: Fate) -> Vec<Result<Bytes>> {
    let mut rng = Rng::new(fate.seed);
    let cut = if bytes.is_empty() { 0 } else { rng.below(bytes.len()) };
    match fate.fault {
        Some(Fault::Truncated) => vec![Ok(bytes.slice(..cut))],
        Some(Fault::Reset) => vec![Ok(bytes.slice(..cut)), Err(failure("the body broke off"))],
        Some(Fault::Flipped) if !bytes.is_empty() => {
            let mut flipped = bytes.to_vec();
            flipped[cut] ^= 1 << rng.below(8);
            vec![Ok(flipped.into())]
        }
        _ => vec![Ok(bytes.clone())],
    }
}

impl fmt::Display for FaultStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FaultStore({:?})", self.plan)
    }
}

#[async_trait]
#[deny(clippy::missing_trait_methods)]
impl ObjectStore for FaultStore {
    async fn put_opts(&self, location: &Path, payload: PutPayload, options: PutOptions) -> Result<PutResult> {
        let fate = self.arrive(format!("put {location}"), &[Fault::After, Fault::Slow, Fault::Stuck]).await?;
        let done = self.contents.memory.put_opts(location, payload, options).await;
        if done.is_ok() {
            self.contents.date(location);
        }
        // A lost answer is a lost answer, also where it would have been a refusal.
        self.answer(fate, ()).await.and(done)
    }

    async fn put_multipart_opts(&self, at: &Path, options: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        self.contents.memory.put_multipart_opts(at, options).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let (head, range) = (options.head, options.range.clone());
        let name = match (head, &range) {
            (true, _) => format!("head {location}"),
            (false, Some(range)) => format!("get {location} {range}"),
            (false, None) => format!("get {location}"),
        };
        let possible = [Fault::Slow, Fault::Stuck, Fault::Truncated, Fault::Flipped, Fault::Reset];
        let fate = self.arrive(name, if head { &possible[..2] } else { &possible }).await?;
        let found = match self.contents.memory.get_opts(location, options).await {
            Ok(found) => found,
            Err(error) => return self.answer(fate, ()).await.and(Err(error)),
        };
        let (meta, range) = (self.contents.dated(found.meta.clone()), found.range.clone());
        let (attributes, extensions) = (found.attributes.clone(), found.extensions.clone());
        let arriving = body(&found.bytes().await?, fate);
        let payload = GetResultPayload::Stream(futures::stream::iter(arriving).boxed());
        self.answer(fate, GetResult { payload, meta, range, attributes, extensions }).await
    }

    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        let mut found = Vec::with_capacity(ranges.len());
        for range in ranges {
            let options = GetOptions { range: Some(range.clone().into()), ..GetOptions::default() };
            found.push(self.get_opts(location, options).await?.bytes().await?);
        }
        Ok(found)
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let store = self.clone();
        locations
            .then(move |location| {
                let store = store.clone();
                async move {
                    let location = location?;
                    let fate =
                        store.arrive(format!("delete {location}"), &[Fault::After, Fault::Slow, Fault::Stuck]).await?;
                    let one = futures::stream::iter([Ok(location.clone())]).boxed();
                    store.contents.memory.delete_stream(one).try_collect::<Vec<_>>().await?;
                    store.answer(fate, location).await
                }
            })
            .boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.listing(format!("list {}", prefix.cloned().unwrap_or_default()), self.contents.memory.list(prefix))
    }

    fn list_with_offset(&self, prefix: Option<&Path>, offset: &Path) -> BoxStream<'static, Result<ObjectMeta>> {
        let name = format!("list {} after {offset}", prefix.cloned().unwrap_or_default());
        self.listing(name, self.contents.memory.list_with_offset(prefix, offset))
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let name = format!("folders {}", prefix.cloned().unwrap_or_default());
        let fate = self.arrive(name, &[Fault::Slow, Fault::Stuck]).await?;
        let mut found = self.contents.memory.list_with_delimiter(prefix).await?;
        found.objects = found.objects.into_iter().map(|meta| self.contents.dated(meta)).collect();
        self.answer(fate, found).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.contents.memory.copy_opts(from, to, options).await
    }

    async fn rename_opts(&self, from: &Path, to: &Path, options: RenameOptions) -> Result<()> {
        self.contents.memory.rename_opts(from, to, options).await
    }
}
