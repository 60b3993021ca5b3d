//! A lake in memory with a few store paths, a source over it that can stall or fail, and mounts that go away again.

use std::collections::BTreeMap;
use std::future::pending;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use narlake_format::id::BlobId;
use narlake_format::lake::location::{Location, PackRef};
use narlake_format::lake::record::PathRecord;
use narlake_format::nar::{Event, Writer};
use narlake_format::nix::compression::Compression;
use narlake_format::nix::hash::Sha256Hash;
use narlake_format::nix::narinfo::NarInfo;
use narlake_format::nix::realisation::{Realisation, RealisationKey};
use narlake_format::nix::signature::SecretKey;
use narlake_format::nix::store_path::{StoreDir, StorePath, StorePathHash};
use narlake_mountd::app::{Daemon, Sources};
use narlake_mountd::cache::{Cache, CacheSettings};
use narlake_mountd::config::{Config, Settings};
use narlake_mountd::fs::nodes::NodeTable;
use narlake_mountd::fs::trees::Trees;
use narlake_mountd::fs::{LazyStore, StoreSettings};
use narlake_mountd::metadata::{Blobs, Metadata, Records};
use narlake_mountd::metrics::Metrics;
use narlake_mountd::mounter::Mounter;
use narlake_mountd::overlay::{Overlays, Own};
use narlake_mountd::remote::{Cause, RemoteError};
use narlake_mountd::trust::TrustedKeys;
use narlake_mountd::view::{OnOutage, RecordSource, View, ViewSettings};
use narlake_storage::fetch::{BlobSource, FetchSettings, Fetcher};
use narlake_storage::{Bucket, Components, DocumentKey, Error, Lake, OsEntropy, SystemClock, UploadName};
use tempfile::TempDir;

/// What is in a store object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Node {
    File { executable: bool, content: Vec<u8> },
    Link(Vec<u8>),
    Dir(BTreeMap<Vec<u8>, Node>),
}

pub(crate) fn file(content: impl AsRef<[u8]>) -> Node {
    Node::File { executable: false, content: content.as_ref().to_vec() }
}

pub(crate) fn program(content: impl AsRef<[u8]>) -> Node {
    Node::File { executable: true, content: content.as_ref().to_vec() }
}

pub(crate) fn link(target: impl AsRef<[u8]>) -> Node {
    Node::Link(target.as_ref().to_vec())
}

pub(crate) fn dir<const N: usize>(entries: [(&str, Node); N]) -> Node {
    Node::Dir(entries.into_iter().map(|(name, node)| (name.as_bytes().to_vec(), node)).collect())
}

/// Bytes that do not compress and differ with the seed.
pub(crate) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let step = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    std::iter::repeat_with(step).take(length).collect()
}

fn nar(node: &Node, writer: &mut Writer, out: &mut Vec<u8>) {
    match node {
        Node::File { executable, content } => {
            writer.event(Event::File { executable: *executable, size: content.len() as u64 }, out).unwrap();
            if !content.is_empty() {
                writer.event(Event::Data(content), out).unwrap();
            }
            writer.event(Event::EndFile, out).unwrap();
        }
        Node::Link(target) => writer.event(Event::Symlink { target }, out).unwrap(),
        Node::Dir(entries) => {
            writer.event(Event::Directory, out).unwrap();
            for (name, node) in entries {
                writer.event(Event::Entry { name }, out).unwrap();
                nar(node, writer, out);
            }
            writer.event(Event::EndDirectory, out).unwrap();
        }
    }
}

/// How the source behaves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum Mood {
    Answers,
    /// Takes questions and never answers.
    Stalls,
    /// Refuses connections.
    Down,
}

/// The lake as mountd's source.
pub(crate) struct Source {
    lake: Lake,
    cache: narlake_storage::Cache,
    mood: AtomicU8,
    /// Whether bytes of packs are wrong.
    pub(crate) lies: AtomicBool,
    /// Every answer takes this long, in microseconds.
    delay_us: AtomicU64,
    /// When the line to the source, of 100 Mbit/s while there is a delay, is free.
    line: tokio::sync::Mutex<()>,
    pub(crate) lookups: AtomicU64,
    pub(crate) reads: AtomicU64,
    pub(crate) read_bytes: AtomicU64,
    pub(crate) locates: AtomicU64,
    pub(crate) closures: AtomicU64,
    pub(crate) realisations: AtomicU64,
}

impl Source {
    pub(crate) fn set(&self, mood: Mood) {
        self.mood.store(mood as u8, Ordering::SeqCst);
    }

    /// From now on the source is this far away, over a line of 100 Mbit/s.
    pub(crate) fn move_away(&self, round_trip: Duration) {
        self.delay_us.store(u64::try_from(round_trip.as_micros()).unwrap(), Ordering::SeqCst);
    }

    /// Forgets what has been counted.
    pub(crate) fn count_anew(&self) {
        for count in [&self.lookups, &self.reads, &self.read_bytes, &self.locates, &self.closures, &self.realisations] {
            count.store(0, Ordering::SeqCst);
        }
    }

    /// The time that bytes take on the line, one answer after the other.
    async fn travel(&self, bytes: u64) {
        if self.delay_us.load(Ordering::SeqCst) > 0 {
            let _line = self.line.lock().await;
            tokio::time::sleep(Duration::from_nanos(bytes * 80)).await;
        }
    }

    async fn gate(&self, key: String) -> Result<(), RemoteError> {
        let delay_us = self.delay_us.load(Ordering::SeqCst);
        if delay_us > 0 {
            tokio::time::sleep(Duration::from_micros(delay_us)).await;
        }
        match self.mood.load(Ordering::SeqCst) {
            mood if mood == Mood::Answers as u8 => Ok(()),
            mood if mood == Mood::Stalls as u8 => pending().await,
            _ => {
                let cause = Cause::Status { status: 503, text: "down".into() };
                Err(RemoteError { operation: "ask", key, cause })
            }
        }
    }
}

#[async_trait]
impl BlobSource for Source {
    async fn locate(&self, ids: &[BlobId]) -> Result<Vec<Option<Location>>, Error> {
        self.gate("locate".into()).await?;
        self.locates.fetch_add(1, Ordering::SeqCst);
        self.travel(ids.len() as u64 * 32).await;
        self.lake.locate(&self.cache.domain(), ids).await
    }

    async fn read(&self, pack: &PackRef, range: Range<u64>) -> Result<Bytes, Error> {
        self.gate(pack.to_string()).await?;
        self.reads.fetch_add(1, Ordering::SeqCst);
        self.read_bytes.fetch_add(range.end - range.start, Ordering::SeqCst);
        self.travel(range.end - range.start).await;
        let bytes = self.lake.read_pack(pack, range).await?;
        if self.lies.load(Ordering::SeqCst) {
            return Ok(bytes.iter().map(|byte| byte ^ 4).collect());
        }
        Ok(bytes)
    }

    async fn size(&self, pack: &PackRef) -> Result<u64, Error> {
        self.gate(pack.to_string()).await?;
        self.lake.pack_size(pack).await
    }
}

#[async_trait]
impl RecordSource for Source {
    async fn lookup(&self, hash: &StorePathHash) -> Result<Option<PathRecord>, RemoteError> {
        self.lookups.fetch_add(1, Ordering::SeqCst);
        self.gate(hash.to_string()).await?;
        Ok(self.lake.lookup(&self.cache, hash).await.unwrap().map(|record| PathRecord::clone(&record)))
    }

    async fn closure(
        &self,
        roots: &[StorePathHash],
        on: &mut (dyn FnMut(PathRecord) + Send),
    ) -> Result<Vec<StorePathHash>, RemoteError> {
        self.closures.fetch_add(1, Ordering::SeqCst);
        self.gate("closure".into()).await?;
        let (records, missing) = self.lake.closure(&self.cache, roots).await.unwrap();
        records.iter().for_each(|record| on(PathRecord::clone(record)));
        Ok(missing)
    }

    async fn realisation(&self, key: &RealisationKey) -> Result<Option<Realisation>, RemoteError> {
        self.realisations.fetch_add(1, Ordering::SeqCst);
        self.gate(key.to_string()).await?;
        let document = self.lake.get_document(&self.cache, &DocumentKey::Realisation(key.clone())).await.unwrap();
        Ok(document.map(|document| Realisation::parse(key, &document).unwrap()))
    }
}

/// The source as somebody sees it who may not see one path.
struct Hiding {
    source: Arc<Source>,
    hidden: StorePathHash,
}

#[async_trait]
impl RecordSource for Hiding {
    async fn lookup(&self, hash: &StorePathHash) -> Result<Option<PathRecord>, RemoteError> {
        if *hash == self.hidden { Ok(None) } else { self.source.lookup(hash).await }
    }

    async fn closure(
        &self,
        roots: &[StorePathHash],
        on: &mut (dyn FnMut(PathRecord) + Send),
    ) -> Result<Vec<StorePathHash>, RemoteError> {
        if roots.contains(&self.hidden) {
            return Ok(vec![self.hidden]);
        }
        self.source.closure(roots, on).await
    }

    async fn realisation(&self, key: &RealisationKey) -> Result<Option<Realisation>, RemoteError> {
        self.source.realisation(key).await
    }
}

/// A lake, and a directory for whoever mounts it.
pub(crate) struct World {
    pub(crate) lake: Lake,
    pub(crate) source: Arc<Source>,
    pub(crate) key: SecretKey,
    /// A key that the cache believes too, and mountd does not.
    pub(crate) other_key: SecretKey,
    pub(crate) metrics: Metrics,
    pub(crate) dir: TempDir,
    pub(crate) deadline: Duration,
    pub(crate) cache_bytes: u64,
    pub(crate) metadata_bytes: u64,
    pub(crate) on_outage: OnOutage,
}

impl World {
    pub(crate) async fn new() -> Self {
        // Under the target directory: /tmp may be an overlay, or small.
        let dir = std::env::var_os(TEST_DIR).unwrap_or_else(|| env!("CARGO_TARGET_TMPDIR").into());
        let dir = tempfile::tempdir_in(dir).unwrap();
        let metrics = narlake_storage::Metrics::new(&prometheus::Registry::new());
        let components = Components {
            bucket: Bucket::memory(&metrics),
            clock: Arc::new(SystemClock),
            entropy: Arc::new(OsEntropy),
            metrics,
        };
        let settings = narlake_storage::Settings {
            state_dir: dir.path().join("state"),
            seal_after: Duration::from_millis(1),
            ..narlake_storage::Settings::default()
        };
        let lake = Lake::open(settings, components).await.unwrap();
        let key = SecretKey::generate("test-1", [7; 32]).unwrap();
        let other_key = SecretKey::generate("test-1", [8; 32]).unwrap();
        let cache = lake.default_cache("default", &[key.public(), other_key.public()]).await.unwrap();
        let source = Source {
            lake: lake.clone(),
            cache,
            mood: AtomicU8::new(Mood::Answers as u8),
            lies: AtomicBool::new(false),
            delay_us: AtomicU64::new(0),
            line: tokio::sync::Mutex::default(),
            lookups: AtomicU64::new(0),
            reads: AtomicU64::new(0),
            read_bytes: AtomicU64::new(0),
            locates: AtomicU64::new(0),
            closures: AtomicU64::new(0),
            realisations: AtomicU64::new(0),
        };
        let (deadline, cache_bytes) = (Duration::from_secs(10), 1 << 30);
        let (source, metrics) = (Arc::new(source), Metrics::new());
        let (metadata_bytes, on_outage) = (1 << 30, OnOutage::Fail);
        Self { lake, source, key, other_key, metrics, dir, deadline, cache_bytes, metadata_bytes, on_outage }
    }

    /// A store path of this name that nothing has been pushed for.
    pub(crate) fn path(name: &str) -> StorePath {
        let digest = Sha256Hash::of(name.as_bytes());
        let hash = StorePathHash::from_bytes(digest.as_bytes()[..20].try_into().unwrap());
        StorePath { hash, name: name.parse().unwrap() }
    }

    /// Pushes an object under the path that [`World::path`] gives for the name.
    pub(crate) async fn push(&self, name: &str, node: &Node, references: &[StorePath]) -> StorePath {
        let path = Self::path(name);
        self.push_as(&path, node, references, std::slice::from_ref(&self.key)).await;
        path
    }

    pub(crate) async fn push_as(&self, path: &StorePath, node: &Node, references: &[StorePath], signers: &[SecretKey]) {
        let (mut writer, mut bytes) = (Writer::new(), Vec::new());
        nar(node, &mut writer, &mut bytes);
        writer.finish().unwrap();
        let nar_hash = Sha256Hash::of(&bytes);
        let nar_size = bytes.len() as u64;
        let cache = &self.source.cache;
        let stream = futures::stream::iter([Ok(Bytes::from(bytes))]);
        let ingested = self.lake.ingest(cache, stream).await.unwrap();
        let upload = UploadName { file_hash: nar_hash, compression: Compression::None };
        self.lake.keep_upload(cache, &upload, &ingested).await.unwrap();
        let info = NarInfo {
            store_path: path.clone(),
            url: format!("nar/{}.nar", nar_hash.to_base32()),
            compression: Compression::None,
            file_hash: None,
            file_size: None,
            nar_hash,
            nar_size,
            references: references.to_vec(),
            deriver: None,
            signatures: Vec::new(),
            ca: None,
            extra: Vec::new(),
        };
        self.lake.publish(cache, info, signers).await.unwrap();
    }

    /// Pushes what an output turned out to be, signed by these.
    pub(crate) async fn realise(&self, key: &RealisationKey, out_path: &StorePath, signers: &[SecretKey]) {
        let dependent = BTreeMap::new();
        let realisation = Realisation { out_path: out_path.clone(), dependent, signatures: Vec::new() };
        let document = Realisation::sign(key, realisation.to_document(key).as_bytes(), signers).unwrap();
        let key = DocumentKey::Realisation(key.clone());
        self.lake.put_document(&self.source.cache, &key, document.into()).await.unwrap();
    }

    /// Of a token that may see what the default one may, but for the path of that name.
    pub(crate) fn connect(&self) -> narlake_mountd::views::Connect {
        let source = Arc::clone(&self.source);
        Arc::new(move |token, _| {
            let blobs: Arc<dyn BlobSource> = Arc::clone(&source) as _;
            let hidden = Self::path(&token).hash;
            Ok((blobs, Arc::new(Hiding { source: Arc::clone(&source), hidden }) as _))
        })
    }

    pub(crate) fn trusted(&self) -> TrustedKeys {
        TrustedKeys::new(StoreDir::default(), vec![self.key.public()])
    }

    /// The file system over this lake, without a kernel.
    pub(crate) fn store(&self) -> Store {
        let dir = self.dir.path().join("cache");
        let settings = CacheSettings { bytes_max: self.cache_bytes, ..CacheSettings::default() };
        let cache = Cache::open(&dir, settings, &self.metrics).unwrap();
        let nodes = Arc::new(NodeTable::open(&dir.join("nodes"), cache.booted_since()).unwrap());
        let own = Own {
            lower: "/nonexistent".into(),
            store_dir: "/nix/store".into(),
            nix_socket: "/nonexistent".into(),
            needed: Vec::new(),
            files: Vec::new(),
        };
        let overlays = Arc::new(Overlays::new(own, Mounter::Alone, &self.metrics));
        let settings = ViewSettings { deadline: self.deadline, on_outage: self.on_outage, records_bytes: 16 << 20 };
        let fetch = FetchSettings { deadline: self.deadline, gap_bytes: 256 << 10, ..FetchSettings::default() };
        let fetcher = Fetcher::metered(Arc::clone(&self.source) as _, fetch, self.metrics.fetch.clone());
        let metadata = Metadata::open(&dir, self.metadata_bytes, self.trusted(), &self.metrics).unwrap();
        let metadata = Arc::new(metadata);
        let blobs = Blobs::new(fetcher.clone(), Arc::clone(&metadata));
        let parts = (blobs.clone(), Arc::clone(&nodes), overlays);
        let records = Arc::new(Records::new(Arc::clone(&self.source) as _, metadata));
        let view = View::new(records, self.trusted(), parts, settings, &self.metrics);
        let trees = Arc::new(Trees::open(&dir, 1 << 30, &self.metrics).unwrap());
        let settings = StoreSettings { deadline: self.deadline, tree_bytes: 16 << 20, trees };
        let lazy = LazyStore::new(view.clone(), nodes, &blobs, Arc::clone(&cache), settings, &self.metrics);
        Store { lazy, view, cache, fetcher }
    }

    pub(crate) fn config(&self) -> Config {
        let path = |name: &str| Some(self.dir.path().join(name));
        let settings = Settings {
            server: Some("http://127.0.0.1:1".into()),
            mount: path("mnt"),
            cache_dir: path("cache"),
            nix_socket: path("nix.sock"),
            control: path("control.sock"),
            cache_bytes: Some(self.cache_bytes),
            metadata_bytes: Some(self.metadata_bytes),
            fetch_deadline_s: Some(self.deadline.as_secs().max(1)),
            on_outage: Some(self.on_outage),
            ..Settings::default()
        };
        settings.check(None).unwrap()
    }

    /// A daemon that serves this lake on a mount; `None`, with a line, where this host cannot mount.
    pub(crate) async fn mount(&self) -> Option<Mounted> {
        if !can_mount() {
            return None;
        }
        let sources = Sources {
            blobs: Arc::clone(&self.source) as _,
            records: Arc::clone(&self.source) as _,
            keys: self.trusted(),
            key_names: vec!["test-1".into()],
            connect: self.connect(),
        };
        let config = self.config();
        let daemon = Daemon::start(&config, Mounter::Alone, sources, &self.metrics).await.unwrap();
        Some(Mounted { daemon: Some(daemon), mount: config.mount, dir: self.dir.path().to_owned() })
    }

    /// How many messages of this operation the kernel has sent.
    pub(crate) fn messages(&self, operation: &str) -> u64 {
        self.metrics.fuse_requests.with_label_values(&[operation]).get()
    }
}

/// A file system without a kernel.
pub(crate) struct Store {
    pub(crate) lazy: LazyStore,
    pub(crate) view: View,
    pub(crate) cache: Arc<Cache>,
    pub(crate) fetcher: Fetcher,
}

/// Set where a test runs itself again as another user: the directory that this one may write to.
pub(crate) const TEST_DIR: &str = "NARLAKE_TEST_DIR";

/// Whether this host can mount; if not, a line says so.
pub(crate) fn can_mount() -> bool {
    let reason = if !rustix::process::geteuid().is_root() && std::env::var_os(TEST_DIR).is_none() {
        "not root, cannot mount"
    } else if !Path::new("/dev/fuse").exists() {
        "no /dev/fuse, cannot mount"
    } else {
        return true;
    };
    eprintln!("SKIP: {reason}");
    false
}

/// A daemon of this process with its mount, which goes away with the test however that ends.
pub(crate) struct Mounted {
    pub(crate) daemon: Option<Daemon>,
    pub(crate) mount: PathBuf,
    pub(crate) dir: PathBuf,
}

impl Mounted {
    pub(crate) fn at(&self, path: &StorePath) -> PathBuf {
        self.mount.join(path.to_string())
    }

    /// Stops in order, as a signal would have it.
    pub(crate) async fn stop(mut self) {
        self.end().await;
    }

    /// The same, but what others mounted stays until this is dropped.
    pub(crate) async fn end(&mut self) {
        self.daemon.take().unwrap().stop().await.unwrap();
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        unmount_below(&self.dir);
    }
}

/// Detaches whatever is mounted below a directory, the newest first.
pub(crate) fn unmount_below(dir: &Path) {
    use rustix::mount::{UnmountFlags, unmount};
    for mount in narlake_mountd::mountinfo::mounts().unwrap().iter().rev() {
        if mount.mount_point.starts_with(dir) {
            let _ = unmount(&mount.mount_point, UnmountFlags::DETACH);
        }
    }
}

/// Runs what a program would do to the mount, away from the threads that serve it.
pub(crate) async fn outside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.unwrap()
}
